// The hardware's part of csrc/cuda/device.h, in plain C++. The matrix product is written from the instruction's
// description (PTX ISA, "Matrix Fragments for mma.m16n8k16"), element by element.
#pragma once
#include "emulator.h"

namespace pyfinetune {
namespace cuda {

inline unsigned char* dynamic_shared() { return emulated::shared_memory(); }

template <class T>
uint32_t pack_pair(float low, float high, T) {
  T values[2];
  narrow(low, values[0]);
  narrow(high, values[1]);
  return uint32_t(values[0].bits) | uint32_t(values[1].bits) << 16;
}

inline void copy_async(void* shared, const void* global, int bytes) { emulated::copy_async(shared, global, bytes); }
inline void close_copies() { emulated::close_copies(); }
template <int kPending>
void wait_copies() {
  emulated::wait_copies(kPending);
}

template <class T>
float half_of(uint32_t word, int which) {
  T value;
  value.bits = uint16_t(word >> (16 * which));
  return widen(value);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int lane = int(emulated::thread_index().x % 32);
  emulated::exchange(words, 6, [&](const emulated::Words* lanes) {
    // The i-th of a lane's four results.
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, col = lane % 4 * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) {
        // A: groups of four lanes hold rows g and g + 8, each lane four pairs of columns.
        int a_word = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
        if (emulated::planted == emulated::Planted::swapped_words && (a_word == 1 || a_word == 2)) a_word = 3 - a_word;
        const float left = half_of<T>(lanes[row % 8 * 4 + k % 8 / 2][a_word], k % 2);
        const float right = half_of<T>(lanes[col * 4 + k % 8 / 2][4 + (k >= 8 ? 1 : 0)], k % 2);
        d[i] = std::fma(left, right, d[i]);
      }
    }
  });
}

}  // namespace cuda
}  // namespace pyfinetune
