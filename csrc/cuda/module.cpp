// The Python module fastdistil._C_cuda. Importing it registers the operators of attention_kl.cu with torch; by itself
// it only answers what `fastdistil doctor` asks. Tensors never pass through it.
#include <pybind11/pybind11.h>

#include "build.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA C++ kernels of fastdistil";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = fastdistil::cuda::compiler();
        info["architectures"] = fastdistil::cuda::architectures();
        info["flags"] = FASTDISTIL_FLAGS;
        return info;
      },
      "The CUDA compiler, the GPU architectures it compiled for, and its flags.");
}
