// 4-bit decode and encode (format: csrc/nf4_format.h).
//
// Decode: a block has only 16 possible values, so the 16-entry table is made once a block in the *output* type (one
// multiply, one rounding, hence bit-exact) and the codes then only permute table entries:
//
//     bytes  b0 b1 b2 ...          one byte = elements 2i (high nibble), 2i+1 (low nibble)
//     index  b0>>4 b0&15 b1>>4 ... widened in element order, so the permute writes the output directly
//
// which leaves the copy rate of memory as the limit. Encode: the reciprocal of the block's largest magnitude, then a
// 4-step search over the 15 midpoints.
#pragma once
#include "../nf4_format.h"
#include "parallel.h"
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

#if defined(__AVX512F__)

// 16-bit types: the 16 entries twice, so that bit 4 of an index does not matter. float: the entries once.
template <class T>
struct DecodeTable {
  __m512i wide;
  T entry(int code) const {
    T entries[64 / sizeof(T)];
    _mm512_storeu_si512(entries, wide);
    return entries[code];
  }
};

#if defined(__AVX512BF16__)
// The conversion instruction flushes subnormals. A table whose entries stay clear of them, and of NaN, may use it.
inline bool plain_scale(float scale) { return scale >= 0x1p-90f && scale <= 0x1p120f; }
inline __m256i round_table(Vec scaled, bool plain, bf16) {
  return plain ? (__m256i)_mm512_cvtneps_pbh(scaled) : vround_bf16(scaled);
}
#else
inline bool plain_scale(float) { return false; }
inline __m256i round_table(Vec scaled, bool, bf16) { return vround_bf16(scaled); }
#endif
inline __m256i round_table(Vec scaled, bool, fp16) { return vround_fp16(scaled); }

// Whether no code value is so small that a plain scale could make a subnormal of it.
inline bool plain_map(const float* quant_map) {
  const Vec magnitude = _mm512_abs_ps(vload(quant_map));
  const __mmask16 small = _mm512_cmp_ps_mask(magnitude, vset(0x1p-30f), _CMP_NGE_UQ);
  return _mm512_mask_cmp_ps_mask(small, magnitude, vzero(), _CMP_NEQ_UQ) == 0;
}

template <class T>
inline DecodeTable<T> make_table(const float* quant_map, float scale, bool plain) {
  const __m256i half = round_table(vmul(vload(quant_map), vset(scale)), plain && plain_scale(scale), T{});
  return {_mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1)};
}
template <>
inline DecodeTable<float> make_table<float>(const float* quant_map, float scale, bool) {
  return {_mm512_castps_si512(vmul(vload(quant_map), vset(scale)))};
}

// Decodes 2 * kStep elements from kStep bytes.
constexpr int kStep16 = 16, kStep32 = 8;

template <bool kStream>
inline void put(void* out, __m512i x) {
  if (kStream)
    _mm512_stream_si512((__m512i*)out, x);
  else
    _mm512_storeu_si512(out, x);
}

// 32 table entries of a 16-bit type. An index word needs its low 5 bits only, whatever stands above them.
template <class T>
inline __m512i decode_32(const DecodeTable<T>& table, const uint8_t* bytes) {
#if defined(__AVX512VBMI__)
  // Each 64-bit lane holds two bytes of codes; the multishift picks 8 bits from bit 4, 0, 12 and 8 into its four words.
  const __m512i lanes = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)bytes));
  const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004), lanes);
#else
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  const __m512i index = _mm512_or_si512(_mm512_slli_epi32(wide, 16), _mm512_srli_epi32(wide, 4));
#endif
  return _mm512_permutexvar_epi16(index, table.wide);
}

template <bool kStream, class T>
inline void decode_step(const DecodeTable<T>& table, const uint8_t* bytes, T* out) {
  put<kStream>(out, decode_32(table, bytes));
}
template <bool kStream>
inline void decode_step(const DecodeTable<float>& table, const uint8_t* bytes, float* out) {
  const __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)bytes));
  const __m512i index = _mm512_or_si512(_mm512_slli_epi64(wide, 32), _mm512_srli_epi64(wide, 4));
  put<kStream>(out, _mm512_permutexvar_epi32(index, table.wide));
}

#elif defined(__AVX2__)

inline bool plain_map(const float*) { return false; }

template <class T>
struct DecodeTable {
  T entries[16];
  __m256i low, high;  // 16-bit types: low and high bytes, in both lanes. float: entries 0-7 and 8-15.
  T entry(int code) const { return entries[code]; }
};

inline __m128i round_half(Vec x, bf16) { return vround_bf16(x); }
inline __m128i round_half(Vec x, fp16) { return vround_fp16(x); }

template <class T>
inline DecodeTable<T> make_table(const float* quant_map, float scale, bool) {
  DecodeTable<T> table;
  const Vec factor = vset(scale);
  const __m256i words = _mm256_set_m128i(round_half(vmul(vload(quant_map + 8), factor), T{}),
                                         round_half(vmul(vload(quant_map), factor), T{}));
  _mm256_storeu_si256((__m256i*)table.entries, words);
  const __m256i mask = _mm256_set1_epi16(0xff);
  // packus works within 128-bit lanes; the permute puts the 16 bytes of a plane into both lanes.
  const __m256i low = _mm256_and_si256(words, mask), high = _mm256_srli_epi16(words, 8);
  table.low = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0x88);
  table.high = _mm256_permute4x64_epi64(_mm256_packus_epi16(high, high), 0x88);
  return table;
}
template <>
inline DecodeTable<float> make_table<float>(const float* quant_map, float scale, bool) {
  DecodeTable<float> table;
  const Vec low = vmul(vload(quant_map), vset(scale)), high = vmul(vload(quant_map + 8), vset(scale));
  vstore(table.entries, low);
  vstore(table.entries + 8, high);
  table.low = _mm256_castps_si256(low);
  table.high = _mm256_castps_si256(high);
  return table;
}

constexpr int kStep16 = 16, kStep32 = 4;

template <bool kStream>
inline void put(void* out, __m256i x) {
  if (kStream)
    _mm256_stream_si256((__m256i*)out, x);
  else
    _mm256_storeu_si256((__m256i*)out, x);
}

template <bool kStream, class T>
inline void decode_step(const DecodeTable<T>& table, const uint8_t* bytes, T* out) {
  const __m128i packed = _mm_loadu_si128((const __m128i*)bytes);
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble), odd = _mm_and_si128(packed, nibble);
  const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
  // Each lane interleaves to 16 words; the lanes' halves then go back into element order.
  const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
  put<kStream>(out, _mm256_permute2x128_si256(first, second, 0x20));
  put<kStream>(out + 16, _mm256_permute2x128_si256(first, second, 0x31));
}
template <bool kStream>
inline void decode_step(const DecodeTable<float>& table, const uint8_t* bytes, float* out) {
  uint32_t word;
  __builtin_memcpy(&word, bytes, 4);
  const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(int(word)));
  const __m256i index = _mm256_or_si256(_mm256_slli_epi64(wide, 32), _mm256_srli_epi64(wide, 4));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.low), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.high), index);
  // Bit 3 of the code, moved to the sign bit, chooses the half of the table.
  const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  put<kStream>(out, _mm256_castps_si256(_mm256_blendv_ps(low, high, choose)));
}

#else

inline bool plain_map(const float*) { return false; }

template <class T>
struct DecodeTable {
  T entries[16];
  T entry(int code) const { return entries[code]; }
};

template <class T>
inline DecodeTable<T> make_table(const float* quant_map, float scale, bool) {
  DecodeTable<T> table;
  for (int i = 0; i < 16; ++i) table.entries[i] = from_float<T>(quant_map[i] * scale);
  return table;
}

constexpr int kStep16 = 1, kStep32 = 1;

template <bool kStream, class T>
inline void decode_step(const DecodeTable<T>& table, const uint8_t* bytes, T* out) {
  out[0] = table.entries[*bytes >> 4];
  out[1] = table.entries[*bytes & 15];
}
#endif

template <bool kStream, class T>
inline T* decode_span(const DecodeTable<T>& table, const uint8_t* codes, int64_t& i, int64_t stop, T* out) {
  constexpr int kStep = sizeof(T) == 4 ? kStep32 : kStep16;
  for (; i + 2 * kStep <= stop; i += 2 * kStep, out += 2 * kStep) decode_step<kStream>(table, codes + (i >> 1), out);
  return out;
}

// Elements [begin, end) of the flat weight into out; any begin and end, odd ones too. With `stream`, aligned blocks are
// written past the caches: a scratch that another core has just read would otherwise be fetched back from that core line
// by line (up to 15 times slower, where the cores share no cache). Outputs that nobody has read are faster without.
template <class T>
void decode_range(const Packed4bit& w, int64_t begin, int64_t end, T* out, bool stream) {
  const uint8_t* codes = w.codes;
  const bool plain = plain_map(w.quant_map);
  for (int64_t i = begin; i < end;) {
    const int64_t block = i >> w.block_shift;
    const int64_t stop = min64(end, (block + 1) << w.block_shift);
    const DecodeTable<T> table = make_table<T>(w.quant_map, block_scale(w, block), plain);
    if (i & 1) *out++ = table.entry(code_at(codes, i++));
    if (stream && (uintptr_t(out) & 63) == 0)
      out = decode_span<true>(table, codes, i, stop, out);
    else
      out = decode_span<false>(table, codes, i, stop, out);
    for (; i < stop; ++i) *out++ = table.entry(code_at(codes, i));
  }
  if (stream) vfence();
}

template <class T>
void decode_tile(const Packed4bit& w, const Tile& tile, T* out, int threads) {
  const int64_t width = tile.col_end - tile.col_begin, height = tile.row_end - tile.row_begin;
  const bool stream = tile.stream;
  if (tile.out_stride == tile.cols && width == tile.cols) {  // one flat range
    const int64_t first = tile.row_begin * tile.cols, total = height * width;
    // A grain is a multiple of every block size, so that threads share no table.
    parallel_for(total, int64_t(1) << 15, threads,
                 [&](int64_t begin, int64_t end) { decode_range(w, first + begin, first + end, out + begin, stream); });
    return;
  }
  parallel_for(height, max64(1, (int64_t(1) << 15) / max64(width, 1)), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t flat = (tile.row_begin + row) * tile.cols;
      decode_range(w, flat + tile.col_begin, flat + tile.col_end, out + row * tile.out_stride, stream);
    }
  });
}

void dequantize_4bit(const Packed4bit& w, const Tile& tile, void* out, DType dtype, int threads) {
  if (dtype == DType::f32) decode_tile(w, tile, static_cast<float*>(out), threads);
  if (dtype == DType::f16) decode_tile(w, tile, static_cast<fp16*>(out), threads);
  if (dtype == DType::bf16) decode_tile(w, tile, static_cast<bf16*>(out), threads);
}

template <class T>
struct BitsOf {
  using type = uint16_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

// Without its sign bit a float orders like an integer, with NaN above infinity: the largest magnitude is an integer
// maximum over twice as many lanes of a 16-bit type as its float form would take, and NaN wins by itself.
template <class T>
float block_absmax(const T* w, int64_t n) {
  using Bits = typename BitsOf<T>::type;
  const Bits* bits = reinterpret_cast<const Bits*>(w);
  constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = bits[i] & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  T value;
  __builtin_memcpy(&value, &largest, sizeof(T));
  return to_float(value);
}

struct EncodeVecs {
#if defined(__AVX512F__)
  __m512 step8, step4, step2, step1;
  __m512i order;
#elif defined(__AVX2__)
  __m256 pivots[15];
  __m128i order;
#endif
};

inline EncodeVecs make_encode_vecs(const EncodeTable& table) {
  EncodeVecs vecs;
#if defined(__AVX512F__)
  // Shifted copies of the midpoints, so that each search step indexes by the interval found so far.
  float padded[16 + 8] = {};
  for (int i = 0; i < 15; ++i) padded[i] = table.pivots[i];
  vecs.step8 = _mm512_set1_ps(padded[7]);
  vecs.step4 = vload(padded + 3);
  vecs.step2 = vload(padded + 1);
  vecs.step1 = vload(padded);
  vecs.order = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)table.order));
#elif defined(__AVX2__)
  for (int i = 0; i < 15; ++i) vecs.pivots[i] = _mm256_set1_ps(table.pivots[i]);
  vecs.order = _mm_loadu_si128((const __m128i*)table.order);
#else
  (void)table;
#endif
  return vecs;
}

#if defined(__AVX512F__)
constexpr int kEncodeStep = 32;  // elements; the unordered predicate sends NaN to the last interval

inline __m128i encode_16(const EncodeVecs& v, __m512 x) {
  __m512i i = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, v.step8, _CMP_NLE_UQ), 8);
  i = _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(i, v.step4), _CMP_NLE_UQ), i,
                            _mm512_set1_epi32(4));
  i = _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(i, v.step2), _CMP_NLE_UQ), i,
                            _mm512_set1_epi32(2));
  i = _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(i, v.step1), _CMP_NLE_UQ), i,
                            _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(i, v.order));
}

template <class T>
inline void encode_step(const EncodeVecs& v, const T* w, float reciprocal, uint8_t* bytes) {
  const Vec factor = vset(reciprocal);
  const __m128i first = encode_16(v, vmul(vload(w), factor)), second = encode_16(v, vmul(vload(w + 16), factor));
  const __m256i codes = _mm256_set_m128i(second, first);
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
  _mm_storeu_si128((__m128i*)bytes, _mm256_cvtepi16_epi8(pairs));
}
#elif defined(__AVX2__)
constexpr int kEncodeStep = 16;

inline __m128i encode_8(const EncodeVecs& v, __m256 x) {
  __m256i count = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i)
    count = _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(x, v.pivots[i], _CMP_NLE_UQ)));
  return _mm_packus_epi32(_mm256_castsi256_si128(count), _mm256_extracti128_si256(count, 1));
}

template <class T>
inline void encode_step(const EncodeVecs& v, const T* w, float reciprocal, uint8_t* bytes) {
  const Vec factor = vset(reciprocal);
  const __m128i first = encode_8(v, vmul(vload(w), factor)), second = encode_8(v, vmul(vload(w + 8), factor));
  const __m128i codes = _mm_shuffle_epi8(v.order, _mm_packus_epi16(first, second));
  const __m128i pairs = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));
  _mm_storel_epi64((__m128i*)bytes, _mm_packus_epi16(pairs, pairs));
}
#else
constexpr int kEncodeStep = 1 << 30;

template <class T>
inline void encode_step(const EncodeVecs&, const T*, float, uint8_t*) {}
#endif

// One whole block: codes by multiplication with the reciprocal.
template <class T>
void encode_block(const EncodeTable& table, const EncodeVecs& vecs, const T* w, int64_t n, uint8_t* bytes,
                  float* absmax) {
  const float largest = block_absmax(w, n);
  *absmax = largest;
  const float reciprocal = 1.0f / encode_divisor(largest);
  int64_t i = 0;
  for (; i + kEncodeStep <= n; i += kEncodeStep) encode_step(vecs, w + i, reciprocal, bytes + (i >> 1));
  for (; i < n; i += 2)
    bytes[i >> 1] = uint8_t(encode_one(table, to_float(w[i]) * reciprocal) << 4 |
                            encode_one(table, to_float(w[i + 1]) * reciprocal));
}

// The last block of a weight whose size is no multiple of the block size. bitsandbytes divides here, and stores the
// clamped scale; so do we, for equal bytes. An odd size leaves the code of zero in the last low nibble.
template <class T>
void encode_partial_block(const EncodeTable& table, const T* w, int64_t n, uint8_t* bytes, float* absmax) {
  const float largest = encode_divisor(block_absmax(w, n));
  *absmax = largest;
  for (int64_t i = 0; i < n; i += 2) {
    const uint8_t even = encode_one(table, to_float(w[i]) / largest);
    const uint8_t odd = encode_one(table, i + 1 < n ? to_float(w[i + 1]) / largest : 0.0f);
    bytes[i >> 1] = uint8_t(even << 4 | odd);
  }
}

template <class T>
void encode(const EncodeTable& table, const T* w, int64_t n, int block_shift, uint8_t* codes, float* absmax,
            int threads) {
  const EncodeVecs vecs = make_encode_vecs(table);
  const int64_t block_size = int64_t(1) << block_shift, full = n >> block_shift;
  parallel_for(full, max64(1, (int64_t(1) << 15) >> block_shift), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      encode_block(table, vecs, w + b * block_size, block_size, codes + ((b * block_size) >> 1), absmax + b);
  });
  const int64_t done = full << block_shift;
  if (done < n) encode_partial_block(table, w + done, n - done, codes + (done >> 1), absmax + full);
}

void quantize_4bit(const EncodeTable& table, const void* w, DType dtype, int64_t n, int block_shift, uint8_t* codes,
                   float* absmax, int threads) {
  if (dtype == DType::f32) encode(table, static_cast<const float*>(w), n, block_shift, codes, absmax, threads);
  if (dtype == DType::f16) encode(table, static_cast<const fp16*>(w), n, block_shift, codes, absmax, threads);
  if (dtype == DType::bf16) encode(table, static_cast<const bf16*>(w), n, block_shift, codes, absmax, threads);
}

// Double quantization: centred scales in 8 bits. `nearest` maps the 65,536 evenly spaced positions of [-1, 1] to the
// nearest of 256 codes; bitsandbytes rounds a value to such a position first, and so do we, for equal bytes.
void quantize_absmax(const float* centred, int64_t n, int block_shift, const uint8_t* nearest, uint8_t* codes,
                     float* absmax, int threads) {
  const int64_t block_size = int64_t(1) << block_shift, blocks = (n + block_size - 1) >> block_shift;
  parallel_for(blocks, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b << block_shift, count = min64(block_size, n - first);
      const float largest = block_absmax(centred + first, count);
      absmax[b] = largest;
      const float reciprocal = 1.0f / largest;
      for (int64_t i = first; i < first + count; ++i) {
        const float position = nested_position(centred[i], reciprocal);
        // An all-zero block has no reciprocal; NaN and zero both take code 0.
        codes[i] = largest > 0.0f && position >= 0.0f ? nearest[int(position)] : 0;
      }
    }
  });
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
