// The references follow the definitions in double precision, and carry bounds of what float32 may make of each step.
#include <algorithm>
#include <memory>
#include <numeric>
#include <thread>

#include "fuzz.h"

namespace pyfinetune {
namespace fuzz {

namespace {

constexpr double kBf16Unit = 0x1p-8;  // the rounding of p and ds to bf16 in front of a product
constexpr double kNoKey = -std::numeric_limits<double>::infinity();

// A tensor [tokens, heads, d]: its memory, and its place in it.
struct Heads {
  int64_t tokens, heads, d, token_stride, head_stride;
  DType dtype;
  std::unique_ptr<Buffer> buffer;
  std::vector<double> values;  // once it is filled

  HeadsView view() const { return {buffer->data(), token_stride, head_stride}; }
  int64_t index(int64_t token, int64_t head) const { return token * token_stride + head * head_stride; }
  const double* row(int64_t token, int64_t head) const { return values.data() + index(token, head); }
  void read() {
    const int64_t count = buffer->bytes() / item_size(dtype);
    values.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) values[size_t(i)] = load(dtype, buffer->data(), i);
  }
};

// As an input may lie: tokens or heads first, with gaps, or one head for all.
Heads input(Random& random, DType dtype, int64_t tokens, int64_t heads, int64_t d) {
  Heads x = {tokens, heads, d, 0, 0, dtype, nullptr, {}};
  const int64_t gap = random.one_in(3) ? random.between(1, 9) : 0,
                wide_gap = random.one_in(3) ? random.between(1, 40) : 0;
  if (random.one_in(3)) {
    x.token_stride = d + gap;
    x.head_stride = tokens * x.token_stride + wide_gap;
  } else {
    x.head_stride = random.one_in(8) ? 0 : d + gap;
    x.token_stride = heads * x.head_stride + d + wide_gap;
  }
  const bool any = tokens > 0 && heads > 0;
  const int64_t count = any ? (tokens - 1) * x.token_stride + (heads - 1) * x.head_stride + d : 0;
  x.buffer.reset(new Buffer(random, count * item_size(dtype), item_size(dtype)));
  return x;
}

struct Documents {
  std::vector<int32_t> cu_q, cu_k;
  std::vector<bool> poisoned;  // holds infinities and NaN, which may not be seen from other documents
  int64_t total_q, total_k;    // with tokens behind the last document

  int64_t count() const { return int64_t(poisoned.size()); }
};

Documents draw_documents(Case& c) {
  Random& random = c.random;
  Documents docs = {{0}, {0}, {}, 0, 0};
  // Some are longer than a block of queries (64), of keys (64 and 128), or of both that a unit takes (256 and 512).
  const int64_t longest = random.one_in(150) ? 600 : random.one_in(12) ? 140 : 20;
  const int64_t count = longest > 20 ? random.between(1, 2) : random.size(random.one_in(10) ? 40 : 5);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = random.size(count > 8 ? 5 : longest),
                  k = random.one_in(3) ? random.size(count > 8 ? 5 : longest) : q;
    docs.cu_q.push_back(docs.cu_q.back() + int32_t(q));
    docs.cu_k.push_back(docs.cu_k.back() + int32_t(k));
    docs.poisoned.push_back(random.one_in(6));
  }
  docs.total_q = docs.cu_q.back() + (random.one_in(4) ? random.size(9) : 0);
  docs.total_k = docs.cu_k.back() + (random.one_in(4) ? random.size(9) : 0);
  return docs;
}

struct Problem {
  Documents docs;
  VarlenAttn a = {};
  Heads q, k, v, out, dout;
  std::unique_ptr<Buffer> cu_q, cu_k, order, lse;

  bool flushes() const { return a.dtype == DType::bf16; }
  int64_t group() const { return a.num_heads / a.num_kv_heads; }
};

template <class T>
std::unique_ptr<Buffer> buffer_of(Random& random, const std::vector<T>& values) {
  std::unique_ptr<Buffer> buffer(new Buffer(random, int64_t(values.size() * sizeof(T)), sizeof(T)));
  std::copy(values.begin(), values.end(), buffer->data<T>());
  return buffer;
}

void fill(Random& random, Heads& x, const std::vector<int32_t>& cu, const std::vector<bool>& poisoned, Values values,
          double factor) {
  for (int64_t head = 0; head < x.heads; ++head) {
    size_t doc = 0;
    for (int64_t token = 0; token < x.tokens; ++token) {
      while (doc < poisoned.size() && token >= cu[doc + 1]) ++doc;
      const Values here = doc == poisoned.size() || poisoned[doc] ? Values::special : values;
      for (int64_t i = 0; i < x.d; ++i) {
        const float value = draw(random, x.dtype, here);
        // What is finite stays it.
        store(x.dtype, x.buffer->data(), x.index(token, head) + i,
              std::fabs(value) < 4 ? float(value * factor) : value);
      }
    }
  }
  x.read();
}

Problem draw_problem(Case& c) {
  Random& random = c.random;
  Problem p;
  p.docs = draw_documents(c);
  VarlenAttn& a = p.a;
  a.dtype = random.pick(kFloats);
  a.docs = p.docs.count();
  a.total_q = p.docs.total_q;
  a.total_k = p.docs.total_k;
  const bool large = a.total_q > 200;
  a.head_dim = 8 * (large ? 1 : random.one_in(12) ? random.between(1, 32) : random.between(1, 5));
  a.head_dim_v = large || random.one_in(2) ? a.head_dim : 8 * random.between(1, 5);
  a.num_kv_heads = large ? 1 : random.between(1, 2);
  a.num_heads = a.num_kv_heads * (random.one_in(2) ? 1 : random.between(1, large ? 2 : 3));
  const int64_t unlimited = int64_t(1) << 40;
  a.window_left = random.one_in(2) ? unlimited : random.size(70);
  a.window_right = random.one_in(2) ? 0 : random.one_in(2) ? unlimited : random.size(70);
  a.softmax_scale =
      float(random.one_in(8) ? random.pick<double>({0.0, -0.3, 1.0, 3.0}) : 1.0 / std::sqrt(double(a.head_dim)));
  a.softcap = random.one_in(4) ? float(random.pick<double>({0.5, 5.0, 50.0})) : 0.0f;
  p.q = input(random, a.dtype, a.total_q, a.num_heads, a.head_dim);
  p.k = input(random, a.dtype, a.total_k, a.num_kv_heads, a.head_dim);
  p.v = input(random, a.dtype, a.total_k, a.num_kv_heads, a.head_dim_v);
  const Values values = random.one_in(4) ? Values::finite : Values::mild;
  fill(random, p.q, p.docs.cu_q, p.docs.poisoned, values, random.one_in(4) ? 20.0 : 1.0);
  fill(random, p.k, p.docs.cu_k, p.docs.poisoned, values, 1.0);
  fill(random, p.v, p.docs.cu_k, p.docs.poisoned, values, 1.0);
  a.q = p.q.view();
  a.k = p.k.view();
  a.v = p.v.view();
  p.cu_q = buffer_of(random, p.docs.cu_q);
  p.cu_k = buffer_of(random, p.docs.cu_k);
  a.cu_q = p.cu_q->data<int32_t>();
  a.cu_k = p.cu_k->data<int32_t>();
  std::vector<int32_t> order(size_t(a.docs), 0);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random.below(int64_t(i)))]);
  p.order = buffer_of(random, order);
  a.doc_order = p.order->data<int32_t>();
  a.yield = [] { std::this_thread::yield(); };
  return p;
}

void describe(Case& c, const char* kernel, const Problem& p) {
  const VarlenAttn& a = p.a;
  std::string lengths;
  for (size_t i = 0; i + 1 < p.docs.cu_q.size(); ++i)
    lengths += (p.docs.poisoned[i] ? " !" : " ") + std::to_string(p.docs.cu_q[i + 1] - p.docs.cu_q[i]) + ":" +
               std::to_string(p.docs.cu_k[i + 1] - p.docs.cu_k[i]);
  c.describe(kernel,
             "%s, heads %lld over %lld, head_dim %lld and %lld, window %lld %lld, scale %g, softcap %g, strides q %lld "
             "%lld k %lld %lld v %lld %lld, totals %lld %lld, documents (queries:keys, ! with infinities)%s",
             dtype_name(a.dtype), ll(a.num_heads), ll(a.num_kv_heads), ll(a.head_dim), ll(a.head_dim_v),
             ll(a.window_left), ll(a.window_right), double(a.softmax_scale), double(a.softcap), ll(a.q.token_stride),
             ll(a.q.head_stride), ll(a.k.token_stride), ll(a.k.head_stride), ll(a.v.token_stride), ll(a.v.head_stride),
             ll(a.total_q), ll(a.total_k), lengths.c_str());
}

// A query of a document and the keys [first, last) that it sees, with their scores.
struct Row {
  int64_t doc, head, token, first_token, keys;
  std::vector<Expected> scores;
  bool certain = true;  // nothing that it sees or may touch is infinite or about to be

  Row(const Problem& p, int64_t doc_, int64_t head_, int64_t i) : doc(doc_), head(head_) {
    const VarlenAttn& a = p.a;
    const int64_t lq = a.cu_q[doc + 1] - a.cu_q[doc], lk = a.cu_k[doc + 1] - a.cu_k[doc], at = i + lk - lq;
    const int64_t first = std::min(lk, std::max<int64_t>(0, at - a.window_left));
    const int64_t last = std::max(first, std::min(lk, at + a.window_right + 1));
    token = a.cu_q[doc] + i;
    first_token = a.cu_k[doc] + first;
    keys = last - first;
    certain = !p.docs.poisoned[size_t(doc)];
    for (int64_t j = 0; j < keys && certain; ++j) scores.push_back(score(p, first_token + j));
  }

  Expected score(const Problem& p, int64_t key) {
    const VarlenAttn& a = p.a;
    Sum dot(p.flushes());
    const double *q = p.q.row(token, head), *k = p.k.row(key, head / p.group());
    for (int64_t i = 0; i < a.head_dim; ++i) dot.add(q[i], k[i]);
    const Expected product = dot.expected();
    const double scale = a.softmax_scale, x = product.value * scale;
    double value = x, error = product.error * std::fabs(scale) + 4.0 * kUnit * std::fabs(x);
    if (a.softcap > 0) {  // tanh's slope is at most 1
      value = a.softcap * std::tanh(x / a.softcap);
      error += kMathUnit * std::fabs(value);
    }
    certain = certain && error < 0.25 && std::fabs(value) < 1e4;
    return {value, error};
  }
};

// e^(score - base) where a kernel's score is off by the bound, and its subtraction and exponential by theirs.
Expected power(const Expected& score, double base, double roundings) {
  const double x = score.value - base, p = std::exp(x);
  return {p, p * std::expm1(score.error + roundings) + 2.0 * kTiny};
}

struct Forward {
  std::vector<Expected> out, lse;  // [total_q, num_heads, head_dim_v], [num_heads, total_q]
};

// out = sum p v / l and lse = m + log l for one row; p = e^(s - m), l = sum p.
void forward_row(const Problem& p, const Row& row, Expected* out, Expected* lse) {
  const VarlenAttn& a = p.a;
  double top = kNoKey;
  for (const Expected& s : row.scores) top = std::max(top, s.value);
  // The maximum is itself taken from scores, but whatever it is, it cancels. An online softmax multiplies a p with a
  // power for each block of keys behind it; their exponents add up to no more than the p's own.
  const double blocks = double(row.keys) / 64 + 2;
  Sum total;
  std::vector<Expected> weights;
  for (const Expected& s : row.scores) {
    weights.push_back(power(s, top, 10.0 * kUnit * (top - s.value) + blocks * (kMathUnit + 2.0 * kUnit)));
    total.add(weights.back().value, 1.0, weights.back().error);
  }
  const Expected l = total.expected();
  for (int64_t i = 0; i < a.head_dim_v; ++i) {
    Sum sum(p.flushes());
    sum.add_roundings(int64_t(blocks));
    for (int64_t j = 0; j < row.keys; ++j) {
      const double v = p.v.row(row.first_token + j, row.head / p.group())[i], w = weights[size_t(j)].value;
      sum.add(w, v, (weights[size_t(j)].error + (p.flushes() ? kBf16Unit * w : 0.0)) * std::fabs(v));
    }
    const Expected s = sum.expected();
    const double value = s.value / l.value;
    out[i] = {value, (s.error + std::fabs(value) * l.error) / (l.value - l.error) + 3.0 * kUnit * std::fabs(value)};
  }
  const double value = top + std::log(l.value);
  *lse = {value, -std::log1p(-l.error / l.value) + 8.0 * kUnit * (std::fabs(top) + std::fabs(value) + 1.0)};
}

template <class F>
void each_row(const Problem& p, const F& f) {
  for (int64_t doc = 0; doc < p.a.docs; ++doc)
    for (int64_t head = 0; head < p.a.num_heads; ++head)
      for (int64_t i = 0; i < p.a.cu_q[doc + 1] - p.a.cu_q[doc]; ++i) f(Row(p, doc, head, i));
}

// Zeros and minus infinity stay where there is nothing to see, whatever lies around.
Forward forward(const Problem& p) {
  const VarlenAttn& a = p.a;
  Forward f = {std::vector<Expected>(size_t(a.total_q * a.num_heads * a.head_dim_v), Expected{0.0, 0.0}),
               std::vector<Expected>(size_t(a.num_heads * a.total_q), Expected{kNoKey, 0.0})};
  each_row(p, [&](const Row& row) {
    if (row.keys == 0) return;
    Expected* out = f.out.data() + (row.token * a.num_heads + row.head) * a.head_dim_v;
    Expected* lse = f.lse.data() + row.head * a.total_q + row.token;
    if (row.certain) return forward_row(p, row, out, lse);
    std::fill(out, out + a.head_dim_v, Expected{0.0, kAnything});
    *lse = {0.0, kAnything};
  });
  return f;
}

// As the binding allows an output to lie: tokens first, with gaps.
struct Layout {
  Output output;
  int64_t token_stride, head_stride;

  Layout(Random& random, const char* name, DType dtype, int64_t tokens, int64_t heads, int64_t d,
         const std::vector<Expected>* expected)
      : output{name, dtype, tokens, heads * d, heads * d, false, expected}, token_stride(heads * d), head_stride(d) {
    if (random.one_in(3)) {
      output.stride = token_stride = heads * d + random.between(1, 40);
    } else if (random.one_in(2)) {
      head_stride = d + random.between(1, 9);
      token_stride = heads * head_stride;
      output = {name, dtype, tokens * heads, d, head_stride, false, expected};
    }
  }
  HeadsView view(void* data) const { return {data, token_stride, head_stride}; }
};

// What the binding does around a kernel.
void call(Case& c, const KernelTable& kernels, VarlenAttn a, bool backward) {
  const VarlenAttnScratch need = kernels.varlen_attn_scratch(a, backward, c.threads);
  const Buffer scratch(c.random, need.floats * 4, 64), dq_sums(c.random, need.dq_floats * 4, 64);
  const Buffer progress(c.random, need.dq_counters * 4, 4), first_unit(c.random, (a.docs + 1) * 8, 8);
  std::fill(progress.data<char>(), progress.data<char>() + progress.bytes(), char(0));
  a.scratch = scratch.data<float>();
  a.dq_sums = dq_sums.data<float>();
  a.dq_progress = progress.data<int32_t>();
  a.first_unit = first_unit.data<int64_t>();
  backward ? kernels.varlen_attn_bwd(a, c.threads) : kernels.varlen_attn(a, c.threads);
}

void attend(Case& c) {
  const Problem p = draw_problem(c);
  describe(c, "varlen_attn", p);
  const Forward f = forward(p);
  const VarlenAttn& a = p.a;
  const Layout out(c.random, "out", a.dtype, a.total_q, a.num_heads, a.head_dim_v, &f.out);
  c.run({out.output, {"lse", DType::f32, a.num_heads, a.total_q, a.total_q, false, &f.lse}},
        [&](const KernelTable& kernels, void* const* outputs) {
          VarlenAttn args = a;
          args.out = out.view(outputs[0]);
          args.lse = static_cast<float*>(outputs[1]);
          call(c, kernels, args, false);
        });
}

// Sums of gradients, [tokens, heads, d].
struct Gradient {
  int64_t heads, d;
  std::vector<Sum> sums;
  std::vector<bool> uncertain;  // [tokens, heads]

  Gradient(int64_t tokens, int64_t heads_, int64_t d_, bool flushes)
      : heads(heads_), d(d_), sums(size_t(tokens * heads_ * d_), Sum(flushes)), uncertain(size_t(tokens * heads_)) {}

  // Adds factor * x[token, head, :], where the factor is off by the bound.
  void add(int64_t token, int64_t head, const Expected& factor, const Heads& x, int64_t x_token, int64_t x_head) {
    Sum* row = sums.data() + (token * heads + head) * d;
    const double* y = x.row(x_token, x_head);
    for (int64_t i = 0; i < d; ++i) row[i].add(factor.value, y[i], factor.error * std::fabs(y[i]));
  }
  std::vector<Expected> scaled(double scale) const {
    std::vector<Expected> all;
    for (size_t i = 0; i < sums.size(); ++i) {
      const Expected s = sums[i].expected();
      const double value = s.value * scale;
      all.push_back({value, s.error * std::fabs(scale) + 2.0 * kUnit * std::fabs(value) + kTiny});
      if (uncertain[i / size_t(d)]) all.back().error = kAnything;
    }
    return all;
  }
};

struct Gradients {
  Gradient dq, dk, dv;
};

// One row's share, with p = e^(s - lse), delta = dout . out, and ds = p (dout . v - delta) times the slope of the soft cap.
void backward_row(const Problem& p, const Row& row, Gradients& g) {
  const VarlenAttn& a = p.a;
  const int64_t kv_head = row.head / p.group();
  const double lse = load(DType::f32, p.lse->data(), row.head * a.total_q + row.token);
  Sum delta_sum(p.flushes());
  const double *dout = p.dout.row(row.token, row.head), *out = p.out.row(row.token, row.head);
  for (int64_t i = 0; i < a.head_dim_v; ++i) delta_sum.add(dout[i], out[i]);
  const Expected delta = delta_sum.expected();
  const auto rounded = [&](double value, double error) -> Expected {
    return {value, error + (p.flushes() ? kBf16Unit * (std::fabs(value) + error) + kTiny : 0.0)};
  };
  for (int64_t j = 0; j < row.keys; ++j) {
    const int64_t key = row.first_token + j;
    const Expected& s = row.scores[size_t(j)];
    const Expected w = power(s, lse, 4.0 * kUnit * (std::fabs(s.value) + std::fabs(lse)) + kMathUnit);
    Sum dp_sum(p.flushes());
    const double* v = p.v.row(key, kv_head);
    for (int64_t i = 0; i < a.head_dim_v; ++i) dp_sum.add(dout[i], v[i]);
    const Expected dp = dp_sum.expected();
    const double difference = dp.value - delta.value;
    double e_difference = dp.error + delta.error + kUnit * std::fabs(difference), slope = 1.0, e_slope = 0.0;
    if (a.softcap > 0) {
      const double t = s.value / a.softcap, e_t = s.error / a.softcap;
      slope = 1.0 - t * t;
      e_slope = 2.0 * std::fabs(t) * e_t + e_t * e_t + 3.0 * kUnit;
    }
    const double ds = w.value * difference * slope;
    const double high = (w.value + w.error) * (std::fabs(difference) + e_difference) * (slope + e_slope);
    const double e_ds = high - std::fabs(ds) + 4.0 * kUnit * high;
    g.dv.add(key, kv_head, rounded(w.value, w.error), p.dout, row.token, row.head);
    g.dq.add(row.token, row.head, rounded(ds, e_ds), p.k, key, kv_head);
    g.dk.add(key, kv_head, rounded(ds, e_ds), p.q, row.token, row.head);
  }
}

// A row that is not certain leaves nothing certain about the keys that it sees; one block's zeros times its infinities
// reach the others of the document.
void mark_uncertain(const Problem& p, const Row& row, Gradients& g) {
  const VarlenAttn& a = p.a;
  const int64_t kv_head = row.head / p.group();
  g.dq.uncertain[size_t(row.token * a.num_heads + row.head)] = true;
  for (int64_t key = a.cu_k[row.doc]; key < a.cu_k[row.doc + 1]; ++key)
    g.dk.uncertain[size_t(key * a.num_kv_heads + kv_head)] = g.dv.uncertain[size_t(key * a.num_kv_heads + kv_head)] =
        true;
}

Gradients backward(const Problem& p) {
  const VarlenAttn& a = p.a;
  Gradients g = {{a.total_q, a.num_heads, a.head_dim, p.flushes()},
                 {a.total_k, a.num_kv_heads, a.head_dim, p.flushes()},
                 {a.total_k, a.num_kv_heads, a.head_dim_v, p.flushes()}};
  each_row(p, [&](const Row& row) {
    if (row.keys > 0) row.certain ? backward_row(p, row, g) : mark_uncertain(p, row, g);
  });
  return g;
}

void attend_backward(Case& c) {
  Random& random = c.random;
  Problem p = draw_problem(c);
  VarlenAttn& a = p.a;
  describe(c, "varlen_attn_bwd", p);
  // out and lse as a forward pass has rounded them.
  p.dout = input(random, a.dtype, a.total_q, a.num_heads, a.head_dim_v);
  p.out = input(random, a.dtype, a.total_q, a.num_heads, a.head_dim_v);
  p.lse.reset(new Buffer(random, a.num_heads * a.total_q * 4, 4));
  fill(random, p.dout, p.docs.cu_q, p.docs.poisoned, Values::mild, 1.0);
  const Forward f = forward(p);
  for (int64_t i = 0; i < int64_t(f.out.size()); ++i) {
    const int64_t token = i / a.head_dim_v / a.num_heads, head = i / a.head_dim_v % a.num_heads;
    store(a.dtype, p.out.buffer->data(), p.out.index(token, head) + i % a.head_dim_v, float(f.out[size_t(i)].value));
  }
  p.out.read();
  for (int64_t i = 0; i < int64_t(f.lse.size()); ++i)
    store(DType::f32, p.lse->data(), i, float(f.lse[size_t(i)].value));
  a.dout = p.dout.view();
  a.out = p.out.view();
  a.lse = p.lse->data<float>();
  const Gradients g = backward(p);
  const auto dq = g.dq.scaled(a.softmax_scale), dk = g.dk.scaled(a.softmax_scale), dv = g.dv.scaled(1.0);
  const int64_t wanted = random.one_in(3) ? random.between(1, 7) : 7;  // a bit for each gradient
  std::vector<Layout> layouts;
  layouts.emplace_back(random, "dq", a.dtype, a.total_q, a.num_heads, a.head_dim, &dq);
  layouts.emplace_back(random, "dk", a.dtype, a.total_k, a.num_kv_heads, a.head_dim, &dk);
  layouts.emplace_back(random, "dv", a.dtype, a.total_k, a.num_kv_heads, a.head_dim_v, &dv);
  std::vector<Output> outputs;
  for (int i = 0; i < 3; ++i)
    if (wanted >> i & 1) outputs.push_back(layouts[size_t(i)].output);
  c.run(outputs, [&](const KernelTable& kernels, void* const* data) {
    VarlenAttn args = a;
    HeadsView* const views[] = {&args.dq, &args.dk, &args.dv};
    for (int i = 0; i < 3; ++i)
      if (wanted >> i & 1) *views[i] = layouts[size_t(i)].view(*data++);
    call(c, kernels, args, true);
  });
}

const Fault kFaults[] = {
    {"a query sees the next key, too", false,
     [](KernelTable& table) {
       table.varlen_attn = [](const VarlenAttn& a, int threads) {
         VarlenAttn wide = a;
         ++wide.window_right;
         scalar::table.varlen_attn(wide, threads);
       };
     }},
    {"a document sees the next one's first key", false,
     [](KernelTable& table) {
       table.varlen_attn = [](const VarlenAttn& a, int threads) {
         if (a.docs != 2 || a.cu_k[1] == a.total_k) return scalar::table.varlen_attn(a, threads);
         const int32_t cu_k[] = {a.cu_k[0], a.cu_k[1] + 1, a.cu_k[2]};
         VarlenAttn leaking = a;
         leaking.cu_k = cu_k;
         if (cu_k[1] <= cu_k[2]) scalar::table.varlen_attn(leaking, threads);
       };
     }},
    {"a scale that is off in its fourth digit", false,
     [](KernelTable& table) {
       table.varlen_attn_bwd = [](const VarlenAttn& a, int threads) {
         VarlenAttn scaled = a;
         scaled.softmax_scale *= 1.0005f;
         scalar::table.varlen_attn_bwd(scaled, threads);
       };
     }},
    {"gradients of heads that share a key head are not summed", false,
     [](KernelTable& table) {
       table.varlen_attn_bwd = [](const VarlenAttn& a, int threads) {
         VarlenAttn first = a;
         if (a.num_kv_heads == 1 && !a.dq.data) first.num_heads = 1;
         scalar::table.varlen_attn_bwd(first, threads);
       };
     }},
    {"a key more than there are", true,
     [](KernelTable& table) {
       table.varlen_attn = [](const VarlenAttn& a, int threads) {
         if (a.docs != 1 || a.total_k == 0) return scalar::table.varlen_attn(a, threads);
         const int32_t cu_k[] = {0, int32_t(a.total_k) + 1};
         VarlenAttn longer = a;
         longer.cu_k = cu_k;
         longer.window_left = longer.window_right = int64_t(1) << 40;
         scalar::table.varlen_attn(longer, threads);
       };
     }},
};

}  // namespace

const Op kVarlenAttn = {"varlen_attn", 1, {attend, attend_backward}, {std::begin(kFaults), std::end(kFaults)}};

}  // namespace fuzz
}  // namespace pyfinetune
