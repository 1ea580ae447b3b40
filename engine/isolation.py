"""A step of many requests, some of which may break it: run again in halves until the guilty ones are alone.

A chunk's computation and its draw do not depend on its batch-mates, so the others get the tokens they would have got.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dibit.engine.errors import EngineDead
from dibit.engine.request import TokenLogprob
from dibit.engine.step import Chunk, Runner, Sampled, Step, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Isolated:
    """The step's result; `raised` has what each request raised that failed alone."""

    result: StepResult
    raised: dict[str, Exception]


def execute(runner: Runner, step: Step) -> Isolated:
    """Runs a step. Raises MemoryError and EngineDead, which are no request's fault; nothing else."""
    sampled: dict[str, Sampled] = {}
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
    failed: dict[str, str] = {}
    further: dict[str, tuple[Sampled, ...]] = {}
    raised: dict[str, Exception] = {}
    parts: list[tuple[Chunk, ...]] = [step.chunks]
    while parts:
        chunks = parts.pop()
        try:
            result = runner.execute(Step(chunks))
        except (MemoryError, EngineDead):
            raise
        except Exception as error:
            if len(chunks) > 1:
                logger.warning("a step of %d requests failed, retrying in halves: %s", len(chunks), describe(error))
                half = len(chunks) // 2
                parts += [chunks[half:], chunks[:half]]
            else:
                request_id = chunks[0].request.id
                logger.error("request %s failed in the runner", request_id, exc_info=error)
                failed[request_id], raised[request_id] = describe(error), error
        else:
            sampled.update(result.sampled)
            prompt_logprobs.update(result.prompt_logprobs)
            failed.update(result.failed)
            further.update(result.further)
            for chunk in chunks:
                request_id = chunk.request.id
                if chunk.samples and request_id not in result.sampled and request_id not in result.failed:
                    failed[request_id] = "the runner returned no token"
    return Isolated(StepResult(sampled, prompt_logprobs, failed, further), raised)


def describe(error: BaseException) -> str:
    """An error on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
