#include <memory>

#include "views.h"

namespace pyfinetune {

namespace {

struct Sizes {
  int64_t rows, cols;
};

Sizes sizes_of(const TensorView& x, const char* op) {
  PYFINETUNE_CHECK(x.ndim > 0 && x.shape[x.ndim - 1] > 0, std::string(op) + ": x has no features");
  const int64_t cols = x.shape[x.ndim - 1];
  return {numel(x, op) / cols, cols};
}

TensorView weight_of(const py::object& weight, const char* op, int64_t cols) {
  const TensorView w = rows(weight, op, "weight");
  PYFINETUNE_CHECK(w.ndim == 1 && w.shape[0] == cols, std::string(op) + ": weight has another shape");
  return w;
}

void rms_norm(const py::object& x, const py::object& weight, const py::object& residual, double eps, double offset,
              const py::object& y, const py::object& total, const py::object& rstd, int threads) {
  const char* op = "rms_norm";
  const TensorView input = rows(x, op, "x");
  const Sizes n = sizes_of(input, op);
  const TensorView w = weight_of(weight, op, n.cols);
  PYFINETUNE_CHECK(residual.is_none() == total.is_none(), "rms_norm: residual and its sum go together");
  RmsNorm p = {};
  p.x = merged(input);
  p.residual.ndim = 1;
  if (!residual.is_none()) {
    p.residual = merged(rows(residual, op, "residual", &input));
    p.total = fresh(total, op, "the sum", input);
  }
  p.weight = w.data;
  p.eps = float(eps);
  p.offset = float(offset);
  p.y = fresh(y, op, "y", input);
  p.rstd = static_cast<float*>(flat(rstd, op, "rstd", DType::f32, n.rows).data);
  p.rows = n.rows;
  p.cols = n.cols;
  p.dtype = input.dtype;
  p.weight_dtype = w.dtype;
  if (n.rows == 0) return;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> gain(new float[size_t(n.cols)]);
  p.gain = gain.get();
  chosen.rms_norm(p, usable);
}

void rms_norm_bwd(const py::object& dout, const py::object& dsum, const py::object& x, const py::object& weight,
                  const py::object& rstd, double offset, const py::object& dx, const py::object& dweight, int threads) {
  const char* op = "rms_norm";
  const TensorView input = rows(x, op, "x");
  const Sizes n = sizes_of(input, op);
  const TensorView w = weight_of(weight, op, n.cols);
  RmsNormBwd p = {};
  p.x = merged(input);
  p.dout = merged(rows(dout, op, "dout", &input));
  p.dsum.ndim = 1;
  if (!dsum.is_none()) p.dsum = merged(rows(dsum, op, "dsum", &input));
  p.weight = w.data;
  p.rstd = static_cast<const float*>(flat(rstd, op, "rstd", DType::f32, n.rows).data);
  p.offset = float(offset);
  if (!dx.is_none()) p.dx = fresh(dx, op, "dx", input);
  if (!dweight.is_none()) p.dweight = flat(dweight, op, "dweight", w.dtype, n.cols).data;
  p.rows = n.rows;
  p.cols = n.cols;
  // As many units as there are chunks, until they are many enough to keep every core busy.
  p.unit_rows = (n.rows + kRmsNormUnits - 1) / kRmsNormUnits;
  if (p.unit_rows < kRmsNormChunk) p.unit_rows = kRmsNormChunk;
  p.units = (n.rows + p.unit_rows - 1) / p.unit_rows;
  p.dtype = input.dtype;
  p.weight_dtype = w.dtype;
  if (!p.dweight && (!p.dx || n.rows == 0)) return;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> scratch(new float[size_t((p.dweight ? 2 * p.units + 1 : 1) * n.cols)]);
  p.gain = scratch.get();
  p.scratch = scratch.get() + n.cols;
  chosen.rms_norm_bwd(p, usable);
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm);
  m.def("rms_norm_bwd", &rms_norm_bwd);
}

}  // namespace pyfinetune
