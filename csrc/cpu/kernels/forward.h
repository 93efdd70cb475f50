// One LSTM step forward: panels of many rows, dots of few, by tasks of some rows by some units.
#pragma once
#include "dots.h"
#include "panel.h"
#include "schedule.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Aligned, so that another thread fetches as few cache lines as may be.
template <class T>
struct alignas(64) ForwardTasks {
  static constexpr int N = kLanes<Accumulate<T>>;

  Forward<T> p;
  Grid panels{}, dots{};  // rows of the panels first, then those of the dots
  bool streaming;

  ForwardTasks(const Forward<T>& given, int64_t threads) : p(given), streaming(weights_stream(given)) {
    const int64_t rows = dot_rows(p);
    dots = {rows, (p.H + N - 1) / N, (rows + kDotRows - 1) / kDotRows};
    if (rows == p.B) return;
    panels = panel_grid(p.B - rows, p.H, threads, N);
    // Weights that stream from DRAM are used for all rows before the next ones are fetched: dots beside
    // panels are one more task over their rows.
    if (rows && streaming) {
      panels.row_tasks++;
      dots.row_tasks = 0;
    }
  }

  int64_t tasks() const { return panels.tasks() + dots.tasks(); }
  int64_t work() const {
    return (p.B + kWeightFetchWork) * (factors<T>(p.I) + factors<T>(p.state_depth()) + kEpilogueWork) * 4 *
           p.H;
  }

  void run(int64_t i) const { i < panels.tasks() ? run_panel(i) : run_dots(i - panels.tasks()); }

 private:
  void run_panel(int64_t i) const {
    const int64_t row_task = streaming ? i % panels.row_tasks : i / panels.unit_tasks,
                  unit_task = streaming ? i / panels.row_tasks : i % panels.unit_tasks,
                  row_tasks = panels.row_tasks - (dots.rows && !dots.row_tasks);
    // Equal parts of the units. But whole vectors where rows of h and c are whole cache lines, for false
    // sharing; and for dots, whose bits must not depend on the cut.
    const Range units = split_range(unit_task, panels.unit_tasks, p.H, streaming || p.H % N == 0 ? N : 1);
    if (row_task < row_tasks)
      return forward_panel(p, split_range(row_task, row_tasks, panels.rows, N), units);
    for (int64_t u = 0; u < units.size; u += N)
      run_dots({panels.rows, dots.rows}, {units.begin + u, units.size - u < N ? units.size - u : N});
  }

  void run_dots(int64_t i) const {
    const Range rows = split_range(i / dots.unit_tasks, dots.row_tasks, dots.rows, kDotVectors / 4);
    const int64_t u = i % dots.unit_tasks * N;
    run_dots({panels.rows + rows.begin, rows.size}, {u, p.H - u < N ? p.H - u : N});
  }

  void run_dots(Range rows, Range units) const {
    (streaming ? forward_dots<true, T> : forward_dots<false, T>)(p, rows, units);
  }
};

template <class T>
static void forward(const Forward<T>& p, const Pool& pool) {
  const ForwardTasks<T> tasks(p, pool.threads);
  pool.run(
      tasks.tasks(), tasks.work(),
      [](const void* context, int64_t i) { static_cast<const ForwardTasks<T>*>(context)->run(i); }, &tasks);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
