// The intrinsics of AVX-512 that csrc/cpu calls, by GCC's vectors, for machines that have AVX2 only. A test build defines
// ASA_AVX512_EMULATED; then isa_avx512.cpp includes this file inside the namespace of its kernels.

#define ASA_EMULATED static inline __attribute__((always_inline))

typedef int32_t Ints32 __attribute__((vector_size(64), may_alias));
typedef int32_t Unaligned32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words32 __attribute__((vector_size(64), may_alias));
typedef uint64_t Words64 __attribute__((vector_size(64), may_alias));
typedef int16_t Ints16 __attribute__((vector_size(32), may_alias));

// x with the numbers of y where a bit is set.
template <int kLanes, class X, class Y>
ASA_EMULATED X blend(uint32_t bits, X x, const Y& y) {
  for (int r = 0; r < kLanes; ++r)
    if (bits >> r & 1) x[r] = y[r];
  return x;
}
template <class V, class F>
ASA_EMULATED V lanes(const F& f) {
  V x;
  for (int r = 0; r < static_cast<int>(sizeof(x) / sizeof(x[0])); ++r) x[r] = f(r);
  return x;
}
template <int kLanes, class F>
ASA_EMULATED uint16_t bits_where(const F& holds) {
  uint32_t bits = 0;
  for (int r = 0; r < kLanes; ++r) bits |= static_cast<uint32_t>(holds(r)) << r;
  return bits;
}
template <int kLanes, class V>
ASA_EMULATED uint16_t compare(V x, V y, int how) {
  return bits_where<kLanes>([&](int r) {
    switch (how) {
      case _CMP_GT_OQ: return x[r] > y[r];
      case _CMP_GE_OQ: return x[r] >= y[r];
      case _CMP_NLT_UQ: return !(x[r] < y[r]);
      case _CMP_UNORD_Q: return x[r] != x[r] || y[r] != y[r];
    }
    __builtin_trap();
  });
}
template <int kLanes, class V, class F>
ASA_EMULATED auto reduce(V x, const F& f) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int r = 0; r < half; ++r) x[r] = f(x[r], x[r + half]);
  return x[0];
}
template <class V>
ASA_EMULATED V larger_of(V x, V y) {
  return x > y ? x : y;
}
template <class V>
ASA_EMULATED V unpack(V x, V y, int high) {  // every 128 bits by themselves
  constexpr int kHalf = 8 / sizeof(x[0]), kAll = 2 * kHalf;
  return lanes<V>([&](int r) {
    const int from = r / kAll * kAll + high * kHalf + r % kAll / 2;
    return r % 2 ? y[from] : x[from];
  });
}
ASA_EMULATED __m512i compress(uint32_t bits, Ints32 x) {
  Ints32 y = {};
  for (int r = 0, to = 0; r < 16; ++r)
    if (bits >> r & 1) y[to++] = x[r];
  return (__m512i)y;
}
ASA_EMULATED __m512 fused(__m512 x, __m512 y, __m512 minus) {
  return lanes<__m512>([&](int r) { return __builtin_fmaf(x[r], y[r], -minus[r]); });
}
ASA_EMULATED __m512 floor_of(__m512 x) {
  return lanes<__m512>([&](int r) { return __builtin_floorf(x[r]); });
}
ASA_EMULATED __m512 scaled(__m512 x, __m512 y) {
  return lanes<__m512>([&](int r) { return static_cast<float>(x[r] * __builtin_exp2(__builtin_floor(y[r]))); });
}
ASA_EMULATED __m256 half_of(__m512 x, int half) {
  return lanes<__m256>([&](int r) { return x[8 * half + r]; });
}

#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#define _mm512_add_epi32(x, y) ((__m512i)((Words32)(x) + (Words32)(y)))
#define _mm512_add_ps(x, y) ((x) + (y))
#define _mm512_and_si512(x, y) ((x) & (y))
#define _mm512_castpd_ps(x) ((__m512)(x))
#define _mm512_castps512_ps256(x) half_of(x, 0)
#define _mm512_castps_pd(x) ((__m512d)(x))
#define _mm512_castps_si512(x) ((__m512i)(x))
#define _mm512_cmp_pd_mask(x, y, how) compare<8>(x, y, how)
#define _mm512_cmp_ps_mask(x, y, how) compare<16>(x, y, how)
#define _mm512_cmplt_epi32_mask(x, y) compare<16>((Ints32)(y), (Ints32)(x), _CMP_GT_OQ)
#define _mm512_cvtepi32_epi16(x) ((__m256i) __builtin_convertvector((Ints32)(x), Ints16))
#define _mm512_extractf32x8_ps(x, half) half_of(x, half)
#define _mm512_fmsub_ps(x, y, z) fused(x, y, z)
#define _mm512_loadu_si512(p) ((__m512i) * (const Unaligned32*)(p))
#define _mm512_mask_blend_epi32(k, x, y) ((__m512i)blend<16>(k, (Ints32)(x), (Ints32)(y)))
#define _mm512_mask_blend_epi64(k, x, y) blend<8>(k, x, y)
#define _mm512_mask_blend_pd(k, x, y) blend<8>(k, x, y)
#define _mm512_mask_blend_ps(k, x, y) blend<16>(k, x, y)
#define _mm512_mask_slli_epi64(rest, k, x, n) blend<8>(k, rest, _mm512_slli_epi64(x, n))
#define _mm512_mask_storeu_pd(p, k, x) blend<8>(k, p, x)
#define _mm512_mask_storeu_ps(p, k, x) blend<16>(k, p, x)
#define _mm512_maskz_compress_epi32(k, x) compress(k, (Ints32)(x))
#define _mm512_maskz_loadu_pd(k, p) blend<8>(k, __m512d{}, p)
#define _mm512_maskz_loadu_ps(k, p) blend<16>(k, __m512{}, p)
#define _mm512_maskz_scalef_ps(k, x, y) blend<16>(k, __m512{}, scaled(x, y))
#define _mm512_max_pd(x, y) larger_of(x, y)
#define _mm512_max_ps(x, y) larger_of(x, y)
#define _mm512_or_si512(x, y) ((x) | (y))
#define _mm512_permutex2var_pd(x, index, y) __builtin_shuffle(x, y, index)
#define _mm512_permutex2var_ps(x, index, y) __builtin_shuffle(x, y, (Ints32)(index))
#define _mm512_permutexvar_epi64(index, x) __builtin_shuffle(x, index)
#define _mm512_reduce_add_pd(x) reduce<8>(x, [](double a, double b) { return a + b; })
#define _mm512_reduce_add_ps(x) reduce<16>(x, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_pd(x) reduce<8>(x, [](double a, double b) { return a > b ? a : b; })
#define _mm512_reduce_max_ps(x) reduce<16>(x, [](float a, float b) { return a > b ? a : b; })
#define _mm512_roundscale_ps(x, down) floor_of(x)
#define _mm512_set1_epi32(x) ((__m512i)((x) - Ints32{}))
#define _mm512_set1_epi64(x) ((x) - __m512i{})
#define _mm512_setr_epi32(...) ((__m512i)Ints32{__VA_ARGS__})
#define _mm512_setr_epi64(...) (__m512i{__VA_ARGS__})
#define _mm512_slli_epi64(x, n) ((__m512i)((Words64)(x) << (n)))
#define _mm512_srli_epi32(x, n) ((__m512i)((Words32)(x) >> (n)))
#define _mm512_srli_epi64(x, n) ((__m512i)((Words64)(x) >> (n)))
#define _mm512_storeu_si512(p, x) (*(Unaligned32*)(p) = (Ints32)(x))
#define _mm512_unpackhi_pd(x, y) unpack(x, y, 1)
#define _mm512_unpackhi_ps(x, y) unpack(x, y, 1)
#define _mm512_unpacklo_pd(x, y) unpack(x, y, 0)
#define _mm512_unpacklo_ps(x, y) unpack(x, y, 0)
#define _mm512_xor_si512(x, y) ((x) ^ (y))
