// How the kernels were compiled; without CUDA headers, for module.cpp.
#pragma once

namespace fastdistil::cuda {

const char* compiler();       // "nvcc 13.0.88"
const char* architectures();  // "800, 900, 1000"

}  // namespace fastdistil::cuda
