// The only file that knows Python: DLPack capsules in, every device, dtype, shape and stride checked again, a kernel
// called with the interpreter lock released, exceptions out.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <string>

#include "checked.h"
#include "cpu/dispatch.h"
#include "dlpack_abi.h"
#include "nf4_format.h"
#if defined(PYFINETUNE_CUDA_ARCHS)
#include "cuda/nf4.h"
#endif

namespace py = pybind11;
using namespace pyfinetune;

namespace {

DType dtype_of(const DLDataType& type, const std::string& what) {
  PYFINETUNE_CHECK(type.lanes == 1, what + ": vector element types are not supported");
  if (type.code == 2 && type.bits == 32) return DType::f32;
  if (type.code == 2 && type.bits == 16) return DType::f16;
  if (type.code == 2 && type.bits == 64) return DType::f64;
  if (type.code == 4 && type.bits == 16) return DType::bf16;
  if (type.code == 1 && type.bits == 8) return DType::u8;
  if (type.code == 0 && type.bits == 32) return DType::i32;
  if (type.code == 0 && type.bits == 64) return DType::i64;
  throw InvalidInput(what + ": unsupported element type");
}

// Borrows: the capsule keeps ownership and must outlive the view.
TensorView view_of(const py::handle& capsule, const char* op, const char* name) {
  const std::string what = std::string(op) + ": " + name;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) {
    PyErr_Clear();
    throw InvalidInput(what + " is not a DLPack capsule");
  }
  const DLTensor& t = managed->dl_tensor;
  PYFINETUNE_CHECK(t.ndim <= kMaxDims, what + " has more than 8 dimensions");
  PYFINETUNE_CHECK(t.device.device_type == 1 || t.device.device_type == 2, what + " is neither on the CPU nor on CUDA");
  TensorView view;
  view.dtype = dtype_of(t.dtype, what);
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  view.on_cuda = t.device.device_type == 2;
  view.device_index = t.device.device_id;
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    view.shape[d] = t.shape[d];
    view.strides[d] = t.strides ? t.strides[d] : stride;
    stride *= t.shape[d];
  }
  return view;
}

// A contiguous tensor with the wanted dtype and number of elements, on the CPU (or on CUDA device `device` >= 0).
TensorView flat(const py::handle& capsule, const char* op, const char* name, DType dtype, int64_t elements,
                int device = -1) {
  const TensorView view = view_of(capsule, op, name);
  const std::string what = std::string(op) + ": " + name;
  PYFINETUNE_CHECK(view.on_cuda == (device >= 0) && (device < 0 || view.device_index == device),
                   what + " is on another device than its kernel");
  PYFINETUNE_CHECK(view.dtype == dtype, what + " is " + dtype_name(view.dtype) + ", needs " + dtype_name(dtype));
  PYFINETUNE_CHECK(is_contiguous(view), what + " is not contiguous");
  const int64_t n = numel(view, what.c_str());
  PYFINETUNE_CHECK(n == elements, what + " has " + std::to_string(n) + " elements, needs " + std::to_string(elements));
  return view;
}

int log2_exact(int64_t block_size, const char* op, const char* name) {
  int shift = 0;
  while (shift < 30 && (int64_t(1) << shift) < block_size) ++shift;
  PYFINETUNE_CHECK(block_size > 0 && (int64_t(1) << shift) == block_size,
                   std::string(op) + ": " + name + " is " + std::to_string(block_size) + ", needs a power of two");
  return shift;
}

int64_t blocks_of(int64_t n, int shift) { return (n >> shift) + ((n & ((int64_t(1) << shift) - 1)) != 0); }

bool is_weight_dtype(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

// The eight values that describe a 4-bit weight of `elements` elements, checked against each other.
Packed4bit packed_of(const py::tuple& fields, int64_t elements, const char* op, int device = -1) {
  PYFINETUNE_CHECK(fields.size() == 8, std::string(op) + ": a packed weight has 8 fields");
  Packed4bit w = {};
  w.numel = elements;
  w.block_shift = log2_exact(fields[6].cast<int64_t>(), op, "block_size");
  const int64_t blocks = blocks_of(elements, w.block_shift);
  w.codes =
      static_cast<const uint8_t*>(flat(fields[0], op, "codes", DType::u8, elements / 2 + (elements & 1), device).data);
  w.quant_map = static_cast<const float*>(flat(fields[2], op, "quant_map", DType::f32, 16, device).data);
  if (fields[3].is_none()) {
    w.absmax = static_cast<const float*>(flat(fields[1], op, "absmax", DType::f32, blocks, device).data);
    return w;
  }
  w.nested_shift = log2_exact(fields[7].cast<int64_t>(), op, "nested_block_size");
  w.absmax8 = static_cast<const uint8_t*>(flat(fields[1], op, "absmax", DType::u8, blocks, device).data);
  w.nested_absmax = static_cast<const float*>(
      flat(fields[3], op, "nested_absmax", DType::f32, blocks_of(blocks, w.nested_shift), device).data);
  w.nested_map = static_cast<const float*>(flat(fields[4], op, "nested_quant_map", DType::f32, 256, device).data);
  w.nested_offset = static_cast<const float*>(flat(fields[5], op, "nested_offset", DType::f32, 1, device).data);
  return w;
}

int usable_threads(int threads) { return in_forked_child() || threads < 1 ? 1 : threads; }

// A 2-D view whose rows are contiguous, on the CPU, of a dtype that weights come in.
TensorView matrix(const py::handle& capsule, const char* op, const char* name) {
  const TensorView view = view_of(capsule, op, name);
  const std::string what = std::string(op) + ": " + name;
  PYFINETUNE_CHECK(!view.on_cuda, what + " is not on the CPU");
  PYFINETUNE_CHECK(view.ndim == 2, what + " is not two-dimensional");
  PYFINETUNE_CHECK(is_weight_dtype(view.dtype), what + " is " + dtype_name(view.dtype) + ", needs a float type");
  PYFINETUNE_CHECK(view.shape[1] <= 1 || view.strides[1] == 1, what + " has rows that are not contiguous");
  PYFINETUNE_CHECK(view.shape[0] <= 1 || view.strides[0] >= view.shape[1], what + " has overlapping rows");
  return view;
}

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
  PYFINETUNE_CHECK(quant_type == "nf4" || quant_type == "fp4", "quantize_4bit: quant_type is neither nf4 nor fp4");
  const int64_t n = numel(w, op);
  const int shift = log2_exact(block_size, op, "block_size");
  auto* code_bytes = static_cast<uint8_t*>(flat(codes, op, "codes", DType::u8, n / 2 + (n & 1)).data);
  auto* scales = static_cast<float*>(flat(absmax, op, "absmax", DType::f32, blocks_of(n, shift)).data);
  const EncodeTable table =
      quant_type == "nf4" ? make_encode_table(kNf4Codes, kNf4Order) : make_encode_table(kFp4Codes, kFp4Order);
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

void row_squares(const py::object& weight, const py::object& squares, int threads) {
  const char* op = "lora_linear";
  const TensorView w = matrix(weight, op, "weight");
  auto* sums = static_cast<float*>(flat(squares, op, "squares", DType::f32, w.shape[0]).data);
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.row_squares(w.data, w.dtype, w.shape[0], w.shape[1], w.strides[0], sums, usable);
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

#if defined(PYFINETUNE_CUDA_ARCHS)
void cuda_dequantize_4bit(const py::tuple& packed, int64_t elements, const py::object& out, uint64_t stream) {
  const char* op = "dequantize_4bit";
  const TensorView target = view_of(out, op, "out");
  PYFINETUNE_CHECK(target.on_cuda && is_contiguous(target) && is_weight_dtype(target.dtype),
                   "dequantize_4bit: out is no contiguous float tensor on CUDA");
  PYFINETUNE_CHECK(numel(target, op) == elements, "dequantize_4bit: out has another size");
  const Packed4bit w = packed_of(packed, elements, op, target.device_index);
  py::gil_scoped_release release;
  cuda::dequantize_4bit(w, target.data, target.dtype, target.device_index, stream);
}
#endif

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

py::list isas() {
  py::list names;
  for (const char* const* name = runnable_isas(); *name; ++name) names.append(*name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pyfinetune; called through pyfinetune.ops, which checks and documents them.";
  py::register_exception_translator([](std::exception_ptr raised) {
    const auto raise = [](const char* name, const char* message) {
      const py::object type = py::module_::import("pyfinetune.errors").attr(name);
      PyErr_SetString(type.ptr(), message);
    };
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const InvalidInput& error) {
      raise("InvalidInput", error.what());
    } catch (const BackendUnavailable& error) {
      raise("BackendUnavailable", error.what());
    }
  });
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("isas", &isas, "The instruction sets that this machine can run, best first.");
  m.def("in_forked_child", &in_forked_child);
  m.def("code_table", &code_table, "The 16 code values of a quant_type.");
  m.def("code_order", &code_order, "The codes of a quant_type by ascending value.");
  m.def("advise_huge_pages", [](const py::object& tensor) {
    const TensorView view = view_of(tensor, "advise_huge_pages", "tensor");
    if (!view.on_cuda && is_contiguous(view))
      advise_huge_pages(view.data, numel(view, "tensor") * item_size(view.dtype));
  });
  m.def("dequantize_4bit", &dequantize_4bit);
  m.def("quantize_4bit", &quantize_4bit);
  m.def("quantize_absmax", &quantize_absmax);
  m.def("small_matmul_4bit", &small_matmul_4bit);
  m.def("row_squares", &row_squares);
  m.def("dropout", &dropout);
#if defined(PYFINETUNE_CUDA_ARCHS)
  m.attr("cuda_archs") = PYFINETUNE_CUDA_ARCHS;
  m.def("cuda_dequantize_4bit", &cuda_dequantize_4bit);
#else
  m.attr("cuda_archs") = "";
#endif
  m.attr("__version__") = PYFINETUNE_VERSION;
}
