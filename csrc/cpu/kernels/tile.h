// A tile of a matrix product.
//
//   sums (R, n) = or += left (R, depth) @ right (depth, n)      n is V vectors at most
//
// R rows by V vectors of sums live in registers; an element of left, broadcast, meets V vectors of right.
// Each sum is formed over the depth in order, whatever the number of rows: a row's result does not depend
// on its neighbours. K-blocking: sums start anew every kKBlock and are added to those before, which keeps
// the chains of additions, and so the rounding errors, short.
#pragma once
#include "shuffle.h"
#include "tuning.h"
#include "vec.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Rows of a tile of V vectors: as many as there are registers for.
constexpr int tile_rows(int V) {
  const int most = V == 2 ? kTwoVectorRows : kTileRows;
  return kTileVectors / V < most ? kTileVectors / V : most;
}

template <class A>
constexpr int kWidth = kPanel * kLanes<A>;

// The left factor (rows, depth), row-major: a row's elements lie together ...
template <class L>
struct Rows {
  const L* at;
  int64_t stride, depth;

  L element(int64_t row, int64_t k) const { return at[row * stride + k]; }
  Rows from(int64_t row, int64_t k, int64_t n) const { return {at + row * stride + k, stride, n}; }
  // A cache line of each row of the next tile of R: rows too short for the hardware prefetcher.
  template <int R>
  LSTMFUSED_INLINED void prefetch_next(int64_t k) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) __builtin_prefetch(at + (R + r) * stride + k, 0, 2);
  }
};

#if defined(__AVX512BF16__)
// Pairs of numbers, as they lie.
template <>
struct Rows<bfloat16x2> {
  const bfloat16* at;
  int64_t stride, depth;  // in numbers; in pairs

  bfloat16x2 element(int64_t row, int64_t k) const {
    bfloat16x2 pair;
    __builtin_memcpy(&pair, at + row * stride + 2 * k, sizeof pair);
    return pair;
  }
  Rows from(int64_t row, int64_t k, int64_t n) const { return {at + row * stride + 2 * k, stride, n}; }
  template <int R>
  LSTMFUSED_INLINED void prefetch_next(int64_t k) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) __builtin_prefetch(at + (R + r) * stride + 2 * k, 0, 2);
  }
};
#endif

// ... or column-major: those of one depth do.
template <class L>
struct Columns {
  const L* at;
  int64_t stride, depth;

  L element(int64_t row, int64_t k) const { return at[k * stride + row]; }
  Columns from(int64_t row, int64_t k, int64_t n) const { return {at + k * stride + row, stride, n}; }
  template <int R>
  void prefetch_next(int64_t) const {}  // mostly the same cache lines
};

// Loops over registers must be unrolled before GCC decides which arrays to keep there (scalar replacement);
// without the pragmas it zeroes and copies the sums in memory.
template <int R, int V, class F>
LSTMFUSED_INLINE void each_sum(F&& f) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) f(r, v);
}

// The right factor (depth, columns): columns beyond the last whole vector are zero.
template <class P>
struct Right {
  const P* at;
  int64_t stride, columns;

  void prefetch_next() const {}

  // v of V of N lanes
  template <int V, int N>
  LSTMFUSED_INLINED auto vector(int v) const {
    return v < V - 1 ? load(at + v * N) : load_upto(at + v * N, columns - v * N);
  }
};

// (rows, columns)
template <class A>
struct Sums {
  A* at;
  int64_t stride, columns;
  bool fresh;        // or added to
  bool nontemporal;  // non-temporal stores: whole, aligned vectors
  bool prefetch;     // the sums are in memory: fetched while they are computed
};

// A cache line of the left factor, in numbers of the depth: so often is something prefetched.
template <class A>
constexpr int64_t kPrefetchDepth = 64 / int64_t(sizeof(A));

// left may come in parts, one after the other along the depth. RightFactor is Right or like it; its numbers
// are converted as they are loaded. Prefetch says whether sums.prefetch is looked at at all.
template <int R, int V, bool Prefetch, class A, class RightFactor, class... Left>
LSTMFUSED_INLINE void multiply_tile(RightFactor right, Sums<A> sums, Left... left) {
  constexpr int N = kLanes<A>;
  using Element = decltype(load(right.at));
  const auto load_part = [](auto* row, int v, int64_t n) LSTMFUSED_INLINED {
    return v < V - 1 ? load(row + v * N) : load_upto(row + v * N, n - v * N);
  };
  Vec<A> s[R][V];
  each_sum<R, V>([&](int r, int v) LSTMFUSED_INLINED { s[r][v] = Vec<A>{}; });
  A* next_sums = sums.at;
  A* const sums_end = sums.at + (Prefetch && sums.prefetch ? R * sums.stride : 0);
  const auto add = [&](auto rows) LSTMFUSED_INLINED {
    constexpr int64_t kLine = kPrefetchDepth<A>;
    for (int64_t k = 0; k < rows.depth;) {
      rows.template prefetch_next<R>(k);  // spread out: a burst would delay this tile's loads
      right.prefetch_next();
      if (Prefetch && next_sums < sums_end) {
        each_sum<1, V>([&](int, int v) LSTMFUSED_INLINED { __builtin_prefetch(next_sums + v * N, 1); });
        next_sums += sums.stride;
      }
      const int64_t end = k + kLine < rows.depth ? k + kLine : rows.depth;
      for (; k < end; k++, right.at += right.stride) {
        // The shorter side of the tile stays in registers, the other is loaded one by one.
        Element x[R], w[V];
        const auto load_left = [&](int, int r) LSTMFUSED_INLINED { x[r] = broadcast(rows.element(r, k)); };
        const auto load_right = [&](int, int v)
                                    LSTMFUSED_INLINED { w[v] = right.template vector<V, N>(v); };
        if constexpr (R < V) {
          each_sum<1, R>(load_left);
#pragma GCC unroll 16
          for (int v = 0; v < V; v++) {
            load_right(0, v);
            each_sum<R, 1>([&](int r, int) LSTMFUSED_INLINED { multiply_add(s[r][v], x[r], w[v]); });
          }
        } else {
          each_sum<1, V>(load_right);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            load_left(0, r);
            each_sum<1, V>([&](int, int v) LSTMFUSED_INLINED { multiply_add(s[r][v], x[r], w[v]); });
          }
        }
      }
    }
  };
  (add(left), ...);
  const auto at = [&](int r) { return sums.at + r * sums.stride; };
  if (!sums.fresh)
    each_sum<R, V>([&](int r, int v) LSTMFUSED_INLINED { s[r][v] += load_part(at(r), v, sums.columns); });
  if (sums.nontemporal)
    each_sum<R, V>([&](int r, int v) LSTMFUSED_INLINED { store_nontemporal(at(r) + v * N, s[r][v]); });
  else
    each_sum<R, V>([&](int r, int v) LSTMFUSED_INLINED {
      A* sum = at(r) + v * N;
      v < V - 1 ? store(sum, s[r][v]) : store_upto(sum, s[r][v], sums.columns - v * N);
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

// f(Constant<height>, row) for tiles of V vectors and of nearly equal height: 8 rows are 4 + 4, not 6 + 2
template <int V, class F>
LSTMFUSED_INLINE void each_tile(int64_t rows, F&& f) {
  constexpr int kMost = tile_rows(V);
  int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t row = 0; row < rows; tiles--) {
    const int64_t height = (rows - row + tiles - 1) / tiles;
    with_constant<kMost>(height, [&](auto R) { f(R, row); });
    row += height;
  }
}

// ---------------------------------------------------------------------------------------------------
// Layout

// out (factors, lanes) with row stride out_stride = the transpose of `from` (rows <= lanes, numbers); the
// lanes beyond `rows` are zero.
template <class T>
static void transpose_into(Factor<T>* out, int64_t out_stride, const T* from, int64_t from_stride,
                           int64_t rows, int64_t numbers) {
  using F = Factor<T>;
  constexpr int N = kLanes<F>;
  const int64_t depth = factors<T>(numbers);
  for (int64_t k = 0; k < depth; k += N) {
    Vec<F> block[N];
    for (int i = 0; i < N; i++)
      block[i] =
          i < rows ? load_factors(from + i * from_stride + k * kSpan<T>, numbers - k * kSpan<T>) : Vec<F>{};
    transpose<F>(block);
    const int64_t n = depth - k < N ? depth - k : N;
    for (int i = 0; i < N; i++)
      if (i < n) store(out + (k + i) * out_stride, block[i]);
  }
}

// Part i of n of the range [0, total), in multiples of `unit`. The parts that are larger by one are spread
// from the first on, so that threads meet them before the smaller ones.
struct Range {
  int64_t begin, size;
};
static Range split_range(int64_t i, int64_t n, int64_t total, int64_t unit) {
  const int64_t units = (total + unit - 1) / unit;
  const auto start = [&](int64_t part) {
    const int64_t at = (units * part + n - 1) / n * unit;
    return at < total ? at : total;
  };
  return {start(i), start(i + 1) - start(i)};
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
