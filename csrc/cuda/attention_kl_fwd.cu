// The forward pass of attention_kl: one pass over the keys with online softmax of both models.
//
// With scores s, t in units of ln 2 and running maxima m, a row keeps l = sum 2^(s - m) for each model and
// a = sum 2^(t - m_t) ((t - m_t) - (s - m_s)). Then KL = a / l_t - log2 l_t + log2 l_s, in which
// the maxima, which may be large, do not occur.
#include "mask.h"

namespace fastdistil::cuda {
namespace {

constexpr float kLn2 = 0.69314718055994531f;
// The score of a pair that does not count. Finite, so that differences of two are 0 and never NaN; what a row sums up
// before its first key that counts vanishes when the maximum rises from here.
constexpr float kNothing = -1e30f;

// One of a thread's two rows; sums are those of the thread's own columns.
struct RunningRow {
  float student_max = kNothing, teacher_max = kNothing;
  float student_sum = 0, teacher_sum = 0, difference = 0;
  bool counts = false;
};

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}

__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

// Scaled scores, kNothing where the pair does not count.
template <int N>
__device__ void scale_and_mask(float (&x)[N][4], float scale, const uint64_t (&bits)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool counts = bits[e / 2] >> (n * 8 + t * 2 + e % 2) & 1;
      x[n][e] = counts ? x[n][e] * scale : kNothing;
    }
  }
}

template <int N>
__device__ void add_tile(RunningRow& row, int r, const float (&s)[N][4], const float (&t)[N][4]) {
  float student_max = row.student_max, teacher_max = row.teacher_max;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    student_max = fmaxf(student_max, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    teacher_max = fmaxf(teacher_max, fmaxf(t[n][2 * r], t[n][2 * r + 1]));
  }
  student_max = quad_max(student_max);
  teacher_max = quad_max(teacher_max);
  const float student_rise = student_max - row.student_max, teacher_rise = teacher_max - row.teacher_max;
  const float teacher_factor = exp2_approx(-teacher_rise);
  row.student_sum *= exp2_approx(-student_rise);
  row.difference = teacher_factor * (row.difference + row.teacher_sum * (student_rise - teacher_rise));
  row.teacher_sum *= teacher_factor;
  row.student_max = student_max;
  row.teacher_max = teacher_max;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float log_s = s[n][2 * r + e] - student_max, log_t = t[n][2 * r + e] - teacher_max;
      const float power = exp2_approx(log_t);
      row.student_sum += exp2_approx(log_s);
      row.teacher_sum += power;
      row.difference += power * (log_t - log_s);
    }
  }
}

__device__ void store(const AttentionKlResults& results, int64_t index, const RunningRow& row, bool here) {
  const float student_sum = quad_sum(row.student_sum), teacher_sum = quad_sum(row.teacher_sum);
  const float kl = quad_sum(row.difference) / teacher_sum - log2f(teacher_sum) + log2f(student_sum);
  if (!here) return;
  results.kl[index] = row.counts ? kl * kLn2 : 0.0f;
  results.student.max[index] = row.counts ? row.student_max : 0.0f;
  results.student.sum[index] = row.counts ? student_sum : 1.0f;
  results.teacher.max[index] = row.counts ? row.teacher_max : 0.0f;
  results.teacher.sum[index] = row.counts ? teacher_sum : 1.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) attention_kl_fwd_kernel(const AttentionKl p,
                                                                    const AttentionKlResults results) {
  constexpr int N = kColumns<T> / 8;
  const int lane = threadIdx.x % 32, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const Place place(p);
  const Tiles<T> tiles(p);
  Mask<kColumns<T>, true> mask(p, place);
  const bool any_row = mask.any_row();
  if (any_row) {
    tiles.clear(p);
    load_rows(tiles.student_rows(), p.student_q, place, place.first_row, kRows, p.L);
    load_rows(tiles.teacher_rows(), p.teacher_q, place, place.first_row, kRows, p.L);
  }

  RunningRow rows[2];
  const auto load = [&](int tile, int stage) {
    load_rows(tiles.student_columns(stage), p.student_k, place, tile * kColumns<T>, kColumns<T>, p.L);
    load_rows(tiles.teacher_columns(stage), p.teacher_k, place, tile * kColumns<T>, kColumns<T>, p.L);
  };
  const auto use = [&](int tile, int stage) {
    uint64_t bits[2];
    mask.bits_of_tile(tile * kColumns<T>, bits);
    if (any_row_of_warp(bits) == 0) return;
    float s[N][4], t[N][4];
    scores(s, tiles.student_rows() + warp_row * shared_pitch<T>(p.student_q.d), tiles.student_columns(stage),
           p.student_q.d);
    scores(t, tiles.teacher_rows() + warp_row * shared_pitch<T>(p.teacher_q.d), tiles.teacher_columns(stage),
           p.teacher_q.d);
    scale_and_mask(s, p.student_scale, bits);
    scale_and_mask(t, p.teacher_scale, bits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].counts |= bits[r] != 0;
      add_tile(rows[r], r, s, t);
    }
  };
  for_each_tile(any_row ? (p.L + kColumns<T> - 1) / kColumns<T> : 0, p.stages, load, use);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = place.first_row + warp_row + lane / 4 + 8 * r;
    store(results, place.sequence * p.L + row, rows[r], row < p.L && lane % 4 == 0);
  }
}

}  // namespace

cudaError_t attention_kl_fwd(const AttentionKl& p, const AttentionKlResults& results, Dtype compute,
                             cudaStream_t stream) {
  const auto kernel = compute == Dtype::bfloat16  ? attention_kl_fwd_kernel<bfloat16>
                      : compute == Dtype::float16 ? attention_kl_fwd_kernel<float16>
                                                  : attention_kl_fwd_kernel<float>;
  return launch(kernel, block_count(p), kThreads, p.shared_bytes, stream, p, results);
}

}  // namespace fastdistil::cuda
