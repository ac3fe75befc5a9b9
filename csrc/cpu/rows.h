// Reading rows of hidden states block by block.
#pragma once

#include "vec.h"

namespace fastdistil::FASTDISTIL_SET {

// n elements of a row in the accumulation type, filled up with zeros to whole vectors.
template <class Acc>
FASTDISTIL_INLINE const Acc* load_piece(const void* row, Dtype dtype, int64_t begin, int64_t n, Acc* staging) {
  constexpr int W = Lanes<Acc>::count;
  const void* source = static_cast<const char*>(row) + begin * dtype_size(dtype);
  if (is_acc<Acc>(dtype) && n % W == 0) return static_cast<const Acc*>(source);
  to_acc(source, dtype, n, staging);
  for (int64_t i = n; i < (n + W - 1) / W * W; ++i) staging[i] = 0;
  return staging;
}

}  // namespace fastdistil::FASTDISTIL_SET
