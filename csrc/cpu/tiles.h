// Products of small matrices that lie in cache, the inner loop of the attention losses.
//
// Widths are padded to kPad elements, which is a whole number of vectors in every instruction set, so that columns need
// no tails. Keys whose products with queries are wanted are packed into panels: kPanel keys side by side, so that the
// inner loop streams one contiguous panel from the first-level cache.
#pragma once

#include "vec.h"

namespace fastdistil::FASTDISTIL_SET {

// Rows of a tile whose columns are two vectors wide: the accumulators fill the registers, all but a few.
constexpr int kTileRows = FASTDISTIL_VECTOR_BYTES == 64 ? 12 : 6;

// C (rows, columns * W) = or += A @ B. A is addressed by two strides, so that it may be transposed; rows of B and C are
// contiguous.
template <class Acc, int rows, int columns>
FASTDISTIL_INLINE void product_tile(int64_t K, const Acc* a, int64_t a_row, int64_t a_column, const Acc* b,
                                    int64_t b_pitch, Acc* c, int64_t c_pitch, bool add) {
  constexpr int W = Lanes<Acc>::count;
  Vec<Acc> sums[rows][columns];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < columns; ++j) sums[i][j] = add ? load(c + i * c_pitch + j * W) : Vec<Acc>{};
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec<Acc> own[columns];
#pragma GCC unroll 2
    for (int j = 0; j < columns; ++j) own[j] = load(b + k * b_pitch + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec<Acc> x = broadcast(a[i * a_row + k * a_column]);
#pragma GCC unroll 2
      for (int j = 0; j < columns; ++j) sums[i][j] += x * own[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < columns; ++j) store<Acc>(c + i * c_pitch + j * W, sums[i][j]);
  }
}

template <class Acc, int columns>
void product_columns(int64_t M, int64_t K, const Acc* a, int64_t a_row, int64_t a_column, const Acc* b, int64_t b_pitch,
                     Acc* c, int64_t c_pitch, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= M; i += kTileRows) {
    product_tile<Acc, kTileRows, columns>(K, a + i * a_row, a_row, a_column, b, b_pitch, c + i * c_pitch, c_pitch, add);
  }
  for (; i + 4 <= M; i += 4) {
    product_tile<Acc, 4, columns>(K, a + i * a_row, a_row, a_column, b, b_pitch, c + i * c_pitch, c_pitch, add);
  }
  for (; i < M; ++i) {
    product_tile<Acc, 1, columns>(K, a + i * a_row, a_row, a_column, b, b_pitch, c + i * c_pitch, c_pitch, add);
  }
}

// C (M, N) = or += A (M, K) @ B (K, N), N a multiple of kPad.
template <class Acc>
void product(int64_t M, int64_t N, int64_t K, const Acc* a, int64_t a_row, int64_t a_column, const Acc* b,
             int64_t b_pitch, Acc* c, int64_t c_pitch, bool add) {
  constexpr int W = Lanes<Acc>::count;
  int64_t j = 0;
  for (; j + 2 * W <= N; j += 2 * W) {
    product_columns<Acc, 2>(M, K, a, a_row, a_column, b + j, b_pitch, c + j, c_pitch, add);
  }
  if (j < N) product_columns<Acc, 1>(M, K, a, a_row, a_column, b + j, b_pitch, c + j, c_pitch, add);
}

// One token's vector in the accumulation type, times a factor, with zeros up to `width`.
template <class Acc>
FASTDISTIL_INLINE void pack_token(const Tokens& tokens, int64_t token, Acc factor, int64_t width, Acc* target) {
  to_acc(tokens.data + token * tokens.pitch, tokens.dtype, tokens.d, target);
  for (int64_t i = 0; i < tokens.d; ++i) target[i] *= factor;
  for (int64_t i = tokens.d; i < width; ++i) target[i] = 0;
}

// Keys as panels of (d, kPanel), zeros behind the last one; `staging` holds one token.
template <class Acc>
void pack_panels(const Tokens& tokens, const int64_t* chosen, int64_t n, Acc* panels, Acc* staging) {
  const int64_t d = tokens.d;
  for (int64_t key = 0; key < pad_to(n, kPanel); ++key) {
    Acc* column = panels + key / kPanel * kPanel * d + key % kPanel;
    if (key < n) pack_token<Acc>(tokens, chosen[key], 1, d, staging);
    for (int64_t i = 0; i < d; ++i) column[i * kPanel] = key < n ? staging[i] : 0;
  }
}

// scores (rows, n) = queries (rows, pitch) times the keys [first, first + n) of the panels; first and n are multiples
// of kPanel.
template <class Acc>
FASTDISTIL_INLINE void scores_tile(int64_t rows, int64_t d, const Acc* queries, int64_t pitch, const Acc* panels,
                                   int64_t first, int64_t n, Acc* scores, int64_t scores_pitch) {
  for (int64_t key = 0; key < n; key += kPanel) {
    product<Acc>(rows, kPanel, d, queries, pitch, 1, panels + (first + key) * d, kPanel, scores + key, scores_pitch,
                 false);
  }
}

// A packed vector to the dtype of a gradient.
template <class Acc>
FASTDISTIL_INLINE void unpack_token(const Acc* source, const MutableTokens& tokens, int64_t token) {
  from_acc(source, tokens.d, tokens.dtype, tokens.data + token * tokens.pitch);
}

}  // namespace fastdistil::FASTDISTIL_SET
