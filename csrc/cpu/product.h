// Matrix products, a tile at a time.
//
//   sums (R, n) = or += left (R, depth) @ right (depth, n)      n is V vectors at most
//
// R rows by V vectors of sums live in registers; an element of left, broadcast, meets V vectors of right.
// Each sum is formed over depth in order, whatever the number of rows: the result of a row does not depend
// on its neighbours. Sums start anew every kDepth and are added to those before, which keeps the chains of
// additions, and so the rounding errors, short.
#pragma once
#include "vec.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

constexpr int kPanel = 4;    // vectors in a row of right, at most
constexpr int kDepth = 256;  // kDepth by kPanel vectors of right are 64 KiB or less, in L2 beside the sums
constexpr int kRows = 512;   // rows of kPanel vectors of sums in scratch
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;  // of 32 registers: 24 sums, 4 of right
#else
constexpr int kTileRows = 3;  // of 16 registers: 12 sums, 1 of right, 3 of left
#endif

template <class A>
constexpr int kWidth = kPanel * kLanes<A>;

// (rows, depth), a row's elements contiguous
template <class L>
struct Rows {
  const L* at;
  int64_t stride, depth;
};

// Loops over registers must vanish before the compiler looks for arrays to keep there: hence the pragmas,
// without which GCC zeroes and copies the sums in memory.
template <int R, int V, class F>
LSTMFUSED_INLINE void each_sum(F&& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) f(r, v);
}

// left comes in two parts, one behind the other along the depth. P is the type of right, converted as it is
// loaded. `past_cache` needs whole vectors and sums in lines of their own.
template <int R, int V, class A, class P>
LSTMFUSED_INLINE void multiply_tile(Rows<A> first, Rows<A> second, const P* right, int64_t right_stride,
                                    A* sums, int64_t stride, bool fresh, int64_t n, bool past_cache) {
  constexpr int N = kLanes<A>;
  const auto load_part = [n](auto* row, int v) {
    return v < V - 1 ? load(row + v * N) : load_upto(row + v * N, n - v * N);
  };
  Vec<A> s[R][V];
  each_sum<R, V>([&](int r, int v) { s[r][v] = Vec<A>{}; });
  const auto add = [&](Rows<A> left) {
    for (int64_t k = 0; k < left.depth; k++, right += right_stride) {
      Vec<A> x[R];
      each_sum<R, 1>([&](int r, int) { x[r] = broadcast(left.at[r * left.stride + k]); });
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const Vec<A> w = load_part(right, v);
        each_sum<R, 1>([&](int r, int) { s[r][v] += x[r] * w; });
      }
    }
  };
  add(first);
  add(second);
  if (!fresh) each_sum<R, V>([&](int r, int v) { s[r][v] += load_part(sums + r * stride, v); });
  if (past_cache)
    each_sum<R, V>([&](int r, int v) { stream(sums + r * stride + v * N, s[r][v]); });
  else
    each_sum<R, V>([&](int r, int v) {
      A* sum = sums + r * stride + v * N;
      v < V - 1 ? store(sum, s[r][v]) : store_upto(sum, s[r][v], n - v * N);
    });
}

// ---------------------------------------------------------------------------------------------------
// From numbers to the templates' arguments

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<number>) for a number from 1 to Most
template <int Most, class F>
LSTMFUSED_INLINE void with_constant(int64_t number, F&& f) {
  if constexpr (Most > 1)
    if (number < Most) return with_constant<Most - 1>(number, f);
  f(Constant<Most>{});
}

// f(Constant<height>, row) for tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2
template <class F>
LSTMFUSED_INLINE void each_tile(int64_t rows, F&& f) {
  int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t row = 0; row < rows; tiles--) {
    const int64_t height = (rows - row + tiles - 1) / tiles;
    with_constant<kTileRows>(height, [&](auto R) { f(R, row); });
    row += height;
  }
}

// The rows of the next tile: short pieces, far apart, which the processor does not foresee.
template <int R, class L>
LSTMFUSED_INLINE void prefetch_next(Rows<L> rows) {
  for (int64_t k = 0; k < rows.depth; k += 64 / int64_t(sizeof(L)))
    for (int r = 0; r < R; r++) __builtin_prefetch(rows.at + (R + r) * rows.stride + k, 0, 2);
}

// ---------------------------------------------------------------------------------------------------
// Layout

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
