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

// ---------------------------------------------------------------------------------------------------
// A product out (M, N) = left (M, K) @ right (K, N), cut into tasks: each some rows by some panels.
//
//   kPanels   many rows over one panel at a time, copied to where it stays in cache
//   kFewRows  right is read once, nearly in the order in which it lies, and rows of sums stay in cache
//   kShallow  out is written once, in order, and right stays in cache

constexpr int64_t kFew = 2 * kTileRows, kShallowDepth = 32, kFewRowsDepth = 16;
constexpr int64_t kRowsInPlace = 1024;  // so many rows of left still find room in a shared cache

template <class T>
struct Product {
  using A = Accumulate<T>;
  enum Kind { kPanels, kFewRows, kShallow };
  static constexpr int L = kLanes<A>;
  static constexpr int64_t W = kWidth<A>;

  const A* left;
  const T* right;
  int64_t right_stride;
  T* out;
  int64_t M, K, N;
  Kind kind;
  int64_t across, down;  // tasks

  Product(const A* left, const T* right, int64_t right_stride, T* out, int64_t M, int64_t K, int64_t N,
          int64_t threads)
      : left(left), right(right), right_stride(right_stride), out(out), M(M), K(K), N(N) {
    const int64_t panels = (N + W - 1) / W;
    if (K <= kShallowDepth) {
      kind = kShallow;
      across = 1;
      down = (M + 8 * kTileRows - 1) / (8 * kTileRows);
    } else if (M <= kFew) {
      kind = kFewRows;
      const int64_t most = kRows / kFew;  // panels for which scratch has sums
      across = (panels + most - 1) / most;
      if (across < threads) across = threads < panels ? threads : panels;
      down = 1;
    } else {
      kind = kPanels;
      across = panels;
      down = row_pieces(M, in_place(0, 0) ? kRowsInPlace : kRows, panels, threads);
    }
  }

  int64_t tasks() const { return out ? across * down : 0; }
  int64_t work() const { return out ? M * K * N : 0; }

  void run(int64_t task) const {
    const Range columns = piece(task % across, across, N, W);
    const Range rows = piece(task / across, down, M, kTileRows);
    switch (kind) {
      case kPanels: return run_panel(rows, columns);
      case kFewRows: return run_few_rows(rows, columns);
      case kShallow: return run_shallow(rows, columns);
    }
  }

  // sums (rows, W) += left (rows, depth) @ right (depth, columns), from depth k and `column` on
  void add(A* sums, int64_t sums_stride, int64_t row, int64_t rows, int64_t k, int64_t depth,
           int64_t column, bool copy, A* panel, bool fresh) const {
    const A* from = left + row * K + k;
    const T* block = right + k * right_stride + column;
    if (copy || N - column < W) {
      copy_panel(panel, block, right_stride, N - column, depth);
      multiply(rows, from, K, panel, W, depth, sums, sums_stride, N - column, fresh);
    } else {
      multiply(rows, from, K, block, right_stride, depth, sums, sums_stride, W, fresh);
    }
  }

  void write(const A* sums, int64_t sums_stride, int64_t row, int64_t rows, int64_t column,
             int64_t columns) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c += L)
        store_upto(out + (row + r) * N + column + c, load(sums + r * sums_stride + c), columns - c);
  }

  // Where sums need neither conversion nor a cut, they are formed in place.
  A* in_place(int64_t row, int64_t column) const {
    if constexpr (sizeof(T) == sizeof(A))
      if (column + W <= N) return out + row * N + column;
    return nullptr;
  }

  void run_panel(Range rows, Range columns) const {
    Scratch<A> scratch;
    const bool here = in_place(rows.begin, columns.begin);
    const int64_t most = here ? rows.size : kRows;
    for (int64_t r = 0; r < rows.size; r += most) {
      const int64_t row = rows.begin + r, height = rows.size - r < most ? rows.size - r : most;
      A* sums = here ? in_place(row, columns.begin) : scratch.sums;
      const int64_t stride = here ? N : W;
      for (int64_t k = 0; k < K; k += kDepth)
        add(sums, stride, row, height, k, K - k < kDepth ? K - k : kDepth, columns.begin, true,
            scratch.panel, k == 0);
      if (!here) write(sums, stride, row, height, columns.begin, columns.size);
    }
  }

  void run_few_rows(Range rows, Range columns) const {
    Scratch<A> scratch;
    const int64_t stride = (columns.size + W - 1) / W * W;
    for (int64_t k = 0; k < K; k += kFewRowsDepth)
      for (int64_t c = 0; c < columns.size; c += W)
        add(scratch.sums + c, stride, rows.begin, rows.size, k,
            K - k < kFewRowsDepth ? K - k : kFewRowsDepth, columns.begin + c, false, scratch.panel, k == 0);
    write(scratch.sums, stride, rows.begin, rows.size, columns.begin, columns.size);
  }

  void run_shallow(Range rows, Range columns) const {
    alignas(64) A panel[kShallowDepth * W], scratch[kTileRows * W];
    for (int64_t r = 0; r < rows.size; r += kTileRows)
      for (int64_t c = columns.begin; c < N; c += W) {
        const int64_t row = rows.begin + r, height = rows.size - r < kTileRows ? rows.size - r : kTileRows;
        A* place = in_place(row, c);
        add(place ? place : scratch, place ? N : W, row, height, 0, K, c, false, panel, true);
        if (!place) write(scratch, W, row, height, c, N - c < W ? N - c : W);
      }
  }
};

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
      blocks.across * ((p.B + N - 1) / N), p.B * p.H * 100,
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
          {{p.grad_gates, p.weight_ih, p.I, p.grad_input, p.B, G, p.I, pool.threads},
           {p.grad_gates, p.weight_hh, p.H, p.grad_hx, p.B, G, p.H, pool.threads},
           {p.grad_gates_t, p.input, p.input_stride, p.grad_weight_ih, G, p.B, p.I, pool.threads},
           {p.grad_gates_t, p.hx, p.hx_stride, p.grad_weight_hh, G, p.B, p.H, pool.threads}}};
  constexpr int64_t W = kWidth<Accumulate<T>>;
  int64_t count = p.grad_bias ? (G + W - 1) / W : 0, work = p.grad_bias ? p.B * G : 0;
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
        bias_gradient(t.p, i * W);
      },
      &tasks);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
