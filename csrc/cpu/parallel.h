// parallel_for: split [0, n) into one contiguous range a thread, on the OpenMP runtime that torch already runs.
#pragma once
#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

// Calls f(begin, end) on disjoint ranges that cover [0, n), each a multiple of `grain` long but for the last. With one
// thread it runs inline and touches no runtime, which is what makes it safe in a forked child.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  const int64_t grains = (n + grain - 1) / grain;
  if (grains < threads) threads = int(grains);
  if (threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads();
    const int64_t rank = omp_get_thread_num();
    const int64_t begin = grains * rank / team * grain;
    const int64_t end = grains * (rank + 1) / team * grain;
    if (begin < n) f(begin, end < n ? end : n);
  }
#else
  f(int64_t(0), n);
#endif
}

// Calls f(rank, begin, end) on ranges of at most `grain` that cover [0, n), handed out in order to whichever thread is
// free: for units of unequal work. rank < threads names the thread, for scratch memory. What a unit computes must not
// depend on who computes it.
template <class F>
void parallel_dynamic(int64_t n, int64_t grain, int threads, const F& f) {
  const int64_t grains = (n + grain - 1) / grain;
  if (grains < threads) threads = int(grains);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for schedule(monotonic : dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < grains; ++i) f(omp_get_thread_num(), i * grain, (i + 1) * grain < n ? (i + 1) * grain : n);
    return;
  }
#endif
  for (int64_t i = 0; i < grains; ++i) f(0, i * grain, (i + 1) * grain < n ? (i + 1) * grain : n);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
