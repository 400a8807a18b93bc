#include "views.h"

namespace pyfinetune {

namespace {

constexpr const char* kOp = "glu";

Activation activation_of(int activation) {
  PYFINETUNE_CHECK(activation >= 0 && activation <= int(Activation::gelu), "glu: there is no such activation");
  return Activation(activation);
}

// The rows and columns to work in: one long row where all inputs are contiguous, so that short rows cost nothing.
template <class P, class... Views>
void set_rows(P& p, const TensorView& gate, Views*... views) {
  const int64_t n = numel(gate, kOp);
  p.cols = gate.ndim > 0 ? gate.shape[gate.ndim - 1] : 1;
  if ((is_contiguous(*views) && ...)) {
    p.cols = n;
    const auto flatten = [n](TensorView& view) {
      view.ndim = 1;
      view.shape[0] = n;
      view.strides[0] = 1;
    };
    (flatten(*views), ...);
  }
  p.rows = n > 0 ? n / p.cols : 0;
  ((*views = merged(*views)), ...);
}

void glu(const py::object& gate, const py::object& up, int activation, const py::object& out, int threads) {
  Glu p = {};
  const TensorView input = p.gate = rows(gate, kOp, "gate");
  p.up = rows(up, kOp, "up", &input);
  p.out = fresh(out, kOp, "the result", input);
  p.activation = activation_of(activation);
  p.dtype = input.dtype;
  set_rows(p, input, &p.gate, &p.up);
  if (p.rows == 0) return;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.glu(p, usable);
}

void glu_bwd(const py::object& dout, const py::object& gate, const py::object& up, int activation,
             const py::object& dgate, const py::object& dup, int threads) {
  GluBwd p = {};
  const TensorView input = p.gate = rows(gate, kOp, "gate");
  p.up = rows(up, kOp, "up", &input);
  p.dout = rows(dout, kOp, "dout", &input);
  p.dgate = fresh(dgate, kOp, "dgate", input);
  p.dup = fresh(dup, kOp, "dup", input);
  p.activation = activation_of(activation);
  p.dtype = input.dtype;
  set_rows(p, input, &p.dout, &p.gate, &p.up);
  if (p.rows == 0) return;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.glu_bwd(p, usable);
}

}  // namespace

void bind_glu(py::module_& m) {
  m.def("glu", &glu);
  m.def("glu_bwd", &glu_bwd);
}

}  // namespace pyfinetune
