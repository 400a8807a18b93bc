// The few SIMD verbs that kernels are written in; every one static, so that no copy compiled for one instruction set
// can be picked by the linker for another. `Vec` is a vector of kLanes floats. vmin and vmax give their second operand
// where either is NaN; vload_n and vstore_n touch the first n lanes only (1 <= n <= kLanes) and load zeros behind them;
// vscale2 is x * 2^n for whole -252 <= n <= 254; vselect_negative takes `negative` where x has its sign bit set.
#pragma once
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../tensor_view.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

inline float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Rescaling by 2^112 turns half's exponent bias into float's and makes subnormals exact.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return bf16{0x7fc0};
  const uint32_t bits = float_bits(x);
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
#if defined(__F16C__)
  return fp16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = float_bits(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves a subnormal half in the low mantissa bits, rounded to nearest even by the hardware.
    return fp16{uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return fp16{uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

// Orders streamed stores before whatever tells another thread that they are done.
inline void vfence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec vzero() { return _mm512_setzero_ps(); }
inline Vec vset(float x) { return _mm512_set1_ps(x); }
inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline Vec vload(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Vec vload(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float vsum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float vhmax(Vec a) { return _mm512_reduce_max_ps(a); }

// Round to nearest even, subnormals kept (the hardware's own bf16 conversion flushes them), NaN kept quiet.
inline __m256i vround_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
inline __m256i vround_fp16(Vec x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void vstore(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, vround_bf16(x)); }
inline void vstore(fp16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, vround_fp16(x)); }

inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
inline Vec vload_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vec vload_n(const bf16* p, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec vload_n(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void vstore_n(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline void vstore_n(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), vround_bf16(x)); }
inline void vstore_n(fp16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), vround_fp16(x)); }

inline Vec vround(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec vscale2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec vselect_negative(Vec x, Vec negative, Vec other) {
  return _mm512_mask_mov_ps(other, _mm512_movepi32_mask(_mm512_castps_si512(x)), negative);
}

// kWide unsigned 32-bit words, each in the low half of a 64-bit lane; what stands in the high half does not matter.
// wcounters gives kWide consecutive 64-bit counters, wmul 64-bit products.
constexpr int kWide = 8;
using Words = __m512i;

inline Words wset(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline Words wcounters(uint64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words wmul(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words whigh(Words product) { return _mm512_srli_epi64(product, 32); }
inline Words wxor(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Writes a[0] b[0] c[0] d[0] a[1] b[1] ...
inline void winterleave(Words a, Words b, Words c, Words d, uint32_t* out) {
  const Words ab = _mm512_mask_mov_epi32(a, 0xaaaa, _mm512_slli_epi64(b, 32));
  const Words cd = _mm512_mask_mov_epi32(c, 0xaaaa, _mm512_slli_epi64(d, 32));
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(ab, first, cd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(ab, second, cd));
}
// x where word >= threshold, else 0; kLanes words.
inline Vec vkeep(Vec x, const uint32_t* words, uint32_t threshold) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(int(threshold))), x);
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec vzero() { return _mm256_setzero_ps(); }
inline Vec vset(float x) { return _mm256_set1_ps(x); }
inline Vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline Vec vload(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Vec vload(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float vsum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float vhmax(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline __m128i vround_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline __m128i vround_fp16(Vec x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void vstore(bf16* p, Vec x) { _mm_storeu_si128((__m128i*)p, vround_bf16(x)); }
inline void vstore(fp16* p, Vec x) { _mm_storeu_si128((__m128i*)p, vround_fp16(x)); }

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec vload_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void vstore_n(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
// AVX2 has no masked access to 16-bit elements.
template <class T>
inline Vec vload_n(const T* p, int n) {
  T padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return vload(padded);
}
template <class T>
inline void vstore_n(T* p, Vec x, int n) {
  T padded[kLanes];
  vstore(padded, x);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

inline Vec vround(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// In two steps, as 2^n itself may not be representable where the product is.
inline Vec vscale2(Vec x, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
inline Vec vselect_negative(Vec x, Vec negative, Vec other) { return _mm256_blendv_ps(other, negative, x); }

constexpr int kWide = 4;
using Words = __m256i;

inline Words wset(uint32_t x) { return _mm256_set1_epi32(int(x)); }
inline Words wcounters(uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Words wmul(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words whigh(Words product) { return _mm256_srli_epi64(product, 32); }
inline Words wxor(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void winterleave(Words a, Words b, Words c, Words d, uint32_t* out) {
  const Words ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
  const Words cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa);
  const Words even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i*)(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
inline Vec vkeep(Vec x, const uint32_t* words, uint32_t threshold) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)words), t = _mm256_set1_epi32(int(threshold));
  // AVX2 has no unsigned compare: w >= t exactly when max(w, t) = w.
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(w, t), w)));
}

#else

constexpr int kLanes = 1;
using Vec = float;

inline Vec vzero() { return 0.0f; }
inline Vec vset(float x) { return x; }
template <class T>
inline Vec vload(const T* p) {
  return to_float(*p);
}
template <class T>
inline void vstore(T* p, Vec x) {
  *p = from_float<T>(x);
}
template <class T>
inline Vec vload_n(const T* p, int) {
  return to_float(*p);
}
template <class T>
inline void vstore_n(T* p, Vec x, int) {
  *p = from_float<T>(x);
}
inline Vec vadd(Vec a, Vec b) { return a + b; }
inline Vec vsub(Vec a, Vec b) { return a - b; }
inline Vec vmul(Vec a, Vec b) { return a * b; }
inline Vec vdiv(Vec a, Vec b) { return a / b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float vsum(Vec a) { return a; }
inline float vhmax(Vec a) { return a; }
// Adding 1.5 * 2^23 leaves no room for a fraction, so the hardware rounds it away; |x| < 2^22.
inline Vec vround(Vec x) { return (x + 12582912.0f) - 12582912.0f; }
inline Vec vscale2(Vec x, Vec n) {
  if (n != n) return n;
  const int32_t exponent = int32_t(n), half = exponent >> 1;
  return x * bits_float(uint32_t(half + 127) << 23) * bits_float(uint32_t(exponent - half + 127) << 23);
}
inline Vec vselect_negative(Vec x, Vec negative, Vec other) { return float_bits(x) >> 31 ? negative : other; }

constexpr int kWide = 1;
using Words = uint64_t;

inline Words wset(uint32_t x) { return x; }
inline Words wcounters(uint64_t first) { return first; }
inline Words wmul(Words a, Words b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
inline Words whigh(Words product) { return product >> 32; }
inline Words wxor(Words a, Words b, Words c) { return a ^ b ^ c; }
inline void winterleave(Words a, Words b, Words c, Words d, uint32_t* out) {
  out[0] = uint32_t(a);
  out[1] = uint32_t(b);
  out[2] = uint32_t(c);
  out[3] = uint32_t(d);
}
inline Vec vkeep(Vec x, const uint32_t* words, uint32_t threshold) { return *words >= threshold ? x : 0.0f; }

#endif

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
