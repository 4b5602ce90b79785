// One channel in double, value by value: for magnitudes that float cannot hold, and for gradients under weights.
#pragma once

#include "fold.h"

namespace BNLAB_ISA {

template <class Visit>
void each_value(const Shape& shape, int64_t c, Visit visit) {
  for (int64_t n = 0; n < shape.samples; ++n) {
    const int64_t start = n * shape.sample_stride() + c * shape.channel_stride();
    for (int64_t s = 0; s < shape.positions; ++s) visit(start + s * shape.position_stride(), n * shape.positions + s);
  }
}

inline double weight_at(const float* weights, int64_t index) { return weights == nullptr ? 1.0 : weights[index]; }

template <class T>
void exact_moments(const Shape& shape, int64_t c, const T* x, const float* weights, double* mean, double* var,
                   double* total) {
  double sum = 0, count = 0;
  each_value(shape, c, [&](int64_t at, int64_t index) {
    const double w = weight_at(weights, index);
    count += w;
    if (w != 0) sum += w * widen(x[at]);
  });
  const double divisor = count > 0 ? count : 1, center = sum / divisor;
  double squares = 0, rest = 0;
  each_value(shape, c, [&](int64_t at, int64_t index) {
    const double w = weight_at(weights, index), d = w == 0 ? 0 : double(widen(x[at])) - center;
    squares += w * d * d;
    rest += w * d;
  });
  const double m2 = squares - rest * rest / divisor;
  *mean = center;
  *var = m2 < 0 ? 0 : m2 / divisor;
  *total = count;
}

inline float activated(double value, int32_t activation, float slope) {
  if (activation == BNLAB_IDENTITY || !(value <= 0)) return float(value);
  return activation == BNLAB_RELU ? 0.0f : float(value * slope);
}

struct ExactChannel {
  double mean, inv_std, weight, bias;
  int32_t activation;
  float slope;
};

inline uint8_t* byte_of(const Shape& shape, int64_t c, int64_t at, uint8_t* bits, int* bit) {
  int64_t segment, offset;
  if (shape.path == Path::kPlanes) {
    segment = at / shape.positions, offset = at % shape.positions;
  } else if (shape.path == Path::kColumns) {
    const int64_t n = at / shape.sample_stride(), group = c / shape.merged;
    segment = n * shape.groups() + group;
    offset = at - n * shape.sample_stride() - group * shape.merged * shape.positions;
  } else {
    const int64_t width = shape.merged * shape.channels;
    segment = at / width, offset = at % width;
  }
  *bit = int(offset % 8);
  return bits + segment * shape.segment_bits() + offset / 8;
}

template <class T>
void exact_apply(const Shape& shape, int64_t c, const ExactChannel& k, const T* x, const T* residual, T* y,
                 uint8_t* bits) {
  each_value(shape, c, [&](int64_t at, int64_t) {
    double value = (double(widen(x[at])) - k.mean) * k.inv_std * k.weight + k.bias;
    if (residual != nullptr) value += widen(residual[at]);
    y[at] = narrow<T>(activated(value, k.activation, k.slope));
    if (bits == nullptr) return;
    int bit;
    uint8_t* byte = byte_of(shape, c, at, bits, &bit);
    const uint8_t mask = uint8_t(1u << bit);
    *byte = uint8_t(value <= 0 ? *byte & ~mask : *byte | mask);
  });
}

template <class T>
double exact_gradient(const Shape& shape, int64_t c, const ExactChannel& k, const T* dy, const T* x,
                      const uint8_t* bits, int64_t at) {
  const double gradient = widen(dy[at]);
  if (k.activation == BNLAB_IDENTITY) return gradient;
  bool passed;
  if (bits != nullptr) {
    int bit;
    passed = *byte_of(shape, c, at, const_cast<uint8_t*>(bits), &bit) >> bit & 1;
  } else {
    passed = !((double(widen(x[at])) - k.mean) * k.inv_std * k.weight + k.bias <= 0);
  }
  return passed ? gradient : k.activation == BNLAB_RELU ? 0.0 : gradient * k.slope;
}

// The gradients of one channel. dx gets its values in the order of n*S + s, because its final place may still hold dy.
template <class T>
void exact_backward(const Shape& shape, int64_t c, const ExactChannel& k, const T* dy, const T* x,
                    const float* weights, bool batch_statistics, const uint8_t* bits, T* dx, T* dresidual,
                    double* dweight, double* dbias) {
  double sum = 0, product = 0, total = 0;
  each_value(shape, c, [&](int64_t at, int64_t index) {
    const double gradient = exact_gradient(shape, c, k, dy, x, bits, at);
    if (dresidual != nullptr) dresidual[at] = narrow<T>(float(gradient));
    sum += gradient;
    product += gradient * (double(widen(x[at])) - k.mean) * k.inv_std;
    total += weight_at(weights, index);
  });
  dweight[c] = product;
  dbias[c] = sum;
  if (dx == nullptr) return;
  const double share = batch_statistics ? 1 / (total > 0 ? total : 1) : 0;
  each_value(shape, c, [&](int64_t at, int64_t index) {
    const double gradient = exact_gradient(shape, c, k, dy, x, bits, at);
    const double w = share * weight_at(weights, index);
    const double x_hat = w == 0 ? 0 : (double(widen(x[at])) - k.mean) * k.inv_std;
    dx[index] = narrow<T>(float((gradient - w * (sum + x_hat * product)) * k.inv_std * k.weight));
  });
}

}  // namespace BNLAB_ISA
