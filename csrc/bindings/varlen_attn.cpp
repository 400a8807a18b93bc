#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "views.h"

namespace pyfinetune {

namespace {

constexpr const char* kOp = "varlen_attn";
constexpr int64_t kUnlimited = int64_t(1) << 40;  // a window wider than any document

std::string named(const char* name, const char* problem) { return std::string(kOp) + ": " + name + " " + problem; }

HeadsView heads(const py::handle& capsule, const char* name, DType dtype, int64_t tokens, int64_t num_heads,
                int64_t head_dim) {
  const TensorView view = view_of(capsule, kOp, name);
  PYFINETUNE_CHECK(!view.on_cuda, named(name, "is not on the CPU"));
  PYFINETUNE_CHECK(view.dtype == dtype, named(name, "has another dtype than q"));
  PYFINETUNE_CHECK(view.ndim == 3, named(name, "is not [tokens, heads, head_dim]"));
  PYFINETUNE_CHECK(view.shape[0] == tokens && view.shape[1] == num_heads && view.shape[2] == head_dim,
                   named(name, "has a shape that does not go with the other arguments"));
  PYFINETUNE_CHECK(view.strides[2] == 1, named(name, "is not contiguous in its last dimension"));
  return {view.data, view.strides[0], view.strides[1]};
}

// An output is written by several threads at once: its elements must not share memory.
HeadsView written(const py::handle& capsule, const char* name, DType dtype, int64_t tokens, int64_t num_heads,
                  int64_t head_dim) {
  const HeadsView view = heads(capsule, name, dtype, tokens, num_heads, head_dim);
  PYFINETUNE_CHECK(tokens <= 1 || num_heads == 0 || view.token_stride >= num_heads * head_dim,
                   named(name, "has overlapping tokens"));
  PYFINETUNE_CHECK(num_heads <= 1 || tokens == 0 || view.head_stride >= head_dim, named(name, "has overlapping heads"));
  PYFINETUNE_CHECK(tokens == 0 || num_heads == 0 ||
                       (num_heads - 1) * view.head_stride + head_dim <= view.token_stride || tokens == 1,
                   named(name, "has overlapping heads"));
  return view;
}

const int32_t* boundaries(const py::handle& capsule, const char* name, int64_t tokens, int64_t* docs) {
  const TensorView view = view_of(capsule, kOp, name);
  PYFINETUNE_CHECK(!view.on_cuda && view.ndim == 1 && view.dtype == DType::i32 && is_contiguous(view),
                   named(name, "is not a contiguous int32 vector on the CPU"));
  PYFINETUNE_CHECK(view.shape[0] >= 1, named(name, "is empty, needs the number of documents + 1 elements"));
  const auto* cu = static_cast<const int32_t*>(view.data);
  *docs = view.shape[0] - 1;
  PYFINETUNE_CHECK(cu[0] == 0, named(name, "starts at ") + std::to_string(cu[0]) + ", needs 0");
  for (int64_t i = 0; i < *docs; ++i)
    PYFINETUNE_CHECK(cu[i] <= cu[i + 1], named(name, "decreases at element ") + std::to_string(i + 1));
  PYFINETUNE_CHECK(cu[*docs] <= tokens, named(name, "ends at ") + std::to_string(cu[*docs]) + ", beyond the " +
                                            std::to_string(tokens) + " tokens");
  return cu;
}

struct Inputs {
  const py::object &q, &k, &v, &cu_q, &cu_k, &lse;
  bool causal;
  float softmax_scale;
  int64_t window_left, window_right;
  float softcap;
};

int64_t checked_head_dim(int64_t head_dim, const char* name) {
  PYFINETUNE_CHECK(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0,
                   named(name, "has head_dim ") + std::to_string(head_dim) + ", needs a multiple of 8 up to 256");
  return head_dim;
}

VarlenAttn checked(const Inputs& in) {
  const TensorView q = view_of(in.q, kOp, "q"), v = view_of(in.v, kOp, "v"), lse = view_of(in.lse, kOp, "lse");
  PYFINETUNE_CHECK(q.ndim == 3 && is_weight_dtype(q.dtype), named("q", "is not a float tensor of three dimensions"));
  PYFINETUNE_CHECK(v.ndim == 3, named("v", "is not [tokens, heads, head_dim]"));
  VarlenAttn a = {};
  a.dtype = q.dtype;
  a.total_q = q.shape[0];
  a.num_heads = q.shape[1];
  a.head_dim = checked_head_dim(q.shape[2], "q");
  a.total_k = v.shape[0];
  a.num_kv_heads = v.shape[1];
  a.head_dim_v = checked_head_dim(v.shape[2], "v");
  PYFINETUNE_CHECK(a.num_heads > 0 && a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0,
                   named("q", "has a number of heads that is no multiple of v's"));
  a.q = heads(in.q, "q", a.dtype, a.total_q, a.num_heads, a.head_dim);
  a.k = heads(in.k, "k", a.dtype, a.total_k, a.num_kv_heads, a.head_dim);
  a.v = heads(in.v, "v", a.dtype, a.total_k, a.num_kv_heads, a.head_dim_v);
  int64_t docs_k = 0;
  a.cu_q = boundaries(in.cu_q, "cu_seqlens_q", a.total_q, &a.docs);
  a.cu_k = boundaries(in.cu_k, "cu_seqlens_k", a.total_k, &docs_k);
  PYFINETUNE_CHECK(a.docs == docs_k, named("cu_seqlens_k", "has another number of documents than cu_seqlens_q"));
  PYFINETUNE_CHECK(!lse.on_cuda && lse.dtype == DType::f32 && lse.ndim == 2 && lse.shape[0] == a.num_heads &&
                       lse.shape[1] == a.total_q && is_contiguous(lse),
                   named("lse", "is not a contiguous float32 [num_heads, total_q]"));
  a.lse = static_cast<float*>(lse.data);
  PYFINETUNE_CHECK(in.window_left >= -1 && in.window_right >= -1, named("window_size", "is below -1"));
  a.window_left = in.window_left < 0 ? kUnlimited : std::min(in.window_left, kUnlimited);
  a.window_right = in.window_right < 0 ? kUnlimited : std::min(in.window_right, kUnlimited);
  if (in.causal) a.window_right = 0;
  PYFINETUNE_CHECK(std::isfinite(in.softmax_scale), named("softmax_scale", "is not finite"));
  PYFINETUNE_CHECK(std::isfinite(in.softcap) && in.softcap >= 0, named("softcap", "is negative or not finite"));
  a.softmax_scale = in.softmax_scale;
  a.softcap = in.softcap;
  return a;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that a thread keeps from call to call, up to a size: fresh pages cost more than small problems do.
class Reused {
 public:
  float* floats(int64_t count) {
    const int64_t bytes = checked_mul(count, 4, kOp);
    if (bytes <= size_) return memory_.get();
    memory_.reset();
    size_ = 0;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(bytes) / 64 * 64 + 64)));
    if (!memory_) throw std::bad_alloc();
    size_ = bytes;
    return memory_.get();
  }
  void trim() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 16 << 20;
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// Runs a kernel with its documents in order of cost and its scratch memory, without Python's lock.
void run(VarlenAttn& a, bool backward, int threads) {
  const KernelTable& chosen = kernels();
  const int usable = usable_threads(threads);
  py::gil_scoped_release release;
  const auto cost = [&](int32_t doc) {
    return int64_t(a.cu_q[doc + 1] - a.cu_q[doc]) * int64_t(a.cu_k[doc + 1] - a.cu_k[doc]);
  };
  std::vector<int32_t> order(size_t(a.docs), 0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return cost(x) > cost(y); });
  std::vector<int64_t> first_unit(size_t(a.docs) + 1);
  const VarlenAttnScratch need = chosen.varlen_attn_scratch(a, backward, usable);
  static thread_local Reused scratch, dq_sums;
  std::vector<int32_t> dq_progress(size_t(need.dq_counters));
  a.doc_order = order.data();
  a.first_unit = first_unit.data();
  a.scratch = scratch.floats(need.floats);
  a.dq_sums = dq_sums.floats(need.dq_floats);
  a.dq_progress = dq_progress.data();
  a.yield = [] { std::this_thread::yield(); };
  backward ? chosen.varlen_attn_bwd(a, usable) : chosen.varlen_attn(a, usable);
  scratch.trim();
  dq_sums.trim();
}

void varlen_attn(const py::object& q, const py::object& k, const py::object& v, const py::object& cu_q,
                 const py::object& cu_k, const py::object& out, const py::object& lse, bool causal, float softmax_scale,
                 int64_t window_left, int64_t window_right, float softcap, int threads) {
  VarlenAttn a = checked({q, k, v, cu_q, cu_k, lse, causal, softmax_scale, window_left, window_right, softcap});
  a.out = written(out, "out", a.dtype, a.total_q, a.num_heads, a.head_dim_v);
  run(a, false, threads);
}

void varlen_attn_bwd(const py::object& dout, const py::object& q, const py::object& k, const py::object& v,
                     const py::object& out, const py::object& lse, const py::object& cu_q, const py::object& cu_k,
                     const py::object& dq, const py::object& dk, const py::object& dv, bool causal, float softmax_scale,
                     int64_t window_left, int64_t window_right, float softcap, int threads) {
  VarlenAttn a = checked({q, k, v, cu_q, cu_k, lse, causal, softmax_scale, window_left, window_right, softcap});
  a.out = heads(out, "out", a.dtype, a.total_q, a.num_heads, a.head_dim_v);
  a.dout = heads(dout, "dout", a.dtype, a.total_q, a.num_heads, a.head_dim_v);
  if (!dq.is_none()) a.dq = written(dq, "dq", a.dtype, a.total_q, a.num_heads, a.head_dim);
  if (!dk.is_none()) a.dk = written(dk, "dk", a.dtype, a.total_k, a.num_kv_heads, a.head_dim);
  if (!dv.is_none()) a.dv = written(dv, "dv", a.dtype, a.total_k, a.num_kv_heads, a.head_dim_v);
  run(a, true, threads);
}

}  // namespace

void bind_varlen_attn(py::module_& m) {
  m.def("varlen_attn", &varlen_attn);
  m.def("varlen_attn_bwd", &varlen_attn_bwd);
}

}  // namespace pyfinetune
