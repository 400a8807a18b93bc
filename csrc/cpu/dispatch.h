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
  void (*rms_norm)(const RmsNorm&, int threads);
  void (*rms_norm_bwd)(const RmsNormBwd&, int threads);
  void (*glu)(const Glu&, int threads);
  void (*glu_bwd)(const GluBwd&, int threads);
  void (*rope)(const Rope&, int threads);
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
