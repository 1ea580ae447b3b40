"""POST /v1/chat/completions.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request, Response

from dibit.engine.outputs import Completion, RequestOutput
from dibit.engine.tokenizer import Tokenizer
from dibit.server import replies, schemas
from dibit.server.generation import Choice, Entry, Generation
from dibit.server.logprobs import chat_logprobs
from dibit.server.openapi import describes
from dibit.server.schemas import ChatRequest
from dibit.server.service import Service
from dibit.server.sse import DONE, EventStream, event, until_disconnect
from dibit.server.validation import read_model


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/chat/completions", **describes(ChatRequest, replies.ChatCompletion, replies.ChatChunk))
    async def create_chat_completion(request: Request) -> Response:
        """The model's answer to a conversation."""
        arrival_s = time.perf_counter()
        asked = await read_model(request, ChatRequest, max_bytes=service.max_body_bytes)
        service.check_model(asked.model)
        service.check_choices(asked.choices, param="n")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        params = [asked.sampling_params(i, max_tokens=asked.limit, logprobs=logprobs) for i in range(asked.choices)]
        prompt_ids = await service.tokenize(partial(chat_prompt, service.engine.tokenizer, asked.messages, asked))
        generation = Generation(
            service.engine,
            [Choice(0, prompt_ids, one) for one in params],
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt_field="messages",
            entry=Entry("chat", request.state.request_id, arrival_s, bool(asked.stream), asked.labels()),
        )
        answer = _Answer(service, asked, generation)
        if asked.stream:
            return EventStream(answer.stream(), keep_alive_s=service.keep_alive_s)
        return replies.json_response(await until_disconnect(request.receive, answer.whole()))

    return routes


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[schemas.Message], asked: schemas.TemplateOptions) -> list[int]:
    """Tokens of messages. Raises RequestError."""
    go_on = bool(asked.continue_final_message)
    return tokenizer.apply_chat_template(
        [message.for_template() for message in messages],
        add_generation_prompt=not go_on if asked.add_generation_prompt is None else asked.add_generation_prompt,
        continue_final_message=go_on,
        template_args=asked.chat_template_kwargs,
    )


class _Answer:
    """Writes a generation as chat messages."""

    def __init__(self, service: Service, asked: ChatRequest, generation: Generation) -> None:
        self._tokenizer = service.engine.tokenizer
        self._model = service.model_name
        self._asked = asked
        self._generation = generation
        self._created = int(time.time())

    async def whole(self) -> replies.ChatCompletion:
        outputs: list[list[RequestOutput]] = [[] for _ in range(self._asked.choices)]
        async with self._generation as generation:
            async for index, output in generation:
                outputs[index].append(output)
        return {
            "id": generation.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, Completion.of(parts)) for index, parts in enumerate(outputs)],
            "usage": generation.usage(),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        options = self._asked.stream_options
        begun: set[int] = set()
        async with self._generation as generation:
            async for index, output in generation:
                delta: replies.Delta = {"content": output.text}
                if index not in begun:
                    begun.add(index)
                    delta = {"role": "assistant", "content": output.text}
                chunk = self._chunk([self._chunk_choice(index, delta, output)])
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = generation.usage()
                elif options is not None and options.include_usage:
                    chunk["usage"] = None
                yield event(chunk)
            if options is not None and options.include_usage:
                yield event({**self._chunk([]), "usage": generation.usage()})
        yield DONE

    def _chunk(self, choices: list[replies.ChatChunkChoice]) -> replies.ChatChunk:
        return {
            "id": self._generation.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _chunk_choice(self, index: int, delta: replies.Delta, output: RequestOutput) -> replies.ChatChunkChoice:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None if output.logprobs is None else chat_logprobs(self._tokenizer, output.logprobs),
            "finish_reason": None if output.finish_reason is None else output.finish_reason.value,
        }

    def _choice(self, index: int, completion: Completion) -> replies.ChatChoice:
        role: Literal["assistant"] = "assistant"
        return {
            "index": index,
            "message": {"role": role, "content": completion.text, "refusal": None},
            "logprobs": None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs),
            "finish_reason": completion.finish_reason,
        }
