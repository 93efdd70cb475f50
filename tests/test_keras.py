"""Keras with its LSTMs computed here, against Keras as it is."""

import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

keras = pytest.importorskip("keras", reason="the extra keras is not installed")

import lstmfused.keras as fused  # noqa: E402
from lstmfused.keras import hooks, steps  # noqa: E402

layers: Any = keras.layers
LSTM: Any = layers.LSTM
LSTMCell: Any = layers.LSTMCell
RNN: Any = layers.RNN
B, T, I, H = 4, 6, 3, 5
BOOLS = (False, True)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras's variables


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    fused.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    fused.disable()
    keras.config.set_dtype_policy("float32")


def flat(result: Any) -> list[Tensor]:
    return [t for t in keras.tree.flatten(result) if t is not None]


def masks(kind: str) -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    if kind == "padded":
        mask[1, 4:] = mask[2, 1:] = False
    else:  # holes, at the beginning, too, and a row with no step at all
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5
        mask[0], mask[1, 0], mask[2, -1] = False, False, False
    return mask


class Runs:
    """Calls a layer several times from the same states, seeds and weights."""

    def __init__(self, layer: Any, *shape: int) -> None:
        self.layer = layer
        layer.build((B, *shape))
        for weight in layer.trainable_weights:  # biases, too, are to be seen in the results
            weight.assign(torch.randn(weight.shape) * 0.5)
        states = getattr(layer, "states", None) or []
        for state in states:
            state.assign(torch.randn(state.shape))
        self.variables = [v.value for v in [*layer.variables, *states]]
        self.before = [v.clone() for v in self.variables]

    def __call__(self, x: Tensor, **options: Any) -> list[Tensor]:
        """Outputs, gradients of the inputs and of the weights."""
        with torch.no_grad():
            for variable, value in zip(self.variables, self.before, strict=True):
                variable.copy_(value)
        x = x.detach().requires_grad_()
        state = options.pop("initial_state", None)
        if state is not None:
            state = keras.tree.map_structure(lambda t: t.detach().requires_grad_(), state)
            options["initial_state"] = state
        found = flat(self.layer(x, **options))
        weights = [v.value for v in self.layer.trainable_weights]
        generator = torch.Generator().manual_seed(7)
        loss = sum((t * torch.rand(t.shape, generator=generator)).sum() for t in found)
        assert isinstance(loss, Tensor)
        inputs = [x, *flat(state), *weights]
        return [
            *found,
            *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True),
        ]


@contextmanager
def enabled() -> Iterator[None]:
    """The hook, and that the operator's way is taken somewhere."""
    served, original = [], steps.sequence

    def seen(cell: Any, *given: Any) -> Any:
        served.append(cell.name)
        return original(cell, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "sequence", seen)
        with fused.enable():
            yield
    assert served, "Keras's own way was taken"


def check(runs: Runs, x: Tensor, tolerance: float = 1e-5, **options: Any) -> list[Tensor]:
    """The same with the hook and without, and that it was taken."""
    expected = runs(x, **options)
    with enabled():
        found = runs(x, **options)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return found


def state() -> list[Tensor]:
    return [torch.randn(B, H), torch.randn(B, H)]


@pytest.mark.parametrize("mask", [None, "padded", "holes"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("stateful", BOOLS)
def test_grid(mask: str | None, dropout: float, stateful: bool) -> None:
    for sequences, backwards, zero, initial, bias in product(BOOLS, BOOLS, BOOLS, BOOLS, BOOLS):
        if stateful and mask is None and not initial:
            continue  # in test_stateful: without the hook, backward fails there
        layer = LSTM(
            H,
            return_sequences=sequences,
            return_state=True,
            go_backwards=backwards,
            zero_output_for_mask=zero,
            use_bias=bias,
            dropout=dropout,
            stateful=stateful,
            seed=1,
        )
        options: dict[str, Any] = {"training": True}
        if initial:
            options["initial_state"] = state()
        if mask is not None:
            options["mask"] = masks(mask)
        check(Runs(layer, T, I), torch.randn(B, T, I), **options)


@pytest.mark.parametrize("unroll", BOOLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unroll_and_dtypes(unroll: bool, dtype: str) -> None:
    layer = LSTM(H, return_sequences=True, return_state=True, unroll=unroll, dtype=dtype)
    x = torch.randn(B, T, I, dtype=getattr(torch, dtype))
    check(Runs(layer, T, I), x, tolerance=1e-5 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    layer = LSTM(H, return_sequences=True, return_state=True)
    found = check(Runs(layer, T, I), torch.randn(B, T, I), tolerance=5e-2)
    half = getattr(torch, policy.removeprefix("mixed_"))
    assert [t.dtype for t in found] == [half] * 3 + [torch.float32] * 4


@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recurrent_dropout(mask: str | None, dropout: float) -> None:
    for sequences, backwards, bias in product(BOOLS, BOOLS, BOOLS):
        layer = LSTM(
            H,
            return_sequences=sequences,
            return_state=True,
            go_backwards=backwards,
            use_bias=bias,
            dropout=dropout,
            recurrent_dropout=0.4,
            seed=1,
        )
        options: dict[str, Any] = {} if mask is None else {"mask": masks(mask)}
        options |= {"training": True, "initial_state": state()}
        check(Runs(layer, T, I), torch.randn(B, T, I), **options)


@pytest.mark.parametrize("merge", ["concat", "sum", None])
def test_bidirectional(merge: str | None) -> None:
    for mask in (None, masks("padded"), masks("holes")):
        inner = LSTM(H, return_sequences=True, dropout=0.2, seed=1)
        layer = layers.Bidirectional(inner, merge_mode=merge)
        check(Runs(layer, T, I), torch.randn(B, T, I), mask=mask, training=True)


def test_time_distributed() -> None:
    layer = layers.TimeDistributed(LSTM(H))
    layer.build((B, 2, T, I))
    x = torch.randn(B, 2, T, I)
    expected = layer(x)
    with enabled():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "padded", "holes"])
@pytest.mark.parametrize("backwards", BOOLS)
@pytest.mark.parametrize("zero", BOOLS)
def test_cells_in_a_loop(mask: str | None, backwards: bool, zero: bool) -> None:
    options: dict[str, Any] = {} if mask is None else {"mask": masks(mask)}
    x = torch.randn(B, T, I)
    for dropout in (0.0, 0.3):
        for sequences in BOOLS:
            cells = [LSTMCell(n, dropout=dropout, seed=n) for n in (H, 4)]
            for cell in (LSTMCell(H, dropout=dropout, seed=1), cells):
                layer = RNN(
                    cell,
                    return_sequences=sequences,
                    return_state=True,
                    go_backwards=backwards,
                    zero_output_for_mask=zero,
                )
                check(Runs(layer, T, I), x, training=True, **options)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"dropout": 0.3, "implementation": 1}])
def test_cell_stepped_by_hand(options: dict[str, Any]) -> None:
    class Stepped(keras.Layer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = LSTMCell(H, seed=1, **options)

        def build(self, shape: Any) -> None:
            self.cell.build((B, I))
            self.built = True

        def call(self, x: Tensor, training: bool = False) -> Any:
            self.cell.reset_dropout_mask()
            states = self.cell.get_initial_state(batch_size=B)
            for t in range(T):
                h, states = self.cell(x[:, t], states, training=training)
            return h, states

    runs, x = Runs(Stepped(), T, I), torch.randn(B, T, I)
    expected = runs(x, training=True)
    with enabled():
        found = runs(x, training=True)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def data(rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, T, I, generator=generator)
    return x, x.sum((1, 2), keepdim=True)[:, 0]


def model_of(*inner: Any) -> Any:
    model = keras.Sequential([keras.Input((T, I)), *inner, layers.Dense(1)])
    model.compile("adam", "mse")
    return model


MODELS = {
    "one": lambda: [LSTM(8)],
    "two": lambda: [LSTM(8, return_sequences=True), LSTM(8)],
    "masked": lambda: [layers.Masking(), LSTM(8)],
    "dropout": lambda: [LSTM(8, dropout=0.3, recurrent_dropout=0.2, seed=2)],
    "bidirectional": lambda: [layers.Bidirectional(LSTM(8, dropout=0.2, seed=2))],
    "cells": lambda: [RNN([LSTMCell(8), LSTMCell(8)])],
}


@pytest.mark.parametrize("kind", MODELS)
def test_fit(kind: str) -> None:
    """The weights after three epochs, with a last batch that is smaller."""
    x, y = data()
    if kind == "masked":
        x[::2, 3:] = 0

    def fitted() -> list[Any]:
        keras.utils.set_random_seed(3)
        model = model_of(*MODELS[kind]())
        model.fit(x, y, batch_size=16, epochs=3, verbose=0)
        return [*model.get_weights(), model.predict(x, batch_size=7, verbose=0)]

    expected = fitted()
    with enabled():
        found = fitted()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=5e-5, atol=5e-5)


# Faults of the stock backend that the hook removes.


def test_stateful() -> None:
    """Without the hook backward meets states that were written in place."""
    x, y = data(16)
    first, second = x[:8].clone(), x[8:].clone()
    layer, plain = LSTM(H, stateful=True), LSTM(H, return_state=True)
    for one in (layer, plain):
        one.build((8, T, I))
    plain.set_weights(layer.get_weights())

    def gradients(owner: Any, outputs: list[Tensor]) -> list[Tensor]:
        weights = [v.value for v in owner.trainable_weights]
        return [*outputs, *torch.autograd.grad(torch.cat(outputs).square().sum(), weights)]

    output, *state = plain(first)
    state = [s.detach() for s in state]
    expected = gradients(plain, [output, plain(second, initial_state=state)[0]])
    with enabled():
        found = gradients(layer, [layer(first), layer(second)])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    inputs = keras.Input(batch_shape=(8, T, I))
    model = keras.Sequential([inputs, LSTM(H, stateful=True), layers.Dense(1)])
    model.compile("adam", "mse")
    with enabled():
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)


def test_dropout_with_implementation_1() -> None:
    """Each gate has a mask of its own; without the hook LSTM crashes, so RNN is the oracle."""
    x = torch.randn(B, T, I)
    layer = LSTM(H, dropout=0.5, implementation=1, seed=1)
    oracle = RNN(LSTMCell(H, dropout=0.5, implementation=1, seed=1))
    layer.build((B, T, I))
    oracle.build((B, T, I))
    oracle.set_weights(layer.get_weights())
    with enabled():
        found = layer(x, training=True)
    torch.testing.assert_close(found, oracle(x, training=True), rtol=1e-5, atol=1e-5)


def test_unrolled_backwards_with_a_mask() -> None:
    x, mask = torch.randn(B, T, I), masks("holes")
    layer = LSTM(H, unroll=True, go_backwards=True, return_sequences=True)
    looped = LSTM(H, go_backwards=True, return_sequences=True)
    for one in (layer, looped):
        one.build((B, T, I))
    looped.set_weights(layer.get_weights())
    with enabled():
        found = layer(x, mask=mask)
    torch.testing.assert_close(found, looped(x, mask=mask), rtol=1e-5, atol=1e-5)


# What is left to Keras.


class Mine(keras.layers.LSTMCell):  # type: ignore[misc, name-defined]
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: LSTM(H, activation="relu"), "activation is relu"),
        (
            lambda: LSTM(H, recurrent_activation="hard_sigmoid"),
            "recurrent_activation is hard_sigmoid",
        ),
        (lambda: RNN(Mine(H)), "its cell is Mine"),
        (lambda: RNN([LSTMCell(H), Mine(H)]), "its cell is Mine"),
        (lambda: RNN([LSTMCell(H)]), "its stack has but one cell"),
        (lambda: LSTM(H, dropout=1.0), "a dropout of 1"),
    ],
)
def test_left_to_keras(make: Any, why: str) -> None:
    hooks._say.cache_clear()
    layer, x = make(), torch.randn(B, T, I)
    expected = layer(x)
    with fused.enable():
        with pytest.warns(UserWarning, match=why):
            torch.testing.assert_close(layer(x), expected)
        layer(x)  # said once
        (line,) = fused.report(keras.Sequential([layer]))
    assert not line.fused and line.why.startswith(why)


def test_other_layers() -> None:
    for layer in (layers.GRU(H), layers.SimpleRNN(H), RNN(layers.GRUCell(H))):
        x = torch.randn(B, T, I)
        expected = layer(x)
        with fused.enable():
            torch.testing.assert_close(layer(x), expected)


# Hooks.


def test_disable() -> None:
    methods = [(owner, name, owner.__dict__[name]) for owner, name in hooks._HOOKS]
    fused.enable()
    with fused.enable():
        pass
    assert all(owner.__dict__[name] is not method for owner, name, method in methods)
    fused.disable()
    assert all(owner.__dict__[name] is method for owner, name, method in methods)


def test_report() -> None:
    model = model_of(LSTM(H, return_sequences=True, name="a"), LSTM(H, activation="relu", name="b"))
    assert [(line.layer, line.fused) for line in fused.report(model)] == [
        ("a", False),
        ("b", False),
    ]
    assert "a  LSTM  Keras: not enabled" in str(fused.report(model))
    with fused.enable():
        assert [line.fused for line in fused.report(model)] == [True, False]
    assert "b  LSTM  Keras: activation is relu" in str(fused.report(model))


def test_fuse_one_model() -> None:
    x, _ = data()
    model, other = model_of(LSTM(H), layers.Dense(4)), model_of(LSTM(H))
    expected = model.predict(x, verbose=0)
    assert fused.fuse(model) is model
    assert fused.report(model)[0].fused and not fused.report(other)[0].fused
    torch.testing.assert_close(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)
    clone = keras.models.clone_model(model)
    assert not fused.report(clone)[0].fused
    fused.unfuse(model)
    assert not fused.report(model)[0].fused


def test_saved_files_are_plain(tmp_path: Any) -> None:
    x, _ = data()
    with fused.enable():
        model = keras.Sequential([keras.Input((T, I)), layers.Bidirectional(LSTM(H))])
        expected = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
        again = [
            keras.models.load_model(tmp_path / "model.keras"),
            pickle.loads(pickle.dumps(model)),
        ]
        for one in again:
            assert all(line.fused for line in fused.report(one))
            torch.testing.assert_close(one.predict(x, verbose=0), expected)
    fused.fuse(model)
    model.save(tmp_path / "fused.keras")
    fused.unfuse(model)
    for name in ("model", "fused"):
        plain = keras.models.load_model(tmp_path / f"{name}.keras")
        assert "lstmfused" not in str(plain.get_config())
        found = plain.predict(x, verbose=0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# At other doors.


def test_compiled() -> None:
    """jit_compile=True, which is torch.compile."""
    if keras.__version__ == "3.10.0":
        pytest.skip("Keras 3.10.0 compiles no model, not even of dense layers, under this torch")
    x, y = data(32)

    def fitted(**options: Any) -> list[Any]:
        keras.utils.set_random_seed(3)
        model = model_of(LSTM(H))
        model.compile("adam", "mse", **options)
        model.fit(x, y, batch_size=16, verbose=0)
        return [*model.get_weights(), model.predict(x, batch_size=16, verbose=0)]

    expected = fitted()
    with enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of what it looks at
        found = fitted(jit_compile=True)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_exports_are_plain() -> None:
    """A graph that runs without this package."""
    model, (x, _) = keras.Sequential([keras.Input((T, I)), LSTM(H)]), data(8)
    with fused.enable():
        exported = torch.export.export(model, (x,), strict=False)
    assert "lstmfused" not in str(exported)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_kerass_own_tests(tmp_path: Any) -> None:
    (tmp_path / "enabled.py").write_text("import lstmfused.keras\n\nlstmfused.keras.enable()\n")
    folder = Path(keras.__file__).parent / "src" / "layers" / "rnn"
    names = ("lstm", "rnn", "bidirectional", "stacked_rnn_cells", "time_distributed")
    files = [str(folder / f"{name}_test.py") for name in names]
    if not Path(files[0]).exists():
        pytest.skip(f"Keras {keras.__version__} comes without its tests")
    options = ["-q", "-p", "enabled", "-p", "no:cacheprovider", "-c", os.devnull]
    root = Path(__file__).parents[1]
    paths = [str(tmp_path), str(root), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout


# What `import lstmfused.keras` says where it cannot serve.


def imported(folder: Path, source: str | None, backend: str = "torch") -> str:
    """The last line of an import with another package in the place of Keras."""
    (folder / "keras").mkdir()
    (folder / "keras" / "__init__.py").write_text(source or "")
    paths = [str(folder), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", "import lstmfused.keras"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


FAKE = """
__version__ = "{version}"
class backend:
    backend = staticmethod(lambda: "{backend}")
"""


def test_import_without_keras(tmp_path: Path) -> None:
    absent = "raise ModuleNotFoundError(\"No module named 'keras'\", name='keras')"
    line = imported(tmp_path, absent)
    assert line.endswith(
        "ImportError: lstmfused.keras needs Keras on torch (No module named 'keras'): "
        'pip install "lstmfused[keras]"'
    )


def test_import_with_an_absent_backend(tmp_path: Path) -> None:
    line = imported(tmp_path, "import a_backend_that_is_not_there")
    assert "No module named 'a_backend_that_is_not_there'" in line
    assert line.endswith("set KERAS_BACKEND=torch before keras is imported")


def test_import_with_another_backend(tmp_path: Path) -> None:
    line = imported(tmp_path, FAKE.format(version="3.15.1", backend="jax"))
    assert "here it runs on jax: set KERAS_BACKEND=torch" in line


def test_import_with_an_old_keras(tmp_path: Path) -> None:
    line = imported(tmp_path, FAKE.format(version="3.9.2", backend="torch"))
    assert "needs Keras 3.10 or newer, and this is 3.9.2" in line


def test_lstmfused_imports_no_keras() -> None:
    command = "import lstmfused, sys; sys.exit('keras' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
