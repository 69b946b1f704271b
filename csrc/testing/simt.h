// CUDA's model of execution on a CPU, for tests: csrc/cuda compiled as ordinary C++ runs behind this header.
//
// Blocks run one after another, the threads of a block as fibers of one thread of the machine. A fiber runs until it
// must wait for the others, at a barrier or in a collective of its warp; now and then one dawdles behind a barrier until
// no other can go on. Where a GPU leaves something to chance, the worst case happens: asynchronous copies arrive when
// they are waited for and not before, shared memory starts as NaN. ASA_OPS_SIMT_REVERSED=1 is the opposite case: fibers
// run from the last to the first, copies arrive at once, and some blocks run at a time, which overtake one another where
// one tells others of its results or reads theirs. A kernel that lacks a barrier gives other results then.
// ASA_OPS_SIMT_ULPS=4 rounds as another kernel might: every product and sum is off by up to 4 units in the last place,
// at random. ASA_OPS_SIMT_PROCESSORS=132 cuts work as for a GPU with so many.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;
constexpr int kBlocks = 4;  // that run at a time, reversed

// The stack pointer of a fiber that does not run; its registers lie on its stack.
#if defined(__x86_64__) || defined(__aarch64__)
using Context = void*;
extern "C" void asa_simt_switch(Context* from, Context to);
#if defined(__x86_64__)
asm(R"(
.text
.weak asa_simt_switch
.type asa_simt_switch, @function
asa_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size asa_simt_switch, .-asa_simt_switch
)");
#else
asm(R"(
.text
.weak asa_simt_switch
.type asa_simt_switch, %function
asa_simt_switch:
  sub sp, sp, #176
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size asa_simt_switch, .-asa_simt_switch
)");
#endif
inline void switch_context(Context& from, Context& to) { asa_simt_switch(&from, to); }
// A context that will start in `entry` at the top of a stack.
inline Context new_context(char* stack, size_t size, void (*entry)()) {
  auto* const top = reinterpret_cast<void**>(stack + size);
#if defined(__x86_64__)
  top[-2] = reinterpret_cast<void*>(entry);  // after `ret` the stack is off by 8 from a multiple of 16, as after a call
  std::fill(top - 8, top - 2, nullptr);
  return top - 8;
#else
  std::fill(top - 22, top, nullptr);
  top[-22 + 11] = reinterpret_cast<void*>(entry);
  return top - 22;
#endif
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline Context new_context(char* stack, size_t size, void (*entry)()) {
  Context made;
  getcontext(&made);
  made.uc_stack.ss_sp = stack, made.uc_stack.ss_size = size, made.uc_link = nullptr;
  makecontext(&made, entry, 0);
  return made;
}
#endif

// Waits until all members have come, and tells whether one of them voted yes; may be used again and again.
struct Barrier {
  int members = 0, arrived = 0;
  unsigned round = 0;
  bool vote = false, result = false;
};

struct Copy {
  void* to;
  char bytes[16];
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int lane = 0, warp = 0;
  bool done = false;
  const unsigned* watched = nullptr;  // it waits until this is no longer what it saw
  unsigned seen = 0;
  const char* waits_for = "";
  std::vector<std::vector<Copy>> copies;  // groups of asynchronous copies, the open one last
};

// What the lanes of a warp show each other; two of them in turn, so that no lane overwrites what another still reads.
struct Exchange {
  alignas(16) unsigned char slots[kWarp][64];
  const char* what[kWarp];  // the collective that each lane is in
};

struct Warp {
  Barrier barrier;
  Exchange exchanges[2];
};

// What works beside the threads of a block; the first of them to use it makes it.
struct Engine {
  virtual ~Engine() = default;
  // When no thread can go on: does something that one may wait for, or returns false.
  virtual bool advance() = 0;
  // When all threads are done: throws if something is under way.
  virtual void finish() = 0;
};

// What belongs to a block.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block, named[16];
  std::unique_ptr<Engine> engine;
  std::vector<char> shared;
  dim3 block_index;
  size_t left = 0;  // threads that are not done
};

// The block that runs is its own part; others at rest are swapped with it, so that it is always at the same place.
struct Machine : Block {
  Context scheduler;
  std::vector<Block> resting;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  std::string name, failure;
  dim3 grid;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  const bool reversed = std::getenv("ASA_OPS_SIMT_REVERSED") != nullptr;
  int ulps = 0;
  uint32_t random = 1;
  uint32_t chance = 1;  // what happens now and then
  bool dawdlers = false;
  unsigned dawdled = 0;
  bool overtaken = false;  // another block is to run
  int loads = 0;  // of what others wrote, until then
  int64_t launches = 0;  // of kernels, so far
  int64_t products = 0;  // of warpgroups so far, each counted by its four warps
  std::set<std::tuple<const void*, int, size_t>> programs;  // launched so far: kernel, threads, bytes of shared memory
};

inline Machine& machine() {
  static thread_local Machine one;
  return one;
}

inline void enter(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  switch_context(m.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  m.current = nullptr;
}

inline void leave(Fiber& fiber) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, m.main_stack, m.main_stack_size);
#endif
  switch_context(fiber.context, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_stack_size);
#endif
  Fiber& fiber = *m.current;
  try {
    m.kernel();
  } catch (const std::exception& error) {  // it cannot leave this stack
    m.failure = error.what();
  }
  fiber.done = true;
  leave(fiber);
  std::abort();  // a fiber that is done is never entered again
}

[[noreturn]] inline void fail(const std::string& why) { throw std::logic_error(machine().name + ": " + why); }

// Lets others run until `watched` has changed.
inline void wait_for_change(const unsigned& watched, const char* what) {
  Fiber& fiber = *machine().current;
  fiber.watched = &watched;
  fiber.seen = watched;
  fiber.waits_for = what;
  leave(fiber);
}

// A number below `count`.
inline unsigned chance(size_t count) {
  Machine& m = machine();
  m.chance = m.chance * 1664525u + 1013904223u;
  return (m.chance >> 16) % count;
}

// Now and then lets all others go on as far as they can.
inline void dawdle() {
  if (chance(32) != 0) return;
  machine().dawdlers = true;
  wait_for_change(machine().dawdled, "nothing");
}

// Lets other blocks run.
inline void be_overtaken() {
  machine().overtaken = true;
  leave(*machine().current);
}

inline bool wait_at(Barrier& barrier, const char* what, bool vote = false) {
  barrier.vote |= vote;
  if (++barrier.arrived < barrier.members) {
    wait_for_change(barrier.round, what);
  } else {
    barrier.arrived = 0;
    barrier.result = std::exchange(barrier.vote, false);
    ++barrier.round;
  }
  return barrier.result;
}

inline void start_block() {
  Machine& m = machine();
  // A block must not rely on what it finds in shared memory.
  std::fill(m.shared.begin(), m.shared.end(), char(0xff));
  m.block = {};
  m.block.members = static_cast<int>(m.fibers.size());
  std::fill(std::begin(m.named), std::end(m.named), Barrier());
  m.engine.reset();
  for (Warp& warp : m.warps) {
    warp.barrier = {};
    warp.barrier.members = kWarp;
  }
  for (Fiber& fiber : m.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // the fiber before never returned
#endif
    fiber.context = new_context(fiber.stack.get(), kStack, &fiber_main);
    fiber.done = false;
    fiber.watched = nullptr;
    fiber.copies.assign(1, {});
  }
  m.left = m.fibers.size();
}

// Returns whether a block came to its end; otherwise others are to run.
inline bool continue_block() {
  Machine& m = machine();
  const size_t count = m.fibers.size();
  while (m.left > 0) {
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = m.fibers[m.reversed ? count - 1 - i : i];
      if (fiber.done || (fiber.watched != nullptr && *fiber.watched == fiber.seen)) continue;
      fiber.watched = nullptr;
      enter(fiber);
      if (!m.failure.empty()) throw std::logic_error(std::exchange(m.failure, ""));
      moved = true;
      m.left -= fiber.done;
      if (std::exchange(m.overtaken, false)) return false;
    }
    if (moved || (m.engine && m.engine->advance())) continue;
    if (std::exchange(m.dawdlers, false)) {
      ++m.dawdled;
      continue;
    }
    std::set<std::string> waits;
    for (const Fiber& fiber : m.fibers)
      if (!fiber.done) waits.insert(fiber.waits_for);
    std::string all;
    for (const std::string& what : waits) all += (all.empty() ? "" : " and ") + what;
    fail("some threads wait in vain, for " + all);
  }
  if (m.engine) m.engine->finish();
  for (const Fiber& fiber : m.fibers)
    for (const auto& group : fiber.copies)
      if (!group.empty()) fail("asynchronous copies are under way at its end");
  return true;
}

// Multiprocessors: so few that even small calls are cut into parts, unless ASA_OPS_SIMT_PROCESSORS says how many.
inline int processors() {
  const char* const asked = std::getenv("ASA_OPS_SIMT_PROCESSORS");
  return asked == nullptr ? 7 : std::atoi(asked);
}

// How many kernels ran in this process, for the tests.
extern "C" __attribute__((used, visibility("default"))) inline int64_t simt_launches() { return machine().launches; }

// How many products of warpgroups.
extern "C" __attribute__((used, visibility("default"))) inline int64_t simt_products() {
  return machine().products / 4;
}

// The different programs launched in this process, a line each: where the kernel lies behind simt_launches, its threads,
// its bytes of shared memory.
extern "C" __attribute__((used, visibility("default"))) inline const char* simt_programs() {
  static thread_local std::string lines;
  lines.clear();
  for (const auto& [kernel, threads, shared] : machine().programs) {
    const auto offset = reinterpret_cast<intptr_t>(kernel) - reinterpret_cast<intptr_t>(&simt_launches);
    lines += std::to_string(offset) + " " + std::to_string(threads) + " " + std::to_string(shared) + "\n";
  }
  return lines.c_str();
}

// Runs a kernel as kernel<<<grid, block, shared>>>(args...) would.
template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, dim3 grid, int threads, size_t shared, Args... args) {
  Machine& m = machine();
  if (threads % kWarp != 0 || threads > 1024)
    throw std::logic_error(std::string(name) + ": threads not in whole warps");
  m.name = name;
  ++m.launches;
  m.programs.emplace(reinterpret_cast<const void*>(kernel), threads, shared);
  m.grid = grid;
  const char* const ulps = std::getenv("ASA_OPS_SIMT_ULPS");  // at every launch, since one process may ask for both
  m.ulps = ulps == nullptr ? 0 : std::atoi(ulps);
  m.kernel = [=] { kernel(args...); };
  m.dawdlers = m.overtaken = false;
  m.resting.resize(m.reversed ? kBlocks : 1);
  for (Block& block : m.resting) {
    block.shared = std::vector<char>(shared);  // of the exact size, for AddressSanitizer
    block.warps.resize(threads / kWarp);
    block.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[i];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.thread = dim3(i, 0, 0);
      fiber.lane = i % kWarp, fiber.warp = i / kWarp;
    }
    block.left = 0;
  }
  const unsigned blocks = grid.x * grid.y * grid.z;
  unsigned started = 0;
  // Lets a resting block go on, or a new one, and returns whether it has not come to its end.
  const auto visit = [&](Block& block) {
    const bool fresh = block.left == 0;
    if (fresh && started == blocks) return false;
    std::swap(static_cast<Block&>(m), block);
    if (fresh) {
      const unsigned index = started++;
      m.block_index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
      start_block();
    }
    const bool rests = !continue_block();
    std::swap(static_cast<Block&>(m), block);
    return rests;
  };
  for (size_t resting = 0; started < blocks || resting > 0;) {
    Block& block = m.resting[chance(m.resting.size())];
    resting -= block.left != 0;
    resting += visit(block);
  }
}

// x, off by up to as many units in the last place as the machine is asked to be.
inline float rounded(float x) {
  Machine& m = machine();
  if (m.ulps == 0) return x;
  m.random = m.random * 1664525u + 1013904223u;
  return x * (1 + (static_cast<int>((m.random >> 8) % (2 * m.ulps + 1)) - m.ulps) * 0x1p-23f);
}

// Shows `mine` to the warp and waits for the others; once all have come, and before any of them goes on, the last one
// calls `act` on what they showed. Returns that.
template <class T, class Act>
const Exchange& collect(const char* what, const T& mine, Act act) {
  static_assert(sizeof(T) <= sizeof(Exchange::slots[0]));
  const int lane = machine().current->lane;
  Warp& warp = machine().warps[machine().current->warp];
  Exchange& slots = warp.exchanges[warp.barrier.round % 2];
  std::memcpy(slots.slots[lane], &mine, sizeof(T));
  slots.what[lane] = what;
  if (warp.barrier.arrived + 1 == warp.barrier.members) {
    for (const char* other : slots.what)
      if (std::strcmp(other, what) != 0) fail("lanes of a warp meet in " + std::string(what) + " and " + other);
    act(slots);
  }
  wait_at(warp.barrier, what);
  return slots;
}

template <class T>
const Exchange& exchange(const char* what, const T& mine) {
  return collect(what, mine, [](const Exchange&) {});
}

template <class T>
const T& shown(const Exchange& slots, int lane) {
  return *reinterpret_cast<const T*>(slots.slots[lane]);
}

inline void check_mask(unsigned mask) {
  if (mask != ~0u) fail("collectives of part of a warp are not emulated");
}

}  // namespace simt

#define threadIdx (simt::machine().current->thread)
#define blockIdx (simt::machine().block_index)
#define gridDim (simt::machine().grid)

inline bool __syncthreads_or(bool vote) {
  const bool any = simt::wait_at(simt::machine().block, "all threads", vote);
  simt::dawdle();
  return any;
}
inline void __syncthreads() { __syncthreads_or(false); }
inline void __threadfence() {  // fibers see each other's writes
  if (simt::machine().reversed && simt::chance(2) == 0) simt::be_overtaken();
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  simt::check_mask(mask);
  return simt::shown<T>(simt::exchange("a shuffle", value), simt::machine().current->lane ^ other);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  simt::check_mask(mask);
  return simt::shown<T>(simt::exchange("a shuffle", value), lane);
}

inline void __syncwarp() { simt::exchange("__syncwarp", 0); }

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  simt::check_mask(mask);
  const simt::Exchange& slots = simt::exchange("a vote", vote);
  unsigned votes = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) votes |= unsigned(simt::shown<bool>(slots, lane)) << lane;
  return votes;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at |= value;
  return before;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::max(*at, value);
  return before;
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace asa_ops::cuda {

// The other half of device.h: numbers in 16 bits, and the hardware's matrix and copy instructions.

template <class T, class U>
T bits_as(U x) {
  static_assert(sizeof(T) == sizeof(U));
  T y;
  std::memcpy(&y, &x, sizeof(T));
  return y;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
// Of all 16-bit patterns, since compilers may convert them one by one in software.
inline const std::vector<float>& half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits)
      all[bits] = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(bits)));
    return all;
  }();
  return values;
}

inline float to_float(Half x) { return half_values()[x.bits]; }
inline float to_float(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  return {bits_as<uint16_t>(static_cast<_Float16>(x))};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Half half_above(float x) {
  const Half nearest = from_float<Half>(x);
  if (!(to_float(nearest) < x)) return nearest;
  // The next one up: away from zero for positive numbers, towards it for negative ones.
  return {static_cast<uint16_t>(nearest.bits & 0x8000 ? nearest.bits - 1 : nearest.bits + 1)};
}

inline uint32_t tf32_bits(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000 : bits;
}

template <class T>
uint32_t pack(float x, float y) {
  return uint32_t(from_float<T>(x).bits) | uint32_t(from_float<T>(y).bits) << 16;
}

inline float fmaf(float x, float y, float z) {
  const float sum = std::fma(x, y, z);
  return sum == z ? sum : simt::rounded(sum);
}

template <class T>
T load_fresh(const T* at) {
  const T value = *at;
  // After a few times or after very many: the others come as far.
  simt::Machine& m = simt::machine();
  if (m.reversed && --m.loads < 0) {
    m.loads = 1 << simt::chance(12);
    simt::be_overtaken();
  }
  return value;
}

inline bool named_barrier_any(int id, int threads, bool vote) {
  if (id < 1 || id > 15 || threads % simt::kWarp != 0) simt::fail("no named barrier can be such");
  simt::Barrier& barrier = simt::machine().named[id];
  if (barrier.arrived != 0 && barrier.members != threads) simt::fail("threads differ in who is to meet at a barrier");
  barrier.members = threads;
  const bool any = simt::wait_at(barrier, "threads at a named barrier", vote);
  simt::dawdle();
  return any;
}

inline void named_barrier(int id, int threads) { named_barrier_any(id, threads, false); }

inline char* shared_memory() { return simt::machine().shared.data(); }

inline void copy_async(void* to, const void* from) {
  simt::Copy copy{to, {}};
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    simt::fail("an asynchronous copy is not aligned");
  std::memcpy(copy.bytes, from, sizeof(copy.bytes));
  if (simt::machine().reversed) {
    std::memcpy(to, copy.bytes, sizeof(copy.bytes));
    return;
  }
  simt::machine().current->copies.back().push_back(copy);
}

inline void copy_commit() { simt::machine().current->copies.emplace_back(); }

template <int PENDING>
void copy_wait() {
  auto& copies = simt::machine().current->copies;
  while (copies.size() > PENDING + 1) {
    for (const simt::Copy& copy : copies.front()) std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
    copies.erase(copies.begin());
  }
}

// ldmatrix.x4: four matrices of 8 x 8 16-bit numbers, whose rows lie where lanes 8 m to 8 m + 7 say.
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const simt::Exchange& rows = simt::exchange("ldmatrix", row);
  const int lane = simt::machine().current->lane;
  for (int m = 0; m < 4; ++m)  // numbers 2 t and 2 t + 1 of row g
    std::memcpy(&out[m], static_cast<const char*>(simt::shown<const void*>(rows, 8 * m + lane / 4)) + lane % 4 * 4, 4);
}

// ldmatrix.x4.trans: the numbers of rows 2 t and 2 t + 1 in column g.
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const simt::Exchange& rows = simt::exchange("ldmatrix", row);
  const int lane = simt::machine().current->lane;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&pair[i],
                  static_cast<const char*>(simt::shown<const void*>(rows, 8 * m + lane % 4 * 2 + i)) + lane / 4 * 2, 2);
    std::memcpy(&out[m], pair, 4);
  }
}

// mma.m16n8k16: c += a b, fragments as the PTX manual lays them out.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float a[4][2], b[2][2];
  };
  const auto number = [](uint32_t pair, int i) { return to_float(T{static_cast<uint16_t>(pair >> 16 * i)}); };
  Operands mine;
  for (int i = 0; i < 2; ++i) {
    for (int m = 0; m < 4; ++m) mine.a[m][i] = number(a[m], i);
    mine.b[0][i] = number(b0, i), mine.b[1][i] = number(b1, i);
  }
  const simt::Exchange& slots = simt::exchange("mma", mine);
  const int lane = simt::machine().current->lane, g = lane / 4, t = lane % 4;
  for (float& sum : c) sum = simt::rounded(sum);
  for (int other = 0; other < 4; ++other) {  // the lanes that hold columns 2 other, + 1, + 8 and + 9 of a's rows
    const Operands& left = simt::shown<Operands>(slots, 4 * g + other);
    for (int column = 0; column < 2; ++column) {
      const Operands& right = simt::shown<Operands>(slots, 4 * (2 * t + column) + other);
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 2; ++i) {
          c[column] = std::fma(left.a[2 * half][i], right.b[half][i], c[column]);
          c[2 + column] = std::fma(left.a[2 * half + 1][i], right.b[half][i], c[2 + column]);
        }
    }
  }
}

}  // namespace asa_ops::cuda
