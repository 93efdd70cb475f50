// What every operator that a module calls has to ask of its arguments: batched or not, with a state or
// without, in forward mode or not.
#pragma once
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/zeros.h>

#include "checks.h"

namespace lstmfused {

// In forward mode. torch's own question, isFwGradDefined, takes a copy of the tensor to be asked.
inline bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

// (B, H) zeros beside x (..., B, I). Of many, one row stands for all: torch fills so much in parallel,
// which would hang after fork. A subclass, as DTensor is, makes zeros of its own kind.
inline Tensor zero_state(const Tensor& x, const c10::SymInt& units, at::ScalarType dtype) {
  const c10::SymInt batch = x.sym_size(-2);
  if (x.unsafeGetTensorImpl()->is_python_dispatch()) return x.new_zeros_symint({batch, units}, dtype);
  const auto rows = batch.maybe_as_int(), columns = units.maybe_as_int();
  constexpr int64_t kParallel = 32768;
  const bool many = rows && columns && *rows * *columns >= kParallel;
  const Tensor zeros = at::zeros_symint({many ? 1 : batch, units}, x.options().dtype(dtype));
  return many ? zeros.expand({*rows, *columns}) : zeros;
}

// body gets batched arguments of the right ranks; units() is asked only where there is no state.
template <class Units, class Body>
State with_batch(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Units& units, const Body& body) {
  check_ranks(input, hx, cx);
  const bool batched = input.dim() == 2;
  const auto batch = [&](const Tensor& t) {
    return batched ? MaybeOwned::borrowed(t) : MaybeOwned::owned(t.unsqueeze(0));
  };
  const MaybeOwned x = batch(input);
  State next;
  if (hx) {
    next = body(*x, *batch(*hx), *batch(*cx));
  } else {
    const Tensor zeros = zero_state(*x, units(), x->scalar_type());
    next = body(*x, zeros, zeros);
  }
  if (batched) return next;
  return {std::get<0>(next).squeeze(0), std::get<1>(next).squeeze(0)};
}

// The units are those of weight_hh, (4H, H).
template <class Body>
State with_batch(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Tensor& weight_hh, const Body& body) {
  return with_batch(input, hx, cx, [&] { return weight_hh.sym_size(-1); }, body);
}

// Of a layer: body gets the states before all steps, each (B, H).
template <class Body>
auto with_states(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const c10::SymInt& units, const Body& body) {
  check_layer_ranks(input, hx, cx);
  if (hx) return body(*hx, *cx);
  const Tensor zeros = zero_state(input, units, input.scalar_type());
  return body(zeros, zeros);
}

// The units are those of weight_hh, (4H, H).
template <class Body>
auto with_states(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Tensor& weight_hh, const Body& body) {
  check_layer_ranks(input, hx, cx, weight_hh);
  return with_states(input, hx, cx, weight_hh.sym_size(1), body);
}

}  // namespace lstmfused
