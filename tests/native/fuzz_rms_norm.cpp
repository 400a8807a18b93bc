#include <cstring>

#include "steps.h"

namespace pyfinetune {
namespace fuzz {

namespace {

// x + residual is one addition in float32, which is then rounded to the dtype.
float total_of(DType dtype, double x, double residual) {
  uint32_t bits = 0;
  store(dtype, &bits, 0, float(x) + float(residual));
  return load(dtype, &bits, 0);
}

// 1 / sqrt(squares / cols + eps): four operations, each rounded; the sum of squares is bounded by Sum.
Expected rstd_of(const Sum& squares, int64_t cols, float eps) {
  const Expected sum = squares.expected();
  if (is_nan(sum)) return sum;
  const Expected mean = add(rounded(sum.value / double(cols), sum.error / double(cols)), exact(eps));
  if (!(mean.error < mean.value)) return {0.0, kAnything};
  const double low = std::sqrt(mean.value - mean.error), root = std::sqrt(mean.value),
               high = std::sqrt(mean.value + mean.error);
  return rounded(1.0 / root, (1.0 / low - 1.0 / root) + (1.0 / root - 1.0 / high) + 2 * kUnit / low);
}

Values any(Random& random) { return random.pick({Values::whole, Values::mild, Values::wide, Values::special}); }

void rms_norm(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats), weight_dtype = random.one_in(2) ? dtype : random.pick(kFloats);
  const int64_t cols = 1 + random.size(random.one_in(30) ? 5000 : 300);
  const int64_t rows = 1 + random.size(cols > 300 ? 3 : c.limit(12, 200));
  const Values values = any(random);
  const bool has_residual = random.one_in(2);
  const RowsInput x(random, dtype, rows, cols, values), residual(random, dtype, rows, cols, values);
  const MatrixInput weight(random, weight_dtype, 1, cols, values == Values::whole ? values : Values::mild, false);
  const float eps = random.pick<float>({1e-6f, 1e-5f, 0.0f, 1e-30f, 1.0f}), offset = random.pick<float>({0.0f, 1.0f});
  c.describe("rms_norm", "%s [%lld, %lld] %s, %d dims, weight %s, residual %d, eps %g, offset %g", dtype_name(dtype),
             ll(rows), ll(cols), name_of(values), x.view.ndim, dtype_name(weight_dtype), has_residual, double(eps),
             double(offset));
  std::vector<Expected> y, totals, rstds;
  for (int64_t i = 0; i < rows; ++i) {
    Sum squares;
    for (int64_t j = 0; j < cols; ++j) {
      const double sum = has_residual ? total_of(dtype, x.at(i, j), residual.at(i, j)) : x.at(i, j);
      squares.add(sum, sum);
      totals.push_back(exact(sum));
    }
    rstds.push_back(rstd_of(squares, cols, eps));
    for (int64_t j = 0; j < cols; ++j) {
      const Expected gain = add(exact(offset), exact(weight.at(0, j)));
      y.push_back(mul(mul(totals[size_t(i * cols + j)], rstds.back()), gain));
    }
  }
  // Where the sum of squares is exact, all tables do the same operations.
  const bool whole = values == Values::whole;
  c.run({{"y", dtype, rows, cols, cols, whole, &y},
         {"rstd", DType::f32, 1, rows, rows, whole, &rstds},
         {"total", dtype, has_residual ? rows : 0, cols, cols, true, &totals}},
        [&](const KernelTable& kernels, void* const* out) {
          const Buffer gain(random, cols * 4, 4);
          RmsNorm p = {};
          p.x = x.view;
          p.residual.ndim = 1;
          if (has_residual) p.residual = residual.view, p.total = out[2];
          p.weight = weight.data(), p.eps = eps, p.offset = offset, p.gain = gain.data<float>();
          p.y = out[0], p.rstd = static_cast<float*>(out[1]);
          p.rows = rows, p.cols = cols, p.dtype = dtype, p.weight_dtype = weight_dtype;
          kernels.rms_norm(p, c.threads);
        });
}

void rms_norm_bwd(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats), weight_dtype = random.one_in(2) ? dtype : random.pick(kFloats);
  const int64_t cols = 1 + random.size(random.one_in(30) ? 5000 : 200);
  const int64_t rows = random.size(cols > 200 ? 3 : random.one_in(6) || c.threads > 1 ? 150 : 12);
  const Values values = random.pick({Values::mild, Values::wide, Values::special});
  const bool has_sum = random.one_in(2), wants_weight = random.one_in(2), wants_x = !wants_weight || !random.one_in(4);
  const RowsInput x(random, dtype, rows, cols, values), dout(random, dtype, rows, cols, values),
      dsum(random, dtype, rows, cols, values);
  const MatrixInput weight(random, weight_dtype, 1, cols, Values::mild, false);
  const MatrixInput rstd(random, DType::f32, 1, rows, random.one_in(8) ? values : Values::mild, false);
  const float offset = random.pick<float>({0.0f, 1.0f});
  const int64_t unit_rows = random.one_in(2) ? kRmsNormChunk : random.between(1, 80);
  const int64_t units = (rows + unit_rows - 1) / unit_rows;
  c.describe("rms_norm_bwd", "%s [%lld, %lld] %s, weight %s, dsum %d, dx %d, dweight %d, units of %lld, offset %g",
             dtype_name(dtype), ll(rows), ll(cols), name_of(values), dtype_name(weight_dtype), has_sum, wants_x,
             wants_weight, ll(unit_rows), double(offset));
  std::vector<Expected> dx, dweight;
  std::vector<Sum> sums(size_t(cols), Sum{});
  for (int64_t i = 0; i < rows; ++i) {
    const Expected r = exact(rstd.at(0, i));
    std::vector<Expected> normal, scaled;
    Sum dot;
    for (int64_t j = 0; j < cols; ++j) {
      const Expected gain = add(exact(offset), exact(weight.at(0, j))), xj = exact(x.at(i, j));
      normal.push_back(mul(xj, r));
      scaled.push_back(mul(exact(dout.at(i, j)), gain));
      const Expected term = mul(scaled.back(), xj), part = mul(exact(dout.at(i, j)), normal.back());
      dot.add(term.value, 1.0, term.error);
      sums[size_t(j)].add(part.value, 1.0, part.error);
    }
    const Expected product = mul(dot.expected(), r);
    const Expected mean =
        is_nan(product) ? product : rounded(product.value / double(cols), product.error / double(cols));
    for (int64_t j = 0; j < cols; ++j) {
      const Expected inner = add(scaled[size_t(j)], negative(mul(normal[size_t(j)], mean)));
      const Expected grad = mul(r, inner);
      dx.push_back(has_sum ? add(grad, exact(dsum.at(i, j))) : grad);
    }
  }
  for (const Sum& sum : sums) dweight.push_back(sum.expected());
  c.run({{"dx", dtype, wants_x ? rows : 0, cols, cols, false, &dx},
         {"dweight", weight_dtype, wants_weight ? 1 : 0, cols, cols, false, &dweight}},
        [&](const KernelTable& kernels, void* const* out) {
          const Buffer gain(random, cols * 4, 4), scratch(random, wants_weight ? units * 2 * cols * 4 : 0, 4);
          RmsNormBwd p = {};
          p.x = x.view, p.dout = dout.view;
          p.dsum.ndim = 1;
          // An empty tensor may have no data.
          if (has_sum) p.dsum = dsum.view;
          p.weight = weight.data(), p.rstd = static_cast<const float*>(rstd.data()), p.offset = offset;
          p.gain = gain.data<float>(), p.scratch = scratch.data<float>();
          p.dx = wants_x ? out[0] : nullptr;
          p.dweight = wants_weight ? out[1] : nullptr;
          p.rows = rows, p.cols = cols, p.units = units, p.unit_rows = unit_rows;
          p.dtype = dtype, p.weight_dtype = weight_dtype;
          kernels.rms_norm_bwd(p, c.threads);
        });
}

const Fault kFaults[] = {
    {"a norm without its epsilon", false,
     [](KernelTable& table) {
       table.rms_norm = [](const RmsNorm& p, int threads) {
         RmsNorm other = p;
         other.eps *= 0.5f;
         scalar::table.rms_norm(other, threads);
       };
     }},
    {"a norm of one row too many", true,
     [](KernelTable& table) {
       table.rms_norm = [](const RmsNorm& p, int threads) {
         RmsNorm taller = p;
         ++taller.rows;
         scalar::table.rms_norm(taller, threads);
       };
     }},
    {"the weight's gradient leaves out the last row", false,
     [](KernelTable& table) {
       table.rms_norm_bwd = [](const RmsNormBwd& p, int threads) {
         RmsNormBwd shorter = p;
         if (p.dweight && !p.dx && p.rows > 1) --shorter.rows;
         scalar::table.rms_norm_bwd(shorter, threads);
       };
     }},
};

}  // namespace

const Op kRmsNorm = {"rms_norm", 6, {rms_norm, rms_norm_bwd}, {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
