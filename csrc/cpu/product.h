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

// One tile of R rows by V of the panel's vectors: sums live in registers. P is the panel's type, converted
// as it is loaded.
template <int R, int V, class A, class P>
static void multiply_tile(const A* left, int64_t left_stride, const P* panel, int64_t panel_stride,
                          int64_t depth, A* sums, int64_t sums_stride, bool fresh) {
  constexpr int N = kLanes<A>;
  for (int r = 0; r < R && !fresh; r++)  // wanted at the end, and likely a cache level away
    for (int v = 0; v < V; v++) __builtin_prefetch(sums + r * sums_stride + v * N, 1);
  Vec<A> s[R][V] = {};
  constexpr int64_t kLine = 64 / sizeof(A);
  for (int64_t line = 0; line < depth; line += kLine) {
    for (int r = 0; r < R; r++)  // the next tile's rows: short pieces, far apart
      __builtin_prefetch(left + (R + r) * left_stride + line, 0, 2);
    const int64_t end = depth - line < kLine ? depth : line + kLine;
    for (int64_t k = line; k < end; k++) {
      Vec<A> x[R];
      for (int r = 0; r < R; r++) x[r] = broadcast(left[r * left_stride + k]);
      for (int v = 0; v < V; v++) {
        const Vec<A> w = load(panel + k * panel_stride + v * N);
        for (int r = 0; r < R; r++) s[r][v] += x[r] * w;
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      A* sum = sums + r * sums_stride + v * N;
      store(sum, fresh ? s[r][v] : load(sum) + s[r][v]);
    }
}

template <class A, class P>
using Tile = void (*)(const A*, int64_t, const P*, int64_t, int64_t, A*, int64_t, bool);

template <int R, class A, class P>
static Tile<A, P> tile_of_width(int vectors) {
  constexpr Tile<A, P> tiles[] = {multiply_tile<R, 1, A, P>, multiply_tile<R, 2, A, P>,
                                  multiply_tile<R, 3, A, P>, multiply_tile<R, 4, A, P>};
  return tiles[vectors - 1];
}

template <class A, class P>
static Tile<A, P> tile_of(int64_t rows, int vectors) {
  switch (rows) {
    case 1: return tile_of_width<1, A, P>(vectors);
    case 2: return tile_of_width<2, A, P>(vectors);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return tile_of_width<3, A, P>(vectors);
    case 4: return tile_of_width<4, A, P>(vectors);
    case 5: return tile_of_width<5, A, P>(vectors);
#endif
    default: return tile_of_width<kTileRows, A, P>(vectors);
  }
}

// The first `columns` of a panel for any number of rows, cut into tiles of nearly equal height: 8 into
// 4 + 4, not 6 + 2. Columns are rounded up to whole vectors.
template <class A, class P>
static void multiply(int64_t rows, const A* left, int64_t left_stride, const P* panel, int64_t panel_stride,
                     int64_t depth, A* sums, int64_t sums_stride, int64_t columns, bool fresh) {
  const int vectors = columns < kWidth<A> ? int((columns + kLanes<A> - 1) / kLanes<A>) : kPanel;
  int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  while (rows > 0) {
    const int64_t height = (rows + tiles - 1) / tiles;
    tile_of<A, P>(height, vectors)(left, left_stride, panel, panel_stride, depth, sums, sums_stride, fresh);
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
      __builtin_prefetch(p + 8 * from_stride);  // rows lie too far apart for the processor to foresee
      store(panel + k * kWidth<A> + v * N, n > 0 ? load_upto(p, n) : Vec<A>{});
    }
}

// How many pieces to cut `rows` into, so that none has more than `most` and, where the rows allow, every
// thread finds a few of them (there being `others` tasks to each piece).
static int64_t row_pieces(int64_t rows, int64_t most, int64_t others, int64_t threads) {
  int64_t pieces = (rows + most - 1) / most;
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
