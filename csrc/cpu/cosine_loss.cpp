// fastdistil::cosine_loss_fwd on the CPU; the mathematics is in cosine_loss_rows.h.
#include "pair_rows.h"

namespace fastdistil {
namespace {

std::tuple<Tensor, Tensor> cosine_loss_fwd(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                           const Tensor& scale, bool reduce, bool with_grad) {
  return pair_rows_loss(student, teacher, mask, scale, false, reduce, with_grad,
                        kernels().cosine_loss_row_float, kernels().cosine_loss_row_double);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("cosine_loss_fwd", TORCH_BOX(&cosine_loss_fwd)); }

}  // namespace fastdistil
