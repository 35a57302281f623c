// The binary interface of DLPack 1.x (https://dmlc.github.io/dlpack/latest): how a tensor is described, and the table of
// functions by which a library reads and makes another library's Python tensors in C.
#pragma once
#include <cstdint>

namespace lipgan::dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements; null for a compact tensor
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// Of the type attribute __dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api". The functions that return int
// return 0, or set a Python exception. None waits for a device.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*to_managed)(void* object, ManagedTensor**);
  int (*to_object)(ManagedTensor*, void** object);  // takes over the tensor, returns a new reference
  int (*view)(void* object, Tensor*);               // borrows: valid while the object lives; may be null
  int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace lipgan::dlpack
