// Stands in for csrc/cuda/device.h, so that the CUDA kernels run on the CPU, thread by thread.
//
// Each GPU thread is a coroutine that runs until the others of its warp or block must catch up. Fragments follow the
// tables of the PTX manual (mma.m16n8k16, ldmatrix), not the kernels. What hides a fault on a CPU is made visible:
// shared memory starts as NaN and ends in a canary, an asynchronous copy leaves NaN until it is waited for, misaligned
// accesses abort, and warps run in a shuffled order.
#ifndef FASTDISTIL_CUDA_DEVICE_H
#define FASTDISTIL_CUDA_DEVICE_H

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 0;
inline int emulated_shared_limit = 227 * 1024;
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = emulated_shared_limit;
  return cudaSuccess;
}

inline struct {
  unsigned x;
} threadIdx, blockIdx;

namespace emulation {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class Waits { no, for_warp, for_block, forever };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Slot {
  alignas(16) char bytes[64];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Waits waits = Waits::no;
  unsigned exchanges = 0;  // two sets of slots in turn: the next may be filled while a slow lane reads the last
  std::vector<Copy> copies;
  static constexpr size_t kStack = 128 * 1024;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Slot> slots[2];
  std::vector<char> shared;
  ucontext_t scheduler;
  std::function<void()> kernel;
};

inline Block* block;
inline unsigned shuffle_state = 1;

inline Thread& self() { return block->threads[threadIdx.x]; }

inline void wait(Waits waits) {
  self().waits = waits;
  const unsigned x = threadIdx.x;
  swapcontext(&block->threads[x].context, &block->scheduler);
}

inline void enter() {
  block->kernel();
  require(self().copies.empty(), "a thread ends with a copy under way");
  self().waits = Waits::forever;
  swapcontext(&self().context, &block->scheduler);
}

inline bool all_wait(size_t first, size_t count, Waits waits) {
  for (size_t i = first; i < first + count; ++i) {
    if (block->threads[i].waits != waits) return false;
  }
  return true;
}

// Runs a block to its end.
inline void run() {
  constexpr size_t kWarpSize = 32;
  const size_t threads = block->threads.size(), warps = threads / kWarpSize;
  for (size_t i = 0; i < threads; ++i) {
    Thread& thread = block->threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  while (!all_wait(0, threads, Waits::forever)) {
    shuffle_state = shuffle_state * 1664525u + 1013904223u;
    bool moved = false;
    for (size_t turn = 0; turn < warps && !moved; ++turn) {
      const size_t first = ((shuffle_state >> 16) + turn) % warps * kWarpSize;
      if (all_wait(first, kWarpSize, Waits::for_warp)) {
        for (size_t i = first; i < first + kWarpSize; ++i) block->threads[i].waits = Waits::no;
      }
      for (size_t i = first; i < first + kWarpSize; ++i) {
        if (block->threads[i].waits != Waits::no) continue;
        threadIdx.x = static_cast<unsigned>(i);
        swapcontext(&block->scheduler, &block->threads[i].context);
        moved = true;
      }
    }
    if (moved) continue;
    require(all_wait(0, threads, Waits::for_block), "threads wait for others that do not come");
    for (Thread& thread : block->threads) thread.waits = Waits::no;
  }
}

// What each of `count` threads from `first` on gives, once all have come.
template <class T>
const Slot* exchange(const T& value, Waits waits, size_t first) {
  static_assert(sizeof(T) <= sizeof(Slot));
  std::vector<Slot>& slots = block->slots[self().exchanges++ % 2];
  std::memcpy(slots[threadIdx.x].bytes, &value, sizeof(T));
  wait(waits);
  return slots.data() + first;
}

template <class T>
std::vector<T> exchange_in_warp(const T& value) {
  const Slot* slots = exchange(value, Waits::for_warp, threadIdx.x / 32 * 32);
  std::vector<T> values(32);
  for (size_t i = 0; i < 32; ++i) std::memcpy(&values[i], slots[i].bytes, sizeof(T));
  return values;
}

inline uint16_t bits_at(const void* row, int index) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(row) + 2 * index, 2);
  return bits;
}

template <class T>
float number(uint16_t bits) {
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Waits::for_block); }

inline int __syncthreads_or(int value) {
  const emulation::Slot* slots = emulation::exchange(value, emulation::Waits::for_block, 0);
  int any = 0;
  for (size_t i = 0; i < emulation::block->threads.size(); ++i) {
    int one;
    std::memcpy(&one, slots[i].bytes, sizeof(int));
    any |= one;
  }
  return any;
}

inline float __shfl_sync(unsigned, float x, int lane) { return emulation::exchange_in_warp(x)[lane % 32]; }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const unsigned lane = threadIdx.x % 32 ^ static_cast<unsigned>(mask);
  return emulation::exchange_in_warp(x)[lane];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const std::vector<char> all = emulation::exchange_in_warp(static_cast<char>(x));
  unsigned word = 0;
  for (unsigned i = 0; i < 32; ++i) word |= static_cast<unsigned>(all[i]) << i;
  return word;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  unsigned any = 0;
  for (const unsigned one : emulation::exchange_in_warp(x)) any |= one;
  return any;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  unsigned largest = 0;
  for (const unsigned one : emulation::exchange_in_warp(x)) largest = std::max(largest, one);
  return largest;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

namespace fastdistil::cuda {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;
using std::max;

constexpr unsigned kWarp = 0xffffffffu;

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return x; }
inline float to_float(float16 x) { return x; }

template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}

template <class T>
uint32_t pack(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t packed;
  std::memcpy(&packed, pair, 4);
  return packed;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

template <int kBytes>
void copy_async(void* shared, const void* global, bool read) {
  emulation::require(emulation::is_aligned(shared, kBytes) && emulation::is_aligned(global, kBytes),
                     "a copy is not aligned");
  std::memset(shared, 0xff, kBytes);
  emulation::self().copies.push_back({shared, read ? global : nullptr, kBytes});
}

inline void wait_for_copies() {
  for (const emulation::Copy& copy : emulation::self().copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    } else {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
  }
  emulation::self().copies.clear();
}

template <class T>
std::vector<const T*> matrix_rows(const T* row) {
  emulation::require(emulation::is_aligned(row, 16), "a row of a matrix is not aligned");
  return emulation::exchange_in_warp(row);
}

template <class T>
void load_matrices(uint32_t (&fragment)[4], const T* row) {
  const std::vector<const T*> rows = matrix_rows(row);
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const T* own = rows[8 * i + g];
    fragment[i] = emulation::bits_at(own, 2 * t) | static_cast<uint32_t>(emulation::bits_at(own, 2 * t + 1)) << 16;
  }
}

template <class T>
void load_matrices_transposed(uint32_t (&fragment)[4], const T* row) {
  const std::vector<const T*> rows = matrix_rows(row);
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low = emulation::bits_at(rows[8 * i + 2 * t], g);
    const uint32_t high = emulation::bits_at(rows[8 * i + 2 * t + 1], g);
    fragment[i] = low | high << 16;
  }
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const std::vector<Operands> all = emulation::exchange_in_warp(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](uint32_t pair, unsigned index) {
    return emulation::number<T>(static_cast<uint16_t>(pair >> (16 * index)));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = threadIdx.x % 32 / 4 + 8 * (i / 2), column = threadIdx.x % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
      const uint32_t y = all[column * 4 + k % 8 / 2].b[k / 8];
      c[i] += half(x, k % 2) * half(y, k % 2);
    }
  }
}

inline char* shared_memory() { return emulation::block->shared.data(); }

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, int shared, cudaStream_t,
                   const Arguments&... arguments) {
  constexpr size_t kCanary = 1024;
  for (int64_t i = 0; i < blocks; ++i) {
    emulation::Block block;
    block.threads.resize(static_cast<size_t>(threads));
    for (auto& slots : block.slots) slots.resize(static_cast<size_t>(threads));
    block.shared.assign(static_cast<size_t>(shared) + kCanary, static_cast<char>(0xff));
    block.kernel = [&] { kernel(arguments...); };
    emulation::block = &block;
    blockIdx.x = static_cast<unsigned>(i);
    emulation::run();
    for (size_t at = static_cast<size_t>(shared); at < block.shared.size(); ++at) {
      emulation::require(block.shared[at] == static_cast<char>(0xff), "a write past the shared memory");
    }
  }
  return cudaSuccess;
}

}  // namespace fastdistil::cuda

#endif  // FASTDISTIL_CUDA_DEVICE_H
