"""Which drafted tokens stand: each place is drawn as without drafts, until a draw differs from its draft."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dibit.engine.request import Request
from dibit.engine.sampler import sample
from dibit.engine.step import Sampled

if TYPE_CHECKING:
    from torch import Tensor


def verify(logits: Tensor, request: Request, drafts: tuple[int, ...]) -> tuple[Sampled, ...] | Exception:
    """The tokens that follow a request's: as many as its drafts agree with, and one more.

    logits [len(drafts) + 1, V] float32, at the request's last token and at each draft. The request is not changed. An
    exception when not even the first row can be sampled; a later such row ends the tokens before it.
    """
    ahead = dataclasses.replace(request, token_ids=list(request.token_ids))
    found: list[Sampled] = []
    for row, draft in enumerate((*drafts, None)):
        outcome = sample(logits[row : row + 1], [ahead])[0]
        if isinstance(outcome, Exception):
            return tuple(found) if found else outcome
        found.append(outcome)
        if outcome.token_id != draft:
            break
        ahead.token_ids.append(draft)
    return tuple(found)
