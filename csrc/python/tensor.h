// Python tensors as the kernels need them: checked addresses of what comes in, and new tensors for what goes out.
//
// A kernel believes what it is told about an address. This is the one place of the module where a tensor becomes one:
// View refuses a tensor that is not what the kernel will be told.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "python/dlpack.h"
#include "lipgan/dtype.h"

// pybind11's classes are hidden; a class that holds one must not be more visible.
#define LIPGAN_LOCAL __attribute__((visibility("hidden")))

namespace lipgan::python {

namespace py = pybind11;

inline dlpack::ExchangeApi*& api() {
  static dlpack::ExchangeApi* table = nullptr;
  return table;
}

inline PyTypeObject*& tensor_type() {
  static PyTypeObject* type = nullptr;
  return type;
}

// Takes the type of the tensors that the module will meet, and its table of functions.
inline void use_dlpack(const py::type& type) {
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* table = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) throw py::error_already_set();
  while (table && table->version.major != 1) table = table->previous;
  if (!table || !table->view) throw std::invalid_argument("the DLPack exchange table has no version 1");
  api() = table;
  tensor_type() = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
}

inline int element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What a View leaves as it lies.
enum class Layout {
  contiguous,
  samples,  // the samples of a batch one behind the other, each without a gap: contiguous, channels_last, ...
  pixels,   // contiguous, or channels_last: the channels of a pixel side by side
};

// A contiguous CPU tensor, or one of another layout that is asked for. Copied first is a tensor with other strides, one
// whose memory does not hold its values (a negation that PyTorch has put off, zeros that nobody wrote), and one that does
// not lie at a multiple of the size of its elements (torch.frombuffer with an offset).
class LIPGAN_LOCAL View {
 public:
  View(py::handle object, const char* name, Layout layout = Layout::contiguous)
      : owner_(py::reinterpret_borrow<py::object>(object)) {
    read(name);
    if (!holds_values() || !aligned()) {
      owner_ = owner_.attr("clone")();  // resolves both bits, and keeps the layout
      read(name);
    }
    if (!contiguous() && !(layout == Layout::samples && samples()) && !(layout == Layout::pixels && channels_last())) {
      owner_ = owner_.attr("contiguous")();
      read(name);
      if (!contiguous()) throw std::invalid_argument(std::string(name) + " has no contiguous copy");
    }
  }

  const py::object& object() const { return owner_; }  // the tensor whose memory data() is, perhaps a copy
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  Dtype dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  std::vector<int64_t> shape() const { return {tensor_.shape, tensor_.shape + tensor_.ndim}; }
  std::vector<int64_t> strides() const {
    std::vector<int64_t> strides(static_cast<size_t>(tensor_.ndim));
    int64_t compact = 1;
    for (int dim = tensor_.ndim; dim-- > 0; compact *= tensor_.shape[dim]) {
      strides[static_cast<size_t>(dim)] = tensor_.strides ? tensor_.strides[dim] : compact;
    }
    return strides;
  }

  bool same_shape(const View& other) const { return same(other, tensor_.shape, other.tensor_.shape); }
  bool same_strides(const View& other) const {
    if (!tensor_.strides || !other.tensor_.strides) return contiguous() && other.contiguous();
    return same(other, tensor_.strides, other.tensor_.strides);
  }

  // Of tensors without gaps.
  bool overlaps(const View& other) const {
    const auto begin = reinterpret_cast<uintptr_t>(data()), their_begin = reinterpret_cast<uintptr_t>(other.data());
    return begin < their_begin + other.bytes() && their_begin < begin + bytes();
  }
  size_t bytes() const { return static_cast<size_t>(numel_ * element_size(dtype_)); }

  bool contiguous() const {
    if (!tensor_.strides || numel_ == 0) return true;
    int64_t expected = 1;
    for (int dim = tensor_.ndim; dim-- > 0;) {
      if (!follows(dim, expected)) return false;
    }
    return true;
  }

  const View& expect(Dtype dtype, int64_t numel, const char* name) const {
    if (dtype != dtype_) throw std::invalid_argument(std::string(name) + " has a dtype that does not fit the others");
    if (numel != numel_) {
      throw std::invalid_argument(std::string(name) + " must hold " + std::to_string(numel) + " elements, got " +
                                  std::to_string(numel_));
    }
    return *this;
  }

 private:
  void read(const char* name) {
    if (!api()) throw std::logic_error("use_dlpack() has not been called");
    // The table's functions believe that they get a tensor of its library.
    if (!PyType_IsSubtype(Py_TYPE(owner_.ptr()), tensor_type())) {
      throw py::type_error(std::string(name) + " must be a tensor, got " + Py_TYPE(owner_.ptr())->tp_name);
    }
    if (api()->view(owner_.ptr(), &tensor_) != 0) throw py::error_already_set();
    if (tensor_.device.type != dlpack::kCpu) throw std::invalid_argument(std::string(name) + " must be a CPU tensor");
    const auto [code, bits, lanes] = tensor_.dtype;
    if (lanes == 1 && code == dlpack::kFloat && bits == 32) {
      dtype_ = Dtype::float32;
    } else if (lanes == 1 && code == dlpack::kFloat && bits == 64) {
      dtype_ = Dtype::float64;
    } else if (lanes == 1 && code == dlpack::kFloat && bits == 16) {
      dtype_ = Dtype::float16;
    } else if (lanes == 1 && code == dlpack::kBfloat && bits == 16) {
      dtype_ = Dtype::bfloat16;
    } else {
      throw std::invalid_argument(std::string(name) + " must be float32, float64, float16 or bfloat16");
    }
    numel_ = 1;
    for (int dim = 0; dim < tensor_.ndim; ++dim) numel_ *= tensor_.shape[dim];
  }

  bool holds_values() const {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    if (!data() && numel_ > 0) return false;  // a tensor of zeros without memory
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(owner_.ptr(), is_neg));
    if (!negated) throw py::error_already_set();
    return negated.is(py::handle(Py_False));
  }

  bool aligned() const {
    return numel_ == 0 || reinterpret_cast<uintptr_t>(data()) % static_cast<size_t>(element_size(dtype_)) == 0;
  }

  bool same(const View& other, const int64_t* mine, const int64_t* theirs) const {
    bool equal = tensor_.ndim == other.tensor_.ndim;
    for (int dim = 0; equal && dim < tensor_.ndim; ++dim) equal = mine[dim] == theirs[dim];
    return equal;
  }

  // Whether `dim` is the next of the dimensions that walk over the memory without a gap, the innermost first.
  bool follows(int dim, int64_t& expected) const {
    if (tensor_.shape[dim] == 1) return true;
    if (tensor_.strides[dim] != expected) return false;
    expected *= tensor_.shape[dim];
    return true;
  }

  bool samples() const {
    const int ndim = tensor_.ndim;
    int64_t expected = 1;
    int left = 0;
    for (int dim = 1; dim < ndim; ++dim) left += tensor_.shape[dim] != 1;
    for (bool found = true; found && left > 0;) {
      found = false;
      for (int dim = 1; dim < ndim && !found; ++dim) found = tensor_.shape[dim] != 1 && follows(dim, expected);
      left -= found;
    }
    return left == 0 && (ndim == 0 || follows(0, expected));
  }

  bool channels_last() const {
    int64_t expected = 1;
    if (tensor_.ndim < 2 || !follows(1, expected)) return false;
    for (int dim = tensor_.ndim; dim-- > 2;) {
      if (!follows(dim, expected)) return false;
    }
    return follows(0, expected);
  }

  py::object owner_;
  dlpack::Tensor tensor_{};
  Dtype dtype_ = Dtype::float32;
  int64_t numel_ = 0;
};

// Memory of cpu/memory.h for the outputs of a call, in one piece: pieces of some hundred kilobytes fill no huge page, and a
// page's address takes as long to find in cold caches as the page to read. The last of the outputs gives it back.
class LIPGAN_LOCAL Outputs {
 public:
  explicit Outputs(size_t bytes) : memory_(std::make_shared<Memory>(bytes)) {}

  // The place of a tensor in a piece of memory that begins at a cache line, in bytes.
  static size_t room_for(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  friend class NewTensor;
  struct Memory {
    explicit Memory(size_t size) : bytes(size), data(cpu::acquire(size)) {}
    ~Memory() { cpu::release(data, bytes); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    const size_t bytes;
    void* const data;
    size_t used = 0;
  };

  void* take(size_t bytes) const {
    if (memory_->used + bytes > memory_->bytes) throw std::logic_error("the outputs need more memory than was asked for");
    void* place = static_cast<char*>(memory_->data) + memory_->used;
    memory_->used += room_for(bytes);
    return place;
  }

  std::shared_ptr<Memory> memory_;
};

// A new CPU tensor without gaps, uninitialized, in memory of cpu/memory.h.
class LIPGAN_LOCAL NewTensor {
 public:
  // Contiguous, unless it is to lie like another tensor; in memory of its own, unless it is one of several outputs.
  NewTensor(std::vector<int64_t> shape, Dtype dtype, std::vector<int64_t> strides = {},
            const Outputs* outputs = nullptr) {
    const auto ndim = static_cast<int32_t>(shape.size());
    if (strides.empty()) {
      strides.resize(shape.size());
      int64_t step = 1;
      for (size_t dim = shape.size(); dim-- > 0; step *= shape[dim]) strides[dim] = step;
    }
    size_t bytes = static_cast<size_t>(element_size(dtype));
    for (const int64_t extent : shape) bytes *= static_cast<size_t>(extent);
    const Outputs memory = outputs ? *outputs : Outputs(bytes);
    data_ = memory.take(bytes);
    auto* output = new Output{{}, std::move(shape), std::move(strides), memory};
    const dlpack::DataType type = {dtype == Dtype::bfloat16 ? dlpack::kBfloat : dlpack::kFloat,
                                   static_cast<uint8_t>(8 * element_size(dtype)), 1};
    output->managed = {api()->version, output, free, 0,
                       {data_, {dlpack::kCpu, 0}, ndim, type, output->shape.data(), output->strides.data(), 0}};
    void* object = nullptr;
    if (api()->to_object(&output->managed, &object) != 0) throw py::error_already_set();
    object_ = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  }

  void* data() const { return data_; }
  const py::object& object() const { return object_; }

 private:
  struct Output {
    dlpack::ManagedTensor managed;
    std::vector<int64_t> shape, strides;
    Outputs memory;
  };

  static void free(dlpack::ManagedTensor* managed) { delete static_cast<Output*>(managed->context); }

  void* data_;
  py::object object_;
};

}  // namespace lipgan::python
