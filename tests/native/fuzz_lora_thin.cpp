#include <cstring>

#include "steps.h"

namespace pyfinetune {
namespace fuzz {

namespace {

// An adapter [k, n], contiguous along either side. Tables with a bf16 dot product round it to bf16.
class Adapter {
 public:
  Adapter(Random& random, DType x_dtype, int64_t k, int64_t n, Values values)
      : along_k_(random.one_in(2)),
        rows_(random, random.one_in(2) ? x_dtype : random.pick(kFloats), along_k_ ? n : k, along_k_ ? k : n, values),
        rounds_(x_dtype == DType::bf16 && rows_.dtype != DType::bf16) {}
  ThinOperand operand() const {
    return {rows_.data(), rows_.dtype, along_k_ ? 1 : rows_.stride, along_k_ ? rows_.stride : 1};
  }
  // Adds x times the element (k, n).
  void add(Sum& sum, double x, int64_t k, int64_t n) const {
    const double a = along_k_ ? rows_.at(n, k) : rows_.at(k, n);
    double error = 0.0;
    // To eight bits; the largest may round to infinity, the smallest to zero.
    if (rounds_ && std::isfinite(a))
      error = std::fabs(a) < 0x1p127 ? std::fabs(x) * (std::fabs(a) * 0x1p-8 + kTiny) : kAnything;
    sum.add(x, a, error);
  }
  const char* dtype() const { return dtype_name(rows_.dtype); }

 private:
  const bool along_k_;
  const MatrixInput rows_;
  const bool rounds_;
};

// A bit for each of n elements, and four bytes behind them.
class Mask {
 public:
  Mask(Random& random, int64_t n) : some_(random.one_in(2)), bytes_(random, some_ ? (n + 7) / 8 + 4 : 0, 1) {}
  const uint8_t* data() const { return some_ ? bytes_.data<uint8_t>() : nullptr; }
  bool keeps(int64_t i) const { return !some_ || (data()[i >> 3] >> (i & 7) & 1); }

 private:
  const bool some_;
  const Buffer bytes_;
};

// What the binding lends the kernels.
Buffer* scratch(Random& random, int64_t k, int64_t n) {
  return new Buffer(random, (thin_scratch(k, n) + 63) / 64 * 64, 64);
}
using Scratch = std::unique_ptr<Buffer>;

Values any(Random& random) { return random.pick({Values::whole, Values::mild, Values::wide, Values::special}); }
// A power of two where sums are exact, so that they stay it.
float scale_of(Random& random, Values values) {
  return values == Values::whole ? random.pick<float>({1.0f, -2.0f, 0.5f}) : random.pick<float>({1.0f, 0.3f, -2.5f});
}
int64_t depth(Random& random) { return random.one_in(12) ? random.between(200, 700) : random.size(70); }
int64_t rank(Random& random) { return 1 + (random.one_in(12) ? random.size(150) : random.size(33)); }

void mask(Case& c) {
  Random& random = c.random;
  const int64_t n = random.size(c.limit(2000, 20000));
  const double p = random.pick<double>({0.0, 0x1p-32, 0.1, 0.5, 0.9, 1.0 - 0x1p-53, random.unit()});
  const uint64_t seed = random.pick<uint64_t>({0, 1, uint64_t(1) << 63, ~uint64_t(0), random.bits()});
  const Buffer ones(random, n * 4, 4);
  for (int64_t i = 0; i < n; ++i) store(DType::f32, ones.data(), i, 1.0f);
  c.describe("dropout_mask", "%lld elements, p %.17g, seed %llu", ll(n), p, static_cast<unsigned long long>(seed));
  const int64_t bytes = (n + 7) / 8;
  c.run({{"mask", DType::u8, 1, bytes, bytes, true}, {"dropped", DType::f32, 1, n, n, true}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.dropout_mask(static_cast<uint8_t*>(out[0]), n, p, seed, c.threads);
          kernels.dropout(ones.data(), out[1], DType::f32, n, p, seed, c.threads);
          for (int64_t i = 0; i < n; ++i) {
            const bool kept = static_cast<const uint8_t*>(out[0])[i >> 3] >> (i & 7) & 1;
            if (kept != (load(DType::f32, out[1], i) != 0.0f)) throw Difference{"the mask is not dropout's"};
          }
        });
}

void thin_down(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats), out_dtype = random.one_in(2) ? dtype : DType::f32;
  const int64_t m = 1 + random.size(c.limit(30, 100)), k = depth(random),
                r = k > 100 ? 1 + random.size(20) : rank(random);
  const Values values = any(random);
  const MatrixInput x(random, dtype, m, k, values);
  const Adapter a(random, dtype, k, r, values);
  const Mask mask(random, m * k);
  const float scale = scale_of(random, values);
  const int64_t stride = r + (random.one_in(3) ? random.between(1, 20) : 0);
  c.describe("thin_down", "%s to %s, m %lld, k %lld, r %lld, adapter %s, mask %d, %s", dtype_name(dtype),
             dtype_name(out_dtype), ll(m), ll(k), ll(r), a.dtype(), mask.data() != nullptr, name_of(values));
  std::vector<Expected> expected;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < r; ++j) {
      Sum sum(dtype == DType::bf16);
      for (int64_t l = 0; l < k; ++l) a.add(sum, mask.keeps(i * k + l) ? x.at(i, l) : 0.0, l, j);
      expected.push_back(flushed(mul(exact(scale), sum.expected()), out_dtype));
    }
  c.run({{"out", out_dtype, m, r, stride, values == Values::whole, &expected}},
        [&](const KernelTable& kernels, void* const* out) {
          const Scratch packed(scratch(random, k, r));
          kernels.thin_down({x.data(), x.stride, m, k, r, a.operand(), mask.data(), scale, out[0], stride, dtype,
                             out_dtype, packed->data()},
                            c.threads);
        });
}

void thin_up(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int64_t m = 1 + random.size(c.limit(30, 100)), n = 1 + random.size(100),
                r = random.one_in(20) ? depth(random) : rank(random) - 1;
  const Values values = any(random);
  const MatrixInput s(random, dtype, m, r, values), inner(random, dtype, m, n, values),
      base(random, dtype, m, n, values), bias(random, dtype, 1, n, values, false),
      factor(random, DType::f32, 1, n, values, false);
  const Adapter b(random, dtype, r, n, values);
  const Mask mask(random, m * n);
  const float scale = scale_of(random, values);
  const bool dora = random.one_in(2), has_base = random.one_in(2), has_bias = random.one_in(2),
             wants_z = dora && random.one_in(2);
  // y may be where the inner product is, or z may.
  const int in_place = random.one_in(2) ? 0 : wants_z && random.one_in(2) ? 2 : 1;
  const int64_t y_stride = n + (random.one_in(3) ? random.between(1, 20) : 0);
  c.describe("thin_up",
             "%s, m %lld, r %lld, n %lld, adapter %s, mask %d, dora %d, base %d, bias %d, z %d, in place %d, %s",
             dtype_name(dtype), ll(m), ll(r), ll(n), b.dtype(), mask.data() != nullptr, dora, has_base, has_bias,
             wants_z, in_place, name_of(values));
  std::vector<Expected> y, zs;
  std::vector<char> initial(size_t(m * n * item_size(dtype)));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Sum sum(dtype == DType::bf16);
      for (int64_t l = 0; l < r; ++l) b.add(sum, s.at(i, l), l, j);
      const Expected add_to = exact(inner.at(i, j));
      const Expected update = mask.keeps(i * n + j) ? mul(exact(scale), sum.expected()) : exact(0.0);
      const Expected z = add(add_to, update);
      Expected result = z;
      if (dora) {
        result = mul(exact(factor.at(0, j)), z);
        if (has_base) result = add(result, add(exact(base.at(i, j)), negative(add_to)));
        if (has_bias) result = add(result, exact(bias.at(0, j)));
      }
      zs.push_back(flushed(z, dtype));
      y.push_back(flushed(result, dtype));
      store(dtype, initial.data(), i * n + j, float(inner.at(i, j)));
    }
  const bool same = values == Values::whole;
  c.run({{"y", dtype, m, n, y_stride, same, &y, in_place == 1 ? &initial : nullptr},
         {"z", dtype, wants_z ? m : 0, n, n, same, &zs, in_place == 2 ? &initial : nullptr}},
        [&](const KernelTable& kernels, void* const* out) {
          const Scratch packed(scratch(random, r, n));
          ThinUp p = {};
          p.s = s.data(), p.s_stride = s.stride, p.m = m, p.r = r, p.n = n, p.b = b.operand();
          p.mask = mask.data(), p.scale = scale, p.dtype = dtype, p.packed = packed->data();
          p.add = in_place == 1 ? out[0] : in_place == 2 ? out[1] : inner.data();
          p.add_stride = in_place == 1 ? y_stride : in_place == 2 ? n : inner.stride;
          p.y = out[0], p.y_stride = y_stride;
          if (dora) p.factor = static_cast<const float*>(factor.data());
          if (dora && has_base) p.base = base.data(), p.base_stride = base.stride;
          if (dora && has_bias) p.bias = bias.data();
          if (wants_z) p.z = out[1], p.z_stride = n;
          kernels.thin_up(p, c.threads);
        });
}

void thin_outer(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats), out_dtype = random.pick(kFloats);
  // x is taken in slices of 128 rows.
  const int64_t m = random.one_in(12) ? random.between(100, 300) : random.size(40);
  const int64_t r = m > 100 ? 1 + random.size(10) : rank(random), n = 1 + random.size(m > 100 ? 40 : c.limit(100, 400));
  const Values values = any(random);
  const MatrixInput t(random, dtype, m, r, values), x(random, dtype, m, n, values);
  const Mask mask(random, m * n);
  const float scale = scale_of(random, values);
  const bool transposed = random.one_in(2);
  const int64_t rows = transposed ? n : r, cols = transposed ? r : n;
  const int64_t stride = cols + (random.one_in(3) ? random.between(1, 20) : 0);
  c.describe("thin_outer", "%s to %s, m %lld, r %lld, n %lld, mask %d, transposed %d, %s", dtype_name(dtype),
             dtype_name(out_dtype), ll(m), ll(r), ll(n), mask.data() != nullptr, transposed, name_of(values));
  std::vector<Expected> expected;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t ri = transposed ? j : i, ni = transposed ? i : j;
      Sum sum(dtype == DType::bf16);
      for (int64_t l = 0; l < m; ++l) sum.add(t.at(l, ri), mask.keeps(l * n + ni) ? x.at(l, ni) : 0.0);
      expected.push_back(flushed(mul(exact(scale), sum.expected()), out_dtype));
    }
  c.run({{"out", out_dtype, rows, cols, stride, values == Values::whole, &expected}},
        [&](const KernelTable& kernels, void* const* out) {
          const Scratch packed(scratch(random, m, r)), sums(scratch(random, r, n));
          kernels.thin_outer(
              {t.data(), t.stride, m, r, n, x.data(), x.stride, mask.data(), scale, out[0], transposed ? 1 : stride,
               transposed ? stride : 1, dtype, out_dtype, packed->data(), sums->data<float>()},
              c.threads);
        });
}

// ||w + s b A||: the products of w with the adapter and with itself are float sums, the rest is in double; what is
// negative by rounding counts as 0.
void dora_norms(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int64_t n = 1 + random.size(c.limit(20, 80)), k = depth(random), r = 1 + random.size(k > 100 ? 8 : 40);
  const Values values = random.pick({Values::whole, Values::mild, Values::special});
  const MatrixInput w(random, dtype, n, k, values), b(random, DType::f32, n, r, values, false),
      gram(random, DType::f32, r, r, values, false);
  const Adapter a(random, dtype, k, r, values);
  const double scaling = random.pick<double>({1.0, 0.5, 2.0, -0.1});
  c.describe("dora_norms", "%s, n %lld, k %lld, r %lld, adapter %s, scaling %g, %s", dtype_name(dtype), ll(n), ll(k),
             ll(r), a.dtype(), scaling, name_of(values));
  std::vector<Expected> norms;
  for (int64_t i = 0; i < n; ++i) {
    Sum square(dtype == DType::bf16);
    for (int64_t l = 0; l < k; ++l) square.add(w.at(i, l), w.at(i, l));
    const Expected first = square.expected();
    double value = first.value, error = first.error, magnitude = std::fabs(first.value), largest = 0.0, weights = 0.0;
    for (int64_t j = 0; j < r; ++j) {
      Sum cross(dtype == DType::bf16);
      for (int64_t l = 0; l < k; ++l) a.add(cross, w.at(i, l), l, j);
      const Expected x = cross.expected();
      const double factor = 2.0 * scaling * b.at(i, j);
      value += factor * x.value;
      magnitude += std::fabs(factor * x.value);
      error += std::fabs(factor) * x.error;
      double inner = std::fabs(2.0 * x.value);
      for (int64_t l = 0; l < r; ++l) {
        const double term = scaling * scaling * b.at(i, j) * b.at(i, l) * gram.at(l, j);
        value += term;
        magnitude += std::fabs(term);
        inner += std::fabs(2.0 * b.at(i, l) * gram.at(l, j));
      }
      largest = std::max(largest, inner);
      weights += std::fabs(b.at(i, j));
    }
    // Each term goes through r additions for its column, r for all columns, and a handful of other roundings; what
    // underflows within a column is multiplied by a weight afterwards.
    error += magnitude * double(2 * r + 8) * 0x1p-24 + weights * double(r + 2) * 0x1p-148;
    if (!(std::max(magnitude + error, largest) < 0x1p126)) {
      norms.push_back({0.0, kAnything});
      continue;
    }
    const double root = std::sqrt(std::max(value, 0.0)), high = std::sqrt(std::max(value + error, 0.0)),
                 low = std::sqrt(std::max(value - error, 0.0));
    norms.push_back(rounded(root, std::max(high - root, root - low)));
  }
  c.run({{"norms", DType::f32, 1, n, n, values == Values::whole && scaling >= 0.5, &norms}},
        [&](const KernelTable& kernels, void* const* out) {
          const Scratch packed(scratch(random, k, r)), cross(scratch(random, n, r));
          kernels.dora_norms({w.data(), w.stride, n, k, r, a.operand(), static_cast<const float*>(b.data()),
                              static_cast<const float*>(gram.data()), scaling, static_cast<float*>(out[0]),
                              cross->data<float>(), dtype, packed->data()},
                             c.threads);
        });
}

void dora_grad(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int64_t n = 1 + random.size(c.limit(70, 700)), m = random.one_in(6) ? random.between(60, 200) : random.size(20);
  const Values values = any(random);
  const MatrixInput dout(random, dtype, m, n, values), z(random, dtype, m, n, values, false),
      factor(random, DType::f32, 1, n, values, false);
  const bool wants_dz = random.one_in(2), wants_g = !wants_dz || random.one_in(2);
  c.describe("dora_grad", "%s [%lld, %lld], g %d, dz %d, %s", dtype_name(dtype), ll(m), ll(n), wants_g, wants_dz,
             name_of(values));
  std::vector<Expected> g, dz;
  std::vector<Sum> sums(size_t(n), Sum{});
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      g.push_back(flushed(mul(exact(dout.at(i, j)), exact(factor.at(0, j))), dtype));
      sums[size_t(j)].add(dout.at(i, j), z.at(i, j));
    }
  for (const Sum& sum : sums) dz.push_back(sum.expected());
  const bool whole = values == Values::whole;
  c.run({{"g", dtype, wants_g ? m : 0, n, n, whole, &g}, {"dz", DType::f32, wants_dz ? 1 : 0, n, n, whole, &dz}},
        [&](const KernelTable& kernels, void* const* out) {
          const Buffer partial(random, wants_dz ? (m + kDoraBlock - 1) / kDoraBlock * n * 4 : 0, 4);
          DoraGrad p = {};
          p.dout = dout.data(), p.dout_stride = dout.stride, p.m = m, p.n = n, p.dtype = dtype;
          p.factor = static_cast<const float*>(factor.data());
          if (wants_g) p.g = out[0];
          if (wants_dz) p.z = z.data(), p.dz = static_cast<float*>(out[1]), p.partial = partial.data<float>();
          // An empty z is still one.
          static float none;
          if (wants_dz && !p.z) p.z = &none;
          kernels.dora_grad(p, c.threads);
        });
}

const Fault kFaults[] = {
    {"the mask begins a bit late", false,
     [](KernelTable& table) {
       table.dropout_mask = [](uint8_t* mask, int64_t n, double p, uint64_t seed, int threads) {
         scalar::table.dropout_mask(mask, n, p, seed, threads);
         if (n > 64) mask[8] ^= 1;
       };
     }},
    {"a product leaves out its last column", false,
     [](KernelTable& table) {
       table.thin_down = [](const ThinDown& p, int threads) {
         ThinDown shorter = p;
         if (p.k > 0 && !p.mask) --shorter.k;
         scalar::table.thin_down(shorter, threads);
       };
     }},
    {"an update of one row too many", true,
     [](KernelTable& table) {
       table.thin_up = [](const ThinUp& p, int threads) {
         ThinUp taller = p;
         ++taller.m;
         scalar::table.thin_up(taller, threads);
       };
     }},
    {"what is masked counts", false,
     [](KernelTable& table) {
       table.thin_outer = [](const ThinOuter& p, int threads) {
         ThinOuter other = p;
         other.mask = nullptr;
         scalar::table.thin_outer(other, threads);
       };
     }},
    {"a norm without its cross terms", false,
     [](KernelTable& table) {
       table.dora_norms = [](const DoraNorms& p, int threads) {
         DoraNorms other = p;
         other.scaling = 0.0;
         scalar::table.dora_norms(other, threads);
       };
     }},
};

}  // namespace

const Op kLoraThin = {"lora_thin",
                      6,
                      {mask, thin_down, thin_up, thin_outer, dora_norms, dora_grad},
                      {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
