// CUDA entry points of the 4-bit linear layer, free of CUDA types.
#pragma once
#include "../nf4_format.h"
#include "../tensor_view.h"

namespace pyfinetune {
namespace cuda {

// Forward   y[m, n] = sum_k x[m, k] w[n, k] + scaling * sum_r s[m, r] factor[n, r] + bias[n]
// Backward  y[m, k] = sum_n x[m, n] w[n, k] + scaling * sum_r s[m, r] factor[r, k]
// in float16 or bfloat16 with sums in float32; w [out, in] in 4 bits, each value rounded to the dtype as decoding
// rounds it. Rows of x, y, s and factor are contiguous, and as far apart as their strides say.
struct LoraLinear {
  Packed4bit w;
  DType dtype;
  int64_t rows, out_features, in_features, rank;
  const void* x;
  void* y;
  const void* s;       // null without an adapter
  const void* factor;  // forward lora_b [out, r], backward lora_a [r, in]
  const void* bias;    // [out] or null; none backward
  int64_t x_stride, y_stride, s_stride, factor_stride;
  float scaling;
};

// Up to so many rows, a forward product can be made without the matrix unit; then, weights are not rounded.
constexpr int kVectorRows = 8;

enum class Path { chosen, vector, tensor };

// All pointers are device pointers on `device`; enqueued on `stream`, no synchronisation.
void lora_linear(const LoraLinear& p, Path path, int device, uint64_t stream);
void lora_linear_bwd(const LoraLinear& p, int device, uint64_t stream);

}  // namespace cuda
}  // namespace pyfinetune
