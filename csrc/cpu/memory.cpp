#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lipgan::cpu {
namespace {

// Of a huge page, where one fits into the memory: it has to lie in one piece.
constexpr size_t kHugePage = size_t{2} << 20;

std::align_val_t alignment_of(size_t size) { return std::align_val_t{size < kHugePage ? 64 : kHugePage}; }

void* take(size_t size) { return ::operator new(size, alignment_of(size)); }
void give(void* memory, size_t size) { ::operator delete(memory, alignment_of(size)); }

// Sizes are rounded up to an eighth of a power of two, so that nearly equal outputs share their memory.
size_t size_class(size_t bytes) {
  size_t step = 4096;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// The memory of one size that is not in use.
struct Kept {
  std::vector<void*> free;  // last in, first out: the last is the likeliest to be in a CPU cache
  size_t unneeded = 0;      // how many lay here all the time since the last sweep
};

struct Cache {
  std::mutex mutex;
  std::map<size_t, Kept> kept;
  size_t bytes = 0;
  size_t until_sweep = kSweep;

  // Frees what nobody needed since the last sweep: sizes that are not asked for any more, and what is too much of others.
  void sweep() {
    until_sweep = kSweep;
    for (auto next = kept.begin(); next != kept.end();) {
      auto& [size, own] = *next;
      const auto end = own.free.begin() + static_cast<std::ptrdiff_t>(own.unneeded);
      for (auto memory = own.free.begin(); memory != end; ++memory) give(*memory, size);
      bytes -= size * own.unneeded;
      own.free.erase(own.free.begin(), end);
      own.unneeded = own.free.size();
      next = own.free.empty() ? kept.erase(next) : std::next(next);
    }
  }
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
  if (bytes >= kHugePage) madvise(address, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: it may fail
#else
  (void)address;
  (void)bytes;
#endif
}

std::atomic<bool> poisoned{false};

}  // namespace

void poison(bool on) { poisoned.store(on); }

void* poison_if_asked(void* memory, size_t bytes) {
  // All bits set is NaN in every floating-point type.
  if (bytes > 0 && poisoned.load(std::memory_order_relaxed)) std::memset(memory, 0xff, bytes);
  return memory;
}

void* acquire(size_t bytes) {
  if (bytes < kWorthwhile) return poison_if_asked(take(bytes), bytes);
  const size_t size = size_class(bytes);
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    if (--cache().until_sweep == 0) cache().sweep();
    const auto found = cache().kept.find(size);
    if (found != cache().kept.end() && !found->second.free.empty()) {
      Kept& own = found->second;
      void* memory = own.free.back();
      own.free.pop_back();
      own.unneeded = std::min(own.unneeded, own.free.size());
      cache().bytes -= size;
      return poison_if_asked(memory, bytes);
    }
  }
  void* memory = take(size);
  advise_huge_pages(memory, size);
  return poison_if_asked(memory, bytes);
}

void release(void* memory, size_t bytes) {
  const size_t size = bytes < kWorthwhile ? bytes : size_class(bytes);
  if (bytes >= kWorthwhile) {
    std::lock_guard<std::mutex> lock(cache().mutex);
    if (cache().bytes + size <= kMaxKept) {
      cache().kept[size].free.push_back(memory);
      cache().bytes += size;
      return;
    }
  }
  give(memory, size);
}

size_t empty_cache() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  for (auto& [size, own] : cache().kept) {
    for (void* memory : own.free) give(memory, size);
  }
  cache().kept.clear();
  const size_t bytes = cache().bytes;
  cache().bytes = 0;
  return bytes;
}

size_t cached_bytes() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().bytes;
}

}  // namespace lipgan::cpu
