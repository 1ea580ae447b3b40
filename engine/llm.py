"""The engine for a program of one thread: prompts in, completions out.

    with LLM("demo") as llm:
        [completion] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))

The same core, scheduler and cache as behind the server: prompts of one call are batched, and share cached prefixes
with earlier calls.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError, EngineDead, EngineFault, RequestError
from dibit.engine.messages import Add
from dibit.engine.outputs import Completion, RequestOutput
from dibit.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model, ready to generate. `model` is a directory, a .gguf file, a Hub id or "demo".

    Settings are the fields of `EngineConfig`, as keywords, with its defaults but for `max_itl_ratio`, which is 0 here:
    prompts may make steps as long as is fastest. Not for several threads at once; generators that `stream`
    returned may be read in turn. An abandoned or closed generator ends its request.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        from dibit.engine.build import build_core

        known = [field.name for field in dataclasses.fields(EngineConfig)]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; supported: {', '.join(known)}")
        # Who waits for whole answers has no use for short steps.
        self._use(build_core(model, EngineConfig(**{"max_itl_ratio": 0.0, **settings})))

    @classmethod
    def of(cls, core: EngineCore) -> LLM:
        """Around a core that is built already."""
        llm = cls.__new__(cls)
        llm._use(core)
        return llm

    def _use(self, core: EngineCore) -> None:
        self._core: EngineCore | None = core
        self._ids = itertools.count()
        self._news: dict[str, list[RequestOutput]] = {}  # of every request in flight, until they are read

    @property
    def core(self) -> EngineCore:
        """The core; EngineDead after `close`."""
        if self._core is None:
            raise EngineDead("this LLM was closed; make another")
        return self._core

    @property
    def tokenizer(self) -> Tokenizer:
        return self.core.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self.core.config

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self.core.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order. A prompt is text or token ids; params one for all or one for each.

        Raises RequestError before anything runs when a request cannot be served as written. A request that fails
        while it runs has finish_reason "error" in its completion, with the others unharmed.
        """
        batch = _prompts(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(batch)
        else:
            each = list(params)
        if len(each) != len(batch):
            raise RequestError(
                f"{len(batch)} prompts and {len(each)} SamplingParams; give one for all, or one for each"
            )
        adds = [self.core.prepare(self._next_id(), self._encode(p), s) for p, s in zip(batch, each, strict=True)]
        ids = [add.request_id for add in adds]
        try:
            for add in adds:
                self.core.submit(add)
                self._news[add.request_id] = []
            for request_id in ids:
                while not (self._news[request_id] and self._news[request_id][-1].finished):
                    self._step()
            return [Completion.of(self._news[request_id]) for request_id in ids]
        finally:
            self._abandon(ids)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """The model's answer to a conversation, or to each of several. RequestError without a chat template."""
        conversations = [messages] if _is_conversation(messages) else messages
        return self.generate([self.tokenizer.apply_chat_template(c) for c in conversations], params)  # type: ignore[arg-type]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The outputs of one request as they come; the last has `finished` set. RequestError is raised at once."""
        return self._read(self.core.prepare(self._next_id(), self._encode(prompt), params or SamplingParams()))

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (natural) of every token but the first, given those before it.

        Raises ContextLengthError for more tokens than the context, EngineFault when the computation fails.
        """
        [scored] = self.generate([token_ids], SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0))
        if scored.prompt_logprobs is None:
            raise EngineFault(scored.error or "the prompt was not scored")
        return [entry.logprob for entry in scored.prompt_logprobs]

    def close(self) -> None:
        """Lets go of the model. Requests in flight are over."""
        self._core = None
        self._news.clear()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, add: Add) -> Iterator[RequestOutput]:
        request_id = add.request_id
        self.core.submit(add)
        self._news[request_id] = []
        try:
            while True:
                while not self._news[request_id]:
                    self._step()
                outputs, self._news[request_id] = self._news[request_id], []
                yield from outputs
                if outputs[-1].finished:
                    return
        finally:
            self._abandon([request_id])

    def _step(self) -> None:
        for output in self.core.step():
            if output.request_id in self._news:
                self._news[output.request_id].append(output)

    def _abandon(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._news.pop(request_id, None)
            if self._core is not None:
                self._core.abort(request_id)

    def _next_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def _prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A single prompt as a list of one."""
    if isinstance(prompts, str) or _is_ids(prompts):
        return [prompts]
    return prompts  # type: ignore[return-value]


def _is_ids(prompts: object) -> TypeGuard[Sequence[int]]:
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)


def _is_conversation(messages: Sequence[Any]) -> bool:
    return len(messages) > 0 and isinstance(messages[0], Mapping)
