// One row of kd_loss: both terms and the gradient from one read of each logit.
//
// The first pass goes through the row in blocks with a running maximum. It writes exp((x - m) / T) for the maximum m
// of that moment to scratch memory that stays in L2, and sums. The second pass reads the scratch alone, corrects each
// block by exp((m - m_final) / T) and writes the gradient. Nothing of the row is read after its gradient is begun, so
// the gradient may overwrite the student's logits.
//
// With y = t - m_t, a = exp(y / T), Z_t = sum a for the teacher and x = s - m_s, b = exp(x / T), Z_s = sum b for the
// student:
//   forward KL    T^2 KL(t||s) = T^2 (sum a (y - x) / (T Z_t) - log Z_t + log Z_s)
//   reverse KL    T^2 KL(s||t) = T^2 (sum b (x - y) / (T Z_s) - log Z_s + log Z_t)
//   cross entropy CE = m_s + log Z_s(T = 1) - (1 - ls) s[label] - ls mean(s)
// Terms whose weight a (or b) is 0 are left out: -inf - -inf never enters a sum.
#pragma once

#include "vec.h"

namespace fastdistil::FASTDISTIL_SET {

enum class Kd { none, forward_kl, reverse_kl, jsd };

// Where the student's exponentials at temperature 1 come from: `same` are those at T (T = 1, or a row without KD),
// `square` are their squares (T = 2), `own` need an exponential of their own.
enum class Ce { none, same, square, own };

template <class Acc>
struct Scratch {
  Acc* student;         // exp((s - m) / T)
  Acc* teacher;         // forward KL: exp((t - m) / T); reverse KL: x - y; JSD: first the former, then log(p_s / m)
  Acc* student_at_one;  // exp(s - m), for Ce::own
  Acc* student_max;     // the running maximum with which each block was exponentiated
  Acc* teacher_max;
  Acc* student_block;   // staging for conversions, biases and the padded tail
  Acc* teacher_block;
  Acc* grad_block;

  Scratch(void* memory, int64_t V) {
    const int64_t row = block_count(V) * kBlock;
    student_block = static_cast<Acc*>(memory);
    teacher_block = student_block + kBlock;
    grad_block = teacher_block + kBlock;
    student = grad_block + kBlock;
    teacher = student + row;
    student_at_one = teacher + row;
    student_max = student_at_one + row;
    teacher_max = student_max + block_count(V);
  }
};

struct Sums {
  double student = 0;
  double teacher = 0;
  double student_at_one = 0;
  double product = 0;  // of the weight and the difference of the logits
};

// Vectors that are added up before their sum goes into a double: a large term followed by many small ones would lose
// a little with each.
constexpr int64_t kGroup = 16;

// The maximum as a number to subtract: 0 stands for it while all logits so far are -inf, every exponential is 0 then.
template <class Acc>
FASTDISTIL_INLINE Acc finite(Acc maximum) {
  return maximum == -INFINITY ? 0 : maximum;
}

inline const void* offset(const void* base, Dtype dtype, int64_t elements) {
  return static_cast<const char*>(base) + elements * dtype_size(dtype);
}

// A block of logits in the accumulation type, bias added, filled up with -inf to whole vectors.
template <class Acc>
FASTDISTIL_INLINE const Acc* load_block(const void* row, Dtype dtype, const void* bias, int64_t begin, int64_t n,
                                        Acc* staging) {
  constexpr int W = Lanes<Acc>::count;
  const void* source = offset(row, dtype, begin);
  if (is_acc<Acc>(dtype) && bias == nullptr && n % W == 0) return static_cast<const Acc*>(source);
  to_acc(source, dtype, n, staging);
  if (bias != nullptr) {
    const Acc* b = static_cast<const Acc*>(bias) + begin;
    int64_t i = 0;
    for (; i + W <= n; i += W) store<Acc>(staging + i, load(staging + i) + load(b + i));
    for (; i < n; ++i) staging[i] += b[i];
  }
  for (int64_t i = n; i < pad_to(n, W); ++i) staging[i] = -INFINITY;
  return staging;
}

template <class Acc>
FASTDISTIL_INLINE Acc block_max(const Acc* x, int64_t n) {
  constexpr int W = Lanes<Acc>::count;
  Vec<Acc> m0 = load(x), m1 = m0, m2 = m0, m3 = m0;  // four chains: a maximum takes longer than a load
  int64_t i = W;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = max(m0, load(x + i));
    m1 = max(m1, load(x + i + W));
    m2 = max(m2, load(x + i + 2 * W));
    m3 = max(m3, load(x + i + 3 * W));
  }
  for (; i < n; i += W) m0 = max(m0, load(x + i));
  return reduce_max<Acc>(max(max(m0, m1), max(m2, m3)));
}

template <class Acc>
FASTDISTIL_INLINE Acc block_sum(const Acc* x, int64_t n) {
  constexpr int W = Lanes<Acc>::count;
  Vec<Acc> total{};
  int64_t i = 0;
  for (; i + W <= n; i += W) total += load(x + i);
  Acc sum = reduce_add<Acc>(total);
  for (; i < n; ++i) sum += x[i];
  return sum;
}

template <class Acc, Kd kd, Ce ce>
FASTDISTIL_INLINE Sums exp_block(const Acc* s, const Acc* t, int64_t n, Acc max_s, Acc max_t, Acc inverse_t,
                                 Acc* student, Acc* teacher, Acc* student_at_one) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  Total<Acc> total_s, total_t, total_one, total_product;
  for (int64_t begin = 0; begin < n; begin += kGroup * W) {
    const int64_t end = n - begin < kGroup * W ? n : begin + kGroup * W;
    V sum_s{}, sum_t{}, sum_one{}, product{};
    for (int64_t i = begin; i < end; i += W) {
      const V x = load(s + i) - max_s;
      const V b = exp_nonpositive(x * inverse_t);
      sum_s += b;
      store<Acc>(student + i, b);
      if constexpr (ce == Ce::square) sum_one += b * b;
      if constexpr (ce == Ce::own) {
        const V one = exp_nonpositive(x);
        sum_one += one;
        store<Acc>(student_at_one + i, one);
      }
      if constexpr (kd != Kd::none) {
        const V y = load(t + i) - max_t;
        const V a = exp_nonpositive(y * inverse_t);
        sum_t += a;
        V kept = a;
        if constexpr (kd == Kd::forward_kl) product += a * (y * inverse_t < kLowest<Acc> ? V{} : y - x);
        if constexpr (kd == Kd::reverse_kl) {
          kept = x * inverse_t < kLowest<Acc> ? V{} : x - y;
          product += b * kept;
        }
        store<Acc>(teacher + i, kept);
      }
    }
    total_s.add(sum_s);
    if constexpr (kd != Kd::none) total_t.add(sum_t);
    if constexpr (ce == Ce::square || ce == Ce::own) total_one.add(sum_one);
    if constexpr (kd == Kd::forward_kl || kd == Kd::reverse_kl) total_product.add(product);
  }
  return {total_s.sum(), total_t.sum(), total_one.sum(), total_product.sum()};
}

// JSD between the first and the second pass, with p = b * scale_s and q = a * scale_t the probabilities of the
// student and the teacher, m = beta q + (1 - beta) p: replaces a by log(p / m), returns sums of p log(p / m) and q
// log(q / m). x = (q - p) / m gives q / m - 1 = (1 - beta) x and p / m - 1 = -beta x without cancellation.
template <class Acc>
FASTDISTIL_INLINE Sums jsd_block(const Acc* student, Acc* teacher, int64_t n, Acc scale_s, Acc scale_t, Acc beta) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  Total<Acc> total_s, total_t;
  for (int64_t begin = 0; begin < n; begin += kGroup * W) {
    const int64_t end = n - begin < kGroup * W ? n : begin + kGroup * W;
    V sum_s{}, sum_t{};
    for (int64_t i = begin; i < end; i += W) {
      const V p = load(student + i) * scale_s;
      const V q = load(teacher + i) * scale_t;
      const V m = beta * q + (1 - beta) * p;
      const V inverse = 1 / (m > V{} ? m : broadcast<Acc>(1));
      const V x = (q - p) * inverse;
      const V log_p = log_near_one(p * inverse, -beta * x);
      const V log_q = log_near_one(q * inverse, (1 - beta) * x);
      const V kept = p == V{} ? V{} : log_p;
      sum_s += p * kept;
      sum_t += q == V{} ? V{} : q * log_q;
      store<Acc>(teacher + i, kept);
    }
    total_s.add(sum_s);
    total_t.add(sum_t);
  }
  Sums sums;
  sums.student = total_s.sum();
  sums.teacher = total_t.sum();
  return sums;
}

// The gradient of one block. `student` scales p_s at T, `teacher` p_t, `student_at_one` p_s at 1, `mean` is
// subtracted from what the teacher's scratch holds (reverse KL, JSD), in two parts because the difference may be
// small; `uniform` is label smoothing's constant.
template <class Acc>
struct GradScales {
  Acc student, teacher, student_at_one, mean, mean_rest, uniform;
};

template <class Acc, Kd kd, Ce ce>
FASTDISTIL_INLINE void grad_block(const Acc* student, const Acc* teacher, const Acc* student_at_one, int64_t n,
                                  GradScales<Acc> scales, Acc* grad) {
  using V = Vec<Acc>;
  constexpr int W = Lanes<Acc>::count;
  for (int64_t i = 0; i < n; i += W) {
    const V b = load(student + i);
    V factor = broadcast(scales.student);
    if constexpr (kd == Kd::reverse_kl || kd == Kd::jsd) {
      factor = scales.student * ((load(teacher + i) - scales.mean) - scales.mean_rest);
    }
    if constexpr (kd != Kd::none && ce == Ce::same) factor += scales.student_at_one;
    if constexpr (ce == Ce::square) factor += scales.student_at_one * b;
    V g = b * factor - scales.uniform;
    if constexpr (kd == Kd::forward_kl) g -= scales.teacher * load(teacher + i);
    if constexpr (ce == Ce::own) g += scales.student_at_one * load(student_at_one + i);
    store<Acc>(grad + i, g);
  }
}

// exp((old - new) / T) for a running maximum, or for a block's maximum and the row's.
FASTDISTIL_INLINE double rescale(double from, double to, double inverse_t) {
  return from == to ? 1.0 : __builtin_exp((from - to) * inverse_t);
}

struct Maxima {
  double student;
  double teacher;
};

// What x - y grows by when it is taken from other maxima.
FASTDISTIL_INLINE double shift(Maxima from, Maxima to) {
  return (finite(from.student) - finite(to.student)) - (finite(from.teacher) - finite(to.teacher));
}

// Sums that were taken from one pair of maxima, as they would be from another.
template <Kd kd>
FASTDISTIL_INLINE void move_maxima(Sums& sums, Maxima from, Maxima to, double inverse_t) {
  const double scale_s = rescale(from.student, to.student, inverse_t);
  const double scale_t = rescale(from.teacher, to.teacher, inverse_t);
  if (kd == Kd::forward_kl) sums.product = scale_t * (sums.product - shift(from, to) * sums.teacher);
  if (kd == Kd::reverse_kl) sums.product = scale_s * (sums.product + shift(from, to) * sums.student);
  sums.student *= scale_s;
  sums.teacher *= scale_t;
  sums.student_at_one *= rescale(from.student, to.student, 1.0);
}

template <class Acc, Kd kd, Ce ce>
void kd_loss_row(const KdLossProblem& problem, KdLossRow& row, void* memory) {
  constexpr bool has_kd = kd != Kd::none;
  constexpr int W = Lanes<Acc>::count;
  const int64_t V = problem.V;
  const double T = has_kd ? problem.temperature : 1.0;
  const double inverse_t = 1.0 / T;
  const double smoothing = ce == Ce::none ? 0.0 : problem.label_smoothing;
  Scratch<Acc> scratch(memory, V);

  Acc label_logit = 0;
  if (ce != Ce::none) {
    to_acc(offset(row.student, problem.student_dtype, row.label), problem.student_dtype, 1, &label_logit);
    if (problem.student_bias != nullptr) label_logit += static_cast<const Acc*>(problem.student_bias)[row.label];
  }

  Acc max_s = -INFINITY, max_t = -INFINITY;
  Sums row_sums;
  double sum_logits = 0;
  for (int64_t begin = 0, block = 0; begin < V; begin += kBlock, ++block) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    const int64_t whole = pad_to(n, W);
    const Acc* s = load_block<Acc>(row.student, problem.student_dtype, problem.student_bias, begin, n,
                                   scratch.student_block);
    const Acc* t = nullptr;
    const Acc before_s = max_s, before_t = max_t;
    const Acc block_s = block_max(s, whole);
    max_s = max_s > block_s ? max_s : block_s;
    if (has_kd) {
      t = load_block<Acc>(row.teacher, problem.teacher_dtype, problem.teacher_bias, begin, n, scratch.teacher_block);
      const Acc block_t = block_max(t, whole);
      max_t = max_t > block_t ? max_t : block_t;
    }
    scratch.student_max[block] = max_s;
    scratch.teacher_max[block] = max_t;
    if (max_s != before_s || max_t != before_t) {
      move_maxima<kd>(row_sums, {before_s, before_t}, {max_s, max_t}, inverse_t);
    }
    const Sums sums = exp_block<Acc, kd, ce>(s, t, whole, finite(max_s), finite(max_t), static_cast<Acc>(inverse_t),
                                             scratch.student + begin, scratch.teacher + begin,
                                             scratch.student_at_one + begin);
    row_sums.student += sums.student;
    row_sums.teacher += sums.teacher;
    row_sums.student_at_one += sums.student_at_one;
    row_sums.product += sums.product;
    if (smoothing > 0) sum_logits += block_sum(s, n);
  }
  const auto [sum_s, sum_t, student_at_one, product] = row_sums;
  const double sum_one = ce == Ce::same ? sum_s : student_at_one;
  const Maxima maxima{max_s, max_t};
  const double log_s = __builtin_log(sum_s);
  const double log_t = __builtin_log(sum_t);
  double mean = 0;  // what the gradients of reverse KL and JSD subtract
  row.kd = 0;
  row.ce = 0;
  if (kd == Kd::forward_kl) row.kd = T * T * (product / sum_t * inverse_t - log_t + log_s);
  if (kd == Kd::reverse_kl) {
    mean = product / sum_s;
    row.kd = T * T * (mean * inverse_t - log_s + log_t);
  }
  if (kd == Kd::jsd) {
    double kl_s = 0, kl_t = 0;
    for (int64_t begin = 0, block = 0; begin < V; begin += kBlock, ++block) {
      const int64_t n = pad_to(V - begin < kBlock ? V - begin : kBlock, W);
      const Sums sums = jsd_block<Acc>(
          scratch.student + begin, scratch.teacher + begin, n,
          static_cast<Acc>(rescale(scratch.student_max[block], max_s, inverse_t) / sum_s),
          static_cast<Acc>(rescale(scratch.teacher_max[block], max_t, inverse_t) / sum_t),
          static_cast<Acc>(problem.jsd_beta));
      kl_s += sums.student;
      kl_t += sums.teacher;
    }
    mean = kl_s;
    row.kd = T * T * (problem.jsd_beta * kl_t + (1 - problem.jsd_beta) * kl_s);
  }
  if (ce != Ce::none) {
    row.ce = max_s + __builtin_log(sum_one) - (1 - smoothing) * label_logit;
    if (smoothing > 0) row.ce -= smoothing * sum_logits / static_cast<double>(V);
  }
  if (row.grad == nullptr) return;

  double weight = row.kd_scale * T;  // of p_s at T in the gradient
  if (kd == Kd::none) weight = row.ce_scale;
  if (kd == Kd::reverse_kl) weight = row.kd_scale;
  if (kd == Kd::jsd) weight *= 1 - problem.jsd_beta;
  for (int64_t begin = 0, block = 0; begin < V; begin += kBlock, ++block) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    GradScales<Acc> scales{};
    scales.student = static_cast<Acc>(weight * rescale(scratch.student_max[block], max_s, inverse_t) / sum_s);
    double block_mean = mean;
    if (kd == Kd::reverse_kl) {
      block_mean -= shift({scratch.student_max[block], scratch.teacher_max[block]}, maxima);
    }
    scales.mean = static_cast<Acc>(block_mean);
    scales.mean_rest = static_cast<Acc>(block_mean - scales.mean);
    if (kd == Kd::forward_kl) {
      scales.teacher = static_cast<Acc>(weight * rescale(scratch.teacher_max[block], max_t, inverse_t) / sum_t);
    }
    if (ce != Ce::none) {
      scales.student_at_one =
          static_cast<Acc>(row.ce_scale * rescale(scratch.student_max[block], max_s, 1.0) / sum_one);
      scales.uniform = static_cast<Acc>(row.ce_scale * smoothing / static_cast<double>(V));
    }
    void* target = const_cast<void*>(offset(row.grad, problem.grad_dtype, begin));
    const bool direct = is_acc<Acc>(problem.grad_dtype) && n % W == 0;
    Acc* grad = direct ? static_cast<Acc*>(target) : scratch.grad_block;
    grad_block<Acc, kd, ce>(scratch.student + begin, scratch.teacher + begin, scratch.student_at_one + begin,
                            pad_to(n, W), scales, grad);
    if (ce != Ce::none && row.label >= begin && row.label < begin + n) {
      grad[row.label - begin] -= static_cast<Acc>(row.ce_scale * (1 - smoothing));
    }
    if (!direct) from_acc(grad, n, problem.grad_dtype, target);
  }
}

template <class Acc, Kd kd>
void kd_loss_row_for(const KdLossProblem& problem, KdLossRow& row, void* scratch) {
  if (!row.has_ce) return kd_loss_row<Acc, kd, Ce::none>(problem, row, scratch);
  if (problem.temperature == 1.0) return kd_loss_row<Acc, kd, Ce::same>(problem, row, scratch);
  if (problem.temperature == 2.0) return kd_loss_row<Acc, kd, Ce::square>(problem, row, scratch);
  return kd_loss_row<Acc, kd, Ce::own>(problem, row, scratch);
}

template <class Acc>
void kd_loss_row(const KdLossProblem& problem, KdLossRow& row, void* scratch) {
  if (!row.has_kd) return kd_loss_row<Acc, Kd::none, Ce::same>(problem, row, scratch);
  switch (problem.divergence) {
    case Divergence::forward_kl: return kd_loss_row_for<Acc, Kd::forward_kl>(problem, row, scratch);
    case Divergence::reverse_kl: return kd_loss_row_for<Acc, Kd::reverse_kl>(problem, row, scratch);
    case Divergence::jsd: return kd_loss_row_for<Acc, Kd::jsd>(problem, row, scratch);
  }
}

}  // namespace fastdistil::FASTDISTIL_SET
