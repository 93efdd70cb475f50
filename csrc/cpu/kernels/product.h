// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks, each some rows by some columns.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Few rows: see kSmallProductTiles.
constexpr int64_t kSmallProductRows = kSmallProductTiles * tile_rows(kPanel);

template <class T, class Left>
struct Product {
  using A = Accumulate<T>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);  // out holds sums; else they need a scratch
  static constexpr int L = kLanes<A>;
  static constexpr int64_t W = kWidth<A>, kSums = kSumRows * W;
  static constexpr int64_t kBlock = kInPlace ? kBlockRows : kScratchRows;

  Left left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, N;
  bool fresh;  // or added to what is in out, which then holds sums
  // The rest is set by cut().
  int64_t K = 0, k_block = 0, column_tasks = 0, row_tasks = 0;  // no task where out is null
  bool nontemporal = false, prefetch_sums = false, exceeds_tlb = false;

  void cut(const Pool& pool) {
    if (!out) return;
    K = left.depth;
    k_block = M <= kSmallProductRows ? kSmallProductKBlock : kKBlock;
    nontemporal = kInPlace && fresh && K <= k_block && M * N * int64_t(sizeof(T)) >= kNontemporalBytes &&
                  N * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    prefetch_sums = kInPlace && !nontemporal && M * N * int64_t(sizeof(T)) >= kPrefetchSumsBytes;
    exceeds_tlb = M <= kSmallProductRows && K * N * int64_t(sizeof(T)) >= kTlbBytes;
    constexpr int64_t kScratch = kSums / kBlock / W * W;
    const int64_t cached = pool.cache / 2 / (kBlock * int64_t(sizeof(A))) / W * W;
    const int64_t columns = kInPlace && cached > kScratch ? cached : kScratch;
    // Whole rows, where one block is the whole depth: threads that write to the same rows contend for cache
    // lines.
    const bool rows_only = kInPlace && K < kPackDepth;
    column_tasks = rows_only ? 1 : (N + columns - 1) / columns;
    row_tasks = (M + kBlock - 1) / kBlock;
    // Enough tasks for every thread: over rows, as long as there are many, then over columns.
    while (column_tasks * row_tasks < 2 * pool.threads) {
      if (M / row_tasks >= 2 * kSmallProductRows * (rows_only ? 1 : 4))
        row_tasks++;
      else if (N / column_tasks >= 2 * W)
        column_tasks++;
      else if (M / row_tasks >= 2 * kSmallProductRows)
        row_tasks++;
      else
        break;
    }
  }

  int64_t tasks() const { return column_tasks * row_tasks; }
  int64_t work() const { return out ? M * K * N : 0; }

  void run(int64_t task) const {
    const Range columns = split_range(task / row_tasks, column_tasks, N, W);
    const Range rows = split_range(task % row_tasks, row_tasks, M, tile_rows(kPanel));
    if constexpr (kInPlace) {
      add_blocks(rows, columns, out + rows.begin * N + columns.begin, N);
      if (nontemporal) nontemporal_fence();
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
    // Packing to bfloat16 pairs rounds the gate gradients: whether it is done must not depend on the cut.
    const bool pack = (kSpan<T> > 1 ? M : rows.size) >= kPackRows && K >= kPackDepth;
    for (int64_t k = 0; k < K; k += k_block) {
      const Block block{rows.size,
                        left.from(rows.begin, k, K - k < k_block ? K - k : k_block),
                        {right + k * right_stride + columns.begin, right_stride, columns.size},
                        {sums, stride, columns.size, fresh && k == 0, nontemporal, prefetch_sums}};
      pack ? add_panels(block) : add_rows(block);
    }
  }

  struct Block {
    int64_t rows;
    Left left;
    Right<T> right;
    Sums<A> sums;
  };

  // Panel after panel of right, contiguous or copied: all rows of left pass over it, while the next one is
  // prefetched, a little for each tile.
  void add_panels(const Block& b) const {
    alignas(64) Factor<T> right_copy[kKBlock * W], left_copy[kKBlock * kBlock];
    const int64_t depth = b.left.depth, rows = b.rows;
    const auto rows_of_left = packed(b.left, rows, b.right.columns, left_copy);
    for (int64_t c = 0; c < b.right.columns; c += W) {
      const int64_t n = b.right.columns - c < W ? b.right.columns - c : W;
      const T* next = c + W < b.right.columns ? b.right.at + c + W : b.right.at + depth * b.right.stride;
      with_constant<kPanel>((n + L - 1) / L, [&](auto V) {
        const auto panel = packed<V.value>({b.right.at + c, b.right.stride, n}, depth, right_copy);
        each_tile<V.value>(rows, [&](auto R, int64_t row) {
          for (int64_t k = row * depth / rows; k < (row + R.value) * depth / rows; k++)
            for (int v = 0; v < kPanel; v++) __builtin_prefetch(next + k * b.right.stride + v * L, 0, 2);
          multiply_tile<R.value, V.value, kInPlace>(panel, part(b.sums, row, c, n),
                                                    rows_of_left.from(row, 0, rows_of_left.depth));
        });
      });
    }
  }

  template <int V>
  static Right<Factor<T>> packed(Right<T> right, int64_t depth, Factor<T>* copy) {
    if constexpr (kInPlace)
      if (right.stride <= W) return right;
    for (int64_t k = 0; k < factors<T>(depth); k++)
      for (int v = 0; v < V; v++) {
        const auto part = [&](int64_t i) {
          return i < depth ? load_upto(right.at + i * right.stride + v * L, right.columns - v * L)
                           : Vec<A>{};
        };
        if constexpr (kSpan<T> == 1)
          store(copy + (k * V + v) * L, part(k));
        else
          store(copy + (k * V + v) * L, zip_exact(part(2 * k), part(2 * k + 1)));
      }
    return {copy, V * L, V * L};
  }

  // A block of left that is used again and again: rows are contiguous, columns are strided.
  static Rows<A> packed(Rows<A> left, int64_t, int64_t, A*) { return left; }
  static Columns<A> packed(Columns<A> left, int64_t rows, int64_t columns, A* copy) {
    if (columns < kGatherColumns) return left;
    const int64_t stride = (rows + L - 1) / L * L;
    for (int64_t k = 0; k < left.depth; k++)
      for (int64_t r = 0; r < rows; r += L)
        store(copy + k * stride + r, load_upto(left.at + k * left.stride + r, rows - r));
    return {copy, stride, left.depth};
  }
#if defined(__AVX512BF16__)
  // As pairs.
  static Rows<bfloat16x2> packed(Rows<A> left, int64_t rows, int64_t, bfloat16x2* copy) {
    constexpr int64_t stride = kKBlock / 2;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < left.depth; k += 2 * L) {
        const A* at = left.at + r * left.stride + k;
        const int64_t n = left.depth - k;
        store(copy + r * stride + k / 2,
              pairs(load_upto(at, n), n > L ? load_upto(at + L, n - L) : Vec<A>{}));
      }
    return {reinterpret_cast<const bfloat16*>(copy), 2 * stride, (left.depth + 1) / 2};
  }
  static Columns<bfloat16x2> packed(Columns<A> left, int64_t rows, int64_t, bfloat16x2* copy) {
    const int64_t stride = (rows + L - 1) / L * L, depth = (left.depth + 1) / 2;
    for (int64_t k = 0; k < depth; k++)
      for (int64_t r = 0; r < rows; r += L) {
        const auto part = [&](int64_t i) {
          return i < left.depth ? load_upto(left.at + i * left.stride + r, rows - r) : Vec<A>{};
        };
        store(copy + k * stride + r, zip(part(2 * k), part(2 * k + 1)));
      }
    return {copy, stride, depth};
  }
#endif

  // Tile after tile from the first column to the last: out is written sequentially.
  void add_rows(const Block& b) const {
    each_tile<kPanel>(b.rows, [&](auto R, int64_t row) {
      const auto tile = [&](auto V, int64_t c, int64_t n) {
        if (exceeds_tlb && row == 0)  // the same columns of the next block
          for (int64_t k = 0; k < k_block; k++)
#pragma GCC unroll 4
            for (int v = 0; v < V.value; v++)
              __builtin_prefetch(b.right.at + (k_block + k) * b.right.stride + c + v * L, 0, 2);
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
    return {sums.at + row * sums.stride + column,
            sums.stride,
            columns,
            sums.fresh,
            sums.nontemporal,
            sums.prefetch};
  }
};

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
