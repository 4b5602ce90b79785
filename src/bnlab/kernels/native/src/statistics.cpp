// The statistics of one build; BNLAB_ISA names it.
#include "statistics.h"

#include <numeric>

#include "builds.h"
#include "by_kind.h"

namespace BNLAB_ISA {

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

void statistics_build(const bnlab_problem* p, const void* x, const float* weights, double* mean, double* var,
                             double* total) {
  by_dtype(*p, [&](auto kind) { statistics_entry<decltype(kind)>(*p, x, weights, mean, var, total); });
}

}  // namespace BNLAB_ISA
