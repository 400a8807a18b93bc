// The matrix products of attention. All seven of them have one shape: rows of C are sums of broadcast words of A times
// rows of lanes of B, with C in registers.
//
//              b   one vector of words a step, NV side by side
//              ┌──┬──┬──┬──┐ step 0
//              ├──┼──┼──┼──┤ step 1              word: a float, or a pair of bf16 that one instruction multiplies
//              └──┴──┴──┴──┘                     with another pair and adds to a float (two steps of a sum in one)
//   a ┌─────┐  ┌──┬──┬──┬──┐
//     │words│  │ kTileRows │                     S = Q K^T      dP = dO V^T     O += P V     dQ += dS K
//     └─────┘  └──┴──┴──┴──┘                     dV += P^T dO   dK += dS^T Q
//
// The operands are packed, zero-padded, into three forms: `rows` (a: words along a row), `columns` (b: transposed) and
// `pairs` (b, or a transposed: words of two rows on top of each other; with floats, just rows).
#pragma once
#include "vec_math.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr int kTileRows = 4;                       // with kTileVecs: as many sums as hide an addition's latency,
constexpr int kTileVecs = kLanes == 8 ? 3 : 4;     // and as the registers hold
constexpr int kColStep = kLanes > 4 ? kLanes : 4;  // ranges of columns are whole vectors and whole tiles of rows

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Words are floats.
struct FloatWords {
  static constexpr int kPair = 1;
  static constexpr int64_t kChain = 64;  // words of a dot product that are added up in one go: more would lose digits
  static Vec dot(Vec a, Vec b, Vec sum) { return vfma(a, b, sum); }

  // Lanes [i, i + n) of a row of words.
  template <class T>
  static Vec row_words(const T* row, int64_t i, int n) {
    return n >= kLanes ? vload(row + i) : vload_n(row + i, n);
  }
  template <class T>
  static Vec pair_words(const T* first, const T*, int64_t i, int n) {
    return row_words(first, i, n);
  }

  // Columns [col, col + kLanes) of a row in the form `rows`.
  static void store_row(float* row, int64_t col, Vec x) { vstore(row + col, x); }
  // The same columns of rows 2 i and 2 i + 1 in the form `pairs`, lines of `lanes`.
  static void store_pair(float* out, int64_t i, int64_t lanes, int64_t col, Vec x, Vec y) {
    vstore(out + 2 * i * lanes + col, x);
    vstore(out + (2 * i + 1) * lanes + col, y);
  }
};

#if defined(__AVX512BF16__)
// Words are pairs of bf16.
struct PairWords {
  static constexpr int kPair = 2;
  static constexpr int64_t kChain = 256;  // what is lost is far below a bf16's own rounding
  static Vec dot(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static Vec row_words(const bf16* row, int64_t i, int n) {
    return _mm512_maskz_loadu_ps(n >= kLanes ? __mmask16(0xffff) : first_lanes(n), row + 2 * i);
  }
  static Vec pair_words(const bf16* first, const bf16* second, int64_t i, int n) {
    const __mmask16 mask = n >= kLanes ? __mmask16(0xffff) : first_lanes(n);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + i));
    const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + i)) : low;
    return _mm512_castsi512_ps(second ? _mm512_or_si512(low, _mm512_slli_epi32(high, 16)) : low);
  }
  static void store_row(float* row, int64_t col, Vec x) {
    _mm256_storeu_si256((__m256i*)(row + col / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void store_pair(float* out, int64_t i, int64_t lanes, int64_t col, Vec x, Vec y) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    _mm512_storeu_si512(out + i * lanes + col, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
  }
};
#endif

// out[row, word] of `rows` rows of d elements; rows up to padded_rows are zero.
template <class Words, class T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t padded_rows, int64_t d, float* out) {
  const int64_t words = d / Words::kPair;
  for (int64_t r = 0; r < padded_rows; ++r, out += words)
    for (int64_t i = 0; i < words; i += kLanes) {
      const int n = int(min64(kLanes, words - i));
      const Vec v = r < rows ? Words::row_words(x + r * stride, i, n) : vzero();
      n == kLanes ? vstore(out + i, v) : vstore_n(out + i, v, n);
    }
}

// out[word, row]: lines of `lanes` (a multiple of kLanes) rows, zero behind the last.
template <class Words, class T>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t lanes, int64_t d, float* out) {
  const int64_t words = d / Words::kPair;
  for (int64_t r = 0; r < lanes; r += kLanes)
    for (int64_t i = 0; i < words; i += kLanes) {
      const int n = int(min64(kLanes, words - i));
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = r + j < rows ? Words::row_words(x + (r + j) * stride, i, n) : vzero();
      vtranspose(block);
      for (int j = 0; j < n; ++j) vstore(out + (i + j) * lanes + r, block[j]);
    }
}

// out[row / kPair, column]: lines of `lanes` (a multiple of kLanes) columns, zero behind column d and behind the rows.
template <class Words, class T>
void pack_pairs(const T* x, int64_t stride, int64_t rows, int64_t padded_rows, int64_t d, int64_t lanes, float* out) {
  for (int64_t r = 0; r < padded_rows; r += Words::kPair, out += lanes) {
    const T* first = x + r * stride;
    const T* second = r + 1 < rows ? first + stride : nullptr;
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const int n = int(min64(kLanes, d - i));
      vstore(out + i, r < rows && n > 0 ? Words::pair_words(first, second, i, n) : vzero());
    }
  }
}

// Word (row, step) stands at p[row * row_stride + step * step_stride].
struct LeftOperand {
  const float* p;
  int64_t row_stride, step_stride;
};

// What a tile of rows is made of: whole vectors [col_begin, col_end) of C, steps [begin, end) of the sum.
struct TileRange {
  int64_t col_begin, col_end, begin, end;
};

// Inlined, so that the strides that are constants where it is called are constants here.
template <class Words, int NV>
__attribute__((always_inline)) inline void tile_sums(LeftOperand a, const float* b, int64_t b_stride, int64_t steps,
                                                     Vec (&sum)[kTileRows][NV]) {
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < NV; ++n) sum[r][n] = vzero();
  for (int64_t k = 0; k < steps; ++k) {
    Vec line[NV];
    for (int n = 0; n < NV; ++n) line[n] = vload(b + n * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec word = vset(a.p[r * a.row_stride]);
      for (int n = 0; n < NV; ++n) sum[r][n] = Words::dot(word, line[n], sum[r][n]);
    }
    a.p += a.step_stride;
    b += b_stride;
  }
}

// c = sum, or c + sum.
struct SumTile {
  float* c;
  int64_t stride;
  bool add;
  template <int NV>
  void operator()(int64_t row, int64_t col, const Vec (&sum)[kTileRows][NV]) const {
    float* p = c + row * stride + col;
    if (add)
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < NV; ++n)
          vstore(p + r * stride + n * kLanes, vadd(vload(p + r * stride + n * kLanes), sum[r][n]));
    else
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < NV; ++n) vstore(p + r * stride + n * kLanes, sum[r][n]);
  }
};

// c = sum, or c * scale[row] + sum.
struct ScaledSumTile {
  float* c;
  int64_t stride;
  bool add;
  const float* scale;
  template <int NV>
  void operator()(int64_t row, int64_t col, const Vec (&sum)[kTileRows][NV]) const {
    for (int r = 0; r < kTileRows; ++r) {
      const Vec factor = vset(scale[row + r]);
      for (int n = 0; n < NV; ++n) {
        float* p = c + (row + r) * stride + col + n * kLanes;
        vstore(p, add ? vfma(vload(p), factor, sum[r][n]) : sum[r][n]);
      }
    }
  }
};

template <class Words, int NV, class Done>
__attribute__((always_inline)) inline void one_tile(LeftOperand a, const float* b, int64_t b_stride, int64_t row,
                                                    int64_t col, TileRange range, const Done& done) {
  Vec sum[kTileRows][NV];
  a.p += row * a.row_stride + range.begin * a.step_stride;
  tile_sums<Words, NV>(a, b + range.begin * b_stride + col, b_stride, range.end - range.begin, sum);
  done(row, col, sum);
}

// Hands done(row, col, sums) every tile of C = A B; b has `lanes` columns. range_of(row) says what to compute of the
// kTileRows rows from `row` on; a sum of no steps is zero. Rows are the inner loop: they share a panel of b that stays in the 1st-level cache.
template <class Words, class RangeOf, class Done>
__attribute__((always_inline)) inline void product(LeftOperand a, const float* b, int64_t lanes, int64_t rows,
                                                   const RangeOf& range_of, const Done& done) {
  const int64_t vecs = lanes / kLanes, panels = (vecs + kTileVecs - 1) / kTileVecs;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = vecs * panel / panels * kLanes, last = vecs * (panel + 1) / panels * kLanes;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const TileRange range = range_of(row);
      const int64_t col = max64(first, range.col_begin), width = min64(last, range.col_end) - col;
      if (width <= 0) continue;
      switch (width / kLanes) {
        case 1: one_tile<Words, 1>(a, b, lanes, row, col, range, done); break;
        case 2: one_tile<Words, 2>(a, b, lanes, row, col, range, done); break;
        case 3: one_tile<Words, 3>(a, b, lanes, row, col, range, done); break;
        default: one_tile<Words, kTileVecs>(a, b, lanes, row, col, range, done); break;
      }
    }
  }
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
