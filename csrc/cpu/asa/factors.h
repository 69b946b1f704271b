// Matrices packed for products of whole rows: in panels of numbers T or, where AMX forms these products, in its tiles.
#pragma once

#include "../../asa.h"
#include "../isa.h"
#include "../workspace.h"
#include "problem.h"

#include <type_traits>

namespace asa_ops::cpu {

// Whether a number in rows of fp16 that are real is infinite.
inline bool any_infinite(const Rows& x, int64_t n, const bool* real) {
  const auto* const bits = static_cast<const uint16_t*>(x.numbers);
  for (int64_t i = 0; i < n; ++i) {
    if (real != nullptr && !real[i]) continue;
    bool found = false;
    for (int64_t d = 0; d < x.dim; ++d) found |= (bits[i * x.stride_n + d * x.stride_d] & 0x7FFF) == 0x7C00;
    if (found) return true;
  }
  return false;
}

// Problem::parts of a head with these queries, keys and gradients, if there are. An infinite number of fp16 has no
// second part: 0 would make NaN of its products with the second parts of others.
template <class T>
int64_t parts_of(const Problem<T>& p, const Rows& q, const Rows& k, const Rows* d_out = nullptr) {
  if (!std::is_same_v<T, float> || !uses_amx()) return 0;
  if (q.type == Type::bfloat16) return 1;
  const bool finite = q.type == Type::half && !any_infinite(q, p.n_q, p.real_q) && !any_infinite(k, p.n_k, p.real_k) &&
                      !(d_out && any_infinite(*d_out, p.n_q, p.real_q));
  return finite ? 2 : 0;
}

// x[n][dim] in panels, slices or blocks, in memory of a workspace; null if they are not needed.
enum class Packing { panels, slices, blocks };
template <class T>
class Packed {
 public:
  Packed(const Kernels<T>& kernels, int64_t n, int64_t dim, bool needed, Packing how, Workspace& workspace)
      : kernels_(kernels), n_(n), dim_(dim), needed_(needed), how_(how) {
    const int64_t panels = kernels.panels(n), blocks = (n + kBlock - 1) / kBlock;
    pieces_ = how == Packing::blocks ? blocks : panels;
    const int64_t size = how == Packing::panels   ? panels * kernels.panel_size(dim)
                         : how == Packing::blocks ? blocks * kBlock * dim
                                                  : n * dim;
    numbers_ = workspace.add<T>(needed ? size : 0);
  }

  T* pack(const T* x, const Workspace& workspace) const {
    if (!needed_) return nullptr;
    T* const numbers = numbers_.get(workspace);
    const auto run_all = how_ == Packing::panels   ? kernels_.pack_panels
                         : how_ == Packing::slices ? kernels_.pack_slices
                                                   : kernels_.pack_blocks;
    run({0, pieces_}, workspace, [&](Queue& queue, void*) { run_all(x, n_, dim_, numbers, queue); });
    return numbers;
  }

 private:
  const Kernels<T>& kernels_;
  int64_t n_, dim_, pieces_;
  bool needed_;
  Packing how_;
  Workspace::Piece<T> numbers_;
};

// The same in tiles, as sums of so many bf16 numbers; null if that is 0. With kinds, of whole rows only.
template <class T>
class Tiles {
 public:
  Tiles(const Kernels<T>& kernels, int64_t n, int64_t dim, int64_t parts, Tiled how, Workspace& workspace,
        const Kind* kinds = nullptr)
      : kernels_(kernels), n_(n), dim_(dim), parts_(parts), how_(how), kinds_(kinds) {
    tiles_ = workspace.add<uint16_t>(tiles_size(n, dim, parts));
  }

  uint16_t* pack(const T* x, const Workspace& workspace) const {
    if (parts_ == 0) return nullptr;
    uint16_t* const tiles = tiles_.get(workspace);
    run({0, (n_ + kSquare - 1) / kSquare}, workspace,
        [&](Queue& queue, void*) { kernels_.pack_tiles(x, n_, dim_, parts_, how_, kinds_, tiles, queue); });
    return tiles;
  }

 private:
  const Kernels<T>& kernels_;
  int64_t n_, dim_, parts_;
  Tiled how_;
  const Kind* kinds_;
  Workspace::Piece<uint16_t> tiles_;
};

}  // namespace asa_ops::cpu
