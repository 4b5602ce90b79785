// Picks the build that this processor runs, once.
#include <stdlib.h>
#include <string.h>

#include "builds.h"

namespace {

struct Build {
  const char* name;
  bool (*runs)();
  decltype(&baseline::statistics_build) statistics;
  decltype(&baseline::forward_build) forward;
  decltype(&baseline::backward_build) backward;
  decltype(&baseline::bits_size_build) bits_size;
};

#define BNLAB_TABLE(isa, runs) \
  {#isa, runs, isa::statistics_build, isa::forward_build, isa::backward_build, isa::bits_size_build}

// The best first.
const Build kBuilds[] = {
#if defined(BNLAB_WITH_AVX512)
    BNLAB_TABLE(avx512,
                [] {
                  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
                }),
#endif
#if defined(BNLAB_WITH_AVX2)
    BNLAB_TABLE(avx2,
                [] {
                  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
                }),
#endif
#if defined(BNLAB_WITH_BASELINE)
    BNLAB_TABLE(baseline, [] { return true; }),
#endif
};

// In the order of kBuilds, including builds that are not compiled.
const char* const kNames[] = {"avx512", "avx2", "baseline"};

int rank_of(const char* name) {
  int rank = 0;
  while (rank < 2 && strcmp(name, kNames[rank]) != 0) ++rank;
  return rank;
}

// Null if no compiled build can run on this processor.
const Build* pick() {
  const char* asked = getenv("BNLAB_ISA");
  const int best = asked == nullptr ? 0 : rank_of(asked);
  for (const Build& build : kBuilds)
    if (rank_of(build.name) >= best && build.runs()) return &build;
  return nullptr;
}

const Build* chosen() {
  static const Build* const build = pick();
  return build;
}

}  // namespace

extern "C" {

void bnlab_statistics(const bnlab_problem* p, const void* x, const float* weights, double* mean, double* var,
                      double* total) {
  chosen()->statistics(p, x, weights, mean, var, total);
}

void bnlab_apply(const bnlab_problem* p, const void* x, const void* residual, const double* mean, const double* var,
                 const double* weight, const double* bias, void* y, uint8_t* bits) {
  chosen()->forward(p, x, residual, const_cast<double*>(mean), const_cast<double*>(var), weight, bias, y, bits,
                          0);
}

void bnlab_forward(const bnlab_problem* p, const void* x, const void* residual, const double* weight,
                   const double* bias, double* mean, double* var, void* y, uint8_t* bits) {
  chosen()->forward(p, x, residual, mean, var, weight, bias, y, bits, 1);
}

void bnlab_backward(const bnlab_problem* p, const void* dy, const void* x, const float* weights,
                    int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                    const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                    double* dbias) {
  chosen()->backward(p, dy, x, weights, batch_statistics, mean, var, weight, bias, bits, dx, dresidual, dweight,
                           dbias);
}

int64_t bnlab_bits_size(const bnlab_problem* p) { return chosen()->bits_size(p); }

const char* bnlab_instruction_set(void) { return chosen() == nullptr ? "" : chosen()->name; }
}
