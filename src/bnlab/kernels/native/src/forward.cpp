// The forward pass of one build; BNLAB_ISA names it.
#include "forward.h"

#include "builds.h"
#include "by_kind.h"

namespace BNLAB_ISA {

template <class T>
TransformLoops<T> transform_loops(const bnlab_problem& p, bool residual, bool bits) {
  TransformLoops<T> loops;
  by_activation(p, [&](auto act) {
    constexpr int kAct = decltype(act)::value;
    if (!residual)
      loops = transform_loops<T, kAct, false, false>();
    else if (kAct == BNLAB_IDENTITY || !bits)
      loops = transform_loops<T, kAct, true, false>();
    else
      loops = transform_loops<T, kAct, true, kAct != BNLAB_IDENTITY>();
  });
  return loops;
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
                            p.activation == BNLAB_IDENTITY || residual == nullptr ? nullptr : bits,
                            shape.streams(),
                            transform_loops<T>(p, residual != nullptr, bits != nullptr)};
  forward(call, out);
}

void forward_build(const bnlab_problem* p, const void* x, const void* residual, double* mean, double* var,
                          const double* weight, const double* bias, void* y, uint8_t* bits, int32_t take_statistics) {
  const Statistics out{mean, var};
  by_dtype(*p, [&](auto kind) {
    forward_entry<decltype(kind)>(*p, x, residual, mean, var, weight, bias, y, bits, take_statistics ? &out : nullptr);
  });
}

int64_t bits_size_build(const bnlab_problem* p) {
  const Shape shape(*p, false);
  return shape.segments() * shape.segment_bits();
}

}  // namespace BNLAB_ISA
