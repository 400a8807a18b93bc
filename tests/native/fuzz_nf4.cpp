#include <cstring>

#include "fuzz.h"
#include "gpu/gpu_table.h"
#include "packed.h"

namespace pyfinetune {
namespace fuzz {

template <class T, class Draw>
const T* PackedWeight::vector(Random& random, int64_t count, const Draw& draw_one) {
  buffers_.emplace_back(new Buffer(random, count * int64_t(sizeof(T)), sizeof(T)));
  T* data = buffers_.back()->data<T>();
  for (int64_t i = 0; i < count; ++i) data[i] = T(draw_one(i));
  return data;
}

// Scales at the bounds where decoders change their ways: the kernels trust hardware conversions of a table of codes
// only from 2^-90 to 2^120, and of code values from 2^-30.
static float edge(Random& random) {
  return std::ldexp(float(random.pick<double>({1.0, 1.0 + 0x1p-23, 2.0 - 0x1p-23, 1.5})),
                    random.pick<int>({-149, -127, -126, -91, -90, -31, -30, -24, 15, 16, 119, 120, 127}));
}

PackedWeight::PackedWeight(Random& random, int64_t numel, int block_shift, bool whole) {
  const int kind = whole ? 0 : int(random.between(1, 5));
  const auto scale = [&](int64_t) -> float {
    if (kind == 0) return random.pick<float>({0.5f, 1.0f, 2.0f});
    if (kind == 1) return float(random.unit());
    if (kind == 2) return draw(random, DType::f32, Values::wide);
    if (kind == 3) return draw(random, DType::f32, Values::special);
    return kind == 4 ? edge(random) : draw(random, DType::f32, Values::finite);
  };
  const int map = whole ? 0 : int(random.between(1, 5));
  packed_.numel = numel;
  packed_.block_shift = block_shift;
  packed_.codes = vector<uint8_t>(random, (numel + 1) / 2, [&](int64_t) { return random.bits(); });
  packed_.quant_map = vector<float>(random, 16, [&](int64_t i) -> float {
    if (map == 0) return float(i - 8);
    if (map <= 2) return map == 1 ? kNf4Codes[i] : kFp4Codes[i];
    if (map == 3) return edge(random);
    return draw(random, DType::f32, map == 4 ? Values::special : Values::wide);
  });
  const int64_t blocks = blocks_of(numel, block_shift);
  const bool nested = random.one_in(2);
  if (nested) {
    packed_.nested_shift = int(random.between(0, 9));
    packed_.absmax8 = vector<uint8_t>(random, blocks, [&](int64_t) { return random.bits(); });
    // The product of two scales would leave what is exact: a factor of one, and an offset of zero.
    packed_.nested_absmax = vector<float>(random, blocks_of(blocks, packed_.nested_shift),
                                          [&](int64_t i) -> float { return whole ? 1.0f : scale(i); });
    packed_.nested_map = vector<float>(random, 256, scale);
    packed_.nested_offset = vector<float>(random, 1, [&](int64_t i) -> float { return whole ? 0.0f : scale(i); });
  } else {
    packed_.absmax = vector<float>(random, blocks, scale);
  }
  description_ = "block size " + std::to_string(int64_t(1) << block_shift) + ", scales of kind " +
                 std::to_string(kind) + (nested ? " nested by " : "") +
                 (nested ? std::to_string(int64_t(1) << packed_.nested_shift) : "") + ", codes of kind " +
                 std::to_string(map);
}

float PackedWeight::decode(int64_t i, DType dtype) const {
  const float exact = packed_.quant_map[code_at(packed_.codes, i)] * block_scale(packed_, i >> packed_.block_shift);
  float rounded[1];
  store(dtype, rounded, 0, exact);
  return load(dtype, rounded, 0);
}

namespace {

int block_shift(Random& random) { return int(random.one_in(4) ? random.between(5, 12) : random.between(5, 7)); }

void dequantize(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  // The whole weight, and a tile of it.
  const int64_t cols = random.size(c.limit(300, 3000)), rows = random.size(c.limit(20, 60));
  Tile tile = {cols, 0, rows, 0, cols, cols, random.one_in(3)};
  if (random.one_in(2)) {
    tile.row_begin = random.below(rows + 1);
    tile.row_end = random.between(tile.row_begin, rows);
  }
  if (random.one_in(2)) {
    tile.col_begin = random.below(cols + 1);
    tile.col_end = random.between(tile.col_begin, cols);
  }
  const int64_t height = tile.row_end - tile.row_begin, width = tile.col_end - tile.col_begin;
  tile.out_stride = width + (random.one_in(3) ? random.between(1, 70) : 0);
  if (height == 0 || width == 0) return;  // the binding returns, too
  const PackedWeight w(random, rows * cols, block_shift(random), false);
  c.describe("dequantize_4bit", "%s, weight [%lld, %lld], tile [%lld:%lld, %lld:%lld], out_stride %lld, stream %d, %s",
             dtype_name(dtype), ll(rows), ll(cols), ll(tile.row_begin), ll(tile.row_end), ll(tile.col_begin),
             ll(tile.col_end), ll(tile.out_stride), tile.stream, w.description().c_str());
  std::vector<Expected> expected(size_t(height * width));
  for (int64_t r = 0; r < height; ++r)
    for (int64_t i = 0; i < width; ++i)
      expected[size_t(r * width + i)] = {w.decode((tile.row_begin + r) * cols + tile.col_begin + i, dtype), 0.0};
  c.run({{"out", dtype, height, width, tile.out_stride, true, &expected}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.dequantize_4bit(w.packed(), tile, out[0], dtype, c.threads);
        });
}

Values any_values(Random& random) {
  return random.pick({Values::mild, Values::mild, Values::wide, Values::special, Values::finite, Values::whole});
}

void quantize(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats);
  const int64_t n = random.size(c.limit(3000, 200000));
  const int shift = block_shift(random);
  const Values values = any_values(random);
  const Buffer w(random, dtype, n, values);
  const bool nf4 = random.one_in(2);
  const EncodeTable encode = nf4 ? make_encode_table(kNf4Codes, kNf4Order) : make_encode_table(kFp4Codes, kFp4Order);
  const int64_t blocks = blocks_of(n, shift), bytes = (n + 1) / 2;
  c.describe("quantize_4bit", "%s, %lld elements %s, block size %d, %s", dtype_name(dtype), ll(n), name_of(values),
             1 << shift, nf4 ? "nf4" : "fp4");
  c.run({{"codes", DType::u8, 1, bytes, bytes, true}, {"absmax", DType::f32, 1, blocks, blocks, true}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.quantize_4bit(encode, w.data(), dtype, n, shift, static_cast<uint8_t*>(out[0]),
                                static_cast<float*>(out[1]), c.threads);
        });
}

void quantize_absmax(Case& c) {
  Random& random = c.random;
  const int64_t n = random.size(c.limit(1500, 20000));
  const int shift = int(random.between(0, 9));
  const Values values = any_values(random);
  const Buffer centred(random, DType::f32, n, values);
  const Buffer nearest(random, 65536, 1);  // its garbage will do
  const int64_t blocks = blocks_of(n, shift);
  c.describe("quantize_absmax", "%lld elements %s, block size %d", ll(n), name_of(values), 1 << shift);
  c.run({{"codes", DType::u8, 1, n, n, true}, {"absmax", DType::f32, 1, blocks, blocks, true}},
        [&](const KernelTable& kernels, void* const* out) {
          kernels.quantize_absmax(centred.data<float>(), n, shift, nearest.data<uint8_t>(),
                                  static_cast<uint8_t*>(out[0]), static_cast<float*>(out[1]), c.threads);
        });
}

const Fault kFaults[] = {
    {"a decoded element is one unit in the last place off", false,
     [](KernelTable& table) {
       table.dequantize_4bit = [](const Packed4bit& w, const Tile& tile, void* out, DType dtype, int threads) {
         scalar::table.dequantize_4bit(w, tile, out, dtype, threads);
         static_cast<uint8_t*>(out)[0] ^= 1;
       };
     }},
    {"a tile's last column is not written", false,
     [](KernelTable& table) {
       table.dequantize_4bit = [](const Packed4bit& w, const Tile& tile, void* out, DType dtype, int threads) {
         Tile narrow = tile;
         --narrow.col_end;
         scalar::table.dequantize_4bit(w, narrow, out, dtype, threads);
       };
     }},
    {"a tile is one column too wide", true,
     [](KernelTable& table) {
       table.dequantize_4bit = [](const Packed4bit& w, const Tile& tile, void* out, DType dtype, int threads) {
         Tile wide = tile;
         if (wide.col_end < wide.cols) ++wide.col_end;
         scalar::table.dequantize_4bit(w, wide, out, dtype, threads);
       };
     }},
    {"the last code of an odd size is another", false,
     [](KernelTable& table) {
       table.quantize_4bit = [](const EncodeTable& encode, const void* w, DType dtype, int64_t n, int shift,
                                uint8_t* codes, float* absmax, int threads) {
         scalar::table.quantize_4bit(encode, w, dtype, n, shift, codes, absmax, threads);
         if (n & 1) codes[n / 2] ^= 1;
       };
     }},
    {"the encoder reads one element too many", true,
     [](KernelTable& table) {
       table.quantize_4bit = [](const EncodeTable& encode, const void* w, DType dtype, int64_t n, int shift,
                                uint8_t* codes, float* absmax, int threads) {
         scalar::table.quantize_4bit(encode, w, dtype, n % 2 ? n + 1 : n, shift, codes, absmax, threads);
       };
     }},
    {"scales are rounded up", false,
     [](KernelTable& table) {
       table.quantize_absmax = [](const float* centred, int64_t n, int shift, const uint8_t* nearest, uint8_t* codes,
                                  float* absmax, int threads) {
         scalar::table.quantize_absmax(centred, n, shift, nearest, codes, absmax, threads);
         if (n > 0) absmax[0] = std::nextafter(absmax[0], 1e30f);
       };
     }},
};

}  // namespace

const Op kNf4 = {
    "nf4", 8, {dequantize, dequantize, quantize, quantize_absmax}, {std::begin(kFaults), std::end(kFaults)}};

const Op kGpuNf4 = {"gpu_nf4",
                    1,
                    {dequantize, quantize, quantize_absmax, gpu::dequantize_beside},
                    gpu::nf4_faults(),
                    {&scalar::table, &gpu::table}};

}  // namespace fuzz
}  // namespace pyfinetune
