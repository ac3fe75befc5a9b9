// attention_kl of one sequence and head. With scores s = as <q_s, k_s> of the student and t of the teacher, for each
// query
//
//   KL = sum_j p_t (log p_t - log p_s),   d KL / d s_j = p_s - p_t
//
// Forward: tiles of scores, each folded into the row's running maxima and sums (online softmax of both models at once).
// Backward: the same tiles again, turned into probabilities by the row's maximum and sum.
#pragma once

#include "tiles.h"

namespace fastdistil::FASTDISTIL_SET {

// Pairs that do not count, and the columns behind the last key, become -inf in both tiles.
template <class Acc>
void exclude_pairs(const AttentionKlHead& head, int64_t first_query, int64_t rows, int64_t first_key, int64_t n,
                   Acc* s, Acc* t) {
  const int64_t keys = head.num_keys - first_key < n ? head.num_keys - first_key : n;
  for (int64_t i = 0; i < rows; ++i) {
    Acc* own_s = s + i * kTileKeys;
    Acc* own_t = t + i * kTileKeys;
    if (head.pairs != nullptr) {
      const bool* counts = head.pairs + head.queries[first_query + i] * head.L;
      for (int64_t j = 0; j < keys; ++j) {
        if (!counts[head.keys[first_key + j]]) own_s[j] = own_t[j] = -INFINITY;
      }
    }
    for (int64_t j = keys; j < n; ++j) own_s[j] = own_t[j] = -INFINITY;
  }
}

// A query's softmax sums so far: x = s - max_s and y = t - max_t, product = sum exp(y) (y - x).
struct KlRow {
  double max_s = -INFINITY, max_t = -INFINITY;
  double sum_s = 0, sum_t = 0, product = 0;
};

FASTDISTIL_INLINE void move_maxima(KlRow& row, double max_s, double max_t) {
  if (max_s != row.max_s) {
    if (row.sum_s > 0) {
      row.product += (max_s - row.max_s) * row.sum_t;
      row.sum_s *= __builtin_exp(row.max_s - max_s);
    }
    row.max_s = max_s;
  }
  if (max_t != row.max_t) {
    if (row.sum_t > 0) {
      const double factor = __builtin_exp(row.max_t - max_t);
      row.product = factor * (row.product - (max_t - row.max_t) * row.sum_t);
      row.sum_t *= factor;
    }
    row.max_t = max_t;
  }
}

template <class Acc>
FASTDISTIL_INLINE Acc tile_max(const Acc* x, int64_t n) {
  constexpr int W = Lanes<Acc>::count;
  Vec<Acc> m0 = load(x), m1 = load(x + kPanel / 2);  // n is a multiple of kPanel: two chains
  for (int64_t j = kPanel; j < n; j += kPanel) {
    m0 = max(m0, load(x + j));
    m1 = max(m1, load(x + j + kPanel / 2));
  }
  for (int64_t part = W; part < kPanel / 2; part += W) {
    for (int64_t j = part; j < n; j += kPanel) {
      m0 = max(m0, load(x + j));
      m1 = max(m1, load(x + j + kPanel / 2));
    }
  }
  return reduce_max<Acc>(max(m0, m1));
}

template <class Acc>
FASTDISTIL_INLINE void fold_row(const Acc* s, const Acc* t, int64_t n, KlRow& row) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  const double block_s = tile_max(s, n), block_t = tile_max(t, n);
  if (block_t == -INFINITY) return;  // no pair of this tile counts
  move_maxima(row, block_s > row.max_s ? block_s : row.max_s, block_t > row.max_t ? block_t : row.max_t);
  const Acc max_s = static_cast<Acc>(row.max_s), max_t = static_cast<Acc>(row.max_t);
  V sum_s{}, sum_t{}, product{};
  for (int64_t j = 0; j < n; j += W) {
    const V x = load(s + j) - max_s;
    const V y = load(t + j) - max_t;
    const V b = exp_nonpositive(x);
    const V a = exp_nonpositive(y);
    sum_s += b;
    sum_t += a;
    product += a > V{} ? a * (y - x) : V{};  // both are -inf where a pair does not count
  }
  row.sum_s += reduce_add<Acc>(sum_s);
  row.sum_t += reduce_add<Acc>(sum_t);
  row.product += reduce_add<Acc>(product);
}

template <class Acc>
void attention_kl_forward(const AttentionKlHead& head, const AttentionKlRows& out, void* memory) {
  TileScratch<Acc> scratch(memory);
  const int64_t ds = head.student_q.d, dt = head.teacher_q.d;
  const int64_t panel_keys = pad_to(head.num_keys, kPanel);
  Acc* student_panels = scratch.take(panel_keys * ds);
  Acc* teacher_panels = scratch.take(panel_keys * dt);
  Acc* student_q = scratch.take(kTileQueries * ds);
  Acc* teacher_q = scratch.take(kTileQueries * dt);
  Acc* s = scratch.take(kTileQueries * kTileKeys);
  Acc* t = scratch.take(kTileQueries * kTileKeys);
  Acc* staging = scratch.take(ds > dt ? ds : dt);
  pack_panels(head.student_k, head.keys, head.num_keys, student_panels, staging);
  pack_panels(head.teacher_k, head.keys, head.num_keys, teacher_panels, staging);

  for (int64_t first = 0; first < head.num_queries; first += kTileQueries) {
    const int64_t rows = head.num_queries - first < kTileQueries ? head.num_queries - first : kTileQueries;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = head.queries[first + i];
      pack_token(head.student_q, token, static_cast<Acc>(head.student_scale), ds, student_q + i * ds);
      pack_token(head.teacher_q, token, static_cast<Acc>(head.teacher_scale), dt, teacher_q + i * dt);
    }
    KlRow states[kTileQueries];
    for (int64_t key = 0; key < panel_keys; key += kTileKeys) {
      const int64_t n = panel_keys - key < kTileKeys ? panel_keys - key : kTileKeys;
      scores_tile(rows, ds, student_q, ds, student_panels, key, n, s, kTileKeys);
      scores_tile(rows, dt, teacher_q, dt, teacher_panels, key, n, t, kTileKeys);
      exclude_pairs(head, first, rows, key, n, s, t);
      for (int64_t i = 0; i < rows; ++i) fold_row(s + i * kTileKeys, t + i * kTileKeys, n, states[i]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = head.queries[first + i];
      const KlRow& row = states[i];
      const double log_s = __builtin_log(row.sum_s), log_t = __builtin_log(row.sum_t);
      static_cast<Acc*>(out.kl)[token] = static_cast<Acc>(row.product / row.sum_t - log_t + log_s);
      static_cast<Acc*>(out.student.max)[token] = static_cast<Acc>(row.max_s);
      static_cast<Acc*>(out.student.sum)[token] = static_cast<Acc>(row.sum_s);
      static_cast<Acc*>(out.teacher.max)[token] = static_cast<Acc>(row.max_t);
      static_cast<Acc*>(out.teacher.sum)[token] = static_cast<Acc>(row.sum_t);
    }
  }
}

// The softmax of one query, times its weight.
template <class Acc>
struct WeightedSoftmax {
  Acc max, factor;

  WeightedSoftmax(const SoftmaxRows& rows, int64_t token, Acc weight)
      : max(static_cast<const Acc*>(rows.max)[token]), factor(weight / static_cast<const Acc*>(rows.sum)[token]) {}

  FASTDISTIL_INLINE Vec<Acc> operator()(Vec<Acc> score) const { return exp_nonpositive(score - max) * factor; }
};

// s becomes weight * (p_s - p_t), n elements of one query.
template <class Acc>
FASTDISTIL_INLINE void difference_row(Acc* s, const Acc* t, int64_t n, const WeightedSoftmax<Acc>& student,
                                      const WeightedSoftmax<Acc>& teacher) {
  constexpr int W = Lanes<Acc>::count;
  for (int64_t j = 0; j < n; j += W) store<Acc>(s + j, student(load(s + j)) - teacher(load(t + j)));
}

template <class Acc>
void attention_kl_backward(const AttentionKlHead& head, const AttentionKlGrads& grads, void* memory) {
  TileScratch<Acc> scratch(memory);
  const Acc* weight = static_cast<const Acc*>(grads.weight);
  PackedHead<Acc> packed(head.student_q, head.student_k, head.teacher_q, head.teacher_k, head.student_scale,
                         head.teacher_scale, head.queries, head.num_queries, head.keys, head.num_keys, scratch);
  packed.for_each_tile([&](int64_t first, int64_t rows, int64_t key, int64_t n, Acc* s, Acc* t) {
    exclude_pairs(head, first, rows, key, n, s, t);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = head.queries[first + i];
      difference_row<Acc>(s + i * kTileKeys, t + i * kTileKeys, n, {grads.student, token, weight[token]},
                          {grads.teacher, token, weight[token]});
    }
    packed.add_gradients(first, rows, key, s, static_cast<Acc*>(grads.grad_k));
  });
  packed.write_grad_q(grads.grad_q);
}

}  // namespace fastdistil::FASTDISTIL_SET
