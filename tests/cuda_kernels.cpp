// The CUDA kernels against plain loops in double precision, without CUDA: simt.h is their GPU.
//
// Every array is a heap block that ends where its last row does, so that AddressSanitizer sees a step
// beside it. Everything runs under several orders of the threads and must come out the same. With an
// argument, a small selection runs: enough to miss a barrier or a wait.
#include "../csrc/cuda/kernels/kernels.cu"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "numbers.h"

using namespace lstmfused;
using namespace lstmfused::cuda;
using std::vector;

// ---------------------------------------------------------------------------------------------------
// Numbers

template <class T>
static double value(T x) {
  return widen(x);
}
template <class T>
static T from(double x) {
  T to;
  narrow(Accumulate<T>(x), to);
  return to;
}

static double to_nearest_tf32(double x) {
  int exponent;
  const double fraction = frexp(x, &exponent);
  return ldexp(round(ldexp(fraction, 11)), exponent - 11);
}

template <class T>
static bool same(const T* a, const T* b, int64_t count) {
  return count == 0 || memcmp(a, b, count * sizeof(T)) == 0;
}

static bool coin() { return uniform() < 0; }

// ---------------------------------------------------------------------------------------------------
// Arrays

// Rows `stride` apart, the first one `offset` elements from the beginning. All is NaN at first.
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
    for (T& element : memory) memset(&element, 0xff, sizeof element);
  }
  T* data() { return memory.data() + offset; }
  T* row(int64_t r) { return data() + r * stride; }
  double at(int64_t r, int64_t column) { return value(row(r)[column]); }

  Array& fill(double low, double high) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < width; i++) row(r)[i] = from<T>(low + (high - low) * (uniform() + 1) / 2);
    return *this;
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
static T* as(C* cell) {
  return reinterpret_cast<T*>(cell);
}

// What is written by a kernel.
struct Output {
  unsigned char* memory;
  size_t size;
  template <class T>
  Output(Array<T>& array)
      : memory(reinterpret_cast<unsigned char*>(array.memory.data())),
        size(array.memory.size() * sizeof(T)) {}
};

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
}

// `terms` were added up; the errors of their sum follow the largest element.
template <class T>
static void check(const Where& where, const char* name, Array<T>& actual, const vector<double>& expected,
                  double terms) {
  double scale = 1, worst = 0;
  for (double x : expected) scale = std::max(scale, fabs(x));
  for (int64_t r = 0; r < actual.rows; r++)
    for (int64_t i = 0; i < actual.width; i++) {
      const double error = fabs(actual.at(r, i) - expected[r * actual.width + i]);
      worst = error <= worst ? worst : error;  // NaN, too
    }
  const double allowed = scale * (2 * kRounding<T> + 4 * sqrt(terms) * kRounding<Accumulate<T>>);
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

// What everything runs on.
struct Setting {
  Device device;
  simt::Order order;
};
static vector<Setting> settings;

// Few rows have few blocks; many would take their time.
static bool are_few(int64_t B, int64_t I, int64_t H) { return (B + 8) * (I + H) < 5000; }

// Runs `step` in each setting; on one device its outputs are to be the same in every order. `after` checks
// them.
template <class T, class Expected, class After>
static void run(Where where, const char* name, const vector<Output>& outputs, const Expected& step,
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
    if (const char* error = step(setting.device)) {
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
      if (!same<unsigned char>(first[i].data(), outputs[i].memory, int64_t(first[i].size())))
        fail(where, sizeof(T), "not the same in every order");
  }
}

// ---------------------------------------------------------------------------------------------------
// Forward

// Sums (B, 4H) of the products, of factors rounded by `rounded`.
template <class T, class Rounded>
static vector<double> products(Array<T>& input, Array<T>& hx, Array<T>& weight_ih, Array<T>& weight_hh,
                               const Rounded& rounded) {
  const int64_t B = input.rows, G = weight_ih.rows;
  vector<double> sums(B * G);
  const auto add = [&](Array<T>& left, Array<T>& weight) {
    const int64_t K = left.width;
    vector<double> x(B * K), w(G * K);
    for (int64_t k = 0; k < K; k++) {
      for (int64_t b = 0; b < B; b++) x[b * K + k] = rounded(left.at(b, k));
      for (int64_t g = 0; g < G; g++) w[g * K + k] = rounded(weight.at(g, k));
    }
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        double sum = 0;
        for (int64_t k = 0; k < K; k++) sum += x[b * K + k] * w[g * K + k];
        sums[b * G + g] += sum;
      }
  };
  add(input, weight_ih);
  add(hx, weight_hh);
  return sums;
}

struct Expected {
  vector<double> h, c, gates;
};
template <class T, class C>
static Expected step_from(const vector<double>& sums, Array<C>& cx, Array<T>* bias_ih, Array<T>* bias_hh) {
  const int64_t B = cx.rows, H = cx.width, G = 4 * H;
  Expected step{vector<double>(B * H), vector<double>(B * H), vector<double>(B * G)};
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      double gate[4];
      for (int64_t g = 0; g < 4; g++) {
        const int64_t row = g * H + u;
        double sum = sums[b * G + row];
        if (bias_ih) sum += bias_ih->at(0, row);
        if (bias_hh) sum += bias_hh->at(0, row);
        step.gates[b * G + row] = gate[g] = g == 2 ? tanh(sum) : 1 / (1 + exp(-sum));
      }
      const double c = gate[1] * cx.at(b, u) + gate[0] * gate[2];
      step.c[b * H + u] = c;
      step.h[b * H + u] = gate[3] * tanh(c);
    }
  return step;
}

// C is the type of the cell state, T or Accumulate<T>.
template <class T, class C>
static void test_forward(int64_t B, int64_t I, int64_t H, Layout layout) {
  const int64_t G = 4 * H;
  const double scale = 1 / sqrt(double(std::max(I, H)));
  Array<T> input = layout.apart_or_repeated<T>(B, I).fill(-1, 1),
           hx = layout.apart_or_repeated<T>(B, H).fill(-1, 1),
           weight_ih = layout.dense<T>(G, I).fill(-scale, scale),
           weight_hh = layout.dense<T>(G, H).fill(-scale, scale),
           bias_ih = layout.dense<T>(1, G).fill(-1, 1), bias_hh = layout.dense<T>(1, G).fill(-1, 1),
           h = layout.dense<T>(B, H), gates = layout.dense<T>(B, G);
  Array<C> cx = layout.apart_or_repeated<C>(B, H).fill(-1, 1), c = layout.dense<C>(B, H);
  Array<T>* const bias_of_input = layout.wanted() ? &bias_ih : nullptr;
  Array<T>* const bias_of_state = layout.wanted() ? &bias_hh : nullptr;
  const Where where{B, I, H, layout, "", {}};
  const auto save_gates = [] { return simt::order != simt::Order::kBackward; };
  const auto problem = [&] {
    return Forward<T>{{B, I, H, input.data(), input.stride, hx.data(), hx.stride, as<T>(cx.data()),
                       cx.stride, h.data(), as<T>(c.data()), save_gates() ? gates.data() : nullptr,
                       /*wide_cell=*/sizeof(C) != sizeof(T)},
                      weight_ih.data(),
                      weight_hh.data(),
                      bias_of_input ? bias_ih.data() : nullptr,
                      bias_of_state ? bias_hh.data() : nullptr,
                      /*batch_invariant=*/false};
  };
  const auto compare = [&](const Where& at, const Expected& expected, bool with_gates) {
    check(at, "h", h, expected.h, double(I + H));
    check(at, "c", c, expected.c, double(I + H));
    if (with_gates) check(at, "gates", gates, expected.gates, double(I + H));
  };

  const vector<double> sums = products(input, hx, weight_ih, weight_hh, [](double x) { return x; });
  const Expected expected = step_from<T>(sums, cx, bias_of_input, bias_of_state);
  if (are_few(B, I, H))
    run<T>(
        where, "forward_small_batch", {h, c}, [&](Device on) { return forward_small_batch(problem(), on); },
        [&](const Where& at) {
          compare(at, expected, save_gates());
          if (B == 1 || simt::order != simt::Order::kForward) return;
          for (int64_t b : {int64_t(0), B / 2, B - 1}) {
            Array<T> row_h(1, H);
            Array<C> row_c(1, H);
            Forward<T> p = problem();
            p.B = 1;
            p.input = input.row(b);
            p.hx = hx.row(b);
            p.cx = as<T>(cx.row(b));
            p.h = row_h.data();
            p.c = as<T>(row_c.data());
            p.gates = nullptr;
            if (const char* error = forward_small_batch(p, at.device)) fail(at, sizeof(T), error);
            if (!same(row_h.data(), h.row(b), H) || !same(row_c.data(), c.row(b), H))
              fail(at, sizeof(T), "a row alone is not as in the batch");
          }
        });

  if constexpr (sizeof(T) < 8) {
    const vector<double> rounded = products(
        input, hx, weight_ih, weight_hh, [](double x) { return sizeof(T) == 4 ? to_nearest_tf32(x) : x; });
    const Expected step = step_from<T>(rounded, cx, bias_of_input, bias_of_state);
    run<T>(
        where, "forward_tensor_cores", {h, c},
        [&](Device on) { return forward_tensor_cores(problem(), on); },
        [&](const Where& at) { compare(at, step, save_gates()); });
    if constexpr (sizeof(T) == 2)
      run<T>(
          where, "forward_warpgroups", {h, c},
          [&](Device on) {
            return has_warpgroups<T>(on) ? forward_warpgroups(problem(), on)
                                         : forward_tensor_cores(problem(), on);
          },
          [&](const Where& at) { compare(at, step, save_gates()); });
  }

  Array<Accumulate<T>> given(B, G);
  run<T>(
      where, "finish", {h, c},
      [&](Device on) {
        for (int64_t i = 0; i < B * G; i++) given.data()[i] = Accumulate<T>(sums[i]);
        return finish(problem(), given.data(), on);
      },
      [&](const Where& at) { compare(at, expected, save_gates()); });
  if constexpr (sizeof(T) > 2)
    run<T>(
        where, "finish in place", {h, c},
        [&](Device on) {
          Forward<T> p = problem();
          for (int64_t i = 0; i < B * G; i++) gates.data()[i] = T(sums[i]);
          p.gates = gates.data();
          return finish(p, gates.data(), on);
        },
        [&](const Where& at) { compare(at, expected, true); });
}

// ---------------------------------------------------------------------------------------------------
// Backward

template <class T, class C>
static void test_backward(int64_t B, int64_t I, int64_t H, Layout layout) {
  using A = Accumulate<T>;
  const int64_t G = 4 * H;
  const double scale = 1 / sqrt(double(std::max(I, H)));
  Array<T> input = layout.apart_or_repeated<T>(B, I).fill(-1, 1),
           hx = layout.apart_or_repeated<T>(B, H).fill(-1, 1),
           weight_ih = layout.dense<T>(G, I).fill(-scale, scale),
           weight_hh = layout.dense<T>(G, H).fill(-scale, scale),
           grad_h = layout.apart_or_repeated<T>(B, H).fill(-1, 1), gates = layout.dense<T>(B, G).fill(0, 1),
           grad_gates = layout.apart<T>(B, G), grad_bias_ih = layout.dense<T>(1, G),
           grad_bias_hh = layout.dense<T>(1, G), grad_input = layout.dense<T>(B, I),
           grad_hx = layout.dense<T>(B, H), grad_weight_ih = layout.dense<T>(G, I),
           grad_weight_hh = layout.dense<T>(G, H);
  Array<C> cx = layout.apart_or_repeated<C>(B, H).fill(-1, 1),
           grad_c = layout.apart_or_repeated<C>(B, H).fill(-1, 1), grad_cx = layout.dense<C>(B, H);
  const bool has_grad_h = layout.wanted(), has_grad_c = layout.wanted();
  const auto pointer = [&](Array<T>& output) { return layout.wanted() ? output.data() : nullptr; };
  const Backward<T, T> p{B,
                         I,
                         H,
                         has_grad_h ? grad_h.data() : nullptr,
                         grad_h.stride,
                         has_grad_c ? as<T>(grad_c.data()) : nullptr,
                         grad_c.stride,
                         gates.data(),
                         input.data(),
                         input.stride,
                         hx.data(),
                         hx.stride,
                         as<T>(cx.data()),
                         cx.stride,
                         weight_ih.data(),
                         weight_hh.data(),
                         B,
                         grad_gates.data(),
                         grad_gates.stride,
                         pointer(grad_input),
                         pointer(grad_hx),
                         layout.wanted() ? as<T>(grad_cx.data()) : nullptr,
                         pointer(grad_weight_ih),
                         pointer(grad_weight_hh),
                         pointer(grad_bias_ih),
                         pointer(grad_bias_hh),
                         /*wide_cell=*/sizeof(C) != sizeof(T)};
  const Where where{B, I, H, layout, "", {}};

  vector<double> dg(B * G), dc(B * H), db(G);
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      const double i = gates.at(b, u), f = gates.at(b, H + u), g = gates.at(b, 2 * H + u),
                   o = gates.at(b, 3 * H + u), old = cx.at(b, u), t = tanh(f * old + i * g);
      const double grad = has_grad_h ? grad_h.at(b, u) : 0;
      const double through = (has_grad_c ? grad_c.at(b, u) : 0) + grad * o * (1 - t * t);
      double* d = &dg[b * G + u];
      d[0] = through * g * i * (1 - i);
      d[H] = through * old * f * (1 - f);
      d[2 * H] = through * i * (1 - g * g);
      d[3 * H] = grad * t * o * (1 - o);
      dc[b * H + u] = through * f;
      for (int64_t gate = 0; gate < 4; gate++) db[gate * H + u] += d[gate * H];
    }
  run<T>(
      where, "gate_gradients", {grad_gates, grad_cx, grad_bias_ih, grad_bias_hh},
      [&](Device on) {
        Array<A> partial(bias_chunks<T>({B, I, H, false}, on), G);
        return gate_gradients(p, partial.data(), on);
      },
      [&](const Where& at) {
        check(at, "grad_gates", grad_gates, dg, 1);
        if (p.grad_cx) check(at, "grad_cx", grad_cx, dc, 1);
        if (p.grad_bias_ih) check(at, "grad_bias_ih", grad_bias_ih, db, double(B));
        if (p.grad_bias_hh) check(at, "grad_bias_hh", grad_bias_hh, db, double(B));
      });

  if (!are_few(B, I, H)) return;
  grad_gates.poison();
  grad_gates.fill(-1, 1);
  const auto to_left = [&](Array<T>& weight) {
    const int64_t K = weight.width;
    vector<double> grad(B * K);
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        const double d = grad_gates.at(b, g);
        for (int64_t k = 0; k < K; k++) grad[b * K + k] += d * weight.at(g, k);
      }
    return grad;
  };
  const auto to_weight = [&](Array<T>& left) {
    const int64_t K = left.width;
    vector<double> grad(G * K);
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        const double d = grad_gates.at(b, g);
        for (int64_t k = 0; k < K; k++) grad[g * K + k] += d * left.at(b, k);
      }
    return grad;
  };
  const vector<double> dx = to_left(weight_ih), dh = to_left(weight_hh), dwi = to_weight(input),
                       dwh = to_weight(hx);
  run<T>(
      where, "backward_small_batch", {grad_input, grad_hx, grad_weight_ih, grad_weight_hh},
      [&](Device on) { return backward_small_batch(p, on); },
      [&](const Where& at) {
        if (p.grad_input) check(at, "grad_input", grad_input, dx, double(G));
        if (p.grad_hx) check(at, "grad_hx", grad_hx, dh, double(G));
        if (p.grad_weight_ih) check(at, "grad_weight_ih", grad_weight_ih, dwi, double(B));
        if (p.grad_weight_hh) check(at, "grad_weight_hh", grad_weight_hh, dwh, double(B));
      });
}

// ---------------------------------------------------------------------------------------------------
// The GPU itself

static void expect(const char* what, bool holds) {
  if (holds) return;
  failures++;
  printf("simt.h: %s\n", what);
}

template <class T>
static void test_halves() {
  constexpr uint32_t kInfinity = std::is_same<T, float16>::value ? 0x7c00 : 0x7f80;
  const auto narrowed = [](float x) {
    T to;
    narrow(x, to);
    return uint32_t(to.bits);
  };
  bool same = true, rounds = true;
  for (uint32_t bits = 0; bits <= 0xffff; bits++) {
    const float x = widen(T{uint16_t(bits)});
    const uint32_t magnitude = bits & 0x7fff;
    if (magnitude > kInfinity) {
      same &= x != x && (narrowed(x) & 0x7fff) > kInfinity;
      continue;
    }
    same &= narrowed(x) == bits;
    if (magnitude + 1 >= kInfinity) continue;
    const float next = widen(T{uint16_t(bits + 1)}), middle = x / 2 + next / 2;
    rounds &= narrowed(middle) == bits + (bits & 1);
    rounds &= narrowed(nextafterf(middle, x)) == bits && narrowed(nextafterf(middle, next)) == bits + 1;
  }
  expect("a half does not come back", same);
  expect("a half is not the nearest", rounds);
  const float one = widen(T{uint16_t(std::is_same<T, float16>::value ? 0x3c00 : 0x3f80)});
  const float least = widen(T{1});
  expect("a half is another number",
         one == 1 && least == (std::is_same<T, float16>::value ? 0x1p-24f : 0x1p-133f));
}

static __global__ void barrier_of_some() {
  if (threadIdx.x < 32) __syncthreads();
}
static __global__ void barriers_of_two_kinds() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
static __global__ void shuffle_of_some() {
  if (threadIdx.x % 32) shuffle_xor(1.0f, 1);
}
static __global__ void instructions_of_two_kinds() {
  if (threadIdx.x % 32)
    shuffle_xor(1.0f, 1);
  else
    shuffle_xor(1.0, 1);
}
static __global__ void copy_of_odd(const unsigned char* from) {
  copy_async(shared_memory(), from + 4, true);
}
static __global__ void copy_to_odd(const unsigned char* from) {
  copy_async(shared_memory() + 4, from, true);
}
static __global__ void copy_beyond(const unsigned char* from) {
  copy_async(shared_memory() + 64, from, true);
}
static __global__ void load_beyond() {
  uint32_t x[4];
  load_matrices(x, shared_memory() + 64);
}
static __global__ void nothing() {}
static __global__ void another() {}
// One group of copies is awaited, one is not.
static __global__ void copies(const unsigned char* from, unsigned char* before, unsigned char* after) {
  for (int i = 0; i < 2; i++) {
    copy_async(shared_memory() + i * 16, from, i == 0);
    commit_copies();
  }
  memcpy(before, shared_memory(), 32);
  wait_copies<1>();
  memcpy(after, shared_memory(), 32);
}

static void test_gpu() {
  test_halves<bfloat16>();
  test_halves<float16>();
  for (int i = 0; i < 1000; i++) {
    const float x = float(uniform());
    expect("to_tf32()", simt::float_of(to_tf32(simt::bits_of(x))) == float(to_nearest_tf32(x)));
  }

  alignas(16) unsigned char memory[96] = {1};
  const unsigned char* const from = memory;
  unsigned char *const before = memory + 32, *const after = memory + 64;
  const auto fails = [](const char* error, const char* with) {
    return error && strstr(error, with) == error;
  };
  for (simt::Order order : {simt::Order::kForward, simt::Order::kBackward, simt::Order::kRandom}) {
    simt::order = order;
    const auto on_64 = [&](auto kernel, auto... arguments) {
      return launch(kernel, dim3(2), dim3(64), 64, nullptr, arguments...);
    };
    expect("a barrier of some threads", fails(on_64(barrier_of_some), "a barrier that"));
    expect("two barriers", fails(on_64(barriers_of_two_kinds), "another barrier"));
    expect("a shuffle of some lanes", fails(on_64(shuffle_of_some), "a warp instruction that"));
    expect("two instructions", fails(on_64(instructions_of_two_kinds), "another warp instruction"));
    expect("a copy from an odd address", fails(on_64(copy_of_odd, from), "copy_async() from"));
    expect("a copy to an odd address", fails(on_64(copy_to_odd, from), "copy_async() to an"));
    expect("a copy to beyond", fails(on_64(copy_beyond, from), "copy_async() to beside"));
    expect("a load from beyond", fails(on_64(load_beyond), "load_matrices() from beside"));
    expect("a block without threads", launch(nothing, dim3(1), dim3(0), 0, nullptr));
    expect("a block too large", launch(nothing, dim3(1), dim3(32, 33), 0, nullptr));
    expect("a grid too large", launch(nothing, dim3(1, 65536), dim3(1), 0, nullptr));
    expect("too much shared memory", allow_shared_memory<nothing>(simt::shared_limit + 1, 0));
    expect("more than is allowed", launch(nothing, dim3(1), dim3(1), (48 << 10) + 1, nullptr));
    expect("what is allowed", !allow_shared_memory<another>(64 << 10, 0) &&
                                  !launch(another, dim3(1), dim3(1), 64 << 10, nullptr));
    expect("a kernel that does nothing", !launch(nothing, dim3(2, 3, 4), dim3(8, 8, 16), 0, nullptr));
  }
  simt::order = simt::Order::kForward;
  expect("copies", !launch(copies, dim3(1), dim3(1), 32, nullptr, from, before, after));
  expect("copies land late", before[0] == 0xff && after[0] == 1 && after[1] == 0 && after[16] == 0xff);
  simt::order = simt::Order::kBackward;
  expect("copies", !launch(copies, dim3(1), dim3(1), 32, nullptr, from, before, after));
  expect("copies land at once", before[0] == 1 && after[0] == 1 && after[16] == 0);
}

// ---------------------------------------------------------------------------------------------------

int main(int count, char**) {
  using simt::Order;
  const bool quick = count > 1;
  const Device large{90, 132, 227 << 10, nullptr, 0}, small{80, 4, 163 << 10, nullptr, 0},
      narrow{89, 128, 99 << 10, nullptr, 0}, lone{100, 1, 227 << 10, nullptr, 0},
      lone_hopper{90, 1, 227 << 10, nullptr, 0};
  test_gpu();
  const auto test = [&](int64_t B, int64_t I, int64_t H) {
    settings = {{large, Order::kForward}, {large, Order::kBackward}, {large, Order::kGreedy}};
    if (!quick && are_few(B, I, H)) {
      settings.push_back({large, Order::kRandom});
    } else if (!quick) {  // other tiles
      settings.push_back({narrow, Order::kForward});
      settings.push_back({lone, Order::kGreedy});
      settings.push_back({lone_hopper, Order::kForward});
      settings.push_back({lone_hopper, Order::kGreedy});
    }
    if (!quick) settings.push_back({small, Order::kGreedy});
    const auto test_type = [&](auto zero, Layout layout) {
      using T = decltype(zero);
      test_forward<T, T>(B, I, H, layout);
      test_backward<T, T>(B, I, H, layout);
      if constexpr (sizeof(T) == 2) {
        test_forward<T, float>(B, I, H, layout);
        test_backward<T, float>(B, I, H, layout);
      }
    };
    for (const Layout layout : {Layout{false}, Layout{true}}) {
      test_type(float{}, layout);
      test_type(float16{}, layout);
      if (quick) continue;
      test_type(double{}, layout);
      test_type(bfloat16{}, layout);
    }
  };
  constexpr int64_t kQuick[][3] = {{2, 3, 7}, {9, 72, 72}, {20, 99, 67}, {65, 392, 72}};
  constexpr int64_t kAll[][3] = {
      {1, 1, 1},     {1, 130, 64},  {1, 72, 64},   {2, 3, 7},      {2, 20, 33},   {2, 264, 264},
      {3, 16, 16},   {3, 51, 72},   {3, 0, 20},    {5, 2, 20},     {5, 72, 40},   {8, 33, 20},
      {8, 20, 64},   {9, 7, 3},     {9, 64, 20},   {17, 130, 2},   {17, 16, 33},  {33, 1, 16},
      {33, 72, 64},  {64, 20, 16},  {64, 64, 20},  {97, 3, 20},    {97, 130, 72}, {130, 3, 16},
      {130, 72, 16}, {130, 7, 130}, {130, 16, 64}, {130, 136, 64}, {260, 24, 40}, {66, 392, 72}};
  if (quick)
    for (const auto& [B, I, H] : kQuick) test(B, I, H);
  else
    for (const auto& [B, I, H] : kAll) test(B, I, H);
  printf("%d failures\n", failures);
  return failures != 0;
}
