// What processes that share a map tell each other of the rows that they scan: packed after the plan of some rows, and
// taken apart where all rows are together. Only then are the tiles listed that a process visits: those that reach
// thresholds both ways, if neighbours must be mutual, and those with a local survivor.

#include "lists.h"
#include "rows.h"

namespace asa_ops::cuda {
namespace {

constexpr int kExchangeThreads = 256;

enum Number { kLse, kCut, kKappa, kKth, kLogMean, kLocal };  // of a row, the local flags last

template <class T>
__global__ void __launch_bounds__(kExchangeThreads)
    asa_tell_kernel(Problem<T> p, Plan plan, Saved<T> saved, float* numbers, uint8_t* flags) {
  const int z = blockIdx.x / p.rows.count, block = p.rows.first + blockIdx.x % p.rows.count;
  const int image = image_of(z, p.heads, p.per_image), width = numbers_of(p.window), members = p.window;
  const int32_t* const tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  for (int i = threadIdx.x; i < kBlock * width; i += kExchangeThreads) {
    const int row = i / width, which = i % width, token = tokens[row];
    const int64_t index = row_at(z, p.rows.padded, block * kBlock + row);
    float x = 0;
    if (which == kLse && token >= 0) x = saved.base2.of(z)[token];
    if (which == kCut && p.has_bits) x = plan.thresholds.cut2[index];
    if (which == kKappa && plan.thresholds.kappa2 != nullptr) x = plan.thresholds.kappa2[index];
    if (which == kKth && p.topk > 0 && token >= 0) x = saved.kappa2.of(z)[token];
    if (which == kLogMean && p.window > 0 && token >= 0) x = saved.log_mean2.of(z)[token];
    if (which >= kLocal && token >= 0) {
      uint32_t four = 0;
      for (int k = 0, offset = 4 * (which - kLocal); k < 4 && offset < members; ++k, ++offset)
        four |= uint32_t(local_flag(p, saved.local, z, token, offset)) << 8 * k;
      x = bits_as<float>(four);
    }
    numbers[int64_t(blockIdx.x) * kBlock * width + i] = x;
  }
  if (!p.has_bits) return;
  uint8_t* const of_block = flags + int64_t(blockIdx.x) * p.keys.blocks();
  for (int j = threadIdx.x; j < p.keys.blocks(); j += kExchangeThreads) of_block[j] = plan.reached.at(z, block, j);
}

// A block of rows a program, of all rows; the last of a head lists tiles.
template <class T>
__global__ void __launch_bounds__(kExchangeThreads)
    asa_take_kernel(Problem<T> p, Plan plan, Lists of_keys, Saved<T> saved, const float* numbers,
                    const uint8_t* flags) {
  const int blocks = p.rows.blocks(), z = blockIdx.x / blocks, block = blockIdx.x % blocks, thread = threadIdx.x;
  const int image = image_of(z, p.heads, p.per_image), width = numbers_of(p.window), members = p.window;
  const int32_t* const tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  const auto note_local = [&](int token, int offset) {
    const int j = p.keys.place[row_at(image, p.keys.n, window_token(p, token, offset))] / kBlock;
    plan.local.set(z, block, j);
    if (p.mutual) plan.local.set(z, j, block);
  };
  for (int i = thread; i < kBlock * width; i += kExchangeThreads) {
    const int row = i / width, which = i % width, token = tokens[row];
    const int64_t index = row_at(z, p.rows.padded, block * kBlock + row);
    const float x = numbers[int64_t(blockIdx.x) * kBlock * width + i];
    if (which == kLse && p.has_bits) plan.thresholds.lse2[index] = p.alpha.data == nullptr ? 0 : x;
    if (which == kCut && p.has_bits) plan.thresholds.cut2[index] = x;
    if (which == kKappa && plan.thresholds.kappa2 != nullptr) plan.thresholds.kappa2[index] = x;
    if (token < 0) continue;
    if (which == kLse && p.rows.computes(block)) {
      saved.lse[row_at(z, p.rows.n, token)] = x * kLn2;
      if (saved.base2.data != nullptr) saved.base2.of(z)[token] = x;
    }
    if (which == kKth && p.topk > 0) saved.kappa2.of(z)[token] = x;
    if (which == kLogMean && p.window > 0) saved.log_mean2.of(z)[token] = x;
    if (which < kLocal) continue;
    const auto four = bits_as<uint32_t>(x);
    for (int k = 0, offset = 4 * (which - kLocal); k < 4 && offset < members; ++k, ++offset) {
      const auto flag = uint8_t(four >> 8 * k);
      local_flag(p, saved.local, z, token, offset) = flag;
      if (flag != 0 && p.has_bits) note_local(token, offset);
    }
  }
  if (!p.has_bits) return;

  clear_occupied(p, z, block, thread, kExchangeThreads);
  const int key_blocks = p.keys.blocks();
  const uint8_t* const of_head = flags + int64_t(z) * blocks * key_blocks;
  for (int group = thread; group < plan.reached.groups; group += kExchangeThreads) {
    uint32_t word = 0;
    for (int j = 32 * group; j < min(32 * group + 32, key_blocks); ++j) {
      const bool there = of_head[int64_t(block) * key_blocks + j] != 0;
      word |= uint32_t(there && (!p.mutual || of_head[int64_t(j) * key_blocks + block] != 0)) << j % 32;
    }
    *plan.reached.word(z, block, group) = word;
  }
  if (!arrive_last(plan.done + z, 1, blocks)) return;
  const auto local_of = [&](int i, int group) { return p.window > 0 ? load_fresh(plan.local.word(z, i, group)) : 0; };
  const auto word_of = [&](int i, int group) {
    return load_fresh(plan.reached.word(z, i, group)) | local_of(i, group);
  };
  const auto none = [](int, int) { return 0u; };
  list_tiles(
      plan.lists, z, blocks, thread, kExchangeThreads,
      [&](int i, int group) {
        // A tile of two blocks of these rows is for the first of them, if it is mutual.
        const uint32_t again = first_bits(i - 32 * group) & ~first_bits(p.rows.first - 32 * group);
        return word_of(i, group) & (p.mutual ? ~again : ~0u);
      },
      local_of, none);
  if (of_keys.entries == nullptr) return;
  list_tiles(
      of_keys, z, blocks, thread, kExchangeThreads,
      [&](int i, int group) {
        const int first = p.keys.first - 32 * group;
        return word_of(i, group) & first_bits(first + p.keys.count) & ~first_bits(first);
      },
      local_of, none);
}

}  // namespace

template <class T>
void tell_rows(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, float* numbers, uint8_t* flags,
               cudaStream_t stream) {
  launch("asa_tell_kernel", &asa_tell_kernel<T>, dim3(problem.n_heads * problem.rows.count), kExchangeThreads, 0,
         stream, problem, plan, saved, numbers, flags);
}

template <class T>
void take_rows(const Problem<T>& problem, const Plan& plan, const Lists& of_keys, const Saved<T>& saved,
               const float* numbers, const uint8_t* flags, cudaStream_t stream) {
  launch("asa_take_kernel", &asa_take_kernel<T>, dim3(problem.n_heads * problem.rows.blocks()), kExchangeThreads, 0,
         stream, problem, plan, of_keys, saved, numbers, flags);
}

#define INSTANTIATE(T)                                                                                                 \
  template void tell_rows(const Problem<T>&, const Plan&, const Saved<T>&, float*, uint8_t*, cudaStream_t);            \
  template void take_rows(const Problem<T>&, const Plan&, const Lists&, const Saved<T>&, const float*, const uint8_t*, \
                          cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
