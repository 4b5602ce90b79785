// Mean and variance of every channel, in one pass unless the first guess at the mean was far off.
#pragma once

#include <vector>

#include "exact.h"
#include "loops.h"

namespace BNLAB_ISA {

// The sample for the guess at the mean: pieces of planes, rows, or single weighted values. One guess in many million is off
// by a standard deviation, which costs a second pass.
constexpr int64_t kSampled = 16;
constexpr int64_t kSampledRows = 48;
// Sums of so few terms barely round. The guess may then be off by two standard deviations, and uses fewer rows.
constexpr int64_t kFewTerms = 1024;
constexpr int64_t kSampledWeighted = 256;
// Squares of smaller deviations are denormal in float.
constexpr double kSmallestVariance = 1e-30;

struct Statistics {
  double* mean;
  double* var;
};

// The estimate of a channel from its sums about a pivot.
struct Estimate {
  double mean, var;
  bool far;    // the pivot is more than a standard deviation or two off: sum again about the mean
  bool exact;  // float could not hold the squares: sum again in double
};

inline Estimate estimate(const Sums& sums, double count, float pivot) {
  const double n = count > 0 ? count : 1, offset = sums.first / n;
  const double off = sums.first * offset, m2 = sums.second - off;
  const double var = m2 > 0 ? m2 / n : 0;
  const bool constant = sums.first == 0 && sums.second == 0;
  const bool vanished = var < kSmallestVariance && !constant;
  const bool exact = !std::isfinite(sums.first) || !std::isfinite(sums.second);
  const double mean = double(pivot) + offset;
  const double bound = n <= double(kFewTerms) ? 4 : 1;
  return {mean, var, !exact && off > bound * m2 && float(mean) != pivot, exact || vanished};
}

// A guess at a mean from a few values: the middle one of three means, so that a single outlier does not move it.
// Exact where all values are the same.
struct Guess {
  double sums[3] = {0, 0, 0}, counts[3] = {0, 0, 0};

  void add(int64_t i, double value, double count = 1) {
    sums[i % 3] += value;
    counts[i % 3] += count;
  }
  float pivot() const {
    const double total = counts[0] + counts[1] + counts[2];
    double found = (sums[0] + sums[1] + sums[2]) / (total > 0 ? total : 1);
    if (counts[0] > 0 && counts[1] > 0 && counts[2] > 0) {
      const double a = sums[0] / counts[0], b = sums[1] / counts[1], c = sums[2] / counts[2];
      found = std::max(std::min(a, b), std::min(std::max(a, b), c));
    }
    return std::isfinite(float(found)) ? float(found) : 0.0f;
  }
};

// From pieces of planes, far apart: a vector each, or the whole of a plane that is shorter.
template <class T>
float sampled_pivot(const Shape& shape, int64_t c, const T* x) {
  const int64_t length = std::min<int64_t>(shape.positions, kLanes);
  const int64_t pieces = std::min(kSampled, std::max<int64_t>(1, shape.count() / length));
  double lanes[3][kLanes] = {};
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t at = shape.count() / pieces * i, s = std::min(at % shape.positions, shape.positions - length);
    const T* p = x + at / shape.positions * shape.sample_stride() + c * shape.channel_stride() + s;
    add_to(lanes[i % 3], length == kLanes ? load(p) : load(p, length));
  }
  Guess guess;
  for (int64_t third = 0; third < std::min<int64_t>(pieces, 3); ++third) {
    double sum = 0;
    for (int64_t i = 0; i < length; ++i) sum += lanes[third][i];
    guess.add(third, sum, double(length * ((pieces - third + 2) / 3)));
  }
  return guess.pivot();
}

// From positions far apart that have a weight.
template <class T>
float sampled_pivot(const Shape& shape, int64_t c, const T* x, const float* weights) {
  const int64_t step = std::max<int64_t>(1, shape.count() / kSampledWeighted);
  Guess guess;
  int64_t seen = 0;
  for (int64_t at = 0; at < shape.count(); at += step) {
    if (!(weights[at] > 0)) continue;
    const int64_t start = at / shape.positions * shape.sample_stride() + c * shape.channel_stride();
    guess.add(seen++, widen(x[start + at % shape.positions * shape.position_stride()]));
  }
  return guess.pivot();
}

// Where part i of the N*S values of a channel begins: never within 32 of a plane's positions.
inline int64_t part_begin(const Shape& shape, int64_t i) {
  if (i == shape.parts) return shape.count();
  const int64_t at = shape.count() / shape.parts * i;
  return at - at % shape.positions % 32;
}

// Calls visit(start, length, first sample * S + position) for the segments of one part of a channel in planes.
template <class Visit>
BNLAB_INLINE void each_segment(const Shape& shape, int64_t c, int64_t part, const Visit& visit) {
  for (int64_t at = part_begin(shape, part), end = part_begin(shape, part + 1); at < end;) {
    const int64_t n = at / shape.positions, s = at % shape.positions;
    const int64_t length = std::min(shape.positions - s, end - at);
    visit((n * shape.channels + c) * shape.positions + s, length, at);
    at += length;
  }
}

template <class Visit>
BNLAB_INLINE void each_segment_backwards(const Shape& shape, int64_t c, int64_t part, const Visit& visit) {
  for (int64_t begin = part_begin(shape, part), end = part_begin(shape, part + 1); begin < end;) {
    const int64_t n = (end - 1) / shape.positions, at = std::max(begin, n * shape.positions);
    visit((n * shape.channels + c) * shape.positions + (at - n * shape.positions), end - at, at);
    end = at;
  }
}

// One channel in planes about one pivot; `parallel_for` is for the parts.
template <class T, bool Weighted>
Sums plane_sums(const Shape& shape, bnlab_parallel_for parallel_for, int64_t c, const T* x, const float* weights,
                float pivot) {
  Sums parts[kMostParts];
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    ChannelSums sums;
    each_segment(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
      add_moments<T, Weighted>(&sums,
                               {x + start, Weighted ? weights + at : nullptr, 0, 1,
                                distance<T>(length, shape.sample_stride())},
                               length, 1, &pivot);
    });
    parts[part] = sums.total();
  });
  Sums total;
  for (int64_t i = 0; i < shape.parts; ++i) total.first += parts[i].first, total.second += parts[i].second;
  return total;
}

// The mean and variance of a channel in planes from its sums about a pivot. Sums that are too inaccurate are taken again.
template <class T, bool Weighted>
void settle(const Shape& shape, bnlab_parallel_for parallel_for, int64_t c, const T* x, const float* weights,
            double count, float pivot, const Sums& sums, const Statistics& out) {
  Estimate found = estimate(sums, count, pivot);
  if (found.far) {
    pivot = float(found.mean);
    found = estimate(plane_sums<T, Weighted>(shape, parallel_for, c, x, weights, pivot), count, pivot);
  }
  double unused;
  if (found.exact) exact_moments(shape, c, x, weights, &found.mean, &found.var, &unused);
  out.mean[c] = count > 0 ? found.mean : 0;
  out.var[c] = count > 0 ? found.var : 0;
}

template <class T, bool Weighted>
void plane_statistics(const Shape& shape, bnlab_parallel_for parallel_for, int64_t c, const T* x,
                      const float* weights, double count, const Statistics& out) {
  const float pivot = Weighted ? sampled_pivot(shape, c, x, weights) : sampled_pivot(shape, c, x);
  const Sums sums = plane_sums<T, Weighted>(shape, parallel_for, c, x, weights, pivot);
  settle<T, Weighted>(shape, parallel_for, c, x, weights, count, pivot, sums, out);
}

// Calls visit(n, row, each_run) for the samples of a group, from either end; each_run(most, visit) calls visit(i, planes,
// start, ahead) for runs of at most so many planes, from that of the i-th channel on: what lies `ahead` elements on is read
// next.
template <class Visit>
void each_row(const Shape& shape, int64_t group, int64_t itemsize, bool backwards, const Visit& visit) {
  const int64_t channels = shape.channels_of(group), s = shape.positions, width = channels * s;
  const int64_t stride = backwards ? -shape.sample_stride() : shape.sample_stride();
  const int64_t ahead = std::min(kAheadBytes / itemsize, width);
  const int64_t turn = ceil_div(width - ahead, s);  // from this channel on, what is read next lies in the next row
  for (int64_t k = 0; k < shape.samples; ++k) {
    const int64_t n = backwards ? shape.samples - 1 - k : k, row = n * shape.sample_stride() + group * shape.merged * s;
    visit(n, row, [&](int64_t most, const auto& visit_planes) {
      for (int64_t i = 0, end; i < channels; i = end) {
        end = std::min(i + most, i < turn ? turn : channels);
        visit_planes(i, end - i, row + i * s, i < turn ? ahead : stride - width + ahead);
      }
    });
  }
}

template <class T, bool Weighted>
void group_statistics(const Shape& shape, int64_t group, const T* x, const float* weights, double count,
                      const Statistics& out) {
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group);
  std::vector<float> pivots(static_cast<size_t>(channels));
  std::vector<ChannelSums> sums(static_cast<size_t>(channels));
  for (int64_t i = 0; i < channels; ++i)
    pivots[i] = Weighted ? sampled_pivot(shape, begin + i, x, weights) : sampled_pivot(shape, begin + i, x);
  each_row(shape, group, sizeof(T), false, [&](int64_t n, int64_t, const auto& each_run) {
    const float* weight = Weighted ? weights + n * shape.positions : nullptr;
    each_run(channels, [&](int64_t i, int64_t planes, int64_t start, int64_t ahead) {
      add_moments<T, Weighted>(&sums[i], {x + start, weight, 0, 1, ahead}, shape.positions, planes, &pivots[i]);
    });
  });
  for (int64_t i = 0; i < channels; ++i)
    settle<T, Weighted>(shape, nullptr, begin + i, x, weights, count, pivots[i], sums[i].total(), out);
}

// Planes too small for vectors, as rows of several channels.
template <class T>
void column_statistics(const Shape& shape, int64_t group, const T* x, const Statistics& out) {
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), s = shape.positions;
  const int64_t width = channels * s;
  Buffer<float> pivots(channels);
  for (int64_t c = 0; c < channels; ++c) pivots[c] = sampled_pivot(shape, begin + c, x);
  const Columns<T> columns(width);
  columns.spread(s, pivots.data());
  ColumnSums<T> sums(width);
  add_moments<T, false>(&sums, {x + begin * s, nullptr, shape.sample_stride(), 0, 4 * shape.sample_stride()},
                        shape.samples, columns.view());
  for (int64_t c = 0; c < channels; ++c) {
    Sums total;
    for (int64_t j = c * s; j < (c + 1) * s; ++j) total.first += sums.first(j), total.second += sums.second(j);
    settle<T, false>(shape, nullptr, begin + c, x, nullptr, double(shape.count()), pivots[c], total, out);
  }
}

struct Rows {
  int64_t begin, end;  // whole rows
  int64_t rest;        // columns of the last row that is not whole, 0 if there is none
};

inline Rows rows_of(const Shape& shape, int64_t part) {
  const int64_t whole = shape.count() / shape.merged;
  const bool last = part == shape.parts - 1;
  return {whole * part / shape.parts, whole * (part + 1) / shape.parts,
          last ? shape.count() % shape.merged * shape.channels : 0};
}

// Coefficients of whole rows, and of the row that is not.
template <class T>
struct RowColumns {
  Columns<T> whole, rest;
  template <class Value>
  RowColumns(const Shape& shape, const Value* values)
      : whole(shape.merged * shape.channels), rest(shape.count() % shape.merged * shape.channels) {
    whole.repeat(shape.channels, values);
    rest.repeat(shape.channels, values);
  }
};

// Sums over all rows with the channels last: add(sums, row, rows, whole) adds so many rows, whole ones or the last one.
template <class T, class Add>
void row_sums(const Shape& shape, bnlab_parallel_for parallel_for, const Add& add, Sums* totals) {
  const int64_t width = shape.merged * shape.channels;
  Buffer<Sums> parts(shape.parts * shape.channels);
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    const Rows rows = rows_of(shape, part);
    Sums* mine = parts.data() + part * shape.channels;
    const auto collect = [&](const ColumnSums<T>& sums, int64_t columns) {
      for (int64_t j = 0, c = 0; j < columns; ++j, c = c + 1 == shape.channels ? 0 : c + 1)
        mine[c].first += sums.first(j), mine[c].second += sums.second(j);
    };
    ColumnSums<T> sums(width);
    add(&sums, rows.begin, rows.end - rows.begin, true);
    collect(sums, width);
    if (rows.rest == 0) return;
    ColumnSums<T> last(rows.rest);
    add(&last, rows.end, 1, false);
    collect(last, rows.rest);
  });
  for (int64_t c = 0; c < shape.channels; ++c) totals[c] = Sums();
  for (int64_t part = 0; part < shape.parts; ++part)
    for (int64_t c = 0; c < shape.channels; ++c) {
      totals[c].first += parts[part * shape.channels + c].first;
      totals[c].second += parts[part * shape.channels + c].second;
    }
}

// From whole rows far apart, for every channel.
template <class T>
void sampled_row_pivots(const Shape& shape, const T* x, float* pivots) {
  const int64_t count = shape.count(), rows = std::min(count, count <= kFewTerms ? kSampled : kSampledRows);
  const int64_t padded = ceil_div(shape.channels, kLanes) * kLanes;
  const Buffer<double> thirds(3 * padded);
  for (int64_t i = 0; i < rows; ++i) {
    const T* p = x + count / rows * i * shape.channels;
    double* sums = thirds.data() + i % 3 * padded;
    int64_t c = 0;
    for (; c + kLanes <= shape.channels; c += kLanes) add_to(sums + c, load(p + c));
    if (c < shape.channels) add_to(sums + c, load(p + c, shape.channels - c));
  }
  for (int64_t c = 0; c < shape.channels; ++c) {
    Guess guess;
    for (int64_t third = 0; third < std::min<int64_t>(rows, 3); ++third)
      guess.add(third, thirds[third * padded + c], double((rows - third + 2) / 3));
    pivots[c] = guess.pivot();
  }
}

// From whole rows far apart that have a weight.
template <class T>
void sampled_row_pivots(const Shape& shape, const T* x, const float* weights, float* pivots) {
  const int64_t count = shape.count(), step = std::max<int64_t>(1, count / kSampledRows);
  const Buffer<Guess> guesses(shape.channels);
  int64_t seen = 0;
  for (int64_t row = 0; row < count; row += step) {
    if (!(weights[row] > 0)) continue;
    const T* p = x + row * shape.channels;
    for (int64_t c = 0; c < shape.channels; ++c) guesses[c].add(seen, widen(p[c]));
    ++seen;
  }
  for (int64_t c = 0; c < shape.channels; ++c) pivots[c] = guesses[c].pivot();
}

template <class T, bool Weighted>
void row_statistics(const Shape& shape, bnlab_parallel_for parallel_for, const T* x, const float* weights,
                    double count, const Statistics& out) {
  const int64_t width = shape.merged * shape.channels;
  Buffer<float> pivots(shape.channels);
  Buffer<Sums> totals(shape.channels);
  if (Weighted)
    sampled_row_pivots(shape, x, weights, pivots.data());
  else
    sampled_row_pivots(shape, x, pivots.data());
  for (int attempt = 0; attempt < 2; ++attempt) {
    const RowColumns<T> columns(shape, pivots.data());
    row_sums<T>(
        shape, parallel_for,
        [&](ColumnSums<T>* sums, int64_t row, int64_t rows, bool whole) {
          add_moments<T, Weighted>(
              sums, {x + row * width, Weighted ? weights + row : nullptr, width, 0, kAheadBytes / int64_t(sizeof(T))},
              rows, (whole ? columns.whole : columns.rest).view());
        },
        totals.data());
    bool far = false;
    for (int64_t c = 0; c < shape.channels; ++c) {
      Estimate found = estimate(totals[c], count, pivots[c]);
      far = far || found.far;
      double unused;
      if (found.exact) exact_moments(shape, c, x, weights, &found.mean, &found.var, &unused);
      out.mean[c] = count > 0 ? found.mean : 0;
      out.var[c] = count > 0 ? found.var : 0;
      pivots[c] = found.exact ? pivots[c] : float(found.mean);
    }
    if (!far) return;
  }
}

template <class T, bool Weighted>
void statistics(const bnlab_problem& p, const Shape& shape, const T* x, const float* weights, double count,
                const Statistics& out) {
  const int64_t channel_bytes = shape.count() * shape.itemsize;
  if (shape.path == Path::kRows) return row_statistics<T, Weighted>(shape, p.parallel_for, x, weights, count, out);
  if (shape.path == Path::kColumns || shape.merged > 1) {
    return run_parallel(p.parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged),
                        [&](int64_t group) {
                          if (shape.path == Path::kColumns)
                            column_statistics(shape, group, x, out);
                          else
                            group_statistics<T, Weighted>(shape, group, x, weights, count, out);
                        });
  }
  if (shape.parts > 1) {
    for (int64_t c = 0; c < shape.channels; ++c)
      plane_statistics<T, Weighted>(shape, p.parallel_for, c, x, weights, count, out);
    return;
  }
  run_parallel(p.parallel_for, shape.channels, Shape::grain(channel_bytes), [&](int64_t c) {
    plane_statistics<T, Weighted>(shape, nullptr, c, x, weights, count, out);
  });
}

}  // namespace BNLAB_ISA
