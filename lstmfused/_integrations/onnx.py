"""Step and layer for torch's exporter to ONNX by way of TorchScript, ``dynamo=False``."""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def given(value: Any) -> bool:
    return not value.node().mustBeNone()


def lstm_cell(
    g: Any, input: Any, hx: Any, cx: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any
) -> tuple[Any, Any]:
    def product(left: Any, weight: Any) -> Any:
        return g.op("MatMul", left, g.op("Transpose", weight, perm_i=[1, 0]))

    terms = [product(input, weight_ih)] + ([product(hx, weight_hh)] if given(hx) else [])
    sums, *others = terms + [bias for bias in (bias_ih, bias_hh) if given(bias)]
    for term in others:
        sums = g.op("Add", sums, term)
    count = {"num_outputs_i": 4} if g.opset >= 18 else {}
    gates = g.op("Split", sums, axis_i=-1, outputs=4, **count)
    i, f, o = (g.op("Sigmoid", gates[k]) for k in (0, 1, 3))
    c = g.op("Mul", i, g.op("Tanh", gates[2]))
    if given(cx):
        c = g.op("Add", g.op("Mul", f, cx), c)
    return g.op("Mul", o, g.op("Tanh", c)), c


def lstm_layer(
    g: Any,
    input: Any,
    hx: Any,
    cx: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    mask: Any,
    reverse: Any,
    cell_states: Any,
) -> tuple[Any, ...]:
    """By ONNX's LSTM, which has gates in the order i, o, f, g and a dimension for the direction."""
    from torch.onnx import errors, symbolic_opset9
    from torch.onnx import symbolic_helper as of

    backward, cells = of._get_const(reverse, "b", ""), of._get_const(cell_states, "b", "")
    if given(mask) or cells:
        what = "the cell states of every step" if cells else "resets or lengths"
        raise errors.SymbolicValueError(f"ONNX's LSTM has no {what}: try dynamo=True", input)
    absent = symbolic_opset9.unused(g)
    count = {"num_outputs_i": 4} if g.opset >= 18 else {}

    def directed(*tensors: Any) -> Any:
        """Of each the gates in ONNX's order, one after the other."""
        gates = [g.op("Split", t, axis_i=0, outputs=4, **count) for t in tensors]
        ordered = [of_one[k] for of_one in gates for k in (0, 3, 1, 2)]
        return of._unsqueeze_helper(g, g.op("Concat", *ordered, axis_i=0), [0])

    biases = directed(bias_ih, bias_hh) if given(bias_ih) else absent
    state = [of._unsqueeze_helper(g, t, [0]) if given(t) else absent for t in (hx, cx)]
    output, h, c = g.op(
        "LSTM",
        input,
        directed(weight_ih),
        directed(weight_hh),
        biases,
        absent,  # lengths
        *state,
        outputs=3,
        hidden_size_i=of._get_tensor_dim_size(weight_hh, 1),
        direction_s="reverse" if backward else "forward",
    )
    squeezed = (of._squeeze_helper(g, t, [axis]) for t, axis in ((output, 1), (h, 0), (c, 0)))
    return *squeezed, symbolic_opset9.unused(g)


def register(onnx: Any) -> None:
    # From opset 11 on an axis may be negative.
    onnx.register_custom_op_symbolic("lstmfused::lstm_cell", lstm_cell, 11)
    onnx.register_custom_op_symbolic("lstmfused::lstm_layer", lstm_layer, 11)
