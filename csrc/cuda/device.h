// What the kernels take from the GPU beyond C++: number types, asynchronous copies, tensor cores, launches.
//
// Only this file contains PTX. A file that defines FASTDISTIL_CUDA_DEVICE_H and the same names, such as the host
// emulation of the tests, can stand in for it. Fragments are those of mma.m16n8k16: g = lane / 4, t = lane % 4; thread
// (g, t) holds the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of a 16 x 8 result.
#ifndef FASTDISTIL_CUDA_DEVICE_H
#define FASTDISTIL_CUDA_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastdistil::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr unsigned kWarp = 0xffffffffu;  // all lanes take part

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float16 from_float<float16>(float x) { return __float2half_rn(x); }

// Two numbers as one register of a fragment, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x to 2 ulp; 0 where the result would be subnormal.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of kBytes (4, 8 or 16, both ends aligned to them) to shared memory; zeros are written, and nothing is
// read, where `read` is false.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool read) {
  const int bytes = read ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past L1: a tile is read once by its block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Waits for the copies of this thread; a barrier makes them visible to the others.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8. Thread (g, t) gets the elements
// (g, 2t) and (g, 2t + 1) of each.
template <class T>
__device__ inline void load_matrices(uint32_t (&fragment)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: thread (g, t) gets the elements (2t, g) and (2t + 1, g) of each matrix.
template <class T>
__device__ inline void load_matrices_transposed(uint32_t (&fragment)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a (16 x 16), b (16 x 8); products of 16-bit numbers are exact, sums are float32.
template <class T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char fastdistil_shared[];
  return fastdistil_shared;
}

// Starts a kernel with `shared` bytes of dynamic shared memory, of which more than 48 KiB must be asked for.
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace fastdistil::cuda

#endif  // FASTDISTIL_CUDA_DEVICE_H
