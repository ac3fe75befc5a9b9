// The row kernels for AVX-512 (F, BW, DQ, VL): 16 floats a vector.
#include "kernels.h"

#if defined(__x86_64__)
// The standard headers come first: what they define must not be compiled for this instruction set.
#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define FASTDISTIL_SET avx512
#define FASTDISTIL_VECTOR_BYTES 64
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastdistil {
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace fastdistil
#else
namespace fastdistil {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastdistil
#endif
