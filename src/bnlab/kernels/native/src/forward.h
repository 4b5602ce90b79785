// The transform, alone or behind the statistics of each slab while it is in the cache.
#pragma once

#include <type_traits>

#include "statistics.h"

namespace BNLAB_ISA {

template <class T>
struct ForwardCall {
  const bnlab_problem& p;
  const Shape& shape;
  const T* x;
  const T* residual;
  const double* mean;
  const double* var;
  const double* weight;
  const double* bias;
  T* y;
  uint8_t* bits;
  bool streaming;

  double weight_of(int64_t c) const { return value_or(weight, c, 1); }
  double bias_of(int64_t c) const { return value_or(bias, c, 0); }
  Folded folded(int64_t c) const { return fold(mean[c], var[c], weight_of(c), bias_of(c), p.eps); }
  // Overwrites a channel that float cannot compute.
  void mend(int64_t c) const {
    if (!is_wide(mean[c], var[c], weight_of(c), p.eps)) return;
    fence();
    const ExactChannel k{mean[c], inv_std_of(var[c], p.eps), weight_of(c), bias_of(c), p.activation, p.slope};
    exact_apply(shape, c, k, x, residual, y, bits);
  }
};

struct Columns {
  Buffer<float> a, b, c;
  explicit Columns(int64_t width) : a(width + kLanes), b(width + kLanes), c(width + kLanes) {}
  PerColumn view() const { return {a.data(), b.data(), c.data()}; }
  void set(int64_t j, const Folded& f) const { a[j] = f.pivot, b[j] = f.scale, c[j] = f.shift; }
  void set(int64_t j, const FoldedGradient& f) const { a[j] = f.scale, b[j] = f.slope, c[j] = f.shift; }
  // Copies the first `n` columns to those that follow, up to `width`.
  void repeat(int64_t n, int64_t width) const {
    for (const Buffer<float>* column : {&a, &b, &c})
      for (int64_t j = n; j < width; j += n) std::copy_n(column->data(), n, column->data() + j);
  }
  // Spreads a value per channel over the positions of its plane.
  template <class Value>
  void spread(int64_t begin, int64_t channels, int64_t positions, const Value& value) const {
    for (int64_t i = 0; i < channels; ++i) {
      const auto found = value(begin + i);
      for (int64_t s = 0; s < positions; ++s) set(i * positions + s, found);
    }
  }
};

// Calls visit(how many, first) for rows that are taken together, to load their coefficients once.
template <class Visit>
BNLAB_INLINE void each_rows(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int kTogether = 4;
  int64_t row = begin;
  for (; row + kTogether <= end; row += kTogether) visit(std::integral_constant<int, kTogether>{}, row);
  for (; row < end; ++row) visit(std::integral_constant<int, 1>{}, row);
}

template <class T, bool Active, bool Residual, bool Bits>
void apply_plane(const ForwardCall<T>& call, bnlab_parallel_for parallel_for, int64_t c) {
  const Shape& shape = call.shape;
  const Folded f = call.folded(c);
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    const OneChannel k(f.pivot, f.scale, f.shift);
    const Slope slope(call.p);
    each_segment(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
      const int64_t segment = at / shape.positions * shape.channels + c;
      uint8_t* bits = Bits ? call.bits + segment * shape.segment_bits() + at % shape.positions / 8 : nullptr;
      transform<1, T, Active, Residual, Bits>(call.x + start, Residual ? call.residual + start : nullptr,
                                              call.y + start, bits, 0, 0, length,
                                              distance<T>(length, shape.sample_stride()), k, slope, call.streaming);
    });
  });
  call.mend(c);
}

template <class T, bool Active, bool Residual, bool Bits>
void apply_group(const ForwardCall<T>& call, int64_t group) {
  const Shape& shape = call.shape;
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), width = channels * shape.positions;
  const Columns columns(width);
  columns.spread(begin, channels, shape.positions, [&](int64_t c) { return call.folded(c); });
  const Slope slope(call.p);
  const int64_t stride = shape.sample_stride(), bits_stride = shape.groups() * shape.segment_bits();
  each_rows(0, shape.samples, [&](auto rows, int64_t n) {
    const int64_t start = n * stride + begin * shape.positions;
    transform<rows.value, T, Active, Residual, Bits>(
        call.x + start, Residual ? call.residual + start : nullptr, call.y + start,
        Bits ? call.bits + n * bits_stride + group * shape.segment_bits() : nullptr, stride, bits_stride, width,
        rows.value * stride, columns.view(), slope, call.streaming);
  });
  for (int64_t c = begin; c < begin + channels; ++c) call.mend(c);
}

template <class T, bool Active, bool Residual, bool Bits>
void apply_rows(const ForwardCall<T>& call) {
  const Shape& shape = call.shape;
  const int64_t width = shape.merged * shape.channels;
  const Columns columns(width);
  for (int64_t c = 0; c < shape.channels; ++c) columns.set(c, call.folded(c));
  columns.repeat(shape.channels, width);
  run_parallel(call.p.parallel_for, shape.parts, 1, [&](int64_t i) {
    const Rows rows = rows_of(shape, shape.parts - 1 - i);  // what was read last is still in the cache
    const Slope slope(call.p);
    const auto apply = [&](int64_t r, int64_t n) {
      const int64_t start = r * width;
      transform<1, T, Active, Residual, Bits>(call.x + start, Residual ? call.residual + start : nullptr,
                                              call.y + start, Bits ? call.bits + r * shape.segment_bits() : nullptr,
                                              0, 0, n, kAheadBytes / int64_t(sizeof(T)), columns.view(), slope,
                                              call.streaming);
    };
    for (int64_t r = rows.begin; r < rows.end; ++r) apply(r, width);
    if (rows.rest > 0) apply(rows.end, rows.rest);
  });
  for (int64_t c = 0; c < shape.channels; ++c) call.mend(c);
}

// Statistics first, where there is somewhere to put them, slab by slab.
template <class T, bool Active, bool Residual, bool Bits>
void forward(const ForwardCall<T>& call, const Statistics* out) {
  const Shape& shape = call.shape;
  const double count = double(shape.count());
  const int64_t channel_bytes = shape.count() * shape.itemsize;
  const bnlab_parallel_for parallel_for = call.p.parallel_for;
  if (shape.path == Path::kRows) {
    if (out != nullptr) row_statistics<T, false>(shape, parallel_for, call.x, nullptr, count, *out);
    apply_rows<T, Active, Residual, Bits>(call);
  } else if (shape.path == Path::kGroups) {
    run_parallel(parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged), [&](int64_t group) {
      if (out != nullptr) group_statistics(shape, group, call.x, *out);
      apply_group<T, Active, Residual, Bits>(call, group);
    });
  } else if (shape.parts > 1) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      if (out != nullptr) plane_statistics<T, false>(shape, parallel_for, c, call.x, nullptr, count, *out);
      apply_plane<T, Active, Residual, Bits>(call, parallel_for, c);
    }
  } else {
    run_parallel(parallel_for, shape.channels, Shape::grain(channel_bytes), [&](int64_t c) {
      if (out != nullptr) plane_statistics<T, false>(shape, nullptr, c, call.x, nullptr, count, *out);
      apply_plane<T, Active, Residual, Bits>(call, nullptr, c);
    });
  }
  fence();
}

}  // namespace BNLAB_ISA
