"""The step for torch's exporter to ONNX by way of TorchScript, ``dynamo=False``."""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def lstm_cell(
    g: Any, input: Any, hx: Any, cx: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any
) -> tuple[Any, Any]:
    def given(value: Any) -> bool:
        return not value.node().mustBeNone()

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


def register(onnx: Any) -> None:
    # From opset 11 on an axis may be negative.
    onnx.register_custom_op_symbolic("lstmfused::lstm_cell", lstm_cell, 11)
