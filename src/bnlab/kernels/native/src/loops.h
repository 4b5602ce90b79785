// The inner loops as separate functions. The code that walks over a tensor calls them through pointers and is compiled once
// per dtype. If the loops were inlined, this code would be compiled for every combination of activation, residual and
// layout. A call costs a few nanoseconds per run of elements.
#pragma once

#include "segments.h"

namespace BNLAB_ISA {

#define BNLAB_LOOP __attribute__((noinline))

// The number of short rows that are processed together, to load their coefficients once.
constexpr int kRowsTogether = 4;

// Rows of x that lie `stride` apart, of which moments are taken.
template <class T>
struct MomentRun {
  const T* x;
  const float* weights;
  int64_t stride;         // in elements
  int64_t weight_stride;  // 0 where a weight holds for a whole row
  int64_t ahead;          // to fetch, in elements
};

// Planes of `n` elements that lie side by side, each of a channel of its own.
template <class T, bool Weighted>
BNLAB_LOOP void add_moments(ChannelSums* sums, const MomentRun<T>& run, int64_t n, int64_t planes,
                            const float* pivots) {
  for (int64_t i = 0; i < planes; ++i) {
    const OneChannel k(pivots[i], 0, 0);
    sums[i].add_segment(Moments<T, Weighted, OneChannel>{run.x + i * n, run.weights, run.stride, run.weight_stride,
                                                        run.ahead, k},
                        n);
  }
}

template <class T, bool Weighted>
BNLAB_LOOP void add_moments(ColumnSums<T>* sums, const MomentRun<T>& run, int64_t rows, const PerColumn& k) {
  sums->add_rows(Moments<T, Weighted, PerColumn>{run.x, run.weights, run.stride, run.weight_stride, run.ahead, k},
                 rows);
}

// The transform for one activation, with or without a residual and bits.
template <class T>
struct TransformLoops {
  // Planes that lie side by side, and their bits bits_stride apart, each of a channel of its own.
  void (*planes)(const TransformRun<T>&, int64_t planes, const Folded*, float slope);
  void (*row)(const TransformRun<T>&, const PerColumn&, float slope);
  void (*rows)(const TransformRun<T>&, const PerColumn&, float slope);  // kRowsTogether of them
};

template <class T, int Act, bool Residual, bool Bits>
BNLAB_LOOP void transform_planes(const TransformRun<T>& first, int64_t planes, const Folded* f, float slope) {
  TransformRun<T> run = first;
  for (int64_t i = 0; i < planes; ++i) {
    transform<1, T, Act, Residual, Bits>(run, OneChannel(f[i].pivot, f[i].scale, f[i].shift), Slope<Act>(slope));
    run.x += run.n;
    run.y += run.n;
    if (Residual) run.residual += run.n;
    if (Bits) run.bits += run.bits_stride;
  }
}

template <int Rows, class T, int Act, bool Residual, bool Bits>
BNLAB_LOOP void transform_rows(const TransformRun<T>& run, const PerColumn& k, float slope) {
  transform<Rows, T, Act, Residual, Bits>(run, k, Slope<Act>(slope));
}

template <class T, int Act, bool Residual, bool Bits>
constexpr TransformLoops<T> transform_loops() {
  return {&transform_planes<T, Act, Residual, Bits>, &transform_rows<1, T, Act, Residual, Bits>,
          &transform_rows<kRowsTogether, T, Act, Residual, Bits>};
}

// Rows of dy and x that lie `stride` apart, in elements and in bytes of bits, and where a residual wants its gradient.
template <class T>
struct SumRun {
  const T* dy;
  const T* x;
  const uint8_t* bits;
  T* dresidual;
  int64_t stride, bits_stride;
  int64_t ahead;  // to fetch, in elements
};

template <class T>
using SumPlanes = void (*)(ChannelSums*, const SumRun<T>&, int64_t n, int64_t planes, const Folded*, float slope);
template <class T>
using SumRows = void (*)(ColumnSums<T>*, const SumRun<T>&, int64_t rows, const PerColumn&, float slope);

// The gradient for one activation, with or without bits, a residual and weights.
template <class T>
struct GradientLoops {
  SumPlanes<T> sum_planes, sum_planes_streaming;  // the latter writes dresidual past the cache
  SumRows<T> sum_rows, sum_rows_streaming;
  void (*planes)(const GradientRun<T>&, int64_t planes, const Folded*, const FoldedGradient*, float slope);
  void (*row)(const GradientRun<T>&, const PerColumn&, const PerColumn&, float slope);
  void (*rows)(const GradientRun<T>&, const PerColumn&, const PerColumn&, float slope);  // kRowsTogether of them
};

template <class T, int Act, bool Bits, Kept Residual>
BNLAB_LOOP void sum_planes(ChannelSums* sums, const SumRun<T>& run, int64_t n, int64_t planes, const Folded* f,
                           float slope) {
  for (int64_t i = 0; i < planes; ++i)
    sums[i].add_segment(
        Gradients<T, Act, Bits, Residual, OneChannel>{run.dy + i * n, run.x + i * n,
                                                      Bits ? run.bits + i * run.bits_stride : nullptr,
                                                      Residual == Kept::kNot ? nullptr : run.dresidual + i * n,
                                                      run.stride, run.bits_stride, run.ahead,
                                                      OneChannel(f[i].pivot, f[i].scale, f[i].shift),
                                                      Slope<Act>(slope)},
        n);
}

template <class T, int Act, bool Bits, Kept Residual>
BNLAB_LOOP void sum_rows(ColumnSums<T>* sums, const SumRun<T>& run, int64_t rows, const PerColumn& f, float slope) {
  sums->add_rows(Gradients<T, Act, Bits, Residual, PerColumn>{run.dy, run.x, run.bits, run.dresidual, run.stride,
                                                              run.bits_stride, run.ahead, f, Slope<Act>(slope)},
                 rows);
}

template <class T, int Act, bool Bits, bool Weighted>
BNLAB_LOOP void gradient_planes(const GradientRun<T>& first, int64_t planes, const Folded* f, const FoldedGradient* g,
                                float slope) {
  GradientRun<T> run = first;
  for (int64_t i = 0; i < planes; ++i) {
    transform_gradient<1, T, Act, Bits, Weighted>(run, OneChannel(f[i].pivot, f[i].scale, f[i].shift),
                                                  OneChannel(g[i].scale, g[i].slope, g[i].shift), Slope<Act>(slope));
    run.dy += run.n;
    run.x += run.n;
    run.dx += run.n;
    if (Bits) run.bits += run.bits_stride;
  }
}

template <int Rows, class T, int Act, bool Bits, bool Weighted>
BNLAB_LOOP void gradient_rows(const GradientRun<T>& run, const PerColumn& f, const PerColumn& g, float slope) {
  transform_gradient<Rows, T, Act, Bits, Weighted>(run, f, g, Slope<Act>(slope));
}

// With Residual its gradient is written while the sums are taken, by bits.
template <class T, int Act, bool Bits, bool Residual>
constexpr GradientLoops<T> gradient_loops() {
  constexpr Kept stored = Residual ? Kept::kStored : Kept::kNot, streamed = Residual ? Kept::kStreamed : Kept::kNot;
  return {&sum_planes<T, Act, Bits, stored>,
          &sum_planes<T, Act, Bits, streamed>,
          &sum_rows<T, Act, Bits, stored>,
          &sum_rows<T, Act, Bits, streamed>,
          &gradient_planes<T, Act, Bits, false>,
          &gradient_rows<1, T, Act, Bits, false>,
          &gradient_rows<kRowsTogether, T, Act, Bits, false>};
}

// A weight for each position rules out columns of several planes, and with them rows that are taken together.
template <class T>
constexpr GradientLoops<T> weighted_gradient_loops() {
  constexpr int act = BNLAB_IDENTITY;
  return {&sum_planes<T, act, false, Kept::kNot>,
          &sum_planes<T, act, false, Kept::kNot>,
          &sum_rows<T, act, false, Kept::kNot>,
          &sum_rows<T, act, false, Kept::kNot>,
          &gradient_planes<T, act, false, true>,
          &gradient_rows<1, T, act, false, true>,
          nullptr};
}

}  // namespace BNLAB_ISA
