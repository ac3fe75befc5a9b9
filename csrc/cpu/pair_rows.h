// What cosine_loss and hidden_mse share: rows of both models in, a loss a row and its gradient out.
#pragma once

#include "../common.h"

#include <cstring>

namespace fastdistil {

using PairRowKernel = void (*)(PairRow&);

inline std::tuple<Tensor, Tensor> pair_rows_loss(const Tensor& student,              // (N, D)
                                                 const Tensor& teacher,              // (N, D)
                                                 const std::optional<Tensor>& mask,  // (N,) bool
                                                 const Tensor& scale,                // () or (N,)
                                                 bool normalize, bool reduce, bool with_grad,
                                                 PairRowKernel row_float, PairRowKernel row_double) {
  const int64_t N = student.size(0);
  const int64_t D = student.size(1);
  const Rows students(student, "student");
  const Rows teachers(teacher, "teacher");
  STD_TORCH_CHECK(teacher.size(0) == N && teacher.size(1) == D, "student and teacher differ in shape");
  const PerRow scales(scale, N, "scale");
  const OptionalPerRow<bool> masks(mask, ScalarType::Bool, N, "mask");
  Tensor grad = with_grad ? empty({N, D}, grad_type(student)) : empty({0}, grad_type(student));
  const std::optional<Rows> grads = with_grad ? std::optional<Rows>(Rows(grad, "grad")) : std::nullopt;

  const bool is_double = students.dtype == Dtype::float64;
  const auto row_loss = is_double ? row_double : row_float;
  std::vector<double> losses(static_cast<size_t>(N));
  for_each_row(N, D, 0, [&](int64_t index, void*) {
    PairRow row{};
    row.student = students[index];
    row.teacher = teachers[index];
    row.grad = grads.has_value() ? (*grads)[index] : nullptr;
    row.student_dtype = students.dtype;
    row.teacher_dtype = teachers.dtype;
    row.grad_dtype = grads.has_value() ? grads->dtype : students.dtype;
    row.D = D;
    row.normalize = normalize;
    row.scale = scales[index];
    if (!masks.has_value() || masks[index]) {
      row_loss(row);
      losses[index] = row.scale * row.loss;
    } else if (row.grad != nullptr) {
      std::memset(row.grad, 0, static_cast<size_t>(D) * grad.element_size());
    }
  });
  return {row_losses(losses, reduce, accumulation_type(student)), grad};
}

}  // namespace fastdistil
