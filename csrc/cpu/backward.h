// One LSTM step backward: gate gradients, then the products with them.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Gate gradients of one block: up to `lanes` rows by n units, written row-major and transposed, and the
// gradient of cx.
template <class T>
static void gate_gradients(const Backward<T>& p, int64_t row0, int64_t rows, int64_t u, int64_t n) {
  using A = Accumulate<T>;
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  Vec<A> transposed[4][N];
  for (int64_t r = 0; r < N; r++) {
    Gates<Vec<A>> grad{};
    if (r < rows) {
      const int64_t row = row0 + r;
      const T* gates = p.gates + row * 4 * p.H + u;
      const Gates<Vec<A>> gate{load_upto(gates, n), load_upto(gates + p.H, n),
                               load_upto(gates + 2 * p.H, n), load_upto(gates + 3 * p.H, n)};
      const Vec<A> c = load_upto(p.cx + row * p.cx_stride + u, n);
      const Vec<A> grad_h = p.grad_h ? load_upto(p.grad_h + row * p.grad_h_stride + u, n) : Vec<A>{};
      Vec<A> grad_c = p.grad_c ? load_upto(p.grad_c + row * p.grad_c_stride + u, n) : Vec<A>{};
      grad = step_backward<Math>(gate, c, grad_h, grad_c);
      if (p.grad_cx) store_upto(p.grad_cx + row * p.H + u, grad_c, n);
      A* out = p.grad_gates + row * 4 * p.H + u;
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
      store_upto(p.grad_gates_t + (gate * p.H + u + i) * p.B + row0, transposed[gate][i], rows);
  }
}

// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks of rows and panels.
template <class T>
struct Product {
  using A = Accumulate<T>;
  const A* left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, K, N;
  int64_t panels, pieces;

  int64_t tasks() const { return out ? panels * pieces : 0; }
};

template <class T>
static Product<T> product(const Accumulate<T>* left, const T* right, int64_t right_stride, T* out,
                          int64_t M, int64_t K, int64_t N, int64_t threads) {
  constexpr int W = kWidth<Accumulate<T>>;
  const int64_t panels = (N + W - 1) / W;
  return {left, right, right_stride, out, M, K, N, panels, M && N ? row_pieces(M, panels, threads) : 0};
}

template <class T>
static void run_task(const Product<T>& p, int64_t task) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t W = kWidth<A>;
  const int64_t column = task % p.panels * W;
  const Range rows = piece(task / p.panels, p.pieces, p.M, kTileRows);
  const int64_t columns = p.N - column < W ? p.N - column : W;
  Scratch<A> scratch;

  // Full panels of A accumulate in place; others in scratch, and are converted or cut at the end.
  bool in_place = false;
  A* sums = scratch.sums;
  int64_t sums_stride = W;
  if constexpr (sizeof(T) == sizeof(A))
    if (columns == W) {
      in_place = true;
      sums = p.out + rows.begin * p.N + column;
      sums_stride = p.N;
    }

  const A* left = p.left + rows.begin * p.K;
  for (int64_t k = 0; k < p.K || k == 0; k += kDepth) {
    const int64_t depth = p.K - k < kDepth ? p.K - k : kDepth;
    const T* right = p.right + k * p.right_stride + column;
    // A copy pays for itself once enough rows pass over it, and lets a cut panel be read in full.
    if (columns == W && (rows.size <= 2 * kTileRows || depth <= 32)) {
      multiply(rows.size, left + k, p.K, right, p.right_stride, depth, sums, sums_stride, k == 0);
    } else {
      copy_panel(scratch.panel, right, p.right_stride, columns, depth);
      multiply(rows.size, left + k, p.K, scratch.panel, W, depth, sums, sums_stride, k == 0);
    }
  }
  if (in_place) return;
  for (int64_t row = 0; row < rows.size; row++)
    for (int v = 0; v < kPanel && v * L < columns; v++)
      store_upto(p.out + (rows.begin + row) * p.N + column + v * L, load(sums + row * W + v * L),
                 columns - v * L);
}

// grad_bias (4H) = the sum of grad_gates over rows, for one panel's width of gates; like a product's sums,
// anew for every stretch of rows.
template <class T>
static void bias_gradient(const Backward<T>& p, int64_t column) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = 4 * p.H - column;
  Vec<A> total[kPanel] = {};
  for (int64_t begin = 0; begin < p.B; begin += kDepth) {
    Vec<A> sum[kPanel] = {};
    const int64_t end = begin + kDepth < p.B ? begin + kDepth : p.B;
    for (int64_t row = begin; row < end; row++)
      for (int v = 0; v < kPanel && v * N < n; v++)
        sum[v] += load_upto(p.grad_gates + row * 4 * p.H + column + v * N, n - v * N);
    for (int v = 0; v < kPanel; v++) total[v] += sum[v];
  }
  for (int v = 0; v < kPanel && v * N < n; v++)
    store_upto(p.grad_bias + column + v * N, total[v], n - v * N);
}

template <class T>
static void backward(const Backward<T>& p, const Pool& pool) {
  constexpr int N = kLanes<Accumulate<T>>;
  const int64_t G = 4 * p.H;

  struct Blocks {
    const Backward<T>& p;
    int64_t across;
  } blocks{p, (p.H + N - 1) / N};
  pool.run(
      blocks.across * ((p.B + N - 1) / N), p.B * p.H * 32,
      [](const void* context, int64_t i) {
        const Blocks& t = *static_cast<const Blocks*>(context);
        const int64_t row = i / t.across * N, u = i % t.across * N;
        gate_gradients(t.p, row, t.p.B - row < N ? t.p.B - row : N, u, t.p.H - u < N ? t.p.H - u : N);
      },
      &blocks);

  // All the rest is independent: one list of tasks, so that no thread waits for another's product.
  struct Tasks {
    const Backward<T>& p;
    Product<T> products[4];
  } tasks{p,
          {product(p.grad_gates, p.weight_ih, p.I, p.grad_input, p.B, G, p.I, pool.threads),
           product(p.grad_gates, p.weight_hh, p.H, p.grad_hx, p.B, G, p.H, pool.threads),
           product<T>(p.grad_gates_t, p.input, p.input_stride, p.grad_weight_ih, G, p.B, p.I, pool.threads),
           product<T>(p.grad_gates_t, p.hx, p.hx_stride, p.grad_weight_hh, G, p.B, p.H, pool.threads)}};
  constexpr int64_t W = kWidth<Accumulate<T>>;
  int64_t count = p.grad_bias ? (G + W - 1) / W : 0, work = p.grad_bias ? p.B * G : 0;
  for (const Product<T>& each : tasks.products) {
    count += each.tasks();
    if (each.out) work += each.M * each.K * each.N;
  }
  pool.run(
      count, work,
      [](const void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        for (const Product<T>& each : t.products) {
          if (i < each.tasks()) return run_task(each, i);
          i -= each.tasks();
        }
        bias_gradient(t.p, i * W);
      },
      &tasks);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
