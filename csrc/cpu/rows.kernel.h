// What kernels share that work row by row: a cursor over rows of any strides, and loops over the columns of a row.
#pragma once
#include "../tensor_view.h"
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

// Walks the rows of a view [..., columns] in row-major order. Divisions are paid once, at the first row.
struct RowCursor {
  const TensorView& view;
  int64_t offset = 0;  // of the current row, in elements
  int64_t index[kMaxDims] = {};

  RowCursor(const TensorView& v, int64_t row) : view(v) {
    for (int d = v.ndim - 2; d >= 0 && row > 0; --d) {
      index[d] = row % v.shape[d];
      row /= v.shape[d];
      offset += index[d] * v.strides[d];
    }
  }

  template <class T>
  const T* row() const {
    return static_cast<const T*>(view.data) + offset;
  }

  void next() {
    for (int d = view.ndim - 2; d >= 0; --d) {
      offset += view.strides[d];
      if (++index[d] < view.shape[d]) return;
      offset -= view.shape[d] * view.strides[d];
      index[d] = 0;
    }
  }
};

// The first n lanes, where n = kLanes is the usual case and known when compiling.
template <class T>
inline Vec vload_some(const T* p, int n) {
  return n == kLanes ? vload(p) : vload_n(p, n);
}
template <class T>
inline void vstore_some(T* p, Vec x, int n) {
  if (n == kLanes)
    vstore(p, x);
  else
    vstore_n(p, x, n);
}

// Calls f(i, n) for the n <= kLanes columns from i on, over all columns.
template <class F>
inline void each_vector(int64_t cols, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) f(i, kLanes);
  if (i < cols) f(i, int(cols - i));
}

// The sum over a row: f(i, n, sum) adds the terms of the n columns from i on to `sum`. Four chains hide the latency of
// an addition, and they are short: with one lane a single sum would gather rounding errors.
template <class F>
inline float row_sum(int64_t cols, const F& f) {
  constexpr int64_t kStep = 4 * kLanes, kSegment = 32 * kStep;
  const int64_t whole = cols - cols % kStep;
  Vec total = vzero();
  int64_t i = 0;
  while (i < whole) {
    const int64_t end = min64(whole, i + kSegment);
    Vec a = vzero(), b = vzero(), c = vzero(), d = vzero();
    for (; i < end; i += kStep) {
      a = f(i, kLanes, a);
      b = f(i + kLanes, kLanes, b);
      c = f(i + 2 * kLanes, kLanes, c);
      d = f(i + 3 * kLanes, kLanes, d);
    }
    total = vadd(total, vadd(vadd(a, b), vadd(c, d)));
  }
  for (; i + kLanes <= cols; i += kLanes) total = f(i, kLanes, total);
  if (i < cols) total = f(i, int(cols - i), total);
  return vsum(total);
}

// Large results go past the caches: the next reader would not find them there anyway, and memory is spared reading
// what is about to be overwritten. Whoever says so calls vfence() in the end.
template <class T>
inline bool streams(int64_t elements) {
  return elements * int64_t(sizeof(T)) >= kStreamBytes;
}

template <class T>
inline bool can_stream(const T* p) {
  return uintptr_t(p) % (2 * kLanes * sizeof(T)) == 0;
}

// out[i] = f(i, n) for the n columns from i on, over a row.
template <class T, class F>
inline void store_row(T* out, int64_t cols, bool stream, const F& f) {
  int64_t i = 0;
  if (stream && can_stream(out)) {
    for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
      const Vec a = f(i, kLanes), b = f(i + kLanes, kLanes);
      vstream(out + i, a, b);
    }
  }
  for (; i + kLanes <= cols; i += kLanes) vstore(out + i, f(i, kLanes));
  if (i < cols) vstore_n(out + i, f(i, int(cols - i)), int(cols - i));
}

// The same for two rows at once: f(i, n, &first) gives the second's.
template <class T, class F>
inline void store_two_rows(T* one, T* two, int64_t cols, bool stream, const F& f) {
  int64_t i = 0;
  Vec a, b;
  if (stream && can_stream(one) && can_stream(two)) {
    for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
      const Vec c = f(i, kLanes, &a), d = f(i + kLanes, kLanes, &b);
      vstream(one + i, a, b);
      vstream(two + i, c, d);
    }
  }
  for (; i < cols; i += kLanes) {
    const int n = int(min64(kLanes, cols - i));
    const Vec c = n == kLanes ? f(i, kLanes, &a) : f(i, n, &a);
    vstore_some(one + i, a, n);
    vstore_some(two + i, c, n);
  }
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
