// The kernels as operators of torch, by its stable ABI: one library for every Python and every torch from 2.10 on.
//
// Python checks the tensors (dense, on the CPU, of one dtype), because it can raise readable errors.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "abi.h"
#include "torch_abi.h"

namespace {

using torch_abi::Tensor;
using Optional = std::optional<Tensor>;

// The status of the update of the running statistics, as bits of an int.
constexpr int64_t kSkipped = 1, kSaturated = 2;

void run(int64_t begin, int64_t end, int64_t grain, bnlab_task task, void* context) {
  torch_abi::check(torch_parallel_for(begin, end, grain, task, context), "to run in parallel");
}

Tensor empty(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  torch_abi::check(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle), "memory");
  return Tensor(handle);
}

Tensor empty_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, dtype);
}

Tensor like(const Tensor& x) { return empty(x.rank(), x.sizes(), x.strides(), x.dtype()); }

// Mean and variance, or their gradients: two rows of doubles.
Tensor empty_pairs(int64_t channels) {
  const int64_t sizes[] = {2, channels}, strides[] = {channels, 1};
  return empty(2, sizes, strides, aoti_torch_dtype_float64());
}

void* data(const Tensor& tensor) { return tensor.data(); }
void* data(const Optional& tensor) { return tensor.has_value() ? tensor->data() : nullptr; }

// A number of 16 bits; every float16 is exactly a float.
float widened(uint16_t bits, bool is_half) {
  const uint32_t exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu, sign = uint32_t(bits & 0x8000u) << 16;
  uint32_t wide = uint32_t(bits) << 16;
  if (is_half) {
    if (exponent == 0) {
      const float small = float(fraction) * 0x1p-24f;
      return sign != 0 ? -small : small;
    }
    wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Refuses a vector without one value per channel, because the memory beyond it belongs to others.
void require_channels(const Tensor& vector, int64_t channels, const char* name) {
  if (vector.numel() != channels)
    throw std::runtime_error(std::string(name) + " must have " + std::to_string(channels) + " values, got " +
                             std::to_string(vector.numel()));
}

// The distance of two values of a vector, in elements; 0 if one value is broadcast.
int64_t step_of(const Tensor& vector) { return vector.rank() > 0 ? vector.strides()[0] : 0; }

// A vector of any float dtype as doubles; nothing where there is none.
class Doubles {
 public:
  Doubles(const Tensor& tensor, int64_t channels, const char* name) : values_(size_t(channels)) {
    require_channels(tensor, channels, name);
    read(tensor);
  }
  Doubles(const Optional& tensor, int64_t channels, const char* name) {
    if (!tensor.has_value()) return;
    require_channels(*tensor, channels, name);
    values_.resize(size_t(channels));
    read(*tensor);
  }
  const double* get() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  void read(const Tensor& tensor) {
    const int32_t dtype = tensor.dtype();
    const void* from = data(tensor);
    const int64_t step = step_of(tensor);
    if (dtype == aoti_torch_dtype_float32())
      read_each([&](int64_t i) { return double(static_cast<const float*>(from)[i * step]); });
    else if (dtype == aoti_torch_dtype_float64())
      read_each([&](int64_t i) { return static_cast<const double*>(from)[i * step]; });
    else
      read_each([&](int64_t i) {
        return double(widened(static_cast<const uint16_t*>(from)[i * step], dtype == aoti_torch_dtype_float16()));
      });
  }
  template <class Value>
  void read_each(const Value& value) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = value(int64_t(i));
  }
  std::vector<double> values_;
};

bnlab_problem problem_of(const Tensor& x, double eps, int64_t activation, double slope) {
  const int64_t rank = x.rank();
  const int64_t* const sizes = x.sizes();
  bnlab_problem p{};
  p.samples = sizes[0];
  p.channels = sizes[1];
  p.positions = 1;
  for (int64_t d = 2; d < rank; ++d) p.positions *= sizes[d];
  // With one channel or one position the two layouts are the same memory.
  p.channels_last = rank > 2 && x.strides()[1] == 1 && p.positions > 1 && p.channels > 1;
  const int32_t dtype = x.dtype();
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
bool move(const Tensor& running, const double* fresh, double factor, double momentum, int64_t channels) {
  T* values = static_cast<T*>(data(running));
  const int64_t step = step_of(running);
  constexpr double largest = std::numeric_limits<T>::max();
  bool saturated = false;
  for (int64_t c = 0; c < channels; ++c, values += step) {
    double value = moved(double(*values), fresh[c] * factor, momentum);
    if (std::isfinite(value) && std::fabs(value) >= largest) value = std::copysign(largest, value);
    *values = T(value);
    saturated = saturated || double(*values) == largest;
  }
  return saturated;
}

bool move_any(const Tensor& running, const double* fresh, double factor, double momentum, int64_t channels) {
  const bool wide = running.dtype() == aoti_torch_dtype_float64();
  return wide ? move<double>(running, fresh, factor, momentum, channels)
              : move<float>(running, fresh, factor, momentum, channels);
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

Tensor or_nothing(Optional tensor, int32_t dtype) {
  return tensor.has_value() ? std::move(*tensor) : empty_vector(0, dtype);
}

// The bytes that the kernels write, or `room` zeroed bytes: a caller that sets room also sees the bytes between the bits.
Optional empty_bits(const bnlab_problem& p, bool wanted, int64_t room) {
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
  const Doubles w(weight, p.channels, "weight"), b(bias, p.channels, "bias");
  if (running_mean.has_value()) require_channels(*running_mean, p.channels, "running_mean");
  if (running_var.has_value()) require_channels(*running_var, p.channels, "running_var");
  Tensor y = like(x), statistics = empty_pairs(p.channels);
  double* mean = static_cast<double*>(data(statistics));
  double* var = mean + p.channels;
  Optional bits = empty_bits(p, want_bits && residual.has_value(), room);
  bnlab_forward(&p, data(x), data(residual), w.get(), b.get(), mean, var, data(y), static_cast<uint8_t*>(data(bits)));
  const int64_t status =
      update(p, mean, var, running_mean, running_var, batches, skipped, momentum, skip_nonfinite);
  return {std::move(y), std::move(statistics), or_nothing(std::move(bits), aoti_torch_dtype_uint8()), status};
}

std::tuple<Tensor, Tensor, Tensor> apply(Tensor x, Optional residual, Tensor mean, Tensor var, Optional weight,
                                         Optional bias, double eps, int64_t activation, double slope, bool want_bits) {
  const bnlab_problem p = problem_of(x, eps, activation, slope);
  const Doubles w(weight, p.channels, "weight"), b(bias, p.channels, "bias");
  const Doubles m(mean, p.channels, "running_mean"), v(var, p.channels, "running_var");
  Tensor y = like(x), statistics = empty_pairs(p.channels);
  double* kept = static_cast<double*>(data(statistics));
  std::copy_n(m.get(), p.channels, kept);
  std::copy_n(v.get(), p.channels, kept + p.channels);
  Optional bits = empty_bits(p, want_bits && residual.has_value(), 0);
  bnlab_apply(&p, data(x), data(residual), m.get(), v.get(), w.get(), b.get(), data(y),
              static_cast<uint8_t*>(data(bits)));
  return {std::move(y), std::move(statistics), or_nothing(std::move(bits), aoti_torch_dtype_uint8())};
}

// A vector of doubles in the dtype of a parameter; float where there is no parameter.
Tensor narrowed(const double* values, int64_t size, const Optional& parameter) {
  const bool wide = parameter.has_value() && parameter->dtype() == aoti_torch_dtype_float64();
  Tensor vector = empty_vector(size, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (wide)
    std::copy_n(values, size, static_cast<double*>(data(vector)));
  else
    std::transform(values, values + size, static_cast<float*>(data(vector)), [](double v) { return float(v); });
  return vector;
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const Optional& weights,
                                             const Tensor& statistics, const Optional& weight, const Optional& bias,
                                             const Optional& bits, bool batch_statistics, double eps,
                                             int64_t activation, double slope, void* dx, bool want_dresidual) {
  const bnlab_problem p = problem_of(x, eps, activation, slope);
  const Doubles w(weight, p.channels, "weight"), b(bias, p.channels, "bias");
  const double* mean = static_cast<const double*>(data(statistics));
  std::vector<double> sums(size_t(2 * p.channels));
  Optional dresidual;
  if (want_dresidual) dresidual = like(x);
  bnlab_backward(&p, data(dy), data(x), static_cast<const float*>(data(weights)), batch_statistics, mean,
                 mean + p.channels, w.get(), b.get(), static_cast<const uint8_t*>(data(bits)), dx, data(dresidual),
                 sums.data(), sums.data() + p.channels);
  return {or_nothing(std::move(dresidual), x.dtype()),
          narrowed(sums.data(), p.channels, weight), narrowed(sums.data() + p.channels, p.channels, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Optional weights, Tensor statistics,
                                                    Optional weight, Optional bias, Optional bits,
                                                    bool batch_statistics, double eps, int64_t activation,
                                                    double slope, bool want_dx, bool want_dresidual) {
  Tensor dx = want_dx ? like(x) : empty_vector(0, x.dtype());
  auto [dresidual, dweight, dbias] =
      gradients(dy, x, weights, statistics, weight, bias, bits, batch_statistics, eps, activation, slope,
                want_dx ? data(dx) : nullptr, want_dresidual);
  return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
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
  Tensor moments = empty_pairs(p.channels);
  double* mean = static_cast<double*>(data(moments));
  double total = 0;
  bnlab_statistics(&p, data(x), static_cast<const float*>(data(weights)), mean, mean + p.channels, &total);
  return {std::move(moments), total};
}

[[maybe_unused]] const bool registered = [] {
  const torch_abi::Library operators("bnlab_native");
  operators.define(
      "train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_batches, float momentum, "
      "float eps, int activation, float slope, bool skip_nonfinite, bool want_bits, int room=0) "
      "-> (Tensor y, Tensor statistics, Tensor bits, int status)");
  operators.define(
      "apply(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "int activation, float slope, bool want_bits) -> (Tensor y, Tensor statistics, Tensor bits)");
  operators.define(
      "backward(Tensor dy, Tensor x, Tensor? weights, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? bits, "
      "bool batch_statistics, float eps, int activation, float slope, bool want_dx, bool want_dresidual) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  operators.define(
      "backward_(Tensor(a!) dy, Tensor x, Tensor? weights, Tensor statistics, Tensor? weight, Tensor? bias, "
      "Tensor? bits, bool batch_statistics, float eps, int activation, float slope, bool want_dresidual) "
      "-> (Tensor dresidual, Tensor dweight, Tensor dbias)");
  operators.define("statistics(Tensor x, Tensor? weights) -> (Tensor statistics, float total)");
  const torch_abi::Library kernels("bnlab_native", "CPU");
  kernels.implement<train>("train");
  kernels.implement<apply>("apply");
  kernels.implement<backward>("backward");
  kernels.implement<backward_in_place>("backward_");
  kernels.implement<statistics>("statistics");
  return true;
}();

}  // namespace
