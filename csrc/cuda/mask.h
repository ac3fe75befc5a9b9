// Which query-key pairs count, as bits.
#pragma once

#include "tiles.h"

namespace fastdistil::cuda {

// For a warp's 16 rows and a tile of columns: bit c of bits[r] says whether row g + 8 r counts with column c.
template <int kColumnsOfTile, bool kRowsAreQueries>
class Mask {
 public:
  __device__ Mask(const AttentionKl& p, const Place& place)
      : L_(p.L),
        pairs_(p.mask_is_pairs),
        mask_(p.mask),
        first_row_(place.first_row + static_cast<int>(threadIdx.x) / 32 * 16) {
    if (mask_ != nullptr) mask_ += place.batch * L_ * (pairs_ ? L_ : 1);
    for (int r = 0; r < 2; ++r) row_counts_[r] = token_counts(first_row_ + lane() / 4 + 8 * r);
    prefetch(0);
  }

  // False where no row of the block can have a column, by tokens alone.
  __device__ bool any_row() const { return __syncthreads_or(row_counts_[0] || row_counts_[1]) != 0; }

  // The tile after that of prefetch(), or the first.
  __device__ void bits_of_tile(int first_column, uint64_t (&bits)[2]) {
    if (pairs_) {
      pairs_of_tile(first_column, bits);
    } else {
      uint64_t columns = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        columns |= static_cast<uint64_t>(__ballot_sync(kWarp, column_counts_[part])) << (32 * part);
      }
      for (int r = 0; r < 2; ++r) bits[r] = row_counts_[r] ? columns : 0;
    }
    prefetch(first_column + kColumnsOfTile);
  }

 private:
  static constexpr int kParts = kColumnsOfTile / 32;

  __device__ static int lane() { return threadIdx.x % 32; }

  __device__ bool token_counts(int token) const {
    return token < L_ && (mask_ == nullptr || pairs_ || mask_[token]);
  }

  __device__ bool pair_counts(int query, int key) const {
    return query < L_ && key < L_ && mask_[query * L_ + key];
  }

  __device__ void prefetch(int first_column) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      column_counts_[part] = token_counts(first_column + 32 * part + lane());
    }
  }

  // Lanes read along the keys, which are contiguous, and pass the bits on to those who have the row.
  __device__ void pairs_of_tile(int first_column, uint64_t (&bits)[2]) const {
    bits[0] = bits[1] = 0;
    const int g = lane() / 4;
    if constexpr (kRowsAreQueries) {
#pragma unroll 4
      for (int row = 0; row < 16; ++row) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const bool counts = pair_counts(first_row_ + row, first_column + 32 * part + lane());
          const uint64_t word = static_cast<uint64_t>(__ballot_sync(kWarp, counts)) << (32 * part);
          if (row == g) bits[0] |= word;
          if (row == g + 8) bits[1] |= word;
        }
      }
    } else {
#pragma unroll 4
      for (int column = 0; column < kColumnsOfTile; column += 2) {
        const bool counts = pair_counts(first_column + column + lane() / 16, first_row_ + lane() % 16);
        const unsigned word = __ballot_sync(kWarp, counts);
        for (int r = 0; r < 2; ++r) {
          const unsigned even = word >> (g + 8 * r) & 1u;
          const unsigned odd = word >> (16 + g + 8 * r) & 1u;
          bits[r] |= static_cast<uint64_t>(even | odd << 1) << column;
        }
      }
    }
  }

  int64_t L_;
  bool pairs_;
  const bool* mask_;
  int first_row_;
  bool row_counts_[2];
  bool column_counts_[kParts];
};

// The columns that count with any row of the warp.
__device__ inline uint64_t any_row_of_warp(const uint64_t (&bits)[2]) {
  const uint64_t either = bits[0] | bits[1];
  const uint64_t low = __reduce_or_sync(kWarp, static_cast<unsigned>(either));
  const uint64_t high = __reduce_or_sync(kWarp, static_cast<unsigned>(either >> 32));
  return high << 32 | low;
}

}  // namespace fastdistil::cuda
