// Picks the build that this processor runs, once.
#include <stdlib.h>
#include <string.h>

#include "builds.h"

namespace {

struct Candidate {
  const char* name;
  const bnlab_build* build;
  bool (*runs)();
};

// The best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__) && !defined(BNLAB_WITHOUT_AVX512)
    {"avx512", &avx512::build,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
#if defined(__x86_64__) && !defined(BNLAB_WITHOUT_AVX2)
    {"avx2", &avx2::build,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::build, [] { return true; }},
};

const Candidate& pick() {
  const char* asked = getenv("BNLAB_ISA");
  bool reached = asked == nullptr;
  for (const Candidate& candidate : kCandidates) {
    reached = reached || strcmp(asked, candidate.name) == 0;
    if (reached && candidate.runs()) return candidate;
  }
  return kCandidates[sizeof(kCandidates) / sizeof(kCandidates[0]) - 1];
}

const Candidate& chosen() {
  static const Candidate& found = pick();
  return found;
}

}  // namespace

extern "C" {

void bnlab_statistics(const bnlab_problem* p, const void* x, const float* weights, double* mean, double* var,
                      double* total) {
  chosen().build->statistics(p, x, weights, mean, var, total);
}

void bnlab_apply(const bnlab_problem* p, const void* x, const void* residual, const double* mean, const double* var,
                 const double* weight, const double* bias, void* y, uint8_t* bits) {
  chosen().build->forward(p, x, residual, const_cast<double*>(mean), const_cast<double*>(var), weight, bias, y, bits,
                          0);
}

void bnlab_forward(const bnlab_problem* p, const void* x, const void* residual, const double* weight,
                   const double* bias, double* mean, double* var, void* y, uint8_t* bits) {
  chosen().build->forward(p, x, residual, mean, var, weight, bias, y, bits, 1);
}

void bnlab_backward(const bnlab_problem* p, const void* dy, const void* x, const float* weights,
                    int32_t batch_statistics, const double* mean, const double* var, const double* weight,
                    const double* bias, const uint8_t* bits, void* dx, void* dresidual, double* dweight,
                    double* dbias) {
  chosen().build->backward(p, dy, x, weights, batch_statistics, mean, var, weight, bias, bits, dx, dresidual, dweight,
                           dbias);
}

int64_t bnlab_bits_size(const bnlab_problem* p) { return chosen().build->bits_size(p); }

const char* bnlab_instruction_set(void) { return chosen().name; }
}
