// One table of kernels per instruction set, and the choice between them, made once a process by CPUID and XGETBV.
#pragma once
#include <cstdint>

#include "../nf4_format.h"
#include "../tensor_view.h"

namespace pyfinetune {

// Rows [row_begin, row_end) and columns [col_begin, col_end) of a weight that is `cols` wide.
struct Tile {
  int64_t cols;
  int64_t row_begin, row_end, col_begin, col_end;
  int64_t out_stride;  // elements between rows of the output
  bool stream;         // write past the caches: for a scratch that other cores have just read
};

// y[m, n] = round(sum_k x[m, k] * w[n, k] + bias[n]) for a few rows m. x is packed by the caller: `x_rows` holds rows
// of x_stride elements, zero-padded behind column k; floats, or bf16 where the table says packs_bf16.
struct SmallMatmul {
  const void* x_rows;
  int64_t x_stride;
  int64_t m, n, k;
  const void* bias;  // [n] in the output's dtype, or null
  void* y;
  int64_t y_stride;
  DType dtype;  // of y, bias, and of the decoded weight
};

constexpr int kSmallMatmulRows = 32;     // the largest m
constexpr int64_t kSmallMatmulPad = 64;  // x_stride is a multiple of this

// A tensor [tokens, heads, head_dim] whose last dimension is contiguous. Strides are in elements; null: not wanted.
struct HeadsView {
  void* data;
  int64_t token_stride, head_stride;
};

// Packed attention, forward and backward (which reads out and lse, and writes those of dq, dk, dv that are wanted).
// Key j of a document may be attended to by its query i when j - (i + lk - lq) is in [-window_left, window_right].
struct VarlenAttn {
  HeadsView q, k, v, out, dout, dq, dk, dv;
  float* lse;                // [num_heads, total_q]
  const int32_t* cu_q;       // [docs + 1]
  const int32_t* cu_k;       // [docs + 1]
  const int32_t* doc_order;  // [docs]: costly documents first
  int64_t docs, total_q, total_k;
  int64_t num_heads, num_kv_heads, head_dim, head_dim_v;
  int64_t window_left, window_right;  // causality is window_right = 0; both are far below 2^63 / 2
  float softmax_scale, softcap;       // softcap 0: none
  DType dtype;
  int64_t* first_unit;   // [docs + 1], for the kernel's use
  float* scratch;        // as large as varlen_attn_scratch says, aligned to 64 bytes
  float* dq_sums;        // the same
  int32_t* dq_progress;  // the same, zero
  void (*yield)();       // lets another thread run
};

struct VarlenAttnScratch {
  int64_t floats, dq_floats, dq_counters;
};

// Logits of `rows` tokens for entries [first, first + cols) of the vocabulary, and what is known of each token so far.
struct CrossEntropyTile {
  // [rows, cols]; with `write` replaced by exp(z - peak of the tile) / total of the tile, times slope; 0 at the label.
  void* logits;
  DType dtype;
  int64_t rows, cols, stride;
  const float* bias;       // [cols] or null
  const int64_t* targets;  // [rows]: labels, in the whole vocabulary
  int64_t first;
  float softcap;  // 0 is none
  bool write;
  // [rows] each. Over all tiles: the largest logit, the sum of exp(z - peak) without the label's, and the label's logit
  // and its softcap's slope.
  float* peak;
  double* total;
  float *picked, *slope;
  // [rows] each, written for this tile: a sum over tiles continues as keep * sum + add * (sum over this tile).
  float *keep, *add;
  float *tile_peak, *tile_total;  // [rows] each, or both null
};

constexpr int64_t kCrossEntropyCols = 4096;  // the widest tile

// Rows of matrices with a factor each: see the kernels that take it. A step of 0 means one factor for all rows.
struct RowCombination {
  void* out;
  DType out_dtype;
  int64_t out_stride;
  const int64_t* rows;  // of out; null where they are 0, 1, 2, ...
  const void* x;
  DType x_dtype;
  int64_t x_stride;
  const float* a;
  int64_t a_step;
  const void* y;  // null where there is none
  DType y_dtype;
  int64_t y_stride;
  const float* b;
  int64_t b_step;
  int64_t count, cols;
};

// y = x' rstd (offset + weight) by row, x' = x + residual. Views are [..., cols] with contiguous rows; plain pointers
// are contiguous.
struct RmsNorm {
  TensorView x, residual;  // residual.data is null where there is none, as is total
  const void* weight;      // [cols]
  float eps, offset;
  float* gain;  // scratch [cols]
  void* y;
  void* total;  // x'
  float* rstd;  // [rows]
  int64_t rows, cols;
  DType dtype, weight_dtype;
};

// Its gradients; dsum.data, dx or dweight may be null. Units of unit_rows rows are summed into d_weight one by one.
struct RmsNormBwd {
  TensorView dout, dsum, x;
  const void* weight;
  const float* rstd;
  float offset;
  float* gain;     // scratch [cols]
  float* scratch;  // [units, 2, cols]
  void* dx;
  void* dweight;
  int64_t rows, cols, units, unit_rows;
  DType dtype, weight_dtype;
};

constexpr int64_t kStreamBytes = 8 << 20;  // results from this size on are written past the caches

constexpr int64_t kRmsNormChunk = 32;  // rows summed into d_weight in one chain
constexpr int64_t kRmsNormUnits = 64;  // the most units

enum class Activation : int { silu, gelu_tanh, gelu };  // the order of ACTIVATIONS in pyfinetune/ops/glu.py

// out = activation(gate) * up; views as in RmsNorm, all of one dtype.
struct Glu {
  TensorView gate, up;
  void* out;
  int64_t rows, cols;
  Activation activation;
  DType dtype;
};

struct GluBwd {
  TensorView dout, gate, up;
  void *dgate, *dup;
  int64_t rows, cols;
  Activation activation;
  DType dtype;
};

// q, k and their results [batch, heads, tokens, head_dim], cos and sin [batch, tokens, rotary_dim] with a batch stride
// of zero where all share one table; the last dimension of each is contiguous.
struct Rope {
  TensorView q, k, q_out, k_out, cos, sin;
  bool backward;
  DType dtype, table_dtype;
};

// An adapter as the right operand of a thin product: element (k, n) of the product's [k, n], one of the strides 1.
struct ThinOperand {
  const void* data;
  DType dtype;
  int64_t k_stride, n_stride;
};

// out[m, r] = scale * sum_k keep(x)[m, k] * a[k, r]. `mask` holds a bit for each of the m * k elements of x, and four
// spare bytes; null keeps all. `packed` is scratch of thin_scratch(k, r) bytes.
struct ThinDown {
  const void* x;
  int64_t x_stride, m, k, r;
  ThinOperand a;
  const uint8_t* mask;
  float scale;
  void* out;
  int64_t out_stride;
  DType dtype, out_dtype;  // of x; of out: the same or f32
  void* packed;
};

// y[m, n] = add + u, where u = scale * keep(sum_r s[m, r] * b[r, n]); with a factor, see finish_up. y, z and base may
// be where `add` is. `packed` is scratch of thin_scratch(r, n) bytes.
struct ThinUp {
  const void* s;
  int64_t s_stride, m, r, n;
  ThinOperand b;
  const uint8_t* mask;  // of the [m, n] elements, or null
  float scale;
  const void* add;
  int64_t add_stride;
  const float* factor;  // [n] or null: then base, bias and z are not looked at
  const void *base, *bias;
  int64_t base_stride;
  void* z;
  int64_t z_stride;
  void* y;
  int64_t y_stride;
  DType dtype;
  void* packed;
};

// out[r, n] = scale * sum_m t[m, r] * keep(x)[m, n]. `packed` is scratch of thin_scratch(m, r) bytes, `sums` of as many
// as thin_scratch(r, n).
struct ThinOuter {
  const void* t;
  int64_t t_stride, m, r, n;
  const void* x;
  int64_t x_stride;
  const uint8_t* mask;  // of the [m, n] elements, or null
  float scale;
  void* out;
  int64_t out_r_stride, out_n_stride;
  DType dtype, out_dtype;
  void* packed;
  float* sums;
};

// Enough for a [k, n] operand in every instruction set's panels, and for float sums in their shape.
constexpr int64_t thin_scratch(int64_t k, int64_t n) { return (k + 16) * (n + 128) * 4; }

// norms[n] = ||w[n] + scaling * b[n] A||, given gram = A A^T. `cross` is scratch [n, r].
struct DoraNorms {
  const void* w;
  int64_t w_stride, n, k, r;
  ThinOperand a;
  const float *b, *gram;
  double scaling;
  float *norms, *cross;
  DType dtype;
  void* packed;
};

constexpr int64_t kDoraBlock = 64;  // rows of dout to a row of DoraGrad's `partial`

// g = dout * factor by column, dz = column sums of dout * z; g null or dz null leaves that out.
struct DoraGrad {
  const void* dout;
  int64_t dout_stride, m, n;
  const void* z;
  const float* factor;
  void* g;
  float *dz, *partial;  // [n]; scratch [ceil(m / kDoraBlock), n]
  DType dtype;
};

struct KernelTable {
  const char* name;
  bool packs_bf16;  // small_matmul_4bit wants x as bf16 when dtype is bf16
  void (*dequantize_4bit)(const Packed4bit&, const Tile&, void* out, DType, int threads);
  void (*quantize_4bit)(const EncodeTable&, const void* w, DType, int64_t n, int block_shift, uint8_t* codes,
                        float* absmax, int threads);
  void (*quantize_absmax)(const float* centred, int64_t n, int block_shift, const uint8_t* nearest, uint8_t* codes,
                          float* absmax, int threads);
  void (*small_matmul_4bit)(const Packed4bit&, const SmallMatmul&, int threads);
  void (*dropout)(const void* x, void* out, DType, int64_t n, double p, uint64_t seed, int threads);
  VarlenAttnScratch (*varlen_attn_scratch)(const VarlenAttn&, bool backward, int threads);
  void (*varlen_attn)(const VarlenAttn&, int threads);
  void (*varlen_attn_bwd)(const VarlenAttn&, int threads);
  void (*cross_entropy_tile)(const CrossEntropyTile&, int threads);
  void (*combine_rows)(const RowCombination&, int threads);
  void (*add_rows_at)(const RowCombination&, int threads);
  void (*weighted_column_sums)(const RowCombination&, int threads);
  void (*rms_norm)(const RmsNorm&, int threads);
  void (*rms_norm_bwd)(const RmsNormBwd&, int threads);
  void (*glu)(const Glu&, int threads);
  void (*glu_bwd)(const GluBwd&, int threads);
  void (*rope)(const Rope&, int threads);
  void (*dropout_mask)(uint8_t* mask, int64_t n, double p, uint64_t seed, int threads);
  void (*thin_down)(const ThinDown&, int threads);
  void (*thin_up)(const ThinUp&, int threads);
  void (*thin_outer)(const ThinOuter&, int threads);
  void (*dora_norms)(const DoraNorms&, int threads);
  void (*dora_grad)(const DoraGrad&, int threads);
};

// The table in use. Throws BackendUnavailable when PYFINETUNE_CPU_ISA names one that this machine cannot run.
const KernelTable& kernels();

// Names of the tables that this build holds and this machine can run, best first; null-terminated.
const char* const* runnable_isas();

// True in a child of fork(): the parent's thread pool does not exist there, so kernels run inline.
bool in_forked_child();

// Asks for huge pages behind a large output that nothing has touched yet: filling fresh 4 KiB pages costs more than
// most kernels do.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace pyfinetune
