// One row of cosine_loss: three products in one pass, the gradient in a second pass over the same, still cached row.
//
//   c = <s, t> / (max(|s|, eps) max(|t|, eps)),  loss = 1 - c,  d loss / d s = -(t / |t| - c s / |s|) / |s|
//
// with eps = 1e-8 as torch.nn.functional.cosine_similarity has it; below eps the norm of s is a constant.
#pragma once

#include "rows.h"

namespace fastdistil::FASTDISTIL_SET {

constexpr double kCosineEps = 1e-8;

template <class Acc>
void cosine_loss_row(PairRow& row) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  double dot = 0, square_s = 0, square_t = 0;
  for_each_block<Acc>(row, [&](int64_t, int64_t n, const Acc* s, const Acc* t) {
    V st{}, ss{}, tt{};
    for (int64_t i = 0; i < n; i += W) {
      const V x = load(s + i), y = load(t + i);
      st += x * y;
      ss += x * x;
      tt += y * y;
    }
    dot += reduce_add<Acc>(st);
    square_s += reduce_add<Acc>(ss);
    square_t += reduce_add<Acc>(tt);
  });
  const double norm_s = __builtin_sqrt(square_s), norm_t = __builtin_sqrt(square_t);
  const double safe_s = norm_s > kCosineEps ? norm_s : kCosineEps;
  const double safe_t = norm_t > kCosineEps ? norm_t : kCosineEps;
  const double cosine = dot / (safe_s * safe_t);
  row.loss = 1.0 - cosine;
  if (row.grad == nullptr) return;

  const Acc of_teacher = static_cast<Acc>(-row.scale / (safe_s * safe_t));
  const Acc of_student = static_cast<Acc>(norm_s > kCosineEps ? row.scale * cosine / square_s : 0.0);
  alignas(64) Acc staging[kBlock];
  for_each_block<Acc>(row, [&](int64_t begin, int64_t n, const Acc* s, const Acc* t) {
    void* target = static_cast<char*>(row.grad) + begin * dtype_size(row.grad_dtype);
    const bool direct = is_acc<Acc>(row.grad_dtype) && n % W == 0;
    Acc* out = direct ? static_cast<Acc*>(target) : staging;
    for (int64_t i = 0; i < n; i += W) store<Acc>(out + i, of_teacher * load(t + i) + of_student * load(s + i));
    if (!direct) from_acc(out, n, row.grad_dtype, target);
  });
}

}  // namespace fastdistil::FASTDISTIL_SET
