#include "memory.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lipgan::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

// Sizes are rounded up to an eighth of a power of two, so that nearly equal outputs share their memory.
size_t size_class(size_t bytes) {
  size_t step = 4096;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

struct Cache {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> free;  // last in, first out: the last is the likeliest to be in a CPU cache
  size_t bytes = 0;
};

// Never destroyed: tensors may be freed after the destructors of static objects have run.
Cache& cache() {
  static auto* instance = new Cache;
  return *instance;
}

// Asks for huge pages behind memory that is about to be written for the first time. Does nothing where the system has no
// such call.
void advise_huge_pages(void* address, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kSmallest = size_t{4} << 20;
  if (bytes < kSmallest) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failure changes nothing
#else
  (void)address;
  (void)bytes;
#endif
}

std::atomic<bool> poisoned{false};

void* poison_if_asked(void* memory, size_t bytes) {
  // All bits set is NaN in every floating-point type.
  if (poisoned.load(std::memory_order_relaxed)) std::memset(memory, 0xff, bytes);
  return memory;
}

}  // namespace

void poison(bool on) { poisoned.store(on); }

void* acquire(size_t bytes) {
  if (bytes < kWorthwhile) return poison_if_asked(::operator new(bytes, kAlignment), bytes);
  const size_t size = size_class(bytes);
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    const auto found = cache().free.find(size);
    if (found != cache().free.end() && !found->second.empty()) {
      void* memory = found->second.back();
      found->second.pop_back();
      cache().bytes -= size;
      return poison_if_asked(memory, bytes);
    }
  }
  void* memory = ::operator new(size, kAlignment);
  advise_huge_pages(memory, size);
  return poison_if_asked(memory, bytes);
}

void release(void* memory, size_t bytes) {
  const size_t size = size_class(bytes);
  if (bytes >= kWorthwhile) {
    std::lock_guard<std::mutex> lock(cache().mutex);
    if (cache().bytes + size <= kMaxKept) {
      cache().free[size].push_back(memory);
      cache().bytes += size;
      return;
    }
  }
  ::operator delete(memory, kAlignment);
}

size_t empty_cache() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  for (auto& [size, memories] : cache().free) {
    for (void* memory : memories) ::operator delete(memory, kAlignment);
  }
  cache().free.clear();
  const size_t bytes = cache().bytes;
  cache().bytes = 0;
  return bytes;
}

size_t cached_bytes() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().bytes;
}

}  // namespace lipgan::cpu
