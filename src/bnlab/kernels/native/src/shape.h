// The places of the elements, and the split of the work. The split depends on the shape alone, not on the thread count.
#pragma once

#include <algorithm>

#include "abi.h"
#include "simd.h"

namespace BNLAB_ISA {

// The number of terms that one lane of a float sum adds before it is added to a double. More terms would be inaccurate:
// every term after an outlier rounds to the last bit of the sum, in the same direction if the terms are similar.
constexpr int64_t kTerms = 32;
// Outputs of at least this many bytes bypass the cache, because they would evict the data that is read next.
#ifdef BNLAB_STREAM_BYTES
constexpr int64_t kStreamBytes = BNLAB_STREAM_BYTES;  // for tests on small tensors
#else
constexpr int64_t kStreamBytes = int64_t(24) << 20;
#endif
// Bytes of input below which another thread costs more time than it saves.
constexpr int64_t kGrainBytes = int64_t(64) << 10;
// Planes of up to this many elements are processed several channels at a time: as rows of planes, or as rows of columns if
// a plane has less than a few vectors.
constexpr int64_t kSmallPlane = 640;
constexpr int64_t kTinyPlane = 64;
// Bytes of the input in a group of planes, about: together with its gradient they stay in the cache between two passes.
constexpr int64_t kGroupBytes = int64_t(1) << 20;
// Elements of a row of several small planes, or of several positions with the channels last, at least.
constexpr int64_t kRow = 256;
// Groups of channels there are at least, for the threads to share.
constexpr int64_t kGroups = 16;
// A channel is cut into parts where there are fewer channels than this.
constexpr int64_t kFewChannels = 16;
constexpr int64_t kMostParts = 64;
constexpr int64_t kPartBytes = int64_t(256) << 10;
// With the channels last every part has sums of all channels: so many in all, or few parts.
constexpr int64_t kPartSums = int64_t(32) << 10;
constexpr int64_t kFewParts = 16;

enum class Path { kPlanes, kColumns, kRows };

inline int64_t divisor(int64_t a, int64_t b) { return b == 0 ? a : divisor(b, a % b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  int64_t samples, channels, positions;
  int64_t itemsize;
  Path path;
  int64_t merged;  // channels of a group, or positions of a row; in kPlanes 1 where channels are taken singly
  int64_t parts;   // of a channel in kPlanes, of all rows in kRows

  // A weight for each position rules out rows of several positions, and columns of several planes.
  Shape(const bnlab_problem& p, bool weighted)
      : samples(p.samples), channels(p.channels), positions(p.positions), itemsize(p.dtype == BNLAB_FLOAT32 ? 4 : 2) {
    merged = 1;
    parts = 1;
    path = Path::kPlanes;
    const int64_t bytes = count() * channels * itemsize;
    if (bytes == 0) return;
    const int64_t line = 32;  // elements: a whole number of cache lines in every dtype
    if (p.channels_last || positions == 1) {
      path = Path::kRows;
      const int64_t unit = line / divisor(channels, line);
      if (!weighted && channels < kRow) merged = unit * ceil_div(kRow, unit * channels);
      const int64_t most = std::min(kMostParts, std::max(kPartSums / channels, kFewParts));
      parts = std::min(most, std::max<int64_t>(1, bytes / kPartBytes));
      return;
    }
    const int64_t unit = line / divisor(positions, line);  // channels whose planes end with a line
    const int64_t columns = unit * ceil_div(kRow, unit * positions);
    if (!weighted && positions < kTinyPlane && channels >= 2 * columns) {
      path = Path::kColumns;
      merged = columns;
      return;
    }
    if (positions <= kSmallPlane) {
      merged = std::min(ceil_div(kGroupBytes, count() * itemsize), std::max<int64_t>(1, channels / kGroups));
      if (merged > unit) merged -= merged % unit;
    }
    if (merged > 1) return;
    if (channels < kFewChannels) parts = std::min(kMostParts, std::max<int64_t>(1, bytes / channels / kPartBytes));
  }

  int64_t count() const { return samples * positions; }
  int64_t groups() const { return ceil_div(channels, merged); }
  int64_t channels_of(int64_t group) const { return std::min(merged, channels - group * merged); }
  int64_t rows() const { return ceil_div(count(), merged); }
  bool streams() const { return count() * channels * itemsize >= kStreamBytes; }
  // Items of `bytes` input each that a thread takes at least.
  static int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(bytes, 1)); }

  // Bytes of the bits of one segment: a plane, a row of a group, or a row.
  int64_t segment_bits() const {
    if (path == Path::kPlanes) return bits_bytes(positions);
    return bits_bytes(path == Path::kColumns ? merged * positions : merged * channels);
  }
  int64_t segments() const {
    if (path == Path::kPlanes) return samples * channels;
    return path == Path::kColumns ? samples * groups() : rows();
  }
  // Distance of two samples, and of two positions of a sample, of one channel.
  int64_t sample_stride() const { return channels * positions; }
  int64_t position_stride() const { return path == Path::kRows ? channels : 1; }
  int64_t channel_stride() const { return path == Path::kRows ? 1 : positions; }
};

template <class Body>
void run_parallel(bnlab_parallel_for parallel_for, int64_t items, int64_t grain, Body body) {
  if (items <= grain || parallel_for == nullptr) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  parallel_for(
      0, items, grain,
      [](int64_t begin, int64_t end, void* context) {
        Body& call = *static_cast<Body*>(context);
        for (int64_t i = begin; i < end; ++i) call(i);
      },
      &body);
}

}  // namespace BNLAB_ISA
