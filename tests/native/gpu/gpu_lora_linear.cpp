// The fused 4-bit products on an emulated GPU, held to sums in double precision.
#include <cstring>

#include "cuda/lora_linear.h"
#include "emulator.h"
#include "gpu_table.h"
#include "packed.h"

namespace pyfinetune {
namespace gpu {

namespace {

using fuzz::Buffer;
using fuzz::Random;
using fuzz::Values;

struct Sizes {
  int64_t rows, out, in, rank;
};

// A matrix whose rows lie apart.
struct Matrix {
  int64_t stride;
  Buffer buffer;
  Matrix(Random& random, DType dtype, int64_t rows, int64_t cols, Values values)
      : stride(cols + (random.one_in(2)   ? 0
                       : random.one_in(2) ? 8
                                          : random.between(1, 9))),
        buffer(random, dtype, rows * stride, values) {}
  double at(DType dtype, int64_t row, int64_t col) const {
    return double(fuzz::load(dtype, buffer.data(), row * stride + col));
  }
};

int64_t few(Random& random, int64_t limit) {
  return random.one_in(2) ? random.between(1, limit)
                          : random.pick<int64_t>({1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65});
}

Sizes draw_sizes(Random& random, bool backward) {
  Sizes s;
  s.rows = few(random, 70);
  s.out = few(random, 140);
  // Rows that begin at whole words of codes, at whole blocks, and anywhere.
  s.in = random.one_in(3) ? random.between(1, 300) : (backward ? 8 : 32) * random.between(1, backward ? 30 : 24);
  s.rank = random.one_in(3) ? 0 : random.pick<int64_t>({1, 2, 8, 15, 16, 17, 33});
  return s;
}

struct Operands {
  Sizes sizes;
  DType dtype;
  bool whole;
  int64_t depth, cols;
  fuzz::PackedWeight w;
  Matrix x, s, factor;
  Buffer bias;
  bool has_bias;
  float scaling;

  static int shift(Random& random) { return int(random.between(5, 8)); }
  Operands(Random& random, const Sizes& sizes, bool backward)
      : sizes(sizes),
        dtype(random.one_in(2) ? DType::f16 : DType::bf16),
        whole(random.one_in(2)),
        depth(backward ? sizes.out : sizes.in),
        cols(backward ? sizes.in : sizes.out),
        w(random, sizes.out * sizes.in, shift(random), true),
        x(random, dtype, sizes.rows, depth, values()),
        s(random, dtype, sizes.rows, sizes.rank, values()),
        factor(random, dtype, backward ? sizes.rank : sizes.out, backward ? sizes.in : sizes.rank, values()),
        bias(random, dtype, sizes.out, values()),
        has_bias(!backward && random.one_in(2)),
        scaling(whole ? random.pick<float>({1.0f, 2.0f, 0.5f}) : 0.3f) {}
  Values values() const { return whole ? Values::whole : Values::mild; }

  cuda::LoraLinear problem(void* y, int64_t y_stride) const {
    const bool adapter = sizes.rank > 0;
    return {w.packed(),
            dtype,
            sizes.rows,
            sizes.out,
            sizes.in,
            sizes.rank,
            x.buffer.data(),
            y,
            adapter ? s.buffer.data() : nullptr,
            adapter ? factor.buffer.data() : nullptr,
            has_bias ? bias.data() : nullptr,
            x.stride,
            y_stride,
            s.stride,
            factor.stride,
            scaling};
  }

  // The weights are whole halves and exact in both types: only the sums' roundings are left, and none where x is whole.
  std::vector<fuzz::Expected> expected(bool backward) const {
    std::vector<fuzz::Expected> all;
    std::vector<double> weight(size_t(sizes.out * sizes.in));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = double(w.decode(int64_t(i), dtype));
    for (int64_t m = 0; m < sizes.rows; ++m)
      for (int64_t c = 0; c < cols; ++c) {
        fuzz::Sum sum;
        for (int64_t i = 0; i < depth; ++i)
          sum.add(x.at(dtype, m, i), weight[size_t(backward ? i * sizes.in + c : c * sizes.in + i)]);
        for (int64_t r = 0; r < sizes.rank; ++r)
          sum.add(double(scaling) * s.at(dtype, m, r), backward ? factor.at(dtype, r, c) : factor.at(dtype, c, r));
        if (has_bias) sum.add(double(fuzz::load(dtype, bias.data(), c)));
        sum.add_roundings(4);
        fuzz::Expected expected = sum.expected();
        if (whole) expected.error = 0.0;
        all.push_back(expected);
      }
    return all;
  }
};

void run_product(fuzz::Case& c, const Sizes& sizes, bool backward, cuda::Path path, const char* name) {
  Random& random = c.random;
  shuffle(random);
  const Operands o(random, sizes, backward);
  const int64_t y_stride = o.cols + (random.one_in(2) ? 0 : random.between(1, 9));
  c.describe(name, "%s, %lld rows, weight [%lld, %lld], rank %lld, strides %lld %lld %lld %lld, bias %d, %s, %s",
             dtype_name(o.dtype), fuzz::ll(sizes.rows), fuzz::ll(sizes.out), fuzz::ll(sizes.in), fuzz::ll(sizes.rank),
             fuzz::ll(o.x.stride), fuzz::ll(y_stride), fuzz::ll(o.s.stride), fuzz::ll(o.factor.stride), o.has_bias,
             o.whole ? "whole" : "mild", o.w.description().c_str());
  const auto expected = o.expected(backward);
  c.run({{"y", o.dtype, sizes.rows, o.cols, y_stride, false, &expected}}, [&](const KernelTable&, void* const* out) {
    const cuda::LoraLinear p = o.problem(out[0], y_stride);
    if (backward)
      cuda::lora_linear_bwd(p, 0, 0);
    else
      cuda::lora_linear(p, path, 0, 0);
  });
}

void forward(fuzz::Case& c) { run_product(c, draw_sizes(c.random, false), false, cuda::Path::tensor, "lora_linear"); }

void forward_few_rows(fuzz::Case& c) {
  Sizes sizes = draw_sizes(c.random, false);
  sizes.rows = c.random.between(1, cuda::kVectorRows);
  if (c.random.one_in(4)) sizes.in = 32 * c.random.between(30, 70);
  run_product(c, sizes, false, cuda::Path::chosen, "lora_linear, few rows");
}

void backward(fuzz::Case& c) {
  run_product(c, draw_sizes(c.random, true), true, cuda::Path::chosen, "lora_linear_bwd");
}

template <emulated::Planted kPlanted>
fuzz::Fault fault(const char* name) {
  return {name, false, [](KernelTable&) { emulated::planted = kPlanted; }};
}

}  // namespace

std::vector<fuzz::Fault> lora_linear_faults() {
  return {fault<emulated::Planted::no_block_barrier>("a GPU's barrier is missing"),
          fault<emulated::Planted::no_wait>("a GPU's copies are not waited for"),
          fault<emulated::Planted::swapped_words>("two words of a fragment are swapped"),
          fault<emulated::Planted::short_fill>("the end of a copy is not filled with zeros")};
}

}  // namespace gpu

namespace fuzz {

const Op kGpuLoraLinear = {"gpu_lora_linear",
                           1,
                           {gpu::forward, gpu::forward_few_rows, gpu::backward},
                           gpu::lora_linear_faults(),
                           {&scalar::table}};

}  // namespace fuzz
}  // namespace pyfinetune
