#include "threads.h"

#include "memory.h"

#include <algorithm>
#include <chrono>
#include <ctime>
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

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Nanoseconds that the calling thread has been on a processor; 0 where that is not known.
int64_t processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
#endif
  return 0;
}

// Until when the calling thread works alone.
thread_local int64_t alone_until = 0;
std::atomic<bool> insisting{false};

struct Region {
  Worker worker;
  void* context;
  Team::State state;
  std::atomic<int64_t> worked{0};  // nanoseconds of processor time, of all threads

  void run(int thread, int num_threads) {
    const int64_t begin = processor_time();
    worker(context, Team(thread, num_threads, state));
    worked.fetch_add(processor_time() - begin, std::memory_order_relaxed);
  }
};

void openmp_region(void* argument) {
  // Only inside the region is it known how many threads the runtime has granted.
  static_cast<Region*>(argument)->run(openmp().thread(), openmp().num_threads());
}

void run_on_threads(Region& region, int num_threads) {
  if (openmp().found()) {
    openmp().parallel(openmp_region, &region, static_cast<unsigned>(num_threads), 0);
    return;
  }
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads; ++thread) {
    threads.emplace_back([&region, thread, num_threads] { region.run(thread, num_threads); });
  }
  region.run(0, num_threads);
  for (auto& thread : threads) thread.join();
}

constexpr int kLongWait = 256;  // spins, a few microseconds: more than it takes to ask for the time

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
  int64_t begin = 0;
  for (int spins = 0; state_.generation.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins == kLongWait) begin = processor_time();
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (begin != 0) state_.waited.fetch_add(processor_time() - begin, std::memory_order_relaxed);
}

int usable_threads(int64_t wanted) {
  if (wanted <= 1) return 1;
  if (alone_until != 0 && !insisting.load(std::memory_order_relaxed)) {
    if (now() < alone_until) return 1;
    alone_until = 0;
  }
#if defined(__linux__)
  // Asked anew by every call that wants several threads: it takes half a microsecond, and may change. What the standard
  // library knows of it is not asked, which opens a file and took half as long as a small kernel.
  cpu_set_t allowed;
  const bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
  const int64_t processors = known ? CPU_COUNT(&allowed) : static_cast<int>(std::thread::hardware_concurrency());
#else
  static const int64_t processors = static_cast<int>(std::thread::hardware_concurrency());
#endif
  return static_cast<int>(processors < 1 || wanted < processors ? wanted : processors);
}

void insist_on_threads(bool on) { insisting.store(on); }

void run_parallel(Worker worker, void* context, int num_threads) {
  Region region{worker, context, {}, {}};
  if (num_threads <= 1) {
    worker(context, Team(0, 1, region.state));
    return;
  }
  const int64_t begin = now();
  run_on_threads(region, num_threads);
  const int64_t end = now(), worked = region.worked.load() - region.state.waited.load();
  // Beyond a second the machine was asleep rather than busy.
  const int64_t lost = std::min<int64_t>(end - begin - worked, 1000000000);
  if (lost > 0 && region.worked.load() > 0) alone_until = end + kPatience * lost;
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
