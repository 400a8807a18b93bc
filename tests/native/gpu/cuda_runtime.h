// A GPU emulated on the host, as far as csrc/cuda needs one: the language's words, the runtime's calls, and threads that
// run one at a time (see emulator.cpp). The sources are compiled as they are, with this folder before the toolkit's.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "emulator.h"

#define PYFINETUNE_EMULATED_GPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (pyfinetune::emulated::thread_index())
#define blockIdx (pyfinetune::emulated::block_index())
#define gridDim (pyfinetune::emulated::grid_size())

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = pyfinetune::emulated::kSharedPerBlock;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, size_t... I>
void call_kernel(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  pyfinetune::emulated::run(blocks.x, threads.x, shared,
                            [=] { call_kernel(kernel, arguments, std::index_sequence_for<Parameters...>()); });
  return cudaSuccess;
}

inline void __syncthreads() { pyfinetune::emulated::block_barrier(); }
inline void __syncwarp() { pyfinetune::emulated::warp_barrier(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint32_t word = 0, found[1];
  std::memcpy(&word, &value, sizeof(T));
  pyfinetune::emulated::exchange(&word, 1,
                                 [&](const pyfinetune::emulated::Words* lanes) { found[0] = lanes[lane & 31][0]; });
  std::memcpy(&value, found, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned all, T value, int mask) {
  return __shfl_sync(all, value, int(threadIdx.x % 32) ^ mask);
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
