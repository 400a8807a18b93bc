#include <cstring>

#include "steps.h"

namespace pyfinetune {
namespace fuzz {

namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

// The bytes of numbers, as an output begins.
template <class T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  std::vector<char> bytes(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}
std::vector<char> rows_of(const MatrixInput& x, int64_t rows, int64_t cols) {
  std::vector<char> bytes(size_t(rows * cols * item_size(x.dtype)));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) store(x.dtype, bytes.data(), i * cols + j, float(x.at(i, j)));
  return bytes;
}

// e^x is within kMathUnit of its share, an x that is off by d makes it off by e^d - 1, and the smallest results flush.
Expected exp_of(const Expected& x) {
  if (is_nan(x)) return x;
  if (x.value == kNone) return {0.0, kSmallest};
  const double value = std::exp(x.value);
  return rounded(value, value * (std::expm1(std::min(x.error, 100.0)) + kMathUnit) + 2 * kSmallest);
}

// What is known of a token before or after a tile.
struct State {
  std::vector<float> peak, picked, slope, keep, add;
  std::vector<double> total;
};

struct Reference {
  std::vector<Expected> logits, peak, total, picked, slope, keep, add, tile_peak, tile_total;
};

// The capped logit c tanh(z / c) and its slope 1 - tanh^2: a quotient, a tanh and its products are each off by a few units.
void cap_logit(Expected& z, Expected& slope, double cap) {
  if (!(z.error < kAnything)) {
    slope = {1.0, kAnything};
    return;
  }
  const double t = std::tanh(z.value / cap);
  if (is_nan(z)) {
    slope = z;
    return;
  }
  const double error = std::min((1.0 - t * t) * z.error / cap + 3 * kMathUnit * std::fabs(t) + 4 * kSmallest, 2.0);
  z = mul(exact(cap), {t, error});
  slope = rounded(1.0 - t * t, 2.0 * std::fabs(t) * error + error * error + 4 * kUnit);
}

void tile_row(const CrossEntropyTile& p, const MatrixInput& x, const MatrixInput* bias, int64_t row, int64_t target,
              const State& before, Reference& r) {
  const size_t at = size_t(row);
  const int64_t label = target - p.first;
  std::vector<Expected> z, slope;
  Expected peak = exact(kNone);
  bool odd = false;  // a NaN or an infinity of which no more is asked than that it does no harm elsewhere
  for (int64_t j = 0; j < p.cols; ++j) {
    z.push_back(exact(x.at(row, j)));
    slope.push_back(exact(1.0));
    const bool none = z.back().value == kNone && p.softcap == 0.0f && (!bias || std::isfinite(bias->at(0, j)));
    if (bias && !none) z.back() = add(z.back(), exact(bias->at(0, j)));
    if (p.softcap > 0.0f) cap_logit(z.back(), slope.back(), double(p.softcap));
    odd = odd || (!none && !(std::isfinite(z.back().value) && z.back().error < kAnything));
    peak.error = std::max(peak.error, none ? 0.0 : z.back().error);
    peak.value = std::max(peak.value, z.back().value);
  }
  const bool inside = label >= 0 && label < p.cols;
  const Expected anything = {0.0, kAnything};
  r.picked.push_back(inside ? (odd ? anything : z[size_t(label)]) : exact(before.picked[at]));
  r.slope.push_back(inside ? (odd ? anything : slope[size_t(label)]) : exact(before.slope[at]));
  const Expected top = peak.value == kNone ? exact(0.0) : peak;
  Sum sum;
  std::vector<Expected> e;
  for (int64_t j = 0; j < p.cols; ++j) {
    const bool out = j == label || z[size_t(j)].value == kNone;
    const Expected difference = out ? exact(kNone) : add(z[size_t(j)], negative(top));
    e.push_back(j == label ? exact(0.0) : exp_of(difference));
    sum.add(e.back().value, 1.0, e.back().error);
  }
  // Sums of a few vectors are added in double; that only makes them better.
  const Expected total = sum.expected();
  for (int64_t j = 0; j < p.cols; ++j) {
    if (!p.write) {
      r.logits.push_back(exact(x.at(row, j)));
      continue;
    }
    // A share of the total lies in [0, 1], whatever the rounding.
    const Expected share = mul(e[size_t(j)], slope[size_t(j)]);
    const double low = std::max(total.value - total.error, 0.0);
    double value = total.value > 0.0 ? share.value / total.value : 0.0;
    double error = low > 0.0 ? (share.error + value * total.error) / low + value * 4 * kUnit : 1.0;
    error = std::min(error, 1.0) + kTiny;
    // What is left of a tile beside a label that is certain: any share will do, but no infinity.
    if (total.value < 0x1p-120) value = 0.5, error = 0.5 + kTiny;
    if (j == label) value = error = 0.0;
    r.logits.push_back(odd ? anything : Expected{value, error});
  }
  const Expected old = exact(before.peak[at]);
  const Expected now = old.value > peak.value ? old : peak;
  const Expected keep = old.value == kNone ? exact(0.0) : exp_of(add(old, negative(now)));
  const Expected share = peak.value == kNone ? exact(1.0) : exp_of(add(peak, negative(now)));
  const Expected added = mul(total, share);
  const Expected sums = add(mul(exact(before.total[at]), keep), added);
  const auto put = [&](std::vector<Expected>& list, const Expected& value) { list.push_back(odd ? anything : value); };
  put(r.peak, {now.value, peak.error});
  put(r.total, sums);
  put(r.keep, keep);
  put(r.add, added);
  put(r.tile_peak, peak);
  put(r.tile_total, total);
}

void tile(Case& c) {
  Random& random = c.random;
  CrossEntropyTile p = {};
  p.dtype = random.pick(kFloats);
  p.cols = random.one_in(200) ? kCrossEntropyCols : random.one_in(20) ? random.size(1500) : random.size(200);
  p.rows = random.size(p.cols > 500 ? 2 : c.limit(6, 60));
  const Values values = random.pick({Values::mild, Values::mild, Values::wide, Values::special, Values::finite});
  MatrixInput x(random, p.dtype, p.rows, p.cols, values);
  const float factor = values == Values::mild ? random.pick<float>({1.0f, 10.0f, 50.0f}) : 1.0f;
  x.scale(factor);
  const MatrixInput bias(random, DType::f32, 1, p.cols, random.one_in(4) ? values : Values::mild, false);
  const bool has_bias = random.one_in(3), wants_tile = random.one_in(2);
  p.stride = x.stride;
  p.first = random.pick<int64_t>({0, 0, 4096, int64_t(1) << 40});
  p.softcap = random.one_in(3) ? random.pick<float>({1.0f, 15.0f, 30.0f}) : 0.0f;
  p.write = random.one_in(2);
  const Buffer targets(random, p.rows * 8, 8);
  State state;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t label = p.first + (random.one_in(3) ? -1 - random.below(5) : random.below(p.cols + 3));
    targets.data<int64_t>()[i] = label;
    if (label >= p.first && label < p.first + p.cols && random.one_in(4))  // certain of its label
      x.set(i, label - p.first, random.pick<float>({60.0f, 95.0f, 100.0f, 120.0f}));
    else if (random.one_in(12))  // nothing but masked entries
      for (int64_t j = 0; j < p.cols; ++j) x.set(i, j, float(kNone));
    const bool first = random.one_in(3);
    state.peak.push_back(first ? float(kNone) : float(random.unit() * 40.0 - 20.0));
    state.total.push_back(first ? 0.0 : random.unit() * 1000.0);
    state.picked.push_back(random.one_in(2) ? 0.0f : 1.5f);
    state.slope.push_back(random.one_in(2) ? 1.0f : 0.25f);
  }
  c.describe("cross_entropy_tile",
             "%s [%lld, %lld] %s times %g, bias %d, softcap %g, write %d, statistics %d, first %lld",
             dtype_name(p.dtype), ll(p.rows), ll(p.cols), name_of(values), double(factor), has_bias, double(p.softcap),
             p.write, wants_tile, ll(p.first));
  Reference r;
  for (int64_t i = 0; i < p.rows; ++i)
    tile_row(p, x, has_bias ? &bias : nullptr, i, targets.data<int64_t>()[i], state, r);
  const auto logits = rows_of(x, p.rows, p.cols), peak = bytes_of(state.peak), total = bytes_of(state.total),
             picked = bytes_of(state.picked), slope = bytes_of(state.slope);
  const int64_t n = p.rows, tiles = wants_tile ? n : 0;
  c.run({{"logits", p.dtype, n, p.cols, p.stride, !p.write, &r.logits, &logits},
         {"peak", DType::f32, 1, n, n, false, &r.peak, &peak},
         {"total", DType::f64, 1, n, n, false, &r.total, &total},
         {"picked", DType::f32, 1, n, n, false, &r.picked, &picked},
         {"slope", DType::f32, 1, n, n, false, &r.slope, &slope},
         {"keep", DType::f32, 1, n, n, false, &r.keep},
         {"add", DType::f32, 1, n, n, false, &r.add},
         {"tile_peak", DType::f32, 1, tiles, tiles, false, &r.tile_peak},
         {"tile_total", DType::f32, 1, tiles, tiles, false, &r.tile_total}},
        [&](const KernelTable& kernels, void* const* out) {
          CrossEntropyTile q = p;
          const auto floats = [&](int i) { return static_cast<float*>(out[i]); };
          q.logits = out[0], q.bias = has_bias ? static_cast<const float*>(bias.data()) : nullptr;
          q.targets = targets.data<int64_t>();
          q.peak = floats(1), q.total = static_cast<double*>(out[2]), q.picked = floats(3), q.slope = floats(4);
          q.keep = floats(5), q.add = floats(6);
          if (wants_tile) q.tile_peak = floats(7), q.tile_total = floats(8);
          kernels.cross_entropy_tile(q, c.threads);
        });
}

// `count` of the rows [0, bound): each once, or with repetitions.
std::vector<int64_t> draw_rows(Random& random, int64_t count, int64_t bound, bool once) {
  std::vector<int64_t> rows(static_cast<size_t>(once ? bound : count));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = once ? int64_t(i) : random.below(bound);
  for (size_t i = rows.size(); once && i > 1; --i) std::swap(rows[i - 1], rows[size_t(random.below(int64_t(i)))]);
  rows.resize(size_t(count));
  return rows;
}

struct Shape {
  int64_t count, cols;
  Values values;
};

Shape draw_shape(Case& c) {
  const int64_t cols = c.random.size(c.limit(150, 1200));
  return {c.random.size(c.random.one_in(8) ? 100 : 10), cols,
          c.random.pick({Values::whole, Values::mild, Values::wide, Values::special})};
}

void combine(Case& c) {
  Random& random = c.random;
  const Shape s = draw_shape(c);
  RowCombination p = {};
  p.out_dtype = random.pick(kFloats);
  p.x_dtype = random.one_in(2) ? p.out_dtype : DType::f32;
  p.y_dtype = p.out_dtype == DType::f32 ? random.pick(kFloats) : p.out_dtype;
  const bool has_y = random.one_in(2), has_rows = random.one_in(2);
  // x may be where the result goes.
  const bool in_place = !has_rows && p.x_dtype == p.out_dtype && random.one_in(2);
  const MatrixInput x(random, p.x_dtype, s.count, s.cols, s.values), y(random, p.y_dtype, s.count, s.cols, s.values),
      a(random, DType::f32, 1, s.count + 1, s.values, false), b(random, DType::f32, 1, s.count + 1, s.values, false);
  const int64_t out_rows = s.count + (has_rows ? random.below(4) : 0);
  const MatrixInput old(random, p.out_dtype, out_rows, s.cols, s.values, false);
  p.a_step = random.below(2), p.b_step = random.below(2);
  const bool a_zero = random.one_in(4);  // then x is not read
  const float none = 0.0f;
  const auto rows = draw_rows(random, s.count, out_rows, true);
  const Buffer row_memory(random, s.count * 8, 8);
  for (int64_t i = 0; i < s.count; ++i) row_memory.data<int64_t>()[i] = rows[size_t(i)];
  p.out_stride = s.cols + (random.one_in(3) ? random.between(1, 20) : 0);
  c.describe("combine_rows", "%s from %s and %s %d, [%lld, %lld] %s, steps %lld %lld, rows %d, in place %d, a zero %d",
             dtype_name(p.out_dtype), dtype_name(p.x_dtype), dtype_name(p.y_dtype), has_y, ll(s.count), ll(s.cols),
             name_of(s.values), ll(p.a_step), ll(p.b_step), has_rows, in_place, a_zero);
  std::vector<Expected> expected;
  std::vector<char> initial = in_place ? rows_of(x, s.count, s.cols) : rows_of(old, out_rows, s.cols);
  for (int64_t i = 0; i < out_rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j) expected.push_back(exact(old.at(i, j)));
  for (int64_t i = 0; i < s.count; ++i)
    for (int64_t j = 0; j < s.cols; ++j) {
      const double factor = a_zero ? 0.0 : a.at(0, i * p.a_step);
      Sum sum;
      sum.add(factor, factor == 0.0 ? 0.0 : x.at(i, j));
      if (has_y) sum.add(b.at(0, i * p.b_step), y.at(i, j));
      expected[size_t((has_rows ? rows[size_t(i)] : i) * s.cols + j)] = sum.expected();
    }
  c.run({{"out", p.out_dtype, out_rows, s.cols, p.out_stride, false, &expected, &initial}},
        [&](const KernelTable& kernels, void* const* out) {
          RowCombination q = p;
          q.out = out[0], q.count = s.count, q.cols = s.cols;
          if (has_rows) q.rows = row_memory.data<int64_t>();
          q.x = in_place ? out[0] : x.data(), q.x_stride = in_place ? p.out_stride : x.stride;
          q.a = a_zero ? &none : static_cast<const float*>(a.data());
          if (a_zero) q.a_step = 0;
          q.b = static_cast<const float*>(b.data());
          if (has_y) q.y = y.data(), q.y_stride = y.stride;
          kernels.combine_rows(q, c.threads);
        });
}

void add_rows(Case& c, bool at_rows) {
  Random& random = c.random;
  const Shape s = draw_shape(c);
  RowCombination p = {};
  p.y_dtype = random.pick(kFloats);
  const int64_t out_rows = at_rows ? 1 + random.below(6) : 1;
  const MatrixInput y(random, p.y_dtype, s.count, s.cols, s.values),
      b(random, DType::f32, 1, s.count + 1, s.values, false),
      old(random, DType::f32, out_rows, s.cols, s.values, false);
  p.b_step = random.below(2);
  const auto rows = draw_rows(random, s.count, out_rows, false);
  const Buffer row_memory(random, s.count * 8, 8);
  for (int64_t i = 0; i < s.count; ++i) row_memory.data<int64_t>()[i] = rows[size_t(i)];
  p.out_stride = s.cols + (at_rows && random.one_in(3) ? random.between(1, 20) : 0);
  c.describe(at_rows ? "add_rows_at" : "weighted_column_sums", "%s [%lld, %lld] to %lld rows, %s, step %lld",
             dtype_name(p.y_dtype), ll(s.count), ll(s.cols), ll(out_rows), name_of(s.values), ll(p.b_step));
  std::vector<Sum> sums(size_t(out_rows * s.cols), Sum{});
  for (int64_t i = 0; i < out_rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j) sums[size_t(i * s.cols + j)].add(old.at(i, j));
  for (int64_t i = 0; i < s.count; ++i)
    for (int64_t j = 0; j < s.cols; ++j)
      sums[size_t((at_rows ? rows[size_t(i)] : 0) * s.cols + j)].add(b.at(0, i * p.b_step), y.at(i, j));
  std::vector<Expected> expected;
  for (const Sum& sum : sums) expected.push_back(sum.expected());
  const auto initial = rows_of(old, out_rows, s.cols);
  c.run({{"out", DType::f32, out_rows, s.cols, p.out_stride, false, &expected, &initial}},
        [&](const KernelTable& kernels, void* const* out) {
          RowCombination q = p;
          q.out = out[0], q.count = s.count, q.cols = s.cols;
          if (at_rows) q.rows = row_memory.data<int64_t>();
          q.y = y.data(), q.y_stride = y.stride, q.b = static_cast<const float*>(b.data());
          (at_rows ? kernels.add_rows_at : kernels.weighted_column_sums)(q, c.threads);
        });
}

const Fault kFaults[] = {
    {"a label of the next entry", false,
     [](KernelTable& table) {
       table.cross_entropy_tile = [](const CrossEntropyTile& p, int threads) {
         CrossEntropyTile other = p;
         ++other.first;
         scalar::table.cross_entropy_tile(other, threads);
       };
     }},
    {"a tile of one column too many", true,
     [](KernelTable& table) {
       table.cross_entropy_tile = [](const CrossEntropyTile& p, int threads) {
         CrossEntropyTile wider = p;
         if (p.stride == p.cols && p.cols < kCrossEntropyCols) ++wider.cols;
         scalar::table.cross_entropy_tile(wider, threads);
       };
     }},
    {"a repeated row is added once", false,
     [](KernelTable& table) {
       table.add_rows_at = [](const RowCombination& p, int threads) {
         RowCombination fewer = p;
         if (p.count > 1 && p.rows[p.count - 1] == p.rows[p.count - 2]) --fewer.count;
         scalar::table.add_rows_at(fewer, threads);
       };
     }},
};

}  // namespace

const Op kLinearCrossEntropy = {
    "linear_cross_entropy",
    6,
    {tile, tile, combine, [](Case& c) { add_rows(c, true); }, [](Case& c) { add_rows(c, false); }},
    {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
