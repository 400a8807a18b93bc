// The CUDA kernels: which architectures they were built for, and one function for each; none in a build without CUDA.
#include "views.h"
#if defined(PYFINETUNE_CUDA_ARCHS)
#include "../cuda/lora_linear.h"
#include "../cuda/nf4.h"
#endif

namespace pyfinetune {

#if defined(PYFINETUNE_CUDA_ARCHS)
namespace {

// The device of the tensor that a kernel runs for.
int device_of(const py::handle& capsule, const char* op, const char* name) {
  const TensorView view = view_of(capsule, op, name);
  PYFINETUNE_CHECK(view.on_cuda, std::string(op) + ": " + name + " is not on CUDA");
  return view.device_index;
}

int64_t row_stride(const TensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }

// What stands beside the weight's columns (more columns than it has) or below its rows, if anything does.
cuda::Adapter adapter_of(const TensorView& out, int64_t rows, int64_t cols, const py::object& values, int64_t first,
                         double scaling, int device) {
  const char* op = "dequantize_4bit";
  const bool beside = out.shape[0] == rows;
  PYFINETUNE_CHECK(out.shape[0] >= rows && out.shape[1] >= cols && (beside || out.shape[1] == cols),
                   "dequantize_4bit: out has neither the weight's rows nor its columns");
  cuda::Adapter adapter = {};
  if (out.shape[0] == rows && out.shape[1] == cols) {
    PYFINETUNE_CHECK(values.is_none(), "dequantize_4bit: out has no room for an adapter");
    return adapter;
  }
  PYFINETUNE_CHECK(!values.is_none(), "dequantize_4bit: out is larger than the weight, and there is no adapter");
  const TensorView v = matrix(values, op, "adapter", device);
  PYFINETUNE_CHECK(v.dtype == DType::f32 || v.dtype == out.dtype, std::string("dequantize_4bit: adapter is ") +
                                                                      dtype_name(v.dtype) + ", needs float32 or " +
                                                                      dtype_name(out.dtype));
  adapter.row_stride = row_stride(out);
  adapter.rows = beside ? rows : out.shape[0] - rows;
  adapter.width = beside ? out.shape[1] - cols : cols;
  PYFINETUNE_CHECK(
      v.shape[0] == adapter.rows && first >= 0 && v.shape[1] <= adapter.width - first && (beside || v.shape[1] == cols),
      "dequantize_4bit: adapter does not fit beside or below the weight");
  const int64_t corner = beside ? cols : rows * adapter.row_stride;
  adapter.data = static_cast<char*>(out.data) + corner * item_size(out.dtype);
  adapter.values = v.data;
  adapter.dtype = v.dtype;
  adapter.value_stride = row_stride(v);
  adapter.first = first;
  adapter.count = v.shape[1];
  adapter.scaling = float(scaling);
  return adapter;
}

void dequantize_4bit(const py::tuple& packed, int64_t rows, int64_t cols, const py::object& out,
                     const py::object& adapter_values, int64_t first, double scaling, uint64_t stream) {
  const char* op = "dequantize_4bit";
  const int device = device_of(out, op, "out");
  const TensorView target = matrix(out, op, "out", device);
  const cuda::Adapter adapter = adapter_of(target, rows, cols, adapter_values, first, scaling, device);
  const Packed4bit w = packed_of(packed, checked_mul(rows, cols, op), op, device);
  py::gil_scoped_release release;
  cuda::dequantize_4bit(w, {target.data, target.dtype, cols, row_stride(target)}, &adapter, device, stream);
}

void quantize_4bit(const py::object& weight, const std::string& quant_type, int64_t block_size, const py::object& codes,
                   const py::object& absmax, uint64_t stream) {
  const char* op = "quantize_4bit";
  const int device = device_of(weight, op, "weight");
  const TensorView w = view_of(weight, op, "weight");
  PYFINETUNE_CHECK(is_contiguous(w) && is_weight_dtype(w.dtype), "quantize_4bit: weight is no contiguous float tensor");
  const EncodeTable table = encode_table_of(quant_type, op);
  const int64_t n = numel(w, op);
  const int shift = log2_exact(block_size, op, "block_size");
  PYFINETUNE_CHECK(shift >= kLeastBlockShift, "quantize_4bit: block_size is less than 32");
  auto* code_bytes = static_cast<uint8_t*>(flat(codes, op, "codes", DType::u8, n / 2 + (n & 1), device).data);
  auto* scales = static_cast<float*>(flat(absmax, op, "absmax", DType::f32, blocks_of(n, shift), device).data);
  py::gil_scoped_release release;
  cuda::quantize_4bit(table, w.data, w.dtype, n, shift, code_bytes, scales, device, stream);
}

void quantize_absmax(const py::object& centred, int64_t block_size, const py::object& nearest, const py::object& codes,
                     const py::object& absmax, uint64_t stream) {
  const char* op = "quantize_absmax";
  const int device = device_of(centred, op, "centred");
  const int64_t n = numel(view_of(centred, op, "centred"), op);
  const auto* values = static_cast<const float*>(flat(centred, op, "centred", DType::f32, n, device).data);
  const int shift = log2_exact(block_size, op, "block_size");
  const auto* map = static_cast<const uint8_t*>(flat(nearest, op, "nearest", DType::u8, 65536, device).data);
  auto* code_bytes = static_cast<uint8_t*>(flat(codes, op, "codes", DType::u8, n, device).data);
  auto* scales = static_cast<float*>(flat(absmax, op, "absmax", DType::f32, blocks_of(n, shift), device).data);
  py::gil_scoped_release release;
  cuda::quantize_absmax(values, n, shift, map, code_bytes, scales, device, stream);
}

// A matrix of the product: [rows, cols] of x's dtype on x's device.
TensorView operand(const py::object& capsule, const char* op, const char* name, DType dtype, int64_t rows, int64_t cols,
                   int device) {
  const TensorView view = matrix(capsule, op, name, device);
  const std::string what = std::string(op) + ": " + name;
  PYFINETUNE_CHECK(view.dtype == dtype, what + " is " + dtype_name(view.dtype) + ", needs " + dtype_name(dtype));
  PYFINETUNE_CHECK(view.shape[0] == rows && view.shape[1] == cols,
                   what + " is [" + std::to_string(view.shape[0]) + ", " + std::to_string(view.shape[1]) +
                       "], needs [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
  return view;
}

cuda::LoraLinear problem_of(const char* op, bool backward, const py::tuple& packed, int64_t out_features,
                            int64_t in_features, const py::object& x, const py::object& y, const py::object& s,
                            const py::object& factor, double scaling, int device) {
  const TensorView given = matrix(x, op, backward ? "dout" : "x", device);
  PYFINETUNE_CHECK(given.dtype == DType::f16 || given.dtype == DType::bf16,
                   std::string(op) + ": x is " + dtype_name(given.dtype) + ", needs float16 or bfloat16");
  PYFINETUNE_CHECK(out_features >= 0 && in_features >= 0, std::string(op) + ": a weight has a negative size");
  cuda::LoraLinear p = {};
  p.w = packed_of(packed, checked_mul(out_features, in_features, op), op, device);
  p.dtype = given.dtype;
  p.rows = given.shape[0];
  p.out_features = out_features;
  p.in_features = in_features;
  const TensorView left =
      operand(x, op, backward ? "dout" : "x", p.dtype, p.rows, backward ? out_features : in_features, device);
  const TensorView made =
      operand(y, op, backward ? "dx" : "y", p.dtype, p.rows, backward ? in_features : out_features, device);
  p.x = left.data;
  p.x_stride = row_stride(left);
  p.y = made.data;
  p.y_stride = row_stride(made);
  p.scaling = float(scaling);
  PYFINETUNE_CHECK(s.is_none() == factor.is_none(), std::string(op) + ": an adapter's halves go together");
  if (s.is_none()) return p;
  p.rank = matrix(s, op, "s", device).shape[1];
  const TensorView low = operand(s, op, "s", p.dtype, p.rows, p.rank, device);
  const TensorView high = operand(factor, op, backward ? "lora_a" : "lora_b", p.dtype, backward ? p.rank : out_features,
                                  backward ? in_features : p.rank, device);
  p.s = low.data;
  p.s_stride = row_stride(low);
  p.factor = high.data;
  p.factor_stride = row_stride(high);
  return p;
}

void lora_linear(const py::tuple& packed, int64_t out_features, int64_t in_features, const py::object& x,
                 const py::object& y, const py::object& s, const py::object& lora_b, const py::object& bias,
                 double scaling, const std::string& path, uint64_t stream) {
  const char* op = "lora_linear";
  const int device = device_of(x, op, "x");
  cuda::LoraLinear p = problem_of(op, false, packed, out_features, in_features, x, y, s, lora_b, scaling, device);
  if (!bias.is_none()) p.bias = flat(bias, op, "bias", p.dtype, out_features, device).data;
  PYFINETUNE_CHECK(path == "chosen" || path == "vector" || path == "tensor",
                   "lora_linear: path is " + path + ", needs chosen, vector or tensor");
  const cuda::Path taken = path == "vector"   ? cuda::Path::vector
                           : path == "tensor" ? cuda::Path::tensor
                                              : cuda::Path::chosen;
  py::gil_scoped_release release;
  cuda::lora_linear(p, taken, device, stream);
}

void lora_linear_bwd(const py::tuple& packed, int64_t out_features, int64_t in_features, const py::object& dout,
                     const py::object& dx, const py::object& s, const py::object& lora_a, double scaling,
                     uint64_t stream) {
  const char* op = "lora_linear_bwd";
  const int device = device_of(dout, op, "dout");
  const cuda::LoraLinear p =
      problem_of(op, true, packed, out_features, in_features, dout, dx, s, lora_a, scaling, device);
  py::gil_scoped_release release;
  cuda::lora_linear_bwd(p, device, stream);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_archs") = PYFINETUNE_CUDA_ARCHS;
  m.def("cuda_dequantize_4bit", &dequantize_4bit);
  m.def("cuda_quantize_4bit", &quantize_4bit);
  m.def("cuda_quantize_absmax", &quantize_absmax);
  m.def("cuda_lora_linear", &lora_linear);
  m.def("cuda_lora_linear_bwd", &lora_linear_bwd);
}

#else
void bind_cuda(py::module_& m) { m.attr("cuda_archs") = ""; }
#endif

}  // namespace pyfinetune
