#include "composed.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "../cell_math.h"
#include "../checks.h"

namespace lstmfused {
namespace {

// A tensor as a number of cell_math.h; an undefined one is zero, and costs no operator.
struct Term {
  Tensor tensor;
  bool zero() const { return !tensor.defined(); }
};
Term operator+(const Term& a, const Term& b) {
  return a.zero() ? b : b.zero() ? a : Term{a.tensor.add(b.tensor)};
}
Term operator*(const Term& a, const Term& b) {
  return a.zero() || b.zero() ? Term{} : Term{a.tensor.mul(b.tensor)};
}
Term operator-(int a, const Term& b) { return {at::rsub(b.tensor, a)}; }
Term operator-(const Term& a) { return a.zero() ? a : Term{a.tensor.neg()}; }

struct TermMath {
  using F = Term;
  static Term sigmoid(const Term& x) { return {x.tensor.sigmoid()}; }
  static Term tanh(const Term& x) { return {x.tensor.tanh()}; }
};

Gates<Term> split(const OptionalTensor& gates) {
  if (!gates || !gates->defined()) return {};
  const auto parts = gates->chunk(4, -1);
  return {{parts[0]}, {parts[1]}, {parts[2]}, {parts[3]}};
}

// In the type that sums are formed in.
Tensor wide(const Tensor& tensor) { return tensor.to(at::toOpMathType(tensor.scalar_type())); }

// The gates side by side, (B, 4H); `like` is (B, H).
Tensor join(const Term& i, const Term& f, const Term& g, const Term& o, const Tensor& like) {
  const auto dense = [&](const Term& t) { return t.zero() ? at::zeros_like(like) : t.tensor; };
  return at::cat({dense(i), dense(f), dense(g), dense(o)}, -1);
}

// The gradients of the arguments, but for cx, from those of the gates' sums.
Arguments products(const Tensor& sums, const Arguments& a, const Wanted& wanted) {
  Arguments result;
  if (wanted[kInput]) result[kInput] = at::matmul(sums, a[kWeightIh]);
  if (wanted[kHx]) result[kHx] = at::matmul(sums, a[kWeightHh]);
  if (wanted[kWeightIh]) result[kWeightIh] = at::matmul(sums.mT(), a[kInput]);
  if (wanted[kWeightHh]) result[kWeightHh] = at::matmul(sums.mT(), a[kHx]);
  if (wanted[kBiasIh]) result[kBiasIh] = sums.sum(-2);
  if (wanted[kBiasHh]) result[kBiasHh] = sums.sum(-2);
  return result;
}

Term term(const OptionalTensor& tensor) { return {tensor.value_or(Tensor())}; }

}  // namespace

StateAndGates composed_forward(const Arguments& a) {
  const auto product = [](const Tensor& left, const Tensor& weight, const Tensor& bias) {
    if (weight.dim() == 2 && (!bias.defined() || bias.dim() == 1))
      return at::linear(left, weight, optional(bias));
    const Tensor sums = at::matmul(left, weight.mT());
    return bias.defined() ? sums.add(bias.unsqueeze(-2)) : sums;
  };
  const Tensor sums =
      product(a[kInput], a[kWeightIh], a[kBiasIh]).add(product(a[kHx], a[kWeightHh], a[kBiasHh]));
  const Gates<Term> gate = activate<TermMath>(split(sums));
  const Term c = next_cell(gate, Term{a[kCx]});
  const Tensor h = next_hidden<TermMath>(gate, c).tensor;
  return {has_kernel(sums.scalar_type(), c.tensor.scalar_type()) ? h.to(sums.scalar_type()) : h, c.tensor,
          join(gate.i, gate.f, gate.g, gate.o, a[kCx])};
}

StateAndGates composed_step(const Arguments& arguments) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !batch_invariant(),
      "lstm_cell: stacked weights, and derivatives of a step in both modes at once, "
      "are not batch-invariant: leave lstmfused.batch_invariant() for them");
  return composed_forward(arguments);
}

Arguments composed_gradients(const Tensor& grad_h, const Tensor& grad_c, const Arguments& a,
                             const Tensor& gates, const Wanted& wanted) {
  Term grad_cx{grad_c};
  const Gates<Term> grad = step_backward<TermMath>(split(wide(gates)), Term{a[kCx]}, Term{grad_h}, grad_cx);
  const Tensor sums = join(grad.i, grad.f, grad.g, grad.o, a[kCx]).to(gates.scalar_type());
  Arguments result = products(sums, a, wanted);
  if (wanted[kCx])
    result[kCx] = grad_cx.zero() ? at::zeros_like(a[kCx]) : grad_cx.tensor.to(a[kCx].scalar_type());
  return result;
}

Arguments composed_gradients_of_gates(const Tensor& grad_gates, const Arguments& a, const Tensor& gates,
                                      const Wanted& wanted) {
  const Gates<Dual<Term>> gate = dual_gates(split(wide(gates)), split(grad_gates));
  const Tensor sums = join(gate.i.tangent, gate.f.tangent, gate.g.tangent, gate.o.tangent, gates);
  return products(sums.to(gates.scalar_type()), a, wanted);
}

UnitTangents composed_unit_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                    const Tensor& gates, const Tensor& cx,
                                    const OptionalTensor& sums_tangent, const OptionalTensor& cx_tangent,
                                    const OptionalTensor& grad_h_tangent,
                                    const OptionalTensor& grad_c_tangent) {
  using Math = DualMath<TermMath>;
  const auto dense = [&](const Term& t) { return t.zero() ? at::zeros_like(cx) : t.tensor; };
  const Gates<Dual<Term>> gate = dual_gates(split(gates), split(sums_tangent));
  const Dual<Term> c{{cx}, term(cx_tangent)}, c_next = next_cell(gate, c);
  const Tensor h_tangent = dense(next_hidden<Math>(gate, c_next).tangent),
               c_tangent = dense(c_next.tangent);
  const Dual<Term> g{term(grad_h), term(grad_h_tangent)};
  Dual<Term> grad_cx{term(grad_c), term(grad_c_tangent)};
  if (g.value.zero() && g.tangent.zero() && grad_cx.value.zero() && grad_cx.tangent.zero())
    return {h_tangent, c_tangent, at::empty({0}, cx.options()), at::empty({0}, cx.options())};
  const Gates<Dual<Term>> grad = step_backward<Math>(gate, c, g, grad_cx);
  return {h_tangent, c_tangent,
          at::stack({join(grad.i.tangent, grad.f.tangent, grad.g.tangent, grad.o.tangent, cx),
                     join(grad.i.value, grad.f.value, grad.g.value, grad.o.value, cx)}),
          dense(grad_cx.tangent)};
}

}  // namespace lstmfused
