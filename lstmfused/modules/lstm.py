"""The layer as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .._integrations.script import scripted_as
from ..functional import lstm
from .cell import LSTMCell

__all__ = ["LSTM"]


def _scripted(
    self: Any,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    result: tuple[Tensor, tuple[Tensor, Tensor]] = lstm(
        input,
        hx,
        self._flat_weights,
        self.bias,
        self.num_layers,
        self.dropout,
        self.training,
        self.bidirectional,
        self.batch_first,
        reset=reset,
        lengths=lengths,
    )
    return result


class LSTM(nn.LSTM):
    r"""A drop-in for :class:`torch.nn.LSTM` that computes each layer and direction in one operator.

    Constructor, parameters, initial values, ``state_dict``, packed sequences and errors are those
    of :class:`torch.nn.LSTM`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the units.
        num_layers, bias, batch_first, dropout, bidirectional, proj_size: as in
            :class:`torch.nn.LSTM`.
        device: where the parameters are made.
        dtype: float32, float64, bfloat16 or float16.

    Shape:
        - input: (T, B, I), with ``batch_first`` (B, T, I), without a batch (T, I), or a
          :class:`~torch.nn.utils.rnn.PackedSequence`.
        - hx: the state ``(h, c)``, each (layers * D, B, H) or (layers * D, H); ``None`` is a state
          of zeros.
        - reset: bool, (T, B), with ``batch_first`` (B, T), or (T).
        - lengths: integers, (B), or one without a batch.
        - returns ``output, (h, c)``, with ``return_cell_states`` also ``c`` of every step, shaped
          like ``output``: (T, B, D * H). :func:`lstmfused.functional.lstm` tells more.

    Example::

        >>> lstm = LSTM(10, 20)
        >>> output, state = lstm(torch.randn(6, 3, 10))
        >>> done = torch.rand(6, 3) < 0.1  # episodes that begin anew
        >>> output, state = lstm(torch.randn(6, 3, 10), state, reset=done)
        >>> output, state = lstm(torch.randn(6, 3, 10), lengths=torch.tensor([2, 6, 0]))
        >>> h, c = lstm.cell()(torch.randn(3, 10), (state[0][0], state[1][0]))
    """

    @scripted_as(_scripted)
    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        reset: Any = None,
        lengths: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        plain = reset is None and lengths is None and not return_cell_states
        try:
            return lstm(
                input,
                hx,
                self._params(),
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
                self.batch_first,
                reset=reset,
                lengths=lengths,
                return_cell_states=return_cell_states,
            )
        except (RuntimeError, ValueError):
            if plain:
                super().forward(input, hx)
            raise

    def _params(self) -> list[Any]:
        # Where the attributes come from, at a tenth of their cost: see LSTMCell.forward.
        d: dict[str, Any] = self.__dict__
        names, p = d["_flat_weights_names"], d["_parameters"]
        known = type(self) is LSTM and not is_dynamo_compiling() and d.keys().isdisjoint(names)
        try:
            if known:
                return list(map(p.__getitem__, names))
        except KeyError:
            pass
        return [getattr(self, name) for name in names]

    def cell(self, layer: int = 0, direction: int = 0) -> LSTMCell:
        """An :class:`LSTMCell` of the very parameters of one layer and direction (0 forward, 1
        backward): it goes on step by step from where the layer ends.

        Raises:
            IndexError: there is no such layer or direction.
            ValueError: the layer has projections, which a cell has not.
        """
        if self.proj_size:
            raise ValueError("a cell has no projection, which proj_size asks for")
        if not 0 <= layer < self.num_layers or not 0 <= direction <= int(self.bidirectional):
            raise IndexError(f"there is no layer {layer} with direction {direction} in {self}")
        suffix = f"_l{layer}" + "_reverse" * direction
        width = getattr(self, f"weight_ih{suffix}").shape[1]
        cell = LSTMCell(width, self.hidden_size, self.bias, device="meta")
        for name, _ in list(cell.named_parameters()):
            setattr(cell, name, getattr(self, name + suffix))
        return cell.train(self.training)

    def initial_state(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """A state ``(h, c)`` of zeros, each (layers * D, batch_size, H), or (layers * D, H) when no
        batch size is given, in the dtype and on the device of the weights."""
        states = self.num_layers * (1 + self.bidirectional)
        rows = (states,) if batch_size is None else (states, batch_size)
        weight: Any = self.weight_hh_l0
        zeros = weight.new_zeros
        return zeros(*rows, self.proj_size or self.hidden_size), zeros(*rows, self.hidden_size)
