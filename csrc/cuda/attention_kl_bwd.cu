// The backward pass of attention_kl: the probabilities again from the scores and each row's maximum and sum.
//
// With G_ij = weight_i (As_ij - At_ij): grad_q = scale G K and grad_k = scale G^T Q. Both are the same walk with the
// queries and keys exchanged, a kernel each, so that every gradient is summed by one warp in one order.
#include "mask.h"

#include <type_traits>

namespace fastdistil::cuda {
namespace {

// G enters a product as T. float16 has nothing below 6e-8, where a weight of a mean over rows puts most of G, so it is
// multiplied by a power of two that takes its largest possible element to 2^15, and the product is divided by it.
struct PowerOfTwo {
  float factor = 1, inverse = 1;

  // For elements below 2^(exponent - 126); exponent is that of a float32, biased.
  __device__ static PowerOfTwo to_fit_float16(unsigned exponent) {
    exponent = exponent < 15u ? 15u : exponent;
    return {__uint_as_float((268u - exponent) << 23), __uint_as_float((exponent - 14u) << 23)};
  }
};

// The biased exponent of the largest finite weight of the sequence and head. What the weights of rows that do not count
// hold is not known here; only a large finite number would cost the others precision.
__device__ unsigned largest_exponent(const float* weight, int L) {
  unsigned largest = 0;
  for (int i = threadIdx.x; i < L; i += kThreads) {
    const unsigned exponent = __float_as_uint(weight[i]) >> 23 & 0xffu;
    largest = max(largest, exponent == 0xffu ? 0u : exponent);
  }
  unsigned* of_warp = reinterpret_cast<unsigned*>(shared_memory());
  largest = __reduce_max_sync(kWarp, largest);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, of_warp[warp]);
  __syncthreads();
  return largest;
}

template <class Target>
__device__ void store_head(const States& grad, int64_t offset, int column, float x0, float x1) {
  Target* target = static_cast<Target*>(grad.data) + offset + column;
  if (grad.aligned >= 2 * static_cast<int>(sizeof(Target)) && column + 1 < grad.d) {
    if constexpr (sizeof(Target) == 2) {
      *reinterpret_cast<uint32_t*>(target) = pack<Target>(x0, x1);
    } else {
      *reinterpret_cast<float2*>(target) = float2{x0, x1};
    }
    return;
  }
  if (column < grad.d) target[0] = from_float<Target>(x0);
  if (column + 1 < grad.d) target[1] = from_float<Target>(x1);
}

// A block writes the gradient of 64 queries (of 64 keys if kOfKeys); D is the number of 8-element pieces of a head.
template <class T, int D, bool kOfKeys>
__global__ void __launch_bounds__(kThreads, D == 8 ? 3 : 2) attention_kl_bwd_kernel(const AttentionKl p,
                                                                    const AttentionKlGradients gradients) {
  constexpr int N = kColumns<T> / 8;
  const int lane = threadIdx.x % 32, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int head = p.student_q.d;
  const Place place(p);
  const Tiles<T> tiles(p);
  Mask<kColumns<T>, !kOfKeys> mask(p, place);
  const bool any_row = mask.any_row();

  // The numbers of the queries come with their tile, of rows or of columns.
  const float* weight = gradients.weight + place.sequence * p.L;
  const auto of_sequence = [&](const float* numbers) { return numbers + place.sequence * p.L; };
  const SoftmaxRows<const float> student_rows{of_sequence(gradients.student.max), of_sequence(gradients.student.sum)};
  const SoftmaxRows<const float> teacher_rows{of_sequence(gradients.teacher.max), of_sequence(gradients.teacher.sum)};
  const int row = place.first_row + warp_row + lane / 4;
  // Of a query: the student's factor and maximum, the teacher's maximum and factor.
  const auto numbers_of = [&](int query, float own_weight) {
    return float4{own_weight / student_rows.sum[query], student_rows.max[query], teacher_rows.max[query],
                  own_weight / teacher_rows.sum[query]};
  };
  PowerOfTwo unit;
  if constexpr (!kOfKeys) {
    // Weights are factors of whole rows here, applied at the end; probabilities differ by at most 1.
    if constexpr (std::is_same_v<T, float16>) unit = PowerOfTwo::to_fit_float16(126);
  } else if constexpr (std::is_same_v<T, float16>) {
    unit = PowerOfTwo::to_fit_float16(largest_exponent(weight, p.L));
  }

  const States& student_side = kOfKeys ? p.student_k : p.student_q;
  const States& teacher_side = kOfKeys ? p.teacher_k : p.teacher_q;
  const States& student_other = kOfKeys ? p.student_q : p.student_k;
  const States& teacher_other = kOfKeys ? p.teacher_q : p.teacher_k;
  if (any_row) {
    tiles.clear(p);
    load_rows(tiles.student_rows(), student_side, place, place.first_row, kRows, p.L);
    load_rows(tiles.teacher_rows(), teacher_side, place, place.first_row, kRows, p.L);
    const int i = threadIdx.x, query = place.first_row + i;
    if (!kOfKeys && i < kRows) *tiles.numbers(i) = query < p.L ? numbers_of(query, 1.0f) : float4{};
  }

  float gradient[D][4] = {};
  bool counts[2] = {false, false};
  const auto load = [&](int tile, int stage) {
    const int first = tile * kColumns<T>;
    load_rows(tiles.student_columns(stage), student_other, place, first, kColumns<T>, p.L);
    load_rows(tiles.teacher_columns(stage), teacher_other, place, first, kColumns<T>, p.L);
    if constexpr (kOfKeys) {
      const int i = threadIdx.x;
      if (i < kColumns<T>) {
        const int query = first + i;
        *tiles.numbers(stage, i) = query < p.L ? numbers_of(query, weight[query]) : float4{};
      }
    }
  };
  const auto use = [&](int tile, int stage) {
    uint64_t bits[2];
    mask.bits_of_tile(tile * kColumns<T>, bits);
    const uint64_t used = any_row_of_warp(bits);
    if (used == 0) return;
    float g[N][4], t[N][4];
    scores(g, tiles.student_rows() + warp_row * shared_pitch<T>(head), tiles.student_columns(stage), head);
    scores(t, tiles.teacher_rows() + warp_row * shared_pitch<T>(p.teacher_q.d), tiles.teacher_columns(stage),
           p.teacher_q.d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i;
        float4 of_column = {};
        if constexpr (kOfKeys) of_column = *tiles.numbers(stage, column);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float4 numbers = kOfKeys ? of_column : *tiles.numbers(warp_row + lane / 4 + 8 * r);
          const int e = 2 * r + i;
          const float student = exp2_approx(g[n][e] * p.student_scale - numbers.y) * numbers.x;
          const float teacher = exp2_approx(t[n][e] * p.teacher_scale - numbers.z) * numbers.w;
          g[n][e] = bits[r] >> column & 1 ? unit.factor * (student - teacher) : 0.0f;
        }
      }
    }
    add_product(gradient, g, tiles.student_columns(stage), head, used);
    for (int r = 0; r < 2; ++r) counts[r] |= bits[r] != 0;
  };
  for_each_tile(any_row ? (p.L + kColumns<T> - 1) / kColumns<T> : 0, p.stages, load, use);

  const States& grad = kOfKeys ? gradients.grad_k : gradients.grad_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= p.L) continue;
    float factor = 0;
    if (counts[r]) factor = gradients.scale * unit.inverse * (kOfKeys ? 1.0f : weight[row + 8 * r]);
    const int64_t offset = head_offset(grad, place) + (row + 8 * r) * grad.row_stride;
#pragma unroll
    for (int n = 0; n < D; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float x0 = factor * gradient[n][2 * r], x1 = factor * gradient[n][2 * r + 1];
      if constexpr (sizeof(T) == 2) {
        store_head<T>(grad, offset, column, x0, x1);
      } else if (grad.dtype == Dtype::float32) {
        store_head<float>(grad, offset, column, x0, x1);
      } else if (grad.dtype == Dtype::bfloat16) {
        store_head<bfloat16>(grad, offset, column, x0, x1);
      } else {
        store_head<float16>(grad, offset, column, x0, x1);
      }
    }
  }
}

template <class T, int D>
cudaError_t launch_both(const AttentionKl& p, const AttentionKlGradients& gradients, cudaStream_t stream) {
  const cudaError_t error = launch(attention_kl_bwd_kernel<T, D, false>, block_count(p), kThreads, p.shared_bytes,
                                   stream, p, gradients);
  if (error != cudaSuccess) return error;
  return launch(attention_kl_bwd_kernel<T, D, true>, block_count(p), kThreads, p.shared_bytes, stream, p, gradients);
}

template <class T>
cudaError_t launch_for_head(const AttentionKl& p, const AttentionKlGradients& gradients, cudaStream_t stream) {
  return p.student_q.d <= 64 ? launch_both<T, 8>(p, gradients, stream)
                             : launch_both<T, kMaxHead / 8>(p, gradients, stream);
}

}  // namespace

cudaError_t attention_kl_bwd(const AttentionKl& p, const AttentionKlGradients& gradients, Dtype compute,
                             cudaStream_t stream) {
  switch (compute) {
    case Dtype::bfloat16: return launch_for_head<bfloat16>(p, gradients, stream);
    case Dtype::float16: return launch_for_head<float16>(p, gradients, stream);
    default: return launch_for_head<float>(p, gradients, stream);
  }
}

}  // namespace fastdistil::cuda
