// The row kernels for AVX2 with FMA: 8 floats a vector.
#include "kernels.h"

#if defined(__x86_64__)
// The standard headers come first: what they define must not be compiled for this instruction set.
#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTDISTIL_SET avx2
#define FASTDISTIL_VECTOR_BYTES 32
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastdistil {
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace fastdistil
#else
namespace fastdistil {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastdistil
#endif
