// What the kernels say to the hardware: conversions, shared memory, asynchronous copies, the matrix unit. A program that
// emulates a GPU on a host brings its own (tests/native/gpu).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace pyfinetune {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// 16 bytes of elements.
template <class T>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

template <class V>
__device__ __forceinline__ V load_as(const void* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V>
__device__ __forceinline__ void store_as(void* p, const V& value) {
  *reinterpret_cast<V*>(p) = value;
}

inline bool aligned_to(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace cuda
}  // namespace pyfinetune

#if defined(PYFINETUNE_EMULATED_GPU)
#include "emulated_device.h"
#else

namespace pyfinetune {
namespace cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Two values, the first in the low half of the word.
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros, some time before the group that it belongs to has
// been waited for. Both addresses are multiples of 16; nothing is read where bytes is 0.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const unsigned target = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until all groups but the kPending youngest are there, for the copies of this thread.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// D[16, 8] += A[16, 16] B[16, 8], of a warp. With g = lane / 4 and t = lane % 4, a word holds two neighbours:
//   a[0] = A[g, 2t..]   a[1] = A[g + 8, 2t..]   a[2] = A[g, 2t + 8..]   a[3] = A[g + 8, 2t + 8..]
//   b[0] = B[2t.., g]   b[1] = B[2t + 8.., g]
//   d[0], d[1] = D[g, 2t], D[g, 2t + 1]         d[2], d[3] = D[g + 8, 2t], D[g + 8, 2t + 1]
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuda
}  // namespace pyfinetune
#endif
