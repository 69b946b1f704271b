// Vectors of as many numbers as the target's registers hold (GCC vector extensions). asa/kernels.h includes this file
// inside the namespace of an instruction set.

// Everything here is inlined, so it does not matter how vectors wider than the registers would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(ASA_AVX512)
constexpr int kBytes = 64;
#elif defined(ASA_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
#if defined(ASA_AVX512) || defined(ASA_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes), may_alias));
  typedef int32_t I __attribute__((vector_size(kBytes), may_alias));
  typedef uint32_t U __attribute__((vector_size(kBytes), may_alias));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes), may_alias));
  typedef int64_t I __attribute__((vector_size(kBytes), may_alias));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
};

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using Ints = typename Lanes<T>::I;
template <class T>
constexpr int kLanes = kBytes / sizeof(T);

#define ASA_INLINE static inline __attribute__((always_inline))

// GCC for ARM loads so much of an unrolled loop ahead that sums no longer fit into registers; not beyond this.
ASA_INLINE void load_no_further() {
#if defined(ASA_NEON)
  asm volatile("" ::: "memory");
#endif
}

template <class T>
ASA_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
ASA_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = x;
}

// The first n numbers of a vector, 0 in the other lanes; nothing else is read or written.
#if defined(ASA_AVX512)
ASA_INLINE Vec<float> load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
ASA_INLINE Vec<double> load_some(const double* p, int64_t n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
ASA_INLINE void store_some(float* p, int64_t n, Vec<float> x) { _mm512_mask_storeu_ps(p, (1u << n) - 1, x); }
ASA_INLINE void store_some(double* p, int64_t n, Vec<double> x) { _mm512_mask_storeu_pd(p, (1u << n) - 1, x); }
#else
template <class T>
ASA_INLINE Vec<T> load_some(const T* p, int64_t n) {
  if (n == kLanes<T>) return load(p);
  Vec<T> x = {};
  for (int64_t r = 0; r < n; ++r) x[r] = p[r];
  return x;
}
template <class T>
ASA_INLINE void store_some(T* p, int64_t n, Vec<T> x) {
  if (n == kLanes<T>) return store(p, x);
  for (int64_t r = 0; r < n; ++r) p[r] = x[r];
}
#endif

template <class T>
ASA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// a where the condition holds, else b; bitwise, so that a NaN in the one not chosen stays out.
template <class T>
ASA_INLINE Vec<T> select(Ints<T> condition, Vec<T> a, Vec<T> b) {
  return condition ? a : b;
}

// The larger and the smaller, lane by lane (b where one of them is NaN); the lanes where a > b or a >= b, lane 0 in the
// lowest bit; a in the lanes whose bit is set, b in the others.
#if defined(ASA_AVX512)
ASA_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
ASA_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a, b); }
ASA_INLINE uint64_t greater(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
ASA_INLINE uint64_t greater(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
ASA_INLINE uint64_t at_least(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
ASA_INLINE uint64_t at_least(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
ASA_INLINE Vec<float> choose(uint64_t bits, Vec<float> a, Vec<float> b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
}
ASA_INLINE Vec<double> choose(uint64_t bits, Vec<double> a, Vec<double> b) {
  return _mm512_mask_blend_pd(static_cast<__mmask8>(bits), b, a);
}
#else
#if defined(ASA_AVX2)
ASA_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
ASA_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
ASA_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
ASA_INLINE uint64_t greater(Vec<float> a, Vec<float> b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
ASA_INLINE uint64_t greater(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ));
}
ASA_INLINE uint64_t at_least(Vec<float> a, Vec<float> b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
ASA_INLINE uint64_t at_least(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GE_OQ));
}
#else
template <class V>
ASA_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ASA_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
template <class I>
ASA_INLINE uint64_t bits_of(I condition) {
#if defined(ASA_NEON)
  if constexpr (sizeof(condition[0]) == 4)
    return vaddvq_u32(vandq_u32(reinterpret_cast<uint32x4_t>(condition), uint32x4_t{1, 2, 4, 8}));
  else
    return vaddvq_u64(vandq_u64(reinterpret_cast<uint64x2_t>(condition), uint64x2_t{1, 2}));
#else
  uint64_t bits = 0;
  for (unsigned r = 0; r < sizeof(I) / sizeof(condition[0]); ++r) bits |= static_cast<uint64_t>(condition[r] & 1) << r;
  return bits;
#endif
}
template <class V>
ASA_INLINE uint64_t greater(V a, V b) {
  return bits_of(a > b);
}
template <class V>
ASA_INLINE uint64_t at_least(V a, V b) {
  return bits_of(a >= b);
}
#endif
template <class V>
ASA_INLINE V choose(uint64_t bits, V a, V b) {
  decltype(a < b) bit;
  using I = decltype(bit[0] + 0);
  for (unsigned r = 0; r < sizeof(V) / sizeof(a[0]); ++r) bit[r] = I{1} << r;
  return ((static_cast<I>(bits) - (bit ^ bit)) & bit) != 0 ? a : b;
}
#endif

#if defined(ASA_AVX512)
ASA_INLINE float largest_lane(Vec<float> x) { return _mm512_reduce_max_ps(x); }
ASA_INLINE double largest_lane(Vec<double> x) { return _mm512_reduce_max_pd(x); }
ASA_INLINE float sum_of_lanes(Vec<float> x) { return _mm512_reduce_add_ps(x); }
ASA_INLINE double sum_of_lanes(Vec<double> x) { return _mm512_reduce_add_pd(x); }
#else
// Half by half: f(x[r], x[r + half]).
template <class V, class F>
ASA_INLINE auto fold(V x, const F& f) {
  constexpr int kCount = sizeof(x) / sizeof(x[0]);
  using Number = decltype(x[0] + x[0]);
  Number y[kCount];
  __builtin_memcpy(y, &x, sizeof(x));
#pragma GCC unroll 4
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int r = 0; r < half; ++r) y[r] = f(y[r], y[r + half]);
  return y[0];
}
template <class V>
ASA_INLINE auto largest_lane(V x) {
  return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}
template <class V>
ASA_INLINE auto sum_of_lanes(V x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}
#endif
template <class T>
ASA_INLINE T largest_of(Vec<T> x) {
  return largest_lane(x);
}
template <class T>
ASA_INLINE T sum_of(Vec<T> x) {
  return sum_of_lanes(x);
}

// transpose() of as many vectors as each has lanes.
#if defined(ASA_AVX512)
ASA_INLINE Vec<float> lanes_of_two(Vec<float> a, Ints<float> index, Vec<float> b) {
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(index), b);
}
ASA_INLINE Vec<double> lanes_of_two(Vec<double> a, Ints<double> index, Vec<double> b) {
  return _mm512_permutex2var_pd(a, reinterpret_cast<__m512i>(index), b);
}
// Of lanes 0 .. kLanes of a pair of vectors, x and the one `step` further, those that each holds once squares of `step`
// lanes are exchanged.
template <class T>
struct Exchanges {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int kCount = kLanes<T>;
  alignas(64) Index first[4][kCount] = {}, second[4][kCount] = {};
  constexpr Exchanges() {
    for (int i = 0; 1 << i < kCount; ++i)
      for (int r = 0; r < kCount; ++r) {
        const int step = 1 << i;
        first[i][r] = r & step ? kCount + r - step : r;
        second[i][r] = r & step ? kCount + r : r + step;
      }
  }
};
template <class T>
constexpr Exchanges<T> kExchanges;

template <class V>
ASA_INLINE void transpose(V* x) {
  using T = std::decay_t<decltype(x[0][0])>;
  constexpr int kCount = kLanes<T>;
#pragma GCC unroll 4
  for (int i = 0; 1 << i < kCount; ++i) {
    const auto first = *reinterpret_cast<const Ints<T>*>(kExchanges<T>.first[i]);
    const auto second = *reinterpret_cast<const Ints<T>*>(kExchanges<T>.second[i]);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      if (r >> i & 1) continue;
      const Vec<T> a = x[r], b = x[r + (1 << i)];
      x[r] = lanes_of_two(a, first, b);
      x[r + (1 << i)] = lanes_of_two(a, second, b);
    }
  }
}
#elif defined(ASA_AVX2)
ASA_INLINE void transpose(Vec<float>* x) {
  __m256 pairs[8], fours[8];  // of numbers that belong to one vector, in each half
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(x[r], x[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(x[r], x[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      fours[r + 2 * i] = _mm256_shuffle_ps(pairs[r + i], pairs[r + 2 + i], _MM_SHUFFLE(1, 0, 1, 0));
      fours[r + 2 * i + 1] = _mm256_shuffle_ps(pairs[r + i], pairs[r + 2 + i], _MM_SHUFFLE(3, 2, 3, 2));
    }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    x[r] = _mm256_permute2f128_ps(fours[r], fours[r + 4], 0x20);
    x[r + 4] = _mm256_permute2f128_ps(fours[r], fours[r + 4], 0x31);
  }
}
ASA_INLINE void transpose(Vec<double>* x) {
  const __m256d a = _mm256_unpacklo_pd(x[0], x[1]), b = _mm256_unpackhi_pd(x[0], x[1]);
  const __m256d c = _mm256_unpacklo_pd(x[2], x[3]), d = _mm256_unpackhi_pd(x[2], x[3]);
  x[0] = _mm256_permute2f128_pd(a, c, 0x20), x[1] = _mm256_permute2f128_pd(b, d, 0x20);
  x[2] = _mm256_permute2f128_pd(a, c, 0x31), x[3] = _mm256_permute2f128_pd(b, d, 0x31);
}
#endif

// sums[0..3] = the sums of the lanes of four vectors.
#if defined(ASA_AVX512)
ASA_INLINE void sums_of_four(const Vec<float>* x, float* sums) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 e =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1)));
}
#elif defined(ASA_AVX2)
ASA_INLINE void sums_of_four(const Vec<float>* x, float* sums) {
  const __m256 f = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1)));
}
#elif defined(ASA_NEON)
ASA_INLINE void sums_of_four(const Vec<float>* x, float* sums) {
  const auto y = [&](int i) { return reinterpret_cast<float32x4_t>(x[i]); };
  vst1q_f32(sums, vpaddq_f32(vpaddq_f32(y(0), y(1)), vpaddq_f32(y(2), y(3))));
}
#else
ASA_INLINE void sums_of_four(const Vec<float>* x, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_of<float>(x[i]);
}
#endif
ASA_INLINE void sums_of_four(const Vec<double>* x, double* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_of<double>(x[i]);
}

// e^x = 2^y, y = n + r; relative error below 2.5e-7 (without fused multiply-adds 1e-7 |y| more), and 0 for x = 0. It is inf
// where it overflows (NaN for inf), NaN for NaN, and 0 below 2^-125 or 2^-126.5: smaller numbers would be denormal, on which processors
// take up to a hundred times longer. A polynomial of degree 5, of relative error 9e-8, on the fraction of y or, without
// AVX-512, on its distance to the nearest integer.
constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;  // log2(e) in two parts
#if defined(ASA_AVX512)
ASA_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> y = x * kLog2E, n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEG_INF);
  // The exact product: y, which is at hand, is rounded.
  const Vec<float> r = x * kLog2ERest + _mm512_fmsub_ps(x, splat(kLog2E), n);
  Vec<float> p = r * 0.0018671305f + 0.009017029f;
  p = p * r + 0.055799913f;
  p = p * r + 0.24016444f;
  p = p * r + 0.6931513f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, splat(-125.0f), _CMP_NLT_UQ), p, n);
}
#else
ASA_INLINE Vec<float> exponential(Vec<float> x) {
  x = minimum(splat(88.73f), maximum(splat(-88.2f), x));  // n from -127 to 128
  const Vec<float> shifted = x * kLog2E + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  const Vec<float> n = shifted - 12582912.0f;
  const Ints<float> exponent = (reinterpret_cast<Ints<float>>(shifted) - 0x4B400000 + 127) << 23;  // 0 for -127
  const Vec<float> r = x * kLog2ERest + (x * kLog2E - n);
  Vec<float> p = r * 0.0013264727f + 0.009671513f;
  p = p * r + 0.055507336f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<Vec<float>>(exponent);
}
#endif

// For gradient checks: exact, not fast.
ASA_INLINE Vec<double> exponential(Vec<double> x) {
  for (int r = 0; r < kLanes<double>; ++r) x[r] = __builtin_exp(x[r]);
  return x;
}

constexpr double kInfinity = __builtin_inf();

// log(x) = n log(2) + log(y) for y = x / 2^n between sqrt(1/2) and sqrt(2), by the series of atanh at (y - 1) / (y + 1).
// To 2 units in the last place or 1e-7, whatever is more; 0 for x = 1. Numbers that are 0, negative, denormal or not finite
// are left to the library.
ASA_INLINE Vec<float> logarithm(Vec<float> x) {
  using I = Ints<float>;
  // Less the bits of sqrt(1/2), so that n counts from there; unsigned, for it overflows where x is negative.
  const I shifted = reinterpret_cast<I>(reinterpret_cast<Lanes<float>::U>(x) - 0x3F3504F3u);
  const Vec<float> n = __builtin_convertvector(shifted >> 23, Vec<float>);
  const Vec<float> y = reinterpret_cast<Vec<float>>((shifted & 0x7FFFFF) + 0x3F3504F3);
  const Vec<float> z = (y - 1.0f) / (y + 1.0f), square = z * z;
  Vec<float> p = square * 0.2390005f + 0.28498738f;
  p = p * square + 0.40000976f;
  p = p * square + 0.66666666f;
  Vec<float> log = n * 0.693145752f + (z * (square * p) + (n * 1.42860677e-6f + 2.0f * z));  // log(2) in two parts
  const uint64_t normal = at_least(x, splat(0x1p-126f)) & greater(splat(__builtin_inff()), x);
  if (normal != (uint64_t{1} << kLanes<float>)-1)
    for (int r = 0; r < kLanes<float>; ++r)
      if ((normal >> r & 1) == 0) log[r] = static_cast<float>(__builtin_log(static_cast<double>(x[r])));
  return log;
}
ASA_INLINE Vec<double> logarithm(Vec<double> x) {
  for (int r = 0; r < kLanes<double>; ++r) x[r] = __builtin_log(x[r]);
  return x;
}

template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(1.2e-7) : T(2.3e-16);
