// What kernels for compute capability 9.0 need of the hardware beyond device.h: barriers in shared memory, bulk copies,
// matrix products of a warpgroup, registers handed from one warpgroup to another.
//
// Operands lie in shared memory as panels: rows of 128 bytes (64 halves or 32 floats) one after another, the 16-byte
// groups of a row swizzled by its number modulo 8, as `swizzled` in asa/tiles.h has them. Products read a panel along
// its rows (K-major: the summed index runs within a row) or, halves only, across them (MN-major: it runs over rows).
// Panels start at multiples of 1024 bytes.
//
// Rules for whoever writes a kernel, most of which the emulation checks:
// - products_fence before every batch, products_commit after it, products_wait before its registers are touched;
// - products do not stand in branches, waits for them not in one side of a branch: the assembler gives up overlap
//   (C75xx). It does so too (CUDA 13.0) where two sets of sums take turns in a loop and what follows the loop is not a
//   branch, on how many are left, say;
// - one thread of a warp arrives at a barrier for all of it after __syncwarp, since other lanes may still have to look
//   whether the phase before is over;
// - what the threads wrote to shared memory needs fence_proxy_async and a barrier before a product or a copy.

#pragma once

#include "../device.h"

// Whether this pass compiles kernels' bodies: the host's and the emulation's do, of the devices' that for sm_90a.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ASA_OPS_SM90A 1
#else
#define ASA_OPS_SM90A 0
#endif

namespace asa_ops::cuda {

constexpr int kGroup = 128;  // threads of a warpgroup

// A number of which products read the upper 19 bits.
struct TF32 {
  float value;
};

// A barrier in shared memory. A phase is over when as many arrivals have come as barrier_init said, and all bytes of
// copies that barrier_expect announced.
struct alignas(8) Barrier {
  uint64_t state;
};

}  // namespace asa_ops::cuda

#if defined(__CUDACC__)

namespace asa_ops::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// The number of this thread in the program, read anew: the assembler keeps what was read before registers are handed over
// in memory.
__device__ __forceinline__ int thread_number() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same number, of which the compiler does not know that it has it already.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A number that is the same in every lane: the compiler may keep it, and what follows from it, in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that called barrier_init, before __syncthreads: shows the barriers to copies.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits while the barrier is in a phase of this parity. The first phase is 0: waiting for parity 1 returns at once.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory is seen by copies and products after the next barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies to shared memory in the background, both sides and `bytes` multiples of 16; the bytes count for the barrier.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// A thread's registers from here on, of all threads of a warpgroup: a multiple of 8 from 24 to 256. Registers of a
// program are handed on: `more` waits until others have given as many back by `fewer`.
template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Before the first product of a batch: registers that it reads or adds to are final.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a batch of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all batches but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler moves no use of these numbers to before here: it does not know which ones a wait is for.
template <int N>
__device__ __forceinline__ void settled(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settled(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// d (+)= a b for a of 64 x 16 halves or 64 x 8 TF32, b of as many by N, in the background; `first`: d is overwritten.
// Of d, warp w of the warpgroup owns rows 16 w to 16 w + 15, and of 8 columns n a thread owns d[4 n], d[4 n + 1] in
// row g, columns 2 t and 2 t + 1, and d[4 n + 2], d[4 n + 3] in row g + 8; g = lane / 4, t = lane % 4.
// shared<TA, TB>: both operands by descriptors, MN-major where TA or TB is 1.
// registers<TB>: the left operand in registers. Halves, two in each: a0, a1 in rows g and g + 8, columns 2 t and 2 t +
// 1; a2, a3 8 columns further on. TF32: a0, a1 in rows g and g + 8, column t; a2, a3 4 columns further on.
template <class T, int N>
struct Product;

// Operands of the instruction: the registers of d, then those numbered R0, R1, ..
// clang-format off
#define ASA_OPS_D32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ASA_OPS_D64 ASA_OPS_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ASA_OPS_D128 ASA_OPS_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define ASA_OPS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ASA_OPS_32(d, i) ASA_OPS_8(d, i), ASA_OPS_8(d, i + 8), ASA_OPS_8(d, i + 16), ASA_OPS_8(d, i + 24)
#define ASA_OPS_64(d, i) ASA_OPS_32(d, i), ASA_OPS_32(d, i + 32)
#define ASA_OPS_128(d, i) ASA_OPS_64(d, i), ASA_OPS_64(d, i + 64)
// clang-format on

#define ASA_OPS_PRODUCT_OF_HALVES(T, NAME, N, D, LIST, R0, R1, R2, R3, R4, R5, R6)                                     \
  template <>                                                                                                          \
  struct Product<T, N> {                                                                                               \
    template <int TA = 0, int TB = 0>                                                                                  \
    static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool first) {             \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, %" R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N            \
                   "k16.f32." NAME "." NAME " {" D "}, %" R0 ", %" R1 ", add, 1, 1, %" R3 ", %" R4 ";\n}\n"            \
                   : LIST(d, 0)                                                                                        \
                   : "l"(a), "l"(b), "r"(uint32_t(first)), "n"(TA), "n"(TB));                                          \
    }                                                                                                                  \
    template <int TB = 0>                                                                                              \
    static __device__ __forceinline__ void registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,         \
                                                     uint32_t a3, uint64_t b, bool first) {                            \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, %" R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N            \
                   "k16.f32." NAME "." NAME " {" D "}, {%" R0 ", %" R1 ", %" R2 ", %" R3 "}, %" R4 ", add, 1, 1, %" R6 \
                   ";\n}\n"                                                                                            \
                   : LIST(d, 0)                                                                                        \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(uint32_t(first)), "n"(TB));                       \
    }                                                                                                                  \
  };
#define ASA_OPS_PRODUCT_OF_TF32(N, D, LIST, R0, R1, R2, R3, R4, R5, R6)                                        \
  template <>                                                                                                  \
  struct Product<TF32, N> {                                                                                    \
    template <int TA = 0, int TB = 0>                                                                          \
    static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool first) {     \
      static_assert(TA == 0 && TB == 0, "TF32 is read K-major");                                               \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, %" R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N    \
                   "k8.f32.tf32.tf32 {" D "}, %" R0 ", %" R1 ", add, 1, 1;\n}\n"                               \
                   : LIST(d, 0)                                                                                \
                   : "l"(a), "l"(b), "r"(uint32_t(first)));                                                    \
    }                                                                                                          \
    template <int TB = 0>                                                                                      \
    static __device__ __forceinline__ void registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                     uint32_t a3, uint64_t b, bool first) {                    \
      static_assert(TB == 0, "TF32 is read K-major");                                                          \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, %" R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N    \
                   "k8.f32.tf32.tf32 {" D "}, {%" R0 ", %" R1 ", %" R2 ", %" R3 "}, %" R4 ", add, 1, 1;\n}\n"  \
                   : LIST(d, 0)                                                                                \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(uint32_t(first)));                        \
    }                                                                                                          \
  };
#define ASA_OPS_PRODUCT(N, ...)                               \
  ASA_OPS_PRODUCT_OF_HALVES(Half, "f16", N, __VA_ARGS__)      \
  ASA_OPS_PRODUCT_OF_HALVES(BFloat16, "bf16", N, __VA_ARGS__) \
  ASA_OPS_PRODUCT_OF_TF32(N, __VA_ARGS__)
ASA_OPS_PRODUCT(64, ASA_OPS_D32, ASA_OPS_32, "32", "33", "34", "35", "36", "37", "38")
ASA_OPS_PRODUCT(128, ASA_OPS_D64, ASA_OPS_64, "64", "65", "66", "67", "68", "69", "70")
ASA_OPS_PRODUCT(256, ASA_OPS_D128, ASA_OPS_128, "128", "129", "130", "131", "132", "133", "134")
#undef ASA_OPS_PRODUCT
#undef ASA_OPS_PRODUCT_OF_TF32
#undef ASA_OPS_PRODUCT_OF_HALVES
#undef ASA_OPS_128
#undef ASA_OPS_64
#undef ASA_OPS_32
#undef ASA_OPS_8
#undef ASA_OPS_D128
#undef ASA_OPS_D64
#undef ASA_OPS_D32

}  // namespace asa_ops::cuda

#else

#include "../../testing/hopper.h"

#endif

namespace asa_ops::cuda {

// Dynamic shared memory from the first multiple of 1024 bytes on; launches ask for 1024 bytes more. It is found anew each
// time, as thread_number is.
__device__ __forceinline__ char* aligned_shared_memory() {
  char* const memory = shared_memory();
  return memory + (-opaque(shared_address(memory)) & 1023);
}

// Where an operand lies, for products. K-major: its rows are rows of a panel, the summed index starts at `address`.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t lead) {
  // In units of 16 bytes: the address, `lead`, and 1024 bytes from 8 rows to the next 8; swizzled over 128 bytes.
  return (address >> 4 & 0x3fff) | uint64_t(lead >> 4 & 0x3fff) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__host__ __device__ constexpr uint64_t k_major(uint32_t address) { return descriptor(address, 16); }
// MN-major: rows of a panel are the summed index, `panel_bytes` lie between 64 columns of the operand and the next 64.
__host__ __device__ constexpr uint64_t mn_major(uint32_t address, uint32_t panel_bytes) {
  return descriptor(address, panel_bytes);
}
// The same operand `bytes` further on. A product is 32 of a K-major panel's bytes, 2048 (16 rows) of an MN-major one's.
__host__ __device__ constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// d (+)= a b^T over COLUMNS columns, both K-major: a has 64 rows and b N; a_panel and b_panel are the bytes from one
// panel of columns to the next.
template <class T, int N, int COLUMNS>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 2], uint32_t a, uint32_t a_panel, uint32_t b,
                                              uint32_t b_panel, bool first) {
#pragma unroll
  for (int k = 0; k < COLUMNS * int(sizeof(T)) / 32; ++k)
    Product<T, N>::shared(d, advanced(k_major(a + k / 4 * a_panel), k % 4 * 32),
                          advanced(k_major(b + k / 4 * b_panel), k % 4 * 32), first && k == 0);
}

// Numbers of a fragment of N columns as the left operand of products that sum over them.
// TF32: such a product wants columns t and t + 4 of 8 where the fragment has 2 t and 2 t + 1. The order of a summed
// index is free, so those are taken as they are, and the right operand must hold every 8 in the order 0, 2, 4, 6, 1, 3,
// 5, 7.
template <class T, int N>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[N * int(sizeof(T)) / 8], const float (&s)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    } else {
      p[i / 2 * 4 + i % 2] = tf32_bits(s[2 * i]);
      p[i / 2 * 4 + i % 2 + 2] = tf32_bits(s[2 * i + 1]);
    }
  }
}

// d (+)= p x for p of 64 x ROWS as pack_weights leaves it. Halves: x MN-major, ROWS rows in panels of 64 of its N
// columns. TF32: x transposed, so K-major: N rows in panels of 32 of the summed index, permuted as said above. x_panel
// are the bytes from one panel to the next.
template <class T, int N, int ROWS>
__device__ __forceinline__ void multiply_weights(float (&d)[N / 2], const uint32_t (&p)[ROWS * int(sizeof(T)) / 8],
                                                 uint32_t x, uint32_t x_panel, bool first) {
  constexpr bool kHalves = sizeof(T) == 2;
#pragma unroll
  for (int k = 0; k < ROWS * int(sizeof(T)) / 32; ++k)
    Product<T, N>::template registers<kHalves>(
        d, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
        kHalves ? advanced(mn_major(x, x_panel), k * 2048) : advanced(k_major(x + k / 4 * x_panel), k % 4 * 32),
        first && k == 0);
}

}  // namespace asa_ops::cuda
