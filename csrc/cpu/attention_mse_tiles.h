// attention_mse of one sequence and head, by the products of d x d numbers that ops/attention_mse.py explains:
//
//   X = [as Qs, -at Qt], Y = [Ks, Kt],  loss = <X^T W X, Y^T Y>,  dX = 2 W X (Y^T Y),  dY = 2 Y (X^T W X)
//
// The Gram matrices are summed in double: near convergence the loss is many orders smaller than the terms that cancel.
// Few tokens go by their scores, which are then fewer operations.
#pragma once

#include "tiles.h"

namespace fastdistil::FASTDISTIL_SET {

// target[0, d) = a token's vector times a factor, in double.
inline void pack_double(const Tokens& tokens, int64_t token, double factor, float* staging, double* target) {
  const void* source = tokens.data + token * tokens.pitch;
  if (tokens.dtype == Dtype::float64) {
    for (int64_t i = 0; i < tokens.d; ++i) target[i] = static_cast<const double*>(source)[i] * factor;
    return;
  }
  constexpr int W = Lanes<double>::count;
  typedef float Narrow __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  to_acc(source, tokens.dtype, tokens.d, staging);
  int64_t i = 0;
  for (; i + W <= tokens.d; i += W) {
    const Narrow x = *reinterpret_cast<const Narrow*>(staging + i);
    store<double>(target + i, __builtin_convertvector(x, Vec<double>) * factor);
  }
  for (; i < tokens.d; ++i) target[i] = staging[i] * factor;
}

// gram += a^T b over `tokens` rows, on and above the diagonal of blocks of kPanel rows.
inline void add_gram(int64_t tokens, int64_t D, const double* a, const double* b, double* gram) {
  const int64_t width = pad_to(D, kPanel);
  for (int64_t i = 0; i < D; i += kPanel) {
    const int64_t rows = D - i < kPanel ? D - i : kPanel;
    product<double>(rows, width - i, tokens, a + i, 1, width, b + i, width, gram + i * width + i, width, true);
  }
}

inline void mirror(int64_t D, double factor, double* gram) {
  const int64_t width = pad_to(D, kPanel);
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = i; j < D; ++j) gram[j * width + i] = gram[i * width + j] *= factor;
  }
}

// The columns of a Gram matrix that belong to the student, times a factor.
template <class Acc>
void student_columns(const double* gram, int64_t D, int64_t ds, double factor, Acc* columns) {
  const int64_t width = pad_to(D, kPanel), own = pad_to(ds, kPad);
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < own; ++j) columns[i * own + j] = j < ds ? static_cast<Acc>(factor * gram[i * width + j]) : 0;
  }
}

// By scores after all, for few tokens.
template <class Acc>
void attention_mse_by_scores(AttentionMseHead& head, void* memory) {
  constexpr int W = Lanes<Acc>::count;
  TileScratch<Acc> scratch(memory);
  PackedHead<Acc> packed(head.student_q, head.student_k, head.teacher_q, head.teacher_k, head.student_scale,
                         head.teacher_scale, head.tokens, head.num_tokens, head.tokens, head.num_tokens, scratch);
  const int64_t width = pad_to(head.student_q.d, kPad);
  Acc* grad_k = scratch.take(head.num_tokens * width);
  const Acc* weight = static_cast<const Acc*>(head.weight);
  head.loss = 0;
  packed.for_each_tile([&](int64_t first, int64_t rows, int64_t key, int64_t n, Acc* s, Acc* t) {
    for (int64_t i = 0; i < rows; ++i) {
      const Acc own = weight[head.weight_stride * head.tokens[first + i]];
      Acc* error = s + i * kTileKeys;
      Total<Acc> squares;
      for (int64_t j = 0; j < n; j += W) {
        const Vec<Acc> e = load(error + j) - load(t + i * kTileKeys + j);
        squares.add(e * e);
        store<Acc>(error + j, 2 * own * e);
      }
      head.loss += own * squares.sum();
    }
    if (head.with_grad) packed.add_gradients(first, rows, key, s, grad_k);
  });
  if (!head.with_grad) return;
  packed.write_grad_q(head.grad_q);
  for (int64_t j = 0; j < head.num_tokens; ++j) unpack_token(grad_k + j * width, head.grad_k, head.tokens[j]);
}

template <class Acc>
void attention_mse_head(AttentionMseHead& head, void* memory) {
  if (head.num_tokens <= most_tokens_by_scores(head.student_q.d, head.teacher_q.d)) {
    return attention_mse_by_scores<Acc>(head, memory);
  }
  const int64_t ds = head.student_q.d, dt = head.teacher_q.d, D = ds + dt;
  const int64_t width = pad_to(D, kPanel), own = pad_to(ds, kPad);
  double* gram_x = static_cast<double*>(memory);
  double* gram_y = gram_x + width * width;
  double* x = gram_y + width * width;
  double* wx = x + kMseTokens * width;
  double* y = wx + kMseTokens * width;
  double* rest = y + kMseTokens * width;
  float* staging = reinterpret_cast<float*>(rest);
  const Acc* weight = static_cast<const Acc*>(head.weight);
  const bool one_weight = head.weight_stride == 0;
  std::memset(memory, 0, static_cast<size_t>(2 * width * width + 3 * kMseTokens * width) * sizeof(double));

  for (int64_t first = 0; first < head.num_tokens; first += kMseTokens) {
    const int64_t tokens = head.num_tokens - first < kMseTokens ? head.num_tokens - first : kMseTokens;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t token = head.tokens[first + i];
      pack_double(head.student_q, token, head.student_scale, staging, x + i * width);
      pack_double(head.teacher_q, token, -head.teacher_scale, staging, x + i * width + ds);
      pack_double(head.student_k, token, 1, staging, y + i * width);
      pack_double(head.teacher_k, token, 1, staging, y + i * width + ds);
      if (!one_weight) {
        for (int64_t j = 0; j < D; ++j) wx[i * width + j] = weight[token] * x[i * width + j];
      }
    }
    add_gram(tokens, D, one_weight ? x : wx, x, gram_x);
    add_gram(tokens, D, y, y, gram_y);
  }
  mirror(D, one_weight ? *weight : 1, gram_x);
  mirror(D, 1, gram_y);
  head.loss = 0;
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) head.loss += gram_x[i * width + j] * gram_y[i * width + j];
  }
  if (!head.with_grad) return;

  Acc* of_q = reinterpret_cast<Acc*>(rest);
  Acc* of_k = of_q + D * own;
  Acc* grads = of_k + D * own;
  Acc* packed = reinterpret_cast<Acc*>(x);  // the packed tokens of the Gram matrices are done with
  student_columns(gram_y, D, ds, 2 * head.student_scale * (one_weight ? *weight : 1), of_q);
  student_columns(gram_x, D, ds, 2, of_k);
  const auto write = [&](const Tokens& student, const Tokens& teacher, double student_factor, double teacher_factor,
                         bool weighted, const Acc* columns, const MutableTokens& target) {
    for (int64_t first = 0; first < head.num_tokens; first += kMseTokens) {
      const int64_t tokens = head.num_tokens - first < kMseTokens ? head.num_tokens - first : kMseTokens;
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t token = head.tokens[first + i];
        const double factor = weighted ? weight[token] : 1;
        pack_token(student, token, static_cast<Acc>(student_factor * factor), ds, packed + i * width);
        pack_token(teacher, token, static_cast<Acc>(teacher_factor * factor), dt, packed + i * width + ds);
      }
      product<Acc>(tokens, own, D, packed, width, 1, columns, own, grads, own, false);
      for (int64_t i = 0; i < tokens; ++i) unpack_token(grads + i * own, target, head.tokens[first + i]);
    }
  };
  write(head.student_q, head.teacher_q, head.student_scale, -head.teacher_scale, !one_weight, of_q, head.grad_q);
  write(head.student_k, head.teacher_k, 1, 1, false, of_k, head.grad_k);
}

}  // namespace fastdistil::FASTDISTIL_SET
