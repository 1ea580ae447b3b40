"""Which drafted tokens stand.

Certain drafts: each place is drawn as without drafts, until a draw differs from its draft. The tokens are those of no
speculation, greedy or sampled, draw for draw.

Drafts that were drawn themselves (Leviathan et al. 2023, arXiv 2211.17192): a draft x with odds q stands with
probability min(1, p(x) / q(x)), else the token is drawn from max(0, p - q), normalized. Either way it has the model's
distribution p, after the request's penalties and filters. A draft then stands as often as is possible at all, with
1 - TV(p, q); but the tokens are others than without speculation, so that only requests without a seed are served so.

Numbers come from the request's seed by the place of the token, as all draws do (sampler.py), from streams of their own
for a draft's draw, for its judgement, and for what is drawn where it fell.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from dibit.engine.draw import Floats, Ids, place, uniform
from dibit.engine.request import Request
from dibit.engine.sampler import Highest, distribution, sample
from dibit.engine.speculation import Odds
from dibit.engine.step import Sampled

if TYPE_CHECKING:
    from torch import Tensor

_DRAFT, _JUDGE, _REPLACE = 1 << 64, 2 << 64, 3 << 64


def verify(
    logits: Tensor,
    request: Request,
    drafts: tuple[int, ...],
    odds: tuple[Odds, ...] = (),
    *,
    highest: Highest | None = None,
) -> tuple[Sampled, ...] | Exception:
    """The tokens that follow a request's: as many as its drafts agree with, and one more.

    logits [len(drafts) + 1, V] float32, at the request's last token and at each draft; `highest` is theirs, where it is
    known already. The request is not changed. An exception when not even the first row can be sampled; a later such row
    ends the tokens before it.
    """
    ahead = dataclasses.replace(request, token_ids=list(request.token_ids))
    found: list[Sampled] = []
    for row, draft in enumerate((*drafts, None)):
        if odds and draft is not None:
            outcome = judge(logits[row], ahead, draft, odds[row])
        else:
            known = None if highest is None else highest.of(slice(row, row + 1))
            outcome = sample(logits[row : row + 1], [ahead], highest=known)[0]
        if isinstance(outcome, Exception):
            return tuple(found) if found else outcome
        found.append(outcome)
        if outcome.token_id != draft:
            break
        ahead.token_ids.append(draft)
    return tuple(found)


def judge(logits: Tensor, request: Request, draft: int, odds: Odds) -> Sampled | Exception:
    """The next token of a request, of the distribution that logits [V] give it; the draft, as often as that allows."""
    found = distribution(logits, request)
    if isinstance(found, Exception):
        return found
    ids, p = found
    q = odds.probabilities
    count = request.num_output
    if uniform(request.seed, _JUDGE + count) * _at(odds.ids, q, draft) < _at(ids, p, draft):
        return Sampled(draft)
    left = p.copy()
    places = np.minimum(np.searchsorted(ids, odds.ids), len(ids) - 1)
    both = ids[places] == odds.ids
    left[places[both]] -= q[both]
    np.maximum(left, 0.0, out=left)
    # Where rounding leaves nothing, the two are one distribution.
    weights = left if left.any() else p
    return Sampled(int(ids[place(weights, uniform(request.seed, _REPLACE + count))]))


def guess(logits: Tensor, request: Request) -> tuple[int, Odds] | Exception:
    """A token drawn from the distribution that logits [V] give a request, to be judged by another's."""
    found = distribution(logits, request)
    if isinstance(found, Exception):
        return found
    ids, q = found
    return int(ids[place(q, uniform(request.seed, _DRAFT + request.num_output))]), Odds(ids, q)


def _at(ids: Ids, values: Floats, token_id: int) -> float:
    at = int(np.searchsorted(ids, token_id))
    return float(values[at]) if at < len(ids) and ids[at] == token_id else 0.0
