#include <algorithm>
#include <cstring>

#include "fuzz.h"

namespace pyfinetune {
namespace fuzz {

uint64_t Random::bits() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t Random::size(int64_t limit) {
  int64_t n;
  if (one_in(3)) {
    n = below(limit + 1);
  } else if (one_in(2)) {
    n = pick<int64_t>({0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65});
  } else {
    n = (pick<int64_t>({16, 32, 64}) << below(8)) + between(-1, 1);
  }
  return n <= limit ? n : below(limit + 1);
}

float load(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) {
    float x;
    std::memcpy(&x, static_cast<const char*>(data) + 4 * i, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + 2 * i, 2);
  if (dtype == DType::bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float x;
  if (exponent == 31)
    x = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else if (exponent == 0)
    x = std::ldexp(float(mantissa), -24);
  else
    x = std::ldexp(float(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -x : x;
}

Format format_of(DType dtype) {
  if (dtype == DType::f16) return {-24, 11, 65520.0};
  if (dtype == DType::bf16) return {-133, 8, 0x1.ffp127};
  return {-149, 24, 0x1.ffffffp127};
}

double spacing(const Format& format, double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, x == 0.0 ? format.lowest : std::max(exponent - format.digits, format.lowest));
}

void store(DType dtype, void* data, int64_t i, float value) {
  if (dtype == DType::f32) {
    std::memcpy(static_cast<char*>(data) + 4 * i, &value, 4);
    return;
  }
  const Format format = format_of(dtype);
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0, infinity = dtype == DType::f16 ? 0x7c00 : 0x7f80;
  const double magnitude = std::fabs(value);
  uint32_t bits;
  if (std::isnan(value)) {
    bits = infinity | 0x40 | 0x200;
  } else if (magnitude >= format.overflow) {
    bits = infinity;
  } else {
    const double unit = spacing(format, magnitude);
    // Steps of the binade, and as many binades below it: the fields of a float follow one another without a gap.
    const uint32_t steps = uint32_t(std::nearbyint(magnitude / unit));
    bits = steps + (uint32_t(std::ilogb(unit) - format.lowest) << (format.digits - 1));
  }
  const uint16_t half = uint16_t(sign | bits);
  std::memcpy(static_cast<char*>(data) + 2 * i, &half, 2);
}

const char* name_of(Values values) {
  switch (values) {
    case Values::whole: return "whole";
    case Values::mild: return "mild";
    case Values::wide: return "wide";
    case Values::special: return "special";
    case Values::finite: return "finite";
  }
  return "?";
}

float draw(Random& random, DType dtype, Values values) {
  if (values == Values::whole) return float(random.between(-8, 8));
  if (values == Values::wide) {
    const int low = dtype == DType::f16 ? -24 : -149, high = dtype == DType::f16 ? 15 : 127;
    const float x = std::ldexp(float(1.0 + random.unit()), int(random.between(low, high)));
    return random.one_in(2) ? x : -x;
  }
  if (values != Values::mild && random.one_in(6)) {
    const Format format = format_of(dtype);
    const float smallest = std::ldexp(1.0f, format.lowest), normal = std::ldexp(smallest, format.digits - 1);
    const float largest = float(format.overflow - std::ldexp(format.overflow, -format.digits - 1));
    const float infinity = values == Values::special ? std::numeric_limits<float>::infinity() : 0.0f;
    const float nan = values == Values::special ? std::numeric_limits<float>::quiet_NaN() : -0.0f;
    return random.pick<float>({0.0f, -0.0f, smallest, -smallest, normal, normal - smallest, smallest - normal, 1.0f,
                               largest, -largest, infinity, -infinity, nan});
  }
  return float(4.0 * random.unit() - 2.0);
}

Expected Sum::expected() const {
  const double n = double(terms_ + roundings_), gamma = n * kUnit / (1.0 - n * kUnit);
  if (!(magnitude_ + errors_ < 0x1p126)) return {value_, kAnything};
  const double tiny = n * (flushes_ ? 2.0 * kTiny : 0x1p-149);
  if (std::isfinite(value_)) return {value_, magnitude_ * gamma + (errors_ + flushed_) * (1.0 + gamma) + tiny};
  // Infinities and NaN come through in every order, but for infinities times what may count as zero.
  return {value_, flushed_ == 0.0 && errors_ == 0.0 ? 0.0 : kAnything};
}

bool allowed(DType dtype, double x, const Expected& expected) {
  const double value = expected.value, error = expected.error;
  if (!(error < kAnything)) return true;  // a bound of what is not finite may be NaN
  if (std::isnan(value)) return std::isnan(x);
  if (std::isinf(value)) return x == value;
  if (dtype == DType::f64) return std::fabs(x - value) <= error;
  const Format format = format_of(dtype);
  if (std::isinf(x)) return (x > 0 ? value : -value) + error >= format.overflow;
  return std::fabs(x - value) <= error + 0.5 * spacing(format, std::fabs(value) + error);
}

}  // namespace fuzz
}  // namespace pyfinetune
