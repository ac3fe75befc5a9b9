// What the operator files and the row kernels share: plain structs and one table of functions per instruction set.
//
// No torch header is included here. The files compiled for AVX2 or AVX-512 see this header only, so that no inline
// function of a library is compiled for an instruction set which the processor at hand may lack.
#pragma once

#include <cstdint>

namespace fastdistil {

enum class Dtype { float32, bfloat16, float16, float64 };
enum class Divergence { forward_kl, reverse_kl, jsd };

// Elements which are read, exponentiated and summed together: two input blocks and two scratch blocks fit into L1.
constexpr int64_t kBlock = 256;

constexpr int64_t block_count(int64_t V) { return (V + kBlock - 1) / kBlock; }

// The scratch of one thread, counted in elements of the accumulation type: exponentials of the student, of the teacher
// and of the student at temperature 1; the running maxima of each block; staging blocks for conversions and tails.
constexpr int64_t kd_loss_scratch(int64_t V) { return 3 * block_count(V) * kBlock + 2 * block_count(V) + 3 * kBlock; }

// What is the same for all rows of a call.
struct KdLossProblem {
  int64_t V;
  Dtype student_dtype;
  Dtype teacher_dtype;
  Dtype grad_dtype;
  const void* student_bias;  // (V,) of the accumulation type, or null
  const void* teacher_bias;
  Divergence divergence;
  double temperature;
  double jsd_beta;
  double label_smoothing;
};

struct KdLossRow {
  const void* student;  // (V,)
  const void* teacher;  // (V,), not read when has_kd is false
  void* grad;           // (V,) or null; may be the student's own memory
  bool has_kd;
  bool has_ce;
  int64_t label;
  double kd_scale;
  double ce_scale;
  double kd;  // results, not weighted; kd includes the squared temperature
  double ce;
};

// A row of hidden states of both models, for cosine_loss and hidden_mse.
struct PairRow {
  const void* student;  // (D,)
  const void* teacher;  // (D,)
  void* grad;           // (D,) or null
  Dtype student_dtype;
  Dtype teacher_dtype;
  Dtype grad_dtype;
  int64_t D;
  bool normalize;  // hidden_mse: of directions
  double scale;
  double loss;  // result, not weighted
};

constexpr int64_t pad_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The attention losses pad packed vectors to kPad elements and pack keys in panels of kPanel; both are whole vectors in
// every instruction set.
constexpr int64_t kPad = 16;
constexpr int64_t kPanel = 32;
// A tile of scores: 48 queries, a multiple of the rows that the inner products take at a time, by 256 keys. Two tiles
// of float and the panels of 256 keys stay in the second-level cache.
constexpr int64_t kTileQueries = 48;
constexpr int64_t kTileKeys = 256;

// Queries or keys of one sequence and head; a token's d elements are contiguous.
struct Tokens {
  const char* data;
  int64_t pitch;  // bytes from token to token
  Dtype dtype;
  int64_t d;
};

struct MutableTokens {
  char* data;
  int64_t pitch;
  Dtype dtype;
  int64_t d;
};

// What attention_kl reads of one sequence and head. Numbers "of a token" are indexed by its place in the sequence.
struct AttentionKlHead {
  Tokens student_q, student_k, teacher_q, teacher_k;
  double student_scale, teacher_scale;
  const int64_t* queries;  // (num_queries,), the tokens that count as queries of this task, ascending
  int64_t num_queries;
  const int64_t* keys;  // (num_keys,), the tokens that count as keys
  int64_t num_keys;
  const bool* pairs;  // (L, L), or null: all pairs of these queries and keys
  int64_t L;
};

// What turns a row's scores into probabilities: exp(score - max) / sum. (L,) each, in the accumulation type. Their one
// number max + log(sum) would not do: its rounding, which grows with the scores, would be common to a row.
struct SoftmaxRows {
  void* max;
  void* sum;
};

struct AttentionKlRows {
  void* kl;  // (L,) in the accumulation type
  SoftmaxRows student, teacher;
};

struct AttentionKlGrads {
  const void* weight;  // (L,) in the accumulation type
  SoftmaxRows student, teacher;
  MutableTokens grad_q;  // written at the queries of the task
  void* grad_k;          // (num_keys, pad_to(ds, kPad)) in the accumulation type, written
};

// The scratch of one thread in elements of the accumulation type, for up to L queries and keys.
constexpr int64_t attention_kl_scratch(int64_t L, int64_t ds, int64_t dt) {
  const int64_t student = pad_to(ds, kPad), teacher = pad_to(dt, kPad);
  const int64_t panels = pad_to(L, kPanel) * (student + teacher);
  const int64_t tiles = 2 * kTileQueries * kTileKeys + kTileQueries * (student + teacher);
  const int64_t rows = L * (3 * student + teacher);  // keys, queries and a gradient of the backward
  return panels + tiles + rows + student + teacher;
}

// One sequence and head of attention_mse.
struct AttentionMseHead {
  Tokens student_q, student_k, teacher_q, teacher_k;
  double student_scale, teacher_scale;
  const int64_t* tokens;  // (num_tokens,), those that count
  int64_t num_tokens;
  const void* weight;      // of the queries: (L,) in the accumulation type, or one number
  int64_t weight_stride;   // 1 or 0
  bool with_grad;
  MutableTokens grad_q, grad_k;
  double loss;  // result
};

// Tokens that attention_mse packs at a time.
constexpr int64_t kMseTokens = 96;

// Up to how many tokens the scores themselves are cheaper than the Gram matrices, whose sums in double count twice:
// 2 n^2 (3 ds + dt) operations against 4 n (4/3 D^2 + D ds).
constexpr int64_t most_tokens_by_scores(int64_t ds, int64_t dt) {
  const int64_t D = ds + dt;
  return (8 * D * D / 3 + 2 * D * ds) / (3 * ds + dt);
}

// The scratch of one thread in doubles: Gram matrices and their student's columns; packed tokens of X, W X and Y; a
// block of a gradient.
constexpr int64_t attention_mse_scratch(int64_t L, int64_t ds, int64_t dt) {
  const int64_t D = pad_to(ds + dt, kPanel), own = pad_to(ds, kPad);
  const int64_t gram = 2 * D * D + 2 * D * own + kMseTokens * (3 * D + own) + D;
  const int64_t few = L < most_tokens_by_scores(ds, dt) ? L : most_tokens_by_scores(ds, dt);
  const int64_t scores = attention_kl_scratch(few, ds, dt) + few * own;
  return gram > scores ? gram : scores;
}

struct Kernels {
  const char* name;
  // The accumulation type is float, and double for float64 students.
  void (*kd_loss_row_float)(const KdLossProblem&, KdLossRow&, void* scratch);
  void (*kd_loss_row_double)(const KdLossProblem&, KdLossRow&, void* scratch);
  void (*cosine_loss_row_float)(PairRow&);
  void (*cosine_loss_row_double)(PairRow&);
  void (*hidden_mse_row_float)(PairRow&);
  void (*hidden_mse_row_double)(PairRow&);
  void (*attention_kl_forward_float)(const AttentionKlHead&, const AttentionKlRows&, void* scratch);
  void (*attention_kl_forward_double)(const AttentionKlHead&, const AttentionKlRows&, void* scratch);
  void (*attention_kl_backward_float)(const AttentionKlHead&, const AttentionKlGrads&, void* scratch);
  void (*attention_kl_backward_double)(const AttentionKlHead&, const AttentionKlGrads&, void* scratch);
  void (*attention_mse_head_float)(AttentionMseHead&, void* scratch);
  void (*attention_mse_head_double)(AttentionMseHead&, void* scratch);
  void (*scale_row)(void* row, Dtype dtype, int64_t D, double scale);
  void (*convert_to_float)(const void* source, Dtype dtype, int64_t n, float* target);
  void (*convert_to_double)(const void* source, Dtype dtype, int64_t n, double* target);
  void (*convert_from_float)(const float* source, int64_t n, Dtype dtype, void* target);
  void (*convert_from_double)(const double* source, int64_t n, Dtype dtype, void* target);
};

// The first two are null where the compiler does not target x86-64.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The table chosen for this processor; see capability.cpp.
const Kernels& kernels();

}  // namespace fastdistil
