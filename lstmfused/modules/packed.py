"""The cell for inference alone, from weights that are packed once."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad
from torch.nn.utils.parametrize import is_parametrized

from .._integrations.script import scripted_as
from .._ops import _C
from ..functional.cell import pair
from .cell import LazyLSTMCell, LSTMCell

__all__ = ["PackedLSTMCell", "pack"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
UNITS, MULTIPLE, FORMAT = _C.packed_units, _C.packed_multiple, _C.packed_format


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


class PackedLSTMCell(nn.Module):
    r"""An LSTM cell for inference on CPU, with weights packed for its kernel when it is made.

    It computes what the cell it was made from computes now: later changes of that cell do not
    reach it. It cannot be trained. Weights are packed alike for every instruction set, so what is
    saved on one machine can be loaded on another.

    Everything but the weights is float32, the sums too. With ``weight_dtype=torch.bfloat16`` each
    weight is rounded to nearest, off by :math:`2^{-9}` of itself at most. With ``torch.int8`` it is
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
        weight, bias = _rows(cell)
        if weight_dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"expected weight_dtype to be one of {WEIGHT_DTYPES}, got {weight_dtype}"
            )
        scale = None
        if weight_dtype == torch.int8:
            largest = pad(weight.abs(), (1, 0)).amax(1, keepdim=True)  # also where I + H is 0
            if not largest.isfinite().all():
                raise ValueError("weights that are not finite cannot be packed to int8")
            scale = largest / 127
            weight = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
        self.input_size, self.hidden_size = cell.input_size, cell.hidden_size
        self.format = FORMAT
        self.register_buffer("weight", _packed(weight.to(weight_dtype)))
        self.register_buffer("bias", _packed(bias))
        self.register_buffer("scale", None if scale is None else _packed(scale))
        self.training = False

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

    def get_extra_state(self) -> Tensor:
        """The format of the packed weights, which is saved with them."""
        return torch.tensor(self.format)

    def set_extra_state(self, state: Tensor) -> None:
        if int(state) != FORMAT:
            raise ValueError(
                f"expected weights packed in format {FORMAT}, got format {int(state)}: pack the "
                "model they were made from again"
            )

    def train(self, mode: bool = True) -> PackedLSTMCell:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, weight_dtype={self.weight.dtype}"


M = TypeVar("M", bound=nn.Module)


def pack(model: M, weight_dtype: torch.dtype = torch.float32) -> Any:
    """A copy of ``model`` for inference on CPU, in which every LSTM cell is packed.

    Every :class:`torch.nn.LSTMCell` and :class:`LSTMCell` becomes a :class:`PackedLSTMCell`, one
    that is used in several places one that is shared by them; everything else is deep-copied, and
    all is in evaluation mode. ``model`` itself is not changed. Subclasses, which may compute
    something else, are left as they are: a warning tells.

    Args:
        model: any module, also a cell itself.
        weight_dtype: of the cells' weights: float32, bfloat16 or int8, whose errors
            :class:`PackedLSTMCell` tells.

    Returns:
        The copy, of the type of ``model``, or a :class:`PackedLSTMCell` for a cell.

    Raises:
        ValueError: as :class:`PackedLSTMCell` does, for any of the cells.
    """
    packed: dict[int, Any] = {}
    left = []
    for name, module in model.named_modules():
        if not _is_cell(module):
            if isinstance(module, nn.LSTMCell):
                left.append(f"{name or 'the model'} (a subclass, {type(module).__name__})")
            continue
        try:
            packed[id(module)] = PackedLSTMCell(module, weight_dtype)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}") from None
    if left:
        warnings.warn(f"left as it is: {', '.join(left)}", stacklevel=2)
    return copy.deepcopy(model, packed).eval()


def _is_cell(module: nn.Module) -> bool:
    """Whether ``module`` is an LSTM cell, be it parametrized or not yet initialized, and no
    subclass that may do something else."""
    kind = type(module)
    if is_parametrized(module):
        kind = kind.__bases__[0]  # which the parametrization has subclassed
    return kind in (nn.LSTMCell, LSTMCell, LazyLSTMCell)


def _rows(cell: nn.LSTMCell) -> tuple[Tensor, Tensor]:
    """``[weight_ih | weight_hh]`` (4H, I + H) and the sum of both biases (4H, 1)."""
    if not isinstance(cell, nn.LSTMCell):
        raise TypeError(f"expected an nn.LSTMCell or lstmfused.LSTMCell, got {type(cell).__name__}")
    given = [cell._parameters.get(name) for name in ("weight_ih", "weight_hh")]
    if not all(type(p) is nn.Parameter for p in given):
        raise ValueError(
            "expected a cell whose weights are plain parameters, but they are computed from others "
            "or uninitialized: first remove the parametrization, or call the lazy cell"
        )
    if cell._forward_hooks or cell._forward_pre_hooks:
        raise ValueError("the cell has forward hooks, which a packed cell would not run")
    if "forward" in vars(cell):
        raise ValueError(
            "the cell's forward has been replaced on the instance: a packed cell would not run it"
        )
    for name, p in cell.named_parameters(recurse=False):
        if p.dtype != torch.float32 or p.device.type != "cpu":
            raise ValueError(
                f"expected a cell of torch.float32 on cpu, but {name} is {p.dtype} on {p.device}"
            )
    with torch.no_grad():
        weight = torch.cat([cell.weight_ih, cell.weight_hh], 1)
        bias = cell.bias_ih + cell.bias_hh if cell.bias else weight.new_zeros(len(weight))
    return weight, bias.unsqueeze(1)


def _packed(rows: Tensor) -> Tensor:
    """(4H, K), gate by gate -> flat: for each block of units (K, 4, units), the last one filled up
    with zeros."""
    units, depth = rows.shape[0] // 4, rows.shape[1]
    gates = pad(rows.view(4, units, depth), (0, 0, 0, -units % MULTIPLE))
    return torch.cat([block.permute(2, 0, 1).flatten() for block in gates.split(UNITS, 1)])


def unpacked(packed: Tensor, units: int) -> Tensor:
    """The way back from :func:`_packed`: flat -> (4H, K)."""
    filled = units + -units % MULTIPLE
    depth = len(packed) // (4 * filled) if filled else 0
    whole, rest = divmod(filled, UNITS)
    blocks, last = packed.split([4 * depth * UNITS * whole, 4 * depth * rest])
    gates = torch.cat(
        [
            blocks.view(whole, depth, 4, UNITS).permute(2, 0, 3, 1).reshape(4, -1, depth),
            last.view(depth, 4, rest).permute(1, 2, 0),
        ],
        1,
    )
    return gates[:, :units].reshape(4 * units, depth)
