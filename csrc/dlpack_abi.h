// The DLPack structures that this module reads, declared from the published binary interface
// (https://dmlc.github.io/dlpack/latest/c_api.html), so that no header of another project is needed to build.
#pragma once
#include <cstdint>

extern "C" {

struct DLDevice {
  int32_t device_type;  // 1 = CPU, 2 = CUDA, 3 = CUDA pinned host memory
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;  // 0 = int, 1 = uint, 2 = float, 4 = bfloat
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

}  // extern "C"
