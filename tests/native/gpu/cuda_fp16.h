#pragma once
#include "../fuzz.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return pyfinetune::fuzz::load(pyfinetune::DType::f16, &x, 0); }
inline __half __float2half_rn(float x) {
  __half out;
  pyfinetune::fuzz::store(pyfinetune::DType::f16, &out, 0, x);
  return out;
}
