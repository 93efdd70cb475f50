// Matrix products, one panel at a time: a panel is `depth` rows of kPanel vectors that stay in cache
// while any number of rows of the other factor pass over it.
//
//   sums (rows, width) += left (rows, depth) @ panel (depth, width)      width = kPanel * lanes
//
// Each element is summed over depth in order, whatever the number of rows: the result of a row does not
// depend on its neighbours. Sums start anew with each panel and are added to those before, which keeps
// the chains of additions, and so the rounding errors, short.
#pragma once
#include "vec.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

constexpr int kPanel = 4;    // vectors in a panel's row: in the forward step, one for each gate
constexpr int kDepth = 256;  // rows of a panel in scratch: 64 KiB or less, in L2 together with the sums
constexpr int kRows = 384;   // rows of sums in scratch
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;  // of 32 registers: 24 sums, 4 of the panel
#else
constexpr int kTileRows = 3;  // of 16 registers: 12 sums, 1 of the panel, 3 of the left factor
#endif

template <class A>
constexpr int kWidth = kPanel * kLanes<A>;

template <class A>
struct Scratch {
  alignas(64) A panel[kDepth * kWidth<A>];
  alignas(64) A sums[kRows * kWidth<A>];
};

// One tile of R rows: sums live in registers. P is the panel's type, converted as it is loaded.
template <int R, class A, class P>
static void multiply_tile(const A* left, int64_t left_stride, const P* panel, int64_t panel_stride,
                          int64_t depth, A* sums, int64_t sums_stride, bool fresh) {
  constexpr int N = kLanes<A>;
  for (int r = 0; r < R; r++)  // wanted at the end, and likely a cache level away
    for (int v = 0; v < kPanel; v++) __builtin_prefetch(sums + r * sums_stride + v * N, 1);
  Vec<A> s[R][kPanel] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vec<A> x[R];
    for (int r = 0; r < R; r++) x[r] = broadcast(left[r * left_stride + k]);
    for (int v = 0; v < kPanel; v++) {
      const Vec<A> w = load(panel + k * panel_stride + v * N);
      for (int r = 0; r < R; r++) s[r][v] += x[r] * w;
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kPanel; v++) {
      A* sum = sums + r * sums_stride + v * N;
      store(sum, fresh ? s[r][v] : load(sum) + s[r][v]);
    }
}

// Rows are cut into tiles of nearly equal height: 8 into 4 + 4, not 6 + 2.
template <class A, class P>
static void multiply(int64_t rows, const A* left, int64_t left_stride, const P* panel, int64_t panel_stride,
                     int64_t depth, A* sums, int64_t sums_stride, bool fresh) {
  int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  while (rows > 0) {
    const int64_t height = (rows + tiles - 1) / tiles;
    const auto tile = [&](auto function) {
      function(left, left_stride, panel, panel_stride, depth, sums, sums_stride, fresh);
    };
    switch (height) {
      case 1: tile(multiply_tile<1, A, P>); break;
      case 2: tile(multiply_tile<2, A, P>); break;
      case 3: tile(multiply_tile<3, A, P>); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 4: tile(multiply_tile<4, A, P>); break;
      case 5: tile(multiply_tile<5, A, P>); break;
      case 6: tile(multiply_tile<6, A, P>); break;
#endif
    }
    left += height * left_stride;
    sums += height * sums_stride;
    rows -= height;
    tiles--;
  }
}

// out (depth, lanes) with row stride out_stride = the transpose of `from` (rows <= lanes, depth); the
// lanes beyond `rows` are zero.
template <class A, class T>
static void transpose_into(A* out, int64_t out_stride, const T* from, int64_t from_stride, int64_t rows,
                           int64_t depth) {
  constexpr int N = kLanes<A>;
  for (int64_t k = 0; k < depth; k += N) {
    Vec<A> block[N];
    for (int i = 0; i < N; i++)
      block[i] = i < rows ? load_upto(from + i * from_stride + k, depth - k) : Vec<A>{};
    transpose<A>(block);
    const int64_t n = depth - k < N ? depth - k : N;
    for (int i = 0; i < N; i++)
      if (i < n) store(out + (k + i) * out_stride, block[i]);
  }
}

// panel (depth, width) = the first `columns` columns of `from`; the others are zero.
template <class A, class T>
static void copy_panel(A* panel, const T* from, int64_t from_stride, int64_t columns, int64_t depth) {
  constexpr int N = kLanes<A>;
  for (int64_t k = 0; k < depth; k++)
    for (int v = 0; v < kPanel; v++) {
      const int64_t n = columns - v * N;
      const T* p = from + k * from_stride + v * N;
      store(panel + k * kWidth<A> + v * N, n > 0 ? load_upto(p, n) : Vec<A>{});
    }
}

// How many pieces to cut `rows` into, so that a piece fits the scratch and, where the rows allow, every
// thread finds a few of them (there being `others` tasks to each piece).
static int64_t row_pieces(int64_t rows, int64_t others, int64_t threads) {
  int64_t pieces = (rows + kRows - 1) / kRows;
  while (pieces * others < 3 * threads && rows / pieces >= 48) pieces *= 2;
  return pieces;
}

// Piece i of n of the range [0, total), in multiples of `unit`.
struct Range {
  int64_t begin, size;
};
static Range piece(int64_t i, int64_t n, int64_t total, int64_t unit) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t begin = units * i / n * unit, end = units * (i + 1) / n * unit;
  return {begin, (end < total ? end : total) - begin};
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
