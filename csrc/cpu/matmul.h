// Products of matrices that lie in the caches: a tile of sums in registers, and panels that feed it.
//
// Sums run along the depth in its order, however a product is cut into tiles, so that a result depends on nothing else.
#pragma once
#include "lanes.h"

namespace lipgan::cpu::LIPGAN_ISA {

#if defined(__AVX512F__)
constexpr int kTileVectors = 4;  // 24 sums in 32 registers
#elif defined(__x86_64__)
constexpr int kTileVectors = 2;  // 12 sums in 16 registers
#else
constexpr int kTileVectors = 4;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kPanelBytes = 32 << 10;  // of a panel that all rows of a product meet: most of a common L1 cache

// c[i, j] = (start[i, j] + sum over k < depth of a[i, k] b[k, j]) * factor[i, j] for rows i and vectors of columns j; with
// `adds`, which wants a factor, that is added to c[i, j].
template <class T>
struct Product {
  const T* a;  // a[i * a_row + k * a_depth]
  int64_t a_row, a_depth;
  const T* b;  // b[k * b_depth + j]
  int64_t b_depth;
  T* c;  // c[i * c_row + j]
  int64_t c_row;
  const T* start;  // start[i * start_row + j]; null for zeros. c itself continues a sum.
  int64_t start_row;
  const T* factor;  // factor[i * factor_row + j]; null for ones
  int64_t factor_row;
  int64_t depth;
  bool adds = false;
};

template <int R, int C, class T>
inline void tile(const Product<T>& product) {
  using V = Vector<T>;
  constexpr int L = kLanes<T>;
  V sums[static_cast<size_t>(R)][static_cast<size_t>(C)];
  if (product.start) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[i][j] = load(product.start + i * product.start_row + j * L);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[i][j] = V{};
    }
  }
  const int64_t a_row = product.a_row, a_depth = product.a_depth, b_depth = product.b_depth;
  const T *a = product.a, *b = product.b;
  for (int64_t k = product.depth; k > 0; --k) {
    V columns[static_cast<size_t>(C)];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) columns[j] = load(b + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V row = a[i * a_row] - V{};
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[i][j] += row * columns[j];
    }
    a += a_depth;
    b += b_depth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      if (product.adds) {
        // In one expression: otherwise tiles of some heights would round the product before the sum, and others not.
        sums[i][j] = sums[i][j] * load(product.factor + i * product.factor_row + j * L) +
                     load(product.c + i * product.c_row + j * L);
      } else if (product.factor) {
        sums[i][j] *= load(product.factor + i * product.factor_row + j * L);
      }
      store(product.c + i * product.c_row + j * L, sums[i][j]);
    }
  }
}

template <int R, class T>
inline void tile_of_rows(const Product<T>& product, int64_t vectors) {
  switch (vectors) {
    case 1: return tile<R, 1>(product);
    case 2: return tile<R, 2>(product);
#if defined(__AVX512F__) || !defined(__x86_64__)
    case 3: return tile<R, 3>(product);
    case 4: return tile<R, 4>(product);
#endif
  }
}

// The product for any number of rows and at most kTileVectors vectors of columns: rows in tiles of nearly equal height.
template <class T>
inline void multiply(Product<T> product, int64_t rows, int64_t vectors) {
  const T *a = product.a, *start = product.start, *factor = product.factor;
  T* c = product.c;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
    product.a = a + first * product.a_row;
    product.c = c + first * product.c_row;
    product.start = start ? start + first * product.start_row : nullptr;
    product.factor = factor ? factor + first * product.factor_row : nullptr;
    switch (last - first) {
      case 1: tile_of_rows<1>(product, vectors); break;
      case 2: tile_of_rows<2>(product, vectors); break;
      case 3: tile_of_rows<3>(product, vectors); break;
      case 4: tile_of_rows<4>(product, vectors); break;
      case 5: tile_of_rows<5>(product, vectors); break;
      case 6: tile_of_rows<6>(product, vectors); break;
    }
  }
}

// ---- panels ----

template <int... I> struct Sequence {};
template <int N, int... I> struct SequenceOf : SequenceOf<N - 1, N - 1, I...> {};
template <int... I> struct SequenceOf<0, I...> { using type = Sequence<I...>; };

// Swaps the parts of a and b in which bit H of the lane differs from that of the row.
template <int H, class T, int... I>
inline void exchange(Vector<T>& a, Vector<T>& b, Sequence<I...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  const Vector<T> low = __builtin_shufflevector(a, b, (I & H ? L + I - H : I)...);
  const Vector<T> high = __builtin_shufflevector(a, b, (I & H ? L + I : I + H)...);
#else
  using Mask = typename VectorOf<T>::mask;
  const Vector<T> low = __builtin_shuffle(a, b, Mask{(I & H ? L + I - H : I)...});
  const Vector<T> high = __builtin_shuffle(a, b, Mask{(I & H ? L + I : I + H)...});
#endif
  a = low;
  b = high;
}

template <int H, class T>
inline void transpose(Vector<T>* rows) {
  constexpr int L = kLanes<T>;
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (!(i & H)) exchange<H, T>(rows[i], rows[i + H], typename SequenceOf<L>::type());
    }
    transpose<H / 2, T>(rows);
  }
}

// panel[k * width + j] = matrix[j * row + k] for j < lanes and k < depth; 0 for the j from `rows` on.
template <class T>
inline void pack_transposed(const T* matrix, int64_t row, int64_t rows, int64_t depth, T* panel, int64_t width) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  if (rows >= L) {
    for (; k + L <= depth; k += L) {
      Vector<T> block[static_cast<size_t>(L)];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) block[j] = load(matrix + j * row + k);
      transpose<L / 2, T>(block);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store(panel + (k + j) * width, block[j]);
    }
  }
  for (; k < depth; ++k) {
    for (int64_t j = 0; j < L; ++j) panel[k * width + j] = j < rows ? matrix[j * row + k] : T(0);
  }
}

// panel[k * width + j] = matrix[k * row + j] for j < width; 0 for the j from `columns` on.
template <class T>
inline void pack(const T* matrix, int64_t row, int64_t columns, int64_t depth, T* panel, int64_t width) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < depth; ++k) {
    int64_t j = 0;
    for (; j + L <= columns && j < width; j += L) store(panel + k * width + j, load(matrix + k * row + j));
    for (; j < width; ++j) panel[k * width + j] = j < columns ? matrix[k * row + j] : T(0);
  }
}

}  // namespace lipgan::cpu::LIPGAN_ISA
