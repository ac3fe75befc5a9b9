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

// Memory of one thread, handed out piece by piece.
template <class Acc>
class TileScratch {
 public:
  explicit TileScratch(void* memory) : next_(static_cast<Acc*>(memory)) {}
  Acc* take(int64_t count) {
    Acc* start = next_;
    next_ += pad_to(count, kPad);
    return start;
  }

 private:
  Acc* next_;
};

// Queries and keys of one sequence and head, packed for tiles of scores and for the gradients that come from them.
template <class Acc>
class PackedHead {
 public:
  PackedHead(const Tokens& student_q, const Tokens& student_k, const Tokens& teacher_q, const Tokens& teacher_k,
             double student_scale, double teacher_scale, const int64_t* queries, int64_t num_queries,
             const int64_t* keys, int64_t num_keys, TileScratch<Acc>& scratch)
      : ds_(student_q.d), dt_(teacher_q.d), width_(pad_to(student_q.d, kPad)), queries_(queries),
        num_queries_(num_queries), num_keys_(num_keys), panel_keys_(pad_to(num_keys, kPanel)) {
    student_panels_ = scratch.take(panel_keys_ * ds_);
    teacher_panels_ = scratch.take(panel_keys_ * dt_);
    student_q_ = scratch.take(num_queries * width_);
    teacher_q_ = scratch.take(num_queries * dt_);
    student_k_ = scratch.take(num_keys * width_);
    grad_q_ = scratch.take(num_queries * width_);
    s_ = scratch.take(kTileQueries * kTileKeys);
    t_ = scratch.take(kTileQueries * kTileKeys);
    Acc* staging = scratch.take(ds_ > dt_ ? ds_ : dt_);
    pack_panels(student_k, keys, num_keys, student_panels_, staging);
    pack_panels(teacher_k, keys, num_keys, teacher_panels_, staging);
    // Queries carry the scale into the scores and into the keys' gradient, these keys carry it into the queries'.
    const Acc scale = static_cast<Acc>(student_scale);
    for (int64_t j = 0; j < num_keys; ++j) pack_token(student_k, keys[j], scale, width_, student_k_ + j * width_);
    for (int64_t i = 0; i < num_queries; ++i) {
      pack_token(student_q, queries[i], scale, width_, student_q_ + i * width_);
      pack_token(teacher_q, queries[i], static_cast<Acc>(teacher_scale), dt_, teacher_q_ + i * dt_);
    }
  }

  // Calls work(first query, rows, first key, columns, s, t) with the scores of both models, kTileKeys apart; columns
  // is a multiple of kPanel, and those behind the last key are 0.
  template <class Work>
  FASTDISTIL_INLINE void for_each_tile(const Work& work) {
    for (int64_t key = 0; key < num_keys_; key += kTileKeys) {
      const int64_t n = panel_keys_ - key < kTileKeys ? panel_keys_ - key : kTileKeys;
      for (int64_t first = 0; first < num_queries_; first += kTileQueries) {
        const int64_t rows = num_queries_ - first < kTileQueries ? num_queries_ - first : kTileQueries;
        scores_tile(rows, ds_, student_q_ + first * width_, width_, student_panels_, key, n, s_, kTileKeys);
        scores_tile(rows, dt_, teacher_q_ + first * dt_, dt_, teacher_panels_, key, n, t_, kTileKeys);
        work(first, rows, key, n, s_, t_);
      }
    }
  }

  // The tile's share of both gradients, g the derivative by the student's scores.
  FASTDISTIL_INLINE void add_gradients(int64_t first, int64_t rows, int64_t key, const Acc* g, Acc* grad_k) {
    const int64_t keys = num_keys_ - key < kTileKeys ? num_keys_ - key : kTileKeys;
    product<Acc>(rows, width_, keys, g, kTileKeys, 1, student_k_ + key * width_, width_, grad_q_ + first * width_, width_,
                 key > 0);
    product<Acc>(keys, width_, rows, g, 1, kTileKeys, student_q_ + first * width_, width_, grad_k + key * width_, width_,
                 first > 0);
  }

  void write_grad_q(const MutableTokens& target) const {
    for (int64_t i = 0; i < num_queries_; ++i) unpack_token(grad_q_ + i * width_, target, queries_[i]);
  }

 private:
  int64_t ds_, dt_, width_;
  const int64_t* queries_;
  int64_t num_queries_, num_keys_, panel_keys_;
  Acc *student_panels_, *teacher_panels_, *student_q_, *teacher_q_, *student_k_, *grad_q_, *s_, *t_;
};

}  // namespace fastdistil::FASTDISTIL_SET
