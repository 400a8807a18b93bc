// The 4-bit storage format: code tables, nibble order, block scales. One source for CPU and CUDA kernels.
//
// A weight W[out, in] is flattened row-major; element i has code (byte[i / 2] >> 4) for even i and (byte[i / 2] & 15)
// for odd i, and belongs to block i / block_size. It decodes to  round(quant_map[code] * scale(block)), where scale is
// absmax[block], or, double-quantized,  nested_map[absmax8[block]] * nested_absmax[block / nested_block] + nested_offset
// (multiply, round, add, round: a fused multiply-add gives other bits). The layout is bitsandbytes'.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define PYFINETUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYFINETUNE_HOST_DEVICE static inline
#endif

namespace pyfinetune {

// clang-format off
// Normal-float codes: quantiles of N(0, 1), QLoRA appendix E (https://arxiv.org/abs/2305.14314).
static const float kNf4Codes[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Sign, two exponent bits, one mantissa bit; indexed by bit pattern and normalised to a maximum of 1.
static const float kFp4Codes[16] = {
    0.0f, 0.0625f / 12.0f, 8.0f / 12.0f, 1.0f, 4.0f / 12.0f, 6.0f / 12.0f, 2.0f / 12.0f, 3.0f / 12.0f,
    -0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -6.0f / 12.0f, -2.0f / 12.0f, -3.0f / 12.0f};
// clang-format on

// Codes by ascending value (FP4's bit patterns are not sorted; +0 sorts before -0).
static const uint8_t kNf4Order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const uint8_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

// What an encoder needs: 15 midpoints between neighbouring codes, and the code of each of the 16 intervals.
struct EncodeTable {
  float pivots[15];
  uint8_t order[16];
};

PYFINETUNE_HOST_DEVICE EncodeTable make_encode_table(const float* codes, const uint8_t* order) {
  EncodeTable table;
  for (int i = 0; i < 16; ++i) table.order[i] = order[i];
  for (int i = 0; i < 15; ++i) table.pivots[i] = (codes[order[i]] + codes[order[i + 1]]) * 0.5f;
  return table;
}

// How many of the 15 ascending midpoints are below the value, in four steps. NaN takes the last interval, as a sorted
// search gives it. The first three midpoints that are looked at have constant places and stay in registers.
PYFINETUNE_HOST_DEVICE int encode_interval(const float* pivots, float normalised) {
  int interval = normalised <= pivots[7] ? 0 : 8;
  const float quarter = interval ? pivots[11] : pivots[3];
  interval += normalised <= quarter ? 0 : 4;
  interval += normalised <= pivots[interval + 1] ? 0 : 2;
  return interval + (normalised <= pivots[interval] ? 0 : 1);
}

// Nearest code by strict comparison with the midpoints.
PYFINETUNE_HOST_DEVICE uint8_t encode_one(const EncodeTable& table, float normalised) {
  return table.order[encode_interval(table.pivots, normalised)];
}

// The smallest scale an encoder divides by; a subnormal, so that only all-zero blocks are affected in practice.
static const float kMinAbsmax = 1e-38f;

PYFINETUNE_HOST_DEVICE float encode_divisor(float largest) { return largest < kMinAbsmax ? kMinAbsmax : largest; }

// One rounding each, whatever a compiler would like to fuse. The CPU files are compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
PYFINETUNE_HOST_DEVICE float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
PYFINETUNE_HOST_DEVICE float rounded_add(float a, float b) { return __fadd_rn(a, b); }
PYFINETUNE_HOST_DEVICE float rounded_div(float a, float b) { return __fdiv_rn(a, b); }
PYFINETUNE_HOST_DEVICE float rounded_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
PYFINETUNE_HOST_DEVICE float rounded_mul(float a, float b) { return a * b; }
PYFINETUNE_HOST_DEVICE float rounded_add(float a, float b) { return a + b; }
PYFINETUNE_HOST_DEVICE float rounded_div(float a, float b) { return a / b; }
PYFINETUNE_HOST_DEVICE float rounded_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// Where a centred scale stands among the 65,536 even steps of [-1, 1]; NaN for NaN, and for a block of zeros, whose
// reciprocal is infinite.
PYFINETUNE_HOST_DEVICE float nested_position(float centred, float reciprocal) {
  float x = rounded_mul(centred, reciprocal);
  x = x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
  return rounded_fma(rounded_mul(rounded_add(x, 1.0f), 0.5f), 65535.0f, 0.5f);
}

struct Packed4bit {
  const uint8_t* codes;
  int64_t numel;               // elements
  int block_shift;             // log2 of the block size
  const float* quant_map;      // [16]
  const float* absmax;         // [blocks], or null when double-quantized
  const uint8_t* absmax8;      // [blocks], or null
  const float* nested_absmax;  // [blocks / nested block]
  const float* nested_map;     // [256]
  const float* nested_offset;  // one element
  int nested_shift;
};

PYFINETUNE_HOST_DEVICE int code_at(const uint8_t* codes, int64_t i) {
  const int byte = codes[i >> 1];
  return (i & 1) ? (byte & 15) : (byte >> 4);
}

PYFINETUNE_HOST_DEVICE float block_scale(const Packed4bit& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return rounded_add(rounded_mul(w.nested_map[w.absmax8[block]], w.nested_absmax[block >> w.nested_shift]),
                     *w.nested_offset);
}

}  // namespace pyfinetune
