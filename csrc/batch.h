// What every operator that a module calls has to ask of its arguments: batched or not, with a state or
// without, in forward mode or not.
#pragma once
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "checks.h"

namespace lstmfused {

// In forward mode. torch's own question, isFwGradDefined, takes a copy of the tensor to be asked.
inline bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

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
    // A subclass, as DTensor is, makes zeros of its own kind.
    const std::array<c10::SymInt, 2> shape{x->sym_size(0), units()};
    const Tensor zeros = x->unsafeGetTensorImpl()->is_python_dispatch()
                             ? x->new_zeros_symint(shape)
                             : at::zeros_symint(shape, x->options());
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

}  // namespace lstmfused
