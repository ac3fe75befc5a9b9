// What the attention ops share: tensors of queries and keys as heads, and the tokens that count.
#pragma once

#include "../common.h"

namespace fastdistil {

// A (B, H, L, d) tensor whose last dimension is dense; the others have any strides.
struct Heads {
  char* data;
  int64_t batch, head, token;  // bytes
  Dtype dtype;
  int64_t d;

  Heads(const Tensor& tensor, const char* name) : dtype(dtype_of(tensor, name)), d(tensor.size(3)) {
    STD_TORCH_CHECK(tensor.stride(3) == 1 || d <= 1 || tensor.numel() == 0, "the last dimension of ", name,
                    " must be contiguous");
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    data = static_cast<char*>(tensor.data_ptr());
    batch = tensor.stride(0) * size;
    head = tensor.stride(1) * size;
    token = tensor.stride(2) * size;
  }

  Tokens at(int64_t b, int64_t h) const { return {data + b * batch + h * head, token, dtype, d}; }
  MutableTokens mutable_at(int64_t b, int64_t h) const { return {data + b * batch + h * head, token, dtype, d}; }
};

struct AttentionInputs {
  int64_t B, H, L;
  Heads student_q, student_k, teacher_q, teacher_k;

  AttentionInputs(const Tensor& sq, const Tensor& sk, const Tensor& tq, const Tensor& tk)
      : B(check_dim(sq)), H(sq.size(1)), L(sq.size(2)), student_q(sq, "student_q"), student_k(sk, "student_k"),
        teacher_q(tq, "teacher_q"), teacher_k(tk, "teacher_k") {
    for (const Tensor* tensor : {&sk, &tq, &tk}) {
      STD_TORCH_CHECK(check_dim(*tensor) == B && tensor->size(1) == H && tensor->size(2) == L,
                      "queries and keys must agree in B, H and L");
    }
    STD_TORCH_CHECK(sk.size(3) == sq.size(3) && tk.size(3) == tq.size(3), "queries and keys must agree in d");
  }

 private:
  static int64_t check_dim(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4, "queries and keys must have 4 dimensions, got ", tensor.dim());
    return tensor.size(0);
  }
};

// The tokens of each sequence that count as queries and as keys, by a mask (B, L), a mask (B, L, L) or none.
class CountedTokens {
 public:
  CountedTokens(const std::optional<Tensor>& mask, int64_t B, int64_t L) : queries_(B), keys_(B), L_(L) {
    if (!mask.has_value()) {
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t i = 0; i < L; ++i) queries_[b].push_back(i);
      }
      return;
    }
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    STD_TORCH_CHECK((mask->dim() == 2 || mask->dim() == 3) && mask->size(0) == B && mask->size(1) == L &&
                        mask->size(mask->dim() - 1) == L,
                    "mask must have shape (B, L) or (B, L, L)");
    STD_TORCH_CHECK(mask->is_contiguous(), "mask must be contiguous");
    const bool* counts = static_cast<const bool*>(mask->const_data_ptr());
    has_pairs_ = mask->dim() == 3;
    if (has_pairs_) pairs_ = counts;
    for (int64_t b = 0; b < B; ++b) has_pairs_ ? from_pairs(b, counts + b * L * L) : from_tokens(b, counts + b * L);
  }

  const std::vector<int64_t>& queries(int64_t b) const { return queries_[b]; }
  const std::vector<int64_t>& keys(int64_t b) const { return has_pairs_ ? keys_[b] : queries_[b]; }
  const bool* pairs(int64_t b) const { return has_pairs_ ? pairs_ + b * L_ * L_ : nullptr; }

 private:
  void from_tokens(int64_t b, const bool* counts) {
    for (int64_t i = 0; i < L_; ++i) {
      if (counts[i]) queries_[b].push_back(i);
    }
  }

  void from_pairs(int64_t b, const bool* counts) {
    std::vector<char> is_key(static_cast<size_t>(L_));
    for (int64_t i = 0; i < L_; ++i) {
      bool any = false;
      for (int64_t j = 0; j < L_; ++j) {
        any = any || counts[i * L_ + j];
        is_key[j] = is_key[j] || counts[i * L_ + j];
      }
      if (any) queries_[b].push_back(i);
    }
    for (int64_t j = 0; j < L_; ++j) {
      if (is_key[j]) keys_[b].push_back(j);
    }
  }

  std::vector<std::vector<int64_t>> queries_, keys_;
  int64_t L_;
  bool has_pairs_ = false;
  const bool* pairs_ = nullptr;
};

// A contiguous tensor of the accumulation type at an element.
inline char* element_of(const Tensor& tensor, int64_t index) {
  return static_cast<char*>(tensor.data_ptr()) + index * static_cast<int64_t>(tensor.element_size());
}

inline void check_rows(const Tensor& tensor, const AttentionInputs& in, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 3 && tensor.size(0) == in.B &&
                      tensor.size(1) == in.H && tensor.size(2) == in.L && tensor.is_contiguous(),
                  name, " must be (B, H, L), contiguous and of the accumulation dtype");
}

// How many tasks a head is split into: enough for any number of threads where there are few heads. It depends on the
// shape alone, so that sums do not depend on the threads.
inline int64_t segments_of(int64_t heads, int64_t queries) {
  constexpr int64_t kTasks = 32;
  const int64_t wanted = heads < kTasks ? (kTasks + heads - 1) / std::max<int64_t>(heads, 1) : 1;
  return std::max<int64_t>(1, std::min(wanted, queries / kTileQueries));
}

}  // namespace fastdistil
