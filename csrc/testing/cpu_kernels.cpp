// The CPU kernels of one instruction set, against their formulas in plain loops in double: a program without torch.
//
//   g++ -std=c++20 -O3 -DASA_SOURCE='"../cpu/isa_portable.cpp"' csrc/testing/cpu_kernels.cpp -o kernels && ./kernels
//
// It prints a line a check, with the largest error in units of what is allowed. That is what rounding may do at worst,
// carried through the formulas: u = 2^-24 or 2^-53 an operation, n u a sum of n terms, and the bound that exponential()
// states. No score may lie so near a threshold that rounding decides. tests/asa/test_cpu.py runs the program for this
// machine's instruction sets and, in an emulator, for ARM.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../cpu/asa/kth_largest.cpp"

#include ASA_SOURCE

namespace asa_ops::cpu::ASA_ISA::testing {
namespace {

int failures = 0;

// One line: the largest error in units of what is allowed. NaN fails.
void report(const std::string& name, double worst) {
  const bool ok = worst <= 1;
  failures += !ok;
  std::printf("%s: %.2g %s\n", name.c_str(), worst, ok ? "ok" : "WRONG");
  std::fflush(stdout);  // what follows may crash
}

void require(const std::string& name, bool ok) { report(name, ok ? 0 : std::nan("")); }

// The larger one, or NaN.
double worse(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// |x - y| in units of what is allowed.
double error_of(double x, double y, double allowed) {
  if (x == y) return 0;
  return std::isfinite(x) && std::isfinite(y) ? std::fabs(x - y) / allowed : std::nan("");
}

template <class T>
const char* name_of = sizeof(T) == 4 ? "float" : "double";

template <class T>
constexpr double kUnit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

#if defined(ASA_AVX512) || defined(ASA_AVX2) || defined(ASA_NEON)
constexpr bool kFused = true;  // multiply-adds
#else
constexpr bool kFused = false;
#endif

// The relative error of exponential() for arguments that reach down to -range.
template <class T>
double exponential_error(double range) {
  if (sizeof(T) == 8) return kUnit<T> * (4 + range);
  return 2.5e-7 + (kFused ? 0 : 1e-7 * std::min(range * 1.4427, 126.0));
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t bits() {  // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Du;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

// Memory that starts as NaN and -1, between guards.
template <class U>
class Memory {
 public:
  explicit Memory(int64_t count)
      : bytes_(count * sizeof(U)), all_((bytes_ + 3 * kGuard - 1) / kGuard * kGuard, static_cast<char>(0xFF)) {
    start_ = static_cast<char*>(std::aligned_alloc(kGuard, all_.size()));
    std::memcpy(start_, all_.data(), all_.size());
  }
  ~Memory() {
    const bool same = std::equal(start_, start_ + kGuard, all_.data()) &&
                      std::equal(start_ + kGuard + bytes_, start_ + all_.size(), all_.data());
    if (!same) require("memory past the ends", false);
    std::free(start_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  U* data() const { return reinterpret_cast<U*>(start_ + kGuard); }
  U& operator[](int64_t i) const { return data()[i]; }
  void fill(int64_t count, U value) { std::fill_n(data(), count, value); }

 private:
  static constexpr size_t kGuard = 64;
  size_t bytes_;
  std::vector<char> all_;
  char* start_;
};

// Runs a pass over blocks [begin, end).
template <class F>
bool run(int64_t begin, int64_t end, int64_t bytes, const F& pass) {
  const Memory<char> scratch(bytes);
  Queue queue{begin, end};
  pass(queue, scratch.data());
  return !queue.failed;
}

// simd.h

template <class T>
void check_vectors() {
  constexpr int kCount = kLanes<T>;
  const double infinity = kInfinity, nan = std::nan("");
  const double values[] = {0.0, -0.0, 1.0, -1.5, 3.0, infinity, -infinity, nan};
  const std::string of = std::string(" of ") + name_of<T>;
  const auto same = [](T x, T y) {
    return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y);
  };
  bool extremes = true, comparisons = true, choices = true;
  Random random(1);
  for (int repeat = 0; repeat < 1000; ++repeat) {
    T a[kCount], b[kCount], large[kCount], chosen[kCount];
    for (int r = 0; r < kCount; ++r) a[r] = T(values[random.bits() % 8]), b[r] = T(values[random.bits() % 8]);
    const uint64_t bits = random.bits(), lanes = (uint64_t{1} << kCount) - 1;  // choose() ignores higher bits
    store(large, maximum(load(a), load(b)));
    store(chosen, choose(bits, load(a), load(b)));
    uint64_t above = 0, reaching = 0;
    for (int r = 0; r < kCount; ++r) {
      above |= static_cast<uint64_t>(a[r] > b[r]) << r, reaching |= static_cast<uint64_t>(a[r] >= b[r]) << r;
      extremes &= a[r] == b[r] ? large[r] == a[r] : same(large[r], a[r] > b[r] ? a[r] : b[r]);
      choices &= same(chosen[r], bits >> r & 1 ? a[r] : b[r]);
    }
    comparisons &= greater(load(a), load(b)) == above && at_least(load(a), load(b)) == reaching && above <= lanes;
  }
  require("maximum" + of, extremes);
  require("greater, at_least" + of, comparisons);
  require("choose" + of, choices);

  Vec<T> x[4];
  double expected[4] = {}, wrong = 0;
  T sums[4], most = T(-kInfinity);
  for (int i = 0; i < 4; ++i)
    for (int r = 0; r < kCount; ++r) {
      x[i][r] = T(1 + i * 100 + r * r);  // sums are exact
      expected[i] += 1 + i * 100 + r * r;
      most = std::max(most, T(x[0][r]));
    }
  sums_of_four(x, sums);
  for (int i = 0; i < 4; ++i) wrong += sums[i] != T(expected[i]) || sum_of<T>(x[i]) != sums[i];
  require("sums_of_four, sum_of, largest_of" + of, wrong == 0 && largest_of<T>(x[0]) == most);

  bool parts = true;
  for (int n = 0; n <= kCount; ++n) {
    T from[kCount], loaded[kCount], stored[kCount + 1];
    for (int r = 0; r < kCount; ++r) from[r] = T(r + 1), stored[r] = -1;
    stored[kCount] = -1;
    store(loaded, load_some(from, n));
    store_some(stored, n, load(from));
    for (int r = 0; r < kCount; ++r) parts &= loaded[r] == T(r < n ? r + 1 : 0) && stored[r] == T(r < n ? r + 1 : -1);
    parts &= stored[kCount] == -1;
  }
  require("load_some, store_some" + of, parts);
}

template <class T>
void check_exponential() {
  const auto at = [](double x) { return static_cast<double>(exponential(splat(T(x)))[kLanes<T> - 1]); };
  const double infinity = kInfinity, step = 1e-4;
  double worst = 0;
  for (double x = -86.6; x < 88.37; x += step) {
    const double exact = std::exp(static_cast<double>(T(x)));
    const double allowed = sizeof(T) == 4 ? exponential_error<T>(std::fabs(x)) : 2 * kUnit<T>;
    worst = worse(worst, error_of(at(x), exact, allowed * exact));
  }
  report(std::string("exponential of ") + name_of<T>, worst);
  bool limits = at(0) == 1 && std::isnan(at(std::nan(""))) && at(1000) == infinity;
  limits &= !(at(infinity) < infinity);
  for (const double x : {-88.0, -200.0, -1e30, -infinity}) limits &= at(x) == (sizeof(T) == 4 ? 0 : std::exp(x));
  require(std::string("exponential beyond the range of ") + name_of<T>, limits);
}

template <class T>
void check_logarithm() {
  const auto at = [](double x) { return static_cast<double>(logarithm(splat(T(x)))[kLanes<T> - 1]); };
  const double infinity = kInfinity;
  double worst = 0;
  for (double x = 2e-38; x < 1e38; x *= 1.0003) {
    const double exact = std::log(static_cast<double>(T(x)));
    const double last_place = std::ldexp(2 * kUnit<T>, std::ilogb(exact));
    worst = worse(worst, error_of(at(x), exact, std::max(2 * last_place, sizeof(T) == 4 ? 1e-7 : 0)));
  }
  report(std::string("logarithm of ") + name_of<T>, worst);
  const bool limits = at(1) == 0 && at(0) == -infinity && at(infinity) == infinity && std::isnan(at(-1)) &&
                      std::isnan(at(std::nan(""))) && std::fabs(at(0x1p-140) / std::log(0x1p-140) - 1) < 4 * kUnit<T>;
  require(std::string("logarithm beyond the range of ") + name_of<T>, limits);
}

#if !defined(ASA_AVX512)
void check_minimum() {
  const float nan = std::nanf("");
  const auto smaller_of = [](float a, float b) { return minimum(splat(a), splat(b))[0]; };
  require("minimum",
          smaller_of(1, 2) == 1 && smaller_of(2, 1) == 1 && std::isnan(smaller_of(1, nan)) && smaller_of(nan, 1) == 1);
}
#endif

void check_transpose() {
  Random random(2);
  uint64_t x[64], y[64];
  for (int r = 0; r < 64; ++r) x[r] = y[r] = random.bits();
  transpose64(y);
  bool right = true;
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 64; ++c) right &= (x[r] >> c & 1) == (y[c] >> r & 1);
  require("transpose64", right);
}

// Adaptive sparse attention

// Multipliers are such that about `share` of a row's keys lies above its threshold; share 0: there is no alpha.
struct Case {
  const char* name = "";
  int64_t n_q = 0, n_k = 0, dim = 0, dim_v = 0;
  bool in_vectors = false;  // head dims, of float32
  double share = 0;
  bool reciprocal = false;
  int64_t topk = 0, height = 0, width = 0, window = 0;
  int64_t depth = 1, slices = 1;  // of the grid, and of the window
  double padding = 0;  // share of the tokens
  double sharpness = 1;  // of the scores
  bool alike = false;  // eight rows each have almost the same query
  bool uneven = false;  // every other sixteen rows have few neighbours
  double shy = 0;  // of every 40 tokens one has few neighbours, and a key this many times as long; 0: none has
  bool climbing = false;  // the later a key the larger its scores, by far
  int64_t at_a_time = kBlock;
};

struct Matrix {
  int64_t columns;
  std::vector<double> x;
  Matrix(int64_t rows, int64_t columns) : columns(columns), x(rows * columns) {}
  double& operator()(int64_t i, int64_t j) { return x[i * columns + j]; }
  double operator()(int64_t i, int64_t j) const { return x[i * columns + j]; }
};

// The threshold in the widest gap between scores [from, to] of sorted ones, descending.
double threshold(const std::vector<double>& sorted, int64_t from, int64_t to) {
  double widest = -1, middle = sorted.front() - 1;
  for (int64_t x = std::max<int64_t>(1, from); x <= std::min<int64_t>(to, sorted.size() - 1); ++x)
    if (const double gap = sorted[x - 1] - sorted[x]; gap > widest)
      widest = gap, middle = (sorted[x - 1] + sorted[x]) / 2;
  return middle;
}

// A problem, its outputs and gradients in double, and how far rounding may move each.
template <class T>
struct Example {
  const Case c;
  std::vector<T> q, k, v, d_out, alpha, beta;
  std::unique_ptr<bool[]> real;
  double scale;
  bool thresholded;
  int64_t n_real;
  const double band = 2;

  Matrix s, weight_size;  // weight_size: sum over d of |q_d k_d|, scaled
  std::vector<double> lse, log_mean, kappa, lse_kept, delta;
  std::vector<std::vector<bool>> neighbour, local, kept;
  double score_error = 0, weight_error = 0;  // of a score, and of exp(score - lse), relative
  double margin = kInfinity;  // of the score nearest to a threshold, in units of what rounding may move both

  Matrix out, out_allowed, dq, dq_allowed, dk, dk_allowed, dv, dv_allowed;
  std::vector<double> dalpha, dalpha_allowed, dbeta, dbeta_allowed;

  Example(const Case& c, uint64_t seed)
      : c(c),
        scale(static_cast<double>(T(c.sharpness / std::sqrt(static_cast<double>(c.dim))))),
        thresholded(c.share > 0 || c.topk > 0),
        s(c.n_q, c.n_k),
        weight_size(c.n_q, c.n_k),
        out(c.n_q, c.dim_v),
        out_allowed(out),
        dq(c.n_q, c.dim),
        dq_allowed(dq),
        dk(c.n_k, c.dim),
        dk_allowed(dk),
        dv(c.n_k, c.dim_v),
        dv_allowed(dv) {
    Random random(seed);
    make_tokens(random);
    make_scores();
    find_survivors();
    if (is_clear()) differentiate();
  }

  // Whether rounding decides about no pair.
  bool is_clear() const { return margin > 2; }

  bool is_real(int64_t j) const { return real == nullptr || real[j]; }
  bool is_query(int64_t i) const { return c.n_q != c.n_k || is_real(i); }

  int64_t positions() const { return c.slices * c.window * c.window; }

  template <class F>
  void window(int64_t i, const F& f) const {
    const auto place = [&](int64_t j, int64_t axis) {
      return axis == 0 ? j / c.width / c.height : axis == 1 ? j / c.width % c.height : j % c.width;
    };
    for (int64_t j = 0; j < c.n_k; ++j) {
      int64_t offset = 0;
      bool inside = is_real(j);
      for (int64_t axis = 0; axis < 3; ++axis) {
        const int64_t side = axis == 0 ? c.slices : c.window, at = place(j, axis) - place(i, axis) + side / 2;
        inside = inside && at >= 0 && at < side;
        offset = offset * side + at;
      }
      if (inside) f(j, offset);
    }
  }

 private:
  void make_tokens(Random& random) {
    const auto fill = [&](std::vector<T>& x, int64_t n, int64_t dim) {
      x.resize(n * dim);
      for (T& y : x) y = T(random.normal());
    };
    fill(q, c.n_q, c.dim), fill(k, c.n_k, c.dim), fill(v, c.n_k, c.dim_v), fill(d_out, c.n_q, c.dim_v);
    for (int64_t i = 0; c.alike && i < c.n_q; ++i)
      for (int64_t d = 0; d < c.dim; ++d)
        q[i * c.dim + d] = T(q[i / 8 * 8 * c.dim + d] + (i % 8 ? 0.02 : 0) * random.normal());
    for (int64_t j = 7; c.shy > 0 && j < c.n_k; j += 40)
      for (int64_t d = 0; d < c.dim; ++d) k[j * c.dim + d] *= T(c.shy);
    for (int64_t i = 0; c.climbing && i < c.n_q; ++i) q[i * c.dim] = 4;
    for (int64_t j = 0; c.climbing && j < c.n_k; ++j)
      k[j * c.dim] = T((static_cast<double>(j) / c.n_k - 0.5) * 70 / (4 * scale) * 3);
    if (c.padding == 0) return;
    real = std::make_unique<bool[]>(c.n_k);
    for (int64_t j = 0; j < c.n_k; ++j) {
      real[j] = random.uniform() >= c.padding;
      if (real[j]) continue;
      std::fill_n(k.data() + j * c.dim, c.dim, T(0)), std::fill_n(v.data() + j * c.dim_v, c.dim_v, T(0));
      if (c.n_q != c.n_k) continue;
      std::fill_n(q.data() + j * c.dim, c.dim, T(0)), std::fill_n(d_out.data() + j * c.dim_v, c.dim_v, T(0));
    }
  }

  void make_scores() {
    lse.assign(c.n_q, -kInfinity), kappa.assign(c.n_q, -kInfinity);
    n_real = 0;
    for (int64_t j = 0; j < c.n_k; ++j) n_real += is_real(j);
    double largest = 0, largest_size = 0, range = 0, logarithm = 0, gap = kInfinity;
    for (int64_t i = 0; i < c.n_q; ++i) {
      std::vector<double> row;
      for (int64_t j = 0; j < c.n_k; ++j) {
        double& sum = s(i, j);
        for (int64_t d = 0; d < c.dim; ++d) {
          const double x = scale * q[i * c.dim + d] * k[j * c.dim + d];
          sum += x, weight_size(i, j) += std::fabs(x);
        }
        largest = std::max(largest, std::fabs(sum)), largest_size = std::max(largest_size, weight_size(i, j));
        if (is_real(j)) row.push_back(sum);
      }
      if (row.empty()) continue;
      std::sort(row.begin(), row.end(), std::greater<double>());
      range = std::max(range, row.front() - row.back());
      double sum = 0;
      for (const double x : row) sum += std::exp(x - row.front());
      const double value = row.front() + std::log(sum);
      if (is_query(i)) lse[i] = value;
      logarithm = std::max(logarithm, std::fabs(value));
      if (c.topk) {
        kappa[i] = row[c.topk - 1];
        if (c.topk < n_real && is_query(i)) gap = std::min(gap, row[c.topk - 1] - row[c.topk]);
      }
      if (c.share > 0) {
        const bool few = (c.uneven && i / 16 % 2) || (c.shy > 0 && i % 40 == 7);
        const double share = few ? 0.04 : c.share;
        const auto rank = static_cast<int64_t>(share * static_cast<double>(row.size()));
        const double t = threshold(row, rank - 3, rank + 3);
        alpha.push_back(is_query(i) ? T(std::exp(t - value) * n_real) : T(1));
      }
    }
    score_error = kUnit<T> * ((c.dim + 4) * largest_size + 2 * largest);
    margin = gap / (2 * score_error);
    // Both of numerator and shift, and the sum of exponentials.
    weight_error = 2 * (2 * score_error + exponential_error<T>(range) + 2 * kUnit<T> * (largest + logarithm)) +
                   kUnit<T> * (c.n_k + 8);
  }

  void find_survivors() {
    neighbour.assign(c.n_q, std::vector<bool>(c.n_k)), local = kept = neighbour;
    log_mean.assign(c.n_q, -kInfinity), lse_kept = log_mean;
    const auto is_above = [&](double x) {  // the threshold
      margin = std::min(margin, std::fabs(x) / (score_error + weight_error));
      return x > 0;
    };
    for (int64_t i = 0; i < c.n_q; ++i) {
      if (c.window) {
        std::vector<double> around;
        window(i, [&](int64_t j, int64_t) { around.push_back(s(i, j)); });
        beta.push_back(T(1));
        if (is_query(i) && !around.empty()) {
          double sum = 0;
          for (const double x : around) sum += std::exp(x - around[0]);
          log_mean[i] = around[0] + std::log(sum / around.size());
          std::sort(around.begin(), around.end(), std::greater<double>());
          beta[i] = T(std::exp(threshold(around, 1, around.size()) - log_mean[i]));
          window(i, [&](int64_t j, int64_t) {
            local[i][j] = is_above((s(i, j) - log_mean[i]) - std::log(static_cast<double>(beta[i])));
          });
        }
      }
      if (!is_query(i)) continue;
      for (int64_t j = 0; j < c.n_k; ++j) {
        if (!is_real(j)) continue;
        if (!thresholded)
          neighbour[i][j] = c.window == 0;
        else
          neighbour[i][j] = s(i, j) >= kappa[i] && (c.share == 0 || is_above(distance(i, j)));
      }
    }
    for (int64_t i = 0; i < c.n_q; ++i)
      for (int64_t j = 0; j < c.n_k; ++j)
        kept[i][j] = (neighbour[i][j] && (!c.reciprocal || !thresholded || neighbour[j][i])) || local[i][j];
  }

  // Of a score to the threshold.
  double distance(int64_t i, int64_t j) const {
    return s(i, j) - lse[i] - (std::log(static_cast<double>(alpha[i])) - std::log(static_cast<double>(n_real)));
  }

  void differentiate() {
    Matrix p(c.n_q, c.n_k), dp(p), dp_error(p);
    delta.assign(c.n_q, 0);
    std::vector<double> delta_error(c.n_q);
    const double u = kUnit<T>, e = weight_error;
    for (int64_t i = 0; i < c.n_q; ++i) {
      double largest = -kInfinity, sum = 0, mass = 0;
      for (int64_t j = 0; j < c.n_k; ++j)
        if (kept[i][j]) largest = std::max(largest, s(i, j));
      for (int64_t j = 0; j < c.n_k; ++j)
        if (kept[i][j]) sum += std::exp(s(i, j) - largest);
      if (sum > 0) lse_kept[i] = largest + std::log(sum);
      // What scan() begins is a sum over all neighbours, from which some are subtracted again.
      for (int64_t j = 0; j < c.n_k && sum > 0; ++j) {
        const double x = std::exp(s(i, j) - lse_kept[i]);
        if (kept[i][j]) p(i, j) = x;
        if (kept[i][j] || neighbour[i][j]) mass += x;
        for (int64_t d = 0; d < c.dim_v; ++d) {
          const double term = x * v[j * c.dim_v + d];
          if (kept[i][j]) out(i, d) += term;
          if (kept[i][j] || neighbour[i][j]) out_allowed(i, d) += e * std::fabs(term);
        }
      }
      for (int64_t d = 0; d < c.dim_v; ++d) out_allowed(i, d) += e * mass * std::fabs(out(i, d));
      for (int64_t j = 0; j < c.n_k; ++j) {
        for (int64_t d = 0; d < c.dim_v; ++d) {
          const double term = static_cast<double>(d_out[i * c.dim_v + d]) * v[j * c.dim_v + d];
          dp(i, j) += term, dp_error(i, j) += u * (c.dim_v + 2) * std::fabs(term);
        }
        delta[i] += p(i, j) * dp(i, j);
        delta_error[i] += p(i, j) * ((e + u * (c.n_k + 4)) * std::fabs(dp(i, j)) + dp_error(i, j));
      }
      for (int64_t j = 0; j < c.n_k; ++j) {
        if (!kept[i][j]) continue;
        const double ds = p(i, j) * (dp(i, j) - delta[i]);
        const double ds_error =
            p(i, j) * (2 * e * (std::fabs(dp(i, j)) + std::fabs(delta[i])) + dp_error(i, j) + delta_error[i]);
        for (int64_t d = 0; d < c.dim; ++d) {
          const double x = scale * q[i * c.dim + d], y = scale * k[j * c.dim + d];
          dq(i, d) += ds * y, dk(j, d) += ds * x;
          dq_allowed(i, d) += (ds_error + u * (c.n_k + 4) * std::fabs(ds)) * std::fabs(y);
          dk_allowed(j, d) += (ds_error + u * (c.n_q + 4) * std::fabs(ds)) * std::fabs(x);
        }
        for (int64_t d = 0; d < c.dim_v; ++d) {
          const double term = p(i, j) * d_out[i * c.dim_v + d];
          dv(j, d) += term, dv_allowed(j, d) += (e + u * (c.n_q + 4)) * std::fabs(term);
        }
      }
    }

    // dl/dalpha and dl/dbeta (asa_ops/asa/__init__.py)
    const auto change = [&](int64_t i, int64_t j, double& error) {
      const double x = s(i, j) - lse_kept[i], difference = dp(i, j) - delta[i];
      const double factor = lse_kept[i] == -kInfinity ? 1 : kept[i][j] ? std::exp(x) : 1 / (1 + std::exp(-x));
      error = factor * (2 * e * std::fabs(difference) + dp_error(i, j) + delta_error[i] +
                        u * (std::fabs(dp(i, j)) + std::fabs(delta[i])));
      return factor * difference;
    };
    const double z_error = score_error + e;
    const auto add = [&](double z, double g, double g_error, double& sum, double& allowed) {
      const double slope = std::max(0.0, 1 - std::fabs(z) / band) / band;
      const double slope_error = std::fabs(z) < band + z_error ? z_error / (band * band) : 0;
      sum -= slope * g;
      allowed += slope * g_error + (slope_error + u * (c.n_k + 8) * slope) * std::fabs(g);
    };
    dalpha.assign(alpha.size(), 0), dalpha_allowed = dalpha, dbeta.assign(beta.size(), 0), dbeta_allowed = dbeta;
    for (int64_t i = 0; i < c.n_q; ++i) {
      if (!is_query(i)) continue;
      double error;
      for (int64_t j = 0; j < c.n_k && !alpha.empty(); ++j) {
        if (!is_real(j) || s(i, j) < kappa[i] || (c.reciprocal && !neighbour[j][i])) continue;
        const double z = distance(i, j);
        if (!local[i][j]) {
          const double g = change(i, j, error);
          add(z, g, error, dalpha[i], dalpha_allowed[i]);
        }
        if (c.reciprocal && !local[j][i]) {
          const double g = change(j, i, error);
          add(z, g, error, dalpha[i], dalpha_allowed[i]);
        }
      }
      if (!alpha.empty()) dalpha[i] /= alpha[i], dalpha_allowed[i] /= alpha[i];
      if (beta.empty()) continue;
      window(i, [&](int64_t j, int64_t) {
        if (neighbour[i][j] && (!c.reciprocal || neighbour[j][i])) return;
        const double g = change(i, j, error);
        add((s(i, j) - log_mean[i]) - std::log(static_cast<double>(beta[i])), g, error, dbeta[i], dbeta_allowed[i]);
      });
      dbeta[i] /= beta[i], dbeta_allowed[i] /= beta[i];
    }
  }
};

// Of a type, how often rows were summed up in each way.
struct Ways {
  int64_t kind[3] = {}, begun[4] = {};  // begun: where neighbours must be mutual
};

template <class T>
double worst_of(const T* x, const std::vector<double>& expected, const std::vector<double>& allowed) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i)
    worst = worse(worst, error_of(static_cast<double>(x[i]), expected[i], allowed[i]));
  return worst;
}

template <class T>
void check_case(Case c, Ways& ways) {
  const Kernels<T> kernels = ASA_ISA::kernels<T>();
  if (c.in_vectors) c.dim *= kernels.pad, c.dim_v *= kernels.pad;
  uint64_t seed = 1;
  auto example = std::make_unique<Example<T>>(c, seed);
  while (!example->is_clear() && seed < 30) example = std::make_unique<Example<T>>(c, ++seed);
  const Example<T>& x = *example;
  const std::string name = std::string(c.name) + ", " + name_of<T> + ", ";
  if (!x.is_clear()) return require(name + "scores apart from thresholds", false);
  const int64_t n_q = c.n_q, n_k = c.n_k;
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };

  Problem<T> p{};
  p.n_q = n_q, p.n_k = n_k, p.dim = c.dim, p.dim_v = c.dim_v;
  p.blocks_q = parts(n_q, kBlock), p.blocks_k = parts(n_k, kBlock), p.q_at_a_time = p.k_at_a_time = c.at_a_time;
  p.depth = c.depth, p.height = c.height, p.width = c.width, p.topk = c.topk;
  p.window[0] = c.slices, p.window[1] = p.window[2] = c.window, p.positions = x.positions();
  p.reciprocal = c.reciprocal, p.thresholded = x.thresholded, p.keeps = true, p.end = n_q;
  p.n_real = x.n_real, p.log_n_real = std::log(static_cast<double>(x.n_real));
  p.scale = T(x.scale), p.band = T(x.band);
  // Copies, so that what is read past their ends is NaN.
  const auto copied = [](const std::vector<T>& from) {
    auto to = std::make_unique<Memory<T>>(from.size());
    std::copy(from.begin(), from.end(), to->data());
    return to;
  };
  const auto q = copied(x.q), k = copied(x.k), v = copied(x.v), d_out = copied(x.d_out), alpha = copied(x.alpha),
             beta = copied(x.beta);
  p.q = q->data(), p.k = k->data(), p.v = v->data();
  if (!x.alpha.empty()) p.alpha = alpha->data();
  if (!x.beta.empty()) p.beta = beta->data();
  if (x.n_real < n_k) p.real_k = x.real.get(), p.real_q = n_q == n_k ? x.real.get() : nullptr;

  Memory<T> out(n_q * c.dim_v), lse(n_q), lse_kept(n_q), kappa(n_q), log_mean(n_q), mass(n_q), squares(n_q), shift(n_q),
      factor(n_q), sizes(p.blocks_k * kBlock);
  Memory<int32_t> survivors(n_q);
  Memory<Begun> begun(n_q);
  Memory<uint8_t> complete(p.blocks_q);
  Memory<bool> local(n_q * x.positions());
  Memory<uint64_t> bits(p.blocks_q * p.blocks_k * kBlock);
  Memory<T> k_panels(kernels.panels(n_k) * kernels.panel_size(c.dim));
  Memory<T> v_panels(kernels.panels(n_k) * kernels.panel_size(c.dim_v));
  Memory<T> v_slices(n_k * c.dim_v), k_slices(n_k * c.dim), q_slices(n_q * c.dim), d_out_slices(n_q * c.dim_v);
  p.out = out.data(), p.lse = lse.data(), p.lse_kept = lse_kept.data(), p.survivors = survivors.data();
  p.kappa = kappa.data(), p.log_mean = log_mean.data(), p.local = local.data();
  if (p.thresholded) {
    p.bits = bits.data(), p.back = p.bits, p.back_stride = p.blocks_k * kBlock;
    p.begun = begun.data(), p.shift = shift.data(), p.factor = factor.data();
    p.mass = mass.data(), p.squares = squares.data();
  }
  begun.fill(n_q, Begun::nothing), complete.fill(p.blocks_q, 0);
  if (p.thresholded) kernels.find_sizes(p.v, n_k, p.dim_v, p.sizes = sizes.data());
  p.k_panels = k_panels.data();
  const auto pack_all = [&](const T* from, int64_t dim, T* panels) {
    run(0, kernels.panels(n_k), 0, [&](Queue& queue, void*) { kernels.pack_panels(from, n_k, dim, panels, queue); });
  };
  const auto slice_all = [&](const T* from, int64_t n, int64_t dim, T* slices) {
    run(0, kernels.panels(n), 0, [&](Queue& queue, void*) { kernels.pack_slices(from, n, dim, slices, queue); });
  };
  pack_all(p.k, c.dim, p.k_panels);
  slice_all(p.v, n_k, c.dim_v, p.v_slices = v_slices.data());
  const auto pass_of_rows = [&](const auto& pass) {
    run(0, p.blocks_q, kernels.scan_bytes(p), [&](Queue& queue, void* scratch) { pass(p, queue, scratch); });
  };
  const auto aggregate = [&] {
    run(0, parts(n_q, p.q_at_a_time), kernels.aggregate_bytes(p),
        [&](Queue& queue, void* scratch) { kernels.aggregate(p, queue, scratch); });
  };
  std::vector<int32_t> expected_list, counts;
  std::vector<int64_t> offsets = {0};
  for (int64_t i = 0; i < n_q; ++i) {
    for (int64_t j = 0; j < n_k; ++j)
      if (x.kept[i][j]) expected_list.push_back(static_cast<int32_t>(j));
    offsets.push_back(expected_list.size()), counts.push_back(static_cast<int32_t>(offsets[i + 1] - offsets[i]));
  }
  const auto check_forward = [&](const std::string& name, bool may_begin) {
    double worst = 0;
    for (int64_t i = 0; i < n_q; ++i) {
      double mass_allowed = x.weight_error;  // of what was begun and is subtracted again
      for (int64_t j = 0; j < n_k; ++j)
        if (counts[i] && may_begin && x.neighbour[i][j])
          mass_allowed += x.weight_error * std::exp(x.s(i, j) - x.lse_kept[i]);
      const double all = p.scanned() || !x.is_query(i) ? x.lse[i] : x.lse_kept[i];
      worst = worse(worst, error_of(lse[i], all, x.weight_error));
      worst = worse(worst, error_of(lse_kept[i], x.lse_kept[i], mass_allowed));
      if (c.window) worst = worse(worst, error_of(log_mean[i], x.log_mean[i], x.weight_error));
      if (c.topk && x.is_query(i)) worst = worse(worst, error_of(kappa[i], x.kappa[i], x.score_error));
    }
    const bool same_counts = std::equal(counts.begin(), counts.end(), survivors.data());
    const Memory<int32_t> list(expected_list.size());
    const bool same_list = same_counts &&
                           run(0, parts(n_q, p.q_at_a_time), kernels.list_survivors_bytes(p),
                               [&](Queue& queue, void* scratch) {
                                 kernels.list_survivors(p, offsets.data(), list.data(), queue, scratch);
                               }) &&
                           std::equal(expected_list.begin(), expected_list.end(), list.data());
    require(name + "survivors", same_list);
    report(name + "statistics", worst);
    report(name + "out", worst_of(out.data(), x.out.x, x.out_allowed.x));
    return same_counts;
  };
  if (p.is_one_block()) {
    run(0, 1, kernels.forward_block_bytes(p), [&](Queue&, void* scratch) { kernels.forward_block(p, scratch); });
  } else {
    p.complete = complete.data();
    if (p.scanned()) pass_of_rows(kernels.scan);
    aggregate();
  }
  for (int64_t i = 0; c.reciprocal && p.begun && i < n_q; ++i) ++ways.begun[static_cast<int>(begun[i])];
  if (p.begun && std::count(p.begun, p.begun + n_q, Begun::survivors) > 0) {
    const std::vector<T> before(out.data(), out.data() + n_q * c.dim_v);
    begun.fill(n_q, Begun::nothing), out.fill(n_q * c.dim_v, T(NAN));
    p.complete = nullptr;
    pass_of_rows(kernels.scan);
    const bool any = std::count(p.begun, p.begun + n_q, Begun::put_off) > 0;
    pass_of_rows(kernels.scan_again);
    aggregate();
    require(name + "outputs put off", any && std::memcmp(before.data(), out.data(), before.size() * sizeof(T)) == 0);
  }
  p.begun = nullptr, p.mass = p.squares = nullptr;
  if (!check_forward(name, true)) return;
  if (p.thresholded && !p.is_one_block()) {
    for (Memory<T>* const numbers : {&lse, &lse_kept, &kappa, &log_mean}) numbers->fill(n_q, T(NAN));
    out.fill(n_q * c.dim_v, T(NAN));
    survivors.fill(n_q, -1);
    bits.fill(p.blocks_q * p.blocks_k * kBlock, ~uint64_t{0});
    local.fill(n_q * x.positions(), true);
    const int64_t room = p.blocks_q * kBlock * kernels.score_stride(p);
    Memory<T> scores(room);
    p.keeps_scores = true, p.scores = scores.data();
    pass_of_rows(kernels.scan);
    aggregate();
    check_forward(name + "kept scores, ", false);
    const std::vector<T> before(out.data(), out.data() + n_q * c.dim_v);
    scores.fill(room, T(NAN));
    pass_of_rows(kernels.scan_again);
    aggregate();
    require(name + "scores formed by themselves",
            std::memcmp(before.data(), out.data(), before.size() * sizeof(T)) == 0);
    p.keeps_scores = false, p.scores = nullptr;
  }

  std::vector<Kind> kinds(n_q);
  std::vector<int32_t> keys(n_q), listed(n_q);
  std::vector<int64_t> numbers(n_q + 1), columns_at(n_q + 1);
  const Groups groups{kinds.data(), keys.data(), listed.data(), numbers.data(), columns_at.data()};
  bool consistent = run(0, parts(n_q, p.q_at_a_time), kernels.find_groups_bytes(p),
                        [&](Queue& queue, void* scratch) { kernels.find_groups(p, groups, queue, scratch); });
  kernels.lay_out(p, groups);
  for (const Kind kind : kinds) ++ways.kind[static_cast<int>(kind)];
  Memory<T> dq(n_q * c.dim), dk(n_k * c.dim), dv(n_k * c.dim_v), dalpha(x.alpha.size()), dbeta(x.beta.size()),
      delta(n_q);
  dk.fill(n_k * c.dim, 0), dv.fill(n_k * c.dim_v, 0);
  p.d_out = d_out->data(), p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data(), p.delta = delta.data();
  if (p.alpha) p.dalpha = dalpha.data();
  if (p.beta) p.dbeta = dbeta.data();
  pack_all(p.v, c.dim_v, p.v_panels = v_panels.data());
  slice_all(p.k, n_k, c.dim, p.k_slices = k_slices.data());
  slice_all(p.q, n_q, c.dim, p.q_slices = q_slices.data());
  slice_all(p.d_out, n_q, c.dim_v, p.d_out_slices = d_out_slices.data());
  for (int64_t begin = 0, end; begin < n_q; begin = end) {
    end = std::min(n_q, begin + kMostRows);
    const int64_t entries = numbers[end] - numbers[begin];
    const Memory<T> probability(entries), ds(entries);
    const Memory<int32_t> columns(columns_at[end] - columns_at[begin]), starts((p.blocks_k + 1) * (end - begin));
    const Slab<T> slab{begin, end, groups, probability.data(), ds.data(), columns.data(), starts.data()};
    run(begin / p.q_at_a_time, parts(end, p.q_at_a_time), kernels.backward_rows_bytes(p),
        [&](Queue& queue, void* scratch) { kernels.backward_rows(p, slab, queue, scratch); });
    run(0, parts(n_k, p.k_at_a_time), kernels.backward_columns_bytes(p),
        [&](Queue& queue, void* scratch) { kernels.backward_columns(p, slab, queue, scratch); });
  }
  if (p.alpha) {
    const int64_t rows = p.blocks_q * kBlock, distances = c.reciprocal ? p.blocks_q / 2 + 1 : p.blocks_k;
    Memory<T> q_blocks(rows * c.dim), k_blocks(p.blocks_k * kBlock * c.dim), v_blocks(p.blocks_k * kBlock * c.dim_v),
        d_out_blocks(rows * c.dim_v), ahead(distances * rows), behind(distances * rows);
    const auto pack_blocks = [&](const T* from, int64_t n, int64_t dim, T* to) {
      run(0, parts(n, kBlock), 0, [&](Queue& queue, void*) { kernels.pack_blocks(from, n, dim, to, queue); });
      return to;
    };
    std::vector<uint64_t> learns(p.blocks_q);
    for (int64_t i = 0; i < n_q; ++i) learns[i / kBlock] |= static_cast<uint64_t>(x.is_query(i)) << i % kBlock;
    ahead.fill(distances * rows, 0), behind.fill(distances * rows, 0);
    AlphaPairs<T> pairs{pack_blocks(p.q, n_q, c.dim, q_blocks.data()), pack_blocks(p.k, n_k, c.dim, k_blocks.data()),
                        pack_blocks(p.v, n_k, c.dim_v, v_blocks.data()),
                        pack_blocks(p.d_out, n_q, c.dim_v, d_out_blocks.data()), learns.data()};
    for (; pairs.first < distances; pairs.first = pairs.last) {  // two at a time
      pairs.last = std::min(distances, pairs.first + 2);
      pairs.ahead = ahead.data() + pairs.first * rows, pairs.behind = behind.data() + pairs.first * rows;
      consistent &= run(0, p.blocks_q, kernels.backward_alpha_bytes(p),
                        [&](Queue& queue, void* scratch) { kernels.backward_alpha(p, pairs, queue, scratch); });
    }
    for (int64_t i = 0; i < n_q; ++i) {
      double sum = 0;
      for (int64_t x = i; x < distances * rows; x += rows) sum += double(ahead[x]) + double(behind[x]);
      dalpha[i] = x.is_query(i) ? T(-sum / alpha->data()[i]) : T(0);
    }
  }
  if (p.beta)
    consistent &= run(0, p.blocks_q, kernels.backward_beta_bytes(p),
                      [&](Queue& queue, void* scratch) { kernels.backward_beta(p, queue, scratch); });
  require(name + "groups", consistent);
  report(name + "dq", worst_of(dq.data(), x.dq.x, x.dq_allowed.x));
  report(name + "dk", worst_of(dk.data(), x.dk.x, x.dk_allowed.x));
  report(name + "dv", worst_of(dv.data(), x.dv.x, x.dv_allowed.x));
  const auto of_queries = [&](Memory<T>& gradients) {  // of padding they are not written
    for (int64_t i = 0; i < n_q; ++i)
      if (!x.is_query(i)) gradients[i] = 0;
    return gradients.data();
  };
  if (p.alpha) report(name + "dalpha", worst_of(of_queries(dalpha), x.dalpha, x.dalpha_allowed));
  if (p.beta) report(name + "dbeta", worst_of(of_queries(dbeta), x.dbeta, x.dbeta_allowed));
}

const Case kCases[] = {
    {.name = "one pair", .n_q = 1, .n_k = 1, .dim = 16, .dim_v = 16},
    {.name = "fewer than a tile", .n_q = 3, .n_k = 5, .dim = 16, .dim_v = 48, .share = 0.5},
    {.name = "one block",
     .n_q = 50,
     .n_k = 50,
     .dim = 48,
     .dim_v = 16,
     .share = 0.4,
     .reciprocal = true,
     .height = 5,
     .width = 10,
     .window = 3},
    {.name = "one block of padding and top-k", .n_q = 61, .n_k = 61, .dim = 16, .dim_v = 16, .topk = 7, .padding = 0.3},
    {.name = "one block of dense attention", .n_q = 19, .n_k = 64, .dim = 144, .dim_v = 16},
    {.name = "few survivors", .n_q = 150, .n_k = 150, .dim = 16, .dim_v = 48, .share = 0.15, .reciprocal = true},
    {.name = "shared lists", .n_q = 141, .n_k = 141, .dim = 48, .dim_v = 64, .share = 0.3, .topk = 40, .alike = true},
    {.name = "half", .n_q = 139, .n_k = 139, .dim = 64, .dim_v = 16, .share = 0.7, .reciprocal = true},
    {.name = "near dense", .n_q = 133, .n_k = 133, .dim = 64, .dim_v = 48, .share = 0.98, .reciprocal = true},
    {.name = "dense", .n_q = 77, .n_k = 131, .dim = 48, .dim_v = 16},
    {.name = "dense, in stretches", .n_q = 21, .n_k = 531, .dim = 144, .dim_v = 144},
    {.name = "one way", .n_q = 70, .n_k = 203, .dim = 16, .dim_v = 64, .share = 0.4, .uneven = true},
    {.name = "long lists of wide rows", .n_q = 37, .n_k = 520, .dim = 144, .dim_v = 144, .share = 0.12},
    {.name = "top-k", .n_q = 130, .n_k = 130, .dim = 16, .dim_v = 16, .reciprocal = true, .topk = 11},
    {.name = "top-k and alpha", .n_q = 66, .n_k = 129, .dim = 16, .dim_v = 16, .share = 0.2, .topk = 17},
    {.name = "local window",
     .n_q = 143,
     .n_k = 143,
     .dim = 16,
     .dim_v = 48,
     .share = 0.2,
     .reciprocal = true,
     .height = 11,
     .width = 13,
     .window = 5},
    {.name = "local window of a volume",
     .n_q = 144,
     .n_k = 144,
     .dim = 16,
     .dim_v = 16,
     .share = 0.2,
     .reciprocal = true,
     .height = 6,
     .width = 8,
     .window = 3,
     .depth = 3,
     .slices = 5},
    {.name = "one block of a volume",
     .n_q = 60,
     .n_k = 60,
     .dim = 16,
     .dim_v = 16,
     .share = 0.3,
     .reciprocal = true,
     .height = 5,
     .width = 3,
     .window = 3,
     .depth = 4,
     .slices = 3},
    {.name = "local window beside dense rows",
     .n_q = 120,
     .n_k = 120,
     .dim = 16,
     .dim_v = 16,
     .share = 0.94,
     .reciprocal = true,
     .height = 10,
     .width = 12,
     .window = 7},
    {.name = "the same keys removed from dense rows",
     .n_q = 210,
     .n_k = 210,
     .dim = 16,
     .dim_v = 16,
     .share = 0.98,
     .reciprocal = true,
     .height = 14,
     .width = 15,
     .window = 7,
     .shy = 1},
    {.name = "most of the mass removed",
     .n_q = 170,
     .n_k = 170,
     .dim = 16,
     .dim_v = 16,
     .share = 0.98,
     .reciprocal = true,
     .shy = 6},
    {.name = "three vectors and five",
     .n_q = 130,
     .n_k = 130,
     .dim = 3,
     .dim_v = 5,
     .in_vectors = true,
     .share = 0.3,
     .reciprocal = true,
     .height = 13,
     .width = 10,
     .window = 3},
    {.name = "one vector of most keys",
     .n_q = 140,
     .n_k = 140,
     .dim = 1,
     .dim_v = 1,
     .in_vectors = true,
     .share = 0.95,
     .reciprocal = true},
    {.name = "local window alone", .n_q = 99, .n_k = 99, .dim = 16, .dim_v = 16, .height = 11, .width = 9, .window = 3},
    {.name = "padding",
     .n_q = 137,
     .n_k = 137,
     .dim = 16,
     .dim_v = 32,
     .share = 0.3,
     .reciprocal = true,
     .padding = 0.25},
    {.name = "padding of dense attention", .n_q = 90, .n_k = 90, .dim = 16, .dim_v = 16, .padding = 0.4},
    {.name = "sharp scores that climb",
     .n_q = 65,
     .n_k = 150,
     .dim = 16,
     .dim_v = 16,
     .share = 0.3,
     .sharpness = 2,
     .climbing = true},
    {.name = "settled blocks",
     .n_q = 525,
     .n_k = 525,
     .dim = 16,
     .dim_v = 48,
     .share = 0.7,
     .reciprocal = true,
     .height = 3,
     .width = 175,
     .window = 5,
     .padding = 0.05},
    {.name = "two slabs",
     .n_q = 300,
     .n_k = 300,
     .dim = 16,
     .dim_v = 16,
     .share = 0.4,
     .reciprocal = true,
     .uneven = true,
     .at_a_time = kMostRows},
};

template <class T>
void check_attention() {
  Ways ways;
  for (const Case& c : kCases) check_case<T>(c, ways);
  const int64_t* const kind = ways.kind;
  require(std::string("every way of summing is met, ") + name_of<T>,
          kind[0] > 100 && kind[1] > 100 && kind[2] > 100 && ways.begun[static_cast<int>(Begun::neighbours)] > 100 &&
              ways.begun[static_cast<int>(Begun::survivors)] > 100 &&
              ways.begun[static_cast<int>(Begun::put_off)] == 0);
}

// Criss-cross attention

template <class T>
void check_criss_cross(int64_t height, int64_t width, int64_t dim, int64_t dim_v) {
  const CrissCrossKernels<T> kernels = ASA_ISA::criss_cross_kernels<T>();
  const int64_t n = height * width;
  const double u = kUnit<T>, scale = T(0.4);
  Random random(3);
  const auto made = [&](int64_t channels) {
    auto to = std::make_unique<Memory<T>>(channels * n);
    for (int64_t i = 0; i < channels * n; ++i) (*to)[i] = T(random.normal());
    return to;
  };
  const auto q = made(dim), k = made(dim), v = made(dim_v), d_out = made(dim_v);
  const auto on_cross = [&](int64_t i, int64_t j) { return i / width == j / width || i % width == j % width; };

  Matrix s(n, n);
  double largest = 0, largest_size = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double size = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const double term = scale * (*q)[d * n + i] * (*k)[d * n + j];
        s(i, j) += term, size += std::fabs(term);
      }
      largest = std::max(largest, std::fabs(s(i, j))), largest_size = std::max(largest_size, size);
    }
  const double score_error = u * ((dim + 4) * largest_size + 2 * largest);
  const double e = 2 * (2 * score_error + exponential_error<T>(2 * largest)) + u * (height + width + 8);

  Matrix out(dim_v, n), out_allowed(out), dv(out), dv_allowed(out), dq(dim, n), dq_allowed(dq), dk(dq), dk_allowed(dq);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0, delta = 0, delta_error = 0;
    std::vector<double> p(n), dp(n), dp_error(n);
    for (int64_t j = 0; j < n; ++j)
      if (on_cross(i, j)) sum += p[j] = std::exp(s(i, j));
    for (int64_t j = 0; j < n; ++j) {
      p[j] /= sum;
      for (int64_t d = 0; d < dim_v; ++d) {
        const double x = (*v)[d * n + j], y = (*d_out)[d * n + i];
        out(d, i) += p[j] * x, out_allowed(d, i) += 2 * e * p[j] * std::fabs(x);
        dv(d, j) += p[j] * y, dv_allowed(d, j) += 2 * e * p[j] * std::fabs(y);
        dp[j] += x * y, dp_error[j] += u * (dim_v + 2) * std::fabs(x * y);
      }
      delta += p[j] * dp[j], delta_error += p[j] * (2 * e * std::fabs(dp[j]) + dp_error[j]);
    }
    for (int64_t j = 0; j < n; ++j) {
      const double ds = p[j] * (dp[j] - delta);
      const double error = p[j] * (3 * e * (std::fabs(dp[j]) + std::fabs(delta)) + dp_error[j] + delta_error);
      for (int64_t d = 0; d < dim; ++d) {
        const double x = scale * (*q)[d * n + i], y = scale * (*k)[d * n + j];
        dq(d, i) += ds * y, dq_allowed(d, i) += error * std::fabs(y);
        dk(d, j) += ds * x, dk_allowed(d, j) += error * std::fabs(x);
      }
    }
  }

  CrissCross<T> p{};
  p.dim = dim, p.dim_v = dim_v, p.height = height, p.width = width, p.scale = T(scale);
  p.q = q->data(), p.k = k->data(), p.v = v->data(), p.d_out = d_out->data();
  const Memory<T> result(dim_v * n), most(n), total(n), part(n), products(kernels.products(p)), of_q(dim * n),
      of_k(dim * n), of_v(dim_v * n);
  p.out = result.data(), p.largest = most.data(), p.total = total.data(), p.delta = part.data();
  p.products = products.data(), p.dq = of_q.data(), p.dk = of_k.data(), p.dv = of_v.data();
  const auto pass = [&](int64_t blocks, int64_t bytes, auto f) {
    run(0, blocks, bytes, [&](Queue& queue, void* scratch) { f(p, queue, scratch); });
  };
  pass(kernels.column_blocks(p), kernels.forward_bytes(p), kernels.forward_columns);
  pass(height, kernels.forward_bytes(p), kernels.forward_rows);
  pass(height, kernels.backward_bytes(p), kernels.backward_values);
  pass(kernels.column_groups(p), kernels.backward_bytes(p), kernels.backward_columns);
  pass(height, kernels.backward_bytes(p), kernels.backward_rows);
  const std::string name =
      "criss-cross " + std::to_string(height) + " x " + std::to_string(width) + ", " + name_of<T> + ", ";
  report(name + "out", worst_of(result.data(), out.x, out_allowed.x));
  report(name + "dq", worst_of(of_q.data(), dq.x, dq_allowed.x));
  report(name + "dk", worst_of(of_k.data(), dk.x, dk_allowed.x));
  report(name + "dv", worst_of(of_v.data(), dv.x, dv_allowed.x));
}

template <class T>
void check_all() {
  check_vectors<T>();
  check_exponential<T>();
  check_logarithm<T>();
  check_attention<T>();
  check_criss_cross<T>(7, 19, 5, 30);
  check_criss_cross<T>(21, 6, 16, 9);
  check_criss_cross<T>(1, 20, 8, 16);
  check_criss_cross<T>(310, 3, 4, 2);
  check_criss_cross<T>(2, 610, 4, 2);
}

}  // namespace
}  // namespace asa_ops::cpu::ASA_ISA::testing

int main() {
  namespace testing = asa_ops::cpu::ASA_ISA::testing;
#if !defined(ASA_AVX512)
  testing::check_minimum();
#endif
  testing::check_transpose();
  testing::check_all<float>();
  testing::check_all<double>();
  return testing::failures != 0;
}
