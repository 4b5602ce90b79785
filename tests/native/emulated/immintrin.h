// The instructions of AVX-512 that simd.h uses, one lane after the other, for machines that have AVX2 only: the build for
// AVX-512 is tested here as to what it computes, not how fast.
//
// Included in the place of the compiler's header of that name. Semantics: Intel's intrinsics guide.
#pragma once

#include_next <immintrin.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

struct floats {
  float v[16];
};
struct doubles {
  double v[8];
};
struct ints {
  uint32_t v[16];
};

template <class To, class From>
To cast(const From& from) {
  static_assert(sizeof(To) <= sizeof(From), "reads beyond the end");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
template <class Vector>
Vector loaded(const void* p) {
  Vector found;
  memcpy(&found, p, sizeof(found));
  return found;
}
template <class Vector>
void stored(void* p, const Vector& a) {
  memcpy(p, &a, sizeof(a));
}
// What the processor refuses too.
inline void must_be_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) abort();
}
inline uint16_t half_of(const ints& a, int i) { return uint16_t(a.v[i / 2] >> (i % 2 * 16)); }

#define EMULATED_EACH for (int i = 0; i < 16; ++i)

inline floats set1_ps(float value) {
  floats r;
  EMULATED_EACH r.v[i] = value;
  return r;
}
inline ints set1_epi32(int value) {
  ints r;
  EMULATED_EACH r.v[i] = uint32_t(value);
  return r;
}
template <class... Values>
ints setr_epi32(Values... values) {
  return {{uint32_t(values)...}};
}
inline floats add_ps(floats a, floats b) {
  EMULATED_EACH a.v[i] += b.v[i];
  return a;
}
inline floats sub_ps(floats a, floats b) {
  EMULATED_EACH a.v[i] -= b.v[i];
  return a;
}
inline floats mul_ps(floats a, floats b) {
  EMULATED_EACH a.v[i] *= b.v[i];
  return a;
}
inline floats fmadd_ps(floats a, floats b, floats c) {
  EMULATED_EACH a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
inline floats max_ps(floats a, floats b) {
  EMULATED_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// _CMP_NLE_UQ, the only comparison that is used.
inline uint16_t cmp_ps_mask(floats a, floats b, int) {
  uint16_t mask = 0;
  EMULATED_EACH mask |= uint16_t(!(a.v[i] <= b.v[i]) << i);
  return mask;
}
inline floats mask_mov_ps(floats otherwise, uint16_t mask, floats a) {
  EMULATED_EACH a.v[i] = mask >> i & 1 ? a.v[i] : otherwise.v[i];
  return a;
}
inline floats maskz_mov_ps(uint16_t mask, floats a) { return mask_mov_ps(set1_ps(0), mask, a); }
inline floats maskz_loadu_ps(uint16_t mask, const float* p) {
  floats r;
  EMULATED_EACH r.v[i] = mask >> i & 1 ? p[i] : 0;
  return r;
}
inline void mask_storeu_ps(float* p, uint16_t mask, floats a) {
  EMULATED_EACH if (mask >> i & 1) p[i] = a.v[i];
}
inline void stream(void* p, const void* a) {
  must_be_aligned(p);
  memcpy(p, a, 64);
}
inline void stream_ps(float* p, floats a) { stream(p, &a); }
inline void stream_si512(ints* p, ints a) { stream(p, &a); }
inline ints load_si512(const void* p) {
  must_be_aligned(p);
  return loaded<ints>(p);
}
inline ints add_epi32(ints a, ints b) {
  EMULATED_EACH a.v[i] += b.v[i];
  return a;
}
inline ints and_si512(ints a, ints b) {
  EMULATED_EACH a.v[i] &= b.v[i];
  return a;
}
inline ints slli_epi32(ints a, int n) {
  EMULATED_EACH a.v[i] <<= n;
  return a;
}
inline ints srli_epi32(ints a, int n) {
  EMULATED_EACH a.v[i] >>= n;
  return a;
}
inline ints cvtepu16_epi32(__m256i a) {
  ints r;
  uint16_t values[16];
  memcpy(values, &a, 32);
  EMULATED_EACH r.v[i] = values[i];
  return r;
}
inline __m256i cvtepi32_epi16(ints a) {
  uint16_t r[16];
  EMULATED_EACH r[i] = uint16_t(a.v[i]);
  return loaded<__m256i>(r);
}
inline floats cvtph_ps(__m256i a) {
  floats r;
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  memcpy(r.v, &low, 32);
  memcpy(r.v + 8, &high, 32);
  return r;
}
inline __m256i cvtps_ph(floats a, int) {
  const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(a.v), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(a.v + 8), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline doubles cvtps_pd(__m256 a) {
  doubles r;
  float values[8];
  memcpy(values, &a, 32);
  for (int i = 0; i < 8; ++i) r.v[i] = values[i];
  return r;
}
inline doubles add_pd(doubles a, doubles b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
inline __m256 extractf32x8_ps(floats a, int upper) { return _mm256_loadu_ps(a.v + 8 * upper); }
inline ints castsi256_si512(__m256i a) {
  ints r{};
  memcpy(r.v, &a, 32);
  return r;
}
inline ints inserti64x4(ints a, __m256i b, int upper) {
  memcpy(a.v + 8 * upper, &b, 32);
  return a;
}
inline ints mask_blend_epi16(uint32_t mask, ints a, ints b) {
  ints r;
  EMULATED_EACH {
    const uint32_t low = half_of(mask >> (2 * i) & 1 ? b : a, 2 * i);
    const uint32_t high = half_of(mask >> (2 * i + 1) & 1 ? b : a, 2 * i + 1);
    r.v[i] = low | high << 16;
  }
  return r;
}
inline uint32_t movepi16_mask(ints a) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= uint32_t(half_of(a, i) >> 15) << i;
  return mask;
}
inline uint16_t movepi32_mask(ints a) {
  uint16_t mask = 0;
  EMULATED_EACH mask |= uint16_t(a.v[i] >> 31 << i);
  return mask;
}
inline ints movm_epi16(uint32_t mask) {
  ints r;
  EMULATED_EACH r.v[i] = (mask >> (2 * i) & 1 ? 0xffffu : 0) | (mask >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
  return r;
}
inline ints movm_epi32(uint16_t mask) {
  ints r;
  EMULATED_EACH r.v[i] = mask >> i & 1 ? ~0u : 0;
  return r;
}
inline floats permutex2var_ps(floats a, ints index, floats b) {
  floats r;
  EMULATED_EACH r.v[i] = (index.v[i] & 16 ? b : a).v[index.v[i] & 15];
  return r;
}
inline __m256i maskz_loadu_epi16(uint16_t mask, const void* p) {
  uint16_t r[16] = {};
  EMULATED_EACH if (mask >> i & 1) memcpy(r + i, static_cast<const uint16_t*>(p) + i, 2);
  return loaded<__m256i>(r);
}
inline void mask_storeu_epi16(void* p, uint16_t mask, __m256i a) {
  uint16_t values[16];
  memcpy(values, &a, 32);
  EMULATED_EACH if (mask >> i & 1) memcpy(static_cast<uint16_t*>(p) + i, values + i, 2);
}

#undef EMULATED_EACH

}  // namespace emulated

// Some are macros of the compiler's, without optimization.
#undef _mm512_add_epi32
#undef _mm512_add_pd
#undef _mm512_add_ps
#undef _mm512_and_si512
#undef _mm512_castsi256_si512
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_pd
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_fmadd_ps
#undef _mm512_inserti64x4
#undef _mm512_load_si512
#undef _mm512_mask_blend_epi16
#undef _mm512_mask_mov_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#undef _mm512_max_ps
#undef _mm512_movepi16_mask
#undef _mm512_movepi32_mask
#undef _mm512_movm_epi16
#undef _mm512_movm_epi32
#undef _mm512_mul_ps
#undef _mm512_permutex2var_ps
#undef _mm512_set1_epi32
#undef _mm512_set1_ps
#undef _mm512_setr_epi32
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_stream_ps
#undef _mm512_stream_si512
#undef _mm512_sub_ps
#undef _mm512_castps512_ps256
#undef _mm512_castps_si512
#undef _mm512_castsi512_ps
#undef _mm512_loadu_pd
#undef _mm512_loadu_ps
#undef _mm512_loadu_si512
#undef _mm512_setzero_ps
#undef _mm512_storeu_pd
#undef _mm512_storeu_ps
#undef _mm512_storeu_si512
#undef _mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16

#define __m512 emulated::floats
#define __m512i emulated::ints
#define __m512d emulated::doubles
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_pd emulated::add_pd
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_load_si512 emulated::load_si512
#define _mm512_mask_blend_epi16 emulated::mask_blend_epi16
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_movepi16_mask emulated::movepi16_mask
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_movm_epi16 emulated::movm_epi16
#define _mm512_movm_epi32 emulated::movm_epi32
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_stream_ps emulated::stream_ps
#define _mm512_stream_si512 emulated::stream_si512
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_castps512_ps256(a) _mm256_loadu_ps((a).v)
#define _mm512_castps_si512 emulated::cast<emulated::ints>
#define _mm512_castsi512_ps emulated::cast<emulated::floats>
#define _mm512_loadu_pd emulated::loaded<emulated::doubles>
#define _mm512_loadu_ps emulated::loaded<emulated::floats>
#define _mm512_loadu_si512 emulated::loaded<emulated::ints>
#define _mm512_setzero_ps() emulated::set1_ps(0)
#define _mm512_storeu_pd emulated::stored
#define _mm512_storeu_ps emulated::stored
#define _mm512_storeu_si512 emulated::stored
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16

// Only now, as the compiler's header looks at it.
#define __AVX512F__ 1
