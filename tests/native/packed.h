// A 4-bit weight with drawn contents.
#pragma once
#include <memory>

#include "fuzz.h"

namespace pyfinetune {
namespace fuzz {

inline int64_t blocks_of(int64_t n, int shift) { return (n + (int64_t(1) << shift) - 1) >> shift; }

class PackedWeight {
 public:
  // whole: the decoded values are halves of whole numbers, at most 16 in magnitude.
  PackedWeight(Random& random, int64_t numel, int block_shift, bool whole);
  const Packed4bit& packed() const { return packed_; }
  // For a report.
  const std::string& description() const { return description_; }
  // The element as the format has it, rounded to the dtype.
  float decode(int64_t i, DType dtype) const;

 private:
  template <class T, class Draw>
  const T* vector(Random& random, int64_t count, const Draw& draw_one);
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Packed4bit packed_ = {};
  std::string description_;
};

}  // namespace fuzz
}  // namespace pyfinetune
