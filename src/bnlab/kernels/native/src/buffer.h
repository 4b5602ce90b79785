// Scratch memory, aligned to cache lines and zeroed.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

namespace BNLAB_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (size_t(size) * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace BNLAB_ISA
