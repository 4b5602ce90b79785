// Mean and variance of every channel, in one pass unless the first guess at the mean was far off.
#pragma once

#include "exact.h"
#include "segments.h"

namespace BNLAB_ISA {

constexpr int64_t kSampledRows = 16;
constexpr int64_t kSampledPositions = 16;
// Squares of smaller deviations are denormal in float.
constexpr double kSmallestVariance = 1e-30;

struct Statistics {
  double* mean;
  double* var;
};

// What the sums about a pivot say of a channel.
struct Estimate {
  double mean, var;
  bool far;    // the pivot is more than one standard deviation off: sum again about the mean
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
  return {mean, var, !exact && off > m2 && float(mean) != pivot, exact || vanished};
}

// A guess at a mean from a few values: the middle one of three means, so that a single outlier does not move it.
// Exact where all values are the same.
struct Guess {
  double sums[3] = {0, 0, 0}, counts[3] = {0, 0, 0};

  void add(int64_t i, double value) {
    sums[i % 3] += value;
    counts[i % 3] += 1;
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

// From samples far apart.
template <class T>
float sampled_pivot(const Shape& shape, int64_t c, const T* x, const float* weights) {
  const int64_t samples = std::min(shape.samples, kSampledRows), step = samples ? shape.samples / samples : 1;
  const int64_t positions = std::min(shape.positions, kSampledPositions);
  Guess guess;
  int64_t seen = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t n = i * step;
    const T* p = x + n * shape.sample_stride() + c * shape.channel_stride();
    for (int64_t s = 0; s < positions; ++s) {
      if (weights != nullptr && !(weights[n * shape.positions + s] > 0)) continue;
      guess.add(seen++, widen(p[s * shape.position_stride()]));
    }
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
    const OneChannel k(pivot, 0, 0);
    each_segment(shape, c, part, [&](int64_t start, int64_t length, int64_t at) {
      sums.add_segment(Moments<T, Weighted, OneChannel>{x + start, Weighted ? weights + at : nullptr, 0, 1,
                                                       distance<T>(length, shape.sample_stride()), k},
                       length);
    });
    parts[part] = sums.total();
  });
  Sums total;
  for (int64_t i = 0; i < shape.parts; ++i) total.first += parts[i].first, total.second += parts[i].second;
  return total;
}

template <class T, bool Weighted>
void plane_statistics(const Shape& shape, bnlab_parallel_for parallel_for, int64_t c, const T* x,
                      const float* weights, double count, const Statistics& out) {
  float pivot = sampled_pivot(shape, c, x, weights);
  Estimate found = estimate(plane_sums<T, Weighted>(shape, parallel_for, c, x, weights, pivot), count, pivot);
  if (found.far) {
    pivot = float(found.mean);
    found = estimate(plane_sums<T, Weighted>(shape, parallel_for, c, x, weights, pivot), count, pivot);
  }
  double unused;
  if (found.exact) exact_moments(shape, c, x, weights, &found.mean, &found.var, &unused);
  out.mean[c] = count > 0 ? found.mean : 0;
  out.var[c] = count > 0 ? found.var : 0;
}

// The channel of every column of a group of small planes.
template <class T>
void group_statistics(const Shape& shape, int64_t group, const T* x, const Statistics& out) {
  const int64_t begin = group * shape.merged, channels = shape.channels_of(group), s = shape.positions;
  const int64_t width = channels * s;
  Buffer<float> pivots(channels), columns(width);
  for (int64_t c = 0; c < channels; ++c) pivots[c] = sampled_pivot<T>(shape, begin + c, x, nullptr);
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int64_t c = 0; c < channels; ++c) std::fill_n(columns.data() + c * s, s, pivots[c]);
    ColumnSums sums(width);
    const PerColumn k{columns.data(), nullptr, nullptr};
    sums.add_rows(Moments<T, false, PerColumn>{x + begin * s, nullptr, shape.sample_stride(), 0,
                                               4 * shape.sample_stride(), k},
                  shape.samples);
    bool far = false;
    for (int64_t c = 0; c < channels; ++c) {
      Sums total;
      for (int64_t j = c * s; j < (c + 1) * s; ++j) total.first += sums.first(j), total.second += sums.second(j);
      Estimate found = estimate(total, double(shape.count()), pivots[c]);
      far = far || found.far;
      double unused;
      if (found.exact) exact_moments<T>(shape, begin + c, x, nullptr, &found.mean, &found.var, &unused);
      out.mean[begin + c] = found.mean;
      out.var[begin + c] = found.var;
      pivots[c] = found.exact ? pivots[c] : float(found.mean);
    }
    if (!far) return;
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

// Repeats a value per channel over the columns of a row.
inline void repeat(const Shape& shape, const float* values, float* columns) {
  for (int64_t i = 0; i < shape.merged; ++i) std::copy_n(values, shape.channels, columns + i * shape.channels);
}

// Sums over all rows with the channels last: Make(begin) returns the terms that begin at a row.
template <class Make>
void row_sums(const Shape& shape, bnlab_parallel_for parallel_for, const Make& make, Sums* totals) {
  const int64_t width = shape.merged * shape.channels;
  Buffer<Sums> parts(shape.parts * shape.channels);
  run_parallel(parallel_for, shape.parts, 1, [&](int64_t part) {
    const Rows rows = rows_of(shape, part);
    Sums* mine = parts.data() + part * shape.channels;
    const auto collect = [&](const ColumnSums& sums, int64_t columns) {
      for (int64_t j = 0, c = 0; j < columns; ++j, c = c + 1 == shape.channels ? 0 : c + 1)
        mine[c].first += sums.first(j), mine[c].second += sums.second(j);
    };
    ColumnSums sums(width);
    sums.add_rows(make(rows.begin), rows.end - rows.begin);
    collect(sums, width);
    if (rows.rest == 0) return;
    ColumnSums last(rows.rest);
    last.add_rows(make(rows.end), 1);
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
void sampled_row_pivots(const Shape& shape, const T* x, const float* weights, float* pivots) {
  const int64_t count = shape.count(), rows = std::min(count, kSampledRows);
  const Buffer<Guess> guesses(shape.channels);
  int64_t seen = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = count / rows * i;
    if (weights != nullptr && !(weights[row] > 0)) continue;
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
  Buffer<float> pivots(shape.channels), columns(width + kLanes);
  Buffer<Sums> totals(shape.channels);
  sampled_row_pivots(shape, x, weights, pivots.data());
  for (int attempt = 0; attempt < 2; ++attempt) {
    repeat(shape, pivots.data(), columns.data());
    const PerColumn k{columns.data(), nullptr, nullptr};
    row_sums(
        shape, parallel_for,
        [&](int64_t row) {
          return Moments<T, Weighted, PerColumn>{x + row * width, Weighted ? weights + row : nullptr, width, 0,
                                                kAheadBytes / int64_t(sizeof(T)), k};
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
  if (shape.path == Path::kGroups) {
    return run_parallel(p.parallel_for, shape.groups(), Shape::grain(channel_bytes * shape.merged),
                        [&](int64_t group) { group_statistics(shape, group, x, out); });
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
