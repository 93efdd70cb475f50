"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import BuildOnce
from filelock import FileLock

os.environ.setdefault("KERAS_BACKEND", "torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest start first."""

    def minutes(item: pytest.Item) -> float:
        marker = item.get_closest_marker("minutes")
        return marker.args[0] if marker else 0

    items.sort(key=minutes, reverse=True)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN: an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operators in several threads crawl where cores are shared; test_runtime.py shows that
    the number of threads changes no bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture
def device() -> str:
    """Of the tests on CUDA tensors, which are skipped where there is none."""
    return "cuda"


@pytest.fixture
def poisoned_device(device: str, poisoned_memory: None) -> None:
    assert torch.empty(3, device=device).isnan().all()


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> BuildOnce:
    """build_once(name, fill): a folder that fill has written into, for all of xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def built(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                (folder / "done").touch()
        return folder

    return built
