// Tiles in shared memory, and the two matrix products over them.
#pragma once

#include "attention_kl.h"

namespace fastdistil::cuda {

// The sequence, head and rows of a block.
struct Place {
  int64_t batch, head, sequence;  // sequence = batch * H + head
  int first_row;

  __device__ explicit Place(const AttentionKl& p) {
    const unsigned blocks = (p.L + kRows - 1) / kRows;
    first_row = static_cast<int>(blockIdx.x % blocks) * kRows;
    sequence = blockIdx.x / blocks;
    batch = sequence / p.H;
    head = sequence % p.H;
  }
};

__device__ inline int64_t head_offset(const States& x, const Place& place) {
  return place.batch * x.batch_stride + place.head * x.head_stride;
}

// Not unrolled: a copy waits for nothing, and addresses computed ahead take registers from the scores.
template <int kBytes>
__device__ void copy_rows(char* tile, int pitch, const char* source, int64_t stride, int row_bytes, int count,
                          int present) {
#pragma unroll 1
  for (int row = threadIdx.x / 4; row < count; row += kThreads / 4) {
    const bool read = row < present;
    const char* from = source + (read ? row * stride : 0);
#pragma unroll 1
    for (int at = threadIdx.x % 4 * kBytes; at < row_bytes; at += 4 * kBytes) {
      copy_async<kBytes>(tile + row * pitch + at, from + at, read);
    }
  }
}

template <class T, class Source>
__device__ void convert_rows(T* tile, int pitch, const Source* source, int64_t stride, int d, int count, int present) {
#pragma unroll 1
  for (int row = threadIdx.x / 4; row < count; row += kThreads / 4) {
#pragma unroll 4
    for (int at = threadIdx.x % 4; at < d; at += 4) {
      tile[row * pitch + at] = from_float<T>(row < present ? to_float(source[row * stride + at]) : 0.0f);
    }
  }
}

// Rows [first, first + count) of a head; zeros from row L on. Elements past d are not written.
template <class T>
__device__ void load_rows(T* tile, const States& x, const Place& place, int first, int count, int L) {
  const int pitch = shared_pitch<T>(x.d);
  const int present = L - first;
  const int64_t offset = head_offset(x, place) + first * x.row_stride;
  if constexpr (sizeof(T) == 4) {
    if (x.dtype == Dtype::bfloat16) {
      const bfloat16* source = static_cast<const bfloat16*>(x.data) + offset;
      return convert_rows(tile, pitch, source, x.row_stride, x.d, count, present);
    }
    if (x.dtype == Dtype::float16) {
      const float16* source = static_cast<const float16*>(x.data) + offset;
      return convert_rows(tile, pitch, source, x.row_stride, x.d, count, present);
    }
  }
  const T* source = static_cast<const T*>(x.data) + offset;
  if (sizeof(T) == 2 && x.aligned < 4) {
    return convert_rows(tile, pitch, source, x.row_stride, x.d, count, present);
  }
  constexpr int size = sizeof(T);
  char* to = reinterpret_cast<char*>(tile);
  const char* from = reinterpret_cast<const char*>(source);
  if (x.aligned == 16) {
    copy_rows<16>(to, pitch * size, from, x.row_stride * size, x.d * size, count, present);
  } else if (x.aligned == 8) {
    copy_rows<8>(to, pitch * size, from, x.row_stride * size, x.d * size, count, present);
  } else {
    copy_rows<4>(to, pitch * size, from, x.row_stride * size, x.d * size, count, present);
  }
}

// The shared memory of a block.
template <class T>
class Tiles {
 public:
  __device__ explicit Tiles(const AttentionKl& p)
      : student_pitch_(shared_pitch<T>(p.student_q.d)),
        teacher_pitch_(shared_pitch<T>(p.teacher_q.d)),
        student_pad_(padded_head(p.student_q.d)),
        memory_(reinterpret_cast<T*>(shared_memory())) {}

  __device__ T* student_rows() const { return memory_; }
  __device__ T* teacher_rows() const { return memory_ + kRows * student_pitch_; }
  __device__ T* student_columns(int stage) const {
    return memory_ + (kRows + stage * kColumns<T>) * (student_pitch_ + teacher_pitch_);
  }
  __device__ T* teacher_columns(int stage) const { return student_columns(stage) + kColumns<T> * student_pitch_; }
  // Four numbers that come with a row or a column, in the 16 bytes which set it apart from the next in the student's
  // tile.
  __device__ float4* numbers(int row) const { return numbers(student_rows(), row); }
  __device__ float4* numbers(int stage, int column) const { return numbers(student_columns(stage), column); }

  // What lies past a head's elements enters the products, so it must be zero.
  __device__ void clear(const AttentionKl& p) const {
    uint4* memory = reinterpret_cast<uint4*>(memory_);
    for (int i = threadIdx.x; i < p.shared_bytes / 16; i += kThreads) memory[i] = uint4{0, 0, 0, 0};
    __syncthreads();
  }

 private:
  __device__ float4* numbers(T* tile, int row) const {
    return reinterpret_cast<float4*>(tile + row * student_pitch_ + student_pad_);
  }

  int student_pitch_;
  int teacher_pitch_;
  int student_pad_;
  T* memory_;
};

// Calls use(tile, stage) for each tile in turn, while load(tile, stage) fills the next.
template <class Load, class Use>
__device__ void for_each_tile(int tiles, int stages, const Load& load, const Use& use) {
  if (tiles > 0) load(0, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const bool more = tile + 1 < tiles;
    wait_for_copies();
    __syncthreads();  // the tile is there, and all warps are done with the one before it
    if (more && stages == 2) load(tile + 1, (tile + 1) % 2);
    use(tile, stages == 2 ? tile % 2 : 0);
    if (more && stages == 1) {
      __syncthreads();
      load(tile + 1, 0);
    }
  }
}

// c = rows columns^T for the warp's 16 rows and 8 N columns.
template <class T, int N>
__device__ void scores(float (&c)[N][4], const T* rows, const T* columns, int d) {
  const int lane = threadIdx.x % 32;
  const int pitch = shared_pitch<T>(d);
#pragma unroll
  for (int n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
  if constexpr (sizeof(T) == 2) {
    const T* a_row = rows + lane % 16 * pitch + lane / 16 * 8;
    const T* b_row = columns + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < padded_head(d); k += 16) {
      uint32_t a[4];
      load_matrices(a, a_row + k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_row + n * 8 * pitch + k);
        multiply<T>(c[n], a, b[0], b[1]);
        multiply<T>(c[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const T* row = rows + lane / 4 * pitch;
    const T* column = columns + lane % 4 * 2 * pitch;
#pragma unroll 1
    for (int k = 0; k < padded_head(d); k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(row + k);
      const float4 a1 = *reinterpret_cast<const float4*>(row + 8 * pitch + k);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = *reinterpret_cast<const float4*>(column + (n * 8 + e) * pitch + k);
          c[n][e] += a0.x * b.x + a0.y * b.y + a0.z * b.z + a0.w * b.w;
          c[n][e + 2] += a1.x * b.x + a1.y * b.y + a1.z * b.z + a1.w * b.w;
        }
      }
    }
  }
}

// acc += g columns for the warp's 16 rows, 8 N columns and 8 D elements of a head. A column whose bit in `used` is off
// may hold NaN and is left out; its g is 0.
template <class T, int N, int D>
__device__ void add_product(float (&acc)[D][4], const float (&g)[N][4], const T* columns, int d, uint64_t used) {
  const int lane = threadIdx.x % 32;
  const int pitch = shared_pitch<T>(d);
  if constexpr (sizeof(T) == 2) {
    const T* b_row = columns + lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      uint32_t a[4], keep[2];
      a[0] = pack<T>(g[2 * k][0], g[2 * k][1]);
      a[1] = pack<T>(g[2 * k][2], g[2 * k][3]);
      a[2] = pack<T>(g[2 * k + 1][0], g[2 * k + 1][1]);
      a[3] = pack<T>(g[2 * k + 1][2], g[2 * k + 1][3]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned pair = static_cast<unsigned>(used >> (k * 16 + half * 8 + lane % 4 * 2)) & 3u;
        keep[half] = (pair & 1u) * 0xffffu | (pair >> 1) * 0xffff0000u;
      }
#pragma unroll
      for (int n = 0; n < D; n += 2) {
        if (n * 8 < d) {
          uint32_t b[4];
          load_matrices_transposed(b, b_row + k * 16 * pitch + n * 8);
          multiply<T>(acc[n], a, b[0] & keep[0], b[1] & keep[1]);
          multiply<T>(acc[n + 1], a, b[2] & keep[0], b[3] & keep[1]);
        }
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {
          const int column = n * 8 + owner * 2 + e;
          if ((used >> column & 1) == 0) continue;
          const float g0 = __shfl_sync(kWarp, g[n][e], lane / 4 * 4 + owner);
          const float g1 = __shfl_sync(kWarp, g[n][e + 2], lane / 4 * 4 + owner);
          const T* row = columns + column * pitch + lane % 4 * 2;
#pragma unroll
          for (int m = 0; m < D; ++m) {
            if (m * 8 < d) {
              const float2 b = *reinterpret_cast<const float2*>(row + m * 8);
              acc[m][0] += g0 * b.x;
              acc[m][1] += g0 * b.y;
              acc[m][2] += g1 * b.x;
              acc[m][3] += g1 * b.y;
            }
          }
        }
      }
    }
  }
}

}  // namespace fastdistil::cuda
