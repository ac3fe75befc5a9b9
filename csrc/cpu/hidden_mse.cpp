// fastdistil::hidden_mse_fwd on the CPU; the mathematics is in hidden_mse_rows.h.
#include "pair_rows.h"

namespace fastdistil {
namespace {

std::tuple<Tensor, Tensor> hidden_mse_fwd(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                          const Tensor& scale, bool normalize, bool reduce, bool with_grad) {
  return pair_rows_loss(student, teacher, mask, scale, normalize, reduce, with_grad,
                        kernels().hidden_mse_row_float, kernels().hidden_mse_row_double);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("hidden_mse_fwd", TORCH_BOX(&hidden_mse_fwd)); }

}  // namespace fastdistil
