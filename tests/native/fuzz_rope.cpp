#include "steps.h"

namespace pyfinetune {
namespace fuzz {

namespace {

// q or k [batch, heads, tokens, head_dim], heads or tokens first, with gaps, or one head for all.
struct Heads {
  TensorView view;
  std::unique_ptr<Buffer> buffer;
  std::vector<double> values;

  double at(int64_t b, int64_t h, int64_t t, int64_t i) const {
    return values[size_t(b * view.strides[0] + h * view.strides[1] + t * view.strides[2] + i)];
  }
};

// Strides of what lies without gaps between tokens and heads, with rows `row` elements apart.
void place(TensorView& v, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, int64_t row,
           bool tokens_first) {
  const int64_t shape[] = {batch, heads, tokens, head_dim};
  v.ndim = 4;
  for (int d = 0; d < 4; ++d) v.shape[d] = shape[d];
  v.strides[0] = heads * tokens * row;
  v.strides[1] = tokens_first ? row : tokens * row;
  v.strides[2] = tokens_first ? heads * row : row;
  v.strides[3] = 1;
}

Heads heads_of(Random& random, DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim,
               Values values) {
  Heads x;
  x.view.dtype = dtype;
  place(x.view, batch, heads, tokens, head_dim, head_dim + (random.one_in(3) ? random.between(1, 40) : 0),
        random.one_in(2));
  if (random.one_in(8)) x.view.strides[random.below(3)] = 0;
  int64_t count = batch > 0 && heads > 0 && tokens > 0 ? head_dim : 0;
  for (int d = 0; d < 3 && count > 0; ++d) count += (x.view.shape[d] - 1) * x.view.strides[d];
  x.buffer.reset(new Buffer(random, dtype, count, values));
  x.view.data = x.buffer->data();
  for (int64_t i = 0; i < count; ++i) x.values.push_back(load(dtype, x.view.data, i));
  return x;
}

// cos or sin [batch or 1, tokens, rotary_dim].
struct Table {
  Table(Random& random, DType dtype, int64_t batch, int64_t tokens, int64_t rotary_dim, bool shared, Values values)
      : rows(random, dtype, (shared ? 1 : batch) * tokens, rotary_dim, values) {
    view.data = rows.data();
    view.dtype = dtype;
    view.ndim = 3;
    const int64_t shape[] = {shared ? 1 : batch, tokens, rotary_dim};
    const int64_t strides[] = {shared ? 0 : tokens * rows.stride, rows.stride, 1};
    for (int d = 0; d < 3; ++d) view.shape[d] = shape[d], view.strides[d] = strides[d];
  }
  double at(int64_t b, int64_t t, int64_t i) const { return rows.at((view.strides[0] ? b * view.shape[1] : 0) + t, i); }

  MatrixInput rows;
  TensorView view;
};

// What the kernel makes of x, in the order that the result has in memory. A rotated feature is a sum of two products.
std::vector<Expected> rotated(const Heads& x, const TensorView& y, const Table& cos, const Table& sin, bool backward) {
  const int64_t batch = x.view.shape[0], heads = x.view.shape[1], tokens = x.view.shape[2], dim = x.view.shape[3];
  const int64_t half = cos.view.shape[2] / 2;
  const bool tokens_first = y.strides[1] < y.strides[2];
  std::vector<Expected> out;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t row = 0; row < heads * tokens; ++row) {
      const int64_t h = tokens_first ? row % heads : row / tokens, t = tokens_first ? row / heads : row % tokens;
      for (int64_t i = 0; i < dim; ++i) {
        if (i >= 2 * half) {
          out.push_back(exact(x.at(b, h, t, i)));
          continue;
        }
        const bool first = i < half;
        const int64_t other = first ? i + half : i - half;
        const double s = backward ? sin.at(b, t, other) : sin.at(b, t, i);
        Sum sum;
        sum.add(x.at(b, h, t, i), cos.at(b, t, i));
        sum.add(x.at(b, h, t, other), first == backward ? s : -s);
        out.push_back(sum.expected());
      }
    }
  return out;
}

void rope(Case& c) {
  Random& random = c.random;
  const DType dtype = random.pick(kFloats), table_dtype = random.one_in(2) ? DType::f32 : random.pick(kFloats);
  const bool wide = random.one_in(30);  // pairs of features are rotated 128 at a time
  const int64_t batch = random.one_in(20) ? 0 : random.between(1, 2), tokens = random.size(c.limit(wide ? 4 : 18, 70));
  const int64_t q_heads = random.size(wide ? 2 : 4), k_heads = random.size(2);
  const int64_t rotary_dim = 2 * (1 + random.size(wide ? 270 : 33));
  const int64_t head_dim = rotary_dim + (random.one_in(2) ? random.size(20) : 0);
  const Values values = random.pick({Values::whole, Values::mild, Values::wide, Values::special});
  const Heads q = heads_of(random, dtype, batch, q_heads, tokens, head_dim, values),
              k = heads_of(random, dtype, batch, k_heads, tokens, head_dim, values);
  const bool shared = random.one_in(2), backward = random.one_in(2), whole = values == Values::whole;
  const Table cos(random, table_dtype, batch, tokens, rotary_dim, shared, values),
      sin(random, table_dtype, batch, tokens, rotary_dim, shared, values);
  TensorView q_out, k_out;
  const int64_t q_row = head_dim + (random.one_in(4) ? random.between(1, 20) : 0), k_row = head_dim;
  place(q_out, batch, q_heads, tokens, head_dim, q_row, random.one_in(2));
  place(k_out, batch, k_heads, tokens, head_dim, k_row, random.one_in(2));
  c.describe("rope", "%s, table %s, batch %lld, heads %lld %lld, tokens %lld, dims %lld of %lld, %s, backward %d",
             dtype_name(dtype), dtype_name(table_dtype), ll(batch), ll(q_heads), ll(k_heads), ll(tokens),
             ll(rotary_dim), ll(head_dim), name_of(values), backward);
  const auto q_expected = rotated(q, q_out, cos, sin, backward), k_expected = rotated(k, k_out, cos, sin, backward);
  c.run({{"q_out", dtype, batch * q_heads * tokens, head_dim, q_row, whole, &q_expected},
         {"k_out", dtype, batch * k_heads * tokens, head_dim, k_row, whole, &k_expected}},
        [&](const KernelTable& kernels, void* const* out) {
          Rope p = {q.view, k.view, q_out, k_out, cos.view, sin.view, backward, dtype, table_dtype};
          p.q_out.data = out[0];
          p.k_out.data = out[1];
          kernels.rope(p, c.threads);
        });
}

const Fault kFaults[] = {
    {"a rotation the wrong way round", false,
     [](KernelTable& table) {
       table.rope = [](const Rope& p, int threads) {
         Rope other = p;
         other.backward = !p.backward;
         scalar::table.rope(other, threads);
       };
     }},
    {"one key head too many", true,
     [](KernelTable& table) {
       table.rope = [](const Rope& p, int threads) {
         Rope more = p;
         ++more.k.shape[1];
         scalar::table.rope(more, threads);
       };
     }},
};

}  // namespace

const Op kRope = {"rope", 4, {rope}, {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
