// fastdistil::cosine_loss_fwd on the CPU; the mathematics is in cosine_loss_rows.h.
#include "../common.h"

#include <cstring>

namespace fastdistil {
namespace {

std::tuple<Tensor, Tensor> cosine_loss_fwd(const Tensor& student,               // (N, D)
                                           const Tensor& teacher,               // (N, D)
                                           const std::optional<Tensor>& mask,   // (N,) bool
                                           const Tensor& scale,                 // () or (N,)
                                           bool reduce, bool with_grad) {
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
  const auto cosine_loss_row = is_double ? kernels().cosine_loss_row_double : kernels().cosine_loss_row_float;
  std::vector<double> losses(static_cast<size_t>(N));
  for_each_row(N, D, 0, [&](int64_t index, void*) {
    CosineLossRow row{};
    row.student = students[index];
    row.teacher = teachers[index];
    row.grad = grads.has_value() ? (*grads)[index] : nullptr;
    row.student_dtype = students.dtype;
    row.teacher_dtype = teachers.dtype;
    row.grad_dtype = grads.has_value() ? grads->dtype : students.dtype;
    row.D = D;
    row.scale = scales[index];
    if (!masks.has_value() || masks[index]) {
      cosine_loss_row(row);
      losses[index] = row.scale * row.loss;
    } else if (row.grad != nullptr) {
      std::memset(row.grad, 0, static_cast<size_t>(D) * grad.element_size());
    }
  });
  return {row_losses(losses, reduce, accumulation_type(student)), grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("cosine_loss_fwd", TORCH_BOX(&cosine_loss_fwd)); }

}  // namespace fastdistil
