"""Cell and layer for inference alone, from weights that are packed once."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import is_parametrized

from .._integrations.script import scripted_as
from .._ops import _C
from ..functional.cell import pair
from ..functional.layer import packed_lstm
from .cell import LazyLSTMCell, LSTMCell
from .lstm import LSTM
from .packing import FORMAT, check_packable, packed

__all__ = ["PackedLSTM", "PackedLSTMCell", "pack"]


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.format = FORMAT
        self.training = False

    def get_extra_state(self) -> Tensor:
        """The format of the packed weights, which is saved with them."""
        return torch.tensor(self.format)

    def set_extra_state(self, state: Tensor) -> None:
        if int(state) != FORMAT:
            raise ValueError(
                f"expected weights packed in format {FORMAT}, got format {int(state)}: pack the "
                "model they were made from again"
            )

    def train(self, mode: bool = True) -> Any:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def _register(self, parts: Any, suffix: str) -> None:
        for name, part in parts._asdict().items():
            self.register_buffer(name + suffix, part)


def _scripted(
    self: PackedLSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    h: Tensor | None = None
    c: Tensor | None = None
    if hx is not None:
        h, c = hx
    next_h, next_c = torch.ops.lstmfused.lstm_cell_packed(
        input,
        h,
        c,
        self.weight,
        self.bias,
        self.scale,
        self.input_size,
        self.hidden_size,
        self.format,
    )
    return next_h, next_c


class PackedLSTMCell(_Packed):
    r"""An LSTM cell for inference on CPU, with weights packed for its kernel when it is made.

    It computes what the cell it was made from computes now: later changes of that cell do not
    reach it. It cannot be trained. Weights are packed alike for every instruction set, so what is
    saved on one machine can be loaded on another.

    Everything but the weights is float32, the sums too. With ``weight_dtype=torch.bfloat16`` each
    weight is rounded to nearest, off by 2⁻⁹ of itself at most. With ``torch.int8`` it is
    a whole number times a scale of its gate and unit, off by 1/254 of the largest weight of that
    gate and unit at most.

    Args:
        cell: a :class:`torch.nn.LSTMCell` or :class:`LSTMCell` of float32 parameters on CPU.
        weight_dtype: float32, bfloat16 or int8.

    Shape:
        - input: (B, I) or (I); the batch B may differ from call to call.
        - hx: the state ``(h, c)``, each (B, H) or (H); ``None`` is a state of zeros.
        - returns the new state ``(h, c)`` of the same shapes.

    Attributes:
        format: of the packed weights; others than this version's raise an error.
        weight: packed, flat, of ``weight_dtype``: all of `weight_ih` and `weight_hh`.
        bias: packed, flat, float32: the sum of both biases, or zeros.
        scale: packed, flat, float32, by which sums over int8 weights are multiplied; else ``None``.

    Raises:
        TypeError: ``cell`` is no LSTM cell.
        ValueError: it has parameters of another dtype or device, parametrized or uninitialized
            ones, or hooks; or ``weight_dtype`` is none of the three.
        RuntimeError: in a call, what :class:`LSTMCell` raises; also where a gradient is asked for.

    Example::

        >>> packed = PackedLSTMCell(nn.LSTMCell(10, 20))
        >>> h, c = packed(torch.randn(3, 10))
    """

    if TYPE_CHECKING:  # TorchScript evaluates a class's annotations, which are strings here
        weight: Tensor
        bias: Tensor
        scale: Tensor | None

    def __init__(self, cell: nn.LSTMCell, weight_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not isinstance(cell, nn.LSTMCell):
            raise TypeError(
                f"expected an nn.LSTMCell or lstmfused.LSTMCell, got {type(cell).__name__}"
            )
        check_packable(cell, "cell", ["weight_ih", "weight_hh"])
        self.input_size, self.hidden_size = cell.input_size, cell.hidden_size
        self._register(packed(cell, "", weight_dtype), "")

    @scripted_as(_scripted)
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h: Tensor | None
        c: Tensor | None
        if hx is None:
            h = c = None
        else:
            h, c = hx if type(hx) is tuple and len(hx) == 2 else pair(hx)
        op = torch.ops.lstmfused.lstm_cell_packed if is_dynamo_compiling() else _C.lstm_cell_packed
        b: dict[str, Any] = self._buffers
        sizes = self.input_size, self.hidden_size, self.format
        return op(input, h, c, b["weight"], b["bias"], b["scale"], *sizes)

    def initial_state(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """A state ``(h, c)`` of zeros, as :meth:`LSTMCell.initial_state` has it."""
        shape = (self.hidden_size,) if batch_size is None else (batch_size, self.hidden_size)
        return self.bias.new_zeros(shape), self.bias.new_zeros(shape)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, weight_dtype={self.weight.dtype}"


def _scripted_layer(
    self: PackedLSTM,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    params: list[Tensor] = []
    for _, buffer in self.named_buffers():  # a scale may be None
        if buffer is not None:
            params.append(buffer)
    result: tuple[Tensor, tuple[Tensor, Tensor]] = packed_lstm(
        input,
        hx,
        params,
        (self.input_size, self.hidden_size, self.format),
        self.num_layers,
        self.bidirectional,
        self.batch_first,
        reset=reset,
        lengths=lengths,
    )
    return result


class PackedLSTM(_Packed):
    r"""LSTM layers for inference on CPU, with weights packed for their kernel when they are made.

    They compute what the layer they were made from computes now in evaluation mode, that is without
    dropout; :class:`PackedLSTMCell` says what holds for its weights, too.

    Args:
        layer: a :class:`torch.nn.LSTM` or :class:`LSTM` of float32 parameters on CPU, without
            projections.
        weight_dtype: float32, bfloat16 or int8.

    Shape:
        - input: float32, (T, B, I), with ``batch_first`` (B, T, I), without a batch (T, I), or a
          :class:`~torch.nn.utils.rnn.PackedSequence`.
        - hx: the state ``(h, c)``, each float32, (layers * D, B, H) or (layers * D, H); ``None`` is
          a state of zeros.
        - reset: bool, (T, B), with ``batch_first`` (B, T), or (T), as :class:`LSTM` takes it.
        - lengths: integers, (B), or one without a batch, as :class:`LSTM` takes them.
        - returns ``output, (h, c)``: (T, B, D * H) or as the input has it, and states like ``hx``.

    Attributes:
        format: of the packed weights; others than this version's raise an error.
        weight_l0: packed, flat, of ``weight_dtype``: all of `weight_ih_l0` and `weight_hh_l0`; so
            for each layer and direction, as in ``weight_l1_reverse``.
        bias_l0: packed, flat, float32: the sum of both biases, or zeros.
        scale_l0: packed, flat, float32, by which sums over int8 weights are multiplied; else
            ``None``.

    Raises:
        TypeError: ``layer`` is no LSTM layer; in a call, what :class:`LSTM` raises.
        ValueError: it has parameters of another dtype or device, parametrized ones, projections or
            hooks; or ``weight_dtype`` is none of the three; in a call, what :class:`LSTM` raises.
        RuntimeError: in a call, shapes or dtypes do not fit; also where a gradient is asked for.

    Example::

        >>> packed = PackedLSTM(nn.LSTM(10, 20, num_layers=2, bidirectional=True))
        >>> output, (h, c) = packed(torch.randn(6, 3, 10))
    """

    def __init__(self, layer: nn.LSTM, weight_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not isinstance(layer, nn.LSTM):
            raise TypeError(f"expected an nn.LSTM or lstmfused.LSTM, got {type(layer).__name__}")
        if layer.proj_size:
            raise ValueError("a layer with projections, which proj_size asks for, is not packed")
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.bidirectional = layer.num_layers, layer.bidirectional
        self.batch_first = layer.batch_first
        suffixes = self._suffixes()
        weights = [f"weight_{name}{suffix}" for suffix in suffixes for name in ("ih", "hh")]
        check_packable(layer, "layer", weights)
        for suffix in suffixes:
            self._register(packed(layer, suffix, weight_dtype), suffix)

    @scripted_as(_scripted_layer)
    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        reset: Any = None,
        lengths: Any = None,
    ) -> Any:
        b: dict[str, Any] = self._buffers
        names = [name + s for s in self._suffixes() for name in ("weight", "bias", "scale")]
        return packed_lstm(
            input,
            hx,
            [b[name] for name in names if b[name] is not None],
            (self.input_size, self.hidden_size, self.format),
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            reset=reset,
            lengths=lengths,
        )

    def initial_state(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """A state ``(h, c)`` of zeros, as :meth:`LSTM.initial_state` has it."""
        states = self.num_layers * (1 + self.bidirectional)
        rows = (states,) if batch_size is None else (states, batch_size)
        zeros: Any = self._buffers["bias_l0"]
        zeros = zeros.new_zeros
        return zeros(*rows, self.hidden_size), zeros(*rows, self.hidden_size)

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{d}" for layer in range(self.num_layers) for d in directions]

    def extra_repr(self) -> str:
        said = [f"{self.input_size}, {self.hidden_size}"]
        for name, usual in (("num_layers", 1), ("batch_first", False), ("bidirectional", False)):
            if getattr(self, name) != usual:
                said.append(f"{name}={getattr(self, name)}")
        weight: Any = self._buffers["weight_l0"]
        return ", ".join([*said, f"weight_dtype={weight.dtype}"])


M = TypeVar("M", bound=nn.Module)
KINDS: dict[type[nn.Module], Any] = {nn.LSTMCell: PackedLSTMCell, nn.LSTM: PackedLSTM}


def pack(model: M, weight_dtype: torch.dtype = torch.float32) -> Any:
    """A copy of ``model`` for inference on CPU, in which every LSTM cell and layer is packed.

    Every :class:`torch.nn.LSTMCell` and :class:`LSTMCell` becomes a :class:`PackedLSTMCell`, every
    :class:`torch.nn.LSTM` and :class:`LSTM` a :class:`PackedLSTM`, one that is used in several
    places one that is shared by them; everything else is deep-copied, and all is in evaluation
    mode. ``model`` itself is not changed. Subclasses, which may compute something else, and layers
    with projections are left as they are: a warning tells.

    Args:
        model: any module, also a cell or a layer itself.
        weight_dtype: of the packed weights: float32, bfloat16 or int8, whose errors
            :class:`PackedLSTMCell` tells.

    Returns:
        The copy, of the type of ``model``, or what a cell or a layer becomes.

    Raises:
        ValueError: as :class:`PackedLSTMCell` and :class:`PackedLSTM` do, for any of the cells and
            layers.
    """
    made: dict[int, Any] = {}
    left = []
    for name, module in model.named_modules():
        kind = next((KINDS[plain] for plain in KINDS if isinstance(module, plain)), None)
        if kind is None:
            continue
        if not _is_plain(module):
            left.append(f"{name or 'the model'} (a subclass, {type(module).__name__})")
        elif isinstance(module, nn.LSTM) and module.proj_size:
            left.append(f"{name or 'the model'} (it has projections)")
        else:
            try:
                made[id(module)] = kind(module, weight_dtype)
            except ValueError as error:
                raise ValueError(f"{name or 'model'}: {error}") from None
    if left:
        warnings.warn(f"left as it is: {', '.join(left)}", stacklevel=2)
    return copy.deepcopy(model, made).eval()


def _is_plain(module: nn.Module) -> bool:
    """Whether ``module``, an LSTM cell or layer, be it parametrized or not yet initialized, is no
    subclass that may do something else."""
    kind = type(module)
    if is_parametrized(module):
        kind = kind.__bases__[0]  # which the parametrization has subclassed
    return kind in (nn.LSTMCell, LSTMCell, LazyLSTMCell, nn.LSTM, LSTM)
