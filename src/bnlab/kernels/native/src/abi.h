// The C interface of the kernels: plain data, no torch, no C++ across the boundary.
//
// A tensor of shape (N, C, S) is stored either as planes, with element (n, c, s) at (n*C + c)*S + s, or channels last, at
// (n*S + s)*C + c. Sums are float over at most 32 terms per lane, and double beyond that. The shape alone decides which
// values form a partial sum. Every number of threads therefore gives the same bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef void (*bnlab_task)(int64_t begin, int64_t end, void* context);

// Calls task on disjoint ranges that cover [begin, end), on any threads. Each has at least `grain` items, except the last.
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

// Computes the mean and the biased variance of each channel, or 0 and 0 without values. `weights`, float of shape (N, S)
// and >= 0, may be null. Values of weight 0 are not read. `total` receives the sum of the weights.
void bnlab_statistics(const bnlab_problem*, const void* x, const float* weights, double* mean, double* var,
                      double* total);

// Computes y = act((x - mean) * w / sqrt(var + eps) + b + residual) with fixed statistics. weight, bias, residual and bits
// may be null. `bits` receives one bit per element, set where act lets it pass: bnlab_bits_size bytes.
void bnlab_apply(const bnlab_problem*, const void* x, const void* residual, const double* mean, const double* var,
                 const double* weight, const double* bias, void* y, uint8_t* bits);

// Runs bnlab_statistics without weights, then bnlab_apply, in one pass over memory if the values of a channel fit the cache.
void bnlab_forward(const bnlab_problem*, const void* x, const void* residual, const double* weight, const double* bias,
                   double* mean, double* var, void* y, uint8_t* bits);

// Computes the gradients of bnlab_apply. With `batch_statistics`, mean and var are the statistics of x (under `weights`, if
// not null) and depend on x. The elements that act let pass are read from `bits`, or computed again from x if bits is
// null; a residual needs bits. dx, dresidual, dweight and dbias may be null. dx may be dy; no other arguments overlap.
// Without an activation the gradient of a residual is dy, and dresidual is not written.
void bnlab_backward(const bnlab_problem*, const void* dy, const void* x, const float* weights, int32_t batch_statistics,
                    const double* mean, const double* var, const double* weight, const double* bias,
                    const uint8_t* bits, void* dx, void* dresidual, double* dweight, double* dbias);

int64_t bnlab_bits_size(const bnlab_problem*);

// Returns the build that runs on this processor: "avx512", "avx2" or "baseline". BNLAB_ISA in the environment selects a
// lesser one. Returns "" if no compiled build can run here; then no other function may be called.
const char* bnlab_instruction_set(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
