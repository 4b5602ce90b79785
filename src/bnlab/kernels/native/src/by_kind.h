// Calls a function with the kind of a problem (dtype, layout and so on) as compile-time constants.
#pragma once

#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace BNLAB_ISA {

// Calls a function with the activation as a compile-time constant.
template <class Call>
void by_activation(const bnlab_problem& p, const Call& call) {
  if (p.activation == BNLAB_IDENTITY)
    call(std::integral_constant<int, BNLAB_IDENTITY>{});
  else if (p.activation == BNLAB_RELU)
    call(std::integral_constant<int, BNLAB_RELU>{});
  else
    call(std::integral_constant<int, BNLAB_LEAKY_RELU>{});
}

template <class Call>
void by_dtype(const bnlab_problem& p, const Call& call) {
  if (p.dtype == BNLAB_FLOAT32)
    call(float{});
  else if (p.dtype == BNLAB_BFLOAT16)
    call(bfloat16{});
  else
    call(float16{});
}

}  // namespace BNLAB_ISA
