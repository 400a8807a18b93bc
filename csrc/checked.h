// Checks at the boundary: overflow-checked sizes, and errors that name the op and the argument.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace pyfinetune {

struct InvalidInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct BackendUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#define PYFINETUNE_CHECK(condition, message)       \
  do {                                             \
    if (!(condition)) throw InvalidInput(message); \
  } while (false)

inline int64_t checked_mul(int64_t a, int64_t b, const char* what) {
  int64_t product;
  PYFINETUNE_CHECK(!__builtin_mul_overflow(a, b, &product), std::string(what) + ": size overflows 64 bits");
  return product;
}

inline int64_t numel(const TensorView& view, const char* what) {
  int64_t n = 1;
  for (int d = 0; d < view.ndim; ++d) n = checked_mul(n, view.shape[d], what);
  return n;
}

inline bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] == 0) return true;
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f64: return "float64";
    case DType::u8: return "uint8";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
  }
  return "?";
}

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::u8: return 1;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    default: return 8;
  }
}

}  // namespace pyfinetune
