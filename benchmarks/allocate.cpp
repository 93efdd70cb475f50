// What any operator of a cell's signature costs at least: its arguments come in, two (B, H) outputs go out;
// in training the arguments are kept for backward, and each gets a gradient.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

using at::Tensor;
using torch::autograd::variable_list;

static Tensor empty(at::IntArrayRef shape, const Tensor& like) {
  return at::detail::empty_cpu(shape, like.scalar_type());
}

struct Step : torch::autograd::Function<Step> {
  static variable_list forward(torch::autograd::AutogradContext* context, const Tensor& input,
                               const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const Tensor& bias_ih, const Tensor& bias_hh) {
    context->save_for_backward({input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh});
    return {empty(hx.sizes(), hx), empty(hx.sizes(), hx)};
  }

  static variable_list backward(torch::autograd::AutogradContext* context, const variable_list&) {
    variable_list gradients;
    for (const Tensor& argument : context->get_saved_variables())
      gradients.push_back(empty(argument.sizes(), argument));
    return gradients;
  }
};

static std::tuple<Tensor, Tensor> lstm_cell(const Tensor& input, const std::optional<Tensor>& hx,
                                            const std::optional<Tensor>& cx, const Tensor& weight_ih,
                                            const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                                            const std::optional<Tensor>& bias_hh) {
  if (at::GradMode::is_enabled()) {
    const variable_list state = Step::apply(input, *hx, *cx, weight_ih, weight_hh, *bias_ih, *bias_hh);
    return {state[0], state[1]};
  }
  const auto output = [&] { return empty({input.size(0), weight_hh.size(1)}, input); };
  return {output(), output()};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("lstm_cell", &lstm_cell, pybind11::call_guard<pybind11::gil_scoped_release>());
}
