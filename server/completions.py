"""POST /v1/completions: text or tokens continued, several prompts at once, and the log-likelihood of a given text
(`echo` with `logprobs`, `max_tokens` 0 or more).

Reference: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from fastapi import APIRouter, Request, Response

from dibit.engine.outputs import Completion, RequestOutput
from dibit.engine.request import TokenLogprob
from dibit.engine.tokenizer import Tokenizer
from dibit.server import replies
from dibit.server.generation import Choice, Entry, Generation
from dibit.server.logprobs import CompletionLogprobsWriter, joined
from dibit.server.openapi import describes
from dibit.server.schemas import CompletionRequest
from dibit.server.service import Service
from dibit.server.sse import DONE, EventStream, event, until_disconnect
from dibit.server.validation import read_model


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", **describes(CompletionRequest, replies.TextCompletion, replies.TextCompletion))
    async def create_completion(request: Request) -> Response:
        """Text that continues the prompt."""
        arrival_s = time.perf_counter()
        asked = await read_model(request, CompletionRequest, max_bytes=service.max_body_bytes)
        service.check_model(asked.model)
        prompts = asked.prompts()
        service.check_choices(len(prompts) * asked.choices, param="n" if asked.choices > 1 else "prompt")
        score = (asked.logprobs or 0) if asked.echo and (asked.logprobs is not None or asked.limit == 0) else None
        params = [
            asked.sampling_params(i, max_tokens=asked.limit, logprobs=asked.logprobs, prompt_logprobs=score)
            for i in range(asked.choices)
        ]
        encoded = await service.tokenize(partial(_encode, service.engine.tokenizer, prompts, echo=bool(asked.echo)))
        generation = Generation(
            service.engine,
            [Choice(i, ids, one) for i, (ids, _) in enumerate(encoded) for one in params],
            id=f"cmpl-{uuid.uuid4().hex}",
            prompt_field="prompt",
            entry=Entry("completions", request.state.request_id, arrival_s, bool(asked.stream), asked.labels()),
        )
        writers = [
            _ChoiceWriter(service.engine.tokenizer, asked, index, ids, text)
            for index, (ids, text) in enumerate(pair for pair in encoded for _ in params)
        ]
        answer = _Answer(service, asked, generation, writers)
        if asked.stream:
            return EventStream(answer.stream(), keep_alive_s=service.keep_alive_s)
        return replies.json_response(await until_disconnect(request.receive, answer.whole()))

    return routes


def _encode(tokenizer: Tokenizer, prompts: Sequence[str | list[int]], *, echo: bool) -> list[tuple[Sequence[int], str]]:
    """Tokens of each prompt, and its text where that will be echoed."""
    encoded: list[tuple[Sequence[int], str]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append((tokenizer.encode(prompt), prompt))
        else:
            encoded.append((prompt, tokenizer.decode(prompt) if echo else ""))
    return encoded


class _ChoiceWriter:
    """Writes the outputs of one choice; the first piece begins with the prompt if that is echoed."""

    def __init__(
        self, tokenizer: Tokenizer, asked: CompletionRequest, index: int, prompt_ids: Sequence[int], prompt: str
    ) -> None:
        self._index = index
        self._echo = bool(asked.echo)
        self._prompt = prompt
        self._logprobs: CompletionLogprobsWriter | None = None
        if asked.logprobs is not None:
            self._logprobs = CompletionLogprobsWriter(tokenizer, prompt_ids, echo=self._echo)

    def write(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        prompt_logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
    ) -> replies.TextChoice:
        part = None
        if self._logprobs is not None:
            part = self._logprobs.prompt(prompt_logprobs) if self._echo and prompt_logprobs is not None else None
            rest = self._logprobs.output(logprobs or ())
            part = rest if part is None else joined([part, rest])
        if self._echo:
            self._echo = False
            text = self._prompt + text
        return {"index": self._index, "text": text, "logprobs": part, "finish_reason": finish_reason}


class _Answer:
    """Writes a generation as text completions."""

    def __init__(
        self, service: Service, asked: CompletionRequest, generation: Generation, writers: Sequence[_ChoiceWriter]
    ) -> None:
        self._model = service.model_name
        self._asked = asked
        self._generation = generation
        self._writers = writers
        self._created = int(time.time())

    async def whole(self) -> replies.TextCompletion:
        outputs: list[list[RequestOutput]] = [[] for _ in self._writers]
        async with self._generation as generation:
            async for index, output in generation:
                outputs[index].append(output)
        choices: list[replies.TextChoice] = []
        for writer, parts in zip(self._writers, outputs, strict=True):
            done = Completion.of(parts)
            choices.append(writer.write(done.text, done.logprobs, done.prompt_logprobs, done.finish_reason))
        return {**self._part(choices), "usage": generation.usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        options = self._asked.stream_options
        async with self._generation as generation:
            async for index, output in generation:
                reason = None if output.finish_reason is None else output.finish_reason.value
                choice = self._writers[index].write(output.text, output.logprobs, output.prompt_logprobs, reason)
                chunk = self._part([choice])
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = generation.usage()
                elif options is not None and options.include_usage:
                    chunk["usage"] = None
                yield event(chunk)
            if options is not None and options.include_usage:
                yield event({**self._part([]), "usage": generation.usage()})
        yield DONE

    def _part(self, choices: list[replies.TextChoice]) -> replies.TextCompletion:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
