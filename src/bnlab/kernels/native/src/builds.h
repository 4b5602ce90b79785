// The builds of the kernels, one for each set of instructions.
#pragma once

#include "abi.h"

struct bnlab_build {
  void (*statistics)(const bnlab_problem*, const void* x, const float* weights, double* mean, double* var,
                     double* total);
  void (*forward)(const bnlab_problem*, const void* x, const void* residual, double* mean, double* var,
                  const double* weight, const double* bias, void* y, uint8_t* bits, int32_t take_statistics);
  void (*backward)(const bnlab_problem*, const void* dy, const void* x, const float* weights,
                   int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                   const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                   double* dbias);
  int64_t (*bits_size)(const bnlab_problem*);
};

namespace baseline {
extern const bnlab_build build;
}
#if defined(__x86_64__)
namespace avx2 {
extern const bnlab_build build;
}
namespace avx512 {
extern const bnlab_build build;
}
#endif
