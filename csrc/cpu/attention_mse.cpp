// fastdistil::attention_mse_fwd on the CPU; the mathematics is in attention_mse_tiles.h.
#include "attention.h"

namespace fastdistil {
namespace {

// Like a tensor of the student, in the dtype in which its gradient is kept until the backward.
Tensor empty_grad(const Tensor& student, bool with_grad) {
  const ScalarType dtype = grad_type(student);
  if (!with_grad) return empty({0}, dtype);
  Tensor grad = torch::stable::empty_like(student);
  return dtype == student.scalar_type() ? grad : torch::stable::to(grad, dtype);
}

std::tuple<Tensor, Tensor, Tensor> attention_mse_fwd(const Tensor& student_q,            // (B, H, L, ds)
                                                     const Tensor& student_k,            // (B, H, L, ds)
                                                     const Tensor& teacher_q,            // (B, H, L, dt)
                                                     const Tensor& teacher_k,            // (B, H, L, dt)
                                                     const std::optional<Tensor>& mask,  // (B, L) bool
                                                     const Tensor& weight,               // () or (B, H, L)
                                                     double student_scale, double teacher_scale, bool with_grad) {
  const AttentionInputs in(student_q, student_k, teacher_q, teacher_k);
  STD_TORCH_CHECK(!mask.has_value() || mask->dim() == 2, "mask must be one value a token");
  const CountedTokens counted(mask, in.B, in.L);
  const ScalarType acc = accumulation_type(student_q);
  if (weight.dim() == 0) {
    STD_TORCH_CHECK(weight.scalar_type() == acc, "weight must be of the accumulation dtype");
  } else {
    check_rows(weight, in, acc, "weight");
  }
  Tensor grad_q = empty_grad(student_q, with_grad);
  Tensor grad_k = empty_grad(student_k, with_grad);
  if (with_grad && mask.has_value()) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
  }
  const std::optional<Heads> grads_q = with_grad ? std::optional<Heads>(Heads(grad_q, "grad_q")) : std::nullopt;
  const std::optional<Heads> grads_k = with_grad ? std::optional<Heads>(Heads(grad_k, "grad_k")) : std::nullopt;

  const bool is_double = acc == ScalarType::Double;
  const auto run = is_double ? kernels().attention_mse_head_double : kernels().attention_mse_head_float;
  const int64_t bytes = attention_mse_scratch(in.L, in.student_q.d, in.teacher_q.d) * static_cast<int64_t>(sizeof(double));
  std::vector<double> losses(static_cast<size_t>(in.B * in.H));
  for_each_row(in.B * in.H, INT64_MAX, bytes, [&](int64_t index, void* scratch) {
    const int64_t b = index / in.H, h = index % in.H;
    AttentionMseHead head{};
    head.student_q = in.student_q.at(b, h);
    head.student_k = in.student_k.at(b, h);
    head.teacher_q = in.teacher_q.at(b, h);
    head.teacher_k = in.teacher_k.at(b, h);
    head.student_scale = student_scale;
    head.teacher_scale = teacher_scale;
    head.tokens = counted.queries(b).data();
    head.num_tokens = static_cast<int64_t>(counted.queries(b).size());
    head.weight = element_of(weight, weight.dim() == 0 ? 0 : index * in.L);
    head.weight_stride = weight.dim() == 0 ? 0 : 1;
    head.with_grad = with_grad;
    if (with_grad) {
      head.grad_q = grads_q->mutable_at(b, h);
      head.grad_k = grads_k->mutable_at(b, h);
    }
    run(head, scratch);
    losses[static_cast<size_t>(index)] = head.loss;
  });
  return {row_losses(losses, true, acc), grad_q, grad_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("attention_mse_fwd", TORCH_BOX(&attention_mse_fwd)); }

}  // namespace fastdistil
