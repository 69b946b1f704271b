// AMX: eight tiles, registers of 16 rows of 64 bytes, and products of bf16 matrices that are added to float32. amx.cpp
// and asa/kernels.h include this file inside a namespace of their own.
//
// With ASA_AMX_EMULATED, which a test build defines, the same functions in plain C++. Otherwise they are the
// instructions as inline assembly: no code is compiled for AMX that could be linked in elsewhere.

#if defined(ASA_AMX_EMULATED) || (defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__))
#define ASA_AMX  // this build may use it; isa() says whether the machine has it
#endif

#define ASA_AMX_INLINE static inline __attribute__((always_inline))

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// tile_dot adds the product of a [16][32] and b [32][16] to a tile of float32. The tile of b holds pairs of rows: number
// 2 n + h of its row p is that of row 2 p + h and column n of b.

#if defined(ASA_AMX_EMULATED)

struct EmulatedTiles {
  float tile[8][kTileRows][kTileBytes / sizeof(float)];
  bool configured;
};
static thread_local EmulatedTiles emulated;

// As the processor, which does not run these instructions without a configuration.
ASA_AMX_INLINE float (*configured(int tile)) [kTileBytes / sizeof(float)] {
  if (!emulated.configured) __builtin_trap();
  return emulated.tile[tile];
}

ASA_AMX_INLINE void tiles_configure() {
  if (emulated.configured) __builtin_trap();  // somebody did not release them
  __builtin_memset(&emulated, 0, sizeof(emulated)), emulated.configured = true;
}
ASA_AMX_INLINE void tiles_release() { emulated.configured = false; }

template <int kTile>
ASA_AMX_INLINE void tile_zero() {
  __builtin_memset(configured(kTile), 0, kTileRows * kTileBytes);
}

template <int kTile>
ASA_AMX_INLINE void tile_load(const void* from, int64_t stride) {
  auto* const rows = configured(kTile);
  for (int64_t r = 0; r < kTileRows; ++r)
    __builtin_memcpy(rows[r], static_cast<const char*>(from) + r * stride, kTileBytes);
}

template <int kTile>
ASA_AMX_INLINE void tile_store(void* to, int64_t stride) {
  const auto* const rows = configured(kTile);
  for (int64_t r = 0; r < kTileRows; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, rows[r], kTileBytes);
}

// The number of a bf16 in the high half of 32 bits; numbers below the smallest normal one are 0, as in its products.
ASA_AMX_INLINE float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.0f : x; }
ASA_AMX_INLINE float high_bfloat16(uint32_t bits) {
  bits &= 0xFFFF0000u;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

// Terms of even and odd numbers are summed apart, in order, by fused multiply-adds; then both sums, then they are added
// to what is there. Every result is rounded to the nearest and flushed.
template <int kTo, int kA, int kB>
ASA_AMX_INLINE void tile_dot() {
  constexpr int64_t kColumns = kTileBytes / sizeof(float);
  const auto* const a = configured(kA);
  const auto* const b = configured(kB);
  auto* const to = configured(kTo);
  float right[2][kTileRows][kColumns];
  for (int64_t k = 0; k < kTileRows; ++k)
    for (int64_t n = 0; n < kColumns; ++n) {
      uint32_t pair;
      __builtin_memcpy(&pair, &b[k][n], sizeof(pair));
      right[0][k][n] = high_bfloat16(pair << 16), right[1][k][n] = high_bfloat16(pair);
    }
  for (int64_t m = 0; m < kTileRows; ++m) {
    float sum[2][kColumns] = {};
    for (int64_t k = 0; k < kTileRows; ++k) {
      uint32_t pair;
      __builtin_memcpy(&pair, &a[m][k], sizeof(pair));
      for (int64_t half = 0; half < 2; ++half) {
        const float x = high_bfloat16(half ? pair : pair << 16);
        for (int64_t n = 0; n < kColumns; ++n)
          sum[half][n] = flushed(__builtin_fmaf(x, right[half][k][n], sum[half][n]));
      }
    }
    for (int64_t n = 0; n < kColumns; ++n) to[m][n] = flushed(flushed(to[m][n]) + flushed(sum[0][n] + sum[1][n]));
  }
}

#if defined(ASA_AVX512)
// Numbers to bf16, to the nearest, ties to even; those below the smallest normal number are 0.
ASA_AMX_INLINE __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), sign = _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MIN));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __mmask16 denormal = _mm512_cmplt_epi32_mask(_mm512_xor_si512(bits, sign), _mm512_set1_epi32(1 << 23));
  const __m512i all = _mm512_mask_blend_epi32(denormal, _mm512_mask_blend_epi32(nan, near, quiet), sign);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
}
#endif

#else

// Every tile is of 16 rows of 64 bytes. Each thread that uses tiles configures them, and releases them at the end: the
// system would save them at every switch of threads.
ASA_AMX_INLINE void tiles_configure() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                          kTileBytes, kTileBytes, kTileBytes, kTileBytes};
    uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
  } configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
}
ASA_AMX_INLINE void tiles_release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
ASA_AMX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
ASA_AMX_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
ASA_AMX_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTo, int kA, int kB>
ASA_AMX_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}

#if defined(ASA_AVX512)
ASA_AMX_INLINE __m256i to_bfloat16(__m512 x) {
  __m256i y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
}
#endif

#endif
