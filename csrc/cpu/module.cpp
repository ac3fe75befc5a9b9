// The Python module fastdistil._C. Importing it registers the operators of the other files with torch; by itself it
// only answers what `fastdistil doctor` asks. Tensors never pass through it.
#include <pybind11/pybind11.h>

#include "kernels.h"

#if defined(__clang__)
#define FASTDISTIL_COMPILER "Clang " __clang_version__
#else
#define FASTDISTIL_COMPILER "GCC " __VERSION__
#endif
#define FASTDISTIL_TEXT_OF(x) #x
#define FASTDISTIL_TEXT(x) FASTDISTIL_TEXT_OF(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastdistil";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = FASTDISTIL_COMPILER;
        info["flags"] = FASTDISTIL_FLAGS;
        info["torch_target_version"] = FASTDISTIL_TEXT(TORCH_TARGET_VERSION);
        return info;
      },
      "The compiler, its flags and the oldest torch whose stable interface the kernels use.");
  m.def(
      "cpu_capability", [] { return fastdistil::kernels().name; },
      "The instruction set chosen for this process: avx512, avx2 or portable.");
}
