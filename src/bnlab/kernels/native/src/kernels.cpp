// The entry points of one build; BNLAB_ISA names it.
#include <numeric>

#include "backward.h"
#include "builds.h"

namespace BNLAB_ISA {

// Calls with the activation as a constant.
template <class Call>
void by_activation(const bnlab_problem& p, const Call& call) {
  if (p.activation == BNLAB_IDENTITY)
    call(std::integral_constant<int, BNLAB_IDENTITY>{});
  else if (p.activation == BNLAB_RELU)
    call(std::integral_constant<int, BNLAB_RELU>{});
  else
    call(std::integral_constant<int, BNLAB_LEAKY_RELU>{});
}

template <class T>
void statistics_entry(const bnlab_problem& p, const void* x, const float* weights, double* mean, double* var,
                      double* total) {
  const Shape shape(p, weights != nullptr);
  double count = double(shape.count());
  if (weights != nullptr) count = std::accumulate(weights, weights + shape.count(), 0.0);
  *total = count;
  if (shape.count() == 0) {
    std::fill_n(mean, shape.channels, 0.0);
    std::fill_n(var, shape.channels, 0.0);
    return;
  }
  const Statistics out{mean, var};
  if (weights != nullptr)
    statistics<T, true>(p, shape, static_cast<const T*>(x), weights, count, out);
  else
    statistics<T, false>(p, shape, static_cast<const T*>(x), weights, count, out);
}

template <class T>
void forward_entry(const bnlab_problem& p, const void* x, const void* residual, const double* mean, const double* var,
                   const double* weight, const double* bias, void* y, uint8_t* bits, const Statistics* out) {
  const Shape shape(p, false);
  if (shape.count() == 0) {
    if (out != nullptr) std::fill_n(out->mean, shape.channels, 0.0);
    if (out != nullptr) std::fill_n(out->var, shape.channels, 0.0);
    return;
  }
  const ForwardCall<T> call{p,
                            shape,
                            static_cast<const T*>(x),
                            static_cast<const T*>(residual),
                            mean,
                            var,
                            weight,
                            bias,
                            static_cast<T*>(y),
                            p.activation == BNLAB_IDENTITY ? nullptr : bits,
                            shape.streams()};
  by_activation(p, [&](auto act) {
    constexpr int kAct = decltype(act)::value;
    if (residual == nullptr)
      forward<T, kAct, false, false>(call, out);
    else if (kAct == BNLAB_IDENTITY || call.bits == nullptr)
      forward<T, kAct, true, false>(call, out);
    else
      forward<T, kAct, true, kAct != BNLAB_IDENTITY>(call, out);
  });
}

template <class T>
void backward_entry(const bnlab_problem& p, const void* dy, const void* x, const float* weights,
                    int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                    const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                    double* dbias) {
  // Bits lie as the forward pass wrote them, which knows of no weights.
  const Shape shape(p, weights != nullptr && bits == nullptr);
  if (shape.count() == 0) {
    if (dweight != nullptr) std::fill_n(dweight, shape.channels, 0.0);
    if (dbias != nullptr) std::fill_n(dbias, shape.channels, 0.0);
    return;
  }
  Buffer<double> own(2 * shape.channels), inv_std(shape.channels);  // the sums are needed whether or not they are wanted
  for (int64_t c = 0; c < shape.channels; ++c) inv_std[c] = inv_std_of(var[c], p.eps);
  double count = double(shape.count());
  if (weights != nullptr) count = std::accumulate(weights, weights + shape.count(), 0.0);
  const BackwardCall<T> call{p,
                             shape,
                             static_cast<const T*>(dy),
                             static_cast<const T*>(x),
                             weights,
                             count > 0 ? count : 1,
                             batch_statistics != 0,
                             mean,
                             var,
                             inv_std.data(),
                             weight,
                             bias,
                             p.activation == BNLAB_IDENTITY ? nullptr : bits,
                             static_cast<T*>(dx),
                             static_cast<T*>(dresidual),
                             dweight != nullptr ? dweight : own.data(),
                             dbias != nullptr ? dbias : own.data() + shape.channels,
                             shape.streams()};
  if (weights != nullptr && p.activation == BNLAB_IDENTITY) return backward<T, BNLAB_IDENTITY, false, false, true>(call);
  if (weights != nullptr) return exact_backward_of_all(call);
  by_activation(p, [&](auto act) {
    constexpr int kAct = decltype(act)::value;
    constexpr bool kActive = kAct != BNLAB_IDENTITY;
    if (call.bits == nullptr)
      backward<T, kAct, false, false, false>(call);
    else if (call.dresidual == nullptr)
      backward<T, kAct, kActive, false, false>(call);
    else
      backward<T, kAct, kActive, kActive, false>(call);
  });
}

template <class Call>
void by_dtype(const bnlab_problem& p, const Call& call) {
  if (p.dtype == BNLAB_FLOAT32)
    call(float{});
  else if (p.dtype == BNLAB_BFLOAT16)
    call(bfloat16{});
  else
    call(float16{});
}

static void statistics_build(const bnlab_problem* p, const void* x, const float* weights, double* mean, double* var,
                             double* total) {
  by_dtype(*p, [&](auto kind) { statistics_entry<decltype(kind)>(*p, x, weights, mean, var, total); });
}

static void forward_build(const bnlab_problem* p, const void* x, const void* residual, double* mean, double* var,
                          const double* weight, const double* bias, void* y, uint8_t* bits, int32_t take_statistics) {
  const Statistics out{mean, var};
  by_dtype(*p, [&](auto kind) {
    forward_entry<decltype(kind)>(*p, x, residual, mean, var, weight, bias, y, bits, take_statistics ? &out : nullptr);
  });
}

static void backward_build(const bnlab_problem* p, const void* dy, const void* x, const float* weights,
                           int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                           const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                           double* dbias) {
  by_dtype(*p, [&](auto kind) {
    backward_entry<decltype(kind)>(*p, dy, x, weights, batch_statistics, mean, var, weight, bias, bits, dx, dresidual,
                                   dweight, dbias);
  });
}

static int64_t bits_size_build(const bnlab_problem* p) {
  const Shape shape(*p, false);
  return shape.segments() * shape.segment_bits();
}

extern const bnlab_build build = {statistics_build, forward_build, backward_build, bits_size_build};

}  // namespace BNLAB_ISA
