// Runs the C entry points on odd shapes, in buffers of just their size, against formulas in long double.
//
// Built with the address sanitizer: `make test-native`. Outputs begin as NaN, so that what is not written shows.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "abi.h"

namespace {

struct Case {
  int64_t samples, channels, positions;
};

const Case kCases[] = {
    {1, 1, 2},   {2, 1, 1},   {3, 1, 49},  {2, 3, 1},    {5, 3, 7},    {4, 7, 49},   {2, 64, 49},  {3, 65, 49},
    {2, 5, 196}, {1, 9, 257}, {2, 17, 33}, {33, 100, 1}, {1, 300, 3},  {2, 2, 5000}, {7, 31, 17},  {0, 3, 4},
    {3, 4, 0},   {3, 0, 4},   {1, 1, 1},   {300, 1, 1},  {129, 33, 1}, {2, 4, 1024}, {3, 40, 100},
    {2, 24, 81}, {3, 48, 72},  {2, 17, 200},
};

int failures = 0;

void check(bool right, const char* what, const Case& c, int dtype, int last, int activation) {
  if (right) return;
  ++failures;
  std::printf("%s is wrong: (%ld, %ld, %ld) dtype %d channels_last %d activation %d\n", what, long(c.samples),
              long(c.channels), long(c.positions), dtype, last, activation);
}

float widened(int dtype, const void* values, int64_t i) {
  if (dtype == BNLAB_FLOAT32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  if (dtype == BNLAB_BFLOAT16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31;
  const float fraction = float(bits & 1023) / 1024;
  const float size = exponent == 31  ? (fraction > 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(fraction, -14)
                                     : std::ldexp(1 + fraction, exponent - 15);
  return bits >> 15 ? -size : size;
}

// A buffer of just this size, so that the sanitizer sees the first byte beyond it.
struct Values {
  int dtype;
  int64_t size;
  std::vector<char> bytes;

  Values(int kind, int64_t n) : dtype(kind), size(n), bytes(size_t(n) * (kind == BNLAB_FLOAT32 ? 4 : 2), '\xff') {
    bytes.shrink_to_fit();
  }
  void* data() { return bytes.data(); }
  float operator[](int64_t i) const { return widened(dtype, bytes.data(), i); }
  void fill(unsigned seed) {
    for (int64_t i = 0; i < size; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const int value = int(seed >> 24) - 128;  // few bits: exact in every dtype
      if (dtype == BNLAB_FLOAT32) {
        reinterpret_cast<float*>(bytes.data())[i] = float(value) / 32;
        continue;
      }
      const float wanted = float(value) / 32;
      uint32_t bits;
      std::memcpy(&bits, &wanted, 4);
      uint16_t half = uint16_t(bits >> 16);
      if (dtype == BNLAB_FLOAT16 && wanted != 0)
        half = uint16_t((bits >> 16 & 0x8000u) | (((bits >> 23 & 255u) - 112u) << 10) | (bits >> 13 & 1023u));
      reinterpret_cast<uint16_t*>(bytes.data())[i] = half;
    }
  }
};

// Runs tasks one after the other, cut as three threads would.
void in_three(int64_t begin, int64_t end, int64_t grain, bnlab_task task, void* context) {
  const int64_t step = std::max<int64_t>(grain, (end - begin + 2) / 3);
  for (int64_t i = begin; i < end; i += step) task(i, std::min(end, i + step), context);
}

void run(const Case& c, int dtype, int last, int activation, bool residual) {
  const int64_t size = c.samples * c.channels * c.positions, count = c.samples * c.positions;
  bnlab_problem p{};
  p.samples = c.samples, p.channels = c.channels, p.positions = c.positions;
  p.channels_last = last, p.dtype = dtype, p.activation = activation, p.slope = 0.25f, p.eps = 1e-5;
  p.parallel_for = in_three;
  Values x(dtype, size), z(dtype, size), dy(dtype, size), y(dtype, size), dx(dtype, size), dz(dtype, size);
  x.fill(1), z.fill(2), dy.fill(3);
  std::vector<double> mean(size_t(c.channels), NAN), var = mean, w = mean, b = mean, dw = mean, db = mean;
  for (int64_t i = 0; i < c.channels; ++i) w[size_t(i)] = 1 + 0.25 * double(i % 3), b[size_t(i)] = 0.5 - double(i % 2);
  std::vector<uint8_t> bits(size_t(bnlab_bits_size(&p)), 0xaa);
  const bool uses_bits = residual && activation != BNLAB_IDENTITY;
  bnlab_forward(&p, x.data(), residual ? z.data() : nullptr, w.data(), b.data(), mean.data(), var.data(), y.data(),
                uses_bits ? bits.data() : nullptr);
  bnlab_backward(&p, dy.data(), x.data(), nullptr, 1, mean.data(), var.data(), w.data(), b.data(),
                 uses_bits ? bits.data() : nullptr, dx.data(), uses_bits ? dz.data() : nullptr, dw.data(), db.data());
  Values both = dy;  // the gradient in place
  bnlab_backward(&p, both.data(), x.data(), nullptr, 1, mean.data(), var.data(), w.data(), b.data(),
                 uses_bits ? bits.data() : nullptr, both.data(), nullptr, nullptr, nullptr);
  check(both.bytes == dx.bytes, "dx over dy", c, dtype, last, activation);
  const double eps = dtype == BNLAB_FLOAT32 ? 0x1p-23 : dtype == BNLAB_BFLOAT16 ? 0x1p-7 : 0x1p-10;
  const auto at = [&](int64_t n, int64_t ch, int64_t s) {
    return last ? (n * c.positions + s) * c.channels + ch : (n * c.channels + ch) * c.positions + s;
  };
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    long double sum = 0, squares = 0, total = 0, product = 0, scale = 1, largest = 1;
    const auto each = [&](auto visit) {
      for (int64_t n = 0; n < c.samples; ++n)
        for (int64_t s = 0; s < c.positions; ++s) visit(at(n, ch, s));
    };
    each([&](int64_t i) { sum += x[i]; });
    const long double m = count ? sum / count : 0;
    each([&](int64_t i) { squares += (x[i] - m) * (x[i] - m); });
    const long double v = count ? squares / count : 0, r = 1 / std::sqrt(v + p.eps);
    check(std::fabs(double(m) - mean[size_t(ch)]) <= 1e-6 && std::fabs(double(v) - var[size_t(ch)]) <= 1e-5 * double(v),
          "statistics", c, dtype, last, activation);
    const auto through = [&](int64_t i) -> long double {
      const long double value = (x[i] - m) * r * w[size_t(ch)] + b[size_t(ch)] + (residual ? z[i] : 0);
      return activation == BNLAB_IDENTITY || value > 0 ? 1 : activation == BNLAB_RELU ? 0 : 0.25L;
    };
    each([&](int64_t i) { total += dy[i] * through(i), product += dy[i] * through(i) * (x[i] - m) * r; });
    each([&](int64_t i) { scale = std::max(scale, std::fabs((long double)dy[i]) * r * w[size_t(ch)]); });
    each([&](int64_t i) { largest = std::max(largest, std::fabs((long double)x[i] - m) * r * w[size_t(ch)] + 5); });
    bool right = true, gradient = true, rest = true;
    each([&](int64_t i) {
      const long double value = (x[i] - m) * r * w[size_t(ch)] + b[size_t(ch)] + (residual ? z[i] : 0);
      right = right && std::fabs(double(value * through(i) - y[i])) <= 4 * eps * double(largest);
      // The count of 2 leaves differences of nearly equal numbers; a value at the kink may fall on either side of it.
      const long double wanted =
          w[size_t(ch)] * r * (dy[i] * through(i) - (total + (x[i] - m) * r * product) / count);
      if (std::fabs(double(value)) > 1e-4)
        gradient = gradient && std::fabs(double(wanted - dx[i])) <= (8 * eps + 1e-3 / double(count)) * double(scale) * 4;
      if (uses_bits) rest = rest && std::fabs(double(dy[i] * through(i) - dz[i])) <= eps * 8;
    });
    check(right, "y", c, dtype, last, activation);
    check(gradient, "dx", c, dtype, last, activation);
    check(rest, "dresidual", c, dtype, last, activation);
    check(std::fabs(double(total) - db[size_t(ch)]) <= 1e-4 * (1 + double(count)), "dbias", c, dtype, last, activation);
    check(std::fabs(double(product) - dw[size_t(ch)]) <= 1e-4 * (1 + double(count)), "dweight", c, dtype, last,
          activation);
  }
}

void run_weighted(const Case& c, int dtype, int last) {
  const int64_t size = c.samples * c.channels * c.positions, count = c.samples * c.positions;
  bnlab_problem p{};
  p.samples = c.samples, p.channels = c.channels, p.positions = c.positions;
  p.channels_last = last, p.dtype = dtype, p.eps = 1e-5, p.parallel_for = in_three;
  Values x(dtype, size);
  x.fill(5);
  std::vector<float> weights(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) weights[size_t(i)] = float(i % 3);
  std::vector<double> mean(size_t(c.channels), NAN), var = mean;
  double total = -1;
  bnlab_statistics(&p, x.data(), weights.data(), mean.data(), var.data(), &total);
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    long double sum = 0, n = 0, squares = 0;
    const auto each = [&](auto visit) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t sample = i / c.positions, s = i % c.positions;
        visit(weights[size_t(i)], x[last ? i * c.channels + ch : (sample * c.channels + ch) * c.positions + s]);
      }
    };
    each([&](float weight, float value) { sum += weight * value, n += weight; });
    const long double m = n > 0 ? sum / n : 0;
    each([&](float weight, float value) { squares += weight * (value - m) * (value - m); });
    const long double v = n > 0 ? squares / n : 0;
    check(std::fabs(double(n) - total) < 1e-9, "total", c, dtype, last, 0);
    check(std::fabs(double(m) - mean[size_t(ch)]) <= 1e-6, "weighted mean", c, dtype, last, 0);
    check(std::fabs(double(v) - var[size_t(ch)]) <= 1e-5 * double(v), "weighted variance", c, dtype, last, 0);
  }
  Values dy(dtype, size), dx(dtype, size);
  dy.fill(6);
  const std::vector<double> w(size_t(c.channels), 1.5);
  bnlab_backward(&p, dy.data(), x.data(), weights.data(), 1, mean.data(), var.data(), w.data(), nullptr, nullptr,
                 dx.data(), nullptr, nullptr, nullptr);
  const double eps = dtype == BNLAB_FLOAT32 ? 0x1p-23 : dtype == BNLAB_BFLOAT16 ? 0x1p-7 : 0x1p-10;
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    const long double m = mean[size_t(ch)], r = 1 / std::sqrt((long double)var[size_t(ch)] + p.eps);
    long double sum = 0, product = 0, sizes = 0, products = 0;
    const auto each = [&](auto visit) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t sample = i / c.positions, s = i % c.positions;
        visit(weights[size_t(i)], last ? i * c.channels + ch : (sample * c.channels + ch) * c.positions + s);
      }
    };
    each([&](float, int64_t i) {
      const long double term = dy[i] * (x[i] - m) * r;
      sum += dy[i], product += term, sizes += std::fabs((long double)dy[i]), products += std::fabs(term);
    });
    bool right = true;
    each([&](float weight, int64_t i) {
      const long double share = total > 0 ? weight / total : 0;
      const long double wanted = 1.5L * r * (dy[i] - share * (sum + (x[i] - m) * r * product));
      const long double size = std::fabs((long double)dy[i]) + share * (sizes + std::fabs((x[i] - m) * r) * products);
      right = right && std::fabs(wanted - dx[i]) <= 4 * eps * r * size;
    });
    check(right, "weighted dx", c, dtype, last, 0);
  }
}

}  // namespace

int main() {
  int runs = 0;
  for (const Case& c : kCases)
    for (int dtype : {BNLAB_FLOAT32, BNLAB_BFLOAT16, BNLAB_FLOAT16})
      for (int last : {0, 1}) {
        for (int activation : {BNLAB_IDENTITY, BNLAB_RELU, BNLAB_LEAKY_RELU})
          for (bool residual : {false, true}) run(c, dtype, last, activation, residual), ++runs;
        run_weighted(c, dtype, last), ++runs;
      }
  std::printf("%s: %d passed, %d failed\n", bnlab_instruction_set(), runs - (failures > 0), failures);
  return failures > 0;
}
