"""Packages that use LSTM cells or layers, or work on models that do: each runs the same model with
torch's and with ours, and the numbers agree. `make clients` installs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstmfused

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours

B, I, H, STEPS = 6, 5, 7, 4


class Tagger(nn.Module):
    """(batch, time, I) to (batch, 2)"""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        scores: Tensor = self.head(h)
        return scores


def pair(make: Callable[[], nn.Module] = Tagger) -> tuple[Any, Any]:
    """A model of torch's cells, and a fused one of the same weights, both in float64."""
    torch.manual_seed(0)
    plain = make().double()
    fused = lstmfused.fuse_(copy.deepcopy(plain))
    assert any(isinstance(m, lstmfused.LSTMCell) for m in fused.modules())
    return plain, fused


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, STEPS, I, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 2, (B,), generator=generator)


def agree(one: Any, other: Any) -> None:
    flat = torch.utils._pytree.tree_leaves
    tensors = [t for t in flat(one) if isinstance(t, Tensor)]
    assert tensors
    for want, found in zip(tensors, [t for t in flat(other) if isinstance(t, Tensor)], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def same(make: Callable[[], nn.Module], use: Callable[[Any], Any]) -> None:
    """`use` gives what is compared; gradients that it leaves in the parameters are, too."""
    models = pair(make)
    results = []
    for model in models:
        torch.manual_seed(2)
        found = use(model)
        results.append((found, [p.grad for p in model.parameters()]))
    agree(*results)


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def test_stanza() -> None:
    seq2seq = pytest.importorskip("stanza.models.common.seq2seq_modules")
    packed = pytest.importorskip("stanza.models.common.packed_lstm")
    x, _ = data()
    state = torch.zeros(B, H, dtype=torch.float64), torch.ones(B, H, dtype=torch.float64)
    context = torch.randn(B, 3, H, dtype=torch.float64)

    def decode(model: Any) -> Any:
        output, hidden = model(x, state, context)
        output.square().sum().backward()
        return output, hidden

    same(lambda: seq2seq.LSTMAttention(I, H), decode)

    lengths = [4, 4, 3, 2, 1, 1]

    def encode(model: Any) -> Any:
        output, hidden = model(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        padded.square().sum().backward()
        return padded, hidden

    same(lambda: packed.LSTMwRecDropout(I, H, 1, batch_first=True, bidirectional=True), encode)


def test_snntorch() -> None:
    snntorch = pytest.importorskip("snntorch")

    def spike(model: Any) -> Any:
        syn, mem = torch.zeros(2, B, I, dtype=torch.float64)
        spikes = []
        for t in range(STEPS):
            spk, syn, mem = model(data()[0][:, t], syn, mem)
            spikes.append(spk)
        (mem.square().sum() + syn.sum() + torch.stack(spikes).sum()).backward()
        return spikes, syn, mem

    same(lambda: snntorch.SLSTM(I, I, threshold=0.1), spike)  # as wide: it would begin anew


def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    x, y = data()

    def fit(model: nn.Module) -> Any:
        net = skorch.NeuralNetClassifier(
            model,
            criterion=nn.CrossEntropyLoss,
            max_epochs=5,
            lr=0.1,
            train_split=None,
            verbose=0,
        )
        net.fit(x, y)
        return torch.from_numpy(net.predict_proba(x)), trained(net.module_)

    same(Tagger, fit)


def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")
    x, y = data()

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.05)

    def fit(model: nn.Module) -> Any:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
        )
        trainer.fit(Task(model), loader)
        return trained(model)

    same(Tagger, fit)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    x, y = data()

    def fit(model: nn.Module) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        return trained(model)

    same(Tagger, fit)

    def offload(model: nn.Module) -> Any:
        """Weights come from elsewhere for the call, by a forward that is put on each instance."""
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            found = model(x)
        with pytest.raises(ValueError, match="forward has been replaced"):
            lstmfused.pack(model)
        return found

    plain, fused = pair()
    agree(offload(plain), offload(fused))


def test_tensordict() -> None:
    tensordict = pytest.importorskip("tensordict")
    x, _ = data()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(I, H)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            h, c = self.cell(x, (h, c))
            return h, c

    def step(model: nn.Module) -> Any:
        module = tensordict.nn.TensorDictModule(model, in_keys=["x", "h", "c"], out_keys=["h", "c"])
        zeros = torch.zeros(B, H, dtype=torch.float64)
        given = tensordict.TensorDict({"x": x[:, 0], "h": zeros, "c": zeros}, batch_size=[B])
        once = module(module(given))
        (once["h"].square().sum() + once["c"].sum()).backward()
        weights = tensordict.from_module(model).detach() * 2
        with weights.to_module(model):
            other = model(x[:, 0], zeros, zeros)
        return once["h"], once["c"], other

    same(Cell, step)


def test_torchrl() -> None:
    """Stepped in a rollout, and over whole sequences within which episodes begin."""
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    x, _ = data()
    is_init = torch.zeros(B, STEPS, 1, dtype=torch.bool)
    is_init[:2, 0] = is_init[1, 2] = is_init[3, 1:3] = True
    # Other rows go on from a state. Where an episode begins, a rollout has stored zeros.
    carried = torch.randn(2, B, STEPS, 2, H, dtype=torch.float64).masked_fill(is_init[..., None], 0)
    states = {"recurrent_state_h": carried[0], "recurrent_state_c": carried[1]}

    def use(lstm: nn.LSTM) -> Any:
        policy = modules.LSTMModule(lstm=lstm, in_key="x", out_key="y")
        given = {"x": x, "is_init": is_init, **states}
        td = tensordict.TensorDict(given, batch_size=[B, STEPS])
        steps = []
        state = {key: value[:, 0] for key, value in states.items()}
        for t in range(STEPS):
            step = policy(td[:, t].update(state))
            state = {key: step["next", key] for key in states}
            steps.append(step["y"])
        with modules.set_recurrent_mode(True):
            whole = policy(td.clone())
        agree(whole["y"], torch.stack(steps, 1))
        whole["y"].square().sum().backward()
        return whole["y"], [whole["next", key] for key in states], state

    found = []
    for kind in (nn.LSTM, lstmfused.LSTM):
        torch.manual_seed(0)
        lstm = kind(I, H, num_layers=2, batch_first=True, dtype=torch.float64)
        found.append((use(lstm), [p.grad for p in lstm.parameters()]))
    agree(*found)


def test_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    x, y = data()

    def attribute(model: nn.Module) -> Any:
        found = [
            attr.IntegratedGradients(model).attribute(x, target=y, n_steps=10),
            attr.Saliency(model).attribute(x.clone(), target=y),
            attr.LayerActivation(model, model.cell).attribute(x[:, :1]),
            attr.FeatureAblation(model).attribute(x, target=y),
        ]
        return found

    same(Tagger, attribute)


@pytest.mark.parametrize("bayesian", [True, False])
def test_pyro(bayesian: bool) -> None:
    """Weights are samples, or parameters that Pyro notices where they are read as attributes."""
    pyro = pytest.importorskip("pyro")
    infer = pytest.importorskip("pyro.infer")
    autoguide = pytest.importorskip("pyro.infer.autoguide")
    x, y = data()

    def fit(model: nn.Module) -> Any:
        pyro.clear_param_store()
        pyro.nn.module.to_pyro_module_(model)
        for module in model.modules() if bayesian else ():
            for name, value in list(module.named_parameters(recurse=False)):
                normal = pyro.distributions.Normal(torch.zeros_like(value), 1.0)
                setattr(module, name, pyro.nn.PyroSample(normal.to_event(value.dim())))

        def joint(x: Tensor, y: Tensor) -> None:
            scores = model(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", pyro.distributions.Categorical(logits=scores), obs=y)

        pyro.set_rng_seed(0)
        guide = autoguide.AutoNormal(joint) if bayesian else lambda *_: None
        svi = infer.SVI(joint, guide, pyro.optim.Adam({"lr": 0.05}), infer.Trace_ELBO())
        losses = torch.tensor([svi.step(x, y) for _ in range(5)], dtype=torch.float64)
        return losses, {k: v.detach() for k, v in pyro.get_param_store().items()}

    plain, fused = pair()
    agree(fit(plain), fit(fused))


def test_higher() -> None:
    """MAML: gradients through the steps of an optimizer."""
    higher = pytest.importorskip("higher")
    x, y = data()

    def adapt(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (inner, steps):
            for _ in range(2):
                steps.step(nn.functional.cross_entropy(inner(x), y))
            loss = nn.functional.cross_entropy(inner(x), 1 - y)
            loss.backward()
        return loss.detach()

    same(Tagger, adapt)


def test_torchdiffeq() -> None:
    """A cell between stretches of an ordinary differential equation."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    x, _ = data()

    class Jumps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.field = nn.LSTMCell(I, H), nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(len(x), H)
            times = torch.tensor([0.0, 1.0], dtype=x.dtype)
            for t in range(STEPS):
                h, c = self.cell(x[:, t], (h, c))
                h = torchdiffeq.odeint_adjoint(
                    lambda _, s: self.field(s).tanh(),
                    h,
                    times,
                    adjoint_params=tuple(self.field.parameters()),
                )[-1]
            return h

    def run(model: nn.Module) -> Any:
        h = model(x)
        h.square().sum().backward()
        return h

    same(Jumps, run)


def count_thop(model: nn.Module, x: Tensor) -> Any:
    return pytest.importorskip("thop").profile(model, (x,), verbose=False)


def count_ptflops(model: nn.Module, x: Tensor, backend: str = "pytorch") -> Any:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    quiet = {"as_strings": False, "print_per_layer_stat": False}
    return count(model, tuple(x.shape[1:]), backend=backend, **quiet)


def count_ptflops_operators(model: nn.Module, x: Tensor) -> Any:
    return count_ptflops(model, x, "aten")


def count_fvcore(model: nn.Module, x: Tensor) -> Any:
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, (x,))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


@pytest.mark.parametrize(
    "count", [count_thop, count_ptflops, count_ptflops_operators, count_fvcore]
)
@pytest.mark.parametrize("bias", [True, False])
def test_counters(bias: bool, count: Callable[[nn.Module, Tensor], Any]) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(I, H, bias), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.cell(x)[0])
            return scores

    plain, fused = (model.float() for model in pair(Step))
    x = torch.randn(B, I)
    head = count(nn.Sequential(nn.Linear(H, 2)), torch.randn(B, H))
    assert count(fused, x) == count(plain, x) != head


def test_executorch() -> None:
    """Its runtime knows torch's own operators only: core ATen is asked for."""
    exir = pytest.importorskip("executorch.exir", reason="not among the clients by default: large")
    runtime = pytest.importorskip("executorch.runtime")
    model = lstmfused.fuse_(Tagger()).eval()
    x = data()[0].float()
    program = torch.export.export(model, (x,)).run_decompositions(lstmfused.decompositions())
    file = exir.to_edge(program).to_executorch().buffer
    method = runtime.Runtime.get().load_program(file).load_method("forward")
    torch.testing.assert_close(method.execute([x])[0], model(x), rtol=1e-5, atol=1e-5)
