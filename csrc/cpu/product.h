// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks, each some rows by some columns.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// kFew, kFewDepth, kPastCacheBytes and kFarRightBytes were measured on Zen 4, the others on an Intel Xeon
// with AMX.
constexpr int64_t kBlockRows = 384;   // by as many columns as leave half a cache to other things
constexpr int64_t kScratchRows = 96;  // by as many columns as a scratch for sums has room for
// So few rows leave a block of right no time to be fetched: then it is read nearly in the order in which it
// lies.
constexpr int64_t kFew = 2 * tile_rows(kPanel), kFewDepth = 32;
// Copies that lie together pay: of right for so many rows and so deep, of left for so many columns.
constexpr int64_t kPackRows = 48, kPackDepth = 33, kGatherColumns = 256;
// Bytes of out that do not stay near from block to block, and that fit no cache beside the rest. To write
// less than that past the caches is sooner done, but the optimizer that reads it next loses more.
constexpr int64_t kFarBytes = 2 << 20, kPastCacheBytes = 8 << 20;
// Bytes of right in more pages than a processor knows by heart: few rows would wait for each.
constexpr int64_t kFarRightBytes = 8 << 20;

template <class T, class Left>
struct Product {
  using A = Accumulate<T>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);  // out holds sums; else they need a scratch
  static constexpr int L = kLanes<A>;
  static constexpr int64_t W = kWidth<A>, kSums = kRows * W;
  static constexpr int64_t kBlock = kInPlace ? kBlockRows : kScratchRows;

  Left left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, K, N;
  bool fresh;                               // or added to what is in out, which then holds sums
  int64_t depth = 0, across = 0, down = 0;  // no task where out is null
  bool past_cache = false, far = false, far_right = false;

  Product(Left left, const T* right, int64_t right_stride, T* out, int64_t M, int64_t N, bool fresh,
          const Pool& pool)
      : left(left),
        right(right),
        right_stride(right_stride),
        out(out),
        M(M),
        K(left.depth),
        N(N),
        fresh(fresh) {
    if (!out) return;
    depth = M <= kFew ? kFewDepth : kDepth;
    past_cache = kInPlace && fresh && K <= depth && M * N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                 N * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    far = kInPlace && !past_cache && M * N * int64_t(sizeof(T)) >= kFarBytes;
    far_right = M <= kFew && K * N * int64_t(sizeof(T)) >= kFarRightBytes;
    constexpr int64_t kScratch = kSums / kBlock / W * W;
    const int64_t cached = pool.cache / 2 / (kBlock * int64_t(sizeof(A))) / W * W;
    const int64_t columns = kInPlace && cached > kScratch ? cached : kScratch;
    // Whole rows, where a block is all: what a thread writes lies together then, and two that write to the
    // same rows by turns take the lines from each other.
    const bool rows_only = kInPlace && K < kPackDepth;
    across = rows_only ? 1 : (N + columns - 1) / columns;
    down = (M + kBlock - 1) / kBlock;
    // Enough for every thread: first of rows, as long as there are many of them, then of columns.
    while (across * down < 2 * pool.threads) {
      if (M / down >= 2 * kFew * (rows_only ? 1 : 4))
        down++;
      else if (N / across >= 2 * W)
        across++;
      else if (M / down >= 2 * kFew)
        down++;
      else
        break;
    }
  }

  int64_t tasks() const { return across * down; }
  int64_t work() const { return out ? M * K * N : 0; }

  void run(int64_t task) const {
    const Range columns = piece(task / down, across, N, W);
    const Range rows = piece(task % down, down, M, tile_rows(kPanel));
    if constexpr (kInPlace) {
      add_blocks(rows, columns, out + rows.begin * N + columns.begin, N);
      if (past_cache) stream_end();
    } else {
      alignas(64) A sums[kSums];
      const int64_t stride = (columns.size + L - 1) / L * L;
      add_blocks(rows, columns, sums, stride);
      for (int64_t r = 0; r < rows.size; r++)
        for (int64_t c = 0; c < columns.size; c += L)
          store_upto(out + (rows.begin + r) * N + columns.begin + c, load(sums + r * stride + c),
                     columns.size - c);
    }
  }

  // sums (rows, columns)
  void add_blocks(Range rows, Range columns, A* sums, int64_t stride) const {
    // Pairs round the gate gradients: whether they are used must not depend on the cut.
    const bool pack = (kSpan<T> > 1 ? M : rows.size) >= kPackRows && K >= kPackDepth;
    for (int64_t k = 0; k < K; k += depth) {
      const Block block{rows.size,
                        left.from(rows.begin, k, K - k < depth ? K - k : depth),
                        {right + k * right_stride + columns.begin, right_stride, columns.size},
                        {sums, stride, columns.size, fresh && k == 0, past_cache, far}};
      pack ? add_panels(block) : add_rows(block);
    }
  }

  struct Block {
    int64_t rows;
    Left left;
    Right<T> right;
    Sums<A> sums;
  };

  // Panel after panel of right, copied to lie together unless it does: all rows of left pass over it, while
  // the next one is fetched bit by bit.
  void add_panels(const Block& b) const {
    alignas(64) Factor<T> room[kDepth * W], left_room[kDepth * kBlock];
    const int64_t depth = b.left.depth, rows = b.rows;
    const auto left = gathered(b.left, rows, b.right.columns, left_room);
    for (int64_t c = 0; c < b.right.columns; c += W) {
      const int64_t n = b.right.columns - c < W ? b.right.columns - c : W;
      const T* next = c + W < b.right.columns ? b.right.at + c + W : b.right.at + depth * b.right.stride;
      with_constant<kPanel>((n + L - 1) / L, [&](auto V) {
        const auto panel = gathered<V.value>({b.right.at + c, b.right.stride, n}, depth, room);
        each_tile<V.value>(rows, [&](auto R, int64_t row) {
          for (int64_t k = row * depth / rows; k < (row + R.value) * depth / rows; k++)
            for (int v = 0; v < kPanel; v++) __builtin_prefetch(next + k * b.right.stride + v * L, 0, 2);
          multiply_tile<R.value, V.value, kInPlace>(panel, part(b.sums, row, c, n),
                                                    left.from(row, 0, left.depth));
        });
      });
    }
  }

  template <int V>
  static Right<Factor<T>> gathered(Right<T> right, int64_t depth, Factor<T>* room) {
    if constexpr (kInPlace)
      if (right.stride <= W) return right;
    for (int64_t k = 0; k < factors<T>(depth); k++)
      for (int v = 0; v < V; v++) {
        const auto part = [&](int64_t i) {
          return i < depth ? load_upto(right.at + i * right.stride + v * L, right.columns - v * L)
                           : Vec<A>{};
        };
        if constexpr (kSpan<T> == 1)
          store(room + (k * V + v) * L, part(k));
        else
          store(room + (k * V + v) * L, zip_exact(part(2 * k), part(2 * k + 1)));
      }
    return {room, V * L, V * L};
  }

  // Of a block of left that is used again and again: rows lie together anyway, columns in far apart lines.
  static Rows<A> gathered(Rows<A> left, int64_t, int64_t, A*) { return left; }
  static Columns<A> gathered(Columns<A> left, int64_t rows, int64_t columns, A* room) {
    if (columns < kGatherColumns) return left;
    const int64_t stride = (rows + L - 1) / L * L;
    for (int64_t k = 0; k < left.depth; k++)
      for (int64_t r = 0; r < rows; r += L)
        store(room + k * stride + r, load_upto(left.at + k * left.stride + r, rows - r));
    return {room, stride, left.depth};
  }
#if defined(__AVX512BF16__)
  // As pairs.
  static Rows<bfloat16x2> gathered(Rows<A> left, int64_t rows, int64_t, bfloat16x2* room) {
    constexpr int64_t stride = kDepth / 2;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < left.depth; k += 2 * L) {
        const A* at = left.at + r * left.stride + k;
        const int64_t n = left.depth - k;
        store(room + r * stride + k / 2,
              pairs(load_upto(at, n), n > L ? load_upto(at + L, n - L) : Vec<A>{}));
      }
    return {reinterpret_cast<const bfloat16*>(room), 2 * stride, (left.depth + 1) / 2};
  }
  static Columns<bfloat16x2> gathered(Columns<A> left, int64_t rows, int64_t, bfloat16x2* room) {
    const int64_t stride = (rows + L - 1) / L * L, depth = (left.depth + 1) / 2;
    for (int64_t k = 0; k < depth; k++)
      for (int64_t r = 0; r < rows; r += L) {
        const auto part = [&](int64_t i) {
          return i < left.depth ? load_upto(left.at + i * left.stride + r, rows - r) : Vec<A>{};
        };
        store(room + k * stride + r, zip(part(2 * k), part(2 * k + 1)));
      }
    return {room, stride, depth};
  }
#endif

  // Tile after tile from the first column to the last, so that out is written in order.
  void add_rows(const Block& b) const {
    each_tile<kPanel>(b.rows, [&](auto R, int64_t row) {
      const auto tile = [&](auto V, int64_t c, int64_t n) {
        if (far_right && row == 0)  // the same columns of the next block
          for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 4
            for (int v = 0; v < V.value; v++)
              __builtin_prefetch(b.right.at + (depth + k) * b.right.stride + c + v * L, 0, 2);
        multiply_tile<R.value, V.value, false>(Right<T>{b.right.at + c, b.right.stride, n},
                                               part(b.sums, row, c, n), b.left.from(row, 0, b.left.depth));
      };
      int64_t c = 0;
      for (; c + W <= b.right.columns; c += W) tile(Constant<kPanel>{}, c, W);
      if (const int64_t n = b.right.columns - c)
        with_constant<kPanel>((n + L - 1) / L, [&](auto V) { tile(V, c, n); });
    });
  }

  static Sums<A> part(Sums<A> sums, int64_t row, int64_t column, int64_t columns) {
    return {
        sums.at + row * sums.stride + column, sums.stride, columns, sums.fresh, sums.past_cache, sums.far};
  }
};

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
