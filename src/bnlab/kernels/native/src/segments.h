// The inner loops, over elements that lie side by side.
#pragma once

#include "buffer.h"
#include "fold.h"

namespace BNLAB_ISA {

// Far enough for memory to answer; the hardware prefetcher stops at the end of a page.
constexpr int64_t kAheadBytes = 4096;
// Segments up to this size end before that distance pays: look at the same place of the next one.
constexpr int64_t kShortBytes = 16384;

// How many elements ahead to fetch, in segments of `length` that lie `stride` apart.
template <class T>
BNLAB_INLINE int64_t distance(int64_t length, int64_t stride) {
  return length * int64_t(sizeof(T)) <= kShortBytes ? stride : kAheadBytes / int64_t(sizeof(T));
}

template <class T>
BNLAB_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

// Coefficients of one channel, the same in every lane.
struct OneChannel {
  Vec a, b, c;
  BNLAB_INLINE OneChannel(float first, float second, float third)
      : a(splat(first)), b(splat(second)), c(splat(third)) {}
  BNLAB_INLINE Vec first(int64_t) const { return a; }
  BNLAB_INLINE Vec second(int64_t) const { return b; }
  BNLAB_INLINE Vec third(int64_t) const { return c; }
};

// Coefficients of every column, padded to whole vectors.
struct PerColumn {
  const float *a, *b, *c;
  BNLAB_INLINE Vec first(int64_t j) const { return load(a + j); }
  BNLAB_INLINE Vec second(int64_t j) const { return load(b + j); }
  BNLAB_INLINE Vec third(int64_t j) const { return load(c + j); }
};

// What becomes of a value that does not pass: 0, or its part by the slope of a leaky ReLU.
struct Slope {
  Vec slope;
  bool leaks;
  explicit BNLAB_INLINE Slope(const bnlab_problem& p)
      : slope(splat(p.slope)), leaks(p.activation == BNLAB_LEAKY_RELU) {}
  BNLAB_INLINE Vec activate(Vec value) const {
    return __builtin_expect(leaks, 0) ? select(passes(value), value, mul(value, slope)) : positive(value);
  }
  BNLAB_INLINE Vec gradient(Lanes passed, Vec value) const {
    return __builtin_expect(leaks, 0) ? select(passed, value, mul(value, slope)) : keep(passed, value);
  }
};

// Writes `Rows` rows that lie `stride` apart: value(j, row) is a vector of them, tail(j, row, n) one of n lanes, and
// ahead(j, row) fetches the line that is needed after the one at j.
template <int Rows, class T, class Value, class Tail, class Ahead>
BNLAB_INLINE void write_rows(T* out, int64_t stride, int64_t n, bool streaming, const Value& value, const Tail& tail,
                             const Ahead& ahead) {
  constexpr int64_t width = kLine<T> * kLanes;
  // Lines begin where `out` is aligned: whole vectors lead there, or all is written through the cache.
  const int64_t lead = int64_t((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / int64_t(sizeof(T));
  const bool aligned = lead % kLanes == 0 && lead <= n && (Rows == 1 || stride * int64_t(sizeof(T)) % 64 == 0);
  int64_t j = 0;
  if (streaming && aligned) {
    for (; j < lead; j += kLanes)
      for (int r = 0; r < Rows; ++r) store(out + r * stride + j, value(j, r));
    for (; j + width <= n; j += width)
      for (int r = 0; r < Rows; ++r) {
        ahead(j, r);
        Vec line[kLine<T>];
        for (int i = 0; i < kLine<T>; ++i) line[i] = value(j + i * kLanes, r);
        stream(out + r * stride + j, line);
      }
  }
  for (; j + width <= n; j += width)
    for (int r = 0; r < Rows; ++r) {
      ahead(j, r);
      for (int i = 0; i < kLine<T>; ++i) store(out + r * stride + j + i * kLanes, value(j + i * kLanes, r));
    }
  for (; j + kLanes <= n; j += kLanes)
    for (int r = 0; r < Rows; ++r) store(out + r * stride + j, value(j, r));
  if (j < n)
    for (int r = 0; r < Rows; ++r) store(out + r * stride + j, tail(j, r, n - j), n - j);
}

// y = act((x - first) * second + third + residual), for rows that lie `stride` apart, in elements and in bytes of bits.
template <int Rows, class T, bool Active, bool Residual, bool Bits, class Coefficients>
BNLAB_INLINE void transform(const T* x, const T* residual, T* y, uint8_t* bits, int64_t stride, int64_t bits_stride,
                            int64_t n, int64_t ahead, const Coefficients k, const Slope slope, bool streaming) {
  const auto value = [=](int64_t j, int r, Vec in, Vec other) {
    Vec out = fma(sub(in, k.first(j)), k.second(j), k.third(j));
    if (Residual) out = add(out, other);
    if (Bits) store_lanes(bits + r * bits_stride + j / 8, passes(out));
    return Active ? slope.activate(out) : out;
  };
  write_rows<Rows>(
      y, stride, n, streaming,
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        return value(j, r, load(x + at), Residual ? load(residual + at) : zero());
      },
      [=](int64_t j, int r, int64_t rest) {
        const int64_t at = r * stride + j;
        return value(j, r, load(x + at, rest), Residual ? load(residual + at, rest) : zero());
      },
      [=](int64_t j, int r) {
        prefetch(x + r * stride + j + ahead);
        if (Residual) prefetch(residual + r * stride + j + ahead);
      });
}

// dx = dy * a + (x - pivot) * b + c, with dy as the activation lets it through: by bits, or computed again from x.
template <int Rows, class T, bool Active, bool Bits, class Forward, class Coefficients>
BNLAB_INLINE void transform_gradient(const T* dy, const T* x, const uint8_t* bits, T* dx, int64_t stride,
                                     int64_t bits_stride, int64_t n, int64_t ahead, const Forward f,
                                     const Coefficients k, const Slope slope, bool streaming) {
  const auto value = [=](int64_t j, int r, Vec gradient, Vec in) {
    const Vec centered = sub(in, f.first(j));
    if (Active) {
      const Lanes passed =
          Bits ? load_lanes(bits + r * bits_stride + j / 8) : passes(fma(centered, f.second(j), f.third(j)));
      gradient = slope.gradient(passed, gradient);
    }
    return fma(gradient, k.first(j), fma(centered, k.second(j), k.third(j)));
  };
  write_rows<Rows>(
      dx, stride, n, streaming,
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        return value(j, r, load(dy + at), load(x + at));
      },
      [=](int64_t j, int r, int64_t rest) {
        const int64_t at = r * stride + j;
        return value(j, r, load(dy + at, rest), load(x + at, rest));
      },
      [=](int64_t j, int r) {
        prefetch(x + r * stride + j + ahead);
        prefetch(dy + r * stride + j + ahead);
      });
}

struct Pair {
  Vec u, v;
};

// u = v = x - pivot, or u weighted. What lies beyond a tail adds nothing.
template <class T, bool Weighted, class Coefficients>
struct Moments {
  static constexpr int64_t kLineElements = 64 / sizeof(T);
  const T* x;
  const float* weights;
  int64_t stride;         // of rows, in elements
  int64_t weight_stride;  // 0 where a weight holds for a whole row
  int64_t distance;       // to fetch ahead
  Coefficients k;

  BNLAB_INLINE Pair pair(int64_t j, Vec in, Vec weight, Lanes lanes) const {
    const Vec d = keep(lanes, sub(in, k.first(j)));
    return Weighted ? Pair{mul(weight, d), d} : Pair{d, d};
  }
  BNLAB_INLINE Pair whole(int64_t row, int64_t j) const {
    const T* p = x + row * stride + j;
    const Vec weight = Weighted ? (weight_stride ? load(weights + j) : splat(weights[row])) : zero();
    return pair(j, load(p), weight, Weighted ? counts(weight) : first(kLanes));
  }
  BNLAB_INLINE Pair tail(int64_t row, int64_t j, int64_t n) const {
    const T* p = x + row * stride + j;
    Vec weight = zero();
    if (Weighted) weight = weight_stride ? load(weights + j, n) : keep(first(n), splat(weights[row]));
    return pair(j, load(p, n), weight, Weighted ? counts(weight) : first(n));
  }
  BNLAB_INLINE void ahead(int64_t row, int64_t j) const { prefetch(x + row * stride + j + distance); }

 private:
  // A weight is >= 0, and what it leaves out may be NaN.
  static BNLAB_INLINE Lanes counts(Vec weight) { return passes(weight); }
};

// u = dy as the activation lets it through, v = x - pivot; u is written where a residual wants its gradient.
template <class T, bool Active, bool Bits, bool Residual, class Coefficients>
struct Gradients {
  static constexpr int64_t kLineElements = 64 / sizeof(T);
  const T* dy;
  const T* x;
  const uint8_t* bits;
  T* dresidual;
  int64_t stride;       // of rows, in elements
  int64_t bits_stride;  // of rows, in bytes
  int64_t distance;     // to fetch ahead
  Coefficients k;
  Slope slope;

  BNLAB_INLINE Pair pair(int64_t row, int64_t j, Vec gradient, Vec in) const {
    const Vec centered = sub(in, k.first(j));
    if (Active) {
      const Lanes passed =
          Bits ? load_lanes(bits + row * bits_stride + j / 8) : passes(fma(centered, k.second(j), k.third(j)));
      gradient = slope.gradient(passed, gradient);
    }
    return {gradient, centered};
  }
  BNLAB_INLINE Pair whole(int64_t row, int64_t j) const {
    const int64_t at = row * stride + j;
    const Pair found = pair(row, j, load(dy + at), load(x + at));
    if (Residual) store(dresidual + at, found.u);
    return found;
  }
  BNLAB_INLINE Pair tail(int64_t row, int64_t j, int64_t n) const {
    const int64_t at = row * stride + j;
    Pair found = pair(row, j, load(dy + at, n), load(x + at, n));
    found = {keep(first(n), found.u), keep(first(n), found.v)};
    if (Residual) store(dresidual + at, found.u, n);
    return found;
  }
  BNLAB_INLINE void ahead(int64_t row, int64_t j) const {
    prefetch(x + row * stride + j + distance);
    prefetch(dy + row * stride + j + distance);
  }
};

// Sums of u and of u*v over one channel, segment after segment.
class ChannelSums {
 public:
  template <class Terms>
  BNLAB_INLINE void add_segment(const Terms terms, int64_t n) {
    constexpr int64_t step = 4 * kLanes;
    int64_t j = 0;
    while (j < n) {
      const int64_t end = j + std::min((n - j) / step, room_) * step;
      room_ -= (end - j) / step;
      Vec u0 = u_[0], u1 = u_[1], u2 = u_[2], u3 = u_[3], v0 = v_[0], v1 = v_[1], v2 = v_[2], v3 = v_[3];
      for (; j < end; j += step) {
        for (int64_t i = 0; i < step; i += Terms::kLineElements) terms.ahead(0, j + i);
        add(terms.whole(0, j), &u0, &v0);
        add(terms.whole(0, j + kLanes), &u1, &v1);
        add(terms.whole(0, j + 2 * kLanes), &u2, &v2);
        add(terms.whole(0, j + 3 * kLanes), &u3, &v3);
      }
      u_[0] = u0, u_[1] = u1, u_[2] = u2, u_[3] = u3, v_[0] = v0, v_[1] = v1, v_[2] = v2, v_[3] = v3;
      if (n - j < step) {
        for (int i = 0; j < n; j += kLanes, ++i)
          add(j + kLanes <= n ? terms.whole(0, j) : terms.tail(0, j, n - j), &u_[i], &v_[i]);
        --room_;
      }
      if (room_ <= 0) flush();
    }
  }
  BNLAB_INLINE Sums total() {
    flush();
    Sums sums;
    for (int i = 0; i < kLanes; ++i) sums.first += first_[i], sums.second += second_[i];
    return sums;
  }

 private:
  static BNLAB_INLINE void add(Pair pair, Vec* u, Vec* v) {
    *u = BNLAB_ISA::add(*u, pair.u);
    *v = fma(pair.u, pair.v, *v);
  }
  BNLAB_INLINE void flush() {
    add_to(first_, BNLAB_ISA::add(BNLAB_ISA::add(u_[0], u_[1]), BNLAB_ISA::add(u_[2], u_[3])));
    add_to(second_, BNLAB_ISA::add(BNLAB_ISA::add(v_[0], v_[1]), BNLAB_ISA::add(v_[2], v_[3])));
    for (int i = 0; i < 4; ++i) u_[i] = v_[i] = zero();
    room_ = kTerms;
  }

  Vec u_[4] = {zero(), zero(), zero(), zero()}, v_[4] = {zero(), zero(), zero(), zero()};
  double first_[kLanes] = {}, second_[kLanes] = {};
  int64_t room_ = kTerms;
};

// Sums of u and of u*v over every column of rows.
class ColumnSums {
 public:
  explicit ColumnSums(int64_t width)
      : width_(width), padded_(ceil_div(width, kLanes) * kLanes), u_(padded_), v_(padded_), sums_(2 * padded_) {}

  template <class Terms>
  BNLAB_INLINE void add_rows(const Terms terms, int64_t rows) {
    int64_t row = 0;
    while (row < rows) {
      const int64_t end = row + std::min(rows - row, kTerms);
      for (; row + kTogether <= end; row += kTogether) add_together<kTogether>(terms, row);
      for (; row < end; ++row) add_together<1>(terms, row);
      flush();
    }
  }
  double first(int64_t j) const { return sums_[j]; }
  double second(int64_t j) const { return sums_[padded_ + j]; }

 private:
  static constexpr int64_t kTogether = 2;

  template <int Rows, class Terms>
  BNLAB_INLINE void add_together(const Terms terms, int64_t row) {
    float* const us = u_.data();
    float* const vs = v_.data();
    int64_t j = 0;
    for (; j + kLanes <= width_; j += kLanes) {
      Vec u = load(us + j), v = load(vs + j);
      for (int r = 0; r < Rows; ++r) {
        if (j % Terms::kLineElements == 0) terms.ahead(row + r, j);
        const Pair pair = terms.whole(row + r, j);
        u = add(u, pair.u);
        v = fma(pair.u, pair.v, v);
      }
      store(us + j, u);
      store(vs + j, v);
    }
    if (j == width_) return;
    Vec u = load(us + j), v = load(vs + j);
    for (int r = 0; r < Rows; ++r) {
      const Pair pair = terms.tail(row + r, j, width_ - j);
      u = add(u, pair.u);
      v = fma(pair.u, pair.v, v);
    }
    store(us + j, u);
    store(vs + j, v);
  }
  void flush() {
    for (int64_t j = 0; j < padded_; j += kLanes) {
      add_to(sums_.data() + j, load(u_.data() + j));
      add_to(sums_.data() + padded_ + j, load(v_.data() + j));
      store(u_.data() + j, zero());
      store(v_.data() + j, zero());
    }
  }

  int64_t width_, padded_;
  Buffer<float> u_, v_;
  Buffer<double> sums_;
};

}  // namespace BNLAB_ISA
