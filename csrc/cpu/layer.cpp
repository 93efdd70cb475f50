// The layer's operators on CPU tensors: steps in a loop, by the cell's kernels.
#include <torch/library.h>

#include "../batch.h"
#include "steps.h"

namespace lstmfused {
namespace {

// ---------------------------------------------------------------------------------------------------
// Forward

// A batch-invariant layer must not look at the rows.
bool joint(const Steps& s, bool batch_invariant) { return batch_invariant ? !s.I : joint(s); }

// The layer's weights, as they are or, where it pays, packed.
template <class T>
struct Weights {
  const CellKernels<T>& kernels;
  const Forward<T>& given;
  Tensor packed, bias;

  // Transposed ones have to be packed.
  Weights(const CellKernels<T>& given_kernels, const Steps& s, const Forward<T>& weights,
          [[maybe_unused]] bool transposed_ih, [[maybe_unused]] bool transposed_hh,
          [[maybe_unused]] const Pool& pool)
      : kernels(given_kernels), given(weights) {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t quarters = joint(s, given.batch_invariant) ? kPackedManyRows : kPackedFewRows;
      const bool few = 4 * s.rows() < quarters * (s.I + s.H) || given.batch_invariant;
      if (few && !transposed_ih && !transposed_hh) return;
      const auto pack = [&](const float* weight, int64_t K, bool transposed, const Tensor& to,
                            int64_t begin) {
        const int64_t unit_stride = transposed ? 1 : K, depth_stride = transposed ? 4 * s.H : 1;
        cpu_kernels().pack({s.H, K, weight, unit_stride, depth_stride, out<float>(to), begin, to.size(0)},
                           pool);
      };
      const int64_t units = packed_units(s.H);
      packed = empty_cpu({s.I + s.H, 4 * units}, at::kFloat);
      pack(given.weight_ih, s.I, transposed_ih, packed, 0);
      pack(given.weight_hh, s.H, transposed_hh, packed, s.I);
      if (!given.bias_ih && !given.bias_hh) return;
      bias = empty_cpu({1, 4 * units}, at::kFloat);
      std::vector<float> sum(4 * s.H);
      for (int64_t i = 0; i < 4 * s.H; i++)
        sum[i] = (given.bias_ih ? given.bias_ih[i] : 0) + (given.bias_hh ? given.bias_hh[i] : 0);
      pack(sum.data(), 1, false, bias, 0);
    }
  }

  void operator()(const Step<T>& step, const Pool& pool) const {
    if constexpr (std::is_same_v<T, float>)
      if (packed.defined())
        return cpu_kernels().packed_f32(
            packed_step(step, in<float>(packed), nullptr, in<float>(bias), packed.size(0)), pool);
    Forward<T> p = given;
    static_cast<Step<T>&>(p) = step;
    if (step.starting_sums) p.bias_ih = p.bias_hh = nullptr;  // these are among them
    kernels.forward(p, pool);
  }
};

// ---------------------------------------------------------------------------------------------------
// Backward

// weight_hh as every step's right factor, packed; undefined where that does not pay. A transposed one has
// to be packed.
template <class T>
Tensor packed_state_weights([[maybe_unused]] const Steps& s, [[maybe_unused]] const Backward<T>& given,
                            [[maybe_unused]] bool transposed, [[maybe_unused]] const Pool& pool) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t depth = 4 * s.H, rows = (s.T - !given.grad_hx) * s.B;
    if (!rows || s.H % 4) return {};
    const bool large = s.B >= kPackRows || depth * s.H * int64_t(sizeof(T)) >= kPackedStateBytes;
    if (!transposed && (!large || 4 * rows < s.H)) return {};
    const Tensor packed = empty_cpu({depth, 4 * packed_units(s.H / 4)}, at::kFloat);
    const int64_t unit_stride = transposed ? depth : 1, depth_stride = transposed ? 1 : s.H;
    cpu_kernels().pack(
        {s.H / 4, depth, given.weight_hh, unit_stride, depth_stride, out<float>(packed), 0, depth}, pool);
    return packed;
  }
  return {};
}

struct OutputGradients {
  MaybeOwned output, h, c, cells;  // (T, B, H), (B, H), (B, H), (T, B, H); undefined for zeros
};

template <class T>
void backward(const CellKernels<T>& kernels, const Steps& s, const OutputGradients& grads, Backward<T> all,
              bool transposed_hh, const Tensor& hidden, const Tensor& cells) {
  using A = Accumulate<T>;
  const at::ScalarType dtype = hidden.scalar_type();
  const int64_t steps =
      std::is_same_v<T, A> ? std::clamp<int64_t>(backward_rows<T>(s.rows(), s.I, s.H) / s.B, 1, s.T) : s.T;
  const int64_t stride = backward_stride<T>(s.H);
  const Tensor grad_gates = empty_cpu({steps * s.B, stride}, at::toOpMathType(dtype)),
               state_grads = empty_cpu({2, s.B, s.H}, dtype),
               cell_grads = empty_cpu({s.B, s.H}, cells.scalar_type());
  all.grad_gates = out<A>(grad_gates);
  all.grad_gates_stride = stride;
  const bool resets = has(RowMask::kReset, s.mask, s.rows()), skips = has(RowMask::kSkip, s.mask, s.rows());
  const Tensor hx_copy = resets && all.grad_weight_hh ? empty_cpu({steps * s.B, s.H}, dtype) : Tensor(),
               input_copy = skips && all.grad_weight_ih ? empty_cpu({steps * s.B, s.I}, dtype) : Tensor();
  const States<T> cell(cells), hx(hidden);
  const T* next_h = in<T>(*grads.h);
  const T* next_c = in<T>(*grads.c);
  T* const flip[] = {out<T>(state_grads), out<T>(state_grads) + s.states()};
  const States<T> of_cells(*grads.cells);

  with_team(3 * s.work(), [&](const Pool& pool) {
    const Tensor packed = packed_state_weights(s, all, transposed_hh, pool);
    if (packed.defined()) {
      all.packed_hh = in<T>(packed);
      all.weight_hh = nullptr;
    }
    each_chunk({s.T, s.B, s.I, s.H, !s.reverse, s.mask}, steps, [&](const Chunk& chunk) {
      for (int64_t k = chunk.k; k < chunk.k + chunk.n; k++) {
        const int64_t t = s.reverse ? k : s.T - 1 - k;
        const bool last = k == s.T - 1;
        T* const grad_hx = last ? all.grad_hx : flip[k % 2];
        T* const grad_cx = last ? all.grad_cx : out<T>(cell_grads);
        const RowMask* mask = mask_of(s, t);
        const Rows taken = taken_rows(mask, s.B);
        const auto run = [&](Rows rows, bool multiply) {
          if (rows.begin == rows.end) return;
          const int64_t row = rows.begin, at = row * s.H;
          const auto part = [&](auto* p, int64_t offset) { return p ? p + offset : nullptr; };
          const auto cell_part = [&](auto* p) {
            const int64_t offset = at * cell.size / int64_t(sizeof(T));
            return p ? p + offset : nullptr;
          };
          Backward<T> step{};
          step.B = step.rows = rows.end - row;
          step.H = s.H;
          step.grad_h = part(in<T>(*grads.output), t * s.states() + at);
          step.grad_h_stride = step.grad_c_stride = step.cx_stride = s.H;
          step.grad_c = of_cells[t * s.states() + at];
          step.gates = all.gates + (t * s.B + row) * 4 * s.H;
          step.cx = cell[s.before(t) * s.states() + at];
          step.weight_hh = multiply ? all.weight_hh : nullptr;
          step.packed_hh = multiply ? all.packed_hh : nullptr;
          step.grad_gates = all.grad_gates + ((t - chunk.first) * s.B + row) * stride;
          step.grad_gates_stride = stride;
          step.grad_hx = part(grad_hx, at);
          step.grad_cx = cell_part(grad_cx);
          step.wide_cell = all.wide_cell;
          step.mask = part(mask, row);
          step.next_grad_h = part(next_h, at);
          step.next_grad_c = cell_part(next_c);
          kernels.backward(step, pool);
        };
        run(taken, true);
        run({0, taken.begin}, false);
        run({taken.end, s.B}, false);
        next_h = grad_hx;
        next_c = grad_cx;
      }

      const int64_t rows = chunk.n * s.B, row = chunk.first * s.B;
      Backward<T> products = all;
      products.B = products.rows = rows;
      products.gates = nullptr;
      products.weight_hh = products.packed_hh = nullptr;
      products.grad_hx = products.grad_cx = nullptr;
      products.accumulate = chunk.k > 0;
      if (products.grad_input) products.grad_input += row * s.I;
      const RowMask* mask = s.mask ? s.mask + row : nullptr;
      if (products.grad_weight_ih) {
        products.input += row * all.input_stride;
        if (has(RowMask::kSkip, mask, rows)) {
          products.input =
              without(RowMask::kSkip, mask, products.input, all.input_stride, rows, s.I, input_copy);
          products.input_stride = s.I;
        }
      }
      if (products.grad_weight_hh) {
        products.hx = hx[s.before(chunk.first) * s.states()];
        products.hx_stride = s.H;
        if (has(RowMask::kReset, mask, rows))
          products.hx = without(RowMask::kReset, mask, products.hx, s.H, rows, s.H, hx_copy);
      }
      kernels.backward(products, pool);
    });
  });
}

// ---------------------------------------------------------------------------------------------------
// Tensors

struct Layer {
  Inputs input;
  MaybeOwned weight_ih, weight_hh, bias_ih, bias_hh, mask;
  Steps steps;

  Layer(const Tensor& x, const Tensor& hx, const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
        const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& row_masks,
        bool reverse)
      : input((check_layer(x, hx, cx, w_ih, w_hh, b_ih, b_hh, row_masks), x)) {
    weight_ih = packable(w_ih);
    weight_hh = packable(w_hh);
    bias_ih = contiguous(b_ih);
    bias_hh = contiguous(b_hh);
    mask = contiguous(row_masks);
    steps = {x.size(0), x.size(1), x.size(2), hx.size(1), reverse, row_mask(*mask)};
  }

  // As it is where packing reads it so.
  static MaybeOwned packable(const Tensor& weight) {
    const bool as_it_is = weight.scalar_type() == at::kFloat && !batch_invariant() && is_transposed(weight);
    return as_it_is ? MaybeOwned::borrowed(weight) : contiguous(weight);
  }

  void run(const Tensor& hx, const Tensor& cx, const Tensor& hidden, const Tensor& cells,
           const Tensor& gates) const {
    with_kernels(hidden.scalar_type(), [&](const auto& kernels) {
      using T = typename std::decay_t<decltype(kernels)>::dtype;
      Forward<T> given{};
      given.I = steps.I;
      given.H = steps.H;
      given.input = in<T>(*input.tensor);
      given.input_stride = input.stride;
      given.wide_cell = cells.scalar_type() != hidden.scalar_type();
      given.weight_ih = in<T>(*weight_ih);
      given.weight_hh = in<T>(*weight_hh);
      given.bias_ih = in<T>(*bias_ih);
      given.bias_hh = in<T>(*bias_hh);
      given.batch_invariant = batch_invariant();
      take_steps<T>(steps, given, joint(steps, given.batch_invariant), hx, cx, hidden, cells, gates,
                    [&](const Pool& pool) {
                      return Weights<T>(kernels, steps, given, is_transposed(*weight_ih),
                                        is_transposed(*weight_hh), pool);
                    });
    });
  }
};

LayerStates layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                  const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                  const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                  bool cell_states) {
  return with_states(input, hx, cx, weight_hh, [&](const Tensor& h, const Tensor& c) {
    const Layer given(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse);
    const auto& [T, B, I, H, direction, masks] = given.steps;
    const Tensor hidden = empty_cpu({T + 1, B, H}, h.scalar_type()),
                 cells = cell_states ? empty_cpu({T + 1, B, H}, c.scalar_type())
                                     : empty_cpu({B, H}, c.scalar_type());
    given.run(h, c, hidden, cells, /*gates=*/{});
    return cell_states ? layer_states(hidden, cells, reverse) : last_states(given.steps, hidden, cells);
  });
}

LayerForward layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                           const Tensor& weight_hh, const OptionalTensor& bias_ih,
                           const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse) {
  const Layer given(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse);
  const auto& [T, B, I, H, direction, masks] = given.steps;
  const Tensor hidden = empty_cpu({T + 1, B, H}, hx.scalar_type()),
               cells = empty_cpu({T + 1, B, H}, cx.scalar_type()),
               gates = empty_cpu({T, B, 4 * H}, hx.scalar_type());
  given.run(hx, cx, hidden, cells, gates);
  return {hidden, cells, gates};
}

Gradients layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                         const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                         const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                         const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                         const OptionalTensor& mask, bool reverse, Wanted wanted) {
  check_layer_backward(grad_output, grad_h, grad_c, grad_cells, input, hidden, cells, gates, weight_ih,
                       weight_hh, mask, wanted);
  const int64_t T = gates.size(0), B = gates.size(1), H = hidden.size(2),
                I = input       ? input->size(2)
                    : weight_ih ? weight_ih->size(1)
                                : 0;
  const at::ScalarType dtype = hidden.scalar_type();
  const OutputGradients grads{contiguous(grad_output), contiguous(grad_h), contiguous(grad_c),
                              contiguous(grad_cells)};
  const std::optional<Inputs> x = input ? std::optional<Inputs>(*input) : std::nullopt;
  const bool in_place = dtype == at::kFloat && H % 4 == 0 && is_transposed(weight_hh);
  const MaybeOwned w_ih = contiguous(weight_ih),
                   w_hh = in_place ? MaybeOwned::borrowed(weight_hh) : contiguous(weight_hh),
                   states = contiguous(hidden), cell = contiguous(cells), gate = contiguous(gates),
                   masks = contiguous(mask);
  const Steps steps{T, B, I, H, reverse, row_mask(*masks)};
  // The gradients of weights lie as these do, where sums are formed in them.
  const bool transposed = is_transposed(weight_hh) && at::toOpMathType(dtype) == dtype;
  const auto gradient = [&](int index, at::IntArrayRef shape) {
    const bool columns = transposed && (index == kWeightIh || index == kWeightHh);
    const Tensor tensor = empty_cpu(!wanted[index] ? at::IntArrayRef{0}
                                    : columns      ? at::IntArrayRef{shape[1], shape[0]}
                                                   : shape,
                                    index == kCx ? cells.scalar_type() : dtype);
    if (!steps.rows() || !H) set_zero(tensor);
    return columns && wanted[index] ? tensor.t() : tensor;
  };
  const Gradients gradients{gradient(0, {T, B, I}),  gradient(1, {B, H}),     gradient(2, {B, H}),
                            gradient(3, {4 * H, I}), gradient(4, {4 * H, H}), gradient(5, {4 * H}),
                            gradient(6, {4 * H})};
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh] =
      gradients;
  if (!steps.rows() || !H) {  // no step was taken
    if (wanted[kHx] && grad_h) grad_hx.copy_(*grad_h);
    if (wanted[kCx] && grad_c) grad_cx.copy_(*grad_c);
    return gradients;
  }
  with_kernels(dtype, [&](const auto& kernels) {
    using E = typename std::decay_t<decltype(kernels)>::dtype;
    Backward<E> all{};
    all.I = I;
    all.H = H;
    all.gates = in<E>(*gate);
    all.input = x ? in<E>(*x->tensor) : nullptr;
    all.input_stride = x ? x->stride : 0;
    all.weight_ih = in<E>(*w_ih);
    all.weight_hh = in<E>(*w_hh);
    all.grad_input = out<E>(grad_input);
    all.grad_hx = out<E>(grad_hx);
    all.grad_cx = out<E>(grad_cx);
    all.grad_weight_ih = out<E>(grad_weight_ih);
    all.grad_weight_hh = out<E>(grad_weight_hh);
    all.grad_bias_ih = out<E>(grad_bias_ih);
    all.grad_bias_hh = out<E>(grad_bias_hh);
    all.wide_cell = cells.scalar_type() != dtype;
    all.transposed = transposed;
    backward(kernels, steps, grads, all, is_transposed(*w_hh), *states, *cell);
  });
  return gradients;
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) {
  m.impl("lstm_layer", lstmfused::layer);
  m.impl("lstm_layer_forward", lstmfused::layer_forward);
  m.impl("lstm_layer_backward", lstmfused::layer_backward);
}
