// The part of the DLPack ABI (versions below 1.0, which every torch reads) that hands bytes to torch.
//
// Ownership: who takes a ManagedTensor calls its deleter once, on any thread; it stays valid until then.
// Invariants: the layout is that of DLManagedTensor; names are ours.
#pragma once

#include <cstdint>

namespace offload::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct DataType {
  uint8_t code;  // 1: unsigned integer
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  DeviceType device_type;
  int32_t device_id;
  int32_t dimension_count;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* owner;
  void (*deleter)(ManagedTensor* self);
};

// A PyCapsule of this name holds a ManagedTensor; its taker renames it.
inline constexpr const char* kCapsuleName = "dltensor";

}  // namespace offload::dlpack
