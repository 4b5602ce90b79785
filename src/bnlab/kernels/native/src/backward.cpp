// The backward pass of one build; BNLAB_ISA names it.
#include "backward.h"

#include <numeric>

#include "builds.h"
#include "by_kind.h"

namespace BNLAB_ISA {

template <class T>
GradientLoops<T> gradient_loops(const bnlab_problem& p, bool weights, bool bits, bool dresidual) {
  if (weights) return weighted_gradient_loops<T>();
  GradientLoops<T> loops;
  by_activation(p, [&](auto act) {
    constexpr int kAct = decltype(act)::value;
    constexpr bool kActive = kAct != BNLAB_IDENTITY;
    if (!bits)
      loops = gradient_loops<T, kAct, false, false>();
    else if (!dresidual)
      loops = gradient_loops<T, kAct, kActive, false>();
    else
      loops = gradient_loops<T, kAct, kActive, kActive>();
  });
  return loops;
}

template <class T>
void backward_entry(const bnlab_problem& p, const void* dy, const void* x, const float* weights,
                    int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                    const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                    double* dbias) {
  // The bits have the layout of the forward pass, which has no weights.
  const Shape shape(p, weights != nullptr && bits == nullptr);
  if (shape.count() == 0) {
    if (dweight != nullptr) std::fill_n(dweight, shape.channels, 0.0);
    if (dbias != nullptr) std::fill_n(dbias, shape.channels, 0.0);
    return;
  }
  Buffer<double> own(2 * shape.channels), inv_std(shape.channels);  // needed even if the caller does not want the sums
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
                             shape.streams(),
                             gradient_loops<T>(p, weights != nullptr, bits != nullptr, dresidual != nullptr)};
  if (weights != nullptr && p.activation != BNLAB_IDENTITY)
    exact_backward_of_all(call);
  else
    backward(call);
}

void backward_build(const bnlab_problem* p, const void* dy, const void* x, const float* weights,
                           int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                           const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                           double* dbias) {
  by_dtype(*p, [&](auto kind) {
    backward_entry<decltype(kind)>(*p, dy, x, weights, batch_statistics, mean, var, weight, bias, bits, dx, dresidual,
                                   dweight, dbias);
  });
}

}  // namespace BNLAB_ISA
