// Strips of the maps, copied into scratch and back.

constexpr int64_t kChannels = 24;  // of values in work

// A strip of a map: `lines` rows of one channel, or one row, of `count` pixels side by side.
template <class T>
struct Strip {
  int64_t line, first, lines, count;  // pixels [line, line + lines) x [first, first + count)
  int64_t vectors() const { return (count + kLanes<T> - 1) / kLanes<T>; }
};

// packed[channels][stride] = the strip's lines one after the other in whole vectors, times factor, and zeros up to
// `stride`.
template <class T>
void pack_strip(const CrissCross<T>& p, const T* x, int64_t channels, const Strip<T>& strip, T* packed, int64_t stride,
                T factor = 1) {
  const int64_t width = strip.vectors() * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = x + (c * p.height + strip.line) * p.width + strip.first;
    T* to = packed + c * stride;
    for (int64_t l = 0; l < strip.lines; ++l, from += p.width, to += width)
      for (int64_t i = 0; i < strip.count; i += kLanes<T>)
        store(to + i, load_some(from + i, smaller(kLanes<T>, strip.count - i)) * factor);
    for (; to < packed + (c + 1) * stride; to += kLanes<T>) store(to, Vec<T>{});
  }
}

// The reverse: writes f(vector of the map, vector of packed, offset in a channel of packed) into the map.
template <class T, class F>
ASA_INLINE void unpack_strip(const CrissCross<T>& p, const T* packed, int64_t stride, int64_t channels,
                             const Strip<T>& strip, T* x, const F& f) {
  const int64_t width = strip.vectors() * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t l = 0; l < strip.lines; ++l) {
      T* const to = x + (c * p.height + strip.line + l) * p.width + strip.first;
      for (int64_t i = 0; i < strip.count; i += kLanes<T>) {
        const int64_t n = smaller(kLanes<T>, strip.count - i), offset = l * width + i;
        store_some(to + i, n, f(load_some(to + i, n), load(packed + c * stride + offset), offset));
      }
    }
}

// Writes a strip, times factor, or adds it to what the map holds.
template <class T>
ASA_INLINE void write_strip(const CrissCross<T>& p, const T* packed, int64_t stride, int64_t channels,
                            const Strip<T>& strip, T* x, bool overwrite, T factor = 1) {
  if (overwrite)
    unpack_strip(p, packed, stride, channels, strip, x, [&](Vec<T>, Vec<T> x, int64_t) { return factor * x; });
  else
    unpack_strip(p, packed, stride, channels, strip, x, [&](Vec<T> y, Vec<T> x, int64_t) { return y + factor * x; });
}
