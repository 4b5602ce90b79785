// The gradients: the sums over each channel, then dx, for one slab of channels at a time while it is in the cache.
#pragma once

#include "forward.h"

namespace BNLAB_ISA {

// A channel that needs double: holds its dx in the order of n*S + s until the dx of the other channels is written.
template <class T>
struct ExactGradient {
  int64_t channel;
  std::vector<T> dx;
};

template <class T>
struct BackwardCall {
  const bnlab_problem& p;
  const Shape& shape;
  const T* dy;
  const T* x;
  const float* weights;
  double count;  // of values, or the sum of their weights
  bool batch_statistics;
  const double* mean;
  const double* var;
  const double* inv_std;
  const double* weight;
  const double* bias;
  const uint8_t* bits;
  T* dx;  // may be dy
  T* dresidual;
  double* dweight;
  double* dbias;
  bool streaming;
  GradientLoops<T> loops;

  // Without an activation the gradient of a residual is dy.
  bool keeps_residual() const { return bits != nullptr && dresidual != nullptr; }
  T* residual_at(int64_t at) const { return keeps_residual() ? dresidual + at : nullptr; }
  // The bits of a segment from its element `offset` on.
  const uint8_t* bits_at(int64_t segment, int64_t offset) const {
    return bits == nullptr ? nullptr : bits + segment * shape.segment_bits() + offset / 8;
  }
  // The weights of the positions from `at` on, or of a whole row.
  Weights weights_at(int64_t at, bool whole_row) const {
    return weights == nullptr ? Weights{} : Weights{weights + at, whole_row};
  }
  double weight_of(int64_t c) const { return value_or(weight, c, 1); }
  Folded folded(int64_t c) const { return fold(mean[c], inv_std[c], weight_of(c), value_or(bias, c, 0)); }
  std::vector<Folded> folded(int64_t begin, int64_t channels) const {
    return of_channels(begin, channels, [&](int64_t c) { return folded(c); });
  }
  FoldedGradient gradient(int64_t c) const {
    if (!batch_statistics) return {quiet(weight_of(c) * inv_std[c]), 0, 0};
    return fold_gradient(mean[c], inv_std[c], weight_of(c), dweight[c], dbias[c], count);
  }
  std::vector<FoldedGradient> gradients(int64_t begin, int64_t channels) const {
    return of_channels(begin, channels, [&](int64_t c) { return gradient(c); });
  }
  // Keeps the sums of dy and of dy * (x - pivot) as the gradients of weight and bias.
  void keep(int64_t c, const Sums& sums, float pivot) const {
    dbias[c] = sums.first;
    dweight[c] = inv_std[c] * (sums.second - (mean[c] - double(pivot)) * sums.first);
  }
  // Whether the gradient of a residual may bypass the cache if it is written in pieces of this many elements.
  bool streams_residual(int64_t piece) const {
    return keeps_residual() && streaming && lines_begin(dresidual, piece);
  }
  // The channels from `begin` on that need double. They are computed before dx overwrites dy.
  std::vector<ExactGradient<T>> exact(int64_t begin, int64_t channels) const {
    std::vector<ExactGradient<T>> found;
    for (int64_t c = begin; c < begin + channels; ++c) {
      const bool sums = std::isfinite(dweight[c]) && std::isfinite(dbias[c]) && !too_wide(dweight[c]);
      if (!sums || is_wide(mean[c], var[c], weight_of(c) * inv_std[c])) found.push_back({c, exact_values(c)});
    }
    return found;
  }
  std::vector<T> exact_values(int64_t c) const {
    std::vector<T> values(static_cast<size_t>(dx == nullptr ? 0 : shape.count()));
    const ExactChannel k{mean[c],      inv_std[c], weight_of(c), value_or(bias, c, 0),
                         p.activation, p.slope};
    fence();
    exact_backward(shape, c, k, dy, x, weights, batch_statistics, bits, dx == nullptr ? nullptr : values.data(),
                   dresidual, dweight, dbias);
    return values;
  }
  void place(const ExactGradient<T>& exact) const {
    if (dx == nullptr) return;
    fence();
    each_value(shape, exact.channel, [&](int64_t at, int64_t index) { dx[at] = exact.dx[size_t(index)]; });
  }
};

template <class T>
void plane_gradient(const BackwardCall<T>& call, bnlab_parallel_for parallel_for, int64_t c) {
  const Shape& shape = call.shape;
  const Folded f = call.folded(c);
  const auto bits_at = [&](int64_t at) {
    return call.bits_at(at / shape.positions * shape.channels + c, at % shape.positions);
  };
  const SumPlanes<T> sum =
      call.streams_residual(shape.positions) ? call.loops.sum_planes_streaming : call.loops.sum_planes;
  Sums parts[kMostParts];
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    ChannelSums sums;
    each_segment(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
      sum(&sums,
          {call.dy + start, call.x + start, bits_at(at), call.residual_at(start), 0, 0,
           distance<T>(length, shape.sample_stride())},
          length, 1, &f, call.p.slope);
    });
    parts[part] = sums.total();
  });
  Sums total;
  for (int64_t i = 0; i < shape.parts; ++i) total.first += parts[i].first, total.second += parts[i].second;
  call.keep(c, total, f.pivot);
  const std::vector<ExactGradient<T>> exact = call.exact(c, 1);
  if (call.dx != nullptr && exact.empty()) {
    const FoldedGradient g = call.gradient(c);
    run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
      // Backwards, because the data that was read last is still in the cache.
      each_segment_backwards(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
        const int64_t ahead = distance<T>(length, -shape.sample_stride());
        write_segment(call.dx + start, length, call.streaming, [&](T* out, int64_t j, int64_t n, bool streaming) {
          call.loops.planes({call.dy + start + j, call.x + start + j, bits_at(at + j), call.weights_at(at + j, false),
                             out, 0, 0, n, ahead, streaming},
                            1, &f, &g, call.p.slope);
        });
      });
    });
  }
  for (const auto& channel : exact) call.place(channel);
}

template <class T>
void group_gradient(const BackwardCall<T>& call, int64_t group) {
  const Shape& shape = call.shape;
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), s = shape.positions;
  const auto bits_at = [&](int64_t n, int64_t i) { return call.bits_at(n * shape.channels + begin + i, 0); };
  const bool lines = lines_begin(call.dx, s), streaming = call.streaming && lines;
  const bool keeps_residual = call.keeps_residual();
  const std::vector<Folded> folded = call.folded(begin, channels);
  std::vector<ChannelSums> sums(static_cast<size_t>(channels));
  each_row(shape, group, sizeof(T), false, [&](int64_t n, int64_t row, const auto& each_run) {
    LineWriter<T> writer(call.residual_at(row), keeps_residual && call.streaming);
    each_run(writer.at_once(channels), [&](int64_t i, int64_t planes, int64_t start, int64_t ahead) {
      call.loops.sum_planes(&sums[i],
                            {call.dy + start, call.x + start, bits_at(n, i),
                             keeps_residual ? writer.room(planes * s) : nullptr, 0, shape.segment_bits(), ahead},
                            s, planes, &folded[i], call.p.slope);
      if (keeps_residual) writer.filled();
    });
    if (keeps_residual) writer.finish();
  });
  for (int64_t i = 0; i < channels; ++i) call.keep(begin + i, sums[i].total(), folded[i].pivot);
  const std::vector<ExactGradient<T>> exact = call.exact(begin, channels);
  if (call.dx != nullptr) {
    const std::vector<FoldedGradient> gradients = call.gradients(begin, channels);
    each_row(shape, group, sizeof(T), true, [&](int64_t n, int64_t row, const auto& each_run) {
      LineWriter<T> writer(call.dx + row, call.streaming && !lines);
      const Weights weights = call.weights_at(n * s, false);
      each_run(writer.at_once(channels), [&](int64_t i, int64_t planes, int64_t start, int64_t ahead) {
        call.loops.planes({call.dy + start, call.x + start, bits_at(n, i), weights, writer.room(planes * s), 0,
                           shape.segment_bits(), s, ahead, streaming},
                          planes, &folded[i], &gradients[i], call.p.slope);
        writer.filled();
      });
      writer.finish();
    });
  }
  for (const auto& channel : exact) call.place(channel);
}

template <class T>
void column_gradient(const BackwardCall<T>& call, int64_t group) {
  const Shape& shape = call.shape;
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), s = shape.positions;
  const int64_t width = channels * s, start = begin * s, stride = shape.sample_stride();
  const int64_t bits_stride = shape.groups() * shape.segment_bits();
  const Columns<T> forward(width);
  forward.spread(s, call.folded(begin, channels).data());
  ColumnSums<T> sums(width);
  call.loops.sum_rows(&sums,
                      {call.dy + start, call.x + start, call.bits_at(group, 0), call.residual_at(start), stride,
                       bits_stride, 4 * stride},
                      shape.samples, forward.view(), call.p.slope);
  for (int64_t i = 0; i < channels; ++i) {
    Sums total;
    for (int64_t j = i * s; j < (i + 1) * s; ++j) total.first += sums.first(j), total.second += sums.second(j);
    call.keep(begin + i, total, float(call.mean[begin + i]));
  }
  const std::vector<ExactGradient<T>> exact = call.exact(begin, channels);
  if (call.dx != nullptr) {
    const Columns<T> gradient(width);
    gradient.spread(s, call.gradients(begin, channels).data());
    const bool streaming = call.streaming && lines_begin(call.dx + start, stride);
    each_rows(0, shape.samples, [&](int rows, int64_t n) {
      const int64_t at = n * stride + start;
      const auto loop = rows == 1 ? call.loops.row : call.loops.rows;
      loop({call.dy + at, call.x + at, call.bits_at(n * shape.groups() + group, 0), Weights{}, call.dx + at, stride,
            bits_stride, width, rows * stride, streaming},
           forward.view(), gradient.view(), call.p.slope);
    });
  }
  for (const auto& channel : exact) call.place(channel);
}

template <class T>
void row_gradient(const BackwardCall<T>& call) {
  const Shape& shape = call.shape;
  const int64_t width = shape.merged * shape.channels, ahead = kAheadBytes / int64_t(sizeof(T));
  const RowColumns<T> forward(shape, call.folded(0, shape.channels).data());
  const SumRows<T> sum = call.streams_residual(width) ? call.loops.sum_rows_streaming : call.loops.sum_rows;
  Buffer<Sums> totals(shape.channels);
  row_sums<T>(
      shape, call.p.parallel_for,
      [&](ColumnSums<T>* sums, int64_t row, int64_t rows, bool whole) {
        const int64_t at = row * width;
        sum(sums,
            {call.dy + at, call.x + at, call.bits_at(row, 0), call.residual_at(at), width, shape.segment_bits(), ahead},
            rows, (whole ? forward.whole : forward.rest).view(), call.p.slope);
      },
      totals.data());
  for (int64_t c = 0; c < shape.channels; ++c) call.keep(c, totals[c], float(call.mean[c]));
  const std::vector<ExactGradient<T>> exact = call.exact(0, shape.channels);
  if (call.dx != nullptr) {
    const RowColumns<T> gradient(shape, call.gradients(0, shape.channels).data());
    run_parallel(call.p.parallel_for, shape.parts, 1, [&](int64_t i) {
      const Rows rows = rows_of(shape, shape.parts - 1 - i);
      const auto apply = [&](int64_t r, int64_t length, const Columns<T>& f, const Columns<T>& k) {
        const int64_t start = r * width;
        write_segment(call.dx + start, length, call.streaming, [&](T* out, int64_t j, int64_t n, bool streaming) {
          call.loops.row({call.dy + start + j, call.x + start + j, call.bits_at(r, j), call.weights_at(r, true), out, 0,
                          0, n, ahead, streaming},
                         f.view().from(j), k.view().from(j), call.p.slope);
        });
      };
      for (int64_t r = rows.begin; r < rows.end; ++r) apply(r, width, forward.whole, gradient.whole);
      if (rows.rest > 0) apply(rows.end, rows.rest, forward.rest, gradient.rest);
    });
  }
  for (const auto& channel : exact) call.place(channel);
}

template <class T>
void backward(const BackwardCall<T>& call) {
  const Shape& shape = call.shape;
  const int64_t channel_bytes = 2 * shape.count() * shape.itemsize;
  const bnlab_parallel_for parallel_for = call.p.parallel_for;
  if (shape.path == Path::kRows) {
    row_gradient(call);
  } else if (shape.path == Path::kColumns) {
    run_parallel(parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged),
                 [&](int64_t group) { column_gradient(call, group); });
  } else if (shape.merged > 1) {
    run_parallel(parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged),
                 [&](int64_t group) { group_gradient(call, group); });
  } else if (shape.parts > 1) {
    for (int64_t c = 0; c < shape.channels; ++c) plane_gradient(call, parallel_for, c);
  } else {
    run_parallel(parallel_for, shape.channels, Shape::grain(channel_bytes),
                 [&](int64_t c) { plane_gradient(call, nullptr, c); });
  }
  fence();
}

// The gradients under weights together with an activation or bits. No layer uses this combination.
template <class T>
void exact_backward_of_all(const BackwardCall<T>& call) {
  run_parallel(call.p.parallel_for, call.shape.channels, 1,
               [&](int64_t c) { call.place({c, call.exact_values(c)}); });
}

}  // namespace BNLAB_ISA
