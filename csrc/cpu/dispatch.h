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

struct KernelTable {
  const char* name;
  bool packs_bf16;  // small_matmul_4bit wants x as bf16 when dtype is bf16
  void (*dequantize_4bit)(const Packed4bit&, const Tile&, void* out, DType, int threads);
  void (*quantize_4bit)(const EncodeTable&, const void* w, DType, int64_t n, int block_shift, uint8_t* codes,
                        float* absmax, int threads);
  void (*quantize_absmax)(const float* centred, int64_t n, int block_shift, const uint8_t* nearest, uint8_t* codes,
                          float* absmax, int threads);
  void (*small_matmul_4bit)(const Packed4bit&, const SmallMatmul&, int threads);
  void (*row_squares)(const void* w, DType, int64_t rows, int64_t cols, int64_t stride, float* squares, int threads);
  void (*dropout)(const void* x, void* out, DType, int64_t n, double p, uint64_t seed, int threads);
  VarlenAttnScratch (*varlen_attn_scratch)(const VarlenAttn&, bool backward, int threads);
  void (*varlen_attn)(const VarlenAttn&, int threads);
  void (*varlen_attn_bwd)(const VarlenAttn&, int threads);
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
