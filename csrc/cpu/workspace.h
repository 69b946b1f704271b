// The memory and the threads of a call.
#pragma once

#include "asa/problem.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace asa_ops::cpu {

constexpr int64_t kHugePage = 2 * 1024 * 1024;

// Faulting in fresh memory by 4 KB pages can take longer than the computation.
inline void prefer_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#endif
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

inline Buffer allocate(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePage / 2 ? kHugePage : 64, size = (bytes / alignment + 1) * alignment;
  void* const p = std::aligned_alloc(alignment, size);
  STD_TORCH_CHECK(p != nullptr, "asa_ops: no memory for ", bytes, " bytes of scratch");
  prefer_huge_pages(p, size);
  return Buffer(static_cast<char*>(p));
}

// Memory for the passes of a call, handed out in pieces and then an equal share for every thread.
class Workspace {
 public:
  explicit Workspace(int64_t threads) : threads_(threads) {}

  // Reserves a piece of `count` numbers; get() returns it once all is allocated.
  template <class U>
  struct Piece {
    int64_t offset;
    U* get(const Workspace& w) const { return reinterpret_cast<U*>(w.buffer_.get() + offset); }
  };
  template <class U>
  Piece<U> add(int64_t count) {
    const Piece<U> piece{bytes_};
    bytes_ += rounded(count * static_cast<int64_t>(sizeof(U)));
    return piece;
  }

  void add_share(int64_t bytes) { share_ = std::max(share_, rounded(bytes)); }

  void allocate_all() {
    size_ = bytes_ + share_ * threads_;
    if (size_ <= last_size_) {
      size_ = std::exchange(last_size_, 0);
      buffer_ = std::move(last_);
    } else {
      if (size_ <= kKept) last_ = nullptr, last_size_ = 0;  // this one will take its place
      buffer_ = allocate(size_);
    }
  }

  // A thread keeps its last workspace if it is small: the system would zero a new one page by page in every call.
  ~Workspace() {
    if (size_ > kKept || size_ <= last_size_) return;
    last_ = std::move(buffer_);
    last_size_ = size_;
  }

  int64_t threads() const { return threads_; }
  void* share(int64_t thread) const { return buffer_.get() + bytes_ + thread * share_; }

 private:
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static constexpr int64_t kKept = 32 * 1024 * 1024;
  const int64_t threads_;
  int64_t bytes_ = 0, share_ = 0, size_ = 0;
  Buffer buffer_;
  static inline thread_local Buffer last_;
  static inline thread_local int64_t last_size_ = 0;
};

// Runs pass(queue, scratch) on the workspace's threads until the queue is empty.
template <class F>
void run(Queue queue, const Workspace& workspace, const F& pass) {
  const auto work = [&](int64_t thread, int64_t) { pass(queue, workspace.share(thread)); };
  torch::stable::parallel_for(0, std::min(queue.end - queue.next, workspace.threads()), 1, work);
  STD_TORCH_CHECK(!queue.failed, "asa_ops: the numbers of survivors are not those of the bits");
}

// Runs f(head, threads) for every head: side by side where there are enough of them, else one after the other, each on
// all threads.
template <class F>
void for_heads(int64_t heads, const F& f) {
  std::string failure;  // thrown across the stable ABI its message would be lost, and std::exception_ptr is too new
  std::mutex mutex;
  const int64_t all = torch::stable::get_num_threads();
  const bool side_by_side = heads >= all;
  const auto some = [&](int64_t begin, int64_t end) {
    try {
      for (int64_t head = begin; head < end; ++head) f(head, side_by_side ? 1 : all);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = error.what();
    }
  };
  if (side_by_side)
    torch::stable::parallel_for(0, heads, 1, some);
  else
    some(0, heads);
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace asa_ops::cpu
