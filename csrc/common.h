// Helpers between torch's stable C++ interface and the row kernels. Includes no device code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace fastdistil {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// Sums, losses and scales are float32, and float64 for a float64 student.
inline ScalarType accumulation_type(const Tensor& student) {
  return student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A float16 gradient of a mean over N rows would underflow before a loss scaler sees it.
inline ScalarType grad_type(const Tensor& student) {
  return student.scalar_type() == ScalarType::Half ? ScalarType::Float : student.scalar_type();
}

// Asks for large pages behind a large buffer that nobody has written to. The first touch of a gradient of many
// megabytes costs as much as the loss itself where each 4 KiB are a page; the system may refuse, which changes nothing.
// Not behind the largest: a virtual machine that gives free large pages back to its host takes longer to get 500 MiB of
// them again than small pages do.
inline void advise_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kMost = 256 << 20;
  if (bytes > kMost) return;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

inline Tensor empty(const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor tensor = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()), dtype);
  advise_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// The rows of an (N, D) tensor with contiguous rows of any pitch.
struct Rows {
  char* data;
  int64_t pitch;  // bytes
  Dtype dtype;

  Rows(const Tensor& tensor, const char* name) : dtype(dtype_of(tensor, name)) {
    STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
    STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1 || tensor.numel() == 0, "the rows of ", name,
                    " must be contiguous");
    data = static_cast<char*>(tensor.data_ptr());
    pitch = tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  }

  void* operator[](int64_t row) const { return data + row * pitch; }
};

// A 0-dim or (N,) tensor as a number for each row.
class PerRow {
 public:
  PerRow(const Tensor& tensor, int64_t N, const char* name) : data_(tensor.const_data_ptr()) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                    " must be float32 or float64, got ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == N), name,
                    " must be 0-dim or have one element a row");
    is_double_ = dtype == ScalarType::Double;
    stride_ = tensor.dim() == 0 ? 0 : tensor.stride(0);
  }

  double operator[](int64_t row) const {
    return is_double_ ? static_cast<const double*>(data_)[row * stride_]
                      : static_cast<const float*>(data_)[row * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  bool is_double_;
};

// An optional (N,) tensor of T (int64 labels, bool masks).
template <class T>
class OptionalPerRow {
 public:
  OptionalPerRow(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t N, const char* name) {
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                    torch::headeronly::toString(tensor->scalar_type()));
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == N, name, " must have one element a row");
    data_ = static_cast<const T*>(tensor->const_data_ptr());
    stride_ = tensor->stride(0);
  }

  bool has_value() const { return data_ != nullptr; }
  T operator[](int64_t row) const { return data_[row * stride_]; }

 private:
  const T* data_ = nullptr;
  int64_t stride_ = 0;
};

inline void store_scalar(const Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

// Per-row values to the op's result: themselves, or their sum in the order of the rows.
inline Tensor row_losses(const std::vector<double>& values, bool reduce, ScalarType dtype) {
  const int64_t N = static_cast<int64_t>(values.size());
  Tensor result = empty(reduce ? std::vector<int64_t>{} : std::vector<int64_t>{N}, dtype);
  double sum = 0;
  for (int64_t row = 0; row < N; ++row) {
    sum += values[row];
    if (!reduce) store_scalar(result, row, values[row]);
  }
  if (reduce) store_scalar(result, 0, sum);
  return result;
}

// Calls work(row, scratch) for each row on torch's threads, with scratch_bytes of memory a thread. Threads take the
// next few rows when they are done, because masked rows cost nothing; a row's result does not depend on its thread.
template <class Work>
void for_each_row(int64_t rows, int64_t row_length, int64_t scratch_bytes, const Work& work) {
  constexpr int64_t kElementsATake = 16384;
  const int64_t take = row_length >= kElementsATake ? 1 : kElementsATake / (row_length > 0 ? row_length : 1);
  const int64_t takes = (rows + take - 1) / take;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), takes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(scratch_bytes + 64)]);
    char* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64);
    for (int64_t begin = take * next++; begin < rows; begin = take * next++) {
      const int64_t end = std::min(begin + take, rows);
      for (int64_t row = begin; row < end; ++row) work(row, aligned);
    }
  });
}

}  // namespace fastdistil
