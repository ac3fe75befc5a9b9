// What the operator file and the kernels of attention_kl share: the arguments of a call and its tiling.
//
// Both passes walk the same way. A block holds 64 rows of one sequence and head (queries; keys for the gradient of the
// keys) in shared memory and lets the other side pass by in tiles of columns. Each of its four warps forms the scores
// of 16 rows and one tile, of the student and of the teacher, in registers, where they stay.
#pragma once

#include "device.h"

namespace fastdistil::cuda {

enum class Dtype { float32, bfloat16, float16 };

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kMaxHead = 128;
constexpr double kLog2e = 1.4426950408889634;

// Columns of a tile; float32 numbers fill twice the memory, and their scores are formed without tensor cores.
template <class T>
constexpr int kColumns = 64;
template <>
inline constexpr int kColumns<float> = 32;

// (B, H, L, d): the queries or keys of one model. Strides in elements; that of d is 1.
struct States {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int d;
  Dtype dtype;
  int aligned;  // bytes, at most 16, to which every row begins and ends
};

struct AttentionKl {
  States student_q, student_k, teacher_q, teacher_k;
  const bool* mask;  // (B, L), (B, L, L) or null
  bool mask_is_pairs;
  int64_t B, H;
  int L;
  float student_scale, teacher_scale;  // of the scores, times log2(e): exponentials are powers of 2
  int stages;                          // tiles in flight: 2, or 1 where shared memory is short
  int shared_bytes;
};

// What turns a row's scores into probabilities: 2^(score - max) / sum, scores times log2(e). (B, H, L) each. Their one
// number max + log2(sum) would not do: its rounding, which grows with the scores, would be common to a row.
template <class Float>
struct SoftmaxRows {
  Float* max;
  Float* sum;
};

struct AttentionKlResults {
  float* kl;  // (B, H, L)
  SoftmaxRows<float> student, teacher;
};

struct AttentionKlGradients {
  const float* weight;  // (B, H, L)
  SoftmaxRows<const float> student, teacher;
  float scale;  // that of the student's scores
  States grad_q, grad_k;
};

// Shared memory is read in fragments of 16 by 16, so a row has a multiple of 16 elements; 16 bytes more let eight
// consecutive rows begin in different banks.
__host__ __device__ constexpr int padded_head(int d) { return (d + 15) / 16 * 16; }
template <class T>
__host__ __device__ constexpr int shared_pitch(int d) {
  return padded_head(d) + 16 / static_cast<int>(sizeof(T));
}

// The rows and `stages` tiles of columns.
template <class T>
constexpr int shared_bytes(int student_d, int teacher_d, int stages) {
  const int pitch = shared_pitch<T>(student_d) + shared_pitch<T>(teacher_d);
  return (kRows + stages * kColumns<T>) * pitch * static_cast<int>(sizeof(T));
}

inline int64_t block_count(const AttentionKl& p) { return p.B * p.H * ((p.L + kRows - 1) / kRows); }

// `compute` is what the tiles hold: the dtype of all four tensors, or float32 where they differ.
cudaError_t attention_kl_fwd(const AttentionKl& problem, const AttentionKlResults& results, Dtype compute,
                             cudaStream_t stream);
cudaError_t attention_kl_bwd(const AttentionKl& problem, const AttentionKlGradients& gradients, Dtype compute,
                             cudaStream_t stream);

}  // namespace fastdistil::cuda
