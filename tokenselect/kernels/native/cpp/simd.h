// Vectors of floats of the width that this file is compiled for, and what is computed with them.
//
// GCC's vector extensions, which clang has too; intrinsics only where a conversion has no other
// name. Everything is in a namespace per path, since one library holds several of them; and nothing
// of the C++ library is used, whose inline functions the linker would share between paths.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TS_UNROLL _Pragma("GCC unroll 16")
// Of what is called from several places and takes long by itself: compiled once, in less time.
#define TS_APART __attribute__((noinline))

namespace TS_PATH {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
// Accumulators that a kernel keeps at once.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ACCUMULATORS = 16;
#else
constexpr int ACCUMULATORS = 8;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

constexpr float INF = __builtin_inff();

static inline vf all(float x) { return x - vf{}; }
static inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf select_lanes(vi which, vf yes, vf no) {
  return (vf)(((vi)yes & which) | ((vi)no & ~which));
}
static inline vf larger(vf a, vf b) { return select_lanes(a > b, a, b); }

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

// --- elements of a cache, widened exactly ---

struct Float32 {
  typedef float raw;
  static vf widen(const raw* p) { return load(p); }
  static float widen_one(raw x) { return x; }
  static raw narrow(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t raw;
  static vf widen(const raw* p) {
#if defined(__AVX512F__)
    vu bits = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    vu bits = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    vh x;
    memcpy(&x, p, sizeof x);
    vu bits = __builtin_convertvector(x, vu);
#endif
    return (vf)(bits << 16);
  }
  static float widen_one(raw x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  static raw narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  typedef uint16_t raw;
  // By integers, since g++ 11 and clang++ 14 have no _Float16 on every processor.
  static float widen_one(raw x) {
    uint32_t magnitude = x & 0x7fff, bits = (magnitude << 13) + (112u << 23);
    float y = (float)magnitude * 0x1p-24f;  // as below
    if (magnitude < 0x400) memcpy(&bits, &y, 4);
    if (magnitude >= 0x7c00) bits |= 0x7f800000;
    bits |= (uint32_t)(x & 0x8000) << 16;
    memcpy(&y, &bits, 4);
    return y;
  }
  static raw narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (raw)(sign | 0x7e00);
    if (size >= 0x477ff000) return (raw)(sign | 0x7c00);  // nearer to 2^16 than to the largest
    if (size < 0x38800000) {  // subnormal: of 0.5 the last place is that of all subnormals
      float y = __builtin_fabsf(x) + 0.5f;
      memcpy(&bits, &y, 4);
      return (raw)(sign | (bits - 0x3f000000));
    }
    return (raw)(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10)));
  }
  static vf widen(const raw* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    // The exponent moves by 112; a subnormal is a whole number of 2^-24; of an exponent of ones, inf
    // and NaN, it becomes ones again. No step has a subnormal float, which some modes take for 0.
    vh x;
    memcpy(&x, p, sizeof x);
    vu bits = __builtin_convertvector(x, vu), magnitude = bits & 0x7fff;
    vu normal = (magnitude << 13) + (112u << 23);
    vf subnormal = __builtin_convertvector(magnitude, vf) * 0x1p-24f;
    vu is_subnormal = (vu)(magnitude < (vu)all(0) + 0x400u);
    vu value = (is_subnormal & (vu)subnormal) | (~is_subnormal & normal);
    vu special = (vu)(magnitude >= (vu)all(0) + 0x7c00u) & 0x7f800000u;
    return (vf)(value | special | (bits & 0x8000) << 16);
#endif
  }
};

// Part of a vector, zeros behind it: no element past the last is read.
template <class E>
static inline vf widen_part(const typename E::raw* p, int count) {
  typename E::raw part[W] = {};
  memcpy(part, p, (size_t)count * sizeof *p);
  return E::widen(part);
}

// --- functions ---

// e^x to about one unit in the last place; 0 below the normal floats, NaN stays NaN.
static inline vf exp(vf x) {
  const vf low = all(-87.33f), high = all(88.72f);
  vf inside = select_lanes(x < low, low, select_lanes(x > high, high, x));
  // x = n ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 and taking it off rounds to an integer, and
  // n times the first part of ln 2, of 12 bits, is exact.
  const vf shift = all(12582912.0f);
  vf shifted = inside * 1.44269504f + shift, n = shifted - shift;
  vf r = (inside - n * 0.693115234375f) - n * 3.19461833e-5f;
  // e^r = 1 + r + r^2 P(r), with P interpolated at Chebyshev's nodes.
  vf p = all(0x1.6d1606p-10f);
  p = p * r + 0x1.12106cp-7f;
  p = p * r + 0x1.555516p-5f;
  p = p * r + 0x1.5554d8p-3f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors, since n may be 128.
  vi whole = (vi)((vu)shifted - (vu)shift), first = whole >> 1;
  vf y = p * (vf)((vu)(first + 127) << 23) * (vf)((vu)(whole - first + 127) << 23);
  y = select_lanes(x < low, vf{}, select_lanes(x > high, all(INF), y));
  return select_lanes(x == x, y, x);
}

// tanh x to a few units in the last place, of the argument too where that is small.
static inline vf tanh(vf x) {
  vf size = (vf)((vi)x & 0x7fffffff), z = x * x;
  // x + x^3 P(x^2) below 0.6, with P interpolated at Chebyshev's nodes; above, by e^2x.
  vf p = all(0.00234493125f);
  p = p * z - 0.00838877354f;
  p = p * z + 0.0217822473f;
  p = p * z - 0.0539608561f;
  p = p * z + 0.133333102f;
  p = p * z - 0.333333343f;
  vf near = x + (x * z) * p;
  vf far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  far = (vf)((vi)far | ((vi)x & (vi)all(-0.0f)));
  return select_lanes(size < 0.6f, near, far);
}

// --- what the lanes of several vectors add up to, or the largest of them ---

template <int... I>
struct Lanes {};
#if defined(__AVX512F__)
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> EveryLane;
#elif defined(__AVX2__)
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> EveryLane;
#else
typedef Lanes<0, 1, 2, 3> EveryLane;
#endif

// Lane i of what `folded` adds up: in groups of 2 H lanes, x's halves below, y's above.
constexpr int from(int i, int H, int half) {
  int group = i / (2 * H) * 2 * H, within = i % (2 * H);
  return within < H ? group + half * H + within : W + group + half * H + within - H;
}

struct Sum {
  static vf of(vf a, vf b) { return a + b; }
};
struct Largest {
  static vf of(vf a, vf b) { return larger(a, b); }
};

template <class Op, int H, int... I>
static inline vf folded(vf x, vf y, Lanes<I...>) {
#if defined(__clang__)
  return Op::of(__builtin_shufflevector(x, y, from(I, H, 0)...),
                __builtin_shufflevector(x, y, from(I, H, 1)...));
#else
  return Op::of(__builtin_shuffle(x, y, vi{from(I, H, 0)...}),
                __builtin_shuffle(x, y, vi{from(I, H, 1)...}));
#endif
}

// Where what is folded of vector i is: folding reverses the bits of its lane.
struct FoldedAt {
  int place[64];

  constexpr FoldedAt() : place() {
    for (int i = 0; i < 64; ++i) {
      int lane = i % W, result = 0;
      for (int bit = 1; bit < W; bit *= 2, lane /= 2) result = 2 * result + lane % 2;
      place[i] = i / W * W + result;
    }
  }
};
constexpr FoldedAt FOLDED_AT;

// The sum, or the largest, of the lanes of each of N vectors, that of vector i at
// to[FOLDED_AT.place[i]], in an order that depends on nothing but W. There is room for N rounded up
// to a multiple of W.
template <class Op, int N, int H = W / 2>
static inline void fold(const vf* a, float* to) {
  if constexpr (H == 0) {
    TS_UNROLL for (int i = 0; i < N; ++i) store(to + i * W, a[i]);
  } else {
    constexpr int M = (N + 1) / 2;
    vf b[M];
    TS_UNROLL for (int i = 0; i < M; ++i) {
      b[i] = folded<Op, H>(a[2 * i], a[2 * i + 1 < N ? 2 * i + 1 : 2 * i], EveryLane());
    }
    fold<Op, M, H / 2>(b, to);
  }
}

static inline float sum(vf x) {
  float sums[W];
  fold<Sum, 1>(&x, sums);
  return sums[0];
}

static inline float maximum(vf x) {  // a NaN does not count
  float lanes[W], result = -INF;
  store(lanes, x);
  for (int i = 0; i < W; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

}  // namespace TS_PATH
