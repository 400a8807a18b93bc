// What every binding shares: DLPack capsules to views, with device, dtype, shape and strides checked again before a
// kernel sees a pointer. Only the files of this folder know Python.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "../checked.h"
#include "../cpu/dispatch.h"
#include "../nf4_format.h"

namespace pyfinetune {

namespace py = pybind11;

// Borrows: the capsule keeps ownership and must outlive the view.
TensorView view_of(const py::handle& capsule, const char* op, const char* name);

// A contiguous tensor with the wanted dtype and number of elements, on the CPU (or on CUDA device `device` >= 0).
TensorView flat(const py::handle& capsule, const char* op, const char* name, DType dtype, int64_t elements,
                int device = -1);

// A 2-D view whose rows are contiguous, on the CPU (or on CUDA device `device` >= 0), of a dtype that weights come in.
TensorView matrix(const py::handle& capsule, const char* op, const char* name, int device = -1);

// A view of any number of dimensions whose last one is contiguous, on the CPU, of a dtype that activations come in;
// of `like`'s shape and dtype where that is given.
TensorView rows(const py::handle& capsule, const char* op, const char* name, const TensorView* like = nullptr);

// The same rows [..., columns] in as few leading dimensions as their strides allow; at least one.
TensorView merged(const TensorView& view);

// A contiguous tensor of `like`'s shape and dtype, which a kernel is about to fill: large ones get huge pages.
void* fresh(const py::handle& capsule, const char* op, const char* name, const TensorView& like);

// The eight values that describe a 4-bit weight of `elements` elements, checked against each other.
Packed4bit packed_of(const py::tuple& fields, int64_t elements, const char* op, int device = -1);

// What an encoder of "nf4" or "fp4" needs.
EncodeTable encode_table_of(const std::string& quant_type, const char* op);

// Kernels decode 32 values at a time.
constexpr int kLeastBlockShift = 5;

int log2_exact(int64_t block_size, const char* op, const char* name);

inline int64_t blocks_of(int64_t n, int shift) { return (n >> shift) + ((n & ((int64_t(1) << shift) - 1)) != 0); }

inline bool is_weight_dtype(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

// One in a forked child, whose parent's thread pool does not exist.
inline int usable_threads(int threads) { return in_forked_child() || threads < 1 ? 1 : threads; }

// Each adds the functions of one op to the module.
void bind_nf4(py::module_& m);
void bind_lora_linear(py::module_& m);
void bind_varlen_attn(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_rope(py::module_& m);
void bind_glu(py::module_& m);
void bind_lora_thin(py::module_& m);
void bind_cuda(py::module_& m);

}  // namespace pyfinetune
