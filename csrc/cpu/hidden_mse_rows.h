// One row of hidden_mse: the squared distance of two hidden states, or of their directions, and its gradient.
//
//   plain:       loss = |s - t|^2,            d loss / d s = 2 (s - t)
//   normalised:  u = s / |s|, v = t / |t|,    loss = |u - v|^2,   d loss / d s = 2 (e - <e, u> u) / |s|,  e = u - v
//
// Norms are not taken smaller than eps = 1e-8; below that the norm of s is a constant.
#pragma once

#include "rows.h"

namespace fastdistil::FASTDISTIL_SET {

constexpr double kHiddenEps = 1e-8;

template <class Acc>
void hidden_mse_row(PairRow& row) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  double inverse_s = 1, inverse_t = 1;
  bool clamped = false;
  if (row.normalize) {
    double square_s = 0, square_t = 0;
    for_each_block<Acc>(row, [&](int64_t, int64_t n, const Acc* s, const Acc* t) {
      V ss{}, tt{};
      for (int64_t i = 0; i < n; i += W) {
        const V x = load(s + i), y = load(t + i);
        ss += x * x;
        tt += y * y;
      }
      square_s += reduce_add<Acc>(ss);
      square_t += reduce_add<Acc>(tt);
    });
    const double norm_s = __builtin_sqrt(square_s), norm_t = __builtin_sqrt(square_t);
    clamped = norm_s <= kHiddenEps;
    inverse_s = 1 / (clamped ? kHiddenEps : norm_s);
    inverse_t = 1 / (norm_t > kHiddenEps ? norm_t : kHiddenEps);
  }
  const Acc scale_s = static_cast<Acc>(inverse_s), scale_t = static_cast<Acc>(inverse_t);

  double square = 0, along = 0;
  for_each_block<Acc>(row, [&](int64_t, int64_t n, const Acc* s, const Acc* t) {
    V ee{}, eu{};
    for (int64_t i = 0; i < n; i += W) {
      const V u = load(s + i) * scale_s;
      const V e = u - load(t + i) * scale_t;
      ee += e * e;
      eu += e * u;
    }
    square += reduce_add<Acc>(ee);
    along += reduce_add<Acc>(eu);
  });
  row.loss = square;
  if (row.grad == nullptr) return;

  alignas(64) Acc staging[kBlock];
  const Acc factor = static_cast<Acc>(2 * row.scale * inverse_s);
  const Acc projected = static_cast<Acc>(row.normalize && !clamped ? along : 0);
  for_each_block<Acc>(row, [&](int64_t begin, int64_t n, const Acc* s, const Acc* t) {
    void* target = static_cast<char*>(row.grad) + begin * dtype_size(row.grad_dtype);
    const bool direct = is_acc<Acc>(row.grad_dtype) && n % W == 0;
    Acc* out = direct ? static_cast<Acc*>(target) : staging;
    for (int64_t i = 0; i < n; i += W) {
      const V u = load(s + i) * scale_s;
      store<Acc>(out + i, factor * ((u - load(t + i) * scale_t) - projected * u));
    }
    if (!direct) from_acc(out, n, row.grad_dtype, target);
  });
}

}  // namespace fastdistil::FASTDISTIL_SET
