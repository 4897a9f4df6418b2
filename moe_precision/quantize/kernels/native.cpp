// Products with packed matrices of 1- to 8-bit codes, for any CPU whose C++ compiler knows GCC's vector types.
//
// Rows of a matrix stand side by side, one in each lane of a vector, so that no sum across lanes is needed. A lane's
// 32-bit word holds codes of neighbouring columns in pairs, the first of a pair in its low half and the second in its
// high half; 16 / bits pairs to a word, the first in the lowest bits, and at 3 bits 16 pairs to three words (`Unit`).
// Tokens are taken in tiles, whose activations are laid out pair by pair. Each token's product is summed in the same
// order, whatever the tile and the threads.
//
// Long because activations in float32, in bfloat16 and rounded to int8 share the words and the dispatch.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define INT8 1
#endif
#if defined(__AVX512BF16__) || defined(INT8) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// As wide as a register, and as many tokens at a time as there are registers for.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 8;
#else
constexpr int LANES = 4, TILE = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// float16 to float32, right for subnormal numbers even where the CPU is told to flush them.
inline Floats widened(Halves half) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)half);
#else
  const Ints bits = __builtin_convertvector(half, Ints);
  const Ints magnitude = bits & 0x7fff;
  const Ints normal = (magnitude << 13) + (112 << 23);
  const Ints subnormal = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  const Ints finite = magnitude < 0x400 ? subnormal : normal;
  return (Floats)((magnitude < 0x7c00 ? finite : (magnitude << 13) | 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}

// Words that belong together, and the pairs of columns that they hold.
template <int BITS>
struct Unit {
  static constexpr int WORDS = 1, PAIRS = 16 / BITS;
  Ints word;

  explicit Unit(const int32_t* from) : word(load<Ints>(from)) {}

  // A word in which the codes of a pair stand at the same bit of each half, and that bit.
  Ints holding(int pair) const { return word; }
  static int bit(int pair) { return pair * BITS; }

  // Codes of two pairs, in bytes: of pair q in the first and third, of pair q + PAIRS / 2 in the second and fourth.
  Ints quad(int q) const { return (word >> (q * BITS)) & (0x01010101 * ((1 << BITS) - 1)); }
};

// At 3 bits each byte of three words holds two codes, and in its upper two bits a part of a third one: in the first word
// and in the second the low bits of one, in the third the high bits of both.
template <>
struct Unit<3> {
  static constexpr int WORDS = 3, PAIRS = 16;
  Ints words[3];

  explicit Unit(const int32_t* from) {
    for (int i = 0; i < 3; i++) words[i] = load<Ints>(from + i * LANES);
  }

  Ints holding(int pair) const {
    const int q = pair % 8, byte = pair / 8 * 8;
    return q < 6 ? words[q / 2] : third(q - 6, byte, 0x00010001);
  }
  static int bit(int pair) { return pair % 8 < 6 ? pair % 2 * 3 + pair / 8 * 8 : 0; }

  Ints quad(int q) const {
    return q < 6 ? (words[q / 2] >> (q % 2 * 3)) & 0x07070707 : third(q - 6, 0, 0x01010101);
  }

  Ints third(int of, int byte, int ones) const {
    return ((words[of] >> (6 + byte)) & (3 * ones)) | ((words[2] >> (4 + of + byte)) & (4 * ones));
  }
};

// Activations of two neighbouring columns, for any CPU.
struct FloatPair {
  typedef float Element;
  float x[2];

  static float value(Element element) { return element; }
  static void store(Element* y, Floats sums) { std::memcpy(y, &sums, sizeof sums); }
  static constexpr float zero(int) { return 0; }  // what code 0 is taken for

  // Adds the products with the pair of codes at one bit of each half of a word.
  template <int BITS, int TOKENS>
  static inline void add(Floats (&sums)[TOKENS], Ints word, int bit, const FloatPair* pairs) {
    const Ints codes = (word >> bit) & (0x10001 * ((1 << BITS) - 1));
    const Floats first = __builtin_convertvector(codes & 0xffff, Floats);
    const Floats second = __builtin_convertvector(codes >> 16, Floats);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) sums[t] += first * pairs[t].x[0] + second * pairs[t].x[1];
  }
};

struct Bfloat16 {
  typedef uint16_t Element;

  static float value(Element element) {
    const uint32_t bits = (uint32_t)element << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void store(Element* y, Floats sums) {  // to the nearest, ties to even
    typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
    const Bits bits = (Bits)sums, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 + Bits{} : rounded, Halves);
    std::memcpy(y, &halves, sizeof halves);
  }
};

#ifdef __AVX512BF16__
// `FloatPair` in bfloat16. A code of up to seven bits becomes the first bits of the mantissa of a float between 2^bits and
// twice as much, which is the code and 2^bits.
struct Bfloat16Pair : Bfloat16 {
  uint16_t x[2];

  static void store(Element* y, Floats sums) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)sums);
    std::memcpy(y, &rounded, sizeof rounded);
  }
  static constexpr float zero(int bits) { return bits < 8 ? 1 << bits : 0; }

  template <int BITS, int TOKENS>
  static inline void add(Floats (&sums)[TOKENS], Ints word, int bit, const Bfloat16Pair* pairs) {
    if constexpr (BITS < 8) {
      const int shift = bit - (7 - BITS);  // neither way does a half reach the other's code
      const Ints codes = (shift < 0 ? word << -shift : word >> shift) & (0x10001 * (0x80 - (1 << (7 - BITS))));
      dot<TOKENS>(sums, codes | (0x10001 * ((127 + BITS) << 7)), pairs);
    } else {
      const Ints codes = (word >> bit) & 0x00ff00ff;
      const Ints first = (Ints)__builtin_convertvector(codes & 0xffff, Floats);
      const Ints second = (Ints)__builtin_convertvector(codes >> 16, Floats);
      dot<TOKENS>(sums, (first >> 16) | (second & ~0xffff), pairs);
    }
  }

  template <int TOKENS>
  static inline void dot(Floats (&sums)[TOKENS], Ints weights, const Bfloat16Pair* pairs) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      int32_t pair;
      std::memcpy(&pair, pairs + t, sizeof pair);
      sums[t] = (Floats)_mm512_dpbf16_ps((__m512)sums[t], (__m512bh)weights, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
};
#endif

// Matrices of one width and one shape.
struct Matrices {
  int64_t bits, count;
  const int64_t* experts;  // (count), whose matrices they are
  const int32_t* words;    // (count, out / LANES, groups, words of a group, LANES)
  const uint16_t* scale;   // (count, out / LANES, groups, LANES) float16
  const uint16_t* offset;  // the same
  int64_t out, groups, pairs;  // pairs of columns in a group

  template <int BITS>
  int64_t units() const { return (pairs + Unit<BITS>::PAIRS - 1) / Unit<BITS>::PAIRS; }  // in a group
};

// Calls `go` with a number that is known when this is compiled: a width up to MOST, or a power of two up to MOST.
template <int MOST, typename Go>
inline void with_bits(int64_t bits, const Go& go) {
  if (bits == MOST) return go(std::integral_constant<int, MOST>());
  if constexpr (MOST > 1) with_bits<MOST - 1>(bits, go);
}

template <int MOST, typename Go>
inline void with_tokens(int64_t tokens, const Go& go) {
  if (tokens == MOST) return go(std::integral_constant<int, MOST>());
  if constexpr (MOST > 1) with_tokens<MOST / 2>(tokens, go);
}

// Some tokens of one expert.
struct Tokens {
  const Matrices* of;
  int64_t first, tokens, width;  // width: tokens at a time, the last of which may be none
};

// Their activations: (in / 2, width) pairs, and the sums of each group (groups, width).
template <typename OfPair>
struct Tile : Tokens {
  typedef OfPair Pair;
  static constexpr int MOST_BITS = 8;
  std::vector<Pair> pairs;
  std::vector<float> sums;

  explicit Tile(const Tokens& which) : Tokens(which) {}

  template <int>
  void fill(const typename Pair::Element* x) {
    const int64_t groups = of->groups, pairs_of_group = of->pairs;
    pairs.resize(groups * pairs_of_group * width);
    sums.resize(groups * width);
    for (int64_t t = 0; t < tokens; t++) {
      const typename Pair::Element* row = x + (first + t) * groups * pairs_of_group * 2;
      Pair* to = pairs.data() + t;
      for (int64_t group = 0; group < groups; group++) {
        float partial[8] = {};  // several, since each addition waits for the one before; pairs come in fours
        for (int64_t pair = 0; pair < pairs_of_group; pair += 4, row += 8) {
          for (int i = 0; i < 4; i++, to += width) std::memcpy(to, row + 2 * i, sizeof(Pair));
          for (int i = 0; i < 8; i++) partial[i] += Pair::value(row[i]);
        }
        for (float part : partial) sums[group * width + t] += part;
      }
    }
  }
};

// As many rows as there are lanes times the tokens of a tile.
template <int BITS, int TOKENS, typename Pair>
void multiply_block(const Tile<Pair>& tile, int64_t block, typename Pair::Element* y) {
  typedef Unit<BITS> Of;
  const Matrices& m = *tile.of;
  const int32_t* word = m.words + block * m.groups * m.units<BITS>() * Of::WORDS * LANES;
  const Pair* x = tile.pairs.data();
  Floats totals[TOKENS] = {};
  for (int64_t group = 0; group < m.groups; group++) {
    Floats sums[TOKENS] = {};
    for (int64_t left = m.pairs; left > 0; left -= Of::PAIRS, word += Of::WORDS * LANES) {
      const Of unit(word);
      const auto add = [&](int pair) __attribute__((always_inline)) {
        Pair::template add<BITS, TOKENS>(sums, unit.holding(pair), Of::bit(pair), x);
        x += TOKENS;
      };
      if (left >= Of::PAIRS) {
#pragma GCC unroll 16
        for (int pair = 0; pair < Of::PAIRS; pair++) add(pair);
      } else {
        for (int pair = 0; pair < left; pair++) add(pair);
      }
    }
    const Floats scale = widened(load<Halves>(m.scale + (block * m.groups + group) * LANES));
    const Floats offset = widened(load<Halves>(m.offset + (block * m.groups + group) * LANES)) - scale * Pair::zero(BITS);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) totals[t] += scale * sums[t] + offset * tile.sums[group * TOKENS + t];
  }
  const int64_t column = block % (m.out / LANES) * LANES;
  for (int64_t t = 0; t < tile.tokens; t++) Pair::store(y + (tile.first + t) * m.out + column, totals[t]);
}

#ifdef INT8
// The same with activations that are rounded to int8, for codes of up to four bits: signed steps from -127 to 127 of each
// token and group. Four products are added in one go, those of a quad: four columns whose codes are in the bytes of a
// lane (`Unit::quad`).

typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// Keeps a compiler from putting off additions, for which it would need more registers than there are.
inline void in_order(Shorts& sums) { __asm__("" : "+v"(sums)); }

// Sums of products of unsigned codes with signed steps, of one lane and token. Without an instruction for four products,
// sums of two are added in 16 bits, as many as never come near 2^15, before they are widened.
template <int BITS>
struct Sums {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  static constexpr int QUADS = 1 << 30;  // between calls of `widen`
  Ints all = {};

  inline void add(Ints codes, Ints steps) {
#ifdef __AVX512VNNI__
    all = (Ints)_mm512_dpbusd_epi32((__m512i)all, (__m512i)codes, (__m512i)steps);
#else
    all = (Ints)_mm256_dpbusd_avx_epi32((__m256i)all, (__m256i)codes, (__m256i)steps);
#endif
  }
  inline void widen() {}
#else
  static constexpr int QUADS = 32767 / (2 * 127 * ((1 << BITS) - 1));
  Ints all = {};
  Shorts some = {};

#ifdef __AVX512BW__
  inline void add(Ints codes, Ints steps) {
    some += (Shorts)_mm512_maddubs_epi16((__m512i)codes, (__m512i)steps);
    in_order(some);
  }
  inline void widen() {
    all += (Ints)_mm512_madd_epi16((__m512i)some, _mm512_set1_epi16(1));
    some = Shorts{};
  }
#else
  inline void add(Ints codes, Ints steps) {
    some += (Shorts)_mm256_maddubs_epi16((__m256i)codes, (__m256i)steps);
    in_order(some);
  }
  inline void widen() {
    all += (Ints)_mm256_madd_epi16((__m256i)some, _mm256_set1_epi16(1));
    some = Shorts{};
  }
#endif
#endif
};

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The rounded activations of some tokens of one expert.
template <typename OfPair>
struct RoundedTile : Tokens {
  typedef OfPair Pair;
  static constexpr int MOST_BITS = 4;
  std::vector<int32_t> quads;  // (groups, units of a group, quads of a unit, width)
  std::vector<float> sizes, sums;  // (groups, width): of one step, and of all activations of a group

  explicit RoundedTile(const Tokens& which) : Tokens(which) {}

  template <int BITS>
  void fill(const typename Pair::Element* x) {
    constexpr int QUADS = Unit<BITS>::PAIRS / 2;
    const Matrices& m = *of;
    const int64_t columns = 2 * m.pairs, units = m.units<BITS>();
    quads.assign(m.groups * units * QUADS * width, 0);
    sizes.assign(m.groups * width, 0);
    sums.assign(m.groups * width, 0);
    std::vector<float> values(columns);
    std::vector<int8_t> steps(units * 4 * QUADS);  // zeros after the last column
    for (int64_t t = 0; t < tokens; t++) {
      const typename Pair::Element* row = x + (first + t) * m.groups * columns;
      int32_t* to = quads.data() + t;
      for (int64_t group = 0; group < m.groups; group++, row += columns) {
        for (int64_t i = 0; i < columns; i++) values[i] = Pair::value(row[i]);
        int32_t largest = 0, sum = 0;  // magnitudes compare as whole numbers do, NaN above all
        for (int64_t i = 0; i < columns; i++) {
          const int32_t magnitude = bits_of(values[i]) & 0x7fffffff;
          largest = magnitude > largest ? magnitude : largest;
        }
        const float size = float_of(largest) / 127, divisor = largest ? size : 1;
        for (int64_t i = 0; i < columns; i++) {  // to the nearest, ties to even
          const int32_t step = bits_of(values[i] / divisor + 0x1.8p23f) - bits_of(0x1.8p23f);
          steps[i] = (int8_t)step;
          sum += steps[i];
        }
        sizes[group * width + t] = size;
        sums[group * width + t] = size * sum;
        const int8_t* from = steps.data();
        for (int64_t unit = 0; unit < units; unit++, from += 4 * QUADS)
          for (int q = 0; q < QUADS; q++, to += width) {
            const int8_t* other = from + 2 * QUADS;
            const int8_t four[4] = {from[2 * q], other[2 * q], from[2 * q + 1], other[2 * q + 1]};
            std::memcpy(to, four, 4);
          }
      }
    }
  }
};

template <int BITS, int TOKENS, typename Pair>
void multiply_block(const RoundedTile<Pair>& tile, int64_t block, typename Pair::Element* y) {
  typedef Unit<BITS> Of;
  const Matrices& m = *tile.of;
  constexpr int QUADS = Of::PAIRS / 2, AT_ONCE = Sums<BITS>::QUADS / QUADS;  // units between two calls of `widen`
  constexpr int AHEAD = 512;  // words that are prefetched early enough
  const int64_t units = m.units<BITS>();
  const int32_t* word = m.words + block * m.groups * units * Of::WORDS * LANES;
  const int32_t* x = tile.quads.data();
  Floats totals[TOKENS] = {};
  for (int64_t group = 0; group < m.groups; group++) {
    Sums<BITS> sums[TOKENS];
    for (int64_t left = units; left > 0; left -= AT_ONCE) {
      for (int64_t i = left < AT_ONCE ? left : AT_ONCE; i > 0; i--, word += Of::WORDS * LANES) {
        const Of unit(word);
        if (TOKENS <= 4)  // reading words takes the time then; a CPU's own prefetching ends with each page
          for (int i = 0; i < Of::WORDS; i++) __builtin_prefetch(word + AHEAD + i * LANES);
#pragma GCC unroll 8
        for (int q = 0; q < QUADS; q++, x += TOKENS) {
          const Ints codes = unit.quad(q);
#pragma GCC unroll 16
          for (int t = 0; t < TOKENS; t++) sums[t].add(codes, x[t] - (Ints){});
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; t++) sums[t].widen();
    }
    const Floats scale = widened(load<Halves>(m.scale + (block * m.groups + group) * LANES));
    const Floats offset = widened(load<Halves>(m.offset + (block * m.groups + group) * LANES));
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      const int64_t place = group * TOKENS + t;
      totals[t] +=
          (scale * tile.sizes[place]) * __builtin_convertvector(sums[t].all, Floats) + offset * tile.sums[place];
    }
  }
  const int64_t column = block % (m.out / LANES) * LANES;
  for (int64_t t = 0; t < tile.tokens; t++) Pair::store(y + (tile.first + t) * m.out + column, totals[t]);
}

#endif

// Rows of `y` become those of `x` times the transposes of their experts' matrices, whatever the width of each.
template <typename Tile>
void multiply_all(const Matrices* widths, int64_t count, const void* x, void* y, const int64_t* starts) {
  typedef typename Tile::Pair::Element Element;
  std::vector<Tile> tiles;
  struct Used {
    int64_t matrix;
    size_t first, last;  // tiles
  };
  std::vector<Used> used;
  for (const Matrices* m = widths; m < widths + count; m++) {
    for (int64_t matrix = 0; matrix < m->count; matrix++) {
      const size_t before = tiles.size();
      const int64_t last = starts[m->experts[matrix] + 1];
      for (int64_t first = starts[m->experts[matrix]], width; first < last; first += width) {
        width = TILE;
        while (width / 2 >= last - first) width /= 2;
        tiles.emplace_back(Tokens{m, first, width < last - first ? width : last - first, width});
      }
      if (tiles.size() > before) used.push_back({matrix, before, tiles.size()});
    }
  }
  const int64_t blocks = widths->out / LANES;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tiles.size(); i++)
      with_bits<Tile::MOST_BITS>(tiles[i].of->bits, [&](auto bits) {
        tiles[i].template fill<decltype(bits)::value>((const Element*)x);
      });
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < (int64_t)used.size() * blocks; i++) {
      const Used& now = used[i / blocks];
      const int64_t block = now.matrix * blocks + i % blocks;
      with_bits<Tile::MOST_BITS>(tiles[now.first].of->bits, [&](auto bits) {
        for (size_t tile = now.first; tile < now.last; tile++)
          with_tokens<TILE>(tiles[tile].width, [&](auto tokens) {
            multiply_block<decltype(bits)::value, decltype(tokens)::value>(tiles[tile], block, (Element*)y);
          });
      });
    }
  }
}

}  // namespace

extern "C" {

// Rows that stand side by side.
int lanes() { return LANES; }

// Whether activations and products may be bfloat16 here without int8; float32 they may always be, and both with int8.
int knows_bfloat16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// Up to how many bits activations may be rounded to int8 here; 0 where that is not known.
int most_bits_with_int8() {
#ifdef INT8
  return 4;
#else
  return 0;
#endif
}

// Asks for huge pages under memory that is not written yet: a CPU's own prefetching ends with each page.
void want_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)memory + bytes) / PAGE * PAGE;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// For each of `count` widths and each of their matrices i, whose expert is e = experts[i]: rows starts[e] to starts[e + 1]
// of y (rows, out) become those of x (rows, 2 * groups * pairs) times its transpose. All matrices have one shape.
void multiply_packed(const Matrices* widths, int64_t count, int is_bfloat16, int in_int8, const void* x, void* y,
                     const int64_t* starts) {
#ifdef INT8
#ifdef __AVX512BF16__
  if (in_int8 && is_bfloat16) return multiply_all<RoundedTile<Bfloat16Pair>>(widths, count, x, y, starts);
#else
  if (in_int8 && is_bfloat16) return multiply_all<RoundedTile<Bfloat16>>(widths, count, x, y, starts);
#endif
  if (in_int8) return multiply_all<RoundedTile<FloatPair>>(widths, count, x, y, starts);
#endif
#ifdef __AVX512BF16__
  if (is_bfloat16) return multiply_all<Tile<Bfloat16Pair>>(widths, count, x, y, starts);
#endif
  multiply_all<Tile<FloatPair>>(widths, count, x, y, starts);
}

}
