#include "dispatch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../checked.h"

namespace pyfinetune {

namespace scalar { extern const KernelTable table; }
#if defined(__x86_64__)
namespace avx2 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx512_bf16 { extern const KernelTable table; }
#endif

namespace {

struct Candidate {
  const KernelTable* table;
  bool runnable;
};

constexpr int kCandidates = 4;

#if defined(__x86_64__)
bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// CPUID says what the chip has; XGETBV what the operating system saves and restores. Both must agree.
void probe(Candidate* candidates) {
  unsigned a = 0, b = 0, c = 0, d = 0, b7 = 0, c7 = 0, a71 = 0;
  unsigned long long saved = 0;
  bool fma = false, f16c = false;
  if (__get_cpuid(1, &a, &b, &c, &d)) {
    fma = bit(c, 12);
    f16c = bit(c, 29);
    if (bit(c, 27)) {  // OSXSAVE: XGETBV exists
      unsigned low, high;
      __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      saved = (static_cast<unsigned long long>(high) << 32) | low;
    }
  }
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  const bool avx2 = ymm && fma && f16c && bit(b7, 5);
  const bool avx512 = avx2 && zmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
  candidates[0] = {&avx512_bf16::table, avx512 && bit(c7, 1) && bit(a71, 5)};
  candidates[1] = {&avx512::table, avx512};
  candidates[2] = {&avx2::table, avx2};
  candidates[3] = {&scalar::table, true};
}
#else
void probe(Candidate* candidates) {
  for (int i = 0; i + 1 < kCandidates; ++i) candidates[i] = {nullptr, false};
  candidates[kCandidates - 1] = {&scalar::table, true};
}
#endif

const KernelTable& select() {
  Candidate candidates[kCandidates];
  probe(candidates);
  const char* forced = std::getenv("PYFINETUNE_CPU_ISA");
  if (forced && *forced) {
    for (const Candidate& candidate : candidates)
      if (candidate.runnable && std::strcmp(candidate.table->name, forced) == 0) return *candidate.table;
    std::string message = std::string("PYFINETUNE_CPU_ISA=") + forced + ": this machine can run";
    for (const Candidate& candidate : candidates)
      if (candidate.runnable) message += std::string(" ") + candidate.table->name;
    throw BackendUnavailable(message);
  }
  for (const Candidate& candidate : candidates)
    if (candidate.runnable) return *candidate.table;
  return scalar::table;
}

std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = select();
  return chosen;
}

const char* const* runnable_isas() {
  static const char* names[kCandidates + 1] = {};
  static const bool once = [] {
    Candidate candidates[kCandidates];
    probe(candidates);
    int count = 0;
    for (const Candidate& candidate : candidates)
      if (candidate.runnable) names[count++] = candidate.table->name;
    return true;
  }();
  (void)once;
  return names;
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes < int64_t(2 * kHugePage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHugePage - 1);
  // Advice only: a kernel without huge pages refuses it, and nothing depends on the answer.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace pyfinetune
