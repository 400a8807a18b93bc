#include "views.h"

namespace pyfinetune {

EncodeTable encode_table_of(const std::string& quant_type, const char* op) {
  PYFINETUNE_CHECK(quant_type == "nf4" || quant_type == "fp4", std::string(op) + ": quant_type is neither nf4 nor fp4");
  return quant_type == "nf4" ? make_encode_table(kNf4Codes, kNf4Order) : make_encode_table(kFp4Codes, kFp4Order);
}

namespace {

void dequantize_4bit(const py::tuple& packed, int64_t rows, int64_t cols, int64_t row_begin, int64_t col_begin,
                     const py::object& out, int threads, bool stream) {
  const char* op = "dequantize_4bit";
  const TensorView target = matrix(out, op, "out");
  const Packed4bit w = packed_of(packed, checked_mul(rows, cols, op), op);
  const Tile tile{cols,
                  row_begin,
                  row_begin + target.shape[0],
                  col_begin,
                  col_begin + target.shape[1],
                  target.shape[0] > 1 ? target.strides[0] : target.shape[1],
                  stream};
  PYFINETUNE_CHECK(row_begin >= 0 && col_begin >= 0 && tile.row_end <= rows && tile.col_end <= cols,
                   "dequantize_4bit: out reaches past the weight");
  if (target.shape[0] == 0 || target.shape[1] == 0) return;
  const KernelTable& table = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (tile.out_stride == target.shape[1])
    advise_huge_pages(target.data, target.shape[0] * target.shape[1] * item_size(target.dtype));
  table.dequantize_4bit(w, tile, target.data, target.dtype, usable);
}

void quantize_4bit(const py::object& weight, const std::string& quant_type, int64_t block_size, const py::object& codes,
                   const py::object& absmax, int threads) {
  const char* op = "quantize_4bit";
  const TensorView w = view_of(weight, op, "weight");
  PYFINETUNE_CHECK(!w.on_cuda && is_contiguous(w), "quantize_4bit: weight is not contiguous on the CPU");
  PYFINETUNE_CHECK(is_weight_dtype(w.dtype), "quantize_4bit: weight is no float tensor");
  const EncodeTable table = encode_table_of(quant_type, op);
  const int64_t n = numel(w, op);
  const int shift = log2_exact(block_size, op, "block_size");
  PYFINETUNE_CHECK(shift >= kLeastBlockShift, "quantize_4bit: block_size is less than 32");
  auto* code_bytes = static_cast<uint8_t*>(flat(codes, op, "codes", DType::u8, n / 2 + (n & 1)).data);
  auto* scales = static_cast<float*>(flat(absmax, op, "absmax", DType::f32, blocks_of(n, shift)).data);
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.quantize_4bit(table, w.data, w.dtype, n, shift, code_bytes, scales, usable);
}

void quantize_absmax(const py::object& centred, int64_t block_size, const py::object& nearest, const py::object& codes,
                     const py::object& absmax, int threads) {
  const char* op = "quantize_absmax";
  const TensorView x = view_of(centred, op, "centred");
  const int64_t n = numel(x, op);
  const auto* values = static_cast<const float*>(flat(centred, op, "centred", DType::f32, n).data);
  const int shift = log2_exact(block_size, op, "block_size");
  const auto* map = static_cast<const uint8_t*>(flat(nearest, op, "nearest", DType::u8, 65536).data);
  auto* code_bytes = static_cast<uint8_t*>(flat(codes, op, "codes", DType::u8, n).data);
  auto* scales = static_cast<float*>(flat(absmax, op, "absmax", DType::f32, blocks_of(n, shift)).data);
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.quantize_absmax(values, n, shift, map, code_bytes, scales, usable);
}

py::list code_table(const std::string& quant_type) {
  PYFINETUNE_CHECK(quant_type == "nf4" || quant_type == "fp4", "quant_type is neither nf4 nor fp4");
  const bool nf4 = quant_type == "nf4";
  py::list values;
  for (int i = 0; i < 16; ++i) values.append(double(nf4 ? kNf4Codes[i] : kFp4Codes[i]));
  return values;
}

py::list code_order(const std::string& quant_type) {
  py::list values;
  for (int i = 0; i < 16; ++i) values.append(int(quant_type == "nf4" ? kNf4Order[i] : kFp4Order[i]));
  return values;
}

}  // namespace

void bind_nf4(py::module_& m) {
  m.def("code_table", &code_table, "The 16 code values of a quant_type.");
  m.def("code_order", &code_order, "The codes of a quant_type by ascending value.");
  m.def("dequantize_4bit", &dequantize_4bit);
  m.def("quantize_4bit", &quantize_4bit);
  m.def("quantize_absmax", &quantize_absmax);
}

}  // namespace pyfinetune
