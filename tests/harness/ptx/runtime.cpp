// A CUDA runtime without a device: the host code that nvcc makes registers its kernels here and launches them, and each
// launch is handed to a function of Python.
#include <cstddef>
#include <map>
#include <string>

struct Dim3 {
  unsigned x, y, z;
};
using Launch = int (*)(const char* name, unsigned grid, unsigned threads, void** arguments, size_t shared,
                       int cooperative);

namespace {
std::map<const void*, std::string> names;
Launch launch = nullptr;
int multiprocessors = 1;

int run(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, int cooperative) {
  return launch(names.at(function).c_str(), grid.x * grid.y * grid.z, block.x * block.y * block.z, arguments, shared,
                cooperative);
}
}  // namespace

extern "C" {
void configure_runtime(Launch function, int count) {
  launch = function;
  multiprocessors = count;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  names[host] = device;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return run(function, grid, block, arguments, shared, 0);
}
// What the stubs of nvcc call for kernel<<<...>>>: the handle of a kernel is the address of its stub.
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return run(kernel, grid, block, arguments, shared, 0);
}
unsigned __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) { return 1; }  // nothing is launched that way

int cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return run(function, grid, block, arguments, shared, 1);
}

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = multiprocessors;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return 0;
}
}
