// What the operator files and the row kernels share: plain structs and one table of functions per instruction set.
//
// No torch header is included here. The files compiled for AVX2 or AVX-512 see this header only, so that no inline
// function of a library is compiled for an instruction set which the processor at hand may lack.
#pragma once

#include <cstdint>

namespace fastdistil {

enum class Dtype { float32, bfloat16, float16, float64 };
enum class Divergence { forward_kl, reverse_kl, jsd };

// Elements which are read, exponentiated and summed together: two input blocks and two scratch blocks fit into L1.
constexpr int64_t kBlock = 256;

constexpr int64_t block_count(int64_t V) { return (V + kBlock - 1) / kBlock; }

// The scratch of one thread, counted in elements of the accumulation type: exponentials of the student, of the teacher
// and of the student at temperature 1; the running maxima of each block; staging blocks for conversions and tails.
constexpr int64_t kd_loss_scratch(int64_t V) { return 3 * block_count(V) * kBlock + 2 * block_count(V) + 3 * kBlock; }

// What is the same for all rows of a call.
struct KdLossProblem {
  int64_t V;
  Dtype student_dtype;
  Dtype teacher_dtype;
  Dtype grad_dtype;
  const void* student_bias;  // (V,) of the accumulation type, or null
  const void* teacher_bias;
  Divergence divergence;
  double temperature;
  double jsd_beta;
  double label_smoothing;
};

struct KdLossRow {
  const void* student;  // (V,)
  const void* teacher;  // (V,), not read when has_kd is false
  void* grad;           // (V,) or null; may be the student's own memory
  bool has_kd;
  bool has_ce;
  int64_t label;
  double kd_scale;
  double ce_scale;
  double kd;  // results, not weighted; kd includes the squared temperature
  double ce;
};

struct CosineLossRow {
  const void* student;  // (D,)
  const void* teacher;  // (D,)
  void* grad;           // (D,) or null
  Dtype student_dtype;
  Dtype teacher_dtype;
  Dtype grad_dtype;
  int64_t D;
  double scale;
  double loss;  // result, not weighted
};

struct Kernels {
  const char* name;
  // The accumulation type is float, and double for float64 students.
  void (*kd_loss_row_float)(const KdLossProblem&, KdLossRow&, void* scratch);
  void (*kd_loss_row_double)(const KdLossProblem&, KdLossRow&, void* scratch);
  void (*cosine_loss_row_float)(CosineLossRow&);
  void (*cosine_loss_row_double)(CosineLossRow&);
  void (*scale_row)(void* row, Dtype dtype, int64_t D, double scale);
  void (*convert_to_float)(const void* source, Dtype dtype, int64_t n, float* target);
  void (*convert_to_double)(const void* source, Dtype dtype, int64_t n, double* target);
};

// The first two are null where the compiler does not target x86-64.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The table chosen for this processor; see capability.cpp.
const Kernels& kernels();

}  // namespace fastdistil
