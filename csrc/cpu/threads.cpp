#include "threads.h"

#include "memory.h"

#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sched.h>
#endif

namespace lipgan::cpu {
namespace {

// The part of the GNU OpenMP ABI that is needed. LLVM's and Intel's runtimes export the same symbols on Linux.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*num_threads)() = nullptr;

  OpenMP() {
#if defined(__linux__)
    // Not linked: PyTorch ships its own copy under a name of its own, and puts its symbols into the global scope.
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread = reinterpret_cast<decltype(thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
  bool found() const { return parallel && thread && num_threads; }
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

struct Region {
  Worker worker;
  void* context;
  Team::State state;
};

void openmp_region(void* argument) {
  auto& region = *static_cast<Region*>(argument);
  // Only inside the region is it known how many threads the runtime has granted.
  region.worker(region.context, Team(openmp().thread(), openmp().num_threads(), region.state));
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

void Team::barrier() const {
  if (num_threads == 1) return;
  const unsigned generation = state_.generation.load(std::memory_order_relaxed);
  if (state_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
    state_.arrived.store(0, std::memory_order_relaxed);
    state_.generation.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; state_.generation.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

int usable_threads(int64_t wanted) {
  if (wanted <= 1) return 1;
  int64_t processors = std::thread::hardware_concurrency();
#if defined(__linux__)
  // Asked anew by every call that wants several threads: it takes a fifth of a microsecond, and may change.
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) processors = CPU_COUNT(&allowed);
#endif
  return static_cast<int>(processors < 1 || wanted < processors ? wanted : processors);
}

void run_parallel(Worker worker, void* context, int num_threads) {
  Region region{worker, context, {}};
  if (num_threads <= 1) {
    worker(context, Team(0, 1, region.state));
    return;
  }
  if (openmp().found()) {
    openmp().parallel(openmp_region, &region, static_cast<unsigned>(num_threads), 0);
    return;
  }
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads; ++thread) {
    threads.emplace_back([&region, thread, num_threads] {
      region.worker(region.context, Team(thread, num_threads, region.state));
    });
  }
  worker(context, Team(0, num_threads, region.state));
  for (auto& thread : threads) thread.join();
}

const char* thread_pool_name() { return openmp().found() ? "openmp" : "std::thread"; }

void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(bytes, std::align_val_t(64)));
    capacity = bytes;
  }
  return poison_if_asked(memory.get(), bytes);
}

}  // namespace lipgan::cpu
