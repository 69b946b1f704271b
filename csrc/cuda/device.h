// What kernels need of the hardware: launches, 16-bit numbers, asynchronous copies, matrix instructions.
//
// Compiled by nvcc this is a thin layer over CUDA; compiled as C++ everything in it comes from testing/simt.h, which
// runs kernels on the CPU. Kernels use nothing of either directly but thread indices, barriers, shuffles, votes and
// atomics.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace asa_ops::cuda {

template <class T, class U>
__device__ __forceinline__ T bits_as(U x) {
  static_assert(sizeof(T) == sizeof(U));
  T y;
  memcpy(&y, &x, sizeof(T));
  return y;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// What other programs of the same kernel wrote.
template <class T>
__device__ __forceinline__ T load_fresh(const T* at) {
  return __ldcg(at);
}

// The smallest 16-bit number that is no smaller.
__device__ __forceinline__ Half half_above(float x) { return {__half_as_ushort(__float2half_ru(x))}; }

// The nearest TF32, ties away from zero.
__device__ __forceinline__ uint32_t tf32_bits(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Two numbers side by side, the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  return uint32_t(from_float<T>(x).bits) | uint32_t(from_float<T>(y).bits) << 16;
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Copies 16 bytes to shared memory in the background: there after copy_wait and a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
// Closes a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 8 16-bit numbers, whose rows lie where lanes 8 m to 8 m + 7 say.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8], in float32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Waits for `threads` threads, in whole warps; ids 1 to 15, different ones for those that may meet at the same time.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same, and tells whether one of them voted yes.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool vote) {
  uint32_t any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}\n"
               : "=r"(any)
               : "r"(id), "r"(threads), "r"(uint32_t(vote))
               : "memory");
  return any != 0;
}

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error("asa_ops: " + what + ": " + cudaGetErrorString(error));
}

// Launches a kernel; an error names it.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            Args... args) {
  if (grid.x == 0 || grid.y == 0) return;  // a process without rows
  const std::string what = std::string("launching ") + name;
  if (shared > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what);
  kernel<<<grid, threads, shared, stream>>>(static_cast<Params>(args)...);
  check_cuda(cudaGetLastError(), what);
}

inline void clear_memory(void* at, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(at, 0, bytes, stream), "clearing memory");
}

// What the current device says of itself.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "finding the device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking the device");
  return value;
}

// Its multiprocessors: how many programs run at a time, at least.
inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// 90 for 9.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace asa_ops::cuda

#else

#include "../testing/simt.h"

namespace asa_ops::cuda {

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t,
            Args... args) {
  if (grid.x == 0 || grid.y == 0) return;
  simt::launch(name, kernel, grid, threads, shared, static_cast<Params>(args)...);
}

inline void clear_memory(void* at, size_t bytes, cudaStream_t) { std::memset(at, 0, bytes); }

inline int processors() { return simt::processors(); }

}  // namespace asa_ops::cuda

#endif

namespace asa_ops::cuda {

// By all threads of a program that wrote their results to global memory: adds to a counter, and tells all of them
// whether it has reached `expected`. Those who are told so see the results of every program that added before.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned add, unsigned expected) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, add) + add == expected;
    __threadfence();
  }
  return __syncthreads_or(last);
}

// By `threads` threads one after another, which meet at a named barrier of theirs.
__device__ __forceinline__ bool arrive_last_of(unsigned* counter, unsigned add, unsigned expected, int id,
                                               int threads) {
  bool last = false;
  named_barrier(id, threads);
  if (threadIdx.x % threads == 0) {
    __threadfence();
    last = atomicAdd(counter, add) + add == expected;
    __threadfence();
  }
  return named_barrier_any(id, threads, last);
}

// Over the four threads that share a row of a product.
__device__ __forceinline__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
template <class N>
__device__ __forceinline__ N sum_over_quad(N x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace asa_ops::cuda
