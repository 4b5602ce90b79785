// The kernels as operators of torch, by its stable ABI: one library for every Python and every torch from 2.10 on.
//
// What tensors must be (dense, on the CPU, of one dtype) is checked in Python, where errors have words.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "abi.h"

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// What became of the running statistics, as bits of an int.
constexpr int64_t kSkipped = 1, kSaturated = 2;

void run(int64_t begin, int64_t end, int64_t grain, bnlab_task task, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, task, context));
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

Tensor empty(const std::vector<int64_t>& sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty({size}, &stride, dtype);
}

Tensor like(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty(std::vector<int64_t>(sizes.begin(), sizes.end()), x.strides().data(), dtype_of(x));
}

// Mean and variance, or their gradients: two rows of doubles.
Tensor empty_pairs(int64_t channels) {
  const int64_t strides[] = {channels, 1};
  return empty({2, channels}, strides, aoti_torch_dtype_float64());
}

void* data(const Tensor& tensor) {
  void* found;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &found));
  return found;
}
void* data(const Optional& tensor) { return tensor.has_value() ? data(*tensor) : nullptr; }

float widened(uint16_t bits, bool is_half) {
  if (is_half) return float(torch::headeronly::detail::fp16_ieee_to_fp32_value(bits));
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// A vector of any float dtype as doubles; nothing where there is none.
class Doubles {
 public:
  explicit Doubles(const Optional& tensor) : values_(tensor.has_value() ? size_t(tensor->numel()) : 0) {
    if (tensor.has_value()) read(*tensor);
  }
  const double* get() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  void read(const Tensor& tensor) {
    const int32_t dtype = dtype_of(tensor);
    const void* from = data(tensor);
    if (dtype == aoti_torch_dtype_float32())
      std::copy_n(static_cast<const float*>(from), values_.size(), values_.data());
    else if (dtype == aoti_torch_dtype_float64())
      std::copy_n(static_cast<const double*>(from), values_.size(), values_.data());
    else
      read_half(static_cast<const uint16_t*>(from), dtype == aoti_torch_dtype_float16());
  }
  void read_half(const uint16_t* from, bool is_half) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = widened(from[i], is_half);
  }
  std::vector<double> values_;
};

bnlab_problem problem_of(const Tensor& x, double eps, int64_t activation, double slope) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  bnlab_problem p{};
  p.samples = sizes[0];
  p.channels = sizes[1];
  p.positions = 1;
  for (size_t d = 2; d < sizes.size(); ++d) p.positions *= sizes[d];
  // With one channel or one position the two layouts are the same memory.
  p.channels_last = sizes.size() > 2 && strides[1] == 1 && p.positions > 1 && p.channels > 1;
  const int32_t dtype = dtype_of(x);
  p.dtype = dtype == aoti_torch_dtype_float32()    ? BNLAB_FLOAT32
            : dtype == aoti_torch_dtype_bfloat16() ? BNLAB_BFLOAT16
                                                   : BNLAB_FLOAT16;
  p.activation = int32_t(activation);
  p.slope = float(slope);
  p.eps = eps;
  p.parallel_for = run;
  return p;
}

// lerp as torch has it: exact at either end.
double moved(double running, double fresh, double momentum) {
  return momentum < 0.5 ? running + momentum * (fresh - running) : fresh - (fresh - running) * (1 - momentum);
}

template <class T>
bool move(void* running, const double* fresh, double factor, double momentum, int64_t channels) {
  T* values = static_cast<T*>(running);
  constexpr double largest = std::numeric_limits<T>::max();
  bool saturated = false;
  for (int64_t c = 0; c < channels; ++c) {
    double value = moved(double(values[c]), fresh[c] * factor, momentum);
    if (std::isfinite(value) && std::fabs(value) >= largest) value = std::copysign(largest, value);
    values[c] = T(value);
    saturated = saturated || double(values[c]) == largest;
  }
  return saturated;
}

bool move_any(const Tensor& running, const double* fresh, double factor, double momentum, int64_t channels) {
  const bool wide = dtype_of(running) == aoti_torch_dtype_float64();
  return wide ? move<double>(data(running), fresh, factor, momentum, channels)
              : move<float>(data(running), fresh, factor, momentum, channels);
}

int64_t update(const bnlab_problem& p, const double* mean, const double* var, const Optional& running_mean,
               const Optional& running_var, const Optional& batches, const Optional& skipped, double momentum,
               bool skip_nonfinite) {
  if (!running_mean.has_value() || !running_var.has_value()) return 0;
  const double count = double(p.samples) * double(p.positions);
  bool counts = count >= 2;
  for (int64_t c = 0; counts && skip_nonfinite && c < p.channels; ++c) counts = std::isfinite(mean[c] + var[c]);
  if (!counts) {
    if (skipped.has_value()) *static_cast<int64_t*>(data(*skipped)) += 1;
    return kSkipped;
  }
  int64_t updates = 1;
  if (batches.has_value()) updates = *static_cast<int64_t*>(data(*batches)) += 1;
  const double a = momentum < 0 ? 1.0 / double(updates < 1 ? 1 : updates) : momentum;
  move_any(*running_mean, mean, 1, a, p.channels);
  return move_any(*running_var, var, count / (count - 1), a, p.channels) ? kSaturated : 0;
}

// As many bytes as the kernels write; or as many as asked for, zeroed, as what lies between the bits is seen then.
std::optional<Tensor> empty_bits(const bnlab_problem& p, bool wanted, int64_t room) {
  if (!wanted || p.activation == BNLAB_IDENTITY) return std::nullopt;
  Tensor bits = empty_vector(std::max(room, bnlab_bits_size(&p)), aoti_torch_dtype_uint8());
  if (room > 0) memset(data(bits), 0, size_t(room));
  return bits;
}

std::tuple<Tensor, Tensor, Tensor, int64_t> train(Tensor x, Optional residual, Optional weight, Optional bias,
                                                  Optional running_mean, Optional running_var, Optional batches,
                                                  Optional skipped, double momentum, double eps, int64_t activation,
                                                  double slope, bool skip_nonfinite, bool want_bits, int64_t room) {
  const bnlab_problem p = problem_of(x, eps, activation, slope);
  const Doubles w(weight), b(bias);
  Tensor y = like(x), statistics = empty_pairs(p.channels);
  double* mean = static_cast<double*>(data(statistics));
  double* var = mean + p.channels;
  Optional bits = empty_bits(p, want_bits && residual.has_value(), room);
  bnlab_forward(&p, data(x), data(residual), w.get(), b.get(), mean, var, data(y), static_cast<uint8_t*>(data(bits)));
  const int64_t status =
      update(p, mean, var, running_mean, running_var, batches, skipped, momentum, skip_nonfinite);
  return {y, statistics, bits.has_value() ? *bits : empty_vector(0, aoti_torch_dtype_uint8()), status};
}

std::tuple<Tensor, Tensor, Tensor> apply(Tensor x, Optional residual, Tensor mean, Tensor var, Optional weight,
                                         Optional bias, double eps, int64_t activation, double slope, bool want_bits) {
  const bnlab_problem p = problem_of(x, eps, activation, slope);
  const Doubles w(weight), b(bias), m(mean), v(var);
  Tensor y = like(x), statistics = empty_pairs(p.channels);
  double* kept = static_cast<double*>(data(statistics));
  std::copy_n(m.get(), p.channels, kept);
  std::copy_n(v.get(), p.channels, kept + p.channels);
  Optional bits = empty_bits(p, want_bits && residual.has_value(), 0);
  bnlab_apply(&p, data(x), data(residual), m.get(), v.get(), w.get(), b.get(), data(y),
              static_cast<uint8_t*>(data(bits)));
  return {y, statistics, bits.has_value() ? *bits : empty_vector(0, aoti_torch_dtype_uint8())};
}

// A vector of doubles in the dtype of a parameter; float where there is no parameter.
Tensor narrowed(const double* values, int64_t size, const Optional& parameter) {
  const bool wide = parameter.has_value() && dtype_of(*parameter) == aoti_torch_dtype_float64();
  Tensor found = empty_vector(size, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (wide)
    std::copy_n(values, size, static_cast<double*>(data(found)));
  else
    std::transform(values, values + size, static_cast<float*>(data(found)), [](double v) { return float(v); });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const Optional& weights,
                                             const Tensor& statistics, const Optional& weight, const Optional& bias,
                                             const Optional& bits, bool batch_statistics, double eps,
                                             int64_t activation, double slope, void* dx, bool want_dresidual) {
  const bnlab_problem p = problem_of(x, eps, activation, slope);
  const Doubles w(weight), b(bias);
  const double* mean = static_cast<const double*>(data(statistics));
  std::vector<double> sums(size_t(2 * p.channels));
  Optional dresidual;
  if (want_dresidual) dresidual = like(x);
  bnlab_backward(&p, data(dy), data(x), static_cast<const float*>(data(weights)), batch_statistics, mean,
                 mean + p.channels, w.get(), b.get(), static_cast<const uint8_t*>(data(bits)), dx, data(dresidual),
                 sums.data(), sums.data() + p.channels);
  return {dresidual.has_value() ? *dresidual : empty_vector(0, dtype_of(x)),
          narrowed(sums.data(), p.channels, weight), narrowed(sums.data() + p.channels, p.channels, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Optional weights, Tensor statistics,
                                                    Optional weight, Optional bias, Optional bits,
                                                    bool batch_statistics, double eps, int64_t activation,
                                                    double slope, bool want_dx, bool want_dresidual) {
  Tensor dx = want_dx ? like(x) : empty_vector(0, dtype_of(x));
  auto [dresidual, dweight, dbias] =
      gradients(dy, x, weights, statistics, weight, bias, bits, batch_statistics, eps, activation, slope,
                want_dx ? data(dx) : nullptr, want_dresidual);
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> backward_in_place(Tensor dy, Tensor x, Optional weights, Tensor statistics,
                                                     Optional weight, Optional bias, Optional bits,
                                                     bool batch_statistics, double eps, int64_t activation,
                                                     double slope, bool want_dresidual) {
  return gradients(dy, x, weights, statistics, weight, bias, bits, batch_statistics, eps, activation, slope, data(dy),
                   want_dresidual);
}

std::tuple<Tensor, double> statistics(Tensor x, Optional weights) {
  const bnlab_problem p = problem_of(x, 0, BNLAB_IDENTITY, 0);
  Tensor found = empty_pairs(p.channels);
  double* mean = static_cast<double*>(data(found));
  double total = 0;
  bnlab_statistics(&p, data(x), static_cast<const float*>(data(weights)), mean, mean + p.channels, &total);
  return {found, total};
}

}  // namespace

STABLE_TORCH_LIBRARY(bnlab_native, m) {
  m.def(
      "train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_batches, float momentum, "
      "float eps, int activation, float slope, bool skip_nonfinite, bool want_bits, int room=0) "
      "-> (Tensor y, Tensor statistics, Tensor bits, int status)");
  m.def(
      "apply(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "int activation, float slope, bool want_bits) -> (Tensor y, Tensor statistics, Tensor bits)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weights, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? bits, "
      "bool batch_statistics, float eps, int activation, float slope, bool want_dx, bool want_dresidual) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "backward_(Tensor(a!) dy, Tensor x, Tensor? weights, Tensor statistics, Tensor? weight, Tensor? bias, "
      "Tensor? bits, bool batch_statistics, float eps, int activation, float slope, bool want_dresidual) "
      "-> (Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def("statistics(Tensor x, Tensor? weights) -> (Tensor statistics, float total)");
}

STABLE_TORCH_LIBRARY_IMPL(bnlab_native, CPU, m) {
  m.impl("train", TORCH_BOX(&train));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_in_place));
  m.impl("statistics", TORCH_BOX(&statistics));
}
