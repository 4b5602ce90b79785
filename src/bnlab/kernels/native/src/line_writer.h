// Collects adjacent pieces of any length and writes whole cache lines that bypass the cache.
#pragma once

#include "shape.h"

namespace BNLAB_ISA {

template <class T>
class LineWriter {
 public:
  // The pieces begin at `to`; without streaming they are written there directly.
  LineWriter(T* to, bool streaming) : to_(to), streaming_(streaming) {
    if (!streaming) return;
    first_ = fill_ = int64_t(reinterpret_cast<uintptr_t>(to) % 64) / int64_t(sizeof(T));
    to_ -= first_;
  }

  // The number of pieces that may be written at once: only one if they are collected into lines.
  int64_t at_once(int64_t pieces) const { return streaming_ ? 1 : pieces; }
  // Where the next piece, of at most kSmallPlane elements, goes.
  BNLAB_INLINE T* room(int64_t n) {
    T* const found = (streaming_ ? lines_ : to_) + fill_;
    fill_ += n;
    return found;
  }
  // Call this after the piece is written.
  BNLAB_INLINE void filled() {
    if (streaming_ && fill_ > kCapacity - kSmallPlane) flush();
  }
  void finish() {
    if (!streaming_) return;
    flush();
    std::copy(lines_ + first_, lines_ + fill_, to_ + first_);
  }

 private:
  static constexpr int64_t kLineElements = 64 / sizeof(T);
  static constexpr int64_t kCapacity = 4 * kSmallPlane;

  // Writes the lines that are full and keeps the rest.
  BNLAB_INLINE void flush() {
    int64_t i = 0;
    if (first_ > 0 && fill_ >= kLineElements) {
      std::copy(lines_ + first_, lines_ + kLineElements, to_ + first_);
      first_ = 0;
      i = kLineElements;
    }
    for (; i + kLineElements <= fill_; i += kLineElements) stream_line(to_ + i, lines_ + i);
    to_ += i;
    std::copy(lines_ + i, lines_ + fill_, lines_);
    fill_ -= i;
  }

  T* to_;           // where the first line in hand goes
  int64_t first_ = 0;  // the number of elements of that line that belong to others
  int64_t fill_ = 0;
  bool streaming_;
  alignas(64) T lines_[kCapacity];
};

}  // namespace BNLAB_ISA
