// Parallel regions, and the scratch memory that the kernels of one call share.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lipgan::cpu {

// One thread's view of the threads that run a region together.
class Team {
 public:
  struct State {
    std::atomic<int> arrived{0};
    std::atomic<unsigned> generation{0};
    std::atomic<int64_t> waited{0};  // nanoseconds of processor time that threads have spent in long waits
  };

  Team(int own, int count, State& state) : thread(own), num_threads(count), state_(state) {}

  // Returns when every thread of the team has called it. It spins, because the phases of a kernel are microseconds
  // long, and yields after a while, because the machine may have fewer free cores than threads.
  void barrier() const;

  const int thread, num_threads;

 private:
  State& state_;
};

using Worker = void (*)(void* context, const Team& team);

// Runs worker on at most num_threads threads. The threads are those of the OpenMP runtime that PyTorch has loaded,
// where it can be found: a second pool would compete with PyTorch's for the cores. Elsewhere threads are started for
// the call.
void run_parallel(Worker worker, void* context, int num_threads);

// `wanted`, but at most the processors that the process may use (its affinity): more threads than those would wait in
// turn at every barrier. The number that PyTorch is set to may be that of another machine. At least 1. And 1 for a while
// where threads did not pay.
//
// A region waits for its last thread, which beside another busy process may not be scheduled for milliseconds. So each
// region is measured: it has paid if it took less time than its threads have worked in it together, which is about what
// one thread would have taken. If it took longer, by the time t, the calling thread works alone during the next
// kPatience t, and then tries again: trying costs at most 1 / kPatience of the time, and after other processes have gone
// the threads are soon back.
int usable_threads(int64_t wanted);
constexpr int64_t kPatience = 32;

// From now on threads are used whether they pay or not: a test of them would otherwise, on a busy machine, be none.
void insist_on_threads(bool on);

// "openmp" (PyTorch's threads) or "std::thread".
const char* thread_pool_name();

// At least `bytes` bytes, aligned to a cache line, kept by the calling thread for its next call.
void* scratch(size_t bytes);

}  // namespace lipgan::cpu
