// The parts of torch's stable C interface that the kernels use. They are declared here to compile without torch.
//
// The declarations are those of torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of torch 2.10, and
// values are on the stack in the form of torch/csrc/stable/stableivalue_conversions.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

extern "C" {
typedef struct AtenTensorOpaque* AtenTensorHandle;
typedef struct TorchLibraryOpaque* TorchLibraryHandle;
typedef uint64_t StableIValue;
typedef int32_t AOTITorchError;  // 0 without error

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_uint8();

AOTITorchError aoti_torch_empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void** borrowed);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t** borrowed);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t** borrowed);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);

AOTITorchError aoti_torch_library_init_def(const char* name_space, const char* file, uint32_t line,
                                           TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char* name_space, const char* dispatch_key, const char* file,
                                            uint32_t line, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name,
                                  void (*boxed)(StableIValue*, uint64_t arguments, uint64_t results),
                                  uint64_t built_for_torch);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*task)(int64_t begin, int64_t end, void* context), void* context);
}

namespace torch_abi {

// The version of torch whose conventions for the stack these are: 2.10.
constexpr uint64_t kTorch = uint64_t(2) << 56 | uint64_t(10) << 48;

inline void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("torch refused: ") + what);
}

// Owns a handle of a tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  void* data() const { return ask<void*>(aoti_torch_get_data_ptr, "data"); }
  int64_t rank() const { return ask<int64_t>(aoti_torch_get_dim, "rank"); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel, "numel"); }
  const int64_t* sizes() const { return ask<int64_t*>(aoti_torch_get_sizes, "sizes"); }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides, "strides"); }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype, "dtype"); }

 private:
  template <class Value>
  Value ask(AOTITorchError (*question)(AtenTensorHandle, Value*), const char* what) const {
    Value value{};
    check(question(handle_, &value), what);
    return value;
  }
  AtenTensorHandle handle_;
};

// A value that is taken off a stack, together with its ownership.
template <class Value>
struct Taken {
  static Value from(StableIValue on_stack) {
    Value value;
    memcpy(&value, &on_stack, sizeof(value));
    return value;
  }
};
template <>
struct Taken<Tensor> {
  static Tensor from(StableIValue on_stack) { return Tensor(Taken<AtenTensorHandle>::from(on_stack)); }
};
template <class Value>
struct Taken<std::optional<Value>> {
  static std::optional<Value> from(StableIValue on_stack) {
    StableIValue* const inner = Taken<StableIValue*>::from(on_stack);
    if (inner == nullptr) return std::nullopt;
    const StableIValue value = *inner;
    delete inner;
    return Taken<Value>::from(value);
  }
};

template <class Value>
StableIValue on_stack(Value value) {
  static_assert(sizeof(value) <= sizeof(StableIValue), "a value of the stack");
  StableIValue place = 0;
  memcpy(&place, &value, sizeof(value));
  return place;
}
inline StableIValue on_stack(Tensor value) { return on_stack(value.release()); }

// A function as torch calls it: its arguments are taken off the stack, and its results put there.
template <auto Function>
struct Boxed;
template <class... Results, class... Arguments, std::tuple<Results...> (*Function)(Arguments...)>
struct Boxed<Function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    place(stack, apply(stack, std::index_sequence_for<Arguments...>{}), std::index_sequence_for<Results...>{});
  }

 private:
  template <size_t... I>
  static std::tuple<Results...> apply(StableIValue* stack, std::index_sequence<I...>) {
    return Function(Taken<Arguments>::from(stack[I])...);
  }
  template <size_t... I>
  static void place(StableIValue* stack, std::tuple<Results...> results, std::index_sequence<I...>) {
    ((stack[I] = on_stack(std::move(std::get<I>(results)))), ...);
  }
};

// Operators of a namespace, or their kernels for a dispatch key; torch keeps them for as long as the process lives.
class Library {
 public:
  explicit Library(const char* name_space) {
    check(aoti_torch_library_init_def(name_space, __FILE__, __LINE__, &handle_), name_space);
  }
  Library(const char* name_space, const char* dispatch_key) {
    check(aoti_torch_library_init_impl(name_space, dispatch_key, __FILE__, __LINE__, &handle_), name_space);
  }
  void define(const char* schema) const { check(aoti_torch_library_def(handle_, schema), schema); }
  template <auto Function>
  void implement(const char* name) const {
    check(torch_library_impl(handle_, name, &Boxed<Function>::call, kTorch), name);
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace torch_abi
