#include <cstring>

#include "cuda/nf4.h"
#include "emulator.h"
#include "gpu_table.h"
#include "packed.h"

namespace pyfinetune {
namespace gpu {

void shuffle(fuzz::Random& random) { emulated::seed(random.bits()); }

namespace {

void dequantize_4bit(const Packed4bit& w, const Tile& tile, void* out, DType dtype, int threads) {
  const int64_t rows = w.numel / tile.cols;
  const bool whole = tile.row_begin == 0 && tile.col_begin == 0 && tile.row_end == rows && tile.col_end == tile.cols;
  if (!whole) return scalar::table.dequantize_4bit(w, tile, out, dtype, threads);
  cuda::dequantize_4bit(w, {out, dtype, tile.cols, tile.out_stride}, nullptr, 0, 0);
}

void quantize_4bit(const EncodeTable& table, const void* w, DType dtype, int64_t n, int shift, uint8_t* codes,
                   float* absmax, int) {
  cuda::quantize_4bit(table, w, dtype, n, shift, codes, absmax, 0, 0);
}

void quantize_absmax(const float* centred, int64_t n, int shift, const uint8_t* nearest, uint8_t* codes, float* absmax,
                     int) {
  cuda::quantize_absmax(centred, n, shift, nearest, codes, absmax, 0, 0);
}

KernelTable emulated_table() {
  KernelTable made = scalar::table;
  made.name = "emulated_gpu";
  made.dequantize_4bit = dequantize_4bit;
  made.quantize_4bit = quantize_4bit;
  made.quantize_absmax = quantize_absmax;
  return made;
}

}  // namespace

extern const KernelTable table = emulated_table();

// [W | s B] and [W ; s A]: a decoded weight with an adapter to its right or below it.
void dequantize_beside(fuzz::Case& c) {
  fuzz::Random& random = c.random;
  shuffle(random);
  const DType dtype = random.pick(fuzz::kFloats), of_values = random.one_in(2) ? DType::f32 : dtype;
  const bool below = random.one_in(2);
  const int64_t rows = random.between(1, 20), cols = random.between(1, 300), rank = random.between(1, 40);
  const int64_t before = below ? 0 : random.below(4), behind = below ? 0 : random.below(4);
  const int64_t height = below ? rows + rank : rows, width = below ? cols : cols + before + rank + behind;
  const int64_t value_rows = below ? rank : rows, value_cols = below ? cols : rank;
  const int64_t stride = width + (random.one_in(2) ? random.between(1, 16) : 0);
  const int64_t value_stride = value_cols + random.below(3);
  const float scaling = random.pick<float>({1.0f, 2.0f, 0.3f});
  const fuzz::PackedWeight w(random, rows * cols, int(random.between(5, 8)), false);
  const fuzz::Buffer values(random, of_values, value_rows * value_stride, fuzz::Values::finite);
  c.describe("dequantize_beside", "%s, adapter %s, weight [%lld, %lld], rank %lld, %s, row stride %lld, %s",
             dtype_name(dtype), dtype_name(of_values), fuzz::ll(rows), fuzz::ll(cols), fuzz::ll(rank),
             below ? "below" : "beside", fuzz::ll(stride), w.description().c_str());
  std::vector<fuzz::Expected> expected(size_t(height * width));
  for (int64_t r = 0; r < height; ++r)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t row = below ? r - rows : r, col = below ? i : i - cols - before;
      float value = 0.0f;
      if (r < rows && i < cols)
        value = w.decode(r * cols + i, dtype);
      else if (col >= 0 && col < value_cols)
        value = scaling * fuzz::load(of_values, values.data(), row * value_stride + col);
      float rounded[1];
      fuzz::store(dtype, rounded, 0, value);
      expected[size_t(r * width + i)] = {fuzz::load(dtype, rounded, 0), 0.0};
    }
  c.run({{"out", dtype, height, width, stride, false, &expected}}, [&](const KernelTable&, void* const* out) {
    char* const corner = static_cast<char*>(out[0]) + (below ? rows * stride : cols) * item_size(dtype);
    const cuda::Adapter adapter = {
        corner,     value_rows, below ? cols : width - cols, stride, values.data(), of_values, value_stride, before,
        value_cols, scaling};
    cuda::dequantize_4bit(w.packed(), {out[0], dtype, cols, stride}, &adapter, 0, 0);
  });
}

std::vector<fuzz::Fault> nf4_faults() {
  return {
      {"a GPU's barrier is missing", false,
       [](KernelTable& broken) {
         broken = table;
         emulated::planted = emulated::Planted::no_block_barrier;
       }},
      {"a GPU's encoder has blocks of twice the size", false,
       [](KernelTable& broken) {
         broken = table;
         broken.quantize_4bit = [](const EncodeTable& encode, const void* w, DType dtype, int64_t n, int shift,
                                   uint8_t* codes, float* absmax, int threads) {
           table.quantize_4bit(encode, w, dtype, n, shift + 1, codes, absmax, threads);
         };
       }},
  };
}

}  // namespace gpu
}  // namespace pyfinetune
