// What every CUDA launch needs: the tensor's device made current, the caller's stream, a 64-bit grid, a checked launch.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "../checked.h"

namespace pyfinetune {

inline void check_cuda(cudaError_t status, const char* op, const std::string& what) {
  if (status != cudaSuccess)
    throw BackendUnavailable(std::string(op) + " (" + what + "): " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op, "current device");
    if (device != previous_) check_cuda(cudaSetDevice(device), op, "device " + std::to_string(device));
    changed_ = device != previous_;
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

// Blocks for n items; kernels loop with a 64-bit stride, so a grid larger than the hardware's limit is never needed.
inline unsigned grid_size(int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return unsigned(blocks < (int64_t(1) << 20) ? blocks : (int64_t(1) << 20));
}

inline void check_launch(const char* op, int64_t numel) {
  check_cuda(cudaGetLastError(), op, std::to_string(numel) + " elements");
}

}  // namespace pyfinetune
