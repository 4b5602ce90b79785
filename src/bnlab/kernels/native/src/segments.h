// The inner loops, over elements that lie side by side.
#pragma once

#include "buffer.h"
#include "fold.h"

namespace BNLAB_ISA {

// The prefetch distance, long enough for memory to answer. The hardware prefetcher stops at the end of a page.
constexpr int64_t kAheadBytes = 4096;
// For segments up to this size that distance is too long: fetch the same place of the next segment instead.
constexpr int64_t kShortBytes = 16384;

// How many elements ahead to fetch, in segments of `length` that lie `stride` apart.
template <class T>
BNLAB_INLINE int64_t distance(int64_t length, int64_t stride) {
  return length * int64_t(sizeof(T)) <= kShortBytes ? stride : kAheadBytes / int64_t(sizeof(T));
}

// Marks a lambda that only prefetches. Without it, a compiler that sees no effect in the lambda drops the call.
#define BNLAB_EAGER __attribute__((always_inline))

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

// Coefficients of every column, each in its slot, padded to whole vectors.
struct PerColumn {
  const float *a, *b, *c;
  BNLAB_INLINE Vec first(int64_t j) const { return load(a + j); }
  BNLAB_INLINE Vec second(int64_t j) const { return load(b + j); }
  BNLAB_INLINE Vec third(int64_t j) const { return load(c + j); }
  PerColumn from(int64_t j) const { return {a + j, b + j, c + j}; }
};

// Coefficients of the columns of rows of T, `width` of them.
template <class T>
class Columns {
 public:
  explicit Columns(int64_t width) : width_(width), a_(width), b_(width), c_(width) {}
  PerColumn view() const { return {a_.data(), b_.data(), c_.data()}; }
  void set(int64_t j, float pivot) const { set(j, pivot, 0, 0); }
  void set(int64_t j, const Folded& f) const { set(j, f.pivot, f.scale, f.shift); }
  void set(int64_t j, const FoldedGradient& f) const { set(j, f.scale, f.slope, f.shift); }
  // Each channel's value over the `positions` of its plane.
  template <class Value>
  void spread(int64_t positions, const Value* values) const {
    for (int64_t c = 0, j = 0; j < width_; ++c)
      for (const int64_t end = j + positions; j < end; ++j) set(j, values[c]);
  }
  // The values of all channels, again and again.
  template <class Value>
  void repeat(int64_t channels, const Value* values) const {
    for (int64_t c = 0, j = 0; j < width_; ++j, c = c + 1 == channels ? 0 : c + 1) set(j, values[c]);
  }

 private:
  void set(int64_t j, float a, float b, float c) const {
    const int64_t at = slot<T>(j, width_);
    a_[at] = a, b_[at] = b, c_[at] = c;
  }
  int64_t width_;
  Buffer<float> a_, b_, c_;  // with a cache line beyond the last for the last vector
};

// The result for a value that the activation Act does not let pass: 0, or the value times the slope of a leaky ReLU.
template <int Act>
struct Slope {
  Vec slope;
  explicit BNLAB_INLINE Slope(float of_negatives) : slope(splat(of_negatives)) {}
  BNLAB_INLINE Vec activate(Vec value) const {
    if (Act == BNLAB_IDENTITY) return value;
    return Act == BNLAB_RELU ? positive(value) : select(passes(value), value, mul(value, slope));
  }
  BNLAB_INLINE Vec gradient(Lanes passed, Vec value) const {
    return Act == BNLAB_RELU ? keep(passed, value) : select(passed, value, mul(value, slope));
  }
};

// Writes `Rows` rows that lie `stride` apart: pack(j, row) are two vectors of them, whole(j, row) is one and tail(j, row,
// n) one of n lanes behind the last pack, and ahead(j, row) fetches the line that is needed after the one at j. Where
// `streaming` the rows begin with a cache line.
template <int Rows, class T, class Packs, class Whole, class Tail, class Ahead>
BNLAB_INLINE void write_rows(T* out, int64_t stride, int64_t n, bool streaming, const Packs& pack, const Whole& whole,
                             const Tail& tail, const Ahead& ahead) {
  constexpr int64_t bytes = kPackLanes * int64_t(sizeof(T)), packs = bytes < 64 ? 64 / bytes : 1;
  constexpr int64_t width = packs * kPackLanes;
  int64_t j = 0;
  if (streaming) {
    for (; j + width <= n; j += width)
      for (int r = 0; r < Rows; ++r) {
        ahead(j, r);
        Pack line[packs];
        for (int i = 0; i < packs; ++i) line[i] = pack(j + i * kPackLanes, r);
        for (int i = 0; i < packs; ++i) stream_pack(out + r * stride + j + i * kPackLanes, line[i]);
      }
  }
  for (; j + width <= n; j += width)
    for (int r = 0; r < Rows; ++r) {
      ahead(j, r);
      for (int i = 0; i < packs; ++i)
        store_pack(out + r * stride + j + i * kPackLanes, pack(j + i * kPackLanes, r));
    }
  for (; j + kPackLanes <= n; j += kPackLanes)
    for (int r = 0; r < Rows; ++r) store_pack(out + r * stride + j, pack(j, r));
  if (j + kLanes <= n) {
    for (int r = 0; r < Rows; ++r) store(out + r * stride + j, whole(j, r));
    j += kLanes;
  }
  if (j < n)
    for (int r = 0; r < Rows; ++r) store(out + r * stride + j, tail(j, r, n - j), n - j);
}

// Elements of rows that lie `stride` apart, in elements and in bytes of bits: what a transform reads and writes of them.
template <class T>
struct TransformRun {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* bits;
  int64_t stride, bits_stride;
  int64_t n;      // of a row
  int64_t ahead;  // to fetch, in elements
  bool streaming;
};

// y = act((x - first) * second + third + residual).
template <int Rows, class T, int Act, bool Residual, bool Bits, class Coefficients>
BNLAB_INLINE void transform(const TransformRun<T>& run, const Coefficients k, const Slope<Act> slope) {
  const T* const x = run.x;
  const T* const residual = run.residual;
  uint8_t* const bits = run.bits;
  const int64_t stride = run.stride, bits_stride = run.bits_stride, ahead = run.ahead;
  const auto value = [=](int64_t j, Vec in, Vec other) {
    const Vec out = fma(sub(in, k.first(j)), k.second(j), k.third(j));
    return Residual ? add(out, other) : out;
  };
  const auto single = [=](int64_t j, int r, Vec in, Vec other) {
    const Vec out = value(j, in, other);
    if (Bits) store_lanes(bits + r * bits_stride + j / 8, passes(out));
    return slope.activate(out);
  };
  write_rows<Rows>(
      run.y, stride, run.n, run.streaming,
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        const Pack in = load_pack(x + at), other = Residual ? load_pack(residual + at) : Pack{zero(), zero()};
        const Vec a = value(j, in.a, other.a), b = value(j + kLanes, in.b, other.b);
        if (Bits) store_lanes<T>(bits + r * bits_stride + j / 8, passes(a), passes(b));
        return Pack{slope.activate(a), slope.activate(b)};
      },
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        return single(j, r, load(x + at), Residual ? load(residual + at) : zero());
      },
      [=](int64_t j, int r, int64_t rest) {
        const int64_t at = r * stride + j;
        return single(j, r, load(x + at, rest), Residual ? load(residual + at, rest) : zero());
      },
      [=](int64_t j, int r) BNLAB_EAGER {
        prefetch(x + r * stride + j + ahead);
        if (Residual) prefetch(residual + r * stride + j + ahead);
      });
}

// The gradient after the activation, whose derivative is read from bits or computed again from x - pivot.
template <class T, int Act, bool Bits, class Forward>
struct Through {
  const uint8_t* bits;
  Forward f;
  Slope<Act> slope;

  // `row` is where the bits of a row begin.
  BNLAB_INLINE Vec single(int64_t row, int64_t j, Vec gradient, Vec centered) const {
    if (!Act) return gradient;
    return slope.gradient(Bits ? load_lanes(bits + row + j / 8) : again(j, centered), gradient);
  }
  BNLAB_INLINE Pack pack(int64_t row, int64_t j, Pack gradient, Pack centered) const {
    if (!Act) return gradient;
    const LanesPack passed = Bits ? load_lanes_pack<T>(bits + row + j / 8)
                                  : LanesPack{again(j, centered.a), again(j + kLanes, centered.b)};
    return {slope.gradient(passed.a, gradient.a), slope.gradient(passed.b, gradient.b)};
  }

 private:
  BNLAB_INLINE Lanes again(int64_t j, Vec centered) const { return passes(fma(centered, f.second(j), f.third(j))); }
};

// The weight of every position in the statistics, one for a whole row or one for each element; none without Weighted.
struct Weights {
  const float* values = nullptr;
  bool whole_row = false;
};

// Elements of rows that lie `stride` apart, in elements and in bytes of bits: what becomes dx of them. dx may be dy.
template <class T>
struct GradientRun {
  const T* dy;
  const T* x;
  const uint8_t* bits;
  Weights weights;
  T* dx;
  int64_t stride, bits_stride;
  int64_t n;      // of a row
  int64_t ahead;  // to fetch, in elements
  bool streaming;
};

// dx = dy * a + ((x - pivot) * b + c) * weight, with dy as the activation lets it through.
template <int Rows, class T, int Act, bool Bits, bool Weighted, class Forward, class Coefficients>
BNLAB_INLINE void transform_gradient(const GradientRun<T>& run, const Forward f, const Coefficients k,
                                     const Slope<Act> slope) {
  const T* const dy = run.dy;
  const T* const x = run.x;
  const Weights weights = run.weights;
  const int64_t stride = run.stride, bits_stride = run.bits_stride, ahead = run.ahead;
  const Through<T, Act, Bits, Forward> through{run.bits, f, slope};
  const auto value = [=](int64_t j, Vec gradient, Vec centered, Vec weight) {
    const Vec rest = fma(centered, k.second(j), k.third(j));
    // Values of weight 0 may be NaN.
    return fma(gradient, k.first(j), Weighted ? keep(passes(weight), mul(weight, rest)) : rest);
  };
  const auto single = [=](int64_t j, int r, Vec gradient, Vec in, Vec weight) {
    const Vec centered = sub(in, f.first(j));
    return value(j, through.single(r * bits_stride, j, gradient, centered), centered, weight);
  };
  write_rows<Rows>(
      run.dx, stride, run.n, run.streaming,
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        const Pack in = load_pack(x + at);
        const Pack centered = {sub(in.a, f.first(j)), sub(in.b, f.first(j + kLanes))};
        const Pack gradient = through.pack(r * bits_stride, j, load_pack(dy + at), centered);
        Pack weight = {zero(), zero()};
        if (Weighted)
          weight = weights.whole_row ? Pack{splat(*weights.values), splat(*weights.values)}
                                     : load_floats<T>(weights.values + j);
        return Pack{value(j, gradient.a, centered.a, weight.a), value(j + kLanes, gradient.b, centered.b, weight.b)};
      },
      [=](int64_t j, int r) {
        const int64_t at = r * stride + j;
        Vec weight = zero();
        if (Weighted) weight = weights.whole_row ? splat(*weights.values) : load(weights.values + j);
        return single(j, r, load(dy + at), load(x + at), weight);
      },
      [=](int64_t j, int r, int64_t rest) {
        const int64_t at = r * stride + j;
        Vec weight = zero();
        if (Weighted) weight = weights.whole_row ? splat(*weights.values) : load(weights.values + j, rest);
        return single(j, r, load(dy + at, rest), load(x + at, rest), weight);
      },
      [=](int64_t j, int r) BNLAB_EAGER {
        prefetch(x + r * stride + j + ahead);
        prefetch(dy + r * stride + j + ahead);
      });
}

struct Pair {
  Vec u, v;
};
struct PackedPair {
  Pair a, b;
};

// u = v = x - pivot, or u weighted. What lies beyond a tail adds nothing.
template <class T, bool Weighted, class Coefficients>
struct Moments {
  static constexpr int64_t kLineElements = 64 / sizeof(T);
  static constexpr int kTogether = 4;  // rows that share a load of their sums; each reads one stream here, two below
  const T* x;
  const float* weights;
  int64_t stride;         // of rows, in elements
  int64_t weight_stride;  // 0 where a weight holds for a whole row
  int64_t distance;       // to fetch ahead
  Coefficients k;

  BNLAB_INLINE PackedPair pack(int64_t row, int64_t j) const {
    const Pack in = load_pack(x + row * stride + j);
    Pack weight = {zero(), zero()};
    if (Weighted) weight = weight_stride ? load_floats<T>(weights + j) : Pack{splat(weights[row]), splat(weights[row])};
    return {pair(j, in.a, weight.a), pair(j + kLanes, in.b, weight.b)};
  }
  BNLAB_INLINE Pair whole(int64_t row, int64_t j) const {
    const Vec weight = Weighted ? (weight_stride ? load(weights + j) : splat(weights[row])) : zero();
    return pair(j, load(x + row * stride + j), weight);
  }
  BNLAB_INLINE Pair tail(int64_t row, int64_t j, int64_t n) const {
    Vec weight = zero();
    if (Weighted) weight = weight_stride ? load(weights + j, n) : keep(first(n), splat(weights[row]));
    const Pair found = pair(j, load(x + row * stride + j, n), weight);
    return Weighted ? found : Pair{keep(first(n), found.u), keep(first(n), found.v)};
  }
  BNLAB_INLINE void ahead(int64_t row, int64_t j) const { prefetch(x + row * stride + j + distance); }

 private:
  BNLAB_INLINE Pair pair(int64_t j, Vec in, Vec weight) const {
    const Vec d = sub(in, k.first(j));
    if (!Weighted) return {d, d};
    const Vec counted = keep(passes(weight), d);  // weights are >= 0, and values of weight 0 may be NaN
    return {mul(weight, counted), counted};
  }
};

// What becomes of the gradient of a residual: it is written through the cache, or past it, in packs that are aligned.
enum class Kept { kNot, kStored, kStreamed };

// u = dy as the activation lets it through, v = x - pivot; u is written where a residual wants its gradient.
template <class T, int Act, bool Bits, Kept Residual, class Coefficients>
struct Gradients {
  static constexpr int64_t kLineElements = 64 / sizeof(T);
  static constexpr int kTogether = 2;
  const T* dy;
  const T* x;
  const uint8_t* bits;
  T* dresidual;
  int64_t stride;       // of rows, in elements
  int64_t bits_stride;  // of rows, in bytes
  int64_t distance;     // to fetch ahead
  Coefficients k;
  Slope<Act> slope;

  BNLAB_INLINE PackedPair pack(int64_t row, int64_t j) const {
    const int64_t at = row * stride + j;
    const Pack in = load_pack(x + at);
    const Pack centered = {sub(in.a, k.first(j)), sub(in.b, k.first(j + kLanes))};
    const Pack gradient = through().pack(row * bits_stride, j, load_pack(dy + at), centered);
    if (Residual == Kept::kStored) store_pack(dresidual + at, gradient);
    if (Residual == Kept::kStreamed) stream_pack(dresidual + at, gradient);
    return {{gradient.a, centered.a}, {gradient.b, centered.b}};
  }
  BNLAB_INLINE Pair whole(int64_t row, int64_t j) const {
    const int64_t at = row * stride + j;
    const Pair found = pair(row, j, load(dy + at), load(x + at));
    if (Residual != Kept::kNot) store(dresidual + at, found.u);
    return found;
  }
  BNLAB_INLINE Pair tail(int64_t row, int64_t j, int64_t n) const {
    const int64_t at = row * stride + j;
    Pair found = pair(row, j, load(dy + at, n), load(x + at, n));
    found = {keep(first(n), found.u), keep(first(n), found.v)};
    if (Residual != Kept::kNot) store(dresidual + at, found.u, n);
    return found;
  }
  BNLAB_INLINE void ahead(int64_t row, int64_t j) const {
    prefetch(x + row * stride + j + distance);
    prefetch(dy + row * stride + j + distance);
  }

 private:
  BNLAB_INLINE Through<T, Act, Bits, Coefficients> through() const { return {bits, k, slope}; }
  BNLAB_INLINE Pair pair(int64_t row, int64_t j, Vec gradient, Vec in) const {
    const Vec centered = sub(in, k.first(j));
    return {through().single(row * bits_stride, j, gradient, centered), centered};
  }
};

// Sums of u and of u*v over one channel, segment after segment.
class ChannelSums {
 public:
  template <class Terms>
  BNLAB_INLINE void add_segment(const Terms terms, int64_t n) {
    constexpr int64_t step = 2 * kPackLanes;
    int64_t j = 0;
    while (j < n) {
      const int64_t end = j + std::min((n - j) / step, room_) * step;
      room_ -= (end - j) / step;
      Vec u0 = u_[0], u1 = u_[1], u2 = u_[2], u3 = u_[3], v0 = v_[0], v1 = v_[1], v2 = v_[2], v3 = v_[3];
      for (; j < end; j += step) {
        for (int64_t i = 0; i < step; i += Terms::kLineElements) terms.ahead(0, j + i);
        const PackedPair low = terms.pack(0, j), high = terms.pack(0, j + kPackLanes);
        add(low.a, &u0, &v0);
        add(low.b, &u1, &v1);
        add(high.a, &u2, &v2);
        add(high.b, &u3, &v3);
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

// Sums of u and of u*v over every column of rows of T.
template <class T>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t width)
      : width_(width), padded_(ceil_div(width, kLanes) * kLanes), u_(padded_), v_(padded_), sums_(2 * padded_) {}

  template <class Terms>
  BNLAB_INLINE void add_rows(const Terms terms, int64_t rows) {
    int64_t row = 0;
    while (row < rows) {
      const int64_t end = row + std::min(rows - row, kTerms);
      for (; row + Terms::kTogether <= end; row += Terms::kTogether) add_together<Terms::kTogether>(terms, row);
      for (; row < end; ++row) add_together<1>(terms, row);
      flush();
    }
  }
  double first(int64_t j) const { return sums_[slot<T>(j, width_)]; }
  double second(int64_t j) const { return sums_[padded_ + slot<T>(j, width_)]; }

 private:
  template <int Rows, class Terms>
  BNLAB_INLINE void add_together(const Terms terms, int64_t row) {
    float* const us = u_.data();
    float* const vs = v_.data();
    int64_t j = 0;
    for (; j + kPackLanes <= width_; j += kPackLanes) {
      Vec ua = load(us + j), va = load(vs + j), ub = load(us + j + kLanes), vb = load(vs + j + kLanes);
      for (int r = 0; r < Rows; ++r) {
        for (int64_t i = 0; i < kPackLanes; i += Terms::kLineElements)
          if ((j + i) % Terms::kLineElements == 0) terms.ahead(row + r, j + i);
        const PackedPair found = terms.pack(row + r, j);
        add_pair(found.a, &ua, &va);
        add_pair(found.b, &ub, &vb);
      }
      store(us + j, ua);
      store(vs + j, va);
      store(us + j + kLanes, ub);
      store(vs + j + kLanes, vb);
    }
    for (; j < width_; j += kLanes) {
      Vec u = load(us + j), v = load(vs + j);
      for (int r = 0; r < Rows; ++r)
        add_pair(j + kLanes <= width_ ? terms.whole(row + r, j) : terms.tail(row + r, j, width_ - j), &u, &v);
      store(us + j, u);
      store(vs + j, v);
    }
  }
  static BNLAB_INLINE void add_pair(Pair pair, Vec* u, Vec* v) {
    *u = add(*u, pair.u);
    *v = fma(pair.u, pair.v, *v);
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
