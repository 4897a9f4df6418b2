// The parts of rounding under a second moment in which each column waits for the one before: see columns.py.
//
// Matrices are (columns, rows), so that the rows of a column lie side by side, one in each lane of a vector. Every sum is
// taken in the order of columns.py, and no product is fused with a sum (-ffp-contract=off), so that codes are the same.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// As wide as a register, and enough of them to wait for none.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int VECTORS = 4, WIDTH = LANES * VECTORS;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// Some rows of one column; past the last row, zeros.
struct Rows {
  Floats v[VECTORS];

  static Rows load(const float* from, int64_t count) {
    Rows rows = {};
    std::memcpy(&rows, from, 4 * count);
    return rows;
  }
  void store(float* to, int64_t count) const { std::memcpy(to, this, 4 * count); }

  void add(float factor, const Rows& other) {
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) v[i] += factor * other.v[i];
  }
  bool any() const {
    Ints found = v[0] != 0.0f;
    for (int i = 1; i < VECTORS; i++) found |= v[i] != 0.0f;
    for (int lane = 0; lane < LANES; lane++)
      if (found[lane]) return true;
    return false;
  }
};

// The nearest code, half way to the even one.
inline Floats nearest(Floats x, float top) {
  const Floats least = {}, most = least + top;
  x = x > least ? x : least;
  x = x < most ? x : most;
  return (x + 0x1.8p23f) - 0x1.8p23f;
}

}  // namespace

extern "C" {

// As columns.py's `_round`. weight, left, codes, errors: (columns, rows); factor: (columns, columns), its rows `stride`
// apart; scale, offset, inverse: (groups of the matrix, rows); group: (columns).
void round_columns(int threads, int64_t columns, int64_t rows, const float* weight, const float* left,
                   const float* factor, int64_t stride, const int64_t* group, const float* scale, const float* offset,
                   const float* inverse, float top, float* codes, float* errors) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<Rows> found(columns);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += WIDTH) {
      const int64_t count = rows - first < WIDTH ? rows - first : WIDTH;
      for (int64_t column = 0; column < columns; column++) {
        const int64_t here = column * rows + first, grid = group[column] * rows + first;
        Rows wanted = Rows::load(left + here, count), code, error;
        for (int64_t before = 0; before < column; before++) wanted.add(-factor[column * stride + before], found[before]);
        const Rows width = Rows::load(scale + grid, count), low = Rows::load(offset + grid, count);
        const Rows steps = Rows::load(inverse + grid, count), exact = Rows::load(weight + here, count);
        for (int i = 0; i < VECTORS; i++) {
          code.v[i] = nearest((wanted.v[i] - low.v[i]) * steps.v[i], top);
          error.v[i] = (code.v[i] * width.v[i] + low.v[i]) - exact.v[i];
        }
        found[column] = error;
        code.store(codes + here, count);
        error.store(errors + here, count);
      }
    }
  }
}

// As columns.py's `_fit`, and what follows from it. codes, by_code, slope, weight, errors, change: (columns, rows); scale,
// offset, inverse: (rows). Errors and grid are changed in place. ones: the sum of the group's second moment.
void fit_columns(int threads, int64_t columns, int64_t rows, const float* codes, const float* by_code,
                 const float* slope, const float* weight, float ones, float ridge, float* scale, float* offset,
                 float* inverse, float* errors, float* change) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < rows; first += WIDTH) {
    const int64_t count = rows - first < WIDTH ? rows - first : WIDTH;
    Rows square = {}, mixed = {}, by_scale = {}, by_offset = {};
    for (int64_t at = first; at < columns * rows; at += rows) {
      const Rows code = Rows::load(codes + at, count), by = Rows::load(by_code + at, count);
      const Rows down = Rows::load(slope + at, count);
      for (int i = 0; i < VECTORS; i++) {
        square.v[i] += by.v[i] * code.v[i];
        mixed.v[i] += by.v[i];
        by_scale.v[i] += down.v[i] * code.v[i];
        by_offset.v[i] += down.v[i];
      }
    }
    Rows width = Rows::load(scale + first, count), low = Rows::load(offset + first, count), steps;
    for (int i = 0; i < VECTORS; i++) {
      const Floats both = square.v[i] * ridge, determinant = both * ones - mixed.v[i] * mixed.v[i];
      const Floats wider = width.v[i] + (mixed.v[i] * by_offset.v[i] - by_scale.v[i] * ones) / determinant;
      const Floats higher = low.v[i] + (mixed.v[i] * by_scale.v[i] - both * by_offset.v[i]) / determinant;
      const Ints taken = (determinant > both * ones * 1e-6f) & (wider > 0.0f) & (wider <= width.v[i] * 3.0f);
      width.v[i] = taken ? wider : width.v[i];
      low.v[i] = taken ? higher : low.v[i];
      steps.v[i] = width.v[i] > 0.0f ? 1.0f / width.v[i] : Floats{};
    }
    width.store(scale + first, count);
    low.store(offset + first, count);
    steps.store(inverse + first, count);
    for (int64_t at = first; at < columns * rows; at += rows) {
      const Rows code = Rows::load(codes + at, count), exact = Rows::load(weight + at, count);
      Rows before = Rows::load(errors + at, count), after;
      for (int i = 0; i < VECTORS; i++) {
        after.v[i] = (code.v[i] * width.v[i] + low.v[i]) - exact.v[i];
        before.v[i] = after.v[i] - before.v[i];
      }
      after.store(errors + at, count);
      before.store(change + at, count);
    }
  }
}

// As columns.py's `_move`. codes, slope, moved: (columns, rows); moment: (columns, columns), its rows `stride` apart;
// per_square: (columns); scale, inverse: (rows). Codes are changed in place.
void move_columns(int threads, int64_t columns, int64_t rows, const float* slope, const float* moment, int64_t stride,
                  const float* per_square, const float* scale, const float* inverse, float top, float* codes,
                  float* moved) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<Rows> changes(columns);
    std::vector<int64_t> changed;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += WIDTH) {
      const int64_t count = rows - first < WIDTH ? rows - first : WIDTH;
      const Rows width = Rows::load(scale + first, count), steps = Rows::load(inverse + first, count);
      changed.clear();
      for (int64_t column = 0; column < columns; column++) {
        const int64_t here = column * rows + first;
        Rows down = Rows::load(slope + here, count), change;
        for (const int64_t before : changed) down.add(moment[column * stride + before], changes[before]);
        const Rows old = Rows::load(codes + here, count);
        Rows code;
        for (int i = 0; i < VECTORS; i++) {
          code.v[i] = nearest(old.v[i] - down.v[i] * per_square[column] * steps.v[i], top);
          change.v[i] = (code.v[i] - old.v[i]) * width.v[i];
        }
        if (change.any()) changed.push_back(column);
        changes[column] = change;
        code.store(codes + here, count);
        change.store(moved + here, count);
      }
    }
  }
}

}
