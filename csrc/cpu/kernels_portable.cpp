// The row kernels for whatever the compiler targets by default: 16-byte vectors, which are SSE2 on x86-64 and NEON on
// AArch64.
#define FASTDISTIL_SET portable
#define FASTDISTIL_VECTOR_BYTES 16
#include "kernel_table.h"

namespace fastdistil {
const Kernels* portable_kernels() { return &portable::kTable; }
}  // namespace fastdistil
