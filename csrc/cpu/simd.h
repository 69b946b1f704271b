// Vectors of eight numbers, one per row of a strip, in whatever registers the target has (GCC vector extensions).
// Included by asa_kernels.h inside a namespace per instruction set.

// Everything here is inlined, so how vectors wider than the registers would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(32), may_alias));
  typedef int32_t I __attribute__((vector_size(32), may_alias));
  typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(64), may_alias));
  typedef int64_t I __attribute__((vector_size(64), may_alias));
  typedef double Unaligned __attribute__((vector_size(64), aligned(8), may_alias));
};

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using Ints = typename Lanes<T>::I;

#define ASA_INLINE static inline __attribute__((always_inline))

template <class T>
ASA_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
ASA_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = x;
}

template <class T>
ASA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// a where the condition holds, else b; bitwise, so that a NaN in the one not chosen stays out.
template <class T>
ASA_INLINE Vec<T> select(Ints<T> condition, Vec<T> a, Vec<T> b) {
  return condition ? a : b;
}

// One bit per lane of a condition, lane 0 lowest.
#if defined(ASA_AVX512)
ASA_INLINE unsigned bits_of(Ints<float> condition) { return _mm256_movepi32_mask(reinterpret_cast<__m256i>(condition)); }
ASA_INLINE unsigned bits_of(Ints<double> condition) { return _mm512_movepi64_mask(reinterpret_cast<__m512i>(condition)); }
#else
template <class I>
ASA_INLINE unsigned gather_bits(I condition) {
  unsigned bits = 0;
  for (int r = 0; r < 8; ++r) bits |= static_cast<unsigned>(condition[r] & 1) << r;
  return bits;
}
#if defined(ASA_AVX2)
ASA_INLINE unsigned bits_of(Ints<float> condition) { return _mm256_movemask_ps(reinterpret_cast<__m256>(condition)); }
#else
ASA_INLINE unsigned bits_of(Ints<float> condition) { return gather_bits(condition); }
#endif
ASA_INLINE unsigned bits_of(Ints<double> condition) { return gather_bits(condition); }
#endif

// The condition whose bits are given.
template <class T>
ASA_INLINE Ints<T> lanes_of(unsigned bits) {
  const Ints<T> bit = {1, 2, 4, 8, 16, 32, 64, 128};
  using I = decltype(bit[0] + 0);
  return ((static_cast<I>(bits) - Ints<T>{}) & bit) != 0;
}

template <class T>
ASA_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select<T>(a > b, a, b);
}

// e^x for x <= 0 (NaN stays NaN), relative error below 2e-7: 2^n from the exponent bits, e^r on |r| <= log(2) / 2 by a
// polynomial of degree 6 fitted to relative error 2e-9. Below -87 the result stays at e^-87, not far from 0.
ASA_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  using I = Ints<float>;
  x = select<float>(x < -87.0f, splat(-87.0f), x);
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // log(2) in two parts
  V p = r * 0.00138294091f + 0.00837477949f;
  p = p * r + 0.0416683592f;
  p = p * r + 0.166664213f;
  p = p * r + 0.499999911f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I exponent = (reinterpret_cast<I>(shifted) - 0x4B400000 + 127) << 23;
  return p * reinterpret_cast<V>(exponent);
}

// For gradient checks: exact, not fast.
ASA_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int r = 0; r < 8; ++r) x[r] = __builtin_exp(x[r]);
  return x;
}
