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
// turn at every barrier. The number that PyTorch is set to may be that of another machine. At least 1.
int usable_threads(int64_t wanted);

// "openmp" (PyTorch's threads) or "std::thread".
const char* thread_pool_name();

// At least `bytes` bytes, aligned to a cache line, kept by the calling thread for its next call.
void* scratch(size_t bytes);

}  // namespace lipgan::cpu
