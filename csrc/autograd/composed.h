// The step and its derivatives in torch's own operators, from the equations of cell_math.h: for whatever
// has no kernel. All that is computed here can be differentiated, batched and traced as any operator can.
#pragma once
#include "../ops.h"

namespace lstmfused {

// As lstm_cell_forward, but every argument may have a further dimension in front.
StateAndGates composed_forward(const Arguments& arguments);

// The same where h and c are what is asked for: raises in batch-invariant mode.
StateAndGates composed_step(const Arguments& arguments);

// As lstm_cell_gradients, from gates that may depend on the arguments.
Arguments composed_gradients(const Tensor& grad_h, const Tensor& grad_c, const Arguments& arguments,
                             const Tensor& gates, const Wanted& wanted);

// The gradients of the arguments from that of the gates: cx has none.
Arguments composed_gradients_of_gates(const Tensor& grad_gates, const Arguments& arguments,
                                      const Tensor& gates, const Wanted& wanted);

// As lstm_cell_unit_tangents.
UnitTangents composed_unit_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                    const Tensor& gates, const Tensor& cx,
                                    const OptionalTensor& sums_tangent, const OptionalTensor& cx_tangent,
                                    const OptionalTensor& grad_h_tangent,
                                    const OptionalTensor& grad_c_tangent);

}  // namespace lstmfused
