// Runs CUDA kernels on the CPU: the part of CUDA C++ that csrc/cuda uses, for a host compiler.
//
// A thread of a grid is a fiber (ucontext for its first entry, setjmp/longjmp from then on). One fiber runs until it
// waits (__syncthreads, a shuffle, a grid barrier) or ends; nothing is in lockstep, no warp either. Blocks, the warps of
// a block and the lanes of a warp run one after the other, each as far as it can, in an adversarial order (forward,
// backward, or shuffled anew after every wait), and shared memory starts as NaN, so that what needs a missing barrier
// reads a wrong value.
//
// A wait that can never end, or a barrier that only some threads reach, is an error of the launch, with a message.
//
// __shared__ is thread_local: all blocks run on one thread of the operating system, and the executor exchanges the
// module's block of thread-local storage when it passes from one block to another. The module may therefore have no
// other thread_local variables. Linux with glibc.
#pragma once

// Fortified longjmp takes a jump to another stack for a corrupted one.
#undef _FORTIFY_SOURCE

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

// The built-in variables. Plain globals: the scheduler sets them before it resumes a fiber.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// Dynamic shared memory: a kernel declares `extern __shared__ unsigned char dynamic_shared[];`.
extern thread_local unsigned char dynamic_shared[];
thread_local unsigned char dynamic_shared[1 << 14] = {};

namespace host_executor {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum class Wait { none, block, warp, grid, done };

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;
  Wait wait = Wait::none;
  int line = 0;             // of the source, where it waits
  unsigned mask = 0;        // of a wait in a warp
  unsigned source = 0;      // the lane whose value it wants in a warp
  unsigned char posted[8], received[8];
  int predicate = 0;        // what it gives to __syncthreads_or
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  int any = 0;  // the result of __syncthreads_or
};

struct Executor {
  int multiprocessors = 2;
  unsigned seed = 0;  // 0 runs threads and blocks forward, 1 backward, others shuffled
  std::string message;

  unsigned random_state = 0;
  jmp_buf scheduler;
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  void (*entry)(void*) = nullptr;
  void* entry_argument = nullptr;
  std::vector<char*> stacks;
};
inline Executor executor;

// The module's thread-local storage, that is, its shared memory.
struct Storage {
  void* data = nullptr;
  size_t bytes = 0;
};

inline Storage shared_storage() {
  Storage storage;
  volatile unsigned char* touched = dynamic_shared;  // storage of a loaded module exists from its first use on
  touched[0] = touched[0];
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const auto* data = static_cast<const unsigned char*>(info->dlpi_tls_data);
          if (header.p_type == PT_TLS && data && dynamic_shared >= data && dynamic_shared < data + header.p_memsz) {
            *static_cast<Storage*>(result) = {info->dlpi_tls_data, header.p_memsz};
          }
        }
        return 0;
      },
      &storage);
  return storage;
}

inline std::vector<unsigned> order(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (executor.seed == 1) std::reverse(indices.begin(), indices.end());
  if (executor.seed > 1) {
    for (unsigned i = count; i > 1; --i) {
      executor.random_state = executor.random_state * 1664525u + 1013904223u;
      std::swap(indices[i - 1], indices[(executor.random_state >> 8) % i]);
    }
  }
  return indices;
}

// Gives the processor back to the scheduler; returns when the wait is over.
__attribute__((noinline)) inline void wait(Wait kind, int line) {
  executor.fiber->wait = kind;
  executor.fiber->line = line;
  if (_setjmp(executor.fiber->context) == 0) _longjmp(executor.scheduler, 1);
}

inline void fiber_main() {
  executor.entry(executor.entry_argument);
  executor.fiber->wait = Wait::done;
  _longjmp(executor.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  executor.fiber = fiber;
  fiber->wait = Wait::none;
  if (_setjmp(executor.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// Releases the lanes of a warp that wait for the same exchange, and hands over what they posted.
inline bool release_warp(Fiber* warp, size_t lanes) {
  bool released = false;
  for (size_t lane = 0; lane < lanes; ++lane) {
    if (warp[lane].wait != Wait::warp) continue;
    const unsigned mask = warp[lane].mask;
    bool complete = (mask >> lane & 1u) != 0;
    for (size_t i = 0; i < kWarp && complete; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      complete = i < lanes && warp[i].wait == Wait::warp && warp[i].mask == mask && warp[i].line == warp[lane].line;
    }
    if (!complete) continue;
    for (size_t i = 0; i < lanes; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      std::memcpy(warp[i].received, warp[warp[i].source].posted, sizeof(warp[i].received));
      warp[i].wait = Wait::none;
    }
    released = true;
  }
  return released;
}

inline bool all_wait(const Block& block, Wait kind) {
  return std::all_of(block.fibers.begin(), block.fibers.end(), [&](const Fiber& fiber) {
    return fiber.wait == kind && (kind == Wait::done || fiber.line == block.fibers[0].line);
  });
}

inline std::string describe(const Block& block) {
  const char* names[] = {"runs", "waits at a block barrier", "waits in a warp", "waits at a grid barrier", "has ended"};
  std::string text = "mismatched barriers in block " + std::to_string(block.index) + ":";
  const Fiber* before = nullptr;
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    const Fiber& fiber = block.fibers[i];
    if (!before || before->wait != fiber.wait || (fiber.wait != Wait::done && before->line != fiber.line)) {
      text += " thread " + std::to_string(i) + " " + names[static_cast<int>(fiber.wait)];
      if (fiber.wait != Wait::done) text += " (line " + std::to_string(fiber.line) + ")";
    }
    before = &fiber;
  }
  return text;
}

// Runs a block until all its threads wait at the grid barrier or have ended; false on an error.
inline bool run_block(Block* block, const Storage& storage) {
  executor.block = block;
  blockIdx = dim3(block->index, 0, 0);
  if (storage.bytes) std::memcpy(storage.data, block->shared.data(), storage.bytes);
  const unsigned count = static_cast<unsigned>(block->fibers.size());
  bool ok = true;
  for (;;) {
    // One warp goes as far as it can before another one moves.
    for (unsigned w : order((count + kWarp - 1) / kWarp)) {
      const unsigned first = w * kWarp, lanes = std::min<unsigned>(kWarp, count - first);
      do {
        for (unsigned i : order(lanes)) {
          if (block->fibers[first + i].wait != Wait::none) continue;
          threadIdx = dim3(first + i, 0, 0);
          resume(&block->fibers[first + i]);
        }
      } while (release_warp(&block->fibers[first], lanes));
    }
    if (all_wait(*block, Wait::block)) {
      block->any = 0;
      for (Fiber& fiber : block->fibers) {
        block->any |= fiber.predicate != 0;
        fiber.wait = Wait::none;
      }
      continue;
    }
    ok = all_wait(*block, Wait::grid) || all_wait(*block, Wait::done);
    if (!ok) executor.message = describe(*block);
    break;
  }
  if (storage.bytes) std::memcpy(block->shared.data(), storage.data, storage.bytes);
  return ok;
}

inline cudaError_t run_grid(dim3 grid, dim3 threads, void (*entry)(void*), void* argument) {
  if (grid.y != 1 || grid.z != 1 || threads.y != 1 || threads.z != 1 || grid.x == 0 || threads.x == 0) {
    executor.message = "grids and blocks have one dimension here";
    return cudaErrorInvalidValue;
  }
  const Storage storage = shared_storage();
  executor.message.clear();
  executor.entry = entry;
  executor.entry_argument = argument;
  executor.random_state = executor.seed;
  gridDim = grid;
  blockDim = threads;
  while (executor.stacks.size() < size_t{grid.x} * threads.x) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return cudaErrorLaunchFailure;
    executor.stacks.push_back(static_cast<char*>(stack));
  }
  std::vector<Block> blocks(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) {
    blocks[b].index = b;
    blocks[b].fibers.resize(threads.x);
    blocks[b].shared.assign(storage.bytes, 0xff);  // a NaN in every floating-point type
    for (unsigned i = 0; i < threads.x; ++i) blocks[b].fibers[i].stack = executor.stacks[size_t{b} * threads.x + i];
  }
  for (;;) {
    for (unsigned b : order(grid.x)) {
      if (!run_block(&blocks[b], storage)) return cudaErrorLaunchFailure;
    }
    const auto ended = [](const Block& block) { return all_wait(block, Wait::done); };
    if (std::all_of(blocks.begin(), blocks.end(), ended)) return cudaSuccess;
    if (std::any_of(blocks.begin(), blocks.end(), ended)) {
      executor.message = "mismatched barriers: some blocks have ended, others wait at a grid barrier";
      return cudaErrorLaunchFailure;
    }
    for (Block& block : blocks) {
      for (Fiber& fiber : block.fibers) fiber.wait = Wait::none;
    }
  }
}

template <typename... P, size_t... I>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 threads, void** arguments, std::index_sequence<I...>) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, std::tuple<P...>(*static_cast<std::remove_reference_t<P>*>(arguments[I])...)};
  const auto entry = [](void* argument) {
    const Call& made = *static_cast<Call*>(argument);
    std::apply(made.kernel, made.arguments);
  };
  return run_grid(grid, threads, entry, &call);
}

// What `lane` of this warp posts. The scheduler hands the values over when all lanes of the mask have posted.
template <typename T>
T exchange(unsigned mask, T value, unsigned lane, int line) {
  static_assert(sizeof(T) <= sizeof(Fiber::posted), "a shuffle moves at most 8 bytes");
  std::memcpy(executor.fiber->posted, &value, sizeof(T));
  executor.fiber->mask = mask;
  executor.fiber->source = lane;
  wait(Wait::warp, line);
  std::memcpy(&value, executor.fiber->received, sizeof(T));
  return value;
}

}  // namespace host_executor

inline void __syncthreads(int line = __builtin_LINE()) { host_executor::wait(host_executor::Wait::block, line); }

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  host_executor::executor.fiber->predicate = predicate;
  host_executor::wait(host_executor::Wait::block, line);
  host_executor::executor.fiber->predicate = 0;
  return host_executor::executor.block->any;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  host_executor::exchange(mask, 0, threadIdx.x % host_executor::kWarp, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % host_executor::kWarp, source = lane ^ static_cast<unsigned>(lane_mask);
  // A source behind one's own segment gives one's own value.
  return host_executor::exchange(mask, value, source / width > lane / width ? lane : source, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % host_executor::kWarp, source = lane + delta;
  return host_executor::exchange(mask, value, source / width > lane / width ? lane : source, line);
}

// One fiber runs at a time.
inline int atomicOr(int* address, int value) {
  const int old = *address;
  *address = old | value;
  return old;
}

inline bool __isGlobal(const void*) { return true; }
#define __builtin_assume(condition) static_cast<void>(condition)

using std::max;
using std::min;

namespace cooperative_groups {
struct grid_group {
  void sync(int line = __builtin_LINE()) const { host_executor::wait(host_executor::Wait::grid, line); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = host_executor::executor.multiprocessors;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 threads, void** arguments, size_t shared_bytes = 0,
                             cudaStream_t = nullptr) {
  if (shared_bytes > sizeof(dynamic_shared)) return cudaErrorInvalidValue;
  return host_executor::launch(kernel, grid, threads, arguments, std::index_sequence_for<P...>{});
}

template <typename... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 threads, void** arguments,
                                        size_t shared_bytes = 0, cudaStream_t stream = nullptr) {
  if (grid.x > static_cast<unsigned>(host_executor::executor.multiprocessors)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaLaunchKernel(kernel, grid, threads, arguments, shared_bytes, stream);
}

// float to and from a 16-bit type, rounding to the nearest, ties to even.
class __nv_bfloat16 {
 public:
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof(raw));
    bits_ = value != value ? 0x7fff : static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t raw = static_cast<uint32_t>(bits_) << 16;
    float value;
    std::memcpy(&value, &raw, sizeof(value));
    return value;
  }

 private:
  uint16_t bits_;
};

class __half {
 public:
  __half() = default;
  explicit __half(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (!(magnitude < 65520.0f)) {  // half way from the largest number to 2^16
      bits_ = value != value ? 0x7fff : sign | 0x7c00;
    } else if (magnitude < 0x1p-14f) {
      // Below the smallest normal number the spacing is 2^-24; nearbyint rounds ties to even.
      bits_ = sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
    } else {
      uint32_t raw;
      std::memcpy(&raw, &magnitude, sizeof(raw));
      raw += 0xfff + (raw >> 13 & 1);
      bits_ = sign | static_cast<uint16_t>((raw >> 13) - ((127 - 15) << 10));
    }
  }
  operator float() const {
    const uint32_t exponent = bits_ >> 10 & 0x1f, fraction = bits_ & 0x3ff;
    float magnitude;
    if (exponent == 0) {
      magnitude = static_cast<float>(fraction) * 0x1p-24f;
    } else {
      const uint32_t raw = (exponent == 31 ? 255 : exponent + 127 - 15) << 23 | fraction << 13;
      std::memcpy(&magnitude, &raw, sizeof(magnitude));
    }
    return bits_ & 0x8000 ? -magnitude : magnitude;
  }

 private:
  uint16_t bits_;
};

extern "C" {
__attribute__((used)) inline void host_executor_configure(int multiprocessors, unsigned seed) {
  host_executor::executor.multiprocessors = multiprocessors;
  host_executor::executor.seed = seed;
}
__attribute__((used)) inline const char* host_executor_message() {
  return host_executor::executor.message.c_str();
}
}
