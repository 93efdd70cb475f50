// What the parts of cpu.cpp share.
//
// Every array is a heap block of exactly its size, so that AddressSanitizer sees a step beside it.
#pragma once
#include "../../csrc/cpu/kernels/kernels.h"

#include <cstdio>

#include "reference.h"

using namespace lstmfused;

struct Shape {
  int64_t B, I, H;
};

template <class T>
vector<T> uniform(int64_t size, double scale = 1) {
  vector<T> x(size);
  for (T& element : x) element = from<T>(uniform() * scale);
  return x;
}

// What is never written shows.
template <class... T>
void poison(vector<T>&... outputs) {
  (std::fill(outputs.begin(), outputs.end(), from<T>(NAN)), ...);
}

// Of the weights, as torch.nn draws them.
inline double weight_scale(Shape shape) { return 1 / sqrt(double(std::max(shape.I, shape.H))); }

template <class T>
Matrix values(const vector<T>& x, int64_t rows) {
  Matrix result(rows, int64_t(x.size()) / rows);
  std::transform(x.begin(), x.end(), result.elements.begin(), [](T element) { return widen(element); });
  return result;
}

static int failures = 0;

template <class T>
static void check(const char* name, const vector<T>& actual, const Matrix& expected, double terms,
                  Shape shape) {
  const double worst = worst_error(values(actual, expected.rows), expected),
               allowed = allowed_error<T>(expected, terms);
  if (worst <= allowed) return;
  failures++;
  printf("%s off by %.1e, allowed %.1e: B %d, I %d, H %d, %d bytes an element\n", name, worst, allowed,
         int(shape.B), int(shape.I), int(shape.H), int(sizeof(T)));
}

static void run_in_reverse(int64_t tasks, int64_t, Task task, const void* context, void*) {
  for (int64_t i = tasks; i-- > 0;) task(context, i);
}
inline Pool pool_of(int64_t threads) { return {run_in_reverse, threads, 1 << 20}; }
