// What every fuzzer of an op shares: a generator whose draws depend on the seed and the case's number alone, memory of
// exact size, and the comparison of what the kernel tables make of one input.
//
// A case draws its arguments once and calls `run`, which calls every table with outputs in fresh memory. An output's
// elements are held to one or both of two rules:
//
//   same_bits  the same bits as the scalar table's (any NaN equals any NaN): formats, masks, and sums whose every
//              partial sum is exact, which is why `Values::whole` exists;
//   expected   within a bound of the value in double precision. The bound comes from the arithmetic: see `Sum`.
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checked.h"
#include "cpu/dispatch.h"

namespace pyfinetune {

namespace scalar { extern const KernelTable table; }

namespace fuzz {

// A table's answer that is not the right one.
struct Difference {
  std::string what;
};

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t state) : state_(state) {}
  uint64_t bits();
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  double unit() { return double(bits() >> 11) * 0x1p-53; }
  // 0 to limit: mostly 0, 1, or next to a number of lanes or a multiple of it, where loops begin and end.
  int64_t size(int64_t limit);
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }

 private:
  uint64_t state_;
};

// What a tensor is filled with. whole: integers so small that every sum of their products is exact in float32. mild:
// about 1. wide: any finite exponent. special: some zeros, subnormals, infinities and NaN among mild ones. finite: as
// special, without infinities and NaN.
enum class Values { whole, mild, wide, special, finite };
const char* name_of(Values values);

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

// Elements of a tensor as numbers; slow and plain, and not the kernels' own conversions. `store` rounds to nearest even.
float load(DType dtype, const void* data, int64_t i);
void store(DType dtype, void* data, int64_t i, float value);
float draw(Random& random, DType dtype, Values values);

// The exponent of a dtype's smallest subnormal, the bits of its significand, and from where on values round to infinity.
struct Format {
  int lowest, digits;
  double overflow;
};
Format format_of(DType dtype);
// The distance between neighbouring values of the format about x.
double spacing(const Format& format, double x);

// Memory of exactly `bytes` bytes, aligned to `align` and, at random, to no more. AddressSanitizer knows its bounds. It
// does not see the masked, streamed and gathered accesses of some intrinsics: so the memory either ends or begins at a
// page that nobody may touch, or lies between two patterns, which are compared when a kernel has run.
class Buffer {
 public:
  Buffer(Random& random, int64_t bytes, int64_t align);
  // count elements of a float dtype
  Buffer(Random& random, DType dtype, int64_t count, Values values);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Null now and then when there are no bytes, as an empty tensor's is.
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return end_ - begin_; }

  // From now on the bytes of every buffer there is may not change.
  static void freeze_all();
  // Throws a Difference when frozen bytes have changed, or bytes around a buffer, of those that are gone too.
  static void check_all();

 private:
  friend struct Arena;
  const char* damage() const;
  char *begin_, *end_;
  void* data_;
  int slot_;
  bool frozen_ = false;
  uint64_t checksum_ = 0;
};

// The right value, and how far from it a table may be before it rounds to the output's dtype. An infinite error allows
// everything.
struct Expected {
  double value, error;
};
constexpr double kAnything = std::numeric_limits<double>::infinity();

// Whether x is what rounding something within the error of the value to the dtype can give.
bool allowed(DType dtype, double x, const Expected& expected);

constexpr double kUnit = 0x1p-24;   // a float32 operation is off by at most this share of its result
constexpr double kTiny = 0x1p-126;  // or, where it flushes subnormals to zero, by this
// vec_math.h promises about one unit in the last place, which is twice kUnit; this leaves it another one.
constexpr double kMathUnit = 4 * kUnit;

// A sum of products in float32, in any order and with or without fused multiply-adds. A term takes part in at most
// `terms` additions and three further roundings, each off by a factor of at most 1 + u, u = 2^-24; so the result is off
// by no more than (terms + 3) u / (1 - (terms + 3) u) times the sum of the terms' magnitudes. Below the normal numbers
// a rounding is off by 2^-150 instead. Where the magnitudes could overflow, or where flushing subnormals to zero turns
// an infinity into NaN, everything is allowed.
class Sum {
 public:
  // With `flushes`, subnormal operands and results may count as zero, as the bf16 dot product instructions have it.
  explicit Sum(bool flushes = false) : flushes_(flushes) {}
  // The term a b, which was off by `error` before it was added.
  void add(double a, double b = 1.0, double error = 0.0) {
    const double term = a * b;
    value_ += term;
    if (std::isfinite(term)) magnitude_ += std::fabs(term);
    ++terms_;
    if (flushes_ && (is_subnormal(a) || is_subnormal(b))) flushed_ += std::fabs(term);
    errors_ += error;
  }
  // Each term goes through as many roundings more.
  void add_roundings(int64_t count) { roundings_ += count; }
  Expected expected() const;

 private:
  static bool is_subnormal(double x) { return x != 0.0 && std::fabs(x) < kTiny; }
  bool flushes_;
  int64_t terms_ = 0, roundings_ = 3;
  double value_ = 0.0, magnitude_ = 0.0, flushed_ = 0.0, errors_ = 0.0;
};

// A matrix that the kernels write: `cols` elements in each of `rows` rows `stride` elements apart. What lies between
// two rows must not be touched. It begins as `initial`, rows without gaps, or as a pattern that is never the same.
struct Output {
  const char* name;
  DType dtype;
  int64_t rows, cols, stride;
  bool same_bits;
  const std::vector<Expected>* expected = nullptr;
  const std::vector<char>* initial = nullptr;
};

// Calls by kernel and table.
using Tallies = std::map<std::pair<std::string, std::string>, int64_t>;

// For printf.
inline long long ll(int64_t x) { return x; }

class Case {
 public:
  Case(Random& random, const std::vector<const KernelTable*>& tables, Tallies& tallies)
      : random(random),
        threads(random.one_in(40) ? int(random.between(2, 3)) : 1),
        tables_(tables),
        tallies_(tallies) {}

  Random& random;
  int threads;  // read it when a kernel is called: it changes between runs whose bits must be equal

  // `few` elements, or `many` when there are threads to share them.
  int64_t limit(int64_t few, int64_t many) { return threads > 1 && random.one_in(2) ? many : few; }

  // The kernel and its arguments, printf style, for a report; before `run`.
  void describe(const char* kernel, const char* format, ...) __attribute__((format(printf, 3, 4)));

  using Call = std::function<void(const KernelTable&, void* const* outputs)>;
  void run(const std::vector<Output>& outputs, const Call& call);

 private:
  const std::vector<const KernelTable*>& tables_;
  Tallies& tallies_;
  const char* kernel_ = "";
};

// A mistake that a table could make, to see it found: by a comparison, or by a sanitizer.
struct Fault {
  const char* name;
  bool by_sanitizer;
  void (*plant)(KernelTable& table);
};

struct Op {
  const char* name;
  int share;  // cases in a round of all ops: fewer where one takes long
  // Each draws a case of one kernel; one that stands here twice is drawn twice as often.
  std::vector<void (*)(Case&)> kernels;
  std::vector<Fault> faults;
  // Where these are not the machine's; such an op is run only when it is named.
  std::vector<const KernelTable*> tables = {};
};

extern const Op kGpuNf4, kGpuLoraLinear;
extern const Op kNf4, kLoraLinear, kLoraThin, kVarlenAttn, kRmsNorm, kGlu, kRope, kLinearCrossEntropy;

// What is being run, for whoever prints a report.
struct Position {
  const char* op;
  const char* kernel;
  const char* table;
  uint64_t seed;
  int64_t number;
  char arguments[512];
};
extern Position position;
void print_position();

}  // namespace fuzz
}  // namespace pyfinetune
