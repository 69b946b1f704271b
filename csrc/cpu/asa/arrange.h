// Tokens of any type and strides as the kernels take them, contiguous numbers T with head dims padded by zeros, and back.

// Half precisions, by their bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ASA_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

ASA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
}

template <class T>
ASA_INLINE T number(T x) {
  return x;
}
ASA_INLINE float number(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
ASA_INLINE float number(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // As bits of a float, exponent and fraction are those of x * 2^-112, where subnormal numbers of x are subnormal too.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  const uint32_t not_finite = magnitude << 13 | 0x7F800000u;
  return float_of((magnitude >= 0x7C00u ? not_finite : bits_of(scaled)) | sign);
}

// To the nearest, ties to even.
ASA_INLINE void assign(float& to, float x) { to = x; }
ASA_INLINE void assign(double& to, double x) { to = x; }
ASA_INLINE void assign(float& to, double x) { to = static_cast<float>(x); }
ASA_INLINE void assign(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  to.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
ASA_INLINE void assign(Half& to, float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
  // In a sum with 0.5 the last bit is 2^-24, the smallest half.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t rounded = magnitude > 0x7F800000u ? 0x7E00u : magnitude >= 0x47800000u ? 0x7C00u : finite;
  to.bits = static_cast<uint16_t>(sign | rounded);
}
ASA_INLINE void assign(Half& to, double x) { assign(to, static_cast<float>(x)); }
ASA_INLINE void assign(BFloat16& to, double x) { assign(to, static_cast<float>(x)); }

// Calls f(U{}) for the type U of some numbers.
template <class F>
ASA_INLINE void for_type(Type type, const F& f) {
  switch (type) {
    case Type::half: return f(Half{});
    case Type::bfloat16: return f(BFloat16{});
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
  }
}

// to[padded] of rows [begin, end); those that are not real are 0.
template <class T>
void read_rows(const Rows& from, int64_t begin, int64_t end, int64_t padded, const bool* real_rows, T* to) {
  const auto copy = [&](auto type) {
    const auto* const x = static_cast<const decltype(type)*>(from.numbers);
    const int64_t across = from.stride_d, down = from.stride_n;
    for (int64_t first = begin, last; first < end; first = last) {
      last = smaller(end, first + kPad);  // rows; where those of a column lie side by side, they are read together
      if (across == 1) {
        for (int64_t i = first; i < last; ++i)
          for (int64_t d = 0; d < from.dim; ++d) to[i * padded + d] = static_cast<T>(number(x[i * down + d]));
      } else {
        for (int64_t d = 0; d < from.dim; ++d)
          for (int64_t i = first; i < last; ++i) to[i * padded + d] = static_cast<T>(number(x[i * down + d * across]));
      }
      for (int64_t i = first; i < last; ++i)
        for (int64_t d = real(real_rows, i) ? from.dim : 0; d < padded; ++d) to[i * padded + d] = 0;
    }
  };
  for_type(from.type, copy);
}

// Rows [begin, end) of from[padded], without the padding.
template <class T>
void write_rows(const T* from, int64_t begin, int64_t end, int64_t padded, const Rows& to) {
  for_type(to.type, [&](auto type) {
    auto* const x = static_cast<decltype(type)*>(const_cast<void*>(to.numbers));
    for (int64_t i = begin; i < end; ++i)
      for (int64_t d = 0; d < to.dim; ++d) assign(x[i * to.stride_n + d], from[i * padded + d]);
  });
}

// Whether all numbers are finite: the difference of each from itself is 0.
template <class T>
bool all_finite(const T* x, int64_t count) {
  Vec<T> sum = {};
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) {
    const Vec<T> y = load(x + j);
    sum += y - y;
  }
  for (; j < count; ++j) sum[0] += x[j] - x[j];
  return sum_of<T>(sum) == 0;
}

// The largest magnitude in each row, relative to that in all, and 0 up to a multiple of kBlock; the dim is padded.
template <class T>
void find_sizes(const T* x, int64_t n, int64_t dim, T* sizes) {
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    Vec<T> size = {};
    for (int64_t d = 0; d < dim; d += kLanes<T>) {
      const Vec<T> y = load(x + i * dim + d);
      size = maximum(size, maximum(y, -y));
    }
    sizes[i] = largest_of<T>(size);
    largest = sizes[i] > largest ? sizes[i] : largest;
  }
  for (int64_t i = 0; i < rounded_up(n, kBlock); ++i) sizes[i] = i < n && largest > 0 ? sizes[i] / largest : T(0);
}

// Whether a number in one of the rows [begin, end) is NaN; nan_rows says in which.
template <class T>
bool find_nan(const Rows& from, int64_t begin, int64_t end, bool* nan_rows) {
  bool any = false;
  for_type(from.type, [&](auto type) {
    const auto* const x = static_cast<const decltype(type)*>(from.numbers);
    for (int64_t i = begin; i < end; ++i) {
      int found = 0;
      for (int64_t d = 0; d < from.dim; ++d) {
        const auto y = number(x[i * from.stride_n + d]);
        found |= y != y;
      }
      nan_rows[i] = found != 0;
      any |= found != 0;
    }
  });
  return any;
}
