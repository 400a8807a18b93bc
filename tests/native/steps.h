// Float32 arithmetic one operation at a time: the value in double precision, and how far a kernel's may be from it. Every
// operation adds u = 2^-24 of its result, or the smallest subnormal; a fused pair only leaves a rounding out. What may
// have overflowed may be anything, and so may what an infinity went into; NaN stays NaN.
#pragma once
#include <algorithm>
#include <memory>

#include "fuzz.h"

namespace pyfinetune {
namespace fuzz {

constexpr double kSmallest = 0x1p-149;

inline bool is_nan(const Expected& a) { return std::isnan(a.value) && a.error < kAnything; }

inline Expected rounded(double value, double error) {
  if (!(std::fabs(value) + error < 0x1p126)) return {value, kAnything};
  return {value, error + (std::fabs(value) + error) * kUnit + kSmallest};
}

inline Expected add(const Expected& a, const Expected& b) {
  if (is_nan(a) || is_nan(b)) return {a.value + b.value, 0.0};
  return rounded(a.value + b.value, a.error + b.error);
}

inline Expected mul(const Expected& a, const Expected& b) {
  if (is_nan(a) || is_nan(b)) return {a.value * b.value, 0.0};
  return rounded(a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
}

inline Expected negative(const Expected& a) { return {-a.value, a.error}; }
inline Expected exact(double value) { return {value, 0.0}; }

// Results of the hardware's bf16 conversion, which flushes subnormals.
inline Expected flushed(Expected a, DType dtype) {
  if (dtype == DType::bf16) a.error += kTiny;
  return a;
}

// A matrix of rows without gaps between their elements, which lie as the rows of a view [..., cols] may: in several
// dimensions, in any order, with gaps, or all in one place.
class RowsInput {
 public:
  RowsInput(Random& random, DType dtype, int64_t rows, int64_t cols, Values values) {
    int64_t sizes[3] = {rows, 1, 1};
    int dims = 1;
    for (int64_t factor : {2, 3, 5})
      if (dims < 3 && sizes[0] > 0 && sizes[0] % factor == 0 && random.one_in(2)) {
        sizes[dims++] = factor;
        sizes[0] /= factor;
      }
    view.ndim = dims + 1;
    view.dtype = dtype;
    bool placed[3] = {};
    int64_t next = cols + (random.one_in(3) ? random.between(1, 40) : 0), last = 0;
    for (int i = 0; i < dims; ++i) {
      int d = int(random.below(dims));
      while (placed[d]) d = (d + 1) % dims;
      placed[d] = true;
      view.shape[d] = sizes[d];
      view.strides[d] = random.one_in(8) ? 0 : next;
      if (view.strides[d] == 0 || sizes[d] == 0) continue;
      last += (sizes[d] - 1) * next;
      next = next * sizes[d] + (random.one_in(4) ? random.between(1, 9) : 0);
    }
    view.shape[dims] = cols;
    view.strides[dims] = 1;
    const int64_t count = rows > 0 && cols > 0 ? last + cols : 0;
    buffer_.reset(new Buffer(random, dtype, count, values));
    view.data = buffer_->data();
    for (int64_t i = 0; i < count; ++i) values_.push_back(load(dtype, buffer_->data(), i));
    for (int64_t row = 0; row < rows; ++row) {
      int64_t offset = 0, rest = row;
      for (int d = dims - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * view.strides[d];
      offsets_.push_back(offset);
    }
  }
  double at(int64_t row, int64_t col) const { return values_[size_t(offsets_[size_t(row)] + col)]; }
  // Before anything is frozen.
  void scale(float factor) {
    for (size_t i = 0; i < values_.size(); ++i) {
      store(view.dtype, buffer_->data(), int64_t(i), float(values_[i]) * factor);
      values_[i] = load(view.dtype, buffer_->data(), int64_t(i));
    }
  }

  TensorView view;

 private:
  std::unique_ptr<Buffer> buffer_;
  std::vector<double> values_;
  std::vector<int64_t> offsets_;
};

// A matrix with one stride and gaps between its rows, or a vector; and its elements as numbers.
class MatrixInput {
 public:
  MatrixInput(Random& random, DType dtype, int64_t rows, int64_t cols, Values values, bool gaps = true)
      : dtype(dtype),
        stride(cols + (gaps && random.one_in(3) ? random.between(1, 40) : 0)),
        buffer_(random, dtype, rows > 0 ? (rows - 1) * stride + cols : 0, values) {
    for (int64_t i = 0; i < buffer_.bytes() / item_size(dtype); ++i) values_.push_back(load(dtype, buffer_.data(), i));
  }
  void* data() const { return buffer_.data(); }
  double at(int64_t row, int64_t col) const { return values_[size_t(row * stride + col)]; }
  // Before anything is frozen.
  void set(int64_t row, int64_t col, float value) {
    store(dtype, buffer_.data(), row * stride + col, value);
    values_[size_t(row * stride + col)] = load(dtype, buffer_.data(), row * stride + col);
  }
  void scale(float factor) {
    for (size_t i = 0; i < values_.size(); ++i) set(0, int64_t(i), float(values_[i]) * factor);
  }

  const DType dtype;
  const int64_t stride;

 private:
  Buffer buffer_;
  std::vector<double> values_;
};

}  // namespace fuzz
}  // namespace pyfinetune
