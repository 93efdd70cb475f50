#include "checks.h"

#include <ATen/ops/new_empty.h>
#include <ATen/ops/select.h>
#include <c10/util/Exception.h>

#include "lstm.h"

namespace lstmfused {
namespace {

// Sizes as numbers, which are cheap to compare, or as symbols, which the compiler's tensors may have.
struct Numbers {
  static int64_t size(const Tensor& tensor, int64_t dim) { return tensor.sizes()[dim]; }
};
struct Symbols {
  static c10::SymInt size(const Tensor& tensor, int64_t dim) { return tensor.sym_size(dim); }
};

void check_rank(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 || tensor.dim() == 2, "LSTMCell: Expected ", name,
                    " to be 1D or 2D, got ", tensor.dim(), "D instead");
}

template <class Sizes, class Size>
void check_shape(const char* name, const Tensor& tensor, const Size& rows, const Size& columns) {
  TORCH_CHECK(tensor.dim() == 2 && Sizes::size(tensor, 0) == rows && Sizes::size(tensor, 1) == columns,
              "lstm_cell: expected ", name, " of shape [", rows, ", ", columns, "], got ",
              tensor.sym_sizes());
}

void check_place(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(tensor.layout() == at::kStrided, "lstm_cell: expected ", name,
              " to be a dense tensor, got layout ", tensor.layout());
  TORCH_CHECK(tensor.device() == input.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              input.device(), " and ", tensor.device(), "! (", name, " in lstm_cell)");
}

void check_like(const char* name, const Tensor& tensor, const Tensor& input, const char* like = "input") {
  check_place(name, tensor, input);
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "lstm_cell: expected ", name,
              " to have the dtype of ", like, ", ", input.scalar_type(), ", but got ",
              tensor.scalar_type());
}

template <class Sizes, class Size>
void check_state(int index, const Tensor& state, const Tensor& input, const Size& units) {
  TORCH_CHECK(Sizes::size(input, 0) == Sizes::size(state, 0), "Input batch size ", input.sym_size(0),
              " doesn't match hidden", index, " batch size ", state.sym_size(0), "\nhx[", index,
              "] has shape ", state.sym_sizes(), ", expected (batch, units) = [", input.sym_size(0), ", ",
              units, "]: the batch follows the input, the units follow the weights");
  TORCH_CHECK(Sizes::size(state, 1) == units, "hidden", index, " has inconsistent hidden_size: got ",
              state.sym_size(1), ", expected ", units);
}

void check_batched(const Tensor& input, const Tensor& hx, const Tensor& cx) {
  TORCH_CHECK(input.dim() == 2 && hx.dim() == 2 && cx.dim() == 2,
              "lstm_cell: expected input, hx and cx of shape [batch, ...], got ", input.sym_sizes(), ", ",
              hx.sym_sizes(), " and ", cx.sym_sizes());
}

template <class Sizes, class Size>
void check_input_size(const Tensor& input, const Size& expected) {
  TORCH_CHECK(Sizes::size(input, 1) == expected, "input has inconsistent input_size: got ",
              input.sym_size(1), " expected ", expected);
}

bool symbolic(const Tensor& t) { return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }

template <class Sizes>
void check_sizes(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                 const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  check_batched(input, hx, cx);
  TORCH_CHECK(weight_hh.dim() == 2, "lstm_cell: expected weight_hh of shape [4 * units, units], got ",
              weight_hh.sym_sizes());
  const auto units = Sizes::size(weight_hh, 1);
  if (weight_ih.dim() == 2) check_input_size<Sizes>(input, Sizes::size(weight_ih, 1));
  check_state<Sizes>(0, hx, input, units);
  check_state<Sizes>(1, cx, input, units);
  check_shape<Sizes>("weight_ih", weight_ih, units * 4, Sizes::size(input, 1));
  check_shape<Sizes>("weight_hh", weight_hh, units * 4, units);

  const auto check_bias = [&](const char* name, const OptionalTensor& bias) {
    if (!bias || !bias->defined()) return;
    TORCH_CHECK(bias->dim() == 1 && Sizes::size(*bias, 0) == units * 4, "lstm_cell: expected ", name,
                " of shape [", units * 4, "], got ", bias->sym_sizes());
  };
  check_bias("bias_ih", bias_ih);
  check_bias("bias_hh", bias_hh);
}

// c may be in float32 beside a half type.
void check_cell(const char* name, const Tensor& cell, const Tensor& input) {
  check_place(name, cell, input);
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(input.scalar_type(), cell.scalar_type()),
                              "\"lstm_cell\" not implemented for '", input.scalar_type(), "' with ", name,
                              " in '", cell.scalar_type(), "'");
}

template <class Sizes>
void check_packed_sizes(const Tensor& input, const Tensor& hx, const Tensor& cx, int64_t inputs,
                        int64_t units) {
  check_batched(input, hx, cx);
  check_input_size<Sizes>(input, inputs);
  check_state<Sizes>(0, hx, input, units);
  check_state<Sizes>(1, cx, input, units);
}

// (T, B, I) -> (B, I), whatever is in it.
Tensor one_step(const Tensor& input) {
  const bool any = symbolic(input) || input.size(0) == 0;
  return any ? input.new_empty_symint({input.sym_size(1), input.sym_size(2)}) : input.select(0, 0);
}

void check_mask(const OptionalTensor& mask, const Tensor& input) {
  if (!mask || !mask->defined()) return;
  check_place("mask", *mask, input);
  TORCH_CHECK(mask->scalar_type() == at::kByte && mask->dim() == 2 &&
                  mask->sym_size(0) == input.sym_size(0) && mask->sym_size(1) == input.sym_size(1),
              "lstm_layer: expected mask of shape [", input.sym_size(0), ", ", input.sym_size(1),
              "] in Byte, got ", mask->sym_sizes(), " in ", mask->scalar_type());
}

}  // namespace

void check_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx) {
  check_rank("input", input);
  TORCH_CHECK(hx.has_value() == cx.has_value(),
              "lstm_cell expects two hidden states, h and c, or none of them");
  if (!hx) return;
  check_rank("hx[0]", *hx);
  check_rank("hx[1]", *cx);
  TORCH_CHECK(hx->dim() == input.dim() && cx->dim() == input.dim(), "For ",
              input.dim() == 2 ? "batched 2-D" : "unbatched 1-D", " input, hx and cx should also be ",
              input.dim(), "-D but got (", hx->dim(), "-D, ", cx->dim(), "-D) tensors");
}

void check_shapes(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                  const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const bool any = symbolic(input) || symbolic(hx) || symbolic(cx) || symbolic(weight_ih) ||
                   symbolic(weight_hh) || (bias_ih && symbolic(*bias_ih)) ||
                   (bias_hh && symbolic(*bias_hh));
  const auto check = any ? check_sizes<Symbols> : check_sizes<Numbers>;
  check(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

void check_step(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  check_shapes(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  check_place("input", input, input);
  check_like("hx[0]", hx, input);
  check_cell("hx[1]", cx, input);
  check_like("weight_ih", weight_ih, input);
  check_like("weight_hh", weight_hh, input);
  if (bias_ih && bias_ih->defined()) check_like("bias_ih", *bias_ih, input);
  if (bias_hh && bias_hh->defined()) check_like("bias_hh", *bias_hh, input);
}

void check_layer_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx) {
  TORCH_CHECK(input.dim() == 3, "lstm_layer: expected input of shape [steps, batch, input], got ",
              input.sym_sizes());
  TORCH_CHECK(hx.has_value() == cx.has_value(),
              "lstm_layer expects two hidden states, h and c, or none of them");
}

void check_layer_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight_hh) {
  check_layer_ranks(input, hx, cx);
  TORCH_CHECK(weight_hh.dim() == 2, "lstm_layer: expected weight_hh of shape [4 * units, units], got ",
              weight_hh.sym_sizes());
}

void check_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                 const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                 const OptionalTensor& mask) {
  check_layer_ranks(input, hx, cx, weight_hh);
  check_step(one_step(input), hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  check_mask(mask, input);
}

void check_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                          const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                          const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                          const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                          const OptionalTensor& mask, const Wanted& wanted) {
  TORCH_CHECK(gates.dim() == 3 && gates.size(2) % 4 == 0,
              "lstm_layer: expected gates of shape [steps, batch, 4 * units], got ", gates.sizes());
  const int64_t T = gates.size(0), B = gates.size(1), H = gates.size(2) / 4;
  const auto check = [&](const char* name, const OptionalTensor& tensor, at::IntArrayRef shape,
                         const Tensor& like) {
    if (!tensor || !tensor->defined()) return;
    TORCH_CHECK(tensor->sizes() == shape, "lstm_layer: expected ", name, " of shape ", shape, ", got ",
                tensor->sizes());
    check_like(name, *tensor, like, "hidden or cells");
  };
  check("hidden", hidden, {T + 1, B, H}, gates);
  check_cell("cells", cells, hidden);
  check("cells", cells, {T + 1, B, H}, cells);
  check("grad_output", grad_output, {T, B, H}, hidden);
  check("grad_h", grad_h, {B, H}, hidden);
  check("grad_c", grad_c, {B, H}, cells);
  check("grad_cells", grad_cells, {T, B, H}, cells);
  check("weight_hh", weight_hh, {4 * H, H}, hidden);
  const int64_t I = input && input->dim() == 3           ? input->size(2)
                    : weight_ih && weight_ih->dim() == 2 ? weight_ih->size(1)
                                                         : 0;
  check("input", input, {T, B, I}, hidden);
  check("weight_ih", weight_ih, {4 * H, I}, hidden);
  if (mask) {
    check_place("mask", *mask, hidden);
    TORCH_CHECK(mask->scalar_type() == at::kByte && mask->sizes() == at::IntArrayRef({T, B}),
                "lstm_layer: expected mask of shape [", T, ", ", B, "] in Byte, got ", mask->sizes(),
                " in ", mask->scalar_type());
  }
  check_needed(input, hidden, weight_ih, weight_hh, wanted);
}

void check_packed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight,
                  const Tensor& bias, const OptionalTensor& scale, int64_t inputs, int64_t units,
                  int64_t format) {
  TORCH_CHECK(format == kPackedFormat, "lstm_cell_packed: weights packed in format ", format,
              ", but this lstmfused reads format ", kPackedFormat,
              ": pack the model again with lstmfused.pack");
  const bool any = symbolic(input) || symbolic(hx) || symbolic(cx);
  const auto check = any ? check_packed_sizes<Symbols> : check_packed_sizes<Numbers>;
  check(input, hx, cx, inputs, units);
  const int64_t padded = (units + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple;
  const auto check_flat = [](const char* name, const Tensor& tensor, int64_t size) {
    TORCH_CHECK(tensor.dim() == 1 && tensor.sym_size(0) == size, "lstm_cell_packed: expected ", name,
                " of shape [", size, "], got ", tensor.sym_sizes());
  };
  check_flat("weight", weight, 4 * padded * (inputs + units));
  check_flat("bias", bias, 4 * padded);
  const at::ScalarType dtype = weight.scalar_type();
  const bool scaled = scale && scale->defined();
  TORCH_CHECK(
      bias.scalar_type() == at::kFloat && scaled == (dtype == at::kChar) &&
          (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kChar),
      "lstm_cell_packed: expected bias in float32 and weight in float32, bfloat16 or, with a scale, "
      "int8, got ",
      bias.scalar_type(), " and ", dtype, ": a packed cell keeps the dtypes that it was made with");
  check_place("weight", weight, bias);
  check_like("input", input, bias, "bias");
  check_like("hx[0]", hx, bias, "bias");
  check_like("hx[1]", cx, bias, "bias");
  if (!scaled) return;
  check_flat("scale", *scale, 4 * padded);
  check_like("scale", *scale, bias, "bias");
}

void check_packed_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight,
                        const Tensor& bias, const OptionalTensor& scale, const OptionalTensor& mask,
                        int64_t inputs, int64_t units, int64_t format) {
  check_layer_ranks(input, hx, cx);
  check_packed(one_step(input), hx, cx, weight, bias, scale, inputs, units, format);
  check_mask(mask, input);
}

void check_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                    const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                    const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                    const std::array<bool, 7>& wanted) {
  TORCH_CHECK(cx.dim() == 2, "lstm_cell: expected hx[1] of shape [batch, units], got ", cx.sizes());
  const int64_t batch = cx.size(0), units = cx.size(1);
  const auto check = [&](const char* name, const OptionalTensor& tensor, int64_t rows, int64_t columns) {
    if (!tensor || !tensor->defined()) return;
    check_shape<Numbers>(name, *tensor, rows, columns);
    check_like(name, *tensor, gates, "gates");
  };
  check("gates", gates, batch, units * 4);
  check_cell("hx[1]", cx, gates);
  check("grad_h", grad_h, batch, units);
  if (grad_c && grad_c->defined()) {
    check_shape<Numbers>("grad_c", *grad_c, batch, units);
    check_like("grad_c", *grad_c, cx, "hx[1]");
  }
  // Both name the same input size, whatever that is.
  const Tensor& wide = input && input->defined()           ? *input
                       : weight_ih && weight_ih->defined() ? *weight_ih
                                                           : cx;
  const int64_t inputs = wide.dim() == 2 ? wide.size(1) : 0;
  check("input", input, batch, inputs);
  check("hx[0]", hx, batch, units);
  check("weight_ih", weight_ih, units * 4, inputs);
  check("weight_hh", weight_hh, units * 4, units);
  check_needed(input, hx, weight_ih, weight_hh, wanted);
}

void check_needed(const OptionalTensor& input, const OptionalTensor& hx, const OptionalTensor& weight_ih,
                  const OptionalTensor& weight_hh, const std::array<bool, 7>& wanted) {
  const auto check = [&](int gradient, const char* of, const OptionalTensor& factor, const char* name) {
    TORCH_CHECK(!wanted[gradient] || (factor && factor->defined()), "lstm_cell: the gradient of ", of,
                " takes ", name);
  };
  check(0, "input", weight_ih, "weight_ih");
  check(1, "hx[0]", weight_hh, "weight_hh");
  check(3, "weight_ih", input, "input");
  check(4, "weight_hh", hx, "hx[0]");
}

}  // namespace lstmfused
