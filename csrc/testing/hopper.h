// cuda/hopper/device.h on a CPU, on top of simt.h: barriers in shared memory, bulk copies, products of a warpgroup,
// registers handed over.
//
// As unkind as the hardware may be. From the issue of a product until the wait for its batch its registers are NaN and
// must not be touched. It reads shared memory when it is waited for and no thread can go on otherwise; with
// ASA_OPS_SIMT_REVERSED=1 when it is issued. A copy spoils its destination when it is issued and arrives when it is
// waited for and nothing else can go on, mostly later than those issued after it; reversed, at once. Now and then a
// thread that comes to a barrier dawdles before it looks whether the phase is over. What cannot be right on the hardware is an error: waiting for what never comes,
// too many arrivals, barriers used before they are there for all, a batch without fence, commit or wait, lanes or warps
// that should act alike and do not, registers that nobody gave back or that nobody took.
//
// Addressing is that of the PTX manual: the 128-byte swizzle is address bits 4 to 6 ^= bits 7 to 9, operands lie in its
// canonical layouts. It does not tell of shared memory that products or copies read without fence_proxy_async before.

#pragma once

#include "simt.h"

#include <array>
#include <cfloat>
#include <deque>
#include <list>
#include <type_traits>
#include <unordered_map>

namespace simt {

enum class Number { half, bfloat16, tf32 };

// A kind of product.
struct Form {
  Number number;
  int columns;
  bool registers, left_across, right_across;  // the left operand in registers; MN-major operands
  constexpr int depth() const { return number == Number::tf32 ? 8 : 16; }
  bool operator==(const Form& other) const {
    return number == other.number && columns == other.columns && registers == other.registers &&
           left_across == other.left_across && right_across == other.right_across;
  }
};

// What a lane shows of a product: `left` is the registers, or the descriptor in the first two.
struct Issue {
  const Form* form;
  float* sums;
  uint64_t right;
  uint32_t left[4];
  bool first;
  uint64_t left_descriptor() const { return left[0] | uint64_t(left[1]) << 32; }
};

class Hopper : public Engine {
  static constexpr int kWarps = 4;  // of a warpgroup
  static constexpr uint32_t kWindow = 0x480;  // address of dynamic shared memory: a multiple of 128, not of 1024
  static constexpr uint32_t kPoison = 0x7fc5a5a5;  // a NaN, in registers of products under way

  struct BarrierState {
    int arrivals, missing;
    int64_t bytes = 0;
    unsigned phase = 0;
    int owner;  // the thread that made it
    bool announced = false;
    unsigned announced_in = 0;  // round of __syncthreads
  };

  struct BulkCopy {
    char* to;
    const void* from;
    uint32_t bytes;
    BarrierState* barrier;
  };

  // A warp's accumulators while products are under way: 16 rows.
  struct Tile {
    int columns, uses = 0;
    float* lanes[kWarp];
    std::vector<float> numbers;
  };

  struct Product {
    Form form;
    int warp;  // of its warpgroup
    Tile* tile;
    uint64_t left, right;
    bool first;
    std::array<float, 16 * 16> rows;  // the left operand, if it came in registers
  };

  struct WarpState {
    std::list<Tile> tiles;
    std::vector<Product> open;
    std::deque<std::vector<Product>> batches;
    bool fenced = false;
    int registers = 0;
    size_t steps = 0;
    bool waits = false;  // until no more than so many batches are under way
    size_t pending = 0;
    unsigned waits_over = 0;
  };

  // Of what all warps of a warpgroup must do in the same order.
  struct Step {
    const char* what;
    uint64_t left, right, more;
  };

 public:
  Hopper() {
    Machine& m = machine();
    const int threads = static_cast<int>(m.fibers.size());
    warps_.resize(threads / kWarp);
    steps_.resize((warps_.size() + kWarps - 1) / kWarps);
    for (WarpState& warp : warps_) warp.registers = std::min(65536 / threads / 8 * 8, 248);
  }

  static Hopper& here() {
    auto& engine = machine().engine;
    if (!engine) engine.reset(new Hopper);
    return static_cast<Hopper&>(*engine);
  }

  // Shared memory.

  static uint32_t address_of(const void* at) {
    return static_cast<uint32_t>(static_cast<const char*>(at) - machine().shared.data()) + kWindow;
  }

  static char* at(uint32_t address, size_t bytes) {
    auto& shared = machine().shared;
    const size_t offset = address - kWindow;
    if (address < kWindow || offset + bytes > shared.size()) fail("an access past the ends of shared memory");
    return shared.data() + offset;
  }

  // Barriers.

  template <class B>
  void init(B* barrier, int arrivals) {
    at(address_of(barrier), sizeof(B));
    if (address_of(barrier) % 8 != 0 || arrivals < 1 || arrivals >= 1 << 20) fail("no barrier can be such");
    if (barriers_.count(barrier)) fail("a barrier is made twice");
    BarrierState& state = barriers_[barrier];
    state.arrivals = state.missing = arrivals;
    state.owner = this_thread();
    barrier->state = cookie(barrier);
  }

  void announce() {
    for (auto& [at, state] : barriers_)
      if (state.owner == this_thread() && !state.announced) {
        state.announced = true;
        state.announced_in = machine().block.round;
      }
  }

  template <class B>
  BarrierState& state_of(const B* barrier) {
    const auto found = barriers_.find(barrier);
    if (found == barriers_.end()) fail("a barrier is used that nobody made");
    if (barrier->state != cookie(barrier)) fail("a barrier was written over");
    BarrierState& state = found->second;
    if (state.owner != this_thread() && !(state.announced && machine().block.round != state.announced_in))
      fail("a barrier is used by others without barrier_init_done and __syncthreads");
    return state;
  }

  void arrive(BarrierState& state, uint32_t bytes) {
    if (state.missing == 0) fail("more arrivals at a barrier than it waits for");
    state.bytes += bytes;
    --state.missing;
    complete(state);
  }

  void wait(const BarrierState& state, uint32_t parity) {
    if (parity > 1) fail("a parity is 0 or 1");
    dawdle();
    while ((state.phase & 1) == parity) wait_for_change(state.phase, "a barrier in shared memory");
  }

  // Copies.

  void copy(void* to, const void* from, uint32_t bytes, BarrierState& barrier) {
    if (address_of(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
      fail("a bulk copy is not of whole groups of 16 bytes");
    if (!barrier.announced) fail("a copy uses a barrier before barrier_init_done");
    copies_.push_back({at(address_of(to), bytes), from, bytes, &barrier});
    if (machine().reversed)
      deliver(copies_.begin());
    else
      std::memset(copies_.back().to, 0xff, bytes);
  }

  // The products that a warp waits for, or a copy that may let somebody go on: they overtake one another, so mostly the
  // newest.
  bool advance() override {
    for (WarpState& warp : warps_)
      if (warp.waits) {
        complete_products(warp);
        warp.waits = false;
        ++warp.waits_over;
        return true;
      }
    std::vector<std::list<BulkCopy>::iterator> awaited;
    for (auto copy = copies_.begin(); copy != copies_.end(); ++copy)
      if (std::any_of(machine().fibers.begin(), machine().fibers.end(),
                      [&](const Fiber& fiber) { return !fiber.done && fiber.watched == &copy->barrier->phase; }))
        awaited.push_back(copy);
    if (!awaited.empty()) {
      deliver(chance(8) == 0 ? awaited[chance(awaited.size())] : awaited.back());
      return true;
    }
    return false;
  }

  // Registers.

  void give(int count) {
    WarpState& warp = this_warp();
    if (count > warp.registers) fail("fewer_registers of more than there are");
    pool_ += warp.registers - count;
    warp.registers = count;
    ++given_;
  }

  void take(int count) {
    WarpState& warp = this_warp();
    if (count < warp.registers) fail("more_registers of fewer than there are");
    while (warp.registers != count) {  // the first lane that finds enough takes them for its warp
      if (pool_ >= count - warp.registers) {
        pool_ -= count - warp.registers;
        warp.registers = count;
      } else {
        wait_for_change(given_, "registers");
      }
    }
  }

  // All warps of a warpgroup must come by in the same order.
  void step(const Step& next) {
    const int group = machine().current->warp / kWarps;
    if (static_cast<size_t>(group * kWarps + kWarps) > warps_.size()) fail("a warpgroup is not whole");
    std::vector<Step>& steps = steps_[group];
    size_t& mine = this_warp().steps;
    if (mine == steps.size()) {
      steps.push_back(next);
    } else if (const Step& other = steps[mine]; std::strcmp(other.what, next.what) != 0 || other.left != next.left ||
                                                other.right != next.right || other.more != next.more) {
      fail("the warps of a warpgroup differ in " + std::string(next.what));
    }
    ++mine;
  }

  // Products. Unless said otherwise these run once for a warp, when all its lanes are there.

  void fence() { this_warp().fenced = true; }

  void issue(const Exchange& slots) {
    WarpState& warp = this_warp();
    const Issue& one = shown<Issue>(slots, 0);
    const Form& form = *one.form;
    if (!warp.fenced) fail("a batch of products without products_fence before");
    for (int lane = 1; lane < kWarp; ++lane) {
      const Issue& other = shown<Issue>(slots, lane);
      if (!(*other.form == form) || other.right != one.right || other.first != one.first ||
          (!form.registers && other.left_descriptor() != one.left_descriptor()))
        fail("lanes differ in a product");
    }
    const uint64_t left = form.registers ? 0 : one.left_descriptor();
    step({"products", left, one.right,
          uint64_t(form.columns) << 8 | uint64_t(form.number) << 4 | form.registers << 3 | form.left_across << 2 |
              form.right_across << 1 | one.first});
    Product product{form, machine().current->warp % kWarps, &tile_of(warp, slots), left, one.right, one.first, {}};
    if (form.registers) take_rows(slots, form, product.rows.data());
    ++product.tile->uses;
    if (machine().reversed) run(product);
    warp.open.push_back(product);
  }

  void commit() {
    WarpState& warp = this_warp();
    machine().products += static_cast<int64_t>(warp.open.size());
    warp.batches.push_back(std::exchange(warp.open, {}));
    warp.fenced = false;
  }

  void wait_for_products(size_t pending) {
    WarpState& warp = this_warp();
    warp.pending = pending;
    warp.waits = !machine().reversed && warp.batches.size() > pending;
    if (!warp.waits) complete_products(warp);
  }

  // By every lane.
  void await_products() {
    const WarpState& warp = this_warp();
    if (warp.waits) wait_for_change(warp.waits_over, "products");
  }

  // By every lane too.
  void settled(const float* numbers) {
    for (const Tile& tile : this_warp().tiles)
      if (tile.lanes[machine().current->lane] == numbers) fail("sums are taken as settled before the wait for them");
  }

  void finish() override {
    if (!copies_.empty()) fail("copies are under way at its end");
    if (pool_ != 0) fail("registers were given back that nobody took");
    for (const auto& [at, state] : barriers_) {
      if (state.bytes != 0) fail("bytes of copies are not those that a barrier was to expect");
      if (state.missing != state.arrivals) fail("arrivals at a barrier are too few or too many for whole phases");
    }
    for (size_t i = 0; i < warps_.size(); ++i) {
      const WarpState& warp = warps_[i];
      if (!warp.open.empty()) fail("products are not committed at its end");
      if (!warp.tiles.empty()) fail("products are not waited for at its end");
      if (warp.steps != steps_[i / kWarps].size()) fail("the warps of a warpgroup differ in their last products");
    }
  }

 private:
  static int this_thread() { return machine().current->thread.x; }
  WarpState& this_warp() { return warps_[machine().current->warp]; }
  static uint64_t cookie(const void* barrier) { return reinterpret_cast<uintptr_t>(barrier) ^ 0x9e3779b97f4a7c15; }
  static uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

  static void complete(BarrierState& state) {
    if (state.missing != 0 || state.bytes != 0) return;
    state.missing = state.arrivals;
    ++state.phase;
  }

  void deliver(std::list<BulkCopy>::iterator copy) {
    std::memcpy(copy->to, copy->from, copy->bytes);
    copy->barrier->bytes -= copy->bytes;
    complete(*copy->barrier);
    copies_.erase(copy);
  }

  // Calls put(i, k, number) for rows i from `begin` on, k along the summed index.
  template <class Put>
  static void decode(uint64_t descriptor, Number number, bool across, int begin, int end, Put put) {
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    if (descriptor >> 62 != 1 || (descriptor >> 46 & 0xffff) != 0) fail("not a descriptor of a swizzled operand");
    const uint32_t start = field(0), lead = field(16), stride = field(32);
    const float* const halves = asa_ops::cuda::half_values().data();
    const auto take = [&](uint32_t offset, auto each) {  // the numbers of 16 bytes
      const char* const group = at(swizzled(start + offset), 16);
      if (number == Number::tf32) {
        for (int j = 0; j < 4; ++j) {
          uint32_t bits;
          std::memcpy(&bits, group + 4 * j, 4);
          each(j, asa_ops::cuda::bits_as<float>(bits & 0xffffe000));
        }
      } else {
        uint16_t bits[8];
        std::memcpy(bits, group, 16);
        for (int j = 0; j < 8; ++j)
          each(j, number == Number::half ? halves[bits[j]] : asa_ops::cuda::bits_as<float>(uint32_t(bits[j]) << 16));
      }
    };
    if (across) {
      for (int k = 0; k < 16; ++k)
        for (int i = begin; i < end; i += 8)
          take(i % 64 * 2 + i / 64 * lead + k % 8 * 128 + k / 8 * stride, [&](int j, float x) { put(i + j, k, x); });
    } else {
      const int in_group = number == Number::tf32 ? 4 : 8;
      for (int i = begin; i < end; ++i)
        for (int half = 0; half < 2; ++half)
          take(i % 8 * 128 + i / 8 * stride + half * 16, [&](int j, float x) { put(i, half * in_group + j, x); });
    }
  }

  // The left operand from the registers of a warp: 16 rows.
  static void take_rows(const Exchange& slots, const Form& form, float* rows) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int r = 0; r < 4; ++r) {
        const uint32_t bits = shown<Issue>(slots, lane).left[r];
        float* const row = rows + (lane / 4 + r % 2 * 8) * 16;
        if (form.number == Number::tf32) {
          row[lane % 4 + r / 2 * 4] = asa_ops::cuda::bits_as<float>(bits & 0xffffe000);
        } else {
          for (int i = 0; i < 2; ++i) {
            const auto half = static_cast<uint16_t>(bits >> 16 * i);
            row[lane % 4 * 2 + i + r / 2 * 8] = form.number == Number::half ? to_float(asa_ops::cuda::Half{half})
                                                                            : to_float(asa_ops::cuda::BFloat16{half});
          }
        }
      }
  }

  // The tile of accumulators under way, or one that now is.
  static Tile& tile_of(WarpState& warp, const Exchange& slots) {
    const Issue& one = shown<Issue>(slots, 0);
    const int columns = one.form->columns;
    for (Tile& tile : warp.tiles) {
      if (one.sums + columns / 2 <= tile.lanes[0] || tile.lanes[0] + tile.columns / 2 <= one.sums) continue;
      if (one.sums != tile.lanes[0] || columns != tile.columns) fail("products of two shapes share registers");
      return tile;
    }
    warp.tiles.emplace_back();
    Tile& tile = warp.tiles.back();
    tile.columns = columns;
    tile.numbers.resize(16 * columns);
    for (int lane = 0; lane < kWarp; ++lane) tile.lanes[lane] = shown<Issue>(slots, lane).sums;
    const float poison = asa_ops::cuda::bits_as<float>(kPoison);
    each(tile, [&](float& mine, float& number) {
      number = mine;
      std::memcpy(&mine, &poison, sizeof(mine));
    });
    return tile;
  }

  // Calls act(number of a lane, number of the tile).
  template <class Tile, class Act>
  static void each(Tile& tile, Act act) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int n = 0; n < tile.columns / 8; ++n)
        for (int i = 0; i < 4; ++i)
          act(tile.lanes[lane][4 * n + i],
              tile.numbers[(lane / 4 + i / 2 * 8) * tile.columns + 8 * n + lane % 4 * 2 + i % 2]);
  }

  static void write_back(const Tile& tile) {
    each(tile, [](float& mine, float number) {
      if (asa_ops::cuda::bits_as<uint32_t>(mine) != kPoison) fail("registers of products under way were written");
      mine = number;
    });
  }

  void complete_products(WarpState& warp) {
    for (; warp.batches.size() > warp.pending; warp.batches.pop_front())
      for (const Product& product : warp.batches.front()) {
        if (!machine().reversed) run(product);
        --product.tile->uses;
      }
    warp.tiles.remove_if([](const Tile& tile) {
      if (tile.uses == 0) write_back(tile);
      return tile.uses == 0;
    });
  }

  static void run(const Product& product) {
    float rows[16 * 16];
    const float* left = product.rows.data();
    if (!product.form.registers) {
      const int begin = product.warp * 16;
      decode(product.left, product.form.number, product.form.left_across, begin, begin + 16,
             [&](int i, int k, float x) { rows[(i - begin) * 16 + k] = x; });
      left = rows;
    }
    float* const sums = product.tile->numbers.data();
    if (product.first) std::fill(product.tile->numbers.begin(), product.tile->numbers.end(), 0.0f);
    switch (product.form.columns) {
      case 64: add<64>(sums, left, product); break;
      case 128: add<128>(sums, left, product); break;
      default: add<256>(sums, left, product);
    }
    if (machine().ulps != 0)
      for (float& sum : product.tile->numbers) sum = rounded(sum);
  }

  template <int N>
  static void add(float* sums, const float* left, const Product& product) {
    float right[16 * N];
    decode(product.right, product.form.number, product.form.right_across, 0, N,
           [&](int j, int k, float x) { right[k * N + j] = x; });
    constexpr int kPart = 32;  // so many sums fit registers
    for (int i = 0; i < 16; ++i)
      for (int part = 0; part < N; part += kPart) {
        float partial[kPart];
        std::copy_n(sums + i * N + part, kPart, partial);
        for (int k = 0; k < product.form.depth(); ++k)
          for (int j = 0; j < kPart; ++j) partial[j] += left[i * 16 + k] * right[k * N + part + j];
        std::copy_n(partial, kPart, sums + i * N + part);
      }
  }

  std::unordered_map<const void*, BarrierState> barriers_;
  std::list<BulkCopy> copies_;
  std::vector<WarpState> warps_;
  std::vector<std::vector<Step>> steps_;  // of warpgroups
  int pool_ = 0;  // registers a lane that were given back, of warps
  unsigned given_ = 0;
};

}  // namespace simt

namespace asa_ops::cuda {

inline uint32_t shared_address(const void* at) { return simt::Hopper::address_of(at); }

inline uint32_t opaque(uint32_t x) { return x; }
inline int thread_number() { return int(threadIdx.x); }

inline int uniform(int x) {
  const simt::Exchange& slots = simt::exchange("uniform", x);
  const int first = simt::shown<int>(slots, 0);
  if (x != first) simt::fail("lanes differ in what is uniform");
  return first;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline void barrier_init(Barrier* barrier, int arrivals) { simt::Hopper::here().init(barrier, arrivals); }
inline void barrier_init_done() { simt::Hopper::here().announce(); }
inline void barrier_arrive(Barrier* barrier) {
  auto& hopper = simt::Hopper::here();
  hopper.arrive(hopper.state_of(barrier), 0);
}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  auto& hopper = simt::Hopper::here();
  hopper.arrive(hopper.state_of(barrier), bytes);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  auto& hopper = simt::Hopper::here();
  hopper.wait(hopper.state_of(barrier), parity);
}

inline void fence_proxy_async() {}

inline void copy_bytes(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  auto& hopper = simt::Hopper::here();
  hopper.copy(to, from, bytes, hopper.state_of(barrier));
}

template <int COUNT>
void more_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  simt::collect("setmaxnreg", COUNT,
                [](const simt::Exchange&) { simt::Hopper::here().step({"their registers", 0, 0, COUNT}); });
  simt::Hopper::here().take(COUNT);
}
template <int COUNT>
void fewer_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  simt::collect("setmaxnreg", COUNT, [](const simt::Exchange&) {
    simt::Hopper::here().step({"their registers", 0, 0, COUNT});
    simt::Hopper::here().give(COUNT);
  });
}

inline void products_fence() {
  simt::collect("products_fence", 0, [](const simt::Exchange&) { simt::Hopper::here().fence(); });
}
inline void products_commit() {
  simt::collect("products_commit", 0, [](const simt::Exchange&) { simt::Hopper::here().commit(); });
}
template <int PENDING>
void products_wait() {
  simt::collect("products_wait", 0, [](const simt::Exchange&) { simt::Hopper::here().wait_for_products(PENDING); });
  simt::Hopper::here().await_products();
}
template <int N>
void settled(float (&x)[N]) {
  simt::Hopper::here().settled(x);
}
template <int N>
void settled(uint32_t (&)[N]) {}

template <class T, int N>
struct Product {
  static constexpr simt::Number kNumber = std::is_same_v<T, Half>       ? simt::Number::half
                                          : std::is_same_v<T, BFloat16> ? simt::Number::bfloat16
                                                                        : simt::Number::tf32;
  template <int TA = 0, int TB = 0>
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool first) {
    static_assert((TA == 0 && TB == 0) || !std::is_same_v<T, TF32>, "TF32 is read K-major");
    static constexpr simt::Form form{kNumber, N, false, TA != 0, TB != 0};
    issue({&form, d, b, {static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), 0, 0}, first});
  }
  template <int TB = 0>
  static void registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool first) {
    static_assert(TB == 0 || !std::is_same_v<T, TF32>, "TF32 is read K-major");
    static constexpr simt::Form form{kNumber, N, true, false, TB != 0};
    issue({&form, d, b, {a0, a1, a2, a3}, first});
  }

 private:
  static void issue(const simt::Issue& issue) {
    simt::collect("products", issue, [](const simt::Exchange& slots) { simt::Hopper::here().issue(slots); });
  }
};

}  // namespace asa_ops::cuda
