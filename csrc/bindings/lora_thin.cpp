#include <memory>

#include "views.h"

namespace pyfinetune {

namespace {

constexpr const char* kOp = "lora_linear";

// Scratch that a thread of Python reuses from call to call; what one large call needed is not kept.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > kept_bytes_) {
      fresh_.reset(new char[size_t(bytes) + kAlign]);
      if (bytes <= kMostKept) {
        kept_.swap(fresh_);
        kept_bytes_ = bytes;
        fresh_.reset();
      }
    }
    char* start = fresh_ ? fresh_.get() : kept_.get();
    data_ = start + (kAlign - reinterpret_cast<uintptr_t>(start) % kAlign) % kAlign;
  }
  char* data() const { return data_; }

 private:
  static constexpr int64_t kAlign = 64, kMostKept = 8 << 20;
  static thread_local std::unique_ptr<char[]> kept_;
  static thread_local int64_t kept_bytes_;
  std::unique_ptr<char[]> fresh_;
  char* data_;
};

thread_local std::unique_ptr<char[]> Scratch::kept_;
thread_local int64_t Scratch::kept_bytes_ = 0;

int64_t scratch_bytes(int64_t k, int64_t n) {
  checked_mul(checked_mul(k + 16, n + 128, kOp), 4, kOp);
  return (thin_scratch(k, n) + 63) / 64 * 64;
}

void check_shape(const TensorView& view, int64_t rows, int64_t cols, const char* name) {
  PYFINETUNE_CHECK(view.shape[0] == rows && view.shape[1] == cols,
                   std::string(kOp) + ": " + name + " has another shape");
}

void check_dtype(const TensorView& view, DType dtype, const char* name) {
  PYFINETUNE_CHECK(view.dtype == dtype,
                   std::string(kOp) + ": " + name + " is " + dtype_name(view.dtype) + ", needs " + dtype_name(dtype));
}

// A small matrix [n, k], contiguous along one of its sides.
TensorView adapter(const py::object& capsule, const char* name, int64_t n, int64_t k) {
  const TensorView view = view_of(capsule, kOp, name);
  const std::string what = std::string(kOp) + ": " + name;
  PYFINETUNE_CHECK(!view.on_cuda && view.ndim == 2 && is_weight_dtype(view.dtype),
                   what + " is no float matrix on the CPU");
  check_shape(view, n, k, name);
  const bool rows = (view.shape[1] <= 1 || view.strides[1] == 1) && (n <= 1 || view.strides[0] >= k);
  const bool columns = (view.shape[0] <= 1 || view.strides[0] == 1) && (k <= 1 || view.strides[1] >= n);
  PYFINETUNE_CHECK(rows || columns, what + " is contiguous along neither side");
  return view;
}

// What a dimension of one element has for a stride says nothing.
int64_t stride(const TensorView& view, int d) { return view.shape[d] <= 1 ? 1 : view.strides[d]; }

ThinOperand operand(const TensorView& view) { return {view.data, view.dtype, stride(view, 1), stride(view, 0)}; }

const uint8_t* mask_of(const py::object& mask, int64_t elements) {
  if (mask.is_none()) return nullptr;
  return static_cast<const uint8_t*>(flat(mask, kOp, "mask", DType::u8, elements / 8 + (elements % 8 != 0) + 4).data);
}

int64_t row_stride(const TensorView& view) { return view.shape[0] <= 1 ? view.shape[1] : view.strides[0]; }

void thin_down(const py::object& x, const py::object& a, const py::object& out, double scale, const py::object& mask,
               int threads) {
  const TensorView input = matrix(x, kOp, "x"), output = matrix(out, kOp, "s");
  const int64_t m = input.shape[0], k = input.shape[1], r = output.shape[1];
  check_shape(output, m, r, "s");
  if (output.dtype != DType::f32) check_dtype(output, input.dtype, "s");
  const TensorView small = adapter(a, "lora_a", r, k);
  const uint8_t* bits = mask_of(mask, checked_mul(m, k, kOp));
  const Scratch scratch(scratch_bytes(k, r));
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (m == 0 || r == 0) return;
  chosen.thin_down({input.data, row_stride(input), m, k, r, operand(small), bits, float(scale), output.data,
                    row_stride(output), input.dtype, output.dtype, scratch.data()},
                   usable);
}

// y = add + scale * keep(s b^T); `dora` is None or (factor, base or None, bias or None, z or None).
void thin_up(const py::object& s, const py::object& b, const py::object& add, const py::object& y, double scale,
             const py::object& mask, const py::object& dora, int threads) {
  const TensorView input = matrix(s, kOp, "s"), inner = matrix(add, kOp, "the base term"), output = matrix(y, kOp, "y");
  const int64_t m = input.shape[0], r = input.shape[1], n = output.shape[1];
  check_shape(output, m, n, "y");
  check_shape(inner, m, n, "the base term");
  check_dtype(inner, input.dtype, "the base term");
  check_dtype(output, input.dtype, "y");
  const TensorView small = adapter(b, "lora_b", n, r);
  const Scratch scratch(scratch_bytes(r, n));
  ThinUp p = {};
  p.s = input.data, p.s_stride = row_stride(input), p.m = m, p.r = r, p.n = n;
  p.b = operand(small), p.mask = mask_of(mask, checked_mul(m, n, kOp)), p.scale = float(scale);
  p.add = inner.data, p.add_stride = row_stride(inner);
  p.y = output.data, p.y_stride = row_stride(output), p.dtype = input.dtype, p.packed = scratch.data();
  if (!dora.is_none()) {
    const auto parts = dora.cast<py::tuple>();
    PYFINETUNE_CHECK(parts.size() == 4, "lora_linear: DoRA's part is not (factor, base, bias, z)");
    p.factor = static_cast<const float*>(flat(parts[0], kOp, "factor", DType::f32, n).data);
    if (!parts[1].is_none()) {
      const TensorView base = matrix(parts[1], kOp, "base");
      check_shape(base, m, n, "base");
      check_dtype(base, input.dtype, "base");
      p.base = base.data, p.base_stride = row_stride(base);
    }
    if (!parts[2].is_none()) p.bias = flat(parts[2], kOp, "bias", input.dtype, n).data;
    if (!parts[3].is_none()) {
      const TensorView z = matrix(parts[3], kOp, "z");
      check_shape(z, m, n, "z");
      check_dtype(z, input.dtype, "z");
      p.z = z.data, p.z_stride = row_stride(z);
    }
  }
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (m == 0 || n == 0) return;
  chosen.thin_up(p, usable);
}

// out[r, n] = scale * t^T keep(x); `out` may be a transposed view.
void thin_outer(const py::object& t, const py::object& x, const py::object& out, double scale, const py::object& mask,
                int threads) {
  const TensorView left = matrix(t, kOp, "t"), input = matrix(x, kOp, "x");
  const int64_t m = left.shape[0], r = left.shape[1], n = input.shape[1];
  check_shape(input, m, n, "x");
  check_dtype(left, input.dtype, "t");
  const TensorView output = adapter(out, "the gradient", r, n);
  const uint8_t* bits = mask_of(mask, checked_mul(m, n, kOp));
  const int64_t packed_bytes = scratch_bytes(m, r);
  const Scratch scratch(packed_bytes + scratch_bytes(r, n));
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (r == 0 || n == 0) return;
  const int64_t n_stride = n <= 1 ? 1 : output.strides[1], r_stride = r <= 1 ? n : output.strides[0];
  chosen.thin_outer(
      {left.data, row_stride(left), m, r, n, input.data, row_stride(input), bits, float(scale), output.data, r_stride,
       n_stride, input.dtype, output.dtype, scratch.data(), reinterpret_cast<float*>(scratch.data() + packed_bytes)},
      usable);
}

void dora_norms(const py::object& weight, const py::object& a, const py::object& b, const py::object& gram,
                double scaling, const py::object& norms, int threads) {
  const TensorView w = matrix(weight, kOp, "weight"), left = matrix(b, kOp, "lora_b");
  const int64_t n = w.shape[0], k = w.shape[1], r = left.shape[1];
  check_shape(left, n, r, "lora_b");
  PYFINETUNE_CHECK(r > 0, "lora_linear: lora_a has no rows, and DoRA needs a rank of at least 1");
  const auto* up = static_cast<const float*>(flat(b, kOp, "lora_b", DType::f32, n * r).data);
  const TensorView small = adapter(a, "lora_a", r, k);
  const auto* products = static_cast<const float*>(flat(gram, kOp, "gram", DType::f32, checked_mul(r, r, kOp)).data);
  auto* out = static_cast<float*>(flat(norms, kOp, "norm", DType::f32, n).data);
  const int64_t packed_bytes = scratch_bytes(k, r);
  const Scratch scratch(packed_bytes + scratch_bytes(n, r));
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (n == 0) return;
  chosen.dora_norms({w.data, row_stride(w), n, k, r, operand(small), up, products, scaling, out,
                     reinterpret_cast<float*>(scratch.data() + packed_bytes), w.dtype, scratch.data()},
                    usable);
}

// g = dout * factor and dz = column sums of dout * z; z and dz, or g, may be None.
void dora_grad(const py::object& dout, const py::object& z, const py::object& factor, const py::object& g,
               const py::object& dz, int threads) {
  const TensorView upstream = matrix(dout, kOp, "dout");
  const int64_t m = upstream.shape[0], n = upstream.shape[1], elements = checked_mul(m, n, kOp);
  DoraGrad p = {};
  p.dout = upstream.data, p.dout_stride = row_stride(upstream), p.m = m, p.n = n, p.dtype = upstream.dtype;
  p.factor = static_cast<const float*>(flat(factor, kOp, "factor", DType::f32, n).data);
  PYFINETUNE_CHECK(z.is_none() == dz.is_none(), "lora_linear: z and its sums go together");
  if (!g.is_none()) p.g = flat(g, kOp, "g", upstream.dtype, elements).data;
  const Scratch scratch(z.is_none() ? 64 : checked_mul((m + kDoraBlock - 1) / kDoraBlock, n * 4, kOp) + 64);
  if (!z.is_none()) {
    p.z = flat(z, kOp, "z", upstream.dtype, elements).data;
    p.dz = static_cast<float*>(flat(dz, kOp, "dz", DType::f32, n).data);
    p.partial = reinterpret_cast<float*>(scratch.data());
  }
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  if (n != 0) chosen.dora_grad(p, usable);
}

void dropout_mask(const py::object& mask, int64_t elements, double p, int64_t seed, int threads) {
  PYFINETUNE_CHECK(elements >= 0, "lora_linear: a mask has a size");
  PYFINETUNE_CHECK(p >= 0.0 && p < 1.0, "lora_linear: dropout_p is outside [0, 1)");
  auto* bits = const_cast<uint8_t*>(mask_of(mask, elements));
  PYFINETUNE_CHECK(bits, "lora_linear: mask is None");
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.dropout_mask(bits, elements, p, uint64_t(seed), usable);
}

}  // namespace

void bind_lora_thin(py::module_& m) {
  m.def("thin_down", &thin_down);
  m.def("thin_up", &thin_up);
  m.def("thin_outer", &thin_outer);
  m.def("dora_norms", &dora_norms);
  m.def("dora_grad", &dora_grad);
  m.def("dropout_mask", &dropout_mask);
}

}  // namespace pyfinetune
