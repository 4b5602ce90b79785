// Vectors of floats, for AVX-512, AVX2 and plain C++; 16-bit values are widened on load and rounded to nearest on store.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace BNLAB_ISA {

#define BNLAB_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

BNLAB_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
BNLAB_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

BNLAB_INLINE float widen(float value) { return value; }
BNLAB_INLINE float widen(bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }
BNLAB_INLINE float widen(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x0400u) return from_bits(sign | bits_of(float(rest) * 0x1p-24f));
  return from_bits(sign | ((rest << 13) + 0x38000000u));
}

template <class T>
T narrow(float value);
template <>
BNLAB_INLINE float narrow<float>(float value) {
  return value;
}
template <>
BNLAB_INLINE bfloat16 narrow<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
BNLAB_INLINE float16 narrow<float16>(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (rest >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  if (rest < 0x38800000u) return {uint16_t(sign | uint32_t(std::nearbyint(from_bits(rest) * 0x1p24f)))};
  return {uint16_t(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Lanes = __mmask16;  // one bit a lane

struct Vec {
  __m512 v;
};

struct Pack {
  Vec a, b;
};
struct LanesPack {
  Lanes a, b;
};

BNLAB_INLINE Vec splat(float value) { return {_mm512_set1_ps(value)}; }
BNLAB_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
BNLAB_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
BNLAB_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNLAB_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNLAB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BNLAB_INLINE Lanes first(int64_t n) { return Lanes((1u << n) - 1u); }
BNLAB_INLINE Lanes passes(Vec a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
BNLAB_INLINE Vec keep(Lanes lanes, Vec a) { return {_mm512_maskz_mov_ps(lanes, a.v)}; }
BNLAB_INLINE Vec positive(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // NaN stays NaN
BNLAB_INLINE Vec select(Lanes lanes, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, lanes, yes.v)}; }

BNLAB_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
BNLAB_INLINE Vec load(const bfloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
BNLAB_INLINE Vec load(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
BNLAB_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
BNLAB_INLINE Vec load(const bfloat16* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
BNLAB_INLINE Vec load(const float16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

// The upper 16 bits are the value rounded to bfloat16. A NaN rounds to a NaN unless all bits of its payload are set, as no
// operation on 16-bit values and folded coefficients makes it (see `quiet` in fold.h).
BNLAB_INLINE __m512i rounded_up(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
BNLAB_INLINE __m256i rounded(Vec a, bfloat16) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_up(a), 16));
}
BNLAB_INLINE __m256i rounded(Vec a, float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

BNLAB_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
template <class T>
BNLAB_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(a, T{}));
}
BNLAB_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
BNLAB_INLINE void store(T* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), rounded(a, T{}));
}

// bfloat16 are taken apart into those at even and at odd places: a shift each way instead of shuffles.
template <class T>
constexpr bool kSplit = std::is_same<T, bfloat16>::value;
BNLAB_INLINE Pack load_pack(const bfloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))}};
}
BNLAB_INLINE Pack split(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(a.v, even, b.v)}, {_mm512_permutex2var_ps(a.v, odd, b.v)}};
}
BNLAB_INLINE __m512i rounded_pack(Pack a, bfloat16) {
  const __m512i even = _mm512_srli_epi32(rounded_up(a.a), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded_up(a.b));
}
BNLAB_INLINE __m512i rounded_pack(Pack a, float16 kind) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(a.a, kind)), rounded(a.b, kind), 1);
}
BNLAB_INLINE void store_pack(bfloat16* p, Pack a) { _mm512_storeu_si512(p, rounded_pack(a, bfloat16{})); }
// Writes a pack past the cache; p is aligned to its size, or to 64 bytes.
BNLAB_INLINE void stream_pack(float* p, Pack a) {
  _mm512_stream_ps(p, a.a.v);
  _mm512_stream_ps(p + 16, a.b.v);
}
template <class T>
BNLAB_INLINE void stream_pack(T* p, Pack a) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), rounded_pack(a, T{}));
}
BNLAB_INLINE void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
}
BNLAB_INLINE void fence() { _mm_sfence(); }

BNLAB_INLINE void store_lanes(uint8_t* p, Lanes lanes) { memcpy(p, &lanes, 2); }
BNLAB_INLINE Lanes load_lanes(const uint8_t* p) {
  Lanes lanes;
  memcpy(&lanes, p, 2);
  return lanes;
}

// Of a pack, in the order in which its elements lie.
template <class T>
BNLAB_INLINE void store_lanes(uint8_t* p, Lanes a, Lanes b) {
  __mmask32 both = __mmask32(a) | __mmask32(b) << 16;
  if (kSplit<T>)
    both = _mm512_movepi16_mask(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_movm_epi32(a), _mm512_movm_epi32(b)));
  memcpy(p, &both, 4);
}
template <class T>
BNLAB_INLINE LanesPack load_lanes_pack(const uint8_t* p) {
  __mmask32 both;
  memcpy(&both, p, 4);
  if (!kSplit<T>) return {Lanes(both), Lanes(both >> 16)};
  const __m512i wide = _mm512_movm_epi16(both);
  return {_mm512_movepi32_mask(_mm512_slli_epi32(wide, 16)), _mm512_movepi32_mask(wide)};
}

// Adds the lanes to kLanes doubles.
BNLAB_INLINE void add_to(double* sums, Vec a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};
struct Lanes {
  __m256 v;  // all bits of a lane
};

struct Pack {
  Vec a, b;
};
struct LanesPack {
  Lanes a, b;
};

BNLAB_INLINE Vec splat(float value) { return {_mm256_set1_ps(value)}; }
BNLAB_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
BNLAB_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
BNLAB_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNLAB_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNLAB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BNLAB_INLINE Lanes first(int64_t n) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), index))};
}
BNLAB_INLINE Lanes passes(Vec a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ)}; }
BNLAB_INLINE Vec keep(Lanes lanes, Vec a) { return {_mm256_and_ps(lanes.v, a.v)}; }
BNLAB_INLINE Vec positive(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }  // NaN stays NaN
BNLAB_INLINE Vec select(Lanes lanes, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, lanes.v)}; }

BNLAB_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
BNLAB_INLINE Vec load(const bfloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
BNLAB_INLINE Vec load(const float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
BNLAB_INLINE Vec load(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(first(n).v))};
}
// Fewer than eight values of 16 bits by whole words, never beyond the last of them.
BNLAB_INLINE __m128i load_bits(const uint16_t* p, int64_t n) {
  uint64_t low = 0, high = 0;
  uint32_t two;
  if (n >= 4) {
    memcpy(&low, p, 8);
    if (n > 4) {
      memcpy(&high, p + n - 4, 8);
      high >>= 16 * (8 - n);
    }
  } else {
    if (n >= 2) memcpy(&two, p, 4), low = two;
    if (n % 2 == 1) low |= uint64_t(p[n - 1]) << 16 * (n - 1);
  }
  return _mm_set_epi64x(int64_t(high), int64_t(low));
}
BNLAB_INLINE Vec load(const bfloat16* p, int64_t n) {
  const __m256i wide = _mm256_cvtepu16_epi32(load_bits(&p->bits, n));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
BNLAB_INLINE Vec load(const float16* p, int64_t n) { return {_mm256_cvtph_ps(load_bits(&p->bits, n))}; }

// The upper 16 bits are the value rounded to bfloat16. A NaN rounds to a NaN unless all bits of its payload are set, as no
// operation on 16-bit values and folded coefficients makes it (see `quiet` in fold.h).
BNLAB_INLINE __m256i rounded_up(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
BNLAB_INLINE __m128i rounded(Vec a, bfloat16) {
  const __m256i wide = _mm256_srli_epi32(rounded_up(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
BNLAB_INLINE __m128i rounded(Vec a, float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

BNLAB_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
template <class T>
BNLAB_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(a, T{}));
}
BNLAB_INLINE void store(float* p, Vec a, int64_t n) {
  __m128 rest = _mm256_castps256_ps128(a.v);
  if (n & 4) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(a.v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
    rest = _mm_movehl_ps(rest, rest);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, rest);
}
template <class T>
BNLAB_INLINE void store(T* p, Vec a, int64_t n) {
  const __m128i bits = rounded(a, T{});
  uint64_t rest = uint64_t(_mm_cvtsi128_si64(bits));
  if (n & 4) {
    memcpy(p, &rest, 8);
    rest = uint64_t(_mm_extract_epi64(bits, 1));
    p += 4;
  }
  if (n & 2) {
    memcpy(p, &rest, 4);
    rest >>= 32;
    p += 2;
  }
  if (n & 1) memcpy(p, &rest, 2);
}

// bfloat16 are taken apart into those at even and at odd places: a shift each way instead of shuffles.
template <class T>
constexpr bool kSplit = std::is_same<T, bfloat16>::value;
BNLAB_INLINE Pack load_pack(const bfloat16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))))}};
}
BNLAB_INLINE Pack split(Vec a, Vec b) {
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
  return {{_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8))}, {_mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))}};
}
BNLAB_INLINE __m256i rounded_pack(Pack a, bfloat16) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded_up(a.a), 16), rounded_up(a.b), 0xaa);
}
BNLAB_INLINE void store_pack(bfloat16* p, Pack a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_pack(a, bfloat16{}));
}
// Writes a pack past the cache; p is aligned to its size, or to 64 bytes.
BNLAB_INLINE void stream_pack(float* p, Pack a) {
  _mm256_stream_ps(p, a.a.v);
  _mm256_stream_ps(p + 8, a.b.v);
}
BNLAB_INLINE void stream_pack(bfloat16* p, Pack a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_pack(a, bfloat16{}));
}
BNLAB_INLINE void stream_pack(float16* p, Pack a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), rounded(a.a, float16{}));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p + kLanes), rounded(a.b, float16{}));
}
BNLAB_INLINE void stream_line(void* to, const void* from) {
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_load_si256(static_cast<const __m256i*>(from) + i));
}
BNLAB_INLINE void fence() { _mm_sfence(); }

BNLAB_INLINE void store_lanes(uint8_t* p, Lanes lanes) { *p = uint8_t(_mm256_movemask_ps(lanes.v)); }
BNLAB_INLINE Lanes load_lanes(const uint8_t* p) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*p), bit), bit))};
}

// Of a pack, in the order in which its elements lie.
template <class T>
BNLAB_INLINE void store_lanes(uint8_t* p, Lanes a, Lanes b) {
  const __m256i low = _mm256_castps_si256(a.v), high = _mm256_castps_si256(b.v);
  uint16_t both;
  if (kSplit<T>) {
    const __m256i wide = _mm256_blend_epi16(low, high, 0xaa);
    both = uint16_t(
        _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1))));
  } else {
    both = uint16_t(_mm256_movemask_ps(a.v) | _mm256_movemask_ps(b.v) << 8);
  }
  memcpy(p, &both, 2);
}
template <class T>
BNLAB_INLINE LanesPack load_lanes_pack(const uint8_t* p) {
  if (!kSplit<T>) return {load_lanes(p), load_lanes(p + 1)};
  uint16_t both;
  memcpy(&both, p, 2);
  const __m256i wide = _mm256_set1_epi32(both);
  const __m256i even = _mm256_setr_epi32(1, 4, 16, 64, 256, 1024, 4096, 16384), odd = _mm256_add_epi32(even, even);
  return {{_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(wide, even), even))},
          {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(wide, odd), odd))}};
}

BNLAB_INLINE void add_to(double* sums, Vec a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}

#else

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Vec {
  Floats v;
};
struct Lanes {
  Ints v;  // all bits of a lane
};
struct Pack {
  Vec a, b;
};
struct LanesPack {
  Lanes a, b;
};

#define BNLAB_EACH for (int i = 0; i < kLanes; ++i)
BNLAB_INLINE Vec zero() { return {Floats{}}; }
BNLAB_INLINE Vec splat(float value) { return {Floats{} + value}; }
BNLAB_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
BNLAB_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
BNLAB_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
BNLAB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
BNLAB_INLINE Lanes first(int64_t n) { return {Ints{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(n)}; }
BNLAB_INLINE Lanes passes(Vec a) { return {~(a.v <= 0.0f)}; }
BNLAB_INLINE Vec select(Lanes lanes, Vec yes, Vec no) {
  return {Floats((Ints(yes.v) & lanes.v) | (Ints(no.v) & ~lanes.v))};
}
BNLAB_INLINE Vec keep(Lanes lanes, Vec a) { return {Floats(Ints(a.v) & lanes.v)}; }
BNLAB_INLINE Vec positive(Vec a) { return keep(passes(a), a); }

BNLAB_INLINE Vec load(const float* p) {
  Vec out;
  memcpy(&out.v, p, sizeof(out.v));
  return out;
}
template <class T>
BNLAB_INLINE Vec load(const T* p) {
  float wide[kLanes];
  BNLAB_EACH wide[i] = widen(p[i]);
  return load(wide);
}
template <class T>
BNLAB_INLINE Vec load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  memcpy(whole, p, size_t(n) * sizeof(T));
  return load(whole);
}
BNLAB_INLINE void store(float* p, Vec a) { memcpy(p, &a.v, sizeof(a.v)); }
template <class T>
BNLAB_INLINE void store(T* p, Vec a) {
  BNLAB_EACH p[i] = narrow<T>(a.v[i]);
}
template <class T>
BNLAB_INLINE void store(T* p, Vec a, int64_t n) {
  T whole[kLanes];
  store(whole, a);
  memcpy(p, whole, size_t(n) * sizeof(T));
}
template <class T>
constexpr bool kSplit = false;
BNLAB_INLINE Pack split(Vec a, Vec b) { return {a, b}; }
template <class T>
BNLAB_INLINE void stream_pack(T* p, Pack a) {
  store(p, a.a);
  store(p + kLanes, a.b);
}
BNLAB_INLINE void stream_line(void* to, const void* from) { memcpy(to, from, 64); }
BNLAB_INLINE void fence() {}
BNLAB_INLINE void store_lanes(uint8_t* p, Lanes lanes) {
  unsigned bits = 0;
  BNLAB_EACH bits |= unsigned(lanes.v[i] & 1) << i;
  *p = uint8_t(bits);
}
BNLAB_INLINE Lanes load_lanes(const uint8_t* p) {
  const Ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return {((Ints{} + int32_t(*p)) & bit) == bit};
}
template <class T>
BNLAB_INLINE void store_lanes(uint8_t* p, Lanes a, Lanes b) {
  store_lanes(p, a);
  store_lanes(p + 1, b);
}
template <class T>
BNLAB_INLINE LanesPack load_lanes_pack(const uint8_t* p) {
  return {load_lanes(p), load_lanes(p + 1)};
}
BNLAB_INLINE void add_to(double* sums, Vec a) {
  BNLAB_EACH sums[i] += a.v[i];
}
#undef BNLAB_EACH

#endif

// Two vectors that are loaded and stored together.
constexpr int64_t kPackLanes = 2 * kLanes;

template <class T>
BNLAB_INLINE Pack load_pack(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
BNLAB_INLINE void store_pack(T* p, Pack a) {
  store(p, a.a);
  store(p + kLanes, a.b);
}

// Floats in the order in which load_pack gives values of T.
template <class T>
BNLAB_INLINE Pack load_floats(const float* p) {
  return kSplit<T> ? split(load(p), load(p + kLanes)) : Pack{load(p), load(p + kLanes)};
}

// Where the coefficient of column j of a row lies, so that whole packs find theirs side by side.
template <class T>
constexpr int64_t slot(int64_t j, int64_t width) {
  if (!kSplit<T> || j >= width / kPackLanes * kPackLanes) return j;
  return j / kPackLanes * kPackLanes + j % 2 * kLanes + j % kPackLanes / 2;
}

// Bytes of a segment of `n` bits; every segment begins at a whole 16 bits.
constexpr int64_t bits_bytes(int64_t n) { return (n + 15) / 16 * 2; }

}  // namespace BNLAB_ISA
