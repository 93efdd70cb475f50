// How a forward step is cut into tasks: which rows are dots, how many tasks over rows and over units.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

template <class T>
static bool weights_stream(const Forward<T>& p) {
  return 4 * p.H * (p.I + p.state_depth()) * int64_t(sizeof(T)) > kStreamingBytes;
}

// The rows at the end of the batch that are dots: all, those that fill no vector, or none. A dot takes
// whole vectors along the depth, and a quarter more where the rows of a weight are not aligned to cache
// lines; a panel takes whole vectors of rows. Weights that stream from DRAM come at a pace that wide panels
// keep. A batch-invariant step must choose whatever the batch.
template <class T>
static int64_t dot_rows(const Forward<T>& p) {
  constexpr int64_t N = kLanes<Accumulate<T>>;
  const auto whole = [](int64_t n) { return (n + N - 1) / N * N; };
  const int64_t I = factors<T>(p.I), H = factors<T>(p.state_depth()), K = I + H;
  const int64_t depth = whole(I) + whole(H), length = depth == K ? depth : depth * 5 / 4;
  const bool wide = p.B > N;
  const int64_t dot = kDotCost * length + kDotMore, cost = (wide ? kWideCost : kNarrowCost) * K,
                panel = cost > 100 * K + kPanelMore ? cost : 100 * K + kPanelMore;
  const auto are_dots = [&](int64_t rows) {
    if (p.batch_invariant) return K > kInvariantDotDepth;
    if (wide && weights_stream(p)) return 10 * rows < 6 * whole(rows);
    return rows * dot < whole(rows) * panel;
  };
  return are_dots(p.B) ? p.B : are_dots(p.B % N) ? p.B % N : 0;
}

// Rows by units, cut into tasks.
struct Grid {
  int64_t rows, unit_tasks, row_tasks;
  int64_t tasks() const { return unit_tasks * row_tasks; }
};

// Of panels of `lanes` rows a vector: rows by a panel's width and units by kPanelUnits; then, so that every
// thread finds work, fewer units down to kFewestUnits, and then fewer rows. Where there is one vector of
// rows, fewer units than that.
static Grid panel_grid(int64_t rows, int64_t H, int64_t threads, int64_t lanes) {
  const int64_t vectors = (rows + lanes - 1) / lanes, blocks = (H + lanes - 1) / lanes;
  Grid grid{rows, (H + kPanelUnits - 1) / kPanelUnits, (vectors + kPanel - 1) / kPanel};
  const auto too_few = [&](int64_t wanted) {
    return grid.tasks() < wanted || (grid.tasks() < 4 * threads && grid.tasks() % threads);
  };
  const int64_t fewest = vectors > 1 ? kFewestUnits : kFewestUnits / 2;
  while (too_few(threads) && grid.unit_tasks < blocks && H / (grid.unit_tasks + 1) >= fewest)
    grid.unit_tasks++;
  // Tasks over rows alone are short, so that a thread that wakes late still finds some.
  while (too_few(grid.unit_tasks == 1 && threads > 1 ? 2 * threads : threads) && grid.row_tasks < vectors)
    grid.row_tasks++;
  return grid;
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
