"""Whether a request can be served, and what it becomes. Needs two numbers of the model and nothing of the model itself,
so that it is decided where the request arrives, whichever process computes it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from dibit.engine.config import SamplingParams
from dibit.engine.errors import ContextLengthError, RequestError
from dibit.engine.messages import Add


@dataclass(frozen=True, slots=True)
class Admission:
    """max_model_len  longest sequence, prompt and output together, in tokens
    vocab_size     of the tokenizer
    """

    max_model_len: int
    vocab_size: int

    def admit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        stream: int = 0,
    ) -> Add:
        """The request, complete. Raises RequestError (ContextLengthError when it can never fit)."""
        prompt = tuple(prompt_ids)
        limit, vocab = self.max_model_len, self.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: it has no tokens; send at least one", param="prompt")
        self._check_ids(params)
        _check_text("stop", *params.stop)
        _check_text("cache_salt", cache_salt)
        if params.max_tokens is None:
            max_tokens = limit - len(prompt)
            fits = max_tokens >= 1
            asked = f"the prompt has {len(prompt)} tokens, and at least one is to be generated"
        else:
            max_tokens = params.max_tokens
            fits = len(prompt) + max_tokens <= limit
            asked = f"{len(prompt) + max_tokens} were requested ({len(prompt)} in the prompt, {max_tokens} to generate)"
        if not fits:
            raise ContextLengthError(
                f"the context length is {limit} tokens; {asked}. Shorten the prompt or lower max_tokens"
            )
        unknown = next((i for i in prompt if not 0 <= i < vocab), None)
        if unknown is not None:
            raise RequestError(
                f"the prompt has the token id {unknown}; this model's ids are 0 to {vocab - 1}", param="prompt"
            )
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, and only {max_tokens} tokens fit after the prompt",
                param="min_tokens",
            )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Add(request_id, prompt, params, max_tokens, seed, cache_salt, stream)

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{name} has the token id {token_id}; this model's ids are 0 to {self.vocab_size - 1}",
                        param=name,
                    )


def _check_text(name: str, *texts: str) -> None:
    """Refuses text that is not valid Unicode: no model says it, and no message carries it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} holds an unpaired surrogate at character {error.start}, which is not valid Unicode; remove it",
                param=name,
            ) from error
