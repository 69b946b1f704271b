// Scratch memory of a thread, and how many rows stay in its cache.

// Memory of one thread, handed out in pieces aligned to cache lines. An arena at null only counts their bytes.
struct Arena {
  char* const start;
  int64_t used = 0;
  explicit Arena(void* start) : start(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    T* const p = start == nullptr ? nullptr : reinterpret_cast<T*>(start + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

// The size of a pass's scratch, a struct whose constructor takes its pieces from an arena.
template <template <class> class Scratch, class T, class... Sizes>
int64_t bytes_of(const Problem<T>& p, Sizes... sizes) {
  Arena arena(nullptr);
  Scratch<T>(arena, p, sizes...);
  return arena.used;
}

ASA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ASA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ASA_INLINE int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t kCacheBytes = 512 * 1024;  // of the rows in use at a time: a share of a core's second-level cache

// How many rows of `numbers` stay in the cache.
template <class T>
int64_t cached_rows(int64_t numbers) {
  return larger(kBlock, kCacheBytes / (larger(1, numbers) * static_cast<int64_t>(sizeof(T))));
}
