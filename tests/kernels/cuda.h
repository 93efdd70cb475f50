// What the parts of cuda.cpp share: arrays, and how a kernel is run and checked.
#pragma once
#include "../../csrc/cuda/kernels/kernels.cu"

#include <cstdio>
#include <cstring>

#include "reference.h"

using namespace lstmfused;
using namespace lstmfused::cuda;

// ---------------------------------------------------------------------------------------------------
// Arrays

inline bool coin() { return uniform() < 0; }

// Rows `stride` apart, the first one `offset` elements from the beginning, in a heap block that ends where
// the last one does, so that AddressSanitizer sees a step beside it. All is NaN at first.
template <class T>
struct Array {
  int64_t rows, width, stride, offset;
  vector<T> memory;

  Array(int64_t rows_, int64_t width_, int64_t stride_, int64_t offset_)
      : rows(rows_), width(width_), stride(stride_), offset(offset_) {
    memory.resize(offset + (rows - 1) * stride + width);
    poison();
  }
  Array(int64_t rows_, int64_t width_) : Array(rows_, width_, width_, 0) {}
  void poison() {
    if (!memory.empty()) memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(T));
  }
  T* data() { return memory.data() + offset; }
  T* row(int64_t r) { return data() + r * stride; }

  Array& fill(double low, double high) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < width; i++) row(r)[i] = from<T>(low + (high - low) * (uniform() + 1) / 2);
    return *this;
  }
  Matrix values() {
    Matrix result(rows, width);
    for (int64_t r = 0; r < rows; r++)
      std::transform(row(r), row(r) + width, result[r], [](T x) { return widen(x); });
    return result;
  }
  bool beside_is_untouched() {
    const T none = Array<T>(1, 1).memory[0];
    const auto touched = [&](const T* begin, const T* end) {
      for (; begin < end; begin++)
        if (memcmp(begin, &none, sizeof none)) return true;
      return false;
    };
    if (touched(memory.data(), data())) return false;
    for (int64_t r = 0; r + 1 < rows; r++)
      if (touched(row(r) + width, row(r + 1))) return false;
    return true;
  }
};

// The structs have one pointer type for a cell state, whatever its own.
template <class T, class C>
T* as(C* cell) {
  return reinterpret_cast<T*>(cell);
}

// How arrays lie: aligned and dense, or each in one of several ways.
struct Layout {
  bool odd;
  template <class T>
  Array<T> dense(int64_t rows, int64_t width) const {
    return Array<T>(rows, width, width, odd && coin());
  }
  template <class T>
  Array<T> apart(int64_t rows, int64_t width) const {
    const int64_t vectors = 16 / sizeof(T), upwards = (width + vectors - 1) / vectors * vectors;
    if (!odd || coin()) return dense<T>(rows, width);
    return coin() ? Array<T>(rows, width, upwards + vectors, 0)  // vectors stay vectors
                  : Array<T>(rows, width, width + 3, coin());
  }
  template <class T>
  Array<T> apart_or_repeated(int64_t rows, int64_t width) const {
    return odd && coin() ? Array<T>(rows, width, 0, coin()) : apart<T>(rows, width);
  }
  bool wanted() const { return !odd || coin(); }
};

// ---------------------------------------------------------------------------------------------------
// Checks

static int failures = 0;
static bool until_first_failure = false;

struct Where {
  int64_t B, I, H;
  Layout layout;
  const char* name;  // of what ran
  Device device;
};

static void fail(const Where& where, size_t size, const char* what) {
  failures++;
  printf("%s on sm_%d, order %d, %d bytes an element, B %d, I %d, H %d, %s: %s\n", where.name,
         where.device.capability, int(simt::order), int(size), int(where.B), int(where.I), int(where.H),
         where.layout.odd ? "odd" : "plain", what);
  if (until_first_failure) exit(1);
}

template <class T>
static void check(const Where& where, const char* name, Array<T>& actual, const Matrix& expected,
                  double terms) {
  const double worst = worst_error(actual.values(), expected), allowed = allowed_error<T>(expected, terms);
  char text[100];
  if (!(worst <= allowed)) {
    snprintf(text, sizeof text, "%s is off by %.1e, allowed %.1e", name, worst, allowed);
    fail(where, sizeof(T), text);
  }
  if (!actual.beside_is_untouched()) {
    snprintf(text, sizeof text, "something was written beside %s", name);
    fail(where, sizeof(T), text);
  }
}

// ---------------------------------------------------------------------------------------------------
// Runs

// What is written by a kernel.
struct Output {
  unsigned char* memory;
  size_t size;
  template <class T>
  Output(Array<T>& array)
      : memory(reinterpret_cast<unsigned char*>(array.memory.data())),
        size(array.memory.size() * sizeof(T)) {}
  bool holds(const vector<unsigned char>& bytes) const {
    return size == 0 || memcmp(memory, bytes.data(), size) == 0;
  }
};

// What everything runs on.
struct Setting {
  Device device;
  simt::Order order;
};
static vector<Setting> settings;

// Few rows have few blocks; many would take their time.
inline bool are_few(int64_t B, int64_t I, int64_t H) { return (B + 8) * (I + H) < 5000; }

// Runs `launch` in each setting; on one device its outputs are to be the same in every order. `after`
// checks them.
template <class T, class Launch, class After>
static void run(Where where, const char* name, const vector<Output>& outputs, const Launch& launch,
                const After& after) {
  where.name = name;
  vector<vector<unsigned char>> first;
  std::pair<int, int> device{};
  for (const Setting& setting : settings) {
    where.device = setting.device;
    simt::order = setting.order;
    simt::seed++;
    simt::shared_limit = setting.device.shared_memory;
    for (const Output& output : outputs)
      if (output.size) memset(output.memory, 0xff, output.size);
    if (const char* error = launch(setting.device)) {
      fail(where, sizeof(T), error);
      continue;
    }
    after(where);
    const std::pair this_one{setting.device.capability, setting.device.multiprocessors};
    if (device != this_one) {
      device = this_one;
      first.clear();
      for (const Output& output : outputs) first.emplace_back(output.memory, output.memory + output.size);
    }
    for (size_t i = 0; i < outputs.size(); i++)
      if (!outputs[i].holds(first[i])) fail(where, sizeof(T), "not the same in every order");
  }
}
