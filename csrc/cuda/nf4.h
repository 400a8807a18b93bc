// CUDA entry points of the 4-bit format, free of CUDA types so that the bindings compile without a toolkit.
#pragma once
#include "../nf4_format.h"
#include "../tensor_view.h"

namespace pyfinetune {
namespace cuda {

// All pointers of `w` and `out` are device pointers on `device`; enqueued on `stream`, no synchronisation.
void dequantize_4bit(const Packed4bit& w, void* out, DType dtype, int device, uint64_t stream);

}  // namespace cuda
}  // namespace pyfinetune
