#include "views.h"

namespace pyfinetune {

namespace {

constexpr const char* kOp = "linear_cross_entropy";

// Fills rows and targets with the indices and labels of the tokens that count, and returns how many they are.
int64_t cross_entropy_rows(const py::object& labels, int64_t ignore_index, int64_t vocab, const py::object& rows,
                           const py::object& targets) {
  const TensorView view = view_of(labels, kOp, "labels");
  const int64_t n = numel(view, kOp);
  const auto* label = static_cast<const int64_t*>(flat(labels, kOp, "labels", DType::i64, n).data);
  auto* row = static_cast<int64_t*>(flat(rows, kOp, "rows", DType::i64, n).data);
  auto* target = static_cast<int64_t*>(flat(targets, kOp, "targets", DType::i64, n).data);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (label[i] == ignore_index) continue;
    PYFINETUNE_CHECK(label[i] >= 0 && label[i] < vocab, std::string(kOp) + ": the label of row " + std::to_string(i) +
                                                            " is " + std::to_string(label[i]) +
                                                            ", needs 0 <= label < " + std::to_string(vocab) +
                                                            ", or ignore_index (" + std::to_string(ignore_index) + ")");
    row[kept] = i;
    target[kept++] = label[i];
  }
  return kept;
}

// state holds peak, picked, slope, keep and add, a row each.
void cross_entropy_tile(const py::object& logits, const py::object& bias, const py::object& targets, int64_t first,
                        double softcap, const py::object& state, const py::object& total, const py::object& tile_stats,
                        bool write, int threads) {
  const TensorView tile = matrix(logits, kOp, "logits");
  const int64_t rows = tile.shape[0], cols = tile.shape[1];
  PYFINETUNE_CHECK(cols <= kCrossEntropyCols, std::string(kOp) + ": a tile of logits is too wide");
  PYFINETUNE_CHECK(softcap >= 0.0, std::string(kOp) + ": softcap is negative");
  CrossEntropyTile p = {};
  p.logits = tile.data;
  p.dtype = tile.dtype;
  p.rows = rows;
  p.cols = cols;
  p.stride = rows > 1 ? tile.strides[0] : cols;
  p.bias = bias.is_none() ? nullptr : static_cast<const float*>(flat(bias, kOp, "bias", DType::f32, cols).data);
  p.targets = static_cast<const int64_t*>(flat(targets, kOp, "targets", DType::i64, rows).data);
  p.first = first;
  p.softcap = float(softcap);
  p.write = write;
  auto* stats = static_cast<float*>(flat(state, kOp, "state", DType::f32, checked_mul(rows, 5, kOp)).data);
  p.peak = stats;
  p.picked = stats + rows;
  p.slope = stats + 2 * rows;
  p.keep = stats + 3 * rows;
  p.add = stats + 4 * rows;
  p.total = static_cast<double*>(flat(total, kOp, "total", DType::f64, rows).data);
  if (!tile_stats.is_none()) {
    p.tile_peak = static_cast<float*>(flat(tile_stats, kOp, "tile_stats", DType::f32, checked_mul(rows, 2, kOp)).data);
    p.tile_total = p.tile_peak + rows;
  }
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.cross_entropy_tile(p, usable);
}

// One factor for each of `count` rows, or a single one for all of them.
const float* factors(const py::object& capsule, const char* name, int64_t count, int64_t* step) {
  const int64_t n = numel(view_of(capsule, kOp, name), kOp);
  *step = n == 1 ? 0 : 1;
  return static_cast<const float*>(flat(capsule, kOp, name, DType::f32, n == 1 ? 1 : count).data);
}

int64_t row_stride(const TensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }

// The indices, checked to lie in [0, bound).
const int64_t* indices(const py::object& capsule, int64_t count, int64_t bound) {
  const auto* rows = static_cast<const int64_t*>(flat(capsule, kOp, "rows", DType::i64, count).data);
  for (int64_t i = 0; i < count; ++i)
    PYFINETUNE_CHECK(rows[i] >= 0 && rows[i] < bound, std::string(kOp) + ": a row index is out of range");
  return rows;
}

// The part that all three share: y with its factors, and the size.
RowCombination added(const py::object& y, const py::object& b) {
  const TensorView view = matrix(y, kOp, "y");
  RowCombination p = {};
  p.y = view.data;
  p.y_dtype = view.dtype;
  p.y_stride = row_stride(view);
  p.count = view.shape[0];
  p.cols = view.shape[1];
  p.b = factors(b, "b", p.count, &p.b_step);
  return p;
}

void combine_rows(const py::object& out, const py::object& rows, const py::object& x, const py::object& a,
                  const py::object& y, const py::object& b, int threads) {
  const TensorView to = matrix(out, kOp, "out"), from = matrix(x, kOp, "x");
  RowCombination p = {};
  if (!y.is_none()) {
    p = added(y, b);
    PYFINETUNE_CHECK(p.count == from.shape[0] && p.cols == from.shape[1],
                     std::string(kOp) + ": x and y differ in shape");
    PYFINETUNE_CHECK(to.dtype == DType::f32 || p.y_dtype == to.dtype, std::string(kOp) + ": y has another dtype");
  } else {
    p.y_dtype = to.dtype;
  }
  PYFINETUNE_CHECK(from.dtype == DType::f32 || from.dtype == to.dtype, std::string(kOp) + ": x has another dtype");
  PYFINETUNE_CHECK(to.shape[1] == from.shape[1], std::string(kOp) + ": out and x differ in width");
  p.count = from.shape[0];
  p.cols = from.shape[1];
  PYFINETUNE_CHECK(!rows.is_none() || to.shape[0] == p.count, std::string(kOp) + ": out and x differ in rows");
  if (!rows.is_none()) p.rows = indices(rows, p.count, to.shape[0]);
  p.out = to.data;
  p.out_dtype = to.dtype;
  p.out_stride = row_stride(to);
  p.x = from.data;
  p.x_dtype = from.dtype;
  p.x_stride = row_stride(from);
  p.a = factors(a, "a", p.count, &p.a_step);
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.combine_rows(p, usable);
}

void add_rows_at(const py::object& out, const py::object& rows, const py::object& y, const py::object& b, int threads) {
  RowCombination p = added(y, b);
  const TensorView to = matrix(out, kOp, "out");
  PYFINETUNE_CHECK(to.dtype == DType::f32 && to.shape[1] == p.cols, std::string(kOp) + ": out does not fit y");
  p.out = to.data;
  p.out_stride = row_stride(to);
  p.rows = indices(rows, p.count, to.shape[0]);
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.add_rows_at(p, usable);
}

void weighted_column_sums(const py::object& y, const py::object& b, const py::object& out, int threads) {
  RowCombination p = added(y, b);
  p.out = flat(out, kOp, "out", DType::f32, p.cols).data;
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  chosen.weighted_column_sums(p, usable);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("cross_entropy_rows", &cross_entropy_rows);
  m.def("cross_entropy_tile", &cross_entropy_tile);
  m.def("combine_rows", &combine_rows);
  m.def("add_rows_at", &add_rows_at);
  m.def("weighted_column_sums", &weighted_column_sums);
}

}  // namespace pyfinetune
