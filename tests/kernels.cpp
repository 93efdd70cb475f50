// The kernels of one instruction set against plain loops in double precision, without torch: what
// sanitizers, other compilers and emulators can run. test_kernels.py builds it together with
// csrc/cpu/kernels/kernels.cpp; LSTMFUSED_ISA names the variant.
//
// Every array is a heap block of exactly its size, so that AddressSanitizer sees a step beside it.
#include "../csrc/cpu/kernels/kernels.h"
#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define PASTE(a, b) a##b
#define NAME(prefix, isa) PASTE(prefix, isa)

#ifndef __AVX512BF16__  // which has kernels of bfloat16 alone
namespace lstmfused {
extern const Kernels NAME(kernels_, LSTMFUSED_ISA);
}
#endif

using namespace lstmfused;
using std::vector;

// ---------------------------------------------------------------------------------------------------
// Numbers

static double value(double x) { return x; }
static double value(float x) { return x; }
static double value(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
static double value(float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const double magnitude = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

static double value(int8_t x) { return x; }

static void assign(double& to, double x) { to = x; }
static void assign(float& to, double x) { to = float(x); }
static void assign(bfloat16& to, double x) {
  const float f = float(x);
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  to.bits = uint16_t(bits >> 16);
}
static void assign(float16& to, double x) {  // |x| < 2, towards zero
  int exponent;
  const double fraction = frexp(fabs(x), &exponent);
  const bool normal = fraction != 0 && exponent > -14;
  to.bits = normal ? uint16_t((exponent + 14) << 10 | (int(fraction * 2048) & 1023)) : 0;
  if (x < 0) to.bits |= 0x8000;
}

template <class T>
static vector<T> uniform(int64_t size, double scale) {
  vector<T> x(size);
  for (T& element : x) assign(element, uniform() * scale);
  return x;
}

template <class T>
static vector<double> values(const vector<T>& x) {
  vector<double> result(x.size());
  std::transform(x.begin(), x.end(), result.begin(), [](T element) { return value(element); });
  return result;
}

static int failures = 0;

// `terms` were added up; the errors of their sum follow the largest element.
template <class T>
static void check(const char* name, const vector<T>& actual, const vector<double>& expected, double terms,
                  int64_t B, int64_t I, int64_t H) {
  double scale = 1, worst = 0;
  for (double x : expected) scale = std::max(scale, fabs(x));
  for (size_t i = 0; i < expected.size(); i++) {
    const double error = fabs(value(actual[i]) - expected[i]);
    worst = error <= worst ? worst : error;  // NaN, too
  }
  const double allowed = scale * (2 * kRounding<T> + 4 * sqrt(terms) * kRounding<Accumulate<T>>);
  if (worst <= allowed) return;
  failures++;
  printf("%s off by %.1e, allowed %.1e: B %d, I %d, H %d, %d bytes an element\n", name, worst, allowed,
         int(B), int(I), int(H), int(sizeof(T)));
}

// ---------------------------------------------------------------------------------------------------

static void run_in_reverse(int64_t tasks, int64_t, Task task, const void* context, void*) {
  for (int64_t i = tasks; i-- > 0;) task(context, i);
}

// C is the type of the cell state, T or A.
template <class C, class T>
static void test(const CellKernels<T>& kernels, int64_t B, int64_t I, int64_t H, int64_t threads) {
  using A = Accumulate<T>;
  constexpr bool wide = !std::is_same_v<C, T>;
  const auto cells = [](auto& cell) {  // as the structs have them
    if constexpr (std::is_const_v<std::remove_reference_t<decltype(cell)>>)
      return reinterpret_cast<const T*>(cell.data());
    else
      return reinterpret_cast<T*>(cell.data());
  };
  const int64_t G = 4 * H;
  const Pool pool{run_in_reverse, threads, 1 << 20};
  const double scale = 1 / sqrt(double(std::max(I, H)));
  const vector<C> cx = uniform<C>(B * H, 1), grad_c = uniform<C>(B * H, 1);
  const vector<T> x_ = uniform<T>(B * I, 1), h_ = uniform<T>(B * H, 1),
                  weight_ih = uniform<T>(G * I, scale), weight_hh = uniform<T>(G * H, scale),
                  bias_ih = uniform<T>(G, 1), bias_hh = uniform<T>(G, 1), grad_h = uniform<T>(B * H, 1);
  const vector<double> x = values(x_), h = values(h_), c = values(cx), wi = values(weight_ih),
                       wh = values(weight_hh), bi = values(bias_ih), bh = values(bias_hh),
                       gh = values(grad_h), gc = values(grad_c);

  vector<double> gates(B * G), next_c(B * H), next_h(B * H);
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      double gate[4];
      for (int64_t g = 0; g < 4; g++) {
        const int64_t row = g * H + u;
        double sum = bi[row] + bh[row];
        for (int64_t k = 0; k < I; k++) sum += x[b * I + k] * wi[row * I + k];
        for (int64_t k = 0; k < H; k++) sum += h[b * H + k] * wh[row * H + k];
        gates[b * G + row] = gate[g] = g == 2 ? tanh(sum) : 1 / (1 + exp(-sum));
      }
      next_c[b * H + u] = gate[1] * c[b * H + u] + gate[0] * gate[2];
      next_h[b * H + u] = gate[3] * tanh(next_c[b * H + u]);
    }
  for (const auto& [save_gates, batch_invariant] :
       {std::pair{false, false}, {false, true}, {true, false}}) {
    vector<T> out_h(B * H), out_gates(save_gates ? B * G : 0);
    vector<C> out_c(B * H);
    kernels.forward({{B, I, H, x_.data(), I, h_.data(), H, cells(cx), H, out_h.data(), cells(out_c),
                      save_gates ? out_gates.data() : nullptr, wide},
                     weight_ih.data(),
                     weight_hh.data(),
                     bias_ih.data(),
                     bias_hh.data(),
                     batch_invariant},
                    pool);
    check("h", out_h, next_h, double(I + H), B, I, H);
    check("c", out_c, next_c, double(I + H), B, I, H);
    if (!save_gates) continue;
    check("gates", out_gates, gates, double(I + H), B, I, H);

    // Backward from the gates as they were saved.
    const vector<double> saved = values(out_gates);
    vector<double> dg(B * G), dx(B * I), dh(B * H), dc(B * H), dwi(G * I), dwh(G * H), db(G);
    for (int64_t b = 0; b < B; b++) {
      for (int64_t u = 0; u < H; u++) {
        const double *s = &saved[b * G + u], i = s[0], f = s[H], g = s[2 * H], o = s[3 * H];
        const double old = c[b * H + u], t = tanh(f * old + i * g), grad = gh[b * H + u];
        const double through = gc[b * H + u] + grad * o * (1 - t * t);
        double* d = &dg[b * G + u];
        d[0] = through * g * i * (1 - i);
        d[H] = through * old * f * (1 - f);
        d[2 * H] = through * i * (1 - g * g);
        d[3 * H] = grad * t * o * (1 - o);
        dc[b * H + u] = through * f;
      }
      for (int64_t row = 0; row < G; row++) {
        const double d = dg[b * G + row];
        db[row] += d;
        for (int64_t k = 0; k < I; k++) {
          dx[b * I + k] += d * wi[row * I + k];
          dwi[row * I + k] += d * x[b * I + k];
        }
        for (int64_t k = 0; k < H; k++) {
          dh[b * H + k] += d * wh[row * H + k];
          dwh[row * H + k] += d * h[b * H + k];
        }
      }
    }
    vector<C> out_cx(B * H);
    vector<T> out[] = {vector<T>(B * I), vector<T>(B * H), {},          vector<T>(G * I),
                       vector<T>(G * H), vector<T>(G),     vector<T>(G)};
    const auto backward = [&](int64_t rows, A* scratch, int64_t stride) {
      kernels.backward({B,
                        I,
                        H,
                        grad_h.data(),
                        H,
                        cells(grad_c),
                        H,
                        out_gates.data(),
                        x_.data(),
                        I,
                        h_.data(),
                        H,
                        cells(cx),
                        H,
                        weight_ih.data(),
                        weight_hh.data(),
                        rows,
                        scratch,
                        stride,
                        out[0].data(),
                        out[1].data(),
                        cells(out_cx),
                        out[3].data(),
                        out[4].data(),
                        out[5].data(),
                        out[6].data(),
                        wide},
                       pool);
    };
    const int64_t rows = backward_rows<T>(B, I, H), stride = backward_stride<T>(H);
    vector<A> scratch(rows * stride);
    backward(rows, scratch.data(), stride);
    check("grad_input", out[0], dx, double(G), B, I, H);
    check("grad_hx", out[1], dh, double(G), B, I, H);
    check("grad_cx", out_cx, dc, 1, B, I, H);
    check("grad_weight_ih", out[3], dwi, double(B), B, I, H);
    check("grad_weight_hh", out[4], dwh, double(B), B, I, H);
    check("grad_bias_ih", out[5], db, double(B), B, I, H);
    check("grad_bias_hh", out[6], db, double(B), B, I, H);
    if constexpr (std::is_same_v<T, A>) {  // the gate gradients take the gates' place
      out[2] = out_cx;
      const vector<vector<T>> expected(std::begin(out), std::end(out));
      backward(B, out_gates.data(), G);
      out[2] = out_cx;
      for (size_t i = 0; i < expected.size(); i++)
        if (out[i] != expected[i]) {
          failures++;
          printf("gradient %d differs in place: B %d, I %d, H %d, %d bytes an element\n", int(i), int(B),
                 int(I), int(H), int(sizeof(T)));
        }
    }
  }
}

// Kernels of packed weights, where T has them.
using Packing = std::pair<PackedKernel<float>, void (*)(const Pack&, const Pool&)>;

// weight (4H, K) and bias (4H) -> packed by the kernel, from torch's layout or, transposed, from (K, 4H).
struct PackedWeights {
  vector<float> weight, bias;

  PackedWeights(const Packing& packing, const vector<float>& w, const vector<float>& b, int64_t H,
                int64_t K, const Pool& pool)
      : weight(K * 4 * packed_units(H)), bias(4 * packed_units(H)) {
    packing.second({H, K, w.data(), K, 1, weight.data(), 0, K}, pool);
    packing.second({H, 1, b.data(), 1, 0, bias.data(), 0, 1}, pool);
    vector<float> transposed(w.size()), again(weight.size());
    for (int64_t row = 0; row < 4 * H; row++)
      for (int64_t k = 0; k < K; k++) transposed[k * 4 * H + row] = w[row * K + k];
    const int64_t half = K / 2;
    packing.second({H, half, transposed.data(), 1, 4 * H, again.data(), 0, K}, pool);
    packing.second({H, K - half, transposed.data() + half * 4 * H, 1, 4 * H, again.data(), half, K}, pool);
    if (again != weight) {
      failures++;
      printf("packed weights differ: H %d, K %d\n", int(H), int(K));
    }
  }
};

// A step of a sequence: first what the input adds is made, then rows are stepped, reset or skipped. Forward
// from torch's and from packed weights, and backward with what the next step adds.
template <class T>
static void test_masked(const CellKernels<T>& kernels, [[maybe_unused]] const Packing& packing, int64_t B,
                        int64_t I, int64_t H, int64_t threads) {
  using A = Accumulate<T>;
  const int64_t G = 4 * H;
  const Pool pool{run_in_reverse, threads, 1 << 20};
  const double scale = 1 / sqrt(double(std::max(I, H)));
  const vector<T> h_ = uniform<T>(B * H, 1), c_ = uniform<T>(B * H, 1), weight = uniform<T>(G * H, scale),
                  bias = uniform<T>(G, 1), grad_h = uniform<T>(B * H, 1), grad_c = uniform<T>(B * H, 1),
                  input = uniform<T>(B * I, 1), weight_ih = uniform<T>(G * I, scale),
                  next_grad_h = uniform<T>(B * H, 1), next_grad_c = uniform<T>(B * H, 1);
  const vector<double> x = values(input), wi = values(weight_ih);
  vector<double> of_input(B * G);
  for (int64_t row = 0; row < B; row++)
    for (int64_t i = 0; i < G; i++) {
      of_input[row * G + i] = value(bias[i]);
      for (int64_t k = 0; k < I; k++) of_input[row * G + i] += x[row * I + k] * wi[i * I + k];
    }
  vector<RowMask> mask(B);
  for (RowMask& row : mask) row = RowMask(int(3 * (uniform() + 1) / 2) % 3);
  vector<double> h = values(h_), c = values(c_);
  const vector<double> w = values(weight);
  vector<double> gh = values(grad_h), gc = values(grad_c);
  for (int64_t i = 0; i < B * H; i++) {
    gh[i] += value(next_grad_h[i]);
    gc[i] += value(next_grad_c[i]);
  }
  for (int64_t row = 0; row < B; row++)
    for (int64_t u = 0; u < H && mask[row] == RowMask::kReset; u++) h[row * H + u] = c[row * H + u] = 0;
  vector<double> gates(B * G), next_h(B * H), next_c(B * H);
  for (int64_t row = 0; row < B; row++)
    for (int64_t u = 0; u < H; u++) {
      const int64_t at = row * H + u;
      double gate[4];
      for (int64_t g = 0; g < 4; g++) {
        double sum = of_input[row * G + g * H + u];
        for (int64_t k = 0; k < H; k++) sum += h[row * H + k] * w[(g * H + u) * H + k];
        gates[row * G + g * H + u] = gate[g] = g == 2 ? tanh(sum) : 1 / (1 + exp(-sum));
      }
      const bool skip = mask[row] == RowMask::kSkip;
      next_c[at] = skip ? c[at] : gate[1] * c[at] + gate[0] * gate[2];
      next_h[at] = skip ? h[at] : gate[3] * tanh(next_c[at]);
    }
  // The state of a row that is reset must not matter, whatever it is.
  vector<T> hx = h_, cx = c_;
  for (int64_t row = 0; row < B; row++)
    for (int64_t u = 0; u < H && mask[row] == RowMask::kReset; u++) {
      assign(hx[row * H + u], NAN);
      assign(cx[row * H + u], NAN);
    }

  const auto compare = [&](const char* kind, const vector<T>& out_h, const vector<T>& out_c,
                           const vector<T>& out_gates) {
    check(kind, out_h, next_h, double(I + H), B, I, H);
    check(kind, out_c, next_c, double(I + H), B, I, H);
    vector<T> of_steps = out_gates;  // those of rows that are skipped are of no use
    for (int64_t row = 0; row < B; row++)
      for (int64_t i = row * G; i < row * G + G && mask[row] == RowMask::kSkip; i++)
        assign(of_steps[i], gates[i]);
    check(kind, of_steps, gates, double(I + H), B, I, H);
  };
  vector<T> out_gates(B * G);
  vector<A> wide_sums(B * G);
  // Sums become gates in place, where both are of one type.
  A* sums = wide_sums.data();
  if constexpr (std::is_same_v<T, A>) sums = out_gates.data();
  const auto inputs = [&]() -> Step<T> {
    Step<T> step{B, I, H, input.data(), I, input.data(), 0, input.data(), 0, nullptr, nullptr, nullptr};
    step.sums = sums;
    return step;
  };
  const auto check_sums = [&](const char* kind) {
    check(kind, vector<A>(sums, sums + B * G), of_input, double(I), B, I, H);
  };
  const auto step = [&](T* next_hidden, T* next_cell) -> Step<T> {
    return {B, 0,           H,         hx.data(),        0,     hx.data(), H,    cx.data(),
            H, next_hidden, next_cell, out_gates.data(), false, nullptr,   sums, mask.data()};
  };
  for (const bool batch_invariant : {false, true}) {
    vector<T> out_h(B * H), out_c(B * H);
    kernels.forward({inputs(), weight_ih.data(), weight.data(), bias.data(), nullptr, batch_invariant},
                    pool);
    check_sums("sums");
    kernels.forward(
        {step(out_h.data(), out_c.data()), nullptr, weight.data(), nullptr, nullptr, batch_invariant},
        pool);
    compare("masked", out_h, out_c, out_gates);
  }
  if constexpr (std::is_same_v<T, float>) {
    const PackedWeights of_inputs(packing, weight_ih, bias, H, I, pool),
        of_steps(packing, weight, bias, H, H, pool);
    vector<T> out_h(B * H), out_c(B * H);
    packing.first({inputs(), of_inputs.weight.data(), nullptr, of_inputs.bias.data()}, pool);
    check_sums("sums, packed");
    packing.first({step(out_h.data(), out_c.data()), of_steps.weight.data(), nullptr, nullptr}, pool);
    compare("masked, packed", out_h, out_c, out_gates);
  }

  const vector<double> saved = values(out_gates);
  vector<double> dg(B * G), dh(B * H), dc(B * H), dw(G * H);
  for (int64_t row = 0; row < B; row++) {
    for (int64_t u = 0; u < H; u++) {
      const int64_t at = row * H + u;
      if (mask[row] == RowMask::kSkip) {
        dh[at] = gh[at];
        dc[at] = gc[at];
        continue;
      }
      const double *s = &saved[row * G + u], i = s[0], f = s[H], g = s[2 * H], o = s[3 * H];
      const double t = tanh(f * c[at] + i * g), through = gc[at] + gh[at] * o * (1 - t * t);
      double* d = &dg[row * G + u];
      d[0] = through * g * i * (1 - i);
      d[H] = through * c[at] * f * (1 - f);
      d[2 * H] = through * i * (1 - g * g);
      d[3 * H] = gh[at] * t * o * (1 - o);
      dc[at] = mask[row] == RowMask::kReset ? 0 : through * f;
    }
    for (int64_t i = 0; i < G; i++)
      for (int64_t k = 0; k < H; k++) {
        if (mask[row] == RowMask::kStep) dh[row * H + k] += dg[row * G + i] * w[i * H + k];
        dw[i * H + k] += dg[row * G + i] * h[row * H + k];
      }
  }
  for (int64_t i = 0; i < B * H; i++)  // as a sequence has it: zero where a row is reset
    if (mask[i / H] == RowMask::kReset) assign(hx[i], 0);
  // In two calls, as a sequence makes them: first of the states, then of the weights, twice.
  const int64_t stride = backward_stride<T>(H);
  vector<A> scratch(B * stride);
  vector<T> out_hx(B * H), out_cx(B * H), out_weight(G * H), out_bias(G);
  Backward<T> states{};
  states.B = states.rows = B;
  states.H = states.grad_h_stride = states.grad_c_stride = states.cx_stride = H;
  states.grad_h = grad_h.data();
  states.grad_c = grad_c.data();
  states.gates = out_gates.data();
  states.cx = cx.data();
  states.weight_hh = weight.data();
  states.grad_gates = scratch.data();
  states.grad_gates_stride = stride;
  states.grad_hx = out_hx.data();
  states.grad_cx = out_cx.data();
  states.mask = mask.data();
  states.next_grad_h = next_grad_h.data();
  states.next_grad_c = next_grad_c.data();
  kernels.backward(states, pool);
  check("masked grad_hx", out_hx, dh, double(G), B, 0, H);
  check("masked grad_cx", out_cx, dc, 1, B, 0, H);
  if constexpr (std::is_same_v<T, float>)
    if (H % 4 == 0) {
      vector<float> packed(G * packed_units(H / 4) * 4);
      packing.second({H / 4, G, weight.data(), 1, H, packed.data(), 0, G}, pool);
      states.weight_hh = nullptr;
      states.packed_hh = packed.data();
      out_hx.assign(B * H, NAN);
      kernels.backward(states, pool);
      check("masked grad_hx, packed", out_hx, dh, double(G), B, 0, H);
    }
  Backward<T> products{};
  products.B = products.rows = B;
  products.H = products.hx_stride = H;
  products.hx = hx.data();
  products.grad_gates = scratch.data();
  products.grad_gates_stride = stride;
  products.grad_weight_hh = out_weight.data();
  products.grad_bias_hh = out_bias.data();
  vector<double> db(G);
  for (int64_t i = 0; i < B * G; i++) db[i % G] += dg[i];
  for (int times = 1; times <= (std::is_same_v<T, A> ? 2 : 1); times++) {
    kernels.backward(products, pool);
    vector<double> weights = dw, biases = db;
    for (double& grad : weights) grad *= times;
    for (double& grad : biases) grad *= times;
    check("masked grad_weight_hh", out_weight, weights, double(B * times), B, 0, H);
    check("masked grad_bias_hh", out_bias, biases, double(B * times), B, 0, H);
    products.accumulate = true;
  }
  if (!std::is_same_v<T, A>) return;
  products.accumulate = false;
  products.transposed = true;
  kernels.backward(products, pool);
  vector<double> transposed(H * G);
  for (int64_t row = 0; row < G; row++)
    for (int64_t k = 0; k < H; k++) transposed[k * G + row] = dw[row * H + k];
  check("transposed grad_weight_hh", out_weight, transposed, double(B), B, 0, H);
}

// From packed weights: those of lstm.h, packed here once more. scale is what int8 weights are multiplied
// by.
template <class W>
static void test_packed(PackedKernel<W> kernel, int64_t B, int64_t I, int64_t H, int64_t threads) {
  const int64_t G = 4 * H, K = I + H;
  constexpr bool whole = sizeof(W) == 1;
  const Pool pool{run_in_reverse, threads, 1 << 20};
  const double size = 1 / sqrt(double(std::max(I, H)));
  const vector<float> input = uniform<float>(B * I, 1), hx = uniform<float>(B * H, 1),
                      cx = uniform<float>(B * H, 1);
  const int64_t padded = (H + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple;
  vector<W> weight(4 * padded * K);
  vector<float> bias(4 * padded), scale(whole ? 4 * padded : 0);
  vector<double> weights(G * K), biases(G);
  for (int64_t u0 = 0; u0 < H; u0 += kPackedUnits) {
    const int64_t width = std::min<int64_t>(kPackedUnits, padded - u0);
    for (int64_t gate = 0; gate < 4; gate++)
      for (int64_t u = 0; u < width && u0 + u < H; u++) {
        const int64_t row = gate * H + u0 + u, at = gate * width + u;
        const double unit = whole ? (2 + uniform()) * size / 254 : 1;
        if (whole) scale[4 * u0 + at] = float(unit);
        bias[4 * u0 + at] = float(uniform());
        biases[row] = bias[4 * u0 + at];
        for (int64_t k = 0; k < K; k++) {
          W& to = weight[4 * u0 * K + k * 4 * width + at];
          if constexpr (whole)
            to = W(uniform() * 127);
          else
            assign(to, uniform() * size);
          weights[row * K + k] = value(to) * (whole ? double(scale[4 * u0 + at]) : 1);
        }
      }
  }
  vector<double> next_c(B * H), next_h(B * H);
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      double gate[4];
      for (int64_t g = 0; g < 4; g++) {
        const int64_t row = g * H + u;
        double sum = biases[row];
        for (int64_t k = 0; k < K; k++)
          sum += (k < I ? input[b * I + k] : hx[b * H + k - I]) * weights[row * K + k];
        gate[g] = g == 2 ? tanh(sum) : 1 / (1 + exp(-sum));
      }
      next_c[b * H + u] = gate[1] * cx[b * H + u] + gate[0] * gate[2];
      next_h[b * H + u] = gate[3] * tanh(next_c[b * H + u]);
    }
  vector<float> h(B * H), c(B * H);
  kernel({{B, I, H, input.data(), I, hx.data(), H, cx.data(), H, h.data(), c.data(), nullptr},
          weight.data(),
          whole ? scale.data() : nullptr,
          bias.data()},
         pool);
  check("packed h", h, next_h, double(K), B, I, H);
  check("packed c", c, next_c, double(K), B, I, H);
}

// With every input, and with those alone that a bit of `given` stands for; the others are zero.
template <class T>
static void test_tangents(TangentsKernel<T> kernel, int64_t B, int64_t H, int64_t threads, int given) {
  const int64_t G = 4 * H;
  const Pool pool{run_in_reverse, threads, 1 << 20};
  const auto uniform_if = [&](int bit, int64_t size) {
    return given >> bit & 1 ? uniform<T>(size, 1) : vector<T>();
  };
  const auto pointer = [](const vector<T>& x) { return x.empty() ? nullptr : x.data(); };
  const auto at = [](const vector<T>& x, int64_t i) { return x.empty() ? 0.0 : value(x[i]); };
  vector<T> gates = uniform<T>(B * G, 1);
  const vector<T> cx = uniform<T>(B * H, 1), grad_h = uniform_if(0, B * H), grad_c = uniform_if(1, B * H),
                  sums = uniform_if(2, B * G), cx_tangent = uniform_if(3, B * H),
                  grad_h_tangent = uniform_if(4, B * H), grad_c_tangent = uniform_if(5, B * H);
  vector<double> h(B * H), c(B * H), grads(B * G), tangents(B * G), grad_cx(B * H);
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      const int64_t n = b * H + u, m = b * G + u;
      const double i = value(gates[m]), f = value(gates[m + H]), g = value(gates[m + 2 * H]),
                   o = value(gates[m + 3 * H]), old = value(cx[n]), old_ = at(cx_tangent, n);
      const double i_ = i * (1 - i) * at(sums, m), f_ = f * (1 - f) * at(sums, m + H),
                   g_ = (1 - g * g) * at(sums, m + 2 * H), o_ = o * (1 - o) * at(sums, m + 3 * H);
      c[n] = f_ * old + f * old_ + i_ * g + i * g_;
      const double t = tanh(f * old + i * g), t_ = (1 - t * t) * c[n];
      h[n] = o_ * t + o * t_;
      const double gh = at(grad_h, n), gh_ = at(grad_h_tangent, n);
      const double through = at(grad_c, n) + gh * o * (1 - t * t);
      const double through_ =
          at(grad_c_tangent, n) + (gh_ * o + gh * o_) * (1 - t * t) - 2 * gh * o * t * t_;
      grad_cx[n] = through_ * f + through * f_;
      grads[m] = through * g * i * (1 - i);
      grads[m + H] = through * old * f * (1 - f);
      grads[m + 2 * H] = through * i * (1 - g * g);
      grads[m + 3 * H] = gh * t * o * (1 - o);
      tangents[m] = (through_ * g + through * g_) * i * (1 - i) + through * g * (1 - 2 * i) * i_;
      tangents[m + H] = (through_ * old + through * old_) * f * (1 - f) + through * old * (1 - 2 * f) * f_;
      tangents[m + 2 * H] = (through_ * i + through * i_) * (1 - g * g) - 2 * through * i * g * g_;
      tangents[m + 3 * H] = (gh_ * t + gh * t_) * o * (1 - o) + gh * t * (1 - 2 * o) * o_;
    }
  for (const bool with_grads : {true, false}) {
    vector<T> out_h(B * H), out_c(B * H), out_tangents(with_grads ? B * G : 0),
        out_grads(out_tangents.size()), out_cx(with_grads ? B * H : 0);
    kernel({B, H, gates.data(), cx.data(), pointer(grad_h), pointer(grad_c), pointer(sums),
            pointer(cx_tangent), pointer(grad_h_tangent), pointer(grad_c_tangent), out_h.data(),
            out_c.data(), with_grads ? out_tangents.data() : nullptr,
            with_grads ? out_grads.data() : nullptr, with_grads ? out_cx.data() : nullptr},
           pool);
    check("h_tangent", out_h, h, 1, B, 0, H);
    check("c_tangent", out_c, c, 1, B, 0, H);
    if (!with_grads) continue;
    check("grad_gates_tangent", out_tangents, tangents, 1, B, 0, H);
    check("grad_gates", out_grads, grads, 1, B, 0, H);
    check("grad_cx_tangent", out_cx, grad_cx, 1, B, 0, H);
  }
}

constexpr int64_t kShapes[][3] = {{1, 1, 1},    {1, 20, 3},   {2, 5, 17},   {3, 16, 16},  {4, 33, 7},
                                  {5, 51, 51},  {7, 2, 20},   {13, 130, 9}, {19, 70, 33}, {64, 16, 16},
                                  {70, 3, 150}, {97, 51, 20}, {300, 9, 5},  {6, 300, 40}, {50, 256, 40},
                                  {1, 0, 9},    {4, 0, 20},   {33, 0, 8}};

// Half types, with a cell state of their own type and in float32.
template <class T>
static void test_half(const CellKernels<T>& kernels) {
  for (const auto& [B, I, H] : kShapes)
    for (int64_t threads : {1, 3}) {
      test<T>(kernels, B, I, H, threads);
      test<float>(kernels, B, I, H, threads);
      test_masked(kernels, {}, B, std::max<int64_t>(I, 1), H, threads);
    }
}

#ifdef __AVX512BF16__
static const char* test_all() {
  test_half(kernels_avx512_bf16);
  return "avx512_bf16";
}
#else
static const char* test_all() {
  const Kernels& kernels = NAME(kernels_, LSTMFUSED_ISA);
  test_half(kernels.bf16);
  test_half(kernels.f16);
  for (const auto& [B, I, H] : kShapes)
    for (int64_t threads : {1, 3}) {
      test<float>(kernels.f32, B, I, H, threads);
      test<double>(kernels.f64, B, I, H, threads);
      test_packed(kernels.packed_f32, B, I, H, threads);
      test_packed(kernels.packed_bf16, B, I, H, threads);
      test_packed(kernels.packed_i8, B, I, H, threads);
      test_masked(kernels.f32, {kernels.packed_f32, kernels.pack}, B, std::max<int64_t>(I, 1), H, threads);
      test_masked(kernels.f64, {}, B, std::max<int64_t>(I, 1), H, threads);
    }
  test<double>(kernels.f64, 600, 9, 130, 1);                           // more than one part of the batch
  for (int64_t B : {3, 7}) test<float>(kernels.f32, B, 4100, 260, 2);  // weights that stream from DRAM
  for (int64_t B : {7, 20}) test<float>(kernels.f32, B, 2, 1030, 2);   // and a row fits L1; beside panels
  for (int64_t B : {1, 2, 3, 7})
    test_packed(kernels.packed_f32, B, 1600, 520, 2);  // weights that stream from DRAM
  for (int64_t H = 1; H < 36; H++)
    for (int given = 0; given < 64; given++) {
      test_tangents(kernels.tangents_f32, 3, H, 2, given);
      test_tangents(kernels.tangents_f64, 3, H, 2, given);
    }
  for (int64_t H = 1; H < 20; H++)  // every width of the last block
    test_packed(kernels.packed_f32, 5, 3, H, 1);
  return kernels.name;
}
#endif

int main() {
  const char* const name = test_all();
  printf("%s: %d failures\n", name, failures);
  return failures != 0;
}
