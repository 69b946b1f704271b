// AMX on machines that lack it: a handler of the signal that its instructions raise there decodes and runs them.
//
// So the real instructions are tested, their operands and their encoding: csrc/cpu/amx.h has an emulation of its own,
// which is faster, but does not run them.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_traps {

struct State {
  uint8_t tile[8][16][64];
  int bytes[8], rows[8];
  bool configured;
};
inline thread_local State state;
inline int count = 0;  // of instructions

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "amx_traps: %s\n", why);
  abort();
}

inline float number(const uint8_t* bits, int size) {
  uint32_t x = 0;
  memcpy(reinterpret_cast<char*>(&x) + 4 - size, bits, size);  // a bf16 is the upper half of a float
  if ((x & 0x7F800000u) == 0) x &= 0x80000000u;
  float y;
  memcpy(&y, &x, 4);
  return y;
}

inline float flushed(float x) { return number(reinterpret_cast<uint8_t*>(&x), 4); }

// As the manual writes it (Intel SDM, TDPBF16PS).
inline void dot(int to, int a, int b) {
  State& s = state;
  for (int m = 0; m < s.rows[to]; ++m) {
    float sums[32] = {};
    for (int k = 0; k < s.bytes[a] / 4; ++k)
      for (int n = 0; n < s.bytes[to] / 4; ++n)
        for (int odd = 0; odd < 2; ++odd)
          sums[2 * n + odd] = flushed(std::fma(number(s.tile[a][m] + 4 * k + 2 * odd, 2),
                                               number(s.tile[b][k] + 4 * n + 2 * odd, 2), sums[2 * n + odd]));
    for (int n = 0; n < s.bytes[to] / 4; ++n) {
      const float sum = flushed(sums[2 * n] + sums[2 * n + 1]);
      const float total = flushed(number(s.tile[to][m] + 4 * n, 4) + sum);
      memcpy(s.tile[to][m] + 4 * n, &total, 4);
    }
  }
}

inline void configure(const uint8_t* from) {
  memset(&state, 0, sizeof(state));
  if (from[0] != 1) fail("no palette 1");
  for (int x = 1; x < 64; ++x)
    if ((x < 16 || (x >= 32 && x < 48) || x >= 56) && from[x] != 0) fail("reserved bytes of a configuration");
  for (int t = 0; t < 8; ++t) {
    state.bytes[t] = from[16 + 2 * t] + 256 * from[17 + 2 * t], state.rows[t] = from[48 + t];
    if (state.bytes[t] > 64 || state.rows[t] > 16) fail("tiles larger than there are");
  }
  state.configured = true;
}

inline void handle(int, siginfo_t*, void* context) {
  constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* next = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (next[0] != 0xC4 || (next[1] & 0x1F) != 2 || (next[2] & 0x84) != 0) fail("another illegal instruction");
  const int x = ~next[1] >> 6 & 1, b = ~next[1] >> 5 & 1, third = ~next[2] >> 3 & 15, prefix = next[2] & 3;
  const int code = next[3], mode = next[4] >> 6, reg = next[4] >> 3 & 7, rm = next[4] & 7;
  next += 5;
  uint8_t* address = nullptr;
  int64_t stride = 0;
  if (mode != 3) {
    int base = rm;
    bool none = false;
    if (rm == 4) {
      const int sib = *next++, index = (sib >> 3 & 7) | x << 3;
      base = sib & 7;
      if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
    }
    none = mode == 0 && base == 5;  // then relative to the next instruction, or to nothing
    int64_t offset = 0;
    if (mode == 1) offset = static_cast<int8_t>(*next++);
    if (mode == 2 || none) {
      int32_t four;
      memcpy(&four, next, 4);
      next += 4, offset = four;
    }
    const int64_t from = !none ? registers[kRegisters[base | b << 3]] : rm == 4 ? 0 : reinterpret_cast<int64_t>(next);
    address = reinterpret_cast<uint8_t*>(from + offset);
  }
  State& s = state;
  const auto rows = [&](const auto& copy) {
    for (int r = 0; r < s.rows[reg]; ++r) copy(s.tile[reg][r], address + r * stride, s.bytes[reg]);
  };
  constexpr int kF3 = 2, kF2 = 3;
  const bool releases = code == 0x49 && prefix == 0 && mode == 3, configures = code == 0x49 && prefix == 0 && mode != 3;
  if (!configures && !s.configured) fail("tiles are not configured");
  if (configures) {
    configure(address);
  } else if (releases) {
    s.configured = false;
  } else if (code == 0x49 && prefix == kF2 && mode == 3) {
    memset(s.tile[reg], 0, sizeof(s.tile[reg]));
  } else if (code == 0x4B && prefix == kF2) {
    rows([](uint8_t* tile, const uint8_t* memory, int bytes) { memcpy(tile, memory, bytes); });
  } else if (code == 0x4B && prefix == kF3) {
    rows([](const uint8_t* tile, uint8_t* memory, int bytes) { memcpy(memory, tile, bytes); });
  } else if (code == 0x5C && prefix == kF3 && mode == 3) {
    dot(reg, rm, third);
  } else {
    fail("another illegal instruction");
  }
  __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
  registers[REG_RIP] = reinterpret_cast<greg_t>(next);
}

inline void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle, action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) fail("sigaction");
}

}  // namespace amx_traps
