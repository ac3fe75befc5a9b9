// fastdistil::scale_grad_ on the CPU: a saved gradient times the upstream gradient, untouched where that is 1.
#include "../common.h"

namespace fastdistil {
namespace {

void scale_grad_(const Tensor& grad,     // (N, D)
                 const Tensor& scale) {  // () or (N,)
  const int64_t N = grad.size(0);
  const int64_t D = grad.size(1);
  const Rows grads(grad, "grad");
  const PerRow scales(scale, N, "scale");
  if (scale.dim() == 0 && scales[0] == 1.0) return;
  for_each_row(N, D, 0, [&](int64_t row, void*) {
    if (scales[row] != 1.0) kernels().scale_row(grads[row], grads.dtype, D, scales[row]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("scale_grad_", TORCH_BOX(&scale_grad_)); }

}  // namespace fastdistil
