// One LSTM step backward: gate gradients, then the products with them.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// A stretch of the batch: rows from `begin` on, whose gate gradients are in scratch.
//
// Gate gradients of some rows of it, and the gradient of cx.
template <class T>
static void gate_gradients(const Backward<T>& p, Range stretch, Range rows) {
  using A = Accumulate<T>;
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  for (int64_t r = rows.begin; r < rows.begin + rows.size; r++)
    for (int64_t u = 0; u < p.H; u += N) {
      const int64_t row = stretch.begin + r, n = p.H - u;
      const T* gates = p.gates + row * 4 * p.H + u;
      const Gates<Vec<A>> gate{load_upto(gates, n), load_upto(gates + p.H, n),
                               load_upto(gates + 2 * p.H, n), load_upto(gates + 3 * p.H, n)};
      const Vec<A> c = load_upto(p.cx + row * p.cx_stride + u, n);
      const Vec<A> grad_h = p.grad_h ? load_upto(p.grad_h + row * p.grad_h_stride + u, n) : Vec<A>{};
      Vec<A> grad_c = p.grad_c ? load_upto(p.grad_c + row * p.grad_c_stride + u, n) : Vec<A>{};
      const Gates<Vec<A>> grad = step_backward<Math>(gate, c, grad_h, grad_c);
      if (p.grad_cx) store_upto(p.grad_cx + row * p.H + u, grad_c, n);
      A* out = p.grad_gates + r * p.grad_gates_stride + u;
      store_upto(out, grad.i, n);
      store_upto(out + p.H, grad.f, n);
      store_upto(out + 2 * p.H, grad.g, n);
      store_upto(out + 3 * p.H, grad.o, n);
    }
}

// ---------------------------------------------------------------------------------------------------
// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks, each some rows by some columns.

constexpr int64_t kGradientWork = 100;  // what a state's gate gradients cost, in multiply-adds

constexpr int64_t kFew =
    2 * tile_rows(kPanel);         // so few rows leave a block of right no time to be fetched:
constexpr int64_t kFewDepth = 16;  // then it is read nearly in the order in which it lies
constexpr int64_t kBlockColumns = 256, kBlockRows = 384;
constexpr int64_t kPackRows = 48, kPackDepth = 33;  // of left, from which copies of right pay
constexpr int64_t kGatherColumns = 256;             // of right, from which those of left do
constexpr int64_t kFarSums = 2 << 20;               // bytes that do not stay near from block to block
constexpr int64_t kPastCacheBytes = 8 << 20;  // what is larger than this fits no cache beside the rest

template <class T, class Left>
struct Product {
  using A = Accumulate<T>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);  // out holds sums; else they need a scratch
  static constexpr int L = kLanes<A>;
  static constexpr int64_t W = kWidth<A>, kSums = kRows * W;

  Left left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, K, N;
  bool fresh;  // or added to what is in out, which then holds sums
  int64_t depth, across, down;
  bool past_cache, far;

  Product(Left left, const T* right, int64_t right_stride, T* out, int64_t M, int64_t N, bool fresh,
          int64_t threads)
      : left(left),
        right(right),
        right_stride(right_stride),
        out(out),
        M(M),
        K(left.depth),
        N(N),
        fresh(fresh) {
    depth = M <= kFew ? kFewDepth : kDepth;
    past_cache = kInPlace && fresh && K <= depth && M * N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                 N * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    far = kInPlace && !past_cache && M * N * int64_t(sizeof(T)) >= kFarSums;
    constexpr int64_t columns = kInPlace ? kBlockColumns : kSums / kBlockRows / W * W;
    across = (N + columns - 1) / columns;
    down = (M + kBlockRows - 1) / kBlockRows;
    // Enough for every thread: first of rows, as long as there are many of them, then of columns.
    while (across * down < 2 * threads) {
      if (M / down >= 2 * kFew * 4)
        down++;
      else if (N / across >= 2 * W)
        across++;
      else if (M / down >= 2 * kFew)
        down++;
      else
        break;
    }
  }

  int64_t tasks() const { return out ? across * down : 0; }
  int64_t work() const { return out ? M * K * N : 0; }

  void run(int64_t task) const {
    const Range columns = piece(task % across, across, N, W);
    const Range rows = piece(task / across, down, M, tile_rows(kPanel));
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
    const bool pack = rows.size >= kPackRows && K >= kPackDepth;
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
    alignas(64) A room[kDepth * W], left_room[kDepth * kBlockRows];
    const int64_t depth = b.left.depth, rows = b.rows;
    const Left left = b.right.columns >= kGatherColumns ? gathered(b.left, rows, left_room) : b.left;
    for (int64_t c = 0; c < b.right.columns; c += W) {
      const int64_t n = b.right.columns - c < W ? b.right.columns - c : W;
      const T* next = c + W < b.right.columns ? b.right.at + c + W : b.right.at + depth * b.right.stride;
      with_constant<kPanel>((n + L - 1) / L, [&](auto V) {
        const Right<A> panel = gathered<V.value>({b.right.at + c, b.right.stride, n}, depth, room);
        each_tile<V.value>(rows, [&](auto R, int64_t row) {
          for (int64_t k = row * depth / rows; k < (row + R.value) * depth / rows; k++)
            for (int v = 0; v < kPanel; v++) __builtin_prefetch(next + k * b.right.stride + v * L, 0, 2);
          multiply_tile<R.value, V.value, kInPlace>(panel, part(b.sums, row, c, n),
                                                    left.from(row, 0, depth));
        });
      });
    }
  }

  template <int V>
  static Right<A> gathered(Right<T> right, int64_t depth, A* room) {
    if constexpr (kInPlace)
      if (right.stride <= W) return right;
    for (int64_t k = 0; k < depth; k++)
      for (int v = 0; v < V; v++)
        store(room + (k * V + v) * L,
              load_upto(right.at + k * right.stride + v * L, right.columns - v * L));
    return {room, V * L, V * L};
  }

  // Of a block of left that is used again and again: rows lie together anyway, columns in far apart lines.
  static Rows<A> gathered(Rows<A> left, int64_t, A*) { return left; }
  static Columns<A> gathered(Columns<A> left, int64_t rows, A* room) {
    const int64_t stride = (rows + L - 1) / L * L;
    for (int64_t k = 0; k < left.depth; k++)
      for (int64_t r = 0; r < rows; r += L)
        store(room + k * stride + r, load_upto(left.at + k * left.stride + r, rows - r));
    return {room, stride, left.depth};
  }

  // Tile after tile from the first column to the last, so that out is written in order.
  void add_rows(const Block& b) const {
    each_tile<kPanel>(b.rows, [&](auto R, int64_t row) {
      const auto tile = [&](auto V, int64_t c, int64_t n) {
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

// grad_bias (4H) = or += the sum of a stretch's grad_gates over its rows, for one panel's width of gates;
// like a product's sums, anew for every kDepth rows.
template <class T>
static void bias_gradient(const Backward<T>& p, Range stretch, int64_t column) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = 4 * p.H - column;
  for (int v = 0; v < kPanel && v * N < n; v++) {
    T* out = p.grad_bias + column + v * N;
    Vec<A> total = stretch.begin ? load_upto(out, n - v * N) : Vec<A>{};
    for (int64_t begin = 0; begin < stretch.size; begin += kDepth) {
      const int64_t end = begin + kDepth < stretch.size ? begin + kDepth : stretch.size;
      Vec<A> sum{};
      for (int64_t row = begin; row < end; row++)
        sum += load_upto(p.grad_gates + row * p.grad_gates_stride + column + v * N, n - v * N);
      total += sum;
    }
    store_upto(out, total, n - v * N);
  }
}

template <class T>
static void backward_stretch(const Backward<T>& p, Range stretch, const Pool& pool) {
  using A = Accumulate<T>;
  constexpr int64_t W = kWidth<A>;
  const int64_t G = 4 * p.H, B = stretch.size, begin = stretch.begin;

  struct Pieces {
    const Backward<T>& p;
    Range stretch;
    int64_t count;
  } pieces{p, stretch, 4 * pool.threads};
  pool.run(
      pieces.count, B * p.H * kGradientWork,
      [](const void* context, int64_t i) {
        const Pieces& t = *static_cast<const Pieces*>(context);
        gate_gradients(t.p, t.stretch, piece(i, t.count, t.stretch.size, 1));
      },
      &pieces);

  // All the rest is independent: one list of tasks, so that no thread waits for another's product.
  struct Tasks {
    const Backward<T>& p;
    Range stretch;
    Product<T, Rows<A>> of_rows[2];
    Product<T, Columns<A>> of_weights[2];
  };
  const auto of_rows = [&](const T* weight, T* out, int64_t N) -> Product<T, Rows<A>> {
    return {{p.grad_gates, p.grad_gates_stride, G},
            weight,
            N,
            out ? out + begin * N : nullptr,
            B,
            N,
            true,
            pool.threads};
  };
  const auto of_weights = [&](const T* from, int64_t from_stride, T* out,
                              int64_t N) -> Product<T, Columns<A>> {
    return {{p.grad_gates, p.grad_gates_stride, B},
            from + begin * from_stride,
            from_stride,
            out,
            G,
            N,
            begin == 0,
            pool.threads};
  };
  const Tasks tasks{p,
                    stretch,
                    {of_rows(p.weight_ih, p.grad_input, p.I), of_rows(p.weight_hh, p.grad_hx, p.H)},
                    {of_weights(p.input, p.input_stride, p.grad_weight_ih, p.I),
                     of_weights(p.hx, p.hx_stride, p.grad_weight_hh, p.H)}};
  int64_t count = p.grad_bias ? (G + W - 1) / W : 0, work = p.grad_bias ? B * G : 0;
  const auto add = [&](const auto& products) {
    for (const auto& product : products) {
      count += product.tasks();
      work += product.work();
    }
  };
  add(tasks.of_rows);
  add(tasks.of_weights);
  pool.run(
      count, work,
      [](const void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        const auto ran = [&i](const auto& products) {
          for (const auto& product : products) {
            if (i < product.tasks()) {
              product.run(i);
              return true;
            }
            i -= product.tasks();
          }
          return false;
        };
        if (!ran(t.of_rows) && !ran(t.of_weights)) bias_gradient(t.p, t.stretch, i * W);
      },
      &tasks);
}

template <class T>
static void backward(const Backward<T>& p, const Pool& pool) {
  for (int64_t row = 0; row < p.B; row += p.rows)
    backward_stretch(p, {row, p.B - row < p.rows ? p.B - row : p.rows}, pool);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
