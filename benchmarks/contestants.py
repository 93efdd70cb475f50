"""Who is measured. A new contestant is one class here and its name in CONTESTANTS."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

import lstmfused

from .shapes import MODES, Case
from .verify import Forward, Problem


class Contestant:
    """Computes one step; `forward` binds it to the tensors of a problem."""

    name: str
    computes = True  # and is therefore verified

    def missing(self) -> str | None:
        """Why it cannot run on this machine."""
        return None

    def supports(self, case: Case) -> bool:
        return True

    def forward(self, problem: Problem) -> Forward:
        raise NotImplementedError

    def context(self) -> AbstractContextManager[None]:
        """What its calls run in; entered once for many."""
        return nullcontext()


def bind(cell: type[torch.nn.LSTMCell], problem: Problem) -> torch.nn.Module:
    """A module that holds the problem's own parameters, so that gradients land there."""
    module: torch.nn.Module = cell(*problem.case.shape[:2], dtype=problem.input.dtype)
    for name, parameter in problem.parameters.items():
        setattr(module, name, parameter)
    return module


def call(module: Callable[..., tuple[Tensor, Tensor]], problem: Problem) -> Forward:
    input, hx = problem.input, (problem.hx, problem.cx)
    return lambda: module(input, hx)


class Fused(Contestant):
    name = "lstmfused"

    def forward(self, problem: Problem) -> Forward:
        return call(bind(lstmfused.LSTMCell, problem), problem)


class FusedFloat32(Contestant):
    """What bfloat16 is to be faster than: the same numbers in float32."""

    name = "lstmfused float32"

    def supports(self, case: Case) -> bool:
        return case.mode == "inference" and case.dtype == "bfloat16"

    def forward(self, problem: Problem) -> Forward:
        cell = lstmfused.LSTMCell(*problem.case.shape[:2])
        cell.load_state_dict(problem.parameters)  # widened
        input, hx, cx = (leaf.detach().float() for leaf in (problem.input, problem.hx, problem.cx))
        return lambda: cell(input, (hx, cx))


class Frozen(Contestant):
    name = "lstmfused frozen"

    def supports(self, case: Case) -> bool:
        return case.mode == "inference" and case.dtype == "float32" and 2 <= case.batch <= 64

    def forward(self, problem: Problem) -> Forward:
        return call(lstmfused.freeze(bind(lstmfused.LSTMCell, problem)), problem)


class BatchInvariant(Fused):
    name = "lstmfused batch invariant"

    def supports(self, case: Case) -> bool:
        return case.mode == "inference" and case.dtype == "float32"

    def context(self) -> AbstractContextManager[None]:
        return lstmfused.batch_invariant()


class AllocateCell(lstmfused.LSTMCell):
    step: Any

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        p: dict[str, Any] = self._parameters
        h, c = hx or (None, None)
        weights = p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        output: tuple[Tensor, Tensor] = self.step(input, h, c, *weights)
        return output


class Allocate(Contestant):
    """An operator in a module, as the cell is one, that allocates h' and c', and in backward the
    gradients, and computes nothing: what a step costs at least."""

    name = "allocate"
    computes = False

    def missing(self) -> str | None:
        if not hasattr(AllocateCell, "step"):
            os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja's
            source = Path(__file__).with_name("allocate.cpp")
            folder = source.parents[1] / "build" / "allocate"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                extension: Any = cpp_extension.load(
                    "allocate", [str(source)], extra_cflags=["-O2"], build_directory=str(folder)
                )
            except (OSError, RuntimeError) as error:
                return f"benchmarks/allocate.cpp does not compile ({str(error).splitlines()[0]})"
            AllocateCell.step = staticmethod(extension.lstm_cell)
        return None

    def supports(self, case: Case) -> bool:
        small = case.shape.units <= 64 and case.batch <= 8
        return small and case.mode in MODES and case.dtype in ("float32", "float64")

    def forward(self, problem: Problem) -> Forward:
        return call(bind(AllocateCell, problem), problem)


class Torch(Contestant):
    name = "torch"

    def forward(self, problem: Problem) -> Forward:
        return call(bind(torch.nn.LSTMCell, problem), problem)


class Compile(Contestant):
    """torch.compile(nn.LSTMCell), compiled anew for every case, as dynamic=False promises.

    Each costs seconds, so the default run has it at each shape's own batch only.
    """

    name = "compile"

    def __init__(self, everywhere: bool = False) -> None:
        self.everywhere = everywhere

    def missing(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"no C++ compiler {compiler}"

    def supports(self, case: Case) -> bool:
        own = self.everywhere or case.batch == case.shape.batch
        return own and case.mode in MODES  # its graphs have no second derivative

    def forward(self, problem: Problem) -> Forward:
        torch.compiler.reset()  # past its recompile limit it would give up
        module = bind(torch.nn.LSTMCell, problem)
        return call(torch.compile(module, fullgraph=True, dynamic=False), problem)


class OnnxRuntime(Contestant):
    """ONNX Runtime's LSTM node over one step, its weights constant and therefore prepacked."""

    name = "onnxruntime"

    def missing(self) -> str | None:
        absent = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def supports(self, case: Case) -> bool:
        return case.mode == "inference" and case.dtype == "float32"

    def forward(self, problem: Problem) -> Forward:
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = problem.case.threads
        # Its pool would otherwise spin between calls and take the cores from whoever runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model, providers = self.model(problem), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model, options, providers=providers)

        # Bound once and written in place: the cheapest way to call it.
        feeds = {"X": problem.input, "h0": problem.hx, "c0": problem.cx}
        fetches = {name: torch.empty_like(problem.hx) for name in ("h1", "c1")}
        binding = session.io_binding()
        for tensors, bind in (feeds, binding.bind_input), (fetches, binding.bind_output):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, "float32", (1, *tensor.shape), tensor.data_ptr())
        run, outputs = session.run_with_iobinding, (fetches["h1"], fetches["c1"])

        def forward() -> tuple[Tensor, Tensor]:
            run(binding)
            return outputs

        return forward

    def model(self, problem: Problem) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        inputs, units = problem.case.shape[:2]
        weights = {name: p.detach() for name, p in problem.parameters.items()}

        def iofc(weight: Tensor) -> Tensor:  # ONNX's order of torch's i, f, g, o
            i, f, g, o = weight.chunk(4)
            return torch.cat((i, o, f, g))

        constants = {
            "W": iofc(weights["weight_ih"]),  # (1,4H,I)
            "R": iofc(weights["weight_hh"]),  # (1,4H,H)
            "B": torch.cat((iofc(weights["bias_ih"]), iofc(weights["bias_hh"]))),  # (1,8H)
        }

        def value(name: str, width: int):  # type: ignore[no-untyped-def]
            shape = (1, problem.case.batch, width)
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        names = ["X", "W", "R", "B", "", "h0", "c0"]
        node = helper.make_node("LSTM", names, ["", "h1", "c1"], hidden_size=units)
        graph = helper.make_graph(
            [node],
            "cell",
            [value("X", inputs), value("h0", units), value("c0", units)],
            [value("h1", units), value("c1", units)],
            [numpy_helper.from_array(w[None].numpy(), name) for name, w in constants.items()],
        )
        opset = helper.make_opsetid("", 14)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return bytes(model.SerializeToString())


CONTESTANTS = ("lstmfused", "torch", "compile", "onnxruntime")  # of the default run
# Of the full run; torch.compile's compilations would take most of it.
FULL_CONTESTANTS = (
    "lstmfused",
    "torch",
    "onnxruntime",
    "lstmfused float32",
    "lstmfused frozen",
    "lstmfused batch invariant",
    "allocate",
)


def contestants(names: tuple[str, ...], compile_everywhere: bool = False) -> list[Contestant]:
    """Those of `names` that this machine can run; says which it leaves out, and why."""
    own = (Fused(), FusedFloat32(), Frozen(), BatchInvariant())
    known = (*own, Torch(), Compile(compile_everywhere), OnnxRuntime(), Allocate())
    chosen: list[Contestant] = []
    for contestant in known:
        if contestant.name not in names:
            continue
        if reason := contestant.missing():
            print(f"{reason}: {contestant.name} left out")
        else:
            chosen.append(contestant)
    return chosen
