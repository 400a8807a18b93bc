#include "views.h"

#include "../dlpack_abi.h"

namespace pyfinetune {

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

}  // namespace

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

TensorView flat(const py::handle& capsule, const char* op, const char* name, DType dtype, int64_t elements,
                int device) {
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

Packed4bit packed_of(const py::tuple& fields, int64_t elements, const char* op, int device) {
  PYFINETUNE_CHECK(fields.size() == 8, std::string(op) + ": a packed weight has 8 fields");
  Packed4bit w = {};
  w.numel = elements;
  w.block_shift = log2_exact(fields[6].cast<int64_t>(), op, "block_size");
  PYFINETUNE_CHECK(w.block_shift >= kLeastBlockShift, std::string(op) + ": block_size is less than 32");
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

TensorView matrix(const py::handle& capsule, const char* op, const char* name, int device) {
  const TensorView view = view_of(capsule, op, name);
  const std::string what = std::string(op) + ": " + name;
  PYFINETUNE_CHECK(view.on_cuda == (device >= 0) && (device < 0 || view.device_index == device),
                   what + (device < 0 ? " is not on the CPU" : " is on another device than its kernel"));
  PYFINETUNE_CHECK(view.ndim == 2, what + " is not two-dimensional");
  PYFINETUNE_CHECK(is_weight_dtype(view.dtype), what + " is " + dtype_name(view.dtype) + ", needs a float type");
  PYFINETUNE_CHECK(view.shape[1] <= 1 || view.strides[1] == 1, what + " has rows that are not contiguous");
  PYFINETUNE_CHECK(view.shape[0] <= 1 || view.strides[0] >= view.shape[1], what + " has overlapping rows");
  return view;
}

TensorView rows(const py::handle& capsule, const char* op, const char* name, const TensorView* like) {
  const TensorView view = view_of(capsule, op, name);
  const auto what = [&] { return std::string(op) + ": " + name; };
  PYFINETUNE_CHECK(!view.on_cuda, what() + " is not on the CPU");
  PYFINETUNE_CHECK(is_weight_dtype(view.dtype), what() + " is " + dtype_name(view.dtype) + ", needs a float type");
  const int last = view.ndim - 1;
  PYFINETUNE_CHECK(view.ndim == 0 || view.shape[last] <= 1 || view.strides[last] == 1,
                   what() + " has rows that are not contiguous");
  if (!like) return view;
  PYFINETUNE_CHECK(view.dtype == like->dtype,
                   what() + " is " + dtype_name(view.dtype) + ", needs " + dtype_name(like->dtype));
  PYFINETUNE_CHECK(view.ndim == like->ndim, what() + " has another number of dimensions");
  for (int d = 0; d < view.ndim; ++d) PYFINETUNE_CHECK(view.shape[d] == like->shape[d], what() + " has another shape");
  return view;
}

TensorView merged(const TensorView& view) {
  TensorView out = view;
  out.ndim = 2;
  out.shape[0] = 1;
  out.strides[0] = 0;
  out.shape[1] = view.ndim > 0 ? view.shape[view.ndim - 1] : 1;
  out.strides[1] = 1;
  int64_t shape[kMaxDims], strides[kMaxDims];
  int count = 0;
  for (int d = 0; d + 1 < view.ndim; ++d) {
    if (view.shape[d] == 1) continue;
    if (count > 0 && strides[count - 1] == view.strides[d] * view.shape[d]) {
      shape[count - 1] *= view.shape[d];
      strides[count - 1] = view.strides[d];
    } else {
      shape[count] = view.shape[d];
      strides[count++] = view.strides[d];
    }
  }
  if (count == 0) return out;
  out.ndim = count + 1;
  for (int d = 0; d < count; ++d) {
    out.shape[d] = shape[d];
    out.strides[d] = strides[d];
  }
  out.shape[count] = view.shape[view.ndim - 1];
  out.strides[count] = 1;
  return out;
}

void* fresh(const py::handle& capsule, const char* op, const char* name, const TensorView& like) {
  const TensorView view = rows(capsule, op, name, &like);
  PYFINETUNE_CHECK(is_contiguous(view), std::string(op) + ": " + name + " is not contiguous");
  advise_huge_pages(view.data, numel(view, name) * item_size(view.dtype));
  return view.data;
}

}  // namespace pyfinetune
