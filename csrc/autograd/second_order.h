// What the derivatives of the step and those of its gradients share: see second_order.cpp.
#pragma once
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "../ops.h"

namespace lstmfused {

// Inside torch.func.grad, jvp and the like.
inline bool in_transform() {
  const c10::DispatchKeySet active = c10::impl::tls_local_dispatch_key_set().included_;
  return active.has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

// F::apply, also inside transforms. It refuses them, since they do not see what a Function in C++ computes
// beside operators; ours compute nothing: they get their results, which an operator made, and record them.
template <class F, class... Given>
auto apply_function(const Given&... given) {
  auto& state = at::functorch::functorchTLSAccessor();
  struct Hidden {
    std::unique_ptr<at::functorch::FuncTorchTLSBase>&state, kept = std::move(state);
    ~Hidden() { state = std::move(kept); }
  } hidden{state};
  return F::apply(given...);
}

// Which derivatives are asked for, by what an operator is given.
struct Asked {
  bool tangents = false, gradients = false;

  template <class... Given>
  explicit Asked(const Given&... given) {
    (by(given), ...);
    gradients = gradients && at::GradMode::is_enabled();
  }

 private:
  void by(const Tensor& tensor) {
    if (!tensor.defined()) return;
    gradients |= tensor.requires_grad();
    const Tensor& tangent = tensor._fw_grad(/*level=*/0);
    if (!tangent.defined()) return;
    tangents = true;
    gradients |= tangent.requires_grad();
  }
  void by(const OptionalTensor& tensor) {
    if (tensor) by(*tensor);
  }
  void by(const Arguments& many) {
    for (const Tensor& tensor : many) by(tensor);
  }
};

inline Tensors list(const Arguments& arguments) {
  Tensors result;
  result.reserve(kArguments);
  for (const Tensor& tensor : arguments) result.push_back(optional(tensor));
  return result;
}

// The tangent of a tensor, None where it has none.
inline OptionalTensor tangent_of(const Tensor& tensor) {
  return tensor.defined() ? optional(tensor._fw_grad(/*level=*/0)) : std::nullopt;
}
inline Arguments tangents_of(const Arguments& arguments) {
  Arguments result;
  for (int i = 0; i < kArguments; i++) result[i] = tangent_of(arguments[i]).value_or(Tensor());
  return result;
}
inline void set_tangent(const Tensor& tensor, const Tensor& tangent) {
  tensor._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

// Whether the arguments are all there. A step that saved no more than its gradients take has none in the
// place of a factor that it does not need, or a number that stands for its edge in the graph.
inline bool whole(const Arguments& arguments) {
  for (int i = 0; i < kArguments; i++)
    if (arguments[i].defined() ? arguments[i].dim() == 0 : i < kBiasIh) return false;
  return true;
}

// The numbers as what an argument of the node that runs now was, by its edge in the graph: in the place of
// one that was not saved. Undefined where it has no edge.
Tensor stand_in(const Tensor& numbers, size_t edge);

// Whether a graph is traced, by make_fx, say, whose gradients may be differentiated again; AOTAutograd's
// never are.
bool traced();

// A step that is done, as a node of the graph.
State recorded_step(const Arguments& arguments, const StateAndGates& done);

// Known gates as a function of the arguments, to be differentiated to any order.
Tensor with_history(const Tensor& gates, const Arguments& arguments);

}  // namespace lstmfused
