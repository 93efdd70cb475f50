// One LSTM step backward: gate gradients, then the products with them.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// A stretch of the batch: rows from `begin` on, whose gate gradients are in scratch.
//
// Gate gradients of one block of it: up to `lanes` rows by n units, written row-major and transposed, and
// the gradient of cx.
template <class T>
static void gate_gradients(const Backward<T>& p, Range stretch, int64_t row0, int64_t rows, int64_t u,
                           int64_t n) {
  using A = Accumulate<T>;
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  Vec<A> transposed[4][N];
  for (int64_t r = 0; r < N; r++) {
    Gates<Vec<A>> grad{};
    if (r < rows) {
      const int64_t row = stretch.begin + row0 + r;
      const T* gates = p.gates + row * 4 * p.H + u;
      const Gates<Vec<A>> gate{load_upto(gates, n), load_upto(gates + p.H, n),
                               load_upto(gates + 2 * p.H, n), load_upto(gates + 3 * p.H, n)};
      const Vec<A> c = load_upto(p.cx + row * p.cx_stride + u, n);
      const Vec<A> grad_h = p.grad_h ? load_upto(p.grad_h + row * p.grad_h_stride + u, n) : Vec<A>{};
      Vec<A> grad_c = p.grad_c ? load_upto(p.grad_c + row * p.grad_c_stride + u, n) : Vec<A>{};
      grad = step_backward<Math>(gate, c, grad_h, grad_c);
      if (p.grad_cx) store_upto(p.grad_cx + row * p.H + u, grad_c, n);
      A* out = p.grad_gates + (row0 + r) * 4 * p.H + u;
      store_upto(out, grad.i, n);
      store_upto(out + p.H, grad.f, n);
      store_upto(out + 2 * p.H, grad.g, n);
      store_upto(out + 3 * p.H, grad.o, n);
    }
    transposed[0][r] = grad.i;
    transposed[1][r] = grad.f;
    transposed[2][r] = grad.g;
    transposed[3][r] = grad.o;
  }
  if (!p.grad_gates_t) return;
  for (int gate = 0; gate < 4; gate++) {
    transpose<A>(transposed[gate]);
    for (int64_t i = 0; i < n; i++)
      store_upto(p.grad_gates_t + (gate * p.H + u + i) * stretch.size + row0, transposed[gate][i], rows);
  }
}

// ---------------------------------------------------------------------------------------------------
// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks, each some rows by some columns. A
// block of right, as deep as one sum and as wide as the task, stays in the second-level cache while rows of
// left pass over it, a tile of them at a time from the first column to the last, so that out is written in
// order.

constexpr int64_t kFew = 2 * kTileRows;  // so few rows leave a block of right no time to be fetched:
constexpr int64_t kFewDepth = 16;        // then it is read nearly in the order in which it lies
constexpr int64_t kBlockColumns = 256, kBlockRows = 192;
constexpr int64_t kPastCacheBytes = 8 << 20;  // what is larger than this fits no cache beside the rest

template <class T>
struct Product {
  using A = Accumulate<T>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);  // out holds sums; else they need a scratch
  static constexpr int L = kLanes<A>;
  static constexpr int64_t W = kWidth<A>, kSums = kRows * W;

  const A* left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, K, N;
  bool fresh;  // or added to what is in out, which then holds sums
  int64_t depth, across, down;
  bool past_cache;

  Product(const A* left, const T* right, int64_t right_stride, T* out, int64_t M, int64_t K, int64_t N,
          bool fresh, int64_t threads)
      : left(left), right(right), right_stride(right_stride), out(out), M(M), K(K), N(N), fresh(fresh) {
    depth = M <= kFew ? kFewDepth : kDepth;
    past_cache = kInPlace && fresh && K <= depth && M * N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                 N * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
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
    const Range rows = piece(task / across, down, M, kTileRows);
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

  // sums (rows, columns), row after row and block after block of right
  void add_blocks(Range rows, Range columns, A* sums, int64_t stride) const {
    for (int64_t k = 0; k < K; k += depth)
      each_tile(rows.size, [&](auto R, int64_t row) {
        const Rows<A> x{left + (rows.begin + row) * K + k, K, K - k < depth ? K - k : depth};
        add_rows<R.value>(x, right + k * right_stride + columns.begin, columns.size, sums + row * stride,
                          stride, fresh && k == 0);
      });
  }

  template <int R>
  void add_rows(Rows<A> x, const T* block, int64_t columns, A* sums, int64_t stride, bool fresh) const {
    prefetch_next<R>(x);
    const auto tile = [&](auto V, int64_t c) {
      multiply_tile<R, V.value>(x, Rows<A>{}, block + c, right_stride, sums + c, stride, fresh, columns - c,
                                past_cache);
    };
    int64_t c = 0;
    for (; c + W <= columns; c += W) tile(Constant<kPanel>{}, c);
    if (c < columns) with_constant<kPanel>((columns - c + L - 1) / L, [&](auto V) { tile(V, c); });
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
        sum += load_upto(p.grad_gates + row * 4 * p.H + column + v * N, n - v * N);
      total += sum;
    }
    store_upto(out, total, n - v * N);
  }
}

template <class T>
static void backward_stretch(const Backward<T>& p, Range stretch, const Pool& pool) {
  constexpr int N = kLanes<Accumulate<T>>;
  const int64_t G = 4 * p.H, B = stretch.size, row = stretch.begin;

  struct Blocks {
    const Backward<T>& p;
    Range stretch;
    int64_t across;
  } blocks{p, stretch, (p.H + N - 1) / N};
  pool.run(
      blocks.across * ((B + N - 1) / N), B * p.H * 100,
      [](const void* context, int64_t i) {
        const Blocks& t = *static_cast<const Blocks*>(context);
        const int64_t row = i / t.across * N, u = i % t.across * N, B = t.stretch.size, H = t.p.H;
        gate_gradients(t.p, t.stretch, row, B - row < N ? B - row : N, u, H - u < N ? H - u : N);
      },
      &blocks);

  // All the rest is independent: one list of tasks, so that no thread waits for another's product.
  struct Tasks {
    const Backward<T>& p;
    Range stretch;
    Product<T> products[4];
  };
  const auto of_rows = [&](const T* weight, T* out, int64_t K) -> Product<T> {
    return {p.grad_gates, weight, K, out ? out + row * K : nullptr, B, G, K, true, pool.threads};
  };
  const auto of_weights = [&](const T* from, int64_t from_stride, T* out, int64_t K) -> Product<T> {
    return {p.grad_gates_t, from + row * from_stride, from_stride, out, G, B, K, row == 0, pool.threads};
  };
  const Tasks tasks{p,
                    stretch,
                    {of_rows(p.weight_ih, p.grad_input, p.I), of_rows(p.weight_hh, p.grad_hx, p.H),
                     of_weights(p.input, p.input_stride, p.grad_weight_ih, p.I),
                     of_weights(p.hx, p.hx_stride, p.grad_weight_hh, p.H)}};
  constexpr int64_t W = kWidth<Accumulate<T>>;
  int64_t count = p.grad_bias ? (G + W - 1) / W : 0, work = p.grad_bias ? B * G : 0;
  for (const Product<T>& product : tasks.products) {
    count += product.tasks();
    work += product.work();
  }
  pool.run(
      count, work,
      [](const void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        for (const Product<T>& product : t.products) {
          if (i < product.tasks()) return product.run(i);
          i -= product.tasks();
        }
        bias_gradient(t.p, t.stretch, i * W);
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
