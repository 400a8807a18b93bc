// A tensor as the kernels' callers see it: a pointer, sizes and strides, and nothing of Python or torch.
#pragma once
#include <cstdint>

namespace pyfinetune {

enum class DType : int { f32, f16, bf16, f64, u8, i32, i64 };

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  DType dtype = DType::f32;
  bool on_cuda = false;
  int device_index = 0;
};

}  // namespace pyfinetune
