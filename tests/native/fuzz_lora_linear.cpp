#include <cstring>

#include "fuzz.h"
#include "packed.h"

namespace pyfinetune {
namespace fuzz {

namespace {

// A few rows of x, as the binding packs them: float rows, and the bf16 rows that some tables ask for.
class PackedRows {
 public:
  PackedRows(Random& random, DType dtype, int64_t m, int64_t k, Values values)
      : stride((k + kSmallMatmulPad - 1) / kSmallMatmulPad * kSmallMatmulPad),
        floats_(random, m * stride * 4, 4),
        halves_(random, m * stride * 2, 2) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < stride; ++j) {
        const float x = j < k ? draw(random, dtype, values) : 0.0f;
        store(DType::bf16, halves_.data(), i * stride + j, x);
        // Any float, but one that the input's dtype holds.
        uint32_t rounded;
        store(dtype, &rounded, 0, x);
        store(DType::f32, floats_.data(), i * stride + j, load(dtype, &rounded, 0));
      }
  }
  const void* rows(bool as_bf16) const { return as_bf16 ? halves_.data() : floats_.data(); }
  float at(int64_t i, int64_t j) const { return load(DType::f32, floats_.data(), i * stride + j); }

  const int64_t stride;

 private:
  Buffer floats_, halves_;
};

int64_t depth(Case& c, int shift) {
  if (c.random.one_in(2)) return c.random.size(200);
  if (c.random.one_in(30)) return c.random.between(1000, 2200);  // past one stretch of decoded columns
  return c.random.below(4) << shift;                             // rows of whole blocks
}

void small_matmul(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int shift = int(random.one_in(8) ? random.between(8, 12) : random.between(5, 7));
  const int64_t k = std::min<int64_t>(depth(c, shift), 4096);
  const int64_t m = random.one_in(2) ? random.between(1, 5) : random.between(1, k > 500 ? 7 : kSmallMatmulRows);
  const int64_t n = 1 + random.size(k > 500 ? 4 : c.limit(12, 40));
  const bool whole = random.one_in(2);
  const Values values = whole ? Values::whole : random.pick({Values::mild, Values::wide, Values::special});
  const PackedWeight w(random, n * k, shift, whole);
  const PackedRows x(random, dtype, m, k, values);
  const Buffer bias(random, dtype, n, values);
  const bool has_bias = random.one_in(2);
  const int64_t y_stride = n + (random.one_in(3) ? random.between(1, 40) : 0);
  c.describe("small_matmul_4bit", "%s, m %lld, n %lld, k %lld, bias %d, y_stride %lld, x %s, %s", dtype_name(dtype),
             ll(m), ll(n), ll(k), has_bias, ll(y_stride), name_of(values), w.description().c_str());
  std::vector<float> decoded(size_t(n * k));
  for (int64_t i = 0; i < n * k; ++i) decoded[size_t(i)] = w.decode(i, dtype);
  std::vector<Expected> expected(size_t(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Sum sum(dtype == DType::bf16);
      for (int64_t l = 0; l < k; ++l) sum.add(x.at(i, l), decoded[size_t(j * k + l)]);
      if (has_bias) sum.add(load(dtype, bias.data(), j));
      expected[size_t(i * n + j)] = sum.expected();
    }
  c.run({{"y", dtype, m, n, y_stride, whole, &expected}}, [&](const KernelTable& kernels, void* const* out) {
    const bool as_bf16 = kernels.packs_bf16 && dtype == DType::bf16;
    kernels.small_matmul_4bit(
        w.packed(), {x.rows(as_bf16), x.stride, m, n, k, has_bias ? bias.data() : nullptr, out[0], y_stride, dtype},
        c.threads);
  });
}

void dropout(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int64_t n = random.size(c.limit(1000, 20000));
  const Values values = random.pick({Values::mild, Values::wide, Values::special});
  const Buffer x(random, dtype, n, values);
  const double p = random.pick<double>({0.0, 0x1p-32, 0.1, 0.5, 0.9, 1.0 - 0x1p-32, 1.0 - 0x1p-53, random.unit()});
  const uint64_t seed = random.pick<uint64_t>({0, 1, 0xffffffff, uint64_t(1) << 63, ~uint64_t(0), random.bits()});
  const bool in_place = random.one_in(2);
  c.describe("dropout", "%s, %lld elements %s, p %.17g, seed %llu, in place %d", dtype_name(dtype), ll(n),
             name_of(values), p, static_cast<unsigned long long>(seed), in_place);
  const std::vector<char> initial(x.data<char>(), x.data<char>() + x.bytes());
  c.run({{"out", dtype, 1, n, n, true, nullptr, in_place ? &initial : nullptr}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.dropout(in_place ? out[0] : x.data(), out[0], dtype, n, p, seed, c.threads);
        });
}

const Fault kFaults[] = {
    {"a product leaves out its last column", false,
     [](KernelTable& table) {
       table.small_matmul_4bit = [](const Packed4bit& w, const SmallMatmul& p, int threads) {
         if (p.k > 0 && p.n == 1) {
           SmallMatmul shorter = p;
           --shorter.k;
           scalar::table.small_matmul_4bit(w, shorter, threads);
         } else {
           scalar::table.small_matmul_4bit(w, p, threads);
         }
       };
     }},
    {"a product writes one row too many", true,
     [](KernelTable& table) {
       table.small_matmul_4bit = [](const Packed4bit& w, const SmallMatmul& p, int threads) {
         SmallMatmul taller = p;
         if (taller.m > 1 && taller.m < kSmallMatmulRows) ++taller.m;
         scalar::table.small_matmul_4bit(w, taller, threads);
       };
     }},
    {"the last element is forgotten", false,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
         scalar::table.dropout(x, out, dtype, n > 32 ? n - 1 : n, p, seed, threads);
       };
     }},
    {"what is kept is not scaled enough", false,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
         scalar::table.dropout(x, out, dtype, n, n > 64 ? 0.999 * p : p, seed, threads);
       };
     }},
    {"the mask of another counter", false,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
         scalar::table.dropout(x, out, dtype, n, p, n > 64 ? seed + 1 : seed, threads);
       };
     }},
    {"a count that overflows", true,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
         int32_t count = std::numeric_limits<int32_t>::max();
         count += int32_t(n);
         scalar::table.dropout(x, out, dtype, count < 0 ? 0 : n, p, seed, threads);
       };
     }},
    {"an input is written", false,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads) {
         scalar::table.dropout(x, out, dtype, n, p, seed, threads);
         if (n > 0 && x != out) const_cast<char*>(static_cast<const char*>(x))[0] ^= 1;
       };
     }},
    {"a write behind the end that AddressSanitizer does not see", false,
     [](KernelTable& table) {
       table.dropout = [](const void* x, void* out, DType dtype, int64_t n, double p, uint64_t seed, int threads)
                           __attribute__((no_sanitize_address)) {
                             scalar::table.dropout(x, out, dtype, n, p, seed, threads);
                             // Elsewhere it would meet a page that nobody may touch.
                             char* end = static_cast<char*>(out) + n * item_size(dtype);
                             if (n > 0 && (reinterpret_cast<uintptr_t>(end) & 4095) != 0) *end = 0;
                           };
     }},
};

}  // namespace

const Op kLoraLinear = {"lora_linear", 8, {small_matmul, dropout, dropout}, {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
