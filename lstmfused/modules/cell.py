"""The cell as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .._integrations.script import scripted_as
from ..functional import lstm_cell

__all__ = ["LSTMCell", "LazyLSTMCell"]


def _scripted(
    self: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    return lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class LSTMCell(nn.LSTMCell):
    r"""A drop-in for :class:`torch.nn.LSTMCell` that computes the step in one fused kernel.

    Constructor, parameters, initial values, ``state_dict`` and errors are those of
    :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the units.
        bias: whether there are biases ``bias_ih`` and ``bias_hh``.
        device: where the parameters are made.
        dtype: float32, float64, bfloat16 or float16.

    Shape:
        - input: (B, I) or (I); the batch B may differ from call to call.
        - hx: the state ``(h, c)``, each (B, H) or (H); ``None`` is a state of zeros.
        - returns the new state ``(h, c)`` of the same shapes.

    Example::

        >>> cell = LSTMCell(10, 20)
        >>> h, c = cell.initial_state(3)
        >>> for step in torch.randn(6, 3, 10):
        ...     h, c = cell(step, (h, c))
    """

    @scripted_as(_scripted)
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        # Where the attributes come from, at a tenth of their cost: unless a subclass may compute
        # them or the instance has others in their place.
        d: dict[str, Any] = self.__dict__
        others = "weight_ih" in d or "weight_hh" in d or "bias_ih" in d or "bias_hh" in d
        p = {} if others or type(self) is not LSTMCell else d["_parameters"]
        try:
            w_ih, w_hh, b_ih, b_hh = p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        except KeyError:
            w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)  # by position: *weights would cost more

    def initial_state(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """A state ``(h, c)`` of zeros, each (batch_size, H), or (H) when no batch size is given, in
        the dtype and on the device of the weights."""
        shape = (self.hidden_size,) if batch_size is None else (batch_size, self.hidden_size)
        return self.weight_hh.new_zeros(shape), self.weight_hh.new_zeros(shape)


class LazyLSTMCell(LazyModuleMixin, LSTMCell):
    """An :class:`LSTMCell` that takes its input size from the first input it sees.

    Until then its parameters are uninitialized, as those of torch's lazy modules are: see
    :class:`torch.nn.modules.lazy.LazyModuleMixin`. The first call, or a ``state_dict`` that is
    loaded, gives them their shapes, and the first call makes it an :class:`LSTMCell`.

    Args:
        hidden_size: H, the units.
        bias, device, dtype: as in :class:`LSTMCell`.
    """

    cls_to_become = LSTMCell

    def __init__(
        self, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(0, hidden_size, bias, device="meta")
        uninitialized: Any = UninitializedParameter  # torch leaves it untyped
        for name in list(self._parameters):
            if self._parameters[name] is not None:
                setattr(self, name, uninitialized(device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> None:
        fresh = self.has_uninitialized_params()
        self.input_size = input.shape[-1] if fresh else self.weight_ih.shape[1]
        if not fresh:
            return
        with torch.no_grad():
            parameter: Any
            for name, parameter in self.named_parameters():
                width = {"weight_ih": (self.input_size,), "weight_hh": (self.hidden_size,)}
                parameter.materialize((4 * self.hidden_size, *width.get(name, ())))
            self.reset_parameters()
