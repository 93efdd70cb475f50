from typing import Any

from torch import Tensor, dtype

compiler: str
packed_format: int
packed_units: int
packed_multiple: int
cuda_architectures: str  # as TORCH_CUDA_ARCH_LIST has them; empty where built without CUDA

# Only where built with CUDA.
def set_cuda_path(name: str) -> None: ...
def cuda_path(dtype: dtype, B: int, I: int, H: int, tf32: bool) -> str: ...
def cuda_paths_on(
    capability: int,
    multiprocessors: int,
    shared_memory: int,
    dtype: dtype,
    B: int,
    I: int,
    H: int,
    tf32: bool,
) -> tuple[str, str]: ...
def cpu_kernel() -> str: ...
def batch_invariant() -> bool: ...
def set_batch_invariant(on: bool) -> None: ...
def lstm_cell(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def lstm_cell_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
) -> tuple[Tensor, Tensor]: ...
def check_lstm_cell_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
) -> None: ...
def check_lstm_cell(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> None: ...
def has_kernel(input: dtype, cx: dtype) -> bool: ...
def lstm_cell_composed(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def lstm_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def check_lstm_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mask: Tensor | None,
) -> None: ...
def lstm_layer_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...
def lstm_layers(
    input: Any,
    hx: Any,
    params: Any,
    packed: tuple[int, int, int] | None,
    reset: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def check_lstm_layer_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
) -> None: ...
