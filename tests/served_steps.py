"""Requests served step by step by a runner, every row of logits kept, to hold two ways of computing side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import make_request, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dibit.engine import runner as runner_module
from dibit.engine import sampler
from dibit.engine.blocks import BlockPool
from dibit.engine.config import EngineConfig
from dibit.engine.decode_graph import Capture
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import FinishReason, Request
from dibit.engine.runner import ModelRunner
from dibit.engine.scheduler import Scheduler


class NothingRead(TorchDispatchMode):
    """Fails at what a capture forbids: a look at a value, and new memory of unknown size."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.FORBIDDEN):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Repeated:
    """Runs the function again; counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        with NothingRead():
            run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


def refused(run: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


@dataclass
class Served:
    """Logits of every row that was sampled, in the order of its request's tokens."""

    runner: ModelRunner
    scheduler: Scheduler
    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)


def requests_of(count: int = 6, **params: Any) -> list[Request]:
    """Prompts and outputs of different lengths, so that batches grow and shrink."""
    return [
        make_request(token_ids(3 + 4 * i % 11, seed=i), id=str(i), max_tokens=5 + 7 * i % 19, **params)
        for i in range(count)
    ]


def serve(
    decoder: Decoder,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    *,
    capture: Capture | None = None,
    **settings: Any,
) -> Served:
    """Runs requests to their ends, one more arriving every third step."""
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 5, "threads": 2, **settings})
    runner = ModelRunner(decoder, config, capture=capture)
    pool = BlockPool(runner.num_blocks, runner.block_size)
    served = Served(runner, Scheduler(pool, config))

    def remember(logits: Tensor, asking: list[Request], **known: Any) -> list[Any]:
        for row, request in zip(logits, asking, strict=True):
            served.logits.setdefault(request.id, []).append(row.clone())
        return sampler.sample(logits, asking, **known)

    monkeypatch.setattr(runner_module, "sample", remember)
    arriving = list(requests)
    for count in range(1000):
        if arriving and count % 3 == 0:
            served.scheduler.add(arriving.pop(0))
        step = served.scheduler.schedule()
        if not step.chunks:
            if arriving:
                continue
            break
        served.batches.append(len(step.chunks))
        for advance in served.scheduler.commit(step, runner.execute(step)):
            request = advance.request
            if request.num_output >= request.max_tokens:
                served.tokens[request.id] = request.output_ids
                served.scheduler.finish(request, FinishReason.LENGTH)
    assert len(served.tokens) == len(requests)
    return served


def same(taped: Served, plain: Served) -> None:
    assert plain.runner.taped_steps == 0
    assert taped.tokens == plain.tokens
    assert taped.logits.keys() == plain.logits.keys()
    for name, rows in plain.logits.items():
        assert all(torch.equal(a, b) for a, b in zip(taped.logits[name], rows, strict=True)), name
    assert taped.runner.taped_steps + taped.runner.untaped_steps == len(taped.batches)
