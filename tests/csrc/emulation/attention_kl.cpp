// attention_kl_fwd and _bwd on the emulated GPU, as fastdistil_emulated::*, for CPU tensors.
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

// What a torch without CUDA lacks, or refuses without a GPU.
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(expression) STD_TORCH_CHECK((expression) == cudaSuccess, "error of the emulated GPU")
static AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(DeviceIndex) {
    if (const char* bytes = std::getenv("FASTDISTIL_EMULATED_SHARED_MEMORY")) emulated_shared_limit = std::atoi(bytes);
  }
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard
#define CUDA CPU
#define fastdistil_cuda fastdistil_emulated

#include "cuda/attention_kl.cu"
#include "cuda/attention_kl_bwd.cu"
#include "cuda/attention_kl_fwd.cu"
