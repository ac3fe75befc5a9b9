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
  for (int64_t i = n; i < pad_to(n, W); ++i) staging[i] = 0;
  return staging;
}

// Calls work(begin, n, s, t) for blocks of both rows in the accumulation type, filled up with zeros to whole vectors.
template <class Acc, class Work>
FASTDISTIL_INLINE void for_each_block(const PairRow& row, const Work& work) {
  alignas(64) Acc student[kBlock];
  alignas(64) Acc teacher[kBlock];
  for (int64_t begin = 0; begin < row.D; begin += kBlock) {
    const int64_t n = row.D - begin < kBlock ? row.D - begin : kBlock;
    const Acc* s = load_piece(row.student, row.student_dtype, begin, n, student);
    const Acc* t = load_piece(row.teacher, row.teacher_dtype, begin, n, teacher);
    work(begin, n, s, t);
  }
}

}  // namespace fastdistil::FASTDISTIL_SET
