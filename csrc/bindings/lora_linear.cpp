#include <cstring>
#include <memory>

#include "views.h"

namespace pyfinetune {

namespace {

float as_float(const char* p, DType dtype) {
  if (dtype == DType::f32) return *reinterpret_cast<const float*>(p);
  const uint32_t bits = *reinterpret_cast<const uint16_t*>(p);
  uint32_t wide;
  if (dtype == DType::bf16) {
    wide = bits << 16;
  } else {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
    if (exponent == 0) {
      const float value = float(mantissa) * 0x1p-24f;
      return sign ? -value : value;
    }
    wide = sign | (exponent == 31 ? 0x7f800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13));
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Copies x (any strides) to zero-padded rows: bf16 words as they are, or floats.
std::unique_ptr<char[]> pack_rows(const TensorView& x, bool as_bf16, int64_t row_stride) {
  const int64_t item = as_bf16 ? 2 : 4, source_item = item_size(x.dtype);
  std::unique_ptr<char[]> packed(new char[size_t(x.shape[0] * row_stride * item)]());
  for (int64_t m = 0; m < x.shape[0]; ++m) {
    const char* source = static_cast<const char*>(x.data) + m * x.strides[0] * source_item;
    char* target = packed.get() + m * row_stride * item;
    if (x.strides[1] == 1 && item == source_item) {
      std::memcpy(target, source, size_t(x.shape[1] * item));
      continue;
    }
    for (int64_t k = 0; k < x.shape[1]; ++k) {
      const char* element = source + k * x.strides[1] * source_item;
      if (as_bf16)
        std::memcpy(target + k * 2, element, 2);
      else
        reinterpret_cast<float*>(target)[k] = as_float(element, x.dtype);
    }
  }
  return packed;
}

void small_matmul_4bit(const py::object& x, const py::tuple& packed, int64_t out_features, const py::object& bias,
                       const py::object& y, int threads) {
  const char* op = "lora_linear";
  const TensorView input = view_of(x, op, "x");
  const TensorView output = matrix(y, op, "y");
  PYFINETUNE_CHECK(!input.on_cuda && input.ndim == 2 && input.dtype == output.dtype,
                   "lora_linear: x and y are not both matrices of one dtype on the CPU");
  const int64_t m = input.shape[0], k = input.shape[1];
  PYFINETUNE_CHECK(m <= kSmallMatmulRows, "lora_linear: x has more rows than the small product takes");
  PYFINETUNE_CHECK(output.shape[0] == m && output.shape[1] == out_features, "lora_linear: y has another shape");
  const Packed4bit w = packed_of(packed, checked_mul(out_features, k, op), op);
  const void* offsets = bias.is_none() ? nullptr : flat(bias, op, "bias", input.dtype, out_features).data;
  if (m == 0 || out_features == 0) return;
  const KernelTable& chosen = kernels();
  const bool as_bf16 = chosen.packs_bf16 && input.dtype == DType::bf16;
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  const int64_t row_stride = (k + kSmallMatmulPad - 1) / kSmallMatmulPad * kSmallMatmulPad;
  const auto rows = pack_rows(input, as_bf16, row_stride);
  chosen.small_matmul_4bit(w,
                           {rows.get(), row_stride, m, out_features, k, offsets, output.data,
                            m > 1 ? output.strides[0] : out_features, output.dtype},
                           usable);
}

void dropout(const py::object& x, const py::object& out, double p, int64_t seed, int threads) {
  const char* op = "lora_linear";
  const TensorView input = view_of(x, op, "x");
  PYFINETUNE_CHECK(is_weight_dtype(input.dtype), "lora_linear: x is no float tensor");
  const int64_t n = numel(input, op);
  flat(x, op, "x", input.dtype, n);
  const TensorView output = flat(out, op, "dropped x", input.dtype, n);
  PYFINETUNE_CHECK(p >= 0.0 && p < 1.0, "lora_linear: dropout_p is outside [0, 1)");
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.dropout(input.data, output.data, input.dtype, n, p, uint64_t(seed), usable);
}

}  // namespace

void bind_lora_linear(py::module_& m) {
  m.def("small_matmul_4bit", &small_matmul_4bit);
  m.def("dropout", &dropout);
  m.attr("small_matmul_rows") = kSmallMatmulRows;
}

}  // namespace pyfinetune
