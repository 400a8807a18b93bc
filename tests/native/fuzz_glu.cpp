#include "steps.h"

namespace pyfinetune {
namespace fuzz {

namespace {

struct Activated {
  Expected value, slope;
};

// The factors of s = sigmoid(u), or of the normal distribution, are bounded by these shares: in float32 an exponential
// (kMathUnit) and a reciprocal, polynomials and products of about as much; in 16 bits the rough functions, of 13 bits
// each, of which two are multiplied.
double share_of(DType dtype) { return dtype == DType::f32 ? 8 * kMathUnit : 0x1p-12; }

// An inner function u that is off by d makes e^-u off by the share d, s by (1 - s) d and 1 - s by s d. Below the normal
// numbers s may be 0, and then 1 - s, which is made of it, is too.
Activated by_sigmoid(DType dtype, double x, const Expected& u, const Expected& steepness) {
  const double share = share_of(dtype), s = 1.0 / (1.0 + std::exp(-u.value)), other = 1.0 / (1.0 + std::exp(u.value));
  const double off = std::expm1(std::min(u.error + std::fabs(u.value) * kUnit, 100.0));
  const Expected sigmoid = {s, s * (share + other * off) + kTiny};
  const Expected complement = {other, other * (share + s * off) + kTiny + (s < 4 * kTiny ? 1.0 : 0.0)};
  const Expected value = mul(exact(x), sigmoid);
  return {value, add(mul(mul(value, steepness), complement), sigmoid)};
}

Activated activate(DType dtype, Activation activation, double x) {
  const Expected nothing = {x, std::isnan(x) ? 0.0 : kAnything};
  if (!std::isfinite(x)) return {nothing, nothing};
  if (activation == Activation::silu) return by_sigmoid(dtype, x, exact(x), exact(1.0));
  if (activation == Activation::gelu_tanh) {
    // The constants are rounded, too.
    const double linear = 2.0 * std::sqrt(2.0 / M_PI), cubic = linear * 0.044715;
    const Expected l = {linear, 2 * kUnit * linear}, k = {cubic, 2 * kUnit * cubic},
                   k3 = {3 * cubic, 8 * kUnit * cubic};
    const Expected square = mul(exact(x), exact(x)), u = mul(exact(x), add(mul(square, k), l));
    const Activated result = by_sigmoid(dtype, x, u, add(mul(square, k3), l));
    if (u.error < kAnything) return result;
    // Where u overflows the function is 0 or x all the same; the slope is not.
    return {x < 0 ? Expected{0.0, kTiny} : exact(x), nothing};
  }
  // The density's exponent x^2 / 2 is rounded, which makes e^(-x^2 / 2) off by as much again.
  const double square = std::min(x * x, 1e4), share = share_of(dtype) + std::expm1(2 * square * kUnit);
  const double p = 0.5 * std::erfc(-x / std::sqrt(2.0)), d = std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI);
  const double tail = std::min(p, 1.0 - p);
  const Expected cumulative = {p, x < 0 ? p * share + kTiny : tail * share + 4 * kMathUnit + kTiny};
  const Expected density = {d, d * share + kTiny};
  return {mul(exact(x), cumulative), add(mul(exact(x), density), cumulative)};
}

struct Shape {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  Values values;
};

const char* name_of(Activation activation) {
  return activation == Activation::silu ? "silu" : activation == Activation::gelu ? "gelu" : "gelu_tanh";
}

Shape draw_shape(Case& c) {
  Random& random = c.random;
  Shape s = {};
  s.dtype = random.pick(kFloats);
  s.activation = random.pick({Activation::silu, Activation::gelu_tanh, Activation::gelu});
  // Rows are cut into pieces of 2^14 columns.
  s.cols = 1 + (random.one_in(300) ? random.between(16000, 40000) : random.size(200));
  s.rows = s.cols > 200 ? random.between(1, 2) : random.size(c.limit(8, 100));
  s.values = random.pick({Values::mild, Values::mild, Values::wide, Values::special});
  return s;
}

// Gates lie where the functions are neither 0 nor the identity, and beyond.
void spread(Random& random, RowsInput& gate, Values values) {
  if (values == Values::mild) gate.scale(random.pick<float>({1.0f, 4.0f, 16.0f, 64.0f}));
}

void glu(Case& c) {
  const Shape s = draw_shape(c);
  RowsInput gate(c.random, s.dtype, s.rows, s.cols, s.values);
  spread(c.random, gate, s.values);
  const RowsInput up(c.random, s.dtype, s.rows, s.cols, s.values);
  c.describe("glu", "%s %s [%lld, %lld] %s", dtype_name(s.dtype), name_of(s.activation), ll(s.rows), ll(s.cols),
             fuzz::name_of(s.values));
  std::vector<Expected> expected;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j)
      expected.push_back(mul(activate(s.dtype, s.activation, gate.at(i, j)).value, exact(up.at(i, j))));
  c.run({{"out", s.dtype, s.rows, s.cols, s.cols, false, &expected}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.glu({gate.view, up.view, out[0], s.rows, s.cols, s.activation, s.dtype}, c.threads);
        });
}

void glu_bwd(Case& c) {
  const Shape s = draw_shape(c);
  RowsInput gate(c.random, s.dtype, s.rows, s.cols, s.values);
  spread(c.random, gate, s.values);
  const RowsInput up(c.random, s.dtype, s.rows, s.cols, s.values), dout(c.random, s.dtype, s.rows, s.cols, s.values);
  c.describe("glu_bwd", "%s %s [%lld, %lld] %s", dtype_name(s.dtype), name_of(s.activation), ll(s.rows), ll(s.cols),
             fuzz::name_of(s.values));
  std::vector<Expected> dgate, dup;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j) {
      const Activated a = activate(s.dtype, s.activation, gate.at(i, j));
      dgate.push_back(mul(mul(exact(dout.at(i, j)), exact(up.at(i, j))), a.slope));
      dup.push_back(mul(exact(dout.at(i, j)), a.value));
    }
  c.run({{"dgate", s.dtype, s.rows, s.cols, s.cols, false, &dgate},
         {"dup", s.dtype, s.rows, s.cols, s.cols, false, &dup}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.glu_bwd({dout.view, gate.view, up.view, out[0], out[1], s.rows, s.cols, s.activation, s.dtype},
                          c.threads);
        });
}

const Fault kFaults[] = {
    {"the exact function in the place of its approximation", false,
     [](KernelTable& table) {
       table.glu = [](const Glu& p, int threads) {
         Glu other = p;
         if (p.activation == Activation::gelu_tanh) other.activation = Activation::gelu;
         scalar::table.glu(other, threads);
       };
     }},
    {"one column too many", true,
     [](KernelTable& table) {
       table.glu_bwd = [](const GluBwd& p, int threads) {
         GluBwd wider = p;
         ++wider.cols;
         scalar::table.glu_bwd(wider, threads);
       };
     }},
};

}  // namespace

const Op kGlu = {"glu", 6, {glu, glu_bwd}, {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
