// BN with fixed statistics as y = (x - pivot) * scale + shift, folded in double.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "shape.h"

namespace BNLAB_ISA {

// Channels with values beyond this magnitude are computed in double, because float would overflow or lose digits.
constexpr double kWide = 1e30;

struct Folded {
  float pivot, scale, shift;
};

struct Sums {
  double first = 0, second = 0;
};

inline bool too_wide(double value) { return std::fabs(value) >= kWide; }  // false for NaN, which float represents too

inline double inv_std_of(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

inline double value_or(const double* values, int64_t c, double otherwise) {
  return values == nullptr ? otherwise : values[c];
}

// value(c) for the channels from `begin` on.
template <class Value>
auto of_channels(int64_t begin, int64_t channels, const Value& value) {
  std::vector<decltype(value(begin))> found;
  found.reserve(static_cast<size_t>(channels));
  for (int64_t c = begin; c < begin + channels; ++c) found.push_back(value(c));
  return found;
}

// A coefficient as float. Every NaN becomes the default NaN.
inline float quiet(double value) { return value != value ? std::numeric_limits<float>::quiet_NaN() : float(value); }

// The pivot is the mean rounded to float: x - pivot is exact near the mean, and the shift contains the rounding error.
inline Folded fold(double mean, double inv_std, double weight, double bias) {
  const double scale = weight * inv_std;
  const float pivot = quiet(mean);
  return {pivot, quiet(scale), quiet(bias - (mean - double(pivot)) * scale)};
}

inline bool is_wide(double mean, double var, double scale) {
  return too_wide(mean) || var >= kWide * kWide || too_wide(scale) || std::isinf(mean);
}

// dx = dy * scale + (x - pivot) * slope + shift
struct FoldedGradient {
  float scale, slope, shift;
};

inline FoldedGradient fold_gradient(double mean, double inv_std, double weight, double dweight, double dbias,
                                    double count) {
  const double scale = weight * inv_std, share = scale / count;
  const double slope = -share * inv_std * dweight;
  const double shift = -share * dbias - slope * (mean - double(quiet(mean)));
  return {quiet(scale), quiet(slope), quiet(shift)};
}

}  // namespace BNLAB_ISA
