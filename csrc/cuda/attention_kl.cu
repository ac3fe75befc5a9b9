// fastdistil_cuda::attention_kl_fwd and _bwd: checks, allocation, launches.
//
// The schemas are those of fastdistil::attention_kl_fwd and _bwd, in a namespace of their own: on a GPU Triton serves
// the ops, and these are called by name, by tests and benchmarks.
#include "attention_kl.h"
#include "build.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

namespace fastdistil::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the CUDA kernel, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// The largest power of two, up to 16, that divides the beginning and the length of every row in bytes.
int alignment(const States& x, int element) {
  uint64_t bits = 16 | reinterpret_cast<uintptr_t>(x.data);
  for (const int64_t stride : {x.batch_stride, x.head_stride, x.row_stride, static_cast<int64_t>(x.d)}) {
    bits |= static_cast<uint64_t>(stride * element);
  }
  return static_cast<int>(bits & (~bits + 1));
}

States states_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have shape (B, H, L, d), got ", tensor.dim(), " dimensions");
  const int64_t d = tensor.size(3);
  STD_TORCH_CHECK(d >= 1 && d <= kMaxHead, name, " must have a head size of at most ", kMaxHead,
                  " for the CUDA kernel, got ", d);
  STD_TORCH_CHECK(tensor.stride(3) == 1 || d == 1, name, " must be contiguous in its last dimension");
  States states{tensor.data_ptr(),
                tensor.stride(0),
                tensor.stride(1),
                tensor.stride(2),
                static_cast<int>(d),
                dtype_of(tensor, name),
                0};
  states.aligned = alignment(states, static_cast<int>(tensor.element_size()));
  return states;
}

void check_like(const Tensor& tensor, const char* name, const Tensor& like, int dimensions, const char* like_name) {
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index() && tensor.is_cuda() == like.is_cuda(), name,
                  " must be on the device of ", like_name);
  for (int i = 0; i < dimensions; ++i) {
    STD_TORCH_CHECK(tensor.size(i) == like.size(i), name, " must have the size of ", like_name, " in dimension ", i,
                    ", ", like.size(i), ", got ", tensor.size(i));
  }
}

template <class Float>
SoftmaxRows<Float> softmax_rows(Float* data, const AttentionKl& p) {
  return {data, data + p.B * p.H * p.L};
}

SoftmaxRows<const float> softmax_of(const Tensor& tensor, const char* name, const AttentionKl& p) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == 2 && tensor.size(1) == p.B && tensor.size(2) == p.H &&
                      tensor.size(3) == p.L,
                  name, " must have shape (2, B, H, L)");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be float32 and contiguous");
  return softmax_rows(static_cast<const float*>(tensor.const_data_ptr()), p);
}

const float* numbers_of(const Tensor& tensor, const char* name, const Tensor& student_q) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have shape (B, H, L), got ", tensor.dim(), " dimensions");
  check_like(tensor, name, student_q, 3, "student_q");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be float32 and contiguous");
  return static_cast<const float*>(tensor.const_data_ptr());
}

struct Call {
  AttentionKl problem;
  Dtype compute;
};

// Two tiles in flight where the device has the shared memory, else one.
template <class T>
void choose_stages(AttentionKl& p, int limit) {
  for (p.stages = 2; p.stages > 0; --p.stages) {
    p.shared_bytes = shared_bytes<T>(p.student_q.d, p.teacher_q.d, p.stages);
    if (p.shared_bytes <= limit) return;
  }
  STD_TORCH_CHECK(false, "head sizes of ", p.student_q.d, " and ", p.teacher_q.d, " take ", p.shared_bytes,
                  " bytes of shared memory, and this GPU has ", limit);
}

Call check(const Tensor& student_q, const Tensor& student_k, const Tensor& teacher_q, const Tensor& teacher_k,
           const std::optional<Tensor>& mask, double student_scale, double teacher_scale) {
  AttentionKl p{};
  p.student_q = states_of(student_q, "student_q");
  p.student_k = states_of(student_k, "student_k");
  p.teacher_q = states_of(teacher_q, "teacher_q");
  p.teacher_k = states_of(teacher_k, "teacher_k");
  check_like(student_k, "student_k", student_q, 4, "student_q");
  check_like(teacher_q, "teacher_q", student_q, 3, "student_q");
  check_like(teacher_k, "teacher_k", teacher_q, 4, "teacher_q");
  const int64_t L = student_q.size(2);
  STD_TORCH_CHECK(L < std::numeric_limits<int>::max() - 2 * kRows, "L must fit into 32 bits, got ", L);
  p.B = student_q.size(0);
  p.H = student_q.size(1);
  p.L = static_cast<int>(L);
  STD_TORCH_CHECK(block_count(p) <= std::numeric_limits<int>::max(), "B * H * L is too large for one launch");
  if (mask.has_value()) {
    const int64_t dimensions = mask->dim();
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous(),
                    "mask must be bool and contiguous");
    STD_TORCH_CHECK((dimensions == 2 || dimensions == 3) && mask->size(0) == p.B && mask->size(1) == L &&
                        mask->size(dimensions - 1) == L,
                    "mask must have shape (B, L) or (B, L, L)");
    check_like(*mask, "mask", student_q, 0, "student_q");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    p.mask_is_pairs = dimensions == 3;
  }
  p.student_scale = static_cast<float>(student_scale * kLog2e);
  p.teacher_scale = static_cast<float>(teacher_scale * kLog2e);

  const Dtype dtype = p.student_q.dtype;
  const bool same = p.student_k.dtype == dtype && p.teacher_q.dtype == dtype && p.teacher_k.dtype == dtype;
  const Dtype compute = same ? dtype : Dtype::float32;
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, student_q.get_device_index()));
  compute == Dtype::float32 ? choose_stages<float>(p, limit) : choose_stages<bfloat16>(p, limit);
  return {p, compute};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& student_q,            // (B, H, L, ds)
                                       const Tensor& student_k,            // (B, H, L, ds)
                                       const Tensor& teacher_q,            // (B, H, L, dt)
                                       const Tensor& teacher_k,            // (B, H, L, dt)
                                       const std::optional<Tensor>& mask,  // (B, L) or (B, L, L) bool
                                       double student_scale, double teacher_scale) {
  const torch::stable::accelerator::DeviceGuard guard(student_q.get_device_index());
  const Call call = check(student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale);
  const AttentionKl& p = call.problem;
  const std::array<int64_t, 4> size{2, p.B, p.H, p.L};
  const auto numbers = [&](int from) {
    return torch::stable::new_empty(student_q, {size.data() + from, size.size() - from}, ScalarType::Float);
  };
  Tensor kl = numbers(1), student_softmax = numbers(0), teacher_softmax = numbers(0);
  if (block_count(p) == 0) return {kl, student_softmax, teacher_softmax};
  const auto data = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  const AttentionKlResults results{data(kl), softmax_rows(data(student_softmax), p),
                                   softmax_rows(data(teacher_softmax), p)};
  STD_CUDA_CHECK(attention_kl_fwd(call.problem, results, call.compute, current_stream(student_q)));
  return {kl, student_softmax, teacher_softmax};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& weight,               // (B, H, L)
                               const Tensor& student_q,            // (B, H, L, ds)
                               const Tensor& student_k,            // (B, H, L, ds)
                               const Tensor& teacher_q,            // (B, H, L, dt)
                               const Tensor& teacher_k,            // (B, H, L, dt)
                               const std::optional<Tensor>& mask,  // (B, L) or (B, L, L) bool
                               const Tensor& student_softmax,      // (2, B, H, L)
                               const Tensor& teacher_softmax,      // (2, B, H, L)
                               double student_scale, double teacher_scale) {
  const torch::stable::accelerator::DeviceGuard guard(student_q.get_device_index());
  const Call call = check(student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale);
  AttentionKlGradients gradients{};
  gradients.weight = numbers_of(weight, "weight", student_q);
  gradients.student = softmax_of(student_softmax, "student_softmax", call.problem);
  gradients.teacher = softmax_of(teacher_softmax, "teacher_softmax", call.problem);
  gradients.scale = static_cast<float>(student_scale);
  Tensor grad_q = torch::stable::empty_like(student_q), grad_k = torch::stable::empty_like(student_k);
  if (block_count(call.problem) == 0) return {grad_q, grad_k};
  gradients.grad_q = states_of(grad_q, "grad_q");
  gradients.grad_k = states_of(grad_k, "grad_k");
  STD_CUDA_CHECK(attention_kl_bwd(call.problem, gradients, call.compute, current_stream(student_q)));
  return {grad_q, grad_k};
}

}  // namespace

#define FASTDISTIL_TEXT_OF(...) #__VA_ARGS__
#define FASTDISTIL_TEXT(...) FASTDISTIL_TEXT_OF(__VA_ARGS__)
#define FASTDISTIL_NVCC(major, minor, build) FASTDISTIL_TEXT(nvcc major.minor.build)

const char* compiler() { return FASTDISTIL_NVCC(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__); }
const char* architectures() { return FASTDISTIL_TEXT(__CUDA_ARCH_LIST__); }

STABLE_TORCH_LIBRARY(fastdistil_cuda, m) {
  m.def(
      "attention_kl_fwd(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? mask, "
      "float student_scale, float teacher_scale) -> (Tensor kl, Tensor student_softmax, Tensor teacher_softmax)");
  m.def(
      "attention_kl_bwd(Tensor weight, Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, "
      "Tensor? mask, Tensor student_softmax, Tensor teacher_softmax, float student_scale, float teacher_scale) "
      "-> (Tensor grad_q, Tensor grad_k)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistil_cuda, CUDA, m) {
  m.impl("attention_kl_fwd", TORCH_BOX(&fwd));
  m.impl("attention_kl_bwd", TORCH_BOX(&bwd));
}

}  // namespace fastdistil::cuda
