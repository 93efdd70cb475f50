// Vector loads and stores, and the epilogue of a step for a few states: what all kernels share.
#pragma once
#include <math.h>
#include <string.h>

#include "../../cell_math.h"
#include "../../lstm.h"
#include "device.h"

namespace lstmfused {
namespace cuda {

constexpr int kWarp = 32;

template <class A>
struct ScalarMath {
  using F = A;
  LSTMFUSED_DEVICE A sigmoid(A x) { return reciprocal(1 + ::exp(-x)); }
  LSTMFUSED_DEVICE A tanh(A x) { return ::tanh(x); }
};

// ---------------------------------------------------------------------------------------------------
// Vectors

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes

template <class T, int N = kVector<T>>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

// A number or one of CUDA's vector types, which the compiler loads in one access; a struct it would load
// field by field.
template <int bytes>
struct AccessType;
template <>
struct AccessType<2> {
  using type = uint16_t;
};
template <>
struct AccessType<4> {
  using type = uint32_t;
};
template <>
struct AccessType<8> {
  using type = uint2;
};
template <>
struct AccessType<16> {
  using type = uint4;
};
template <class T, int N>
using Access = typename AccessType<N * sizeof(T)>::type;

template <int N, class T>
LSTMFUSED_DEVICE Vector<T, N> load_vector(const T* from) {
  const auto bits = *reinterpret_cast<const Access<T, N>*>(from);
  Vector<T, N> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}
template <int N, class T>
LSTMFUSED_DEVICE void store_vector(T* to, const Vector<T, N>& vector) {
  Access<T, N> bits;
  memcpy(&bits, &vector, sizeof bits);
  *reinterpret_cast<Access<T, N>*>(to) = bits;
}

// N elements: in one access where `vectors` says that `from` is aligned, else one by one, zeros beyond
// `count`.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void load_elements(A (&to)[N], const T* from, bool vectors, int64_t count) {
  Vector<T, N> vector;
  if (vectors) {
    vector = load_vector<N>(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) vector.at[i] = i < count ? from[i] : T{};
  }
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = widen(vector.at[i]);
}

template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void store_elements(T* to, const A (&from)[N], bool vectors, int64_t count) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; i++) narrow(from[i], vector.at[i]);
  if (vectors) {
    Access<T, N> bits;
    memcpy(&bits, &vector, sizeof bits);
    store_global(to, bits);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) to[i] = vector.at[i];
  }
}

// The same of a cell state or its gradient, which is of type A where it is wide.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void load_cell(A (&to)[N], const T* from, int64_t at, bool wide, bool vectors,
                                int64_t count) {
  if (sizeof(T) < sizeof(A) && wide)
    return load_elements(to, reinterpret_cast<const A*>(from) + at, vectors, count);
  load_elements(to, from + at, vectors, count);
}
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void store_cell(T* to, int64_t at, const A (&from)[N], bool wide, bool vectors,
                                 int64_t count) {
  if (sizeof(T) < sizeof(A) && wide)
    return store_elements(reinterpret_cast<A*>(to) + at, from, vectors, count);
  store_elements(to + at, from, vectors, count);
}

// Whether N elements may be loaded in one access from rows that begin there.
template <int N, class T>
static bool aligned(const T* from, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(from) % (N * sizeof(T)) == 0 && stride % N == 0;
}
template <int N, class T, class A = Accumulate<T>>
static bool aligned_cell(const T* from, int64_t stride, bool wide) {
  return wide ? aligned<N>(reinterpret_cast<const A*>(from), stride) : aligned<N>(from, stride);
}

// ---------------------------------------------------------------------------------------------------
// The epilogue of N neighbouring units of one row. Loads are functions of their own, so that a kernel can
// issue them ahead of its main loop.

// Both biases, summed.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void load_bias(A (&bias)[4][N], const Forward<T>& p, int64_t unit, bool vectors) {
#pragma unroll
  for (int gate = 0; gate < 4; gate++) {
    A first[N] = {}, second[N] = {};
    const int64_t at = gate * p.H + unit;
    if (p.bias_ih) load_elements<N>(first, p.bias_ih + at, vectors, p.H - unit);
    if (p.bias_hh) load_elements<N>(second, p.bias_hh + at, vectors, p.H - unit);
#pragma unroll
    for (int i = 0; i < N; i++) bias[gate][i] = first[i] + second[i];
  }
}

template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void load_cx(A (&cx)[N], const Forward<T>& p, int64_t row, int64_t unit, bool vectors) {
  load_cell(cx, p.cx, row * p.cx_stride + unit, p.wide_cell, vectors, p.H - unit);
}

// Stores c', h' and the gates.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void finish_states(const Forward<T>& p, int64_t row, int64_t unit, const A (&sums)[4][N],
                                    const A (&bias)[4][N], const A (&cx)[N], bool vectors) {
  using Math = ScalarMath<A>;
  A gates[4][N], c[N], h[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    const Gates<A> gate = activate<Math>(Gates<A>{sums[0][i] + bias[0][i], sums[1][i] + bias[1][i],
                                                  sums[2][i] + bias[2][i], sums[3][i] + bias[3][i]});
    c[i] = next_cell(gate, cx[i]);
    h[i] = next_hidden<Math>(gate, c[i]);
    gates[0][i] = gate.i;
    gates[1][i] = gate.f;
    gates[2][i] = gate.g;
    gates[3][i] = gate.o;
  }
  const int64_t at = row * p.H + unit, count = p.H - unit;
  store_cell(p.c, at, c, p.wide_cell, vectors, count);
  store_elements(p.h + at, h, vectors, count);
  if (!p.gates) return;
#pragma unroll
  for (int gate = 0; gate < 4; gate++)
    store_elements(p.gates + (row * 4 + gate) * p.H + unit, gates[gate], vectors, count);
}

// Whether everything in the epilogue may be loaded and stored N elements at a time.
template <int N, class T>
static bool states_in_vectors(const Forward<T>& p) {
  return p.H % N == 0 && aligned_cell<N>(p.cx, p.cx_stride, p.wide_cell) &&
         aligned_cell<N>(p.c, 0, p.wide_cell) && aligned<N>(p.bias_ih) && aligned<N>(p.bias_hh) &&
         aligned<N>(p.h) && aligned<N>(p.gates);
}

// ---------------------------------------------------------------------------------------------------

template <int N>
struct Number {
  static constexpr int value = N;
};

// Whether rows of `size`, `stride` apart, may be read in vectors.
template <class T>
LSTMFUSED_BOTH bool in_vectors(const T* from, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kVector<T> == 0 && size % kVector<T> == 0;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace lstmfused
