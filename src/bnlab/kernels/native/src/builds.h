// The builds of the kernels, one for each set of instructions; BNLAB_WITH_AVX512 and similar macros tell which are linked.
#pragma once

#include "abi.h"

#define BNLAB_BUILD(isa)                                                                                               \
  namespace isa {                                                                                                      \
  void statistics_build(const bnlab_problem*, const void* x, const float* weights, double* mean, double* var,          \
                        double* total);                                                                                \
  void forward_build(const bnlab_problem*, const void* x, const void* residual, double* mean, double* var,             \
                     const double* weight, const double* bias, void* y, uint8_t* bits, int32_t take_statistics);       \
  void backward_build(const bnlab_problem*, const void* dy, const void* x, const float* weights,                       \
                      int32_t batch_statistics, const double* mean, const double* var, const double* weight,           \
                      const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,             \
                      double* dbias);                                                                                  \
  int64_t bits_size_build(const bnlab_problem*);                                                                       \
  }

BNLAB_BUILD(baseline)
BNLAB_BUILD(avx2)
BNLAB_BUILD(avx512)
