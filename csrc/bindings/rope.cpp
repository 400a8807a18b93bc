#include "views.h"

namespace pyfinetune {

namespace {

constexpr const char* kOp = "rope";

// Packed [tokens, heads, head_dim] as one batch of [batch, heads, tokens, head_dim].
TensorView with_batch(const TensorView& x) {
  if (x.ndim == 4) return x;
  TensorView out = x;
  out.ndim = 4;
  const int64_t shape[4] = {1, x.shape[1], x.shape[0], x.shape[2]};
  const int64_t strides[4] = {0, x.strides[1], x.strides[0], x.strides[2]};
  for (int d = 0; d < 4; ++d) {
    out.shape[d] = shape[d];
    out.strides[d] = strides[d];
  }
  return out;
}

// cos or sin as [batch, tokens, rotary_dim], a single table shared by stride.
TensorView table_of(const TensorView& table, const TensorView& q) {
  TensorView out = table;
  if (table.ndim == 2) {
    out.ndim = 3;
    for (int d = 2; d > 0; --d) {
      out.shape[d] = table.shape[d - 1];
      out.strides[d] = table.strides[d - 1];
    }
    out.shape[0] = 1;
  }
  PYFINETUNE_CHECK(out.shape[1] == q.shape[2] && (out.shape[0] == 1 || out.shape[0] == q.shape[0]),
                   "rope: cos does not fit q");
  if (out.shape[0] == 1) out.strides[0] = 0;
  return out;
}

// The result of a tensor; huge pages where it is large and fills its range of memory.
TensorView result_of(const py::object& result, const char* name, const TensorView& like) {
  const TensorView view = rows(result, kOp, name, &like);
  int64_t reach = 1;
  for (int d = 0; d < view.ndim; ++d) reach += (view.shape[d] - 1) * view.strides[d];
  const int64_t n = numel(view, kOp);
  if (n > 0 && reach == n) advise_huge_pages(view.data, n * item_size(view.dtype));
  return with_batch(view);
}

void rope(const py::object& q, const py::object& k, const py::object& cos, const py::object& sin,
          const py::object& q_out, const py::object& k_out, bool backward, int threads) {
  const TensorView queries = rows(q, kOp, "q"), keys = rows(k, kOp, "k");
  const TensorView cosines = rows(cos, kOp, "cos"), sines = rows(sin, kOp, "sin", &cosines);
  PYFINETUNE_CHECK((queries.ndim == 3 || queries.ndim == 4) && keys.ndim == queries.ndim &&
                       keys.dtype == queries.dtype && cosines.ndim == queries.ndim - 1,
                   "rope: q, k, cos do not go together");
  Rope p = {};
  p.q = with_batch(queries);
  p.k = with_batch(keys);
  for (int d = 0; d < 4; ++d)
    PYFINETUNE_CHECK(d == 1 || p.q.shape[d] == p.k.shape[d], "rope: k has another shape than q");
  p.cos = table_of(cosines, p.q);
  p.sin = table_of(sines, p.q);
  const int64_t rotary_dim = p.cos.shape[2];
  PYFINETUNE_CHECK(rotary_dim % 2 == 0 && rotary_dim > 0 && rotary_dim <= p.q.shape[3],
                   "rope: cos has a last size that is odd, zero or larger than head_dim");
  p.q_out = result_of(q_out, "the rotated q", queries);
  p.k_out = result_of(k_out, "the rotated k", keys);
  p.backward = backward;
  p.dtype = queries.dtype;
  p.table_dtype = cosines.dtype;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.rope(p, usable);
}

}  // namespace

void bind_rope(py::module_& m) { m.def("rope", &rope); }

}  // namespace pyfinetune
