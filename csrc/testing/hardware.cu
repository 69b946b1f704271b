// Every wrapper of cuda/hopper/device.h, against numbers found on the CPU: a program of its own.
//
// On a GPU of compute capability 9.0:
//   nvcc -std=c++17 -O3 --fmad=false -arch=sm_90a csrc/testing/hardware.cu -o hardware && ./hardware
// On the CPU it runs in the emulation (tests/asa/test_hardware.py). There `./hardware faults` runs a pipeline with one
// mistake at a time and prints what the emulation says to each. Numbers are small and whole, so results are exact.

#include "../cuda/hopper/device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace asa_ops::cuda {
namespace {

// Memory that the host and kernels share.
template <class X>
class Memory {
 public:
  explicit Memory(size_t count, X value = X()) : count_(count) {
#if defined(__CUDACC__)
    check_cuda(cudaMallocManaged(&at_, count * sizeof(X)), "cudaMallocManaged");
#else
    at_ = static_cast<X*>(std::aligned_alloc(64, (count * sizeof(X) + 63) / 64 * 64));
#endif
    std::fill(at_, at_ + count, value);
  }
  ~Memory() {
#if defined(__CUDACC__)
    cudaFree(at_);
#else
    std::free(at_);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  X* data() const { return at_; }
  X& operator[](size_t i) const { return at_[i]; }
  size_t size() const { return count_; }

 private:
  X* at_ = nullptr;
  size_t count_;
};

template <class... Params, class... Args>
void run(const char* name, void (*kernel)(Params...), int programs, int threads, size_t shared, Args... args) {
  launch(name, kernel, programs, threads, shared, nullptr, args...);
#if defined(__CUDACC__)
  check_cuda(cudaDeviceSynchronize(), name);
#endif
}

int failures = 0;

void report(bool ok, const std::string& what) {
  std::printf("%-64s %s\n", what.c_str(), ok ? "ok" : "WRONG");
  failures += !ok;
}

template <class T>
const char* name_of();
template <>
const char* name_of<Half>() {
  return "float16";
}
template <>
const char* name_of<BFloat16>() {
  return "bfloat16";
}
template <>
const char* name_of<TF32>() {
  return "tf32";
}

// Whole numbers from -8 to 8, and their bits.
int number_at(uint32_t i) { return int((i * 2654435761u ^ 0x5bd1e995u) * 2246822519u >> 16) % 17 - 8; }

template <class T>
uint32_t bits_of(int x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::is_same_v<T, TF32>) return bits;
  if (std::is_same_v<T, BFloat16>) return bits >> 16;
  return x == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023);
}

template <class T>
constexpr int kSize = int(sizeof(T));
template <class T>
constexpr int kColumns = 128 / kSize<T>;  // of a panel

// A matrix of rows x columns as panels.
template <class T, class At>
void arrange(char* to, int rows, int columns, At at) {
  for (int column = 0; column < columns; ++column)
    for (int row = 0; row < rows; ++row) {
      const int byte = column % kColumns<T> * kSize<T>;
      const uint32_t bits = bits_of<T>(at(row, column));
      std::memcpy(to + (column / kColumns<T> * rows + row) * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16, &bits,
                  kSize<T>);
    }
}

struct Place {  // of a thread in a fragment
  int row, column;
  __device__ Place() : row(threadIdx.x % kGroup / 32 * 16 + threadIdx.x % 32 / 4), column(threadIdx.x % 4 * 2) {}
  __device__ int at(int i, int width) const {  // number i in a matrix of so many columns
    return (row + i / 2 % 2 * 8) * width + i / 4 * 8 + column + i % 2;
  }
};

// Copies bytes to the start of aligned shared memory and waits for them.
__device__ __forceinline__ char* fetched(const char* from, uint32_t bytes) {
  char* const memory = aligned_shared_memory();
  Barrier* const there = reinterpret_cast<Barrier*>(memory + bytes);
  if (threadIdx.x == 0) {
    barrier_init(there, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(there, bytes);
    copy_bytes(memory, from, bytes / 2, there);
    copy_bytes(memory + bytes / 2, from + bytes / 2, bytes - bytes / 2, there);
  }
  barrier_wait(there, 0);
  return memory;
}

constexpr size_t kMore = 1024 + sizeof(Barrier);  // of shared memory, for `fetched`

// Copies of one barrier.

__global__ void __launch_bounds__(kGroup) copy_kernel(const char* from, char* to, int bytes) {
#if ASA_OPS_SM90A
  const char* const memory = fetched(from, bytes);
  for (int i = threadIdx.x; i < bytes; i += kGroup) to[i] = memory[i];
  if (threadIdx.x == 0) to[bytes] = char(shared_address(memory) % 1024 == 0);
#endif
}

void test_copies() {
  for (const int bytes : {32, 4096, 100 * 1024}) {
    const Memory<char> from(bytes), to(bytes + 1);
    for (int i = 0; i < bytes; ++i) from[i] = char(number_at(i));
    run("copy", copy_kernel, 1, kGroup, bytes + kMore, from.data(), to.data(), bytes);
    report(to[bytes] && std::equal(from.data(), from.data() + bytes, to.data()),
           "two copies of " + std::to_string(bytes / 2) + " bytes, one barrier");
  }
}

// Products: four of one panel of the summed index, or of 64 rows.

enum class Left { rows, across, registers };

template <class T, int N, Left LEFT, int TB>
__global__ void __launch_bounds__(kGroup)
    product_kernel(const char* operands, const uint32_t* left, float* out, bool first) {
#if ASA_OPS_SM90A
  constexpr int kDepth = kColumns<T>, kLeft = 64 * 128;
  const uint32_t a = shared_address(fetched(operands, kLeft + N * 128)), b = a + kLeft;
  const Place place;
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = float(place.at(i, N) % 7);
  uint32_t x[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = left[(i / 4 * kGroup + threadIdx.x) * 4 + i % 4];
  products_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t right = TB ? advanced(mn_major(b, kDepth * 128), k * 2048) : advanced(k_major(b), k * 32);
    if constexpr (LEFT == Left::registers) {
      Product<T, N>::template registers<TB>(d, x[k][0], x[k][1], x[k][2], x[k][3], right, first && k == 0);
    } else {
      constexpr int TA = LEFT == Left::across;
      Product<T, N>::template shared<TA, TB>(
          d, TA ? advanced(mn_major(a, kLeft), k * 2048) : advanced(k_major(a), k * 32), right, first && k == 0);
    }
  }
  products_commit();
  products_wait<0>();
  settled(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[place.at(i, N)] = d[i];
#endif
}

template <class T, int N, Left LEFT, int TB>
void test_product() {
  constexpr int kDepth = kColumns<T>;
  const auto a = [](int row, int k) { return number_at(row * 64 + k); };
  const auto b = [](int column, int k) { return number_at(column * 64 + k + 77777); };
  const Memory<char> operands((64 + N) * 128);
  if (LEFT == Left::across)
    arrange<T>(operands.data(), kDepth, 64, [&](int k, int row) { return a(row, k); });
  else
    arrange<T>(operands.data(), 64, kDepth, a);
  if (TB)
    arrange<T>(operands.data() + 64 * 128, kDepth, N, [&](int k, int column) { return b(column, k); });
  else
    arrange<T>(operands.data() + 64 * 128, N, kDepth, b);
  const Memory<uint32_t> left(4 * kGroup * 4);  // as the PTX manual lays out the registers
  for (int k = 0; k < 4; ++k)
    for (int thread = 0; thread < kGroup; ++thread)
      for (int r = 0; r < 4; ++r) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, t = thread % 4;
        left[(k * kGroup + thread) * 4 + r] = kSize<T> == 4
                                                  ? bits_of<T>(a(row, 8 * k + t + r / 2 * 4))
                                                  : bits_of<T>(a(row, 16 * k + 2 * t + r / 2 * 8)) |
                                                        bits_of<T>(a(row, 16 * k + 2 * t + 1 + r / 2 * 8)) << 16;
      }
  bool ok = true;
  for (const bool first : {true, false}) {
    const Memory<float> out(64 * N, NAN);
    run("product", product_kernel<T, N, LEFT, TB>, 1, kGroup, (64 + N) * 128 + kMore, operands.data(), left.data(),
        out.data(), first);
    for (int row = 0; row < 64; ++row)
      for (int column = 0; column < N; ++column) {
        int sum = first ? 0 : (row * N + column) % 7;
        for (int k = 0; k < kDepth; ++k) sum += a(row, k) * b(column, k);
        ok &= out[row * N + column] == float(sum);
      }
  }
  report(ok, std::string(name_of<T>()) + " m64n" + std::to_string(N) + ", left " +
                 (LEFT == Left::registers ? "in registers"
                  : LEFT == Left::across  ? "MN-major"
                                          : "K-major") +
                 ", right " + (TB ? "MN-major" : "K-major"));
}

template <class T, int N>
void test_products() {
  test_product<T, N, Left::rows, 0>();
  test_product<T, N, Left::registers, 0>();
  if constexpr (kSize<T> == 2) {
    test_product<T, N, Left::rows, 1>();
    test_product<T, N, Left::registers, 1>();
    test_product<T, N, Left::across, 0>();
    test_product<T, N, Left::across, 1>();
  }
}

// Chains: s = a b^T over two panels, weights of s, d = s x.

template <class T, int N>
__global__ void __launch_bounds__(kGroup) chain_kernel(const char* operands, float* out) {
#if ASA_OPS_SM90A
  constexpr int kRight = 64 * 128, kValues = 2 * kRight * 2;
  const uint32_t a = shared_address(fetched(operands, kValues + 64 * N * kSize<T>));
  float s[32], d[N / 2];
  uint32_t weights[16 * kSize<T> / 2];
  products_fence();
  multiply_rows<T, 64, 2 * kColumns<T>>(s, a, kRight, a + 2 * kRight, kRight, true);
  products_commit();
  products_wait<0>();
  settled(s);
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] = float(int(s[i]) % 8);
  pack_weights<T, 64>(weights, s);
  products_fence();
  multiply_weights<T, N, 64>(d, weights, a + kValues, kSize<T> == 2 ? 64 * 128 : N * 128, true);
  multiply_weights<T, N, 64>(d, weights, a + kValues, kSize<T> == 2 ? 64 * 128 : N * 128, false);
  products_commit();
  products_wait<0>();
  settled(d);
  const Place place;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[place.at(i, N)] = d[i];
#endif
}

template <class T, int N>
void test_chain() {
  constexpr int kDepth = 2 * kColumns<T>, kPanel = 64 * 128;
  const auto a = [](int row, int k) { return number_at(row * 128 + k) % 3; };
  const auto b = [](int column, int k) { return number_at(column * 128 + k + 33333) % 3; };
  const auto x = [](int row, int column) { return number_at(row * N + column + 55555); };
  const Memory<char> operands(4 * kPanel + 64 * N * kSize<T>);
  arrange<T>(operands.data(), 64, kDepth, a);
  arrange<T>(operands.data() + 2 * kPanel, 64, kDepth, b);
  if constexpr (kSize<T> == 2)
    arrange<T>(operands.data() + 4 * kPanel, 64, N, x);
  else
    arrange<T>(operands.data() + 4 * kPanel, N, 64,
               [&](int column, int k) { return x(k / 8 * 8 + k % 4 * 2 + k / 4 % 2, column); });
  const Memory<float> out(64 * N, NAN);
  run("chain", chain_kernel<T, N>, 1, kGroup, operands.size() + kMore, operands.data(), out.data());
  bool ok = true;
  std::vector<int> s(64 * 64);
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < 64; ++column) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a(row, k) * b(column, k);
      s[row * 64 + column] = sum % 8;
    }
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < N; ++column) {
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += 2 * s[row * 64 + k] * x(k, column);
      ok &= out[row * N + column] == float(sum);
    }
  report(ok, std::string(name_of<T>()) + ": rows, weights, " + std::to_string(N) + " columns of values");
}

// A ring of one slot: barriers in 100 phases, registers handed over. Every thread sums what it sees in its row.

constexpr int kTurns = 100;

template <bool SYNCS>
__global__ void __launch_bounds__(3 * kGroup, 1) ring_kernel(const char* tiles, float* out) {
#if ASA_OPS_SM90A
  constexpr int kTile = 64 * 128;
  char* const memory = aligned_shared_memory();
  Barrier *const full = reinterpret_cast<Barrier*>(memory + kTile), *const empty = full + 1;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 2 * kGroup / 32);
    barrier_init_done();
  }
  __syncthreads();
  if (uniform(threadIdx.x / kGroup) == 2) {
    fewer_registers<24>();
    if (threadIdx.x == 2 * kGroup)
      for (int i = 0; i < kTurns; ++i) {
        barrier_wait(empty, (i & 1) ^ 1);
        barrier_expect(full, kTile);
        copy_bytes(memory, tiles + i * kTile, kTile, full);
      }
  } else {
    more_registers<240>();
    const int row = threadIdx.x % 64;
    float sum = 0;
    for (int i = 0; i < kTurns; ++i) {
      barrier_wait(full, i & 1);
      for (int group = 0; group < 8; ++group)
        sum += to_float(*reinterpret_cast<const BFloat16*>(memory + row * 128 + ((group ^ (row & 7)) << 4)));
      if (SYNCS) __syncwarp();  // other lanes may still have to see that the slot is full
      if (threadIdx.x % 32 == 0) barrier_arrive(empty);
    }
    out[threadIdx.x] = sum;
  }
#endif
}

template <bool SYNCS>
bool ring_is_right() {
  const auto at = [](int i, int row, int column) { return number_at((i * 64 + row) * 64 + column); };
  const Memory<char> tiles(kTurns * 64 * 128);
  for (int i = 0; i < kTurns; ++i)
    arrange<BFloat16>(tiles.data() + i * 64 * 128, 64, 64, [&](int row, int column) { return at(i, row, column); });
  const Memory<float> out(2 * kGroup, NAN);
  run("ring", ring_kernel<SYNCS>, 1, 3 * kGroup, 64 * 128 + 2 * sizeof(Barrier) + 1024, tiles.data(), out.data());
  bool ok = true;
  for (int thread = 0; thread < 2 * kGroup; ++thread) {
    int sum = 0;
    for (int i = 0; i < kTurns; ++i)
      for (int group = 0; group < 8; ++group) sum += at(i, thread % 64, group * 8);
    ok &= out[thread] == float(sum);
  }
  return ok;
}

// A pipeline as kernels have it: one thread copies, two warpgroups multiply their 64 rows by tiles that pass through a
// ring, and add up one tile while the products of the next run. MISTAKE: what is wrong with it.

enum Mistake {
  kNone,
  kNoWaitForCopy,
  kWrongParityOfFull,
  kWrongParityOfEmpty,
  kNeverFreed,
  kFreedEarly,
  kNoFence,
  kNoCommit,
  kNoWaitForProducts,
  kWaitForTooFew,
  kWrittenUnderWay,
  kNoHandOver,
  kHandOverTooSmall,
  kEveryLaneArrives,
  kOneArrivalTooMany,
  kOneArrivalTooFew,
  kNotAnnounced,
  kNotSynchronized,
  kTooFewBytesExpected,
  kTooManyBytesExpected,
  kOneWarpLess,
  kOneLaneLess,
  kMemoryTooSmall,
  kNotAligned,
  kWrongPanel,
  kAnotherCopy,
  kBarrierOverwritten,
  kBarrierMadeTwice,
  kNotUniform,
  kNoSyncWarp,  // in the ring
  kMistakes,
};

constexpr int kTiles = 10, kSlots = 2, kDepthBytes = 2 * 128, kQueryBytes = 128 * kDepthBytes,
              kTileBytes = 64 * kDepthBytes;
constexpr size_t kPipelineBytes = kQueryBytes + kSlots * kTileBytes + (2 * kSlots + 1) * sizeof(Barrier) + 1024;

template <int MISTAKE>
__global__ void __launch_bounds__(3 * kGroup, 1)
    pipeline_kernel(const char* queries, const char* tiles, int count, float* out) {
#if ASA_OPS_SM90A
  char* const memory = MISTAKE == kNotAligned ? shared_memory() : aligned_shared_memory();
  char* const slots = memory + kQueryBytes;
  Barrier* const full = reinterpret_cast<Barrier*>(slots + kSlots * kTileBytes);
  Barrier *const empty = full + kSlots, *const query_full = empty + kSlots;
  const int group = uniform(threadIdx.x / (MISTAKE == kNotUniform ? 16 : kGroup)), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 8 + (MISTAKE == kOneArrivalTooFew));
    }
    barrier_init(query_full, 1);
    if (MISTAKE == kBarrierMadeTwice) barrier_init(full, 1);
    if (MISTAKE != kNotAnnounced) barrier_init_done();
  }
  if (MISTAKE != kNotSynchronized) __syncthreads();
  if (group == 2) {
    if (MISTAKE != kNoHandOver) fewer_registers<MISTAKE == kHandOverTooSmall ? 32 : 24>();
    if (threadIdx.x == 2 * kGroup) {
      barrier_expect(query_full, kQueryBytes);
      copy_bytes(memory, queries, kQueryBytes, query_full);
      for (int tile = 0; tile < count; ++tile) {
        const int slot = tile % kSlots, turn = tile / kSlots;
        barrier_wait(empty + slot, (turn & 1) ^ (MISTAKE != kWrongParityOfEmpty));
        barrier_expect(full + slot,
                       kTileBytes - 16 * (MISTAKE == kTooFewBytesExpected) + 16 * (MISTAKE == kTooManyBytesExpected));
        copy_bytes(slots + slot * kTileBytes, tiles + tile * kTileBytes, kTileBytes, full + slot);
      }
      if (MISTAKE == kAnotherCopy) {
        barrier_wait(empty + 0, (kTiles / kSlots & 1) ^ 1);
        barrier_expect(full + 0, 16);
        copy_bytes(slots, tiles, 16, full + 0);
      }
      if (MISTAKE == kBarrierOverwritten) {
        barrier_wait(empty + 1, (kTiles / kSlots & 1) ^ 1);
        *reinterpret_cast<float*>(query_full) = 1;
        barrier_wait(query_full, 0);
      }
    }
  } else {
    more_registers<240>();
    const bool multiplies =
        !(MISTAKE == kOneWarpLess && threadIdx.x / 32 == 3) && !(MISTAKE == kOneLaneLess && threadIdx.x == 37);
    const uint32_t query = shared_address(memory) + group * 64 * 128;
    float total[32], even[32], odd[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) total[i] = 0;
    const auto start = [&](float (&s)[32], int tile) {
      const int slot = tile % kSlots, turn = tile / kSlots;
      if (MISTAKE != kNoWaitForCopy) barrier_wait(full + slot, (turn & 1) ^ (MISTAKE == kWrongParityOfFull));
      if (MISTAKE != kNoFence) products_fence();
      if (MISTAKE == kNone || multiplies)
        multiply_rows<BFloat16, 64, kDepthBytes / 2>(s, query, 128 * 128, shared_address(slots + slot * kTileBytes),
                                                     MISTAKE == kWrongPanel ? 128 * 128 : 64 * 128, true);
      if (MISTAKE != kNoCommit) products_commit();
    };
    const auto free = [&](int tile) {
      if (MISTAKE == kNeverFreed) return;
      __syncwarp();
      if (lane == 0 || MISTAKE == kEveryLaneArrives) barrier_arrive(empty + tile % kSlots);
      if (MISTAKE == kOneArrivalTooMany && threadIdx.x == 0) barrier_arrive(empty + tile % kSlots);
    };
    const auto finish = [&](float (&s)[32], int tile, auto pending) {  // batches under way after that of s
      if (MISTAKE == kFreedEarly) free(tile);
      if (MISTAKE == kWrittenUnderWay) s[0] = 0;
      if (MISTAKE != kNoWaitForProducts) products_wait<decltype(pending)::value + (MISTAKE == kWaitForTooFew)>();
      if (MISTAKE != kNoWaitForProducts) settled(s);
      if (MISTAKE != kFreedEarly) free(tile);
#pragma unroll
      for (int i = 0; i < 32; ++i) total[i] += float(1 + tile % 3) * s[i];
    };
    const std::integral_constant<int, 0> none;
    const std::integral_constant<int, 1> one;
    barrier_wait(query_full, 0);
    start(even, 0);
    int tile = 0;
    for (; tile + 2 < count; tile += 2) {
      start(odd, tile + 1);
      finish(even, tile, one);
      start(even, tile + 2);
      finish(odd, tile + 1, one);
    }
    if (tile + 1 < count) {  // without this branch the assembler serialises all products
      start(odd, tile + 1);
      finish(even, tile, one);
      finish(odd, tile + 1, none);
    } else {
      finish(even, tile, none);
    }
    const Place place;
#pragma unroll
    for (int i = 0; i < 32; ++i) out[group * 64 * 64 + place.at(i, 64)] = total[i];
  }
#endif
}

// Returns whether the numbers are right.
template <int MISTAKE>
bool pipeline_is_right() {
  constexpr int kDepth = kDepthBytes / 2;
  const auto query = [](int row, int k) { return number_at(row * kDepth + k); };
  const auto key = [](int tile, int row, int k) { return number_at((tile * 64 + row) * kDepth + k + 99999); };
  const Memory<char> queries(kQueryBytes), tiles(kTiles * kTileBytes);
  arrange<BFloat16>(queries.data(), 128, kDepth, query);
  for (int tile = 0; tile < kTiles; ++tile)
    arrange<BFloat16>(tiles.data() + tile * kTileBytes, 64, kDepth, [&](int row, int k) { return key(tile, row, k); });
  const Memory<float> out(128 * 64, NAN);
  run("pipeline", pipeline_kernel<MISTAKE>, 1, 3 * kGroup, kPipelineBytes - (MISTAKE == kMemoryTooSmall ? 1024 : 0),
      queries.data(), tiles.data(), kTiles, out.data());
  for (int row = 0; row < 128; ++row)
    for (int column = 0; column < 64; ++column) {
      int sum = 0;
      for (int tile = 0; tile < kTiles; ++tile)
        for (int k = 0; k < kDepth; ++k) sum += (1 + tile % 3) * query(row, k) * key(tile, column, k);
      if (out[row * 64 + column] != float(sum)) return false;
    }
  return true;
}

#if !defined(__CUDACC__)
template <int MISTAKE = 1>
void run_mistakes() {
  if constexpr (MISTAKE < kMistakes) {
    try {
      const bool ok = MISTAKE == kNoSyncWarp ? ring_is_right<false>() : pipeline_is_right<MISTAKE>();
      std::printf("%d: %s\n", MISTAKE, ok ? "passes" : "wrong numbers");
    } catch (const std::exception& error) {
      std::printf("%d: %s\n", MISTAKE, error.what());
    }
    run_mistakes<MISTAKE + 1>();
  }
}
#endif

// Numbers.

__global__ void numbers_kernel(const float* x, float* exponentials, uint32_t* rounded, int count) {
#if ASA_OPS_SM90A
  for (int i = threadIdx.x; i < count; i += 128) {
    exponentials[i] = exp2_fast(x[i]);
    rounded[i] = tf32_bits(x[i]);
  }
#endif
}

void test_numbers() {
  constexpr int kCount = 1 << 16;
  const Memory<float> x(kCount), exponentials(kCount);
  const Memory<uint32_t> rounded(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = 4 - 140 * float(i) / kCount;
  x[kCount - 1] = -INFINITY;
  run("numbers", numbers_kernel, 1, 128, 0, x.data(), exponentials.data(), rounded.data(), kCount);
  double off = 0;
  bool zeros = true, nearest = true;
  for (int i = 0; i < kCount; ++i) {
    const double exact = std::exp2(double(x[i]));
    if (exact > 0x1p-126)
      off = std::max(off, std::fabs(exponentials[i] - exact) / exact);
    else
      zeros &= exponentials[i] == 0;
    if (!std::isfinite(x[i])) continue;
    float back;
    std::memcpy(&back, &rounded[i], 4);
    nearest &= (rounded[i] & 0x1fff) == 0 && std::fabs(back - x[i]) <= std::fabs(x[i]) * 0x1p-11;
  }
  report(off < 0x1p-22, "exp2_fast within 2^-22");
  report(zeros, "exp2_fast is 0 where that is no normal number");
  report(nearest, "tf32_bits rounds to the nearest");
}

// Who comes last: as many programs write parts, the last sums them.

__global__ void __launch_bounds__(kGroup) last_kernel(float* parts, unsigned* counter, float* sum, unsigned* lasts) {
  parts[blockIdx.x * kGroup + threadIdx.x] = float(blockIdx.x + threadIdx.x);
  if (arrive_last(counter, 3, 3 * gridDim.x)) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i * kGroup + (threadIdx.x + 1) % kGroup];
    sum[threadIdx.x] = total;
    if (threadIdx.x == 0) atomicAdd(lasts, 1u);
  }
}

// The same of two warpgroups, one twice as large as a third that does something else.
__global__ void __launch_bounds__(4 * kGroup)
    last_of_kernel(float* parts, unsigned* counters, float* sum, unsigned* lasts) {
  const int group = threadIdx.x / kGroup;
  if (group == 0) return;
  const int which = group == 1, threads = which ? kGroup : 2 * kGroup, thread = threadIdx.x % threads;
  float* const own = parts + which * 2 * kGroup;
  own[blockIdx.x * 3 * kGroup + thread] = float(blockIdx.x + thread);
  named_barrier(1 + which, threads);
  if (arrive_last_of(counters + which, 1, gridDim.x, 1 + which, threads)) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += own[i * 3 * kGroup + (thread + 1) % threads];
    sum[which * 2 * kGroup + thread] = total;
    if (thread == 0) atomicAdd(lasts, 1u);
  }
}

void test_last() {
  constexpr int kPrograms = 300;
  const Memory<float> parts(kPrograms * 3 * kGroup), sum(3 * kGroup, NAN);
  const Memory<unsigned> counters(2), lasts(1);
  const auto right = [&](int first, int threads) {
    bool ok = true;
    for (int thread = 0; thread < threads; ++thread)
      ok &= sum[first + thread] == float(kPrograms * (kPrograms - 1) / 2 + kPrograms * ((thread + 1) % threads));
    return ok;
  };
  run("last", last_kernel, kPrograms, kGroup, 0, parts.data(), counters.data(), sum.data(), lasts.data());
  report(right(0, kGroup) && lasts[0] == 1, "arrive_last: one program, and it sees all results");
  counters[0] = lasts[0] = 0;
  run("last of", last_of_kernel, kPrograms, 4 * kGroup, 0, parts.data(), counters.data(), sum.data(), lasts.data());
  report(right(0, 2 * kGroup) && right(2 * kGroup, kGroup) && lasts[0] == 2, "arrive_last_of: one program for each");
}

template <class T>
void test_type() {
  test_products<T, 64>();
  test_products<T, 128>();
  test_products<T, 256>();
  test_chain<T, 64>();
  test_chain<T, 128>();
  test_chain<T, 256>();
}

void test_all() {
  test_copies();
  report(ring_is_right<true>(), "a ring of one slot over 100 turns, registers handed over");
  test_type<BFloat16>();
  test_type<Half>();
  test_type<TF32>();
  report(pipeline_is_right<kNone>(), "a pipeline of copies and products");
  test_numbers();
  test_last();
}

}  // namespace
}  // namespace asa_ops::cuda

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what was found remains if a kernel hangs
#if !defined(__CUDACC__)
  if (argc == 2 && std::strcmp(argv[1], "faults") == 0) {
    asa_ops::cuda::run_mistakes();
    return 0;
  }
#endif
  try {
    asa_ops::cuda::test_all();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return asa_ops::cuda::failures != 0;
}
