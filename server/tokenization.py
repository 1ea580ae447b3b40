"""POST /tokenize and /detokenize: how long a prompt is, and what tokens say, without computing anything.

Reference: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from dibit.engine.errors import RequestError
from dibit.engine.tokenizer import Tokenizer
from dibit.server.chat import chat_prompt
from dibit.server.openapi import describes
from dibit.server.replies import Detokenized, Tokenized, json_response
from dibit.server.schemas import DetokenizeRequest, TokenizeRequest
from dibit.server.service import Service
from dibit.server.validation import read_model

PATHS = ("/tokenize", "/detokenize")


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["tokens"])
    tokenizer, limit = service.engine.tokenizer, service.engine.max_model_len

    @routes.post("/tokenize", **describes(TokenizeRequest, Tokenized))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of messages in the chat template."""
        asked = await read_model(request, TokenizeRequest, max_bytes=service.max_body_bytes)
        if asked.model is not None:
            service.check_model(asked.model)
        return json_response(await service.tokenize(partial(_tokenized, tokenizer, asked, max_model_len=limit)))

    @routes.post("/detokenize", **describes(DetokenizeRequest, Detokenized))
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones included."""
        asked = await read_model(request, DetokenizeRequest, max_bytes=service.max_body_bytes)
        if asked.model is not None:
            service.check_model(asked.model)
        return json_response(await service.tokenize(partial(_detokenized, tokenizer, asked.tokens)))

    return routes


def _tokenized(tokenizer: Tokenizer, asked: TokenizeRequest, *, max_model_len: int) -> Tokenized:
    if asked.messages is not None:
        tokens = chat_prompt(tokenizer, asked.messages, asked)
    else:
        tokens = tokenizer.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens is not False)
    texts = [tokenizer.token_text(token) for token in tokens] if asked.return_token_strs else None
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": texts}


def _detokenized(tokenizer: Tokenizer, tokens: list[int]) -> Detokenized:
    unknown = next((token for token in tokens if token >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise RequestError(
            f"there is no token id {unknown}; this model's ids are 0 to {tokenizer.vocab_size - 1}", param="tokens"
        )
    return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}
