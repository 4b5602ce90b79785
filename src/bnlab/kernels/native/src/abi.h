// The C interface of the kernels: plain data, no torch, no C++ across the boundary.
//
// A tensor of shape (N, C, S) lies in memory either as planes, element (n, c, s) at (n*C + c)*S + s, or with the channels
// last, at (n*S + s)*C + c. Sums are float over at most 32 terms in a lane and double beyond; which values form a partial sum
// depends on the shape alone, so that every number of threads gives the same bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef void (*bnlab_task)(int64_t begin, int64_t end, void* context);

// Calls task on disjoint ranges that cover [begin, end), each of at least `grain` items but the last, on any threads.
typedef void (*bnlab_parallel_for)(int64_t begin, int64_t end, int64_t grain, bnlab_task task, void* context);

enum bnlab_dtype { BNLAB_FLOAT32 = 0, BNLAB_BFLOAT16 = 1, BNLAB_FLOAT16 = 2 };

enum bnlab_activation { BNLAB_IDENTITY = 0, BNLAB_RELU = 1, BNLAB_LEAKY_RELU = 2 };

typedef struct {
  int64_t samples;        // N
  int64_t channels;       // C
  int64_t positions;      // S, the product of the spatial sizes
  int32_t channels_last;  // whether the channels lie last
  int32_t dtype;          // bnlab_dtype of x, residual, y and their gradients
  int32_t activation;     // bnlab_activation
  float slope;            // of the leaky ReLU, for negative values
  double eps;             // added to the variance
  bnlab_parallel_for parallel_for;
} bnlab_problem;

// Per channel: mean and biased variance. `weights`, float of shape (N, S) and >= 0, may be null; a value of weight 0 is
// not looked at. Without values: 0 and 0. `total` receives the sum of the weights.
void bnlab_statistics(const bnlab_problem*, const void* x, const float* weights, double* mean, double* var,
                      double* total);

// y = act((x - mean) * w / sqrt(var + eps) + b + residual) with statistics that are given. weight, bias, residual and
// bits may be null. `bits` receives which elements act passes, bnlab_bits_size bytes.
void bnlab_apply(const bnlab_problem*, const void* x, const void* residual, const double* mean, const double* var,
                 const double* weight, const double* bias, void* y, uint8_t* bits);

// bnlab_statistics without weights, then bnlab_apply, in one pass over memory where the slab of a channel fits the cache.
void bnlab_forward(const bnlab_problem*, const void* x, const void* residual, const double* weight, const double* bias,
                   double* mean, double* var, void* y, uint8_t* bits);

// The gradients of bnlab_apply. With `batch_statistics` mean and var are those of x (under `weights`, if not null) and
// depend on it. What act passed is read from `bits`, or computed again from x where that is null; a residual needs bits.
// dx, dresidual, dweight and dbias may be null; dx may be dy, and nothing else that is not null overlaps anything. Without
// an activation the gradient of a residual is dy, and dresidual is not written.
void bnlab_backward(const bnlab_problem*, const void* dy, const void* x, const float* weights, int32_t batch_statistics,
                    const double* mean, const double* var, const double* weight, const double* bias,
                    const uint8_t* bits, void* dx, void* dresidual, double* dweight, double* dbias);

int64_t bnlab_bits_size(const bnlab_problem*);

// "avx512", "avx2" or "baseline": the build that this processor runs. BNLAB_ISA in the environment asks for a lesser one.
// "" where none that is compiled runs: no other function may be called then.
const char* bnlab_instruction_set(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
