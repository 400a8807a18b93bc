// 4-bit decode on the GPU (format: csrc/nf4_format.h).
//
// One thread decodes 8 elements of one block: it reads 4 bytes of codes, makes each value as round(quant_map[code] *
// scale) with the 16 codes in shared memory, and writes 16 (or 32) bytes at once. Double-quantized scales are decoded
// on the way, in the same launch. Memory-bound: 0.5 byte read and 2 (4) written an element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "nf4.h"

namespace pyfinetune {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // elements; divides every block size, so one scale serves a thread's step

__device__ __forceinline__ void convert(float x, float& out) { out = x; }
__device__ __forceinline__ void convert(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void convert(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

template <class T>
struct alignas(sizeof(T) * kPerThread) Pack {
  T values[kPerThread];
};

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_4bit_kernel(Packed4bit w, T* out, bool aligned) {
  __shared__ float quant_map[16];
  if (threadIdx.x < 16) quant_map[threadIdx.x] = w.quant_map[threadIdx.x];
  __syncthreads();
  const int64_t stride = int64_t(gridDim.x) * kThreads * kPerThread;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPerThread; i < w.numel; i += stride) {
    const float scale = block_scale(w, i >> w.block_shift);
    const bool whole = aligned && i + kPerThread <= w.numel;
    const uint32_t word = whole ? *reinterpret_cast<const uint32_t*>(w.codes + (i >> 1)) : 0u;
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      int code = 0;
      if (whole)
        code = (word >> (8 * (j >> 1) + ((j & 1) ? 0 : 4))) & 15;
      else if (i + j < w.numel)
        code = code_at(w.codes, i + j);
      convert(__fmul_rn(quant_map[code], scale), pack.values[j]);
    }
    if (whole) {
      *reinterpret_cast<Pack<T>*>(out + i) = pack;
    } else {
      for (int j = 0; j < kPerThread && i + j < w.numel; ++j) out[i + j] = pack.values[j];
    }
  }
}

template <class T>
void launch(const Packed4bit& w, T* out, cudaStream_t stream) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(w.codes) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pack<T>) == 0;
  const unsigned grid = grid_size(w.numel, int64_t(kThreads) * kPerThread);
  dequantize_4bit_kernel<<<grid, kThreads, 0, stream>>>(w, out, aligned);
  check_launch("dequantize_4bit", w.numel);
}

}  // namespace

void dequantize_4bit(const Packed4bit& w, void* out, DType dtype, int device, uint64_t stream) {
  if (w.numel == 0) return;
  const DeviceGuard guard(device, "dequantize_4bit");
  const cudaStream_t queue = reinterpret_cast<cudaStream_t>(stream);
  if (dtype == DType::f32) launch(w, static_cast<float*>(out), queue);
  if (dtype == DType::f16) launch(w, static_cast<__half*>(out), queue);
  if (dtype == DType::bf16) launch(w, static_cast<__nv_bfloat16*>(out), queue);
}

}  // namespace cuda
}  // namespace pyfinetune
