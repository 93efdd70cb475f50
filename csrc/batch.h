// Batched or not, with a state or without: the same for every operator that a module calls.
#pragma once
#include <ATen/ops/zeros.h>

#include "checks.h"

namespace lstmfused {

// body gets batched arguments of the right ranks; units() is asked only where there is no state.
template <class Units, class Body>
State with_batch(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Units& units, const Body& body) {
  check_ranks(input, hx, cx);
  const bool batched = input.dim() == 2;
  const Tensor x = batched ? input : input.unsqueeze(0);
  Tensor h, c;
  if (hx) {
    h = batched ? *hx : hx->unsqueeze(0);
    c = batched ? *cx : cx->unsqueeze(0);
  } else {
    h = c = at::zeros_symint({x.sym_size(0), units()}, x.options());
  }
  State next = body(x, h, c);
  if (batched) return next;
  return {std::get<0>(next).squeeze(0), std::get<1>(next).squeeze(0)};
}

}  // namespace lstmfused
