"""Who is measured. A new peer is one class here, if it needs one, and a place in PEERS."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import cpp_extension

import lstmfused

from .cases import EAGER, INFERENCE, LAYER, RESETS, STEP, STEPPED, Case
from .problem import Bound, Pair, Problem, over_time


class Peer:
    """Computes a step; `bind` gives it the tensors of a problem."""

    computes = True  # and is therefore verified

    def __init__(
        self,
        name: str,
        cell: type[nn.LSTMCell] = nn.LSTMCell,
        layer: type[nn.LSTM] | None = None,
    ) -> None:
        self.name, self.cell, self.layer = name, cell, layer

    def missing(self) -> str | None:
        """Why it cannot run on this machine."""
        return None

    def supports(self, case: Case) -> bool:
        if case.sequence == LAYER:
            return self.layer is not None
        return not case.sequence or self.layer is lstmfused.LSTM  # torch's layer knows no resets

    def context(self) -> AbstractContextManager[None]:
        """What its calls run in; entered once for many."""
        return nullcontext()

    def close(self) -> None:
        """Ends what it has begun."""

    def bind(self, problem: Problem) -> Bound:
        return bound(self.module(problem), problem)

    def module(self, problem: Problem) -> nn.Module:
        """The cell with the problem's own parameters, so that gradients land there."""
        state = problem.leaves["hx"]
        whole = self.layer if problem.case.sequence else None
        kind: type[nn.Module] = whole or self.cell
        module = kind(*problem.case.shape[:2], dtype=state.dtype, device=state.device)
        for name, parameter in problem.parameters.items():
            setattr(module, name + ("_l0" if whole else ""), parameter)
        if whole:
            return Layer(module, problem)
        return Loop(module, problem) if problem.state[0].dim() == 3 else module


class Loop(nn.Module):
    """The cell over a sequence (T,B,I)."""

    def __init__(self, cell: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.cell = cell
        self.sequence = problem.reset, bool(problem.case.sequence)

    def forward(self, input: Tensor, hx: Pair) -> Pair:
        return over_time(lambda x, h, c: self.cell(x, (h, c)), *self.sequence)(input, *hx)


class Layer(nn.Module):
    """One layer over a sequence (T,B,I): h of every step, and the last c."""

    def __init__(self, layer: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.layer = layer
        self.given = {} if problem.reset is None else {"reset": problem.reset}

    def forward(self, input: Tensor, hx: Pair) -> Pair:
        output, (_, c) = self.layer(input, (hx[0][None], hx[1][None]), **self.given)
        return output, c[0]


def bound(module: Callable[..., Pair], problem: Problem) -> Bound:
    input, h, c = problem.state
    hx = h, c
    return Bound(problem, lambda x, h, c: module(x, (h, c)), lambda: module(input, hx))


# --------------------------------------------------------------------------------------------------
# Of our own


class Stepped(Peer):
    """A cell in a Python loop, where others run a layer."""

    def supports(self, case: Case) -> bool:
        return bool(case.sequence) and case.steps > 1


class InFloat32(Peer):
    """What bfloat16 is to be faster than: the same numbers in float32."""

    def supports(self, case: Case) -> bool:
        return case.mode == INFERENCE and case.dtype == "bfloat16"

    def bind(self, problem: Problem) -> Bound:
        return super().bind(problem.widened("float32"))


class BatchInvariant(Peer):
    def supports(self, case: Case) -> bool:
        return case.mode == INFERENCE and case.dtype == "float32"

    def context(self) -> AbstractContextManager[None]:
        return lstmfused.batch_invariant()


class Packed(Peer):
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, lstmfused.LSTMCell, lstmfused.LSTM)
        self.dtype = dtype

    def supports(self, case: Case) -> bool:
        few = bool(case.sequence) or case.batch <= 64
        return case.mode == INFERENCE and case.dtype == "float32" and few

    def bind(self, problem: Problem) -> Bound:
        packed = lstmfused.pack(self.module(problem), weight_dtype=self.dtype)
        return bound(packed, self.rounded(problem))

    def rounded(self, problem: Problem) -> Problem:
        """With the weights that the packed cell computes with."""
        weights = {k: problem.leaves[k].detach() for k in ("weight_ih", "weight_hh")}
        if self.dtype == torch.int8:
            scale = torch.cat(list(weights.values()), 1).abs().amax(1, keepdim=True) / 127
            values = {k: (w / scale).round() * scale for k, w in weights.items()}
        else:
            values = {k: w.to(self.dtype).float() for k, w in weights.items()}
        return problem.replaced({k: Parameter(value) for k, value in values.items()})


# --------------------------------------------------------------------------------------------------
# Others


class Compiled(Peer):
    """torch.compile of a cell, compiled anew for every case, as dynamic=False promises.

    Each costs seconds, so unless it is asked for, it runs at each shape's own batch only.
    """

    everywhere = False

    def __init__(self, name: str, cell: type[nn.LSTMCell], mode: str = "default") -> None:
        super().__init__(name, cell)
        self.computes, self.mode = cell is not NothingCell, mode

    def missing(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"no C++ compiler {compiler}"

    def supports(self, case: Case) -> bool:
        if case.launch != EAGER and self.mode == "reduce-overhead":  # it makes graphs of its own
            return False
        chosen = self.everywhere or case.batch == case.shape.batch or case.device == "cuda"
        return case.mode in STEP and chosen  # its graphs have no second derivative

    def bind(self, problem: Problem) -> Bound:
        options: Any = {"fullgraph": True, "dynamic": False, "mode": self.mode}
        return bound(torch.compile(self.module(problem), **options), problem)


class Nothing(torch.autograd.Function):
    """Looks at every argument, and leaves their gradients as the memory was."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Pair:
        ctx.save_for_backward(*tensors)
        touched = reduce(torch.add, [t.view(-1)[0] for t in tensors])
        return tensors[1] + touched, tensors[2] + touched

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class NothingCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        outputs: Pair = Nothing.apply(input, *(hx or ()), *self._parameters.values())  # type: ignore[no-untyped-call]
        return outputs


class OnnxRuntime(Peer):
    """ONNX Runtime's LSTM node, its weights constant and therefore prepacked."""

    def missing(self) -> str | None:
        absent = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def supports(self, case: Case) -> bool:
        if case.sequence == RESETS:
            return False
        return case.mode == INFERENCE and case.dtype == "float32" and case.device == "cpu"

    def bind(self, problem: Problem) -> Bound:
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = problem.case.threads
        # Its pool would otherwise spin between calls and take the cores from whoever runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Bound once and written in place: the cheapest way to call it.
        x, h, c = (leaf.detach() for leaf in problem.state)
        outputs = torch.empty_like(problem.grad_outputs[0]), torch.empty_like(c)
        feeds = {"X": x.view(problem.case.steps, len(h), -1), "h0": h[None], "c0": c[None]}
        every = bool(problem.case.sequence)  # (T,1,B,H)
        first = {"Y": outputs[0][:, None]} if every else {"h1": outputs[0][None]}
        fetches = first | {"c1": outputs[1][None]}
        model, providers = self.model(problem, feeds, fetches), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model, options, providers=providers)
        binding = session.io_binding()
        for tensors, bind in (feeds, binding.bind_input), (fetches, binding.bind_output):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
        run = session.run_with_iobinding

        def call() -> Pair:
            run(binding)
            return outputs

        return Bound(problem, lambda *_: call(), call)

    def model(self, problem: Problem, *named: dict[str, Tensor]) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        def iofc(*names: str) -> Any:  # (1,4H,...): ONNX's order of torch's i, f, g, o
            gates = (problem.leaves[name].detach().chunk(4) for name in names)
            return torch.cat([torch.cat((i, o, f, g)) for i, f, g, o in gates])[None].numpy()

        weights = iofc("weight_ih"), iofc("weight_hh"), iofc("bias_ih", "bias_hh")
        constants = [numpy_helper.from_array(w, n) for n, w in zip("WRB", weights, strict=True)]
        inputs, outputs = (
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, t.shape) for n, t in of.items()]
            for of in named
        )
        arguments = ["X", "W", "R", "B", "", "h0", "c0"]
        results = ["Y", "", "c1"] if problem.case.sequence else ["", "h1", "c1"]
        units = problem.case.shape.units
        node = helper.make_node("LSTM", arguments, results, hidden_size=units)
        graph = helper.make_graph([node], "cell", inputs, outputs, constants)
        opset = helper.make_opsetid("", 14)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return bytes(model.SerializeToString())


class CuDnn(Peer):
    """nn.LSTM over one step, its weights in the one piece of memory that cuDNN wants."""

    def supports(self, case: Case) -> bool:
        return case.mode in STEP and case.steps == 1

    def bind(self, problem: Problem) -> Bound:
        state = problem.leaves["hx"]
        lstm = nn.LSTM(*problem.case.shape[:2], dtype=state.dtype, device=state.device)
        own: dict[str, Tensor] = {k: getattr(lstm, f"{k}_l0") for k in problem.parameters}
        with torch.no_grad():
            for name, parameter in problem.parameters.items():
                own[name].copy_(parameter)
        twin = problem.replaced(own)
        x, h, c = (t.detach()[None] for t in twin.state)
        inside = lstm.__dict__  # past nn.Module's costly way to set an attribute

        def step(x: Tensor, h: Tensor, c: Tensor) -> Pair:
            inside["training"] = torch.is_grad_enabled()  # else it keeps what backward would need
            _, (h, c) = lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
            return h.squeeze(0), c.squeeze(0)

        def call() -> Pair:
            if torch.is_grad_enabled():
                return step(*twin.state)
            inside["training"] = False
            outputs: Pair = lstm(x, (h, c))[1]
            return outputs

        return Bound(twin, step, call)


# --------------------------------------------------------------------------------------------------
# What a call costs at least


class Multiply(torch.autograd.Function):
    """The matrix products of a layer and of its backward, and nothing else."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Pair:
        x, h, c, w_ih, w_hh = tensors[:5]
        ctx.save_for_backward(*tensors)
        torch.mm(x.flatten(0, 1), w_ih.t())
        sums = torch.empty_like(h).repeat(1, 4)
        for _ in range(len(x)):
            torch.mm(h, w_hh.t(), out=sums)
        return h.expand(len(x), -1, -1), c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, _, c, w_ih, w_hh, *biases = ctx.saved_tensors
        gates = grads[0].repeat(1, 1, 4)
        for gate in gates:
            grad_h = torch.mm(gate, w_hh)
        rows, states, gates = x.flatten(0, 1), grads[0].flatten(0, 1), gates.flatten(0, 1)
        grad_x = torch.mm(gates, w_ih).view_as(x)
        grad_weights = torch.mm(gates.t(), rows), torch.mm(gates.t(), states)
        return grad_x, grad_h, c, *grad_weights, *biases


class MultiplyLayer(nn.LSTM):
    def forward(self, input: Any, hx: Pair | None = None) -> Any:
        h, c = (state.squeeze(0) for state in hx or ())
        output, c = Multiply.apply(input, h, c, *self._parameters.values())  # type: ignore[no-untyped-call]
        return output, (output, c.unsqueeze(0))


class Products(Peer):
    """What torch's own matrix products allow a layer."""

    computes = False

    def supports(self, case: Case) -> bool:
        return case.sequence == LAYER and case.mode in STEP


class AllocateCell(lstmfused.LSTMCell):
    operator: Any

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        p: dict[str, Any] = self._parameters
        h, c = hx or (None, None)
        weights = p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        output: Pair = self.operator(input, h, c, *weights)
        return output


class Allocate(Peer):
    """An operator in a module, as the cell is one, that allocates h' and c', and in backward the
    gradients, and computes nothing."""

    computes = False

    def missing(self) -> str | None:
        if not hasattr(AllocateCell, "operator"):
            os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja's
            source = Path(__file__).with_name("allocate.cpp")
            folder = source.parents[1] / "build" / "allocate"
            folder.mkdir(parents=True, exist_ok=True)
            built: Any = {"extra_cflags": ["-O2"], "build_directory": str(folder)}
            try:
                extension: Any = cpp_extension.load("allocate", [str(source)], **built)
            except (OSError, RuntimeError) as error:
                return f"{source.name} does not compile ({str(error).splitlines()[0]})"
            AllocateCell.operator = staticmethod(extension.lstm_cell)
        return None

    def supports(self, case: Case) -> bool:
        small = case.shape.units <= 64 and case.batch <= 8 and case.steps == 1
        return small and case.mode in STEP and case.dtype in ("float32", "float64")


class EmptyCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        return None  # type: ignore[return-value]


class Empty(Peer):
    """What any module costs to call, beside the least of cells."""

    computes = False

    def supports(self, case: Case) -> bool:
        return case.mode == INFERENCE and (*case.shape[:2], case.batch) == (16, 16, 1)


FIELD = (
    Peer("lstmfused", lstmfused.LSTMCell, lstmfused.LSTM),
    Stepped(STEPPED, lstmfused.LSTMCell),
    InFloat32("lstmfused float32", lstmfused.LSTMCell),
    BatchInvariant("lstmfused batch-invariant", lstmfused.LSTMCell),
    Packed("lstmfused packed", torch.float32),
    Packed("lstmfused packed bfloat16", torch.bfloat16),
    Packed("lstmfused packed int8", torch.int8),
    Compiled("lstmfused compiled", lstmfused.LSTMCell),
    Compiled("a compiled module that computes nothing", NothingCell),
    Peer("torch", layer=nn.LSTM),
    Stepped("torch stepped"),
    Compiled("compile", nn.LSTMCell),
    Compiled("reduce-overhead", nn.LSTMCell, "reduce-overhead"),
    OnnxRuntime("onnxruntime"),
    CuDnn("cudnn"),
    Allocate("allocate", AllocateCell),
    Products("products alone", layer=MultiplyLayer),
    Empty("empty nn.Module", EmptyCell),
)
PEERS = {peer.name: peer for peer in FIELD}


def present(names: Iterable[str], everywhere: bool = False) -> list[Peer]:
    """Those of `names` that this machine can run; says which it leaves out, and why."""
    Compiled.everywhere = everywhere
    chosen = []
    for peer in (PEERS[name] for name in names):
        if reason := peer.missing():
            print(f"{reason}: {peer.name} left out", file=sys.stderr)
        else:
            chosen.append(peer)
    return chosen
