// One step and its gradients in double precision, by plain loops: what the kernels are compared with, and
// the numbers that they are given.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "halves.h"

using lstmfused::Accumulate;
using lstmfused::bfloat16;
using lstmfused::float16;
using std::vector;

// ---------------------------------------------------------------------------------------------------
// Numbers

inline double uniform() {  // in [-1, 1)
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state >> 11)) * 0x1p-52 - 1;
}

template <class T>
T from(double x) {
  T to;
  lstmfused::narrow(Accumulate<T>(x), to);
  return to;
}

template <class T>
constexpr double kRounding = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
template <>
constexpr double kRounding<bfloat16> = 0x1p-8;
template <>
constexpr double kRounding<float16> = 0x1p-11;

// ---------------------------------------------------------------------------------------------------
// Matrices

struct Matrix {
  int64_t rows, columns;
  vector<double> elements;

  Matrix(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_), elements(rows_ * columns_) {}
  double* operator[](int64_t row) { return elements.data() + row * columns; }
  const double* operator[](int64_t row) const { return elements.data() + row * columns; }
};

inline Matrix transposed(const Matrix& x) {
  Matrix result(x.columns, x.rows);
  for (int64_t i = 0; i < x.rows; i++)
    for (int64_t j = 0; j < x.columns; j++) result[j][i] = x[i][j];
  return result;
}

inline Matrix operator*(const Matrix& a, const Matrix& b) {
  Matrix result(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t k = 0; k < a.columns; k++)
      for (int64_t j = 0; j < b.columns; j++) result[i][j] += a[i][k] * b[k][j];
  return result;
}
inline Matrix operator*(double factor, Matrix x) {
  for (double& element : x.elements) element *= factor;
  return x;
}

// b is as large, or a row that is added to each.
inline Matrix operator+(Matrix a, const Matrix& b) {
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.columns; j++) a[i][j] += b[b.rows == 1 ? 0 : i][j];
  return a;
}

inline Matrix sum_of_rows(const Matrix& x) {
  Matrix result(1, x.columns);
  for (int64_t i = 0; i < x.rows; i++)
    for (int64_t j = 0; j < x.columns; j++) result[0][j] += x[i][j];
  return result;
}

// The largest error of an element; NaN where one is NaN, or the matrices are not as large.
inline double worst_error(const Matrix& found, const Matrix& expected) {
  if (found.elements.size() != expected.elements.size()) return NAN;
  double worst = 0;
  for (size_t i = 0; i < found.elements.size(); i++) {
    const double error = fabs(found.elements[i] - expected.elements[i]);
    if (std::isnan(error)) return NAN;
    worst = std::max(worst, error);
  }
  return worst;
}

// How far from `expected` elements may be that are sums of so many terms: the errors of these follow the
// largest element.
template <class T>
double allowed_error(const Matrix& expected, double terms) {
  double scale = 1;
  for (double x : expected.elements) scale = std::max(scale, fabs(x));
  return scale * (2 * kRounding<T> + 4 * sqrt(terms) * kRounding<Accumulate<T>>);
}

// ---------------------------------------------------------------------------------------------------
// A step

struct State {
  Matrix h, c;   // (B, H)
  Matrix gates;  // (B, 4H)
};

// From sums (B, 4H) of the products and the biases.
inline State step(const Matrix& sums, const Matrix& cx) {
  const int64_t B = cx.rows, H = cx.columns;
  State next{{B, H}, {B, H}, {B, 4 * H}};
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      double gate[4];
      for (int64_t g = 0; g < 4; g++) {
        const double sum = sums[b][g * H + u];
        next.gates[b][g * H + u] = gate[g] = g == 2 ? tanh(sum) : 1 / (1 + exp(-sum));
      }
      next.c[b][u] = gate[1] * cx[b][u] + gate[0] * gate[2];
      next.h[b][u] = gate[3] * tanh(next.c[b][u]);
    }
  return next;
}

struct GateGradients {
  Matrix sums;  // (B, 4H)
  Matrix cx;    // (B, H)
};

inline GateGradients gate_gradients(const Matrix& gates, const Matrix& cx, const Matrix& grad_h,
                                    const Matrix& grad_c) {
  const int64_t B = cx.rows, H = cx.columns;
  GateGradients grad{{B, 4 * H}, {B, H}};
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      const double i = gates[b][u], f = gates[b][H + u], g = gates[b][2 * H + u], o = gates[b][3 * H + u];
      const double t = tanh(f * cx[b][u] + i * g);
      const double through = grad_c[b][u] + grad_h[b][u] * o * (1 - t * t);
      grad.sums[b][u] = through * g * i * (1 - i);
      grad.sums[b][H + u] = through * cx[b][u] * f * (1 - f);
      grad.sums[b][2 * H + u] = through * i * (1 - g * g);
      grad.sums[b][3 * H + u] = grad_h[b][u] * t * o * (1 - o);
      grad.cx[b][u] = through * f;
    }
  return grad;
}
