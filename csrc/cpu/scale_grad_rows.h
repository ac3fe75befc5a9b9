// One row of scale_grad_: the row times a number, in place.
#pragma once

#include "vec.h"

namespace fastdistil::FASTDISTIL_SET {

template <class Acc>
void scale_elements(void* row, Dtype dtype, int64_t D, double scale) {
  constexpr int W = Lanes<Acc>::count;
  const Acc factor = static_cast<Acc>(scale);
  alignas(64) Acc staging[kBlock];
  for (int64_t begin = 0; begin < D; begin += kBlock) {
    const int64_t n = D - begin < kBlock ? D - begin : kBlock;
    void* target = static_cast<char*>(row) + begin * dtype_size(dtype);
    Acc* x = static_cast<Acc*>(target);
    if (!is_acc<Acc>(dtype)) {
      to_acc(target, dtype, n, staging);
      x = staging;
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) store<Acc>(x + i, load(x + i) * factor);
    for (; i < n; ++i) x[i] *= factor;
    if (!is_acc<Acc>(dtype)) from_acc(staging, n, dtype, target);
  }
}

inline void scale_row(void* row, Dtype dtype, int64_t D, double scale) {
  if (dtype == Dtype::float64) return scale_elements<double>(row, dtype, D, scale);
  scale_elements<float>(row, dtype, D, scale);
}

}  // namespace fastdistil::FASTDISTIL_SET
