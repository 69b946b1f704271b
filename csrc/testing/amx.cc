// A program that tests csrc/cpu/amx.h: its instructions, where the machine has none by traps, against its emulation, bit
// for bit, and both against float64. usage: amx TEST; exit status 77: this machine cannot run it.

#if defined(__AVX512F__) && defined(__AVX512BW__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own header
#include <immintrin.h>
#define ASA_AVX512
#endif

#include "amx_traps.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace instructions {
#include "../cpu/amx.h"
}
#define ASA_AMX_EMULATED
namespace emulated {
#include "../cpu/amx.h"
}

namespace {

constexpr int kSide = 16, kTerms = 32;

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                        \
    }                                                                 \
  } while (false)

bool machine_has(int leaf, int bit) {  // of cpuid 7: leaf 0 in edx, leaf 1 in eax
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, leaf, &eax, &ebx, &ecx, &edx)) return false;
  return (leaf == 0 ? edx : eax) >> bit & 1;
}

void prepare() {
  const bool real = machine_has(0, 22) && machine_has(0, 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  printf("%s\n", real ? "on AMX" : "by traps");
  if (!real) amx_traps::install();
}

uint16_t bits_of(float x) {  // of a number that is a bf16
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

struct Numbers {
  uint64_t seed = 1;
  uint32_t next() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(seed >> 33);
  }
  float bfloat16() {  // of either sign, from 2^-4 to 2^4
    const uint32_t bits = (next() & 1) << 31 | (123 + next() % 8) << 23 | (next() & 0x7F) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};

struct Product {
  float a[kSide][kTerms], b[kTerms][kSide], c[kSide][kSide];
};

// c += a b, in tiles 2 and 5 of a wider matrix, so that strides and numbers of tiles show.
#define MULTIPLY(back_end)                                                              \
  void multiply_##back_end(const Product& x, float (&result)[kSide][kSide]) {           \
    using namespace back_end;                                                           \
    uint16_t a[kSide][kTerms + 8] = {}, b[kSide][2 * kSide] = {};                       \
    float c[kSide][kSide + 3] = {};                                                     \
    for (int m = 0; m < kSide; ++m)                                                     \
      for (int k = 0; k < kTerms; ++k) a[m][k] = bits_of(x.a[m][k]);                    \
    for (int k = 0; k < kTerms; ++k)                                                    \
      for (int n = 0; n < kSide; ++n) b[k / 2][2 * n + k % 2] = bits_of(x.b[k][n]);     \
    for (int m = 0; m < kSide; ++m) memcpy(c[m], x.c[m], sizeof(x.c[m])), c[m][16] = 7; \
    tiles_configure();                                                                  \
    tile_zero<5>();                                                                     \
    tile_load<5>(c, sizeof(c[0]));                                                      \
    tile_load<2>(a, sizeof(a[0]));                                                      \
    tile_load<7>(b, sizeof(b[0]));                                                      \
    tile_dot<5, 2, 7>();                                                                \
    tile_store<5>(c, sizeof(c[0]));                                                     \
    tiles_release();                                                                    \
    for (int m = 0; m < kSide; ++m) memcpy(result[m], c[m], sizeof(result[m]));         \
    for (int m = 0; m < kSide; ++m) CHECK(c[m][16] == 7);                               \
  }
MULTIPLY(instructions)
MULTIPLY(emulated)

Product random_product(Numbers& numbers) {
  Product x;
  for (auto& row : x.a)
    for (float& y : row) y = numbers.bfloat16();
  for (auto& row : x.b)
    for (float& y : row) y = numbers.bfloat16();
  for (auto& row : x.c)
    for (float& y : row) y = numbers.bfloat16();
  return x;
}

void both(const Product& x, float (&result)[kSide][kSide]) {
  float other[kSide][kSide];
  multiply_instructions(x, result);
  multiply_emulated(x, other);
  for (int m = 0; m < kSide; ++m)
    for (int n = 0; n < kSide; ++n) {
      uint32_t ours, theirs;
      memcpy(&ours, &result[m][n], 4), memcpy(&theirs, &other[m][n], 4);
      if (result[m][n] == result[m][n]) CHECK(ours == theirs);
      CHECK((result[m][n] == result[m][n]) == (other[m][n] == other[m][n]));
    }
}

void test_product() {
  prepare();
  Numbers numbers;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const Product x = random_product(numbers);
    float result[kSide][kSide];
    both(x, result);
    for (int m = 0; m < kSide; ++m)
      for (int n = 0; n < kSide; ++n) {
        double exact = x.c[m][n], size = std::fabs(exact);
        for (int k = 0; k < kTerms; ++k)
          exact += double(x.a[m][k]) * x.b[k][n], size += std::fabs(double(x.a[m][k]) * x.b[k][n]);
        CHECK(std::fabs(result[m][n] - exact) <= 18 * 0x1p-24 * size);  // so many roundings of partial sums
      }
  }
}

// Numbers below 2^-126 count as 0: of both factors, of partial sums, of what is added to, and of the result.
void test_denormals() {
  prepare();
  const auto of = [](float a, float b, float c) {
    Product x = {};
    x.a[3][4] = a, x.b[4][5] = b, x.c[3][5] = c;
    float result[kSide][kSide];
    both(x, result);
    return result[3][5];
  };
  CHECK(of(2, 3, 1) == 7);
  CHECK(of(0x1p-126f, 1, 0) == 0x1p-126f);
  CHECK(of(0x1p-127f, 0x1p10f, 0) == 0 && of(0x1p10f, 0x1p-127f, 0) == 0);
  CHECK(of(0x1p-127f, 0x1p10f, 3) == 3);
  CHECK(of(0x1p-70f, 0x1p-60f, 0) == 0);
  CHECK(of(0, 0, 0x1p-127f) == 0);
  Product two = {};  // products of 2^-127 each, in one chain
  two.a[3][4] = two.a[3][6] = 0x1p-64f, two.b[4][5] = two.b[6][5] = 0x1p-63f;
  float sums[kSide][kSide];
  both(two, sums);
  CHECK(sums[3][5] == 0);
  CHECK(of(0x1p-126f, 1, -0x1.8p-126f) == 0);
  CHECK(of(INFINITY, 1, 0) == INFINITY && of(-INFINITY, 1, 5) == -INFINITY && std::isnan(of(INFINITY, 0x1p-127f, 0)));
  CHECK(std::isnan(of(NAN, 1, 0)) && std::isnan(of(1, NAN, 0)) && std::isnan(of(0, 0, NAN)));
}

// Even and odd terms are summed apart, each by a fused multiply-add, then both, then what is there.
void test_order() {
  prepare();
  const auto of = [](std::vector<float> terms, float c) {
    Product x = {};
    for (size_t k = 0; k < terms.size(); ++k) x.a[1][k] = terms[k], x.b[k][2] = 1;
    x.c[1][2] = c;
    float result[kSide][kSide];
    both(x, result);
    return result[1][2];
  };
  CHECK(of({0x1p24f, 1, 0, 1}, 0) == 0x1p24f + 2);  // ((2^24 + 1) + 1) would lose both
  CHECK(of({0x1p24f, 0, 1, 0, 1}, 0) == 0x1p24f);  // as here, in one chain
  CHECK(of({1, 1}, 0x1p24f) == 0x1p24f + 2);  // the sum of terms comes first
  Product x = {};
  x.a[0][0] = -256, x.b[0][0] = 256, x.a[0][2] = 1 + 0x1p-7f, x.b[2][0] = 1 + 0x1p-7f;
  float result[kSide][kSide];
  both(x, result);
  CHECK(result[0][0] == static_cast<float>(-65536 + double(1 + 0x1p-7f) * (1 + 0x1p-7f)));
}

// to_bfloat16: the instruction, which more machines have, and the emulation.
void test_rounding() {
#if defined(ASA_AVX512)
  if (!machine_has(1, 5)) exit(77);
  Numbers numbers;
  for (uint32_t high = 0; high < 0x10000; ++high) {
    uint32_t bits[16] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    for (int i = 6; i < 16; ++i) bits[i] = numbers.next() & 0xFFFF;
    for (uint32_t& x : bits) x |= high << 16;
    const __m512 x = _mm512_loadu_ps(bits);
    uint16_t ours[16], theirs[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ours), instructions::to_bfloat16(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(theirs), emulated::to_bfloat16(x));
    CHECK(memcmp(ours, theirs, sizeof(ours)) == 0);
  }
  uint16_t some[16];
  const float ties[] = {1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1.01p-8f, 0x1p-127f, -0x1p-127f, INFINITY};
  const __m512 x = _mm512_maskz_loadu_ps(0x3F, ties);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(some), emulated::to_bfloat16(x));
  const uint16_t expected[] = {0x3F80, 0x3F82, 0x3F81, 0, 0x8000, 0x7F80};
  CHECK(memcmp(some, expected, sizeof(expected)) == 0);
#else
  exit(77);
#endif
}

}  // namespace

int main(int count, char** arguments) {
  const std::string test = count == 2 ? arguments[1] : "";
  if (test == "product") return test_product(), 0;
  if (test == "denormals") return test_denormals(), 0;
  if (test == "order") return test_order(), 0;
  if (test == "rounding") return test_rounding(), 0;
  fprintf(stderr, "usage: amx product|denormals|order|rounding\n");
  return 2;
}
