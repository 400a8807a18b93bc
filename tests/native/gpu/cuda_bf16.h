#pragma once
#include "../fuzz.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return pyfinetune::fuzz::load(pyfinetune::DType::bf16, &x, 0); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 out;
  pyfinetune::fuzz::store(pyfinetune::DType::bf16, &out, 0, x);
  return out;
}
