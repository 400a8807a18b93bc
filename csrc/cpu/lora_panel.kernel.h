// A product of two small operands in panels, which the thin products of a LoRA linear (lora_thin.kernel.h) are made of:
//
//      left: MB rows            right, packed in strips       MB x NV sums in registers; each step takes one element
//      ┌──────────────┐         of NV vectors                 of every left row (or a pair of them, where there is a
//      └──────────────┘         ┌──┬──┬──┐                    bfloat16 dot product) and NV vectors of the right
//                               │  │  │  │
//                               └──┴──┴──┘
#pragma once
#include "parallel.h"
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {
namespace thin {

// Panels hold an operand as the inner loop reads it: floats, or pairs of bfloat16 along the sum.
template <class T>
struct PanelOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct PanelOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Panel = typename PanelOf<T>::type;

template <class P>
constexpr int kStep = int(4 / sizeof(P));  // elements of the sum in one step

// Longest chain of steps: a longer one would gather rounding errors, sooner where nothing is rounded to 16 bits later.
template <class T>
constexpr int kSegmentOf = sizeof(T) == 4 ? 32 : 256;
constexpr int kMaxVectors = 4;

#if defined(__AVX512F__)
constexpr int kLeftRows[kMaxVectors + 1] = {0, 12, 8, 6, 4};  // with NV vectors each: what the registers hold
#else
constexpr int kLeftRows[kMaxVectors + 1] = {0, 8, 4, 4, 2};
#endif
constexpr int64_t kNearBytes = 24 << 10;  // of packed strips that are gone through for every block of rows

template <int N>
struct Constant {
  static constexpr int value = N;
};

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Vec left_unit(const float* p) { return vset(*p); }
inline Vec right_unit(const float* p) { return vload(p); }
inline Vec multiply_add(Vec left, Vec right, Vec sum) { return vfma(left, right, sum); }

template <class T>
inline void put(T* p, Vec x) {
  vstore(p, x);
}
template <class T>
inline void put_n(T* p, Vec x, int n) {
  vstore_n(p, x, n);
}

#if defined(__AVX512BF16__)
inline __m512bh left_unit(const bf16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}
inline __m512bh right_unit(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Vec multiply_add(__m512bh left, __m512bh right, Vec sum) { return _mm512_dpbf16_ps(sum, left, right); }

// Flushes subnormals, as the dot product in front of it does.
inline void put(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
inline void put_n(bf16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// kLanes bits or more of the mask, from bit `index` on; the mask is padded by four bytes.
inline uint32_t mask_bits(const uint8_t* mask, int64_t index) {
  uint32_t word;
  __builtin_memcpy(&word, mask + (index >> 3), 4);
  return word >> (index & 7);
}

template <class T>
inline Vec load_some(const T* p, int n) {
  return n == kLanes ? vload(p) : vload_n(p, n);
}
template <class T>
inline void put_some(T* p, Vec x, int n) {
  if (n == kLanes)
    put(p, x);
  else
    put_n(p, x, n);
}

// One step of up to n columns: rows lo and hi (null behind the last) interleaved. The mask's bits are those of lo and hi.
template <class T>
inline void pack_step(float* out, const T* lo, const T*, int n, uint32_t lo_bits, uint32_t) {
  vstore(out, vselect(load_some(lo, n), lo_bits));
}
#if defined(__AVX512BF16__)
inline __m512i words_of(const bf16* p, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
}
template <class T>
inline __m512i words_of(const T* p, __mmask16 lanes) {
  alignas(64) T row[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if (lanes >> i & 1) row[i] = p[i];
  return _mm512_cvtepu16_epi32(vround_bf16(vload(row)));
}
inline __m512i words_of(const float* p, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(vround_bf16(_mm512_maskz_loadu_ps(lanes, p)));
}
template <class T>
inline void pack_step(bf16* out, const T* lo, const T* hi, int n, uint32_t lo_bits, uint32_t hi_bits) {
  const __mmask16 lanes = first_lanes(n);
  __m512i pair = words_of(lo, lanes & __mmask16(lo_bits));
  if (hi) pair = _mm512_or_si512(pair, _mm512_slli_epi32(words_of(hi, lanes & __mmask16(hi_bits)), 16));
  _mm512_storeu_si512(out, pair);
}
#endif

// Columns [c_begin, c_end) of steps [begin, end), where the columns are contiguous along the sum: each is converted a
// chunk at a time and spread over the steps.
template <class P, class S>
inline void pack_columns(const S* source, int64_t n_stride, int64_t k, int64_t n, int64_t width, int64_t steps,
                         int64_t begin, int64_t end, int64_t c_begin, int64_t c_end, P* packed) {
  constexpr int kChunk = 64;
  const int64_t row = width * kStep<P>;
  alignas(64) P column[kChunk];
  for (int64_t j = begin; j < end; j += kChunk / kStep<P>) {
    const int64_t first = j * kStep<P>, count = min64(kChunk, min64(end * kStep<P>, k) - first);
    const int units = int((count + kStep<P> - 1) / kStep<P>);
    for (int64_t c = c_begin; c < c_end; ++c) {
      P* out = packed + c / width * (steps * row) + j * row + c % width * kStep<P>;
      for (int i = 0; i < count; i += kLanes)
        vstore(column + i,
               c < n ? load_some(source + c * n_stride + first + i, int(min64(kLanes, count - i))) : vzero());
      for (int i = 0; i < units; ++i) __builtin_memcpy(out + i * row, column + i * kStep<P>, 4);
    }
  }
}

// The same where rows are contiguous.
template <class P, class S>
inline void pack_steps(const S* source, int64_t k_stride, int64_t k, int64_t n, int64_t width, int64_t steps,
                       int64_t begin, int64_t end, P* packed) {
  const int64_t strips = (n + width - 1) / width, row = width * kStep<P>;
  for (int64_t j = begin; j < end; ++j) {
    const S* lo = source + j * kStep<P> * k_stride;
    const S* hi = (j + 1) * kStep<P> <= k ? lo + k_stride : nullptr;
    for (int64_t strip = 0; strip < strips; ++strip) {
      P* out = packed + strip * (steps * row) + j * row;
      for (int64_t c = strip * width; c < (strip + 1) * width; c += kLanes, out += kLanes * kStep<P>) {
        if (c < n) {
          pack_step(out, lo + c, hi ? hi + c : nullptr, int(min64(kLanes, n - c)), ~0u, ~0u);
        } else {
          for (int i = 0; i < kLanes * kStep<P>; ++i) out[i] = P{};
        }
      }
    }
  }
}

// One step of kLanes columns, nothing masked; the rows of a pair are `stride` apart.
template <class T>
inline void pack_full(float* out, const T* lo, int64_t) {
  vstore(out, vload(lo));
}
#if defined(__AVX512BF16__)
inline void pack_full(bf16* out, const bf16* lo, int64_t stride) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)lo));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(lo + stride)));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// Packs a small matrix [k, n] as the right operand: strips of `width` columns (a multiple of kLanes), zeros behind the
// last column and the last step.
template <class P, class S>
void pack_matrix(const S* source, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, int64_t width, P* packed,
                 int threads) {
  constexpr int64_t kGrain = 32;  // steps: one chunk of pack_columns, or two
  const int64_t steps = (k + kStep<P> - 1) / kStep<P>, strips = (n + width - 1) / width;
  if (n_stride == 1 || n == 1) {
    parallel_for(steps, kGrain, threads, [&](int64_t begin, int64_t end) {
      pack_steps(source, k_stride, k, n, width, steps, begin, end, packed);
    });
  } else if (strips > threads) {
    parallel_for(strips, 1, threads, [&](int64_t begin, int64_t end) {
      pack_columns(source, n_stride, k, n, width, steps, 0, steps, begin * width, end * width, packed);
    });
  } else {
    parallel_for(steps, 2 * kGrain, threads, [&](int64_t begin, int64_t end) {
      pack_columns(source, n_stride, k, n, width, steps, begin, end, 0, strips * width, packed);
    });
  }
}

template <class P>
void pack_operand(const ThinOperand& m, int64_t k, int64_t n, int64_t width, P* packed, int threads) {
  if (m.dtype == DType::f32)
    pack_matrix(static_cast<const float*>(m.data), m.k_stride, m.n_stride, k, n, width, packed, threads);
  if (m.dtype == DType::f16)
    pack_matrix(static_cast<const fp16*>(m.data), m.k_stride, m.n_stride, k, n, width, packed, threads);
  if (m.dtype == DType::bf16)
    pack_matrix(static_cast<const bf16*>(m.data), m.k_stride, m.n_stride, k, n, width, packed, threads);
}

// MB left rows times `steps` steps of one packed strip; take(m, v, sum) is called with each of the MB x NV sums.
template <int MB, int NV, class P, class Take>
inline void multiply(const P* left, int64_t row_stride, int64_t step_stride, const P* right, int64_t steps,
                     const Take& take) {
  Vec sum[MB][NV];
  for (int m = 0; m < MB; ++m)
    for (int v = 0; v < NV; ++v) sum[m][v] = vzero();
  for (int64_t j = 0; j < steps; ++j) {
    decltype(right_unit(right)) r[NV];
    for (int v = 0; v < NV; ++v) r[v] = right_unit(right + v * kLanes * kStep<P>);
    for (int m = 0; m < MB; ++m) {
      const auto l = left_unit(left + m * row_stride);
      for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add(l, r[v], sum[m][v]);
    }
    left += step_stride;
    right += NV * kLanes * kStep<P>;
  }
// Unrolled, so that the sums are taken from their registers.
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) take(m, v, sum[m][v]);
}

// sums[MB][NV * kLanes] += the product. One copy of each: it is called for hundreds of multiplications.
template <int MB, int NV, class P>
__attribute__((noinline)) void tile(const P* left, int64_t row_stride, int64_t step_stride, const P* right,
                                    int64_t steps, float* sums) {
  multiply<MB, NV>(left, row_stride, step_stride, right, steps, [&](int m, int v, Vec sum) {
    float* out = sums + (m * NV + v) * kLanes;
    vstore(out, vadd(vload(out), sum));
  });
}

// A row of the left operand as the tile reads it, zeros up to a multiple of kLanes.
template <class T>
inline void copy_row(float* out, const T* x, int count, const uint8_t* mask, int64_t bit) {
  for (int i = 0; i < count; i += kLanes) {
    const Vec v = load_some(x + i, int(min64(kLanes, count - i)));
    vstore(out + i, mask ? vselect(v, mask_bits(mask, bit + i)) : v);
  }
}
#if defined(__AVX512BF16__)
inline void copy_row(bf16* out, const bf16* x, int count, const uint8_t* mask, int64_t bit) {
  int i = 0;
  for (; !mask && i + 32 <= count; i += 32) _mm512_storeu_si512(out + i, _mm512_loadu_si512(x + i));
  for (; i < count; i += kLanes) {
    __mmask16 lanes = first_lanes(int(min64(kLanes, count - i)));
    if (mask) lanes &= __mmask16(mask_bits(mask, bit + i));
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_maskz_loadu_epi16(lanes, x + i));
  }
}
#endif

struct LeftRows {
  const void* data;
  int64_t stride, k;
  const uint8_t* mask;  // of the [m, k] elements in order, or null
};

// Rows [begin, end) times every strip of a packed right operand. done.block(row, rows, column, sums) takes each finished
// block of `rows` x NV * kLanes sums; where done.direct(end of the columns) says so and the sum is one chain, they go from
// their registers to done.taker(row, column)(m, v, sum) instead.
template <class T, int NV, class Done>
void multiply_rows(const LeftRows& left, const Panel<T>* packed, int64_t strips, int64_t begin, int64_t end,
                   const Done& done) {
  using P = Panel<T>;
  constexpr int MB = kLeftRows[NV], kSegment = kSegmentOf<T>;
  constexpr int64_t kWidth = NV * kLanes;
  alignas(64) P panel[MB * kSegment];
  alignas(64) float sums[MB * kWidth];
  const T* x = static_cast<const T*>(left.data);
  const int64_t steps = (left.k + kStep<P> - 1) / kStep<P>, strip_size = steps * kWidth * kStep<P>;
  const int64_t group = max64(1, kNearBytes / max64(1, strip_size * int64_t(sizeof(P))));
  const auto copy = [&](int64_t row, int rows, int64_t k, int count) {
    for (int m = 0; m < rows; ++m)
      copy_row(panel + m * kSegment, x + (row + m) * left.stride + k, count, left.mask, (row + m) * left.k + k);
  };
  for (int64_t first = 0; first < strips; first += group) {
    for (int64_t row = begin; row < end; row += MB) {
      const int rows = int(min64(MB, end - row));
      if (left.k <= kSegment) copy(row, rows, 0, int(left.k));
      for (int64_t strip = first; strip < min64(strips, first + group); ++strip) {
        const P* right = packed + strip * strip_size;
        const int64_t column = strip * kWidth;
        if constexpr (Done::kDirect) {
          if (rows == MB && left.k <= kSegment && done.direct(column + kWidth)) {
            multiply<MB, NV>(panel, kSegment, kStep<P>, right, steps, done.taker(row, column));
            continue;
          }
        }
        for (int i = 0; i < MB * NV; ++i) vstore(sums + i * kLanes, vzero());
        for (int64_t k = 0; k < left.k; k += kSegment, right += kSegment * kWidth) {
          const int count = int(min64(kSegment, left.k - k));
          if (left.k > kSegment) copy(row, rows, k, count);
          const int64_t segment = (count + kStep<P> - 1) / kStep<P>;
          int m = 0;
          if (rows == MB) {
            tile<MB, NV>(panel, kSegment, kStep<P>, right, segment, sums);
            m = MB;
          }
          for (; m + 4 <= rows; m += 4)
            tile<4, NV>(panel + m * kSegment, kSegment, kStep<P>, right, segment, sums + m * kWidth);
          for (; m < rows; ++m)
            tile<1, NV>(panel + m * kSegment, kSegment, kStep<P>, right, segment, sums + m * kWidth);
        }
        done.block(row, rows, column, sums);
      }
    }
  }
}

// How many vectors wide the strips are that cover n columns evenly.
inline int strip_vectors(int64_t n) {
  const int64_t vectors = (n + kLanes - 1) / kLanes, strips = (vectors + kMaxVectors - 1) / kMaxVectors;
  return int((vectors + strips - 1) / strips);
}

// Calls f with NV as a constant.
template <class F>
inline void with_vectors(int vectors, const F& f) {
  switch (vectors) {
    case 1: f(Constant<1>()); break;
    case 2: f(Constant<2>()); break;
    case 3: f(Constant<3>()); break;
    default: f(Constant<4>()); break;
  }
}

}  // namespace thin
}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
