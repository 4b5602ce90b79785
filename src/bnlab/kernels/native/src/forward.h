// The transform, alone or after the statistics of each slab of channels while the slab is in the cache.
#pragma once

#include <type_traits>

#include "line_writer.h"
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
  TransformLoops<T> loops;

  double weight_of(int64_t c) const { return value_or(weight, c, 1); }
  std::vector<Folded> folded(int64_t begin, int64_t channels) const {
    return of_channels(begin, channels, [&](int64_t c) { return folded(c); });
  }
  double bias_of(int64_t c) const { return value_or(bias, c, 0); }
  Folded folded(int64_t c) const { return fold(mean[c], inv_std_of(var[c], p.eps), weight_of(c), bias_of(c)); }
  const T* residual_at(int64_t at) const { return residual == nullptr ? nullptr : residual + at; }
  // The bits of a segment from its element `offset` on.
  uint8_t* bits_at(int64_t segment, int64_t offset) const {
    return bits == nullptr ? nullptr : bits + segment * shape.segment_bits() + offset / 8;
  }
  // Overwrites a channel that float cannot compute.
  void mend(int64_t c, const Folded& f) const {
    if (!is_wide(mean[c], var[c], f.scale)) return;
    fence();
    const ExactChannel k{mean[c], inv_std_of(var[c], p.eps), weight_of(c), bias_of(c), p.activation, p.slope};
    exact_apply(shape, c, k, x, residual, y, bits);
  }
};

// Calls visit(how many, first) for rows that are taken together, to load their coefficients once.
template <class Visit>
void each_rows(int64_t begin, int64_t end, const Visit& visit) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) visit(kRowsTogether, row);
  for (; row < end; ++row) visit(1, row);
}

// Whether rows at this distance in elements all begin on a cache line.
template <class T>
bool lines_begin(const T* out, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(out) | uintptr_t(stride) * sizeof(T)) % 64 == 0;
}

// Writes a segment by write(out, j, n, streaming), which writes its elements j to j + n: at once if the segment begins on a
// cache line, or else in pieces that are collected into whole lines.
template <class T, class Write>
void write_segment(T* out, int64_t length, bool streaming, const Write& write) {
  if (!streaming || lines_begin(out, 0)) {
    write(out, 0, length, streaming);
    return;
  }
  LineWriter<T> writer(out, true);
  for (int64_t j = 0; j < length; j += kSmallPlane) {
    const int64_t n = std::min(kSmallPlane, length - j);
    write(writer.room(n), j, n, false);
    writer.filled();
  }
  writer.finish();
}

template <class T>
void apply_plane(const ForwardCall<T>& call, bnlab_parallel_for parallel_for, int64_t c) {
  const Shape& shape = call.shape;
  const Folded f = call.folded(c);
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    each_segment(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
      const int64_t segment = at / shape.positions * shape.channels + c, offset = at % shape.positions;
      const int64_t ahead = distance<T>(length, shape.sample_stride());
      write_segment(call.y + start, length, call.streaming, [&](T* out, int64_t j, int64_t n, bool streaming) {
        call.loops.planes({call.x + start + j, call.residual_at(start + j), out, call.bits_at(segment, offset + j), 0,
                           0, n, ahead, streaming},
                          1, &f, call.p.slope);
      });
    });
  });
  call.mend(c, f);
}

template <class T>
void apply_group(const ForwardCall<T>& call, int64_t group) {
  const Shape& shape = call.shape;
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), s = shape.positions;
  const std::vector<Folded> folded = call.folded(begin, channels);
  const bool lines = lines_begin(call.y, s), streaming = call.streaming && lines;
  // Backwards, because the data that was read last is still in the cache.
  each_row(shape, group, sizeof(T), true, [&](int64_t n, int64_t row, const auto& each_run) {
    LineWriter<T> writer(call.y + row, call.streaming && !lines);
    each_run(writer.at_once(channels), [&](int64_t i, int64_t planes, int64_t start, int64_t ahead) {
      call.loops.planes({call.x + start, call.residual_at(start), writer.room(planes * s),
                         call.bits_at(n * shape.channels + begin + i, 0), 0, shape.segment_bits(), s, ahead, streaming},
                        planes, &folded[i], call.p.slope);
      writer.filled();
    });
    writer.finish();
  });
  for (int64_t i = 0; i < channels; ++i) call.mend(begin + i, folded[i]);
}

template <class T>
void apply_columns(const ForwardCall<T>& call, int64_t group) {
  const Shape& shape = call.shape;
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), width = channels * shape.positions;
  const std::vector<Folded> folded = call.folded(begin, channels);
  const Columns<T> columns(width);
  columns.spread(shape.positions, folded.data());
  const int64_t stride = shape.sample_stride(), bits_stride = shape.groups() * shape.segment_bits();
  const bool streaming = call.streaming && lines_begin(call.y + begin * shape.positions, stride);
  each_rows(0, shape.samples, [&](int rows, int64_t n) {
    const int64_t start = n * stride + begin * shape.positions;
    const auto loop = rows == 1 ? call.loops.row : call.loops.rows;
    loop({call.x + start, call.residual_at(start), call.y + start, call.bits_at(n * shape.groups() + group, 0), stride,
          bits_stride, width, rows * stride, streaming},
         columns.view(), call.p.slope);
  });
  for (int64_t i = 0; i < channels; ++i) call.mend(begin + i, folded[i]);
}

template <class T>
void apply_rows(const ForwardCall<T>& call) {
  const Shape& shape = call.shape;
  const int64_t width = shape.merged * shape.channels;
  const std::vector<Folded> folded = call.folded(0, shape.channels);
  const RowColumns<T> columns(shape, folded.data());
  run_parallel(call.p.parallel_for, shape.parts, 1, [&](int64_t i) {
    const Rows rows = rows_of(shape, shape.parts - 1 - i);  // the data that was read last is still in the cache
    const auto apply = [&](int64_t r, int64_t length, const Columns<T>& k) {
      const int64_t start = r * width;
      write_segment(call.y + start, length, call.streaming, [&](T* out, int64_t j, int64_t n, bool streaming) {
        call.loops.row({call.x + start + j, call.residual_at(start + j), out, call.bits_at(r, j), 0, 0, n,
                        kAheadBytes / int64_t(sizeof(T)), streaming},
                       k.view().from(j), call.p.slope);
      });
    };
    for (int64_t r = rows.begin; r < rows.end; ++r) apply(r, width, columns.whole);
    if (rows.rest > 0) apply(rows.end, rows.rest, columns.rest);
  });
  for (int64_t c = 0; c < shape.channels; ++c) call.mend(c, folded[c]);
}

// Transforms slab by slab, after the statistics of each slab if there is a place to store them.
template <class T>
void forward(const ForwardCall<T>& call, const Statistics* out) {
  const Shape& shape = call.shape;
  const double count = double(shape.count());
  const int64_t channel_bytes = shape.count() * shape.itemsize;
  const bnlab_parallel_for parallel_for = call.p.parallel_for;
  if (shape.path == Path::kRows) {
    if (out != nullptr) row_statistics<T, false>(shape, parallel_for, call.x, nullptr, count, *out);
    apply_rows(call);
  } else if (shape.path == Path::kColumns) {
    run_parallel(parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged), [&](int64_t group) {
      if (out != nullptr) column_statistics(shape, group, call.x, *out);
      apply_columns(call, group);
    });
  } else if (shape.merged > 1) {
    run_parallel(parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged), [&](int64_t group) {
      if (out != nullptr) group_statistics<T, false>(shape, group, call.x, nullptr, count, *out);
      apply_group(call, group);
    });
  } else if (shape.parts > 1) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      if (out != nullptr) plane_statistics<T, false>(shape, parallel_for, c, call.x, nullptr, count, *out);
      apply_plane(call, parallel_for, c);
    }
  } else {
    run_parallel(parallel_for, shape.channels, Shape::grain(channel_bytes), [&](int64_t c) {
      if (out != nullptr) plane_statistics<T, false>(shape, nullptr, c, call.x, nullptr, count, *out);
      apply_plane(call, nullptr, c);
    });
  }
  fence();
}

}  // namespace BNLAB_ISA
