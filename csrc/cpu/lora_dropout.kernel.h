// Dropout from a counter: the elements that stay are known from (seed, index), so that no pass has to keep a mask.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Element i is word i % 4 of the
// block at counter i / 4 under the key `seed`, so that any element's bit is known from (seed, i) alone.
constexpr int kPhiloxRounds = 10;

struct PhiloxKeys {
  uint32_t first[kPhiloxRounds], second[kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.first[round] = uint32_t(seed) + uint32_t(round) * 0x9E3779B9u;
    keys.second[round] = uint32_t(seed >> 32) + uint32_t(round) * 0xBB67AE85u;
  }
  return keys;
}

// The 4 * kWide words of kWide consecutive counters, in element order.
inline void philox(uint64_t first_counter, const PhiloxKeys& keys, uint32_t* words) {
  const Words m0 = wset(0xD2511F53u), m1 = wset(0xCD9E8D57u);
  Words c0 = wcounters(first_counter), c1 = whigh(c0), c2 = wset(0), c3 = wset(0);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    // A low word is the product itself: the next multiply reads low halves only, and xor keeps halves apart.
    const Words p0 = wmul(c0, m0), p1 = wmul(c2, m1);
    c0 = wxor(whigh(p1), c1, wset(keys.first[round]));
    c2 = wxor(whigh(p0), c3, wset(keys.second[round]));
    c1 = p1;
    c3 = p0;
  }
  winterleave(c0, c1, c2, c3, words);
}

template <class T>
void dropout_range(const T* x, T* out, int64_t begin, int64_t end, uint32_t threshold, float scale, uint64_t seed) {
  constexpr int64_t kChunk = 64;  // four vectors of the widest set: independent chains hide the multiply's latency
  alignas(64) uint32_t words[kChunk];
  const PhiloxKeys keys = philox_keys(seed);
  for (int64_t i = begin; i < end; i += kChunk) {
    for (int64_t j = 0; j < kChunk; j += 4 * kWide) philox(uint64_t(i + j) / 4, keys, words + j);
    const int64_t count = min64(kChunk, end - i);
    int64_t j = 0;
    // A dropped element is zero even where x is infinite, so the mask selects and does not multiply.
    for (; j + kLanes <= count; j += kLanes)
      vstore(out + i + j, vkeep(vmul(vload(x + i + j), vset(scale)), words + j, threshold));
    for (; j < count; ++j) out[i + j] = from_float<T>(words[j] >= threshold ? to_float(x[i + j]) * scale : 0.0f);
  }
}

// out = x * keep / (1 - p); an element is kept when its random word reaches p * 2^32.
void dropout(const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
  const uint32_t threshold = uint32_t(p * 4294967296.0);  // p < 1, checked by the caller
  const float scale = float(1.0 / (1.0 - p));
  parallel_for(n, 4096, threads, [&](int64_t begin, int64_t end) {
    if (dtype == DType::f32)
      dropout_range(static_cast<const float*>(x), static_cast<float*>(out), begin, end, threshold, scale, seed);
    if (dtype == DType::f16)
      dropout_range(static_cast<const fp16*>(x), static_cast<fp16*>(out), begin, end, threshold, scale, seed);
    if (dtype == DType::bf16)
      dropout_range(static_cast<const bf16*>(x), static_cast<bf16*>(out), begin, end, threshold, scale, seed);
  });
}

// Bit i % 8 of byte i / 8 says whether element i is kept; four more bytes, which hold anything, end the mask.
void dropout_mask(uint8_t* mask, int64_t n, double p, uint64_t seed, int threads) {
  constexpr int64_t kChunk = 64;
  const uint32_t threshold = uint32_t(p * 4294967296.0);
  const PhiloxKeys keys = philox_keys(seed);
  parallel_for((n + kChunk - 1) / kChunk, 64, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t words[kChunk];
    for (int64_t i = begin * kChunk; i < end * kChunk; i += kChunk) {
      for (int64_t j = 0; j < kChunk; j += 4 * kWide) philox(uint64_t(i + j) / 4, keys, words + j);
      uint64_t bits = 0;
      for (int j = 0; j < kChunk; j += kLanes) bits |= uint64_t(vreached(words + j, threshold)) << j;
      __builtin_memcpy(mask + i / 8, &bits, uint64_t(min64(8, (n - i + 7) / 8)));
    }
  });
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
