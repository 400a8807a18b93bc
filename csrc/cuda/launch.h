// What every CUDA launch needs: the tensor's device made current, the caller's stream, a 64-bit grid, a checked launch.
#pragma once
#include <cuda_runtime.h>

#include <string>
#include <tuple>
#include <utility>

#include "../checked.h"

namespace pyfinetune {
namespace cuda {

// What a launch belongs to; its op and shape are what an error names.
struct Place {
  const char* op;
  std::string shape;
  int device;
  uint64_t stream;
};

inline void check_cuda(cudaError_t status, const Place& place, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // told here; nobody else should stumble over it
  throw BackendUnavailable(std::string(place.op) + " (" + place.shape + "): " + what + ": " +
                           cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(const Place& place) {
    check_cuda(cudaGetDevice(&previous_), place, "no current device");
    changed_ = place.device != previous_;
    if (changed_) check_cuda(cudaSetDevice(place.device), place, "device " + std::to_string(place.device));
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Blocks for n items, for kernels that loop with a 64-bit stride: a grid larger than the hardware's is never needed.
inline int64_t grid_size(int64_t items, int64_t items_per_block) {
  const int64_t blocks = items / items_per_block + (items % items_per_block != 0);
  return blocks < (int64_t(1) << 20) ? blocks : int64_t(1) << 20;
}

// What a block gets without being asked for; more has to be allowed for each kernel. And what it can get at most on the
// smallest of the GPUs that are built for (sm_86, 89 and 120).
constexpr int kUsualShared = 48 << 10, kMostShared = 99 << 10;

template <class Kernel>
void allow_shared(const Place& place, Kernel* kernel, int bytes) {
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device), place,
             "device " + std::to_string(place.device));
  if (bytes > most)
    throw BackendUnavailable(std::string(place.op) + " (" + place.shape + "): needs " + std::to_string(bytes) +
                             " bytes of shared memory a block, and GPU " + std::to_string(place.device) + " has " +
                             std::to_string(most));
  if (bytes > kUsualShared)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), place,
               std::to_string(bytes) + " bytes of shared memory");
}

template <class... Parameters, size_t... I>
cudaError_t enqueue(void (*kernel)(Parameters...), std::tuple<Parameters...>& values, std::index_sequence<I...>,
                    unsigned blocks, int threads, int shared, cudaStream_t stream) {
  void* pointers[] = {static_cast<void*>(&std::get<I>(values))...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(unsigned(threads)), pointers, size_t(shared), stream);
}

// Enqueues a kernel of `blocks` blocks; the device is current. A stream of another device, or one that is gone, a GPU
// that the kernels were not built for, and whatever else the runtime refuses come back as BackendUnavailable.
template <class... Parameters, class... Arguments>
void launch(const Place& place, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
            const Arguments&... arguments) {
  PYFINETUNE_CHECK(blocks > 0 && blocks <= INT32_MAX, std::string(place.op) + " (" + place.shape + "): " +
                                                          std::to_string(blocks) + " blocks are more than a grid has");
  if (shared > kUsualShared) allow_shared(place, kernel, shared);
  std::tuple<Parameters...> values(arguments...);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
  check_cuda(
      enqueue(kernel, values, std::index_sequence_for<Parameters...>(), unsigned(blocks), threads, shared, stream),
      place, "launch on device " + std::to_string(place.device));
}

}  // namespace cuda
}  // namespace pyfinetune
