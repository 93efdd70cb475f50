// T steps in one direction on the CPU: the loop over them, whatever weights they have.
#pragma once
#include <ATen/OpMathType.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../tensors.h"
#include "runtime.h"

namespace lstmfused {

// T steps in one direction.
struct Steps {
  int64_t T, B, I, H;
  bool reverse;
  const RowMask* mask;  // (T, B) or null

  int64_t rows() const { return T * B; }
  int64_t states() const { return B * H; }
  // The time of the step that comes in place k.
  int64_t time(int64_t k) const { return reverse ? T - 1 - k : k; }
  // Of T + 1 states, those before and after the step at time t.
  int64_t before(int64_t t) const { return reverse ? t + 1 : t; }
  int64_t after(int64_t t) const { return reverse ? t : t + 1; }
  int64_t work() const { return rows() * 4 * H * (I + H); }
};

// Whether steps take their inputs themselves: of few rows these are multiplied for many steps at once.
inline bool joint(const Steps& s) { return !s.I || s.T == 1 || s.B >= kJointRows; }

// With packed weights (depth, 4 units): of the state alone where the sums of the inputs are given, the
// biases among them.
template <class W>
Packed<W> packed_step(const Step<float>& step, const W* weight, const float* scale, const float* bias,
                      int64_t depth) {
  const bool started = step.starting_sums;
  return {step, weight, scale, started ? nullptr : bias, started ? depth - step.H : 0, depth};
}

// n steps from place k on, which are those from time `first` on.
struct Chunk {
  int64_t k, n, first;
};
template <class Body>
void each_chunk(const Steps& s, int64_t most, const Body& body) {
  for (int64_t k = 0; k < s.T; k += most) {
    const int64_t n = std::min(most, s.T - k);
    body(Chunk{k, n, s.reverse ? s.T - k - n : k});
  }
}

struct Rows {
  int64_t begin, end;
};
inline bool has(RowMask what, const RowMask* mask, int64_t rows) {
  return mask && std::memchr(mask, int(what), rows);
}
// Of the step at time t; null where no row is reset or skipped, which takes less time.
inline const RowMask* mask_of(const Steps& s, int64_t t) {
  const RowMask* const mask = s.mask ? s.mask + t * s.B : nullptr;
  return has(RowMask::kReset, mask, s.B) || has(RowMask::kSkip, mask, s.B) ? mask : nullptr;
}
// The rows that a step does not skip lie within these.
inline Rows taken_rows(const RowMask* mask, int64_t B) {
  if (!mask) return {0, B};
  Rows rows{0, B};
  while (rows.begin < B && mask[rows.begin] == RowMask::kSkip) rows.begin++;
  while (rows.end > rows.begin && mask[rows.end - 1] == RowMask::kSkip) rows.end--;
  return rows;
}

// A buffer of states, whose type is T or, of a wide cell state, another one.
template <class T>
struct States {
  T* at;
  int64_t size;  // bytes of an element

  explicit States(const Tensor& tensor)
      : at(const_cast<T*>(in<T>(tensor))), size(tensor.defined() ? tensor.element_size() : 0) {}
  T* operator[](int64_t i) const {
    return at ? reinterpret_cast<T*>(reinterpret_cast<char*>(at) + i * size) : nullptr;
  }
  void copy(int64_t to, int64_t from, int64_t count) const {
    if (to != from && count) std::memcpy((*this)[to], (*this)[from], count * size);
  }
};

// (B, H) into the rows of a contiguous buffer.
inline void copy_rows(const Tensor& from, void* to) {
  const int64_t bytes = from.size(1) * from.element_size(), stride = from.stride(0) * from.element_size();
  const char* at = static_cast<const char*>(from.const_data_ptr());
  for (int64_t row = 0; row < from.size(0); row++)
    std::memcpy(static_cast<char*>(to) + row * bytes, at + row * stride, bytes);
}

// The rows of `from` (rows, n), zero where the mask has `what`, as a copy in scratch.
template <class T>
const T* without(RowMask what, const RowMask* mask, const T* from, int64_t stride, int64_t rows, int64_t n,
                 const Tensor& scratch) {
  T* const to = out<T>(scratch);
  for (int64_t row = 0; row < rows; row++)
    if (mask[row] == what)
      std::memset(to + row * n, 0, n * sizeof(T));
    else
      std::memcpy(to + row * n, from + row * stride, n * sizeof(T));
  return to;
}

// (T, B, I) whose rows of all steps are those of one matrix, as they lie or copied.
struct Inputs {
  MaybeOwned tensor;
  int64_t stride;  // between rows

  explicit Inputs(const Tensor& given) {
    const int64_t T = given.size(0), B = given.size(1), I = given.size(2);
    stride = given.stride(B == 1 ? 0 : 1);  // that of a dimension of size 1 says nothing
    const bool one = T <= 1 || B <= 1 || given.stride(0) == B * stride;
    if (one && (given.stride(2) == 1 || I <= 1)) {
      tensor = MaybeOwned::borrowed(given);
    } else {
      tensor = MaybeOwned::owned(given.contiguous());
      stride = I;
    }
  }
};
inline const RowMask* row_mask(const Tensor& mask) {
  return reinterpret_cast<const RowMask*>(in<uint8_t>(mask));
}

// A step's state with zeros in the rows that are reset, for steps that multiply it with the inputs: their
// mask would drop the sums of both.
template <class T>
struct ResetStates {
  Tensor hx, cx, mask;

  ResetStates(const Steps& s, const Tensor& hidden, const Tensor& cells)
      : hx(empty_cpu({s.B, s.H}, hidden.scalar_type())),
        cx(empty_cpu({s.B, s.H}, cells.scalar_type())),
        mask(empty_cpu({s.B}, at::kByte)) {}

  void apply(Step<T>& step) const {
    if (!has(RowMask::kReset, step.mask, step.B)) return;
    step.hx = without(RowMask::kReset, step.mask, step.hx, step.hx_stride, step.B, step.H, hx);
    const int64_t bytes = step.H * cx.element_size();
    step.cx = reinterpret_cast<const T*>(without(
        RowMask::kReset, step.mask, reinterpret_cast<const char*>(step.cx), bytes, step.B, bytes, cx));
    RowMask* const kept = out<RowMask>(mask);
    std::replace_copy(step.mask, step.mask + step.B, kept, RowMask::kReset, RowMask::kStep);
    step.mask = kept;
  }
};

// Takes all steps. given has what they share: sizes, input and its stride, wide_cell.
//
// hidden (T + 1, B, H), cells (T + 1, B, H) or (B, H), of which the first in time are hx and cx. gates
// (T, B, 4H) are undefined where they are not wanted. make(pool) prepares the weights and returns
// run(step, pool). If joint, a step multiplies input and state together; else what input and biases add
// to its sums is made before, for many steps at once.
template <class T, class Make>
void take_steps(const Steps& s, const Step<T>& given, bool joint, const Tensor& hx, const Tensor& cx,
                const Tensor& hidden, const Tensor& cells, const Tensor& gates, const Make& make) {
  using A = Accumulate<T>;
  if (!s.states()) return;
  const States<T> h(hidden), c(cells);
  const int64_t keep = cells.dim() == 3, first = s.before(s.time(0)) * s.states();
  copy_rows(*rows(hx), h[first]);
  copy_rows(*rows(cx), c[keep * first]);
  if (!s.T) return;
  const int64_t G = 4 * s.H, row_bytes = G * int64_t(sizeof(A));
  const int64_t steps = joint ? s.T : std::clamp<int64_t>(kStepsBytes / row_bytes / s.B, 1, s.T);
  T* const out_gates = out<T>(gates);
  const bool in_place = out_gates && std::is_same_v<T, A>;  // sums, before they become gates
  const Tensor scratch =
      joint || in_place ? Tensor() : empty_cpu({steps * s.B, G}, at::toOpMathType(hidden.scalar_type()));
  std::optional<ResetStates<T>> resets;
  if (joint && s.mask) resets.emplace(s, hidden, cells);

  with_team(s.work(), [&](const Pool& pool) {
    const auto run = make(pool);
    each_chunk(s, steps, [&](const Chunk& chunk) {
      A* const sums = in_place ? reinterpret_cast<A*>(out_gates) + chunk.first * s.B * G : out<A>(scratch);
      if (!joint) {
        Step<T> inputs = given;
        inputs.B = chunk.n * s.B;
        inputs.input += chunk.first * s.B * given.input_stride;
        inputs.hx = inputs.input;  // not looked at
        inputs.hx_stride = 0;
        inputs.sums = sums;
        run(inputs, pool);
      }
      for (int64_t k = chunk.k; k < chunk.k + chunk.n; k++) {
        const int64_t t = s.time(k), before = s.before(t) * s.states(), after = s.after(t) * s.states();
        const RowMask* mask = mask_of(s, t);
        const Rows taken = taken_rows(mask, s.B);
        for (const Rows skipped : {Rows{0, taken.begin}, Rows{taken.end, s.B}}) {
          const int64_t at = skipped.begin * s.H, count = (skipped.end - skipped.begin) * s.H;
          h.copy(after + at, before + at, count);
          c.copy(keep * after + at, keep * before + at, count);
        }
        if (taken.begin == taken.end) continue;
        const int64_t row = taken.begin, at = row * s.H;
        Step<T> step = given;
        step.B = taken.end - row;
        step.input += (t * s.B + row) * given.input_stride;
        step.hx = h[before + at];
        step.hx_stride = step.cx_stride = s.H;
        step.cx = c[keep * before + at];
        step.h = h[after + at];
        step.c = c[keep * after + at];
        step.gates = out_gates ? out_gates + (t * s.B + row) * G : nullptr;
        step.mask = mask ? mask + row : nullptr;
        if (!joint) {
          step.I = 0;
          step.starting_sums = sums + ((t - chunk.first) * s.B + row) * G;
        } else if (resets) {
          resets->apply(step);
        }
        run(step, pool);
      }
    });
  });
}

// What lstm_layer returns of them without the cell states of every step, where cells are (B, H). Torch's
// dispatcher would take longer for the parts than the kernel does for a small step.
inline LayerStates last_states(const Steps& s, const Tensor& hidden, const Tensor& cells) {
  const Tensor last = empty_cpu({s.B, s.H}, hidden.scalar_type());
  const size_t bytes = last.nbytes();
  const int64_t at = s.reverse ? 0 : s.T;
  if (bytes)
    std::memcpy(last.mutable_data_ptr(), static_cast<const char*>(hidden.const_data_ptr()) + at * bytes,
                bytes);
  const int64_t first = s.after(0);
  return {hidden.slice(0, first, first + s.T), last, cells, empty_cpu({0}, cells.scalar_type())};
}

}  // namespace lstmfused
