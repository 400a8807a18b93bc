// CUDA entry points of the 4-bit format, free of CUDA types so that the bindings compile without a toolkit.
#pragma once
#include "../nf4_format.h"
#include "../tensor_view.h"

namespace pyfinetune {
namespace cuda {

// Where a decoded weight goes: `rows` rows of `cols` elements, `row_stride` elements apart.
struct Target {
  void* data;
  DType dtype;
  int64_t cols;
  int64_t row_stride;
};

// Values written in the launch that decodes, beside a weight's columns or below its rows: a matrix [rows, width] at
// `data`, `row_stride` apart, that holds scaling * values[row, column - first] in `count` columns and zeros elsewhere.
struct Adapter {
  void* data;
  int64_t rows, width, row_stride;
  const void* values;
  DType dtype;  // of the values: float32, or the target's
  int64_t value_stride, first, count;
  float scaling;
};

// All pointers are device pointers on `device`; enqueued on `stream`, no synchronisation.
void dequantize_4bit(const Packed4bit& w, const Target& target, const Adapter* adapter, int device, uint64_t stream);
void quantize_4bit(const EncodeTable& table, const void* weight, DType dtype, int64_t numel, int block_shift,
                   uint8_t* codes, float* absmax, int device, uint64_t stream);
void quantize_absmax(const float* centred, int64_t numel, int block_shift, const uint8_t* nearest, uint8_t* codes,
                     float* absmax, int device, uint64_t stream);

}  // namespace cuda
}  // namespace pyfinetune
