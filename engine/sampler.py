"""Logits to tokens.

Order: logit_bias, repetition, presence and frequency penalties, ban of end tokens below min_tokens, temperature, min_p,
top_k, top_p, draw. A greedy row stops after the ban: its token is the highest score, the lowest id on ties.

The invariant: a row's token depends on its logits, its parameters, its tokens so far, its seed and nothing else. Every
row is worked on by itself, with operations whose rounding does not depend on the batch, and the draw takes one uniform
number from Philox4x64 (Salmon et al. 2011) keyed by the seed with the number of output tokens as counter, put through
the inverse of the cumulative distribution in float64, in the order of ids. A row that cannot be sampled gives an error
of its own; the others go on.

draw.py says what a draw is. Where the C++ library is built it does them (kernels/sampling_cpu.py), on the tape of a
decode step and beside it alike, so that a request's tokens do not depend on which one it was. Its exp is not numpy's:
on a machine without the library the same seed may, once in some ten million draws, give another token.

Log-probabilities are of the model's own distribution, before any of the above.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dibit.engine.draw import LEAST_TEMPERATURE, Floats, Ids, highest_and_more, kept, place, uniform
from dibit.engine.errors import EngineFault
from dibit.engine.request import Request, TokenLogprob
from dibit.engine.step import Sampled

if TYPE_CHECKING:
    from torch import Tensor

    from dibit.kernels.sampling_cpu import Draws


@dataclass(frozen=True, slots=True)
class Highest:
    """The highest logit of each row [R] and the first id that has it [R]; NaN counts as the highest of all.

    drawn  ids [R] that `prepare_draw` asked for, where they were drawn already
    """

    ids: npt.NDArray[np.integer[Any]] | memoryview
    peaks: npt.NDArray[np.float32] | memoryview
    drawn: memoryview | None = None

    def of(self, rows: slice) -> Highest:
        """That of some of the rows."""
        return Highest(self.ids[rows], self.peaks[rows], None if self.drawn is None else self.drawn[rows])


def sample(logits: Tensor, requests: Sequence[Request], *, highest: Highest | None = None) -> list[Sampled | Exception]:
    """The next token of each request, or why there is none.

    logits [R, V] float32, row r for requests[r]; not changed. `highest` is theirs, where it is known already. An
    exception stands in the list for a row with NaN, +inf or nothing but -inf, and for one whose parameters name ids
    that the logits do not have.
    """
    if highest is not None:
        if highest.drawn is not None and all(map(_is_undisturbed, requests)):
            return _known(highest.drawn, highest.peaks, requests)
        if all(map(_is_plain, requests)):
            return _known(highest.ids, highest.peaks, requests)
    if logits.shape[0] != len(requests):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(requests)} requests")
    if logits.device.type != "cpu":
        return sample_on_device(logits, requests, highest=highest)
    rows = _rows(logits)
    if highest is None:
        # NaN counts as the highest here, so the peak of a row with any is NaN.
        ids = rows.argmax(axis=1)
        highest = Highest(ids, rows[np.arange(len(rows)), ids])
    drawn = highest.drawn if highest.drawn is not None else _drawn(rows, highest, requests)
    ids_drawn = [None] * len(requests) if drawn is None else drawn.tolist()
    results: list[Sampled | Exception] = []
    for row, best, chosen, peak, request in zip(
        rows, highest.ids.tolist(), ids_drawn, highest.peaks.tolist(), requests, strict=True
    ):
        try:
            found = _sample_row(row, best, chosen, peak, request) if math.isfinite(peak) else _fault(request, peak)
            results.append(found)
        except Exception as error:
            results.append(error)
    return results


def sample_on_device(
    logits: Tensor, requests: Sequence[Request], *, highest: Highest | None = None
) -> list[Sampled | Exception]:
    """The same for logits on another device: rows whose scores are edited, or whose log-probabilities are asked for,
    are copied to the host, of the others only ids."""
    if highest is None:
        highest = _highest_on_device(logits)
    results = _known(highest.ids if highest.drawn is None else highest.drawn, highest.peaks, requests)
    drawing = [i for i, r in enumerate(requests) if _is_undisturbed(r) and not r.params.greedy]
    if drawing and highest.drawn is None:
        asking = [requests[i] for i in drawing]
        drawn = _drawn_on_device(logits if len(asking) == len(requests) else logits[drawing], asking)
        for i, token_id in zip(drawing, drawn, strict=True):
            if not isinstance(results[i], Exception):
                results[i] = Sampled(token_id)
    beside = [i for i, r in enumerate(requests) if not _is_undisturbed(r)]
    if beside:
        for i, result in zip(beside, sample(logits[beside].cpu(), [requests[i] for i in beside]), strict=True):
            results[i] = result
    return results


def prompt_logprobs(logits: Tensor, target_ids: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the tokens that really came next.

    logits [n, V] float32; target_ids: n ids; `top`: how many of the likeliest tokens to name. EngineFault if a row has
    NaN or no finite value.
    """
    if logits.shape[0] != len(target_ids):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(target_ids)} targets")
    if top == 0 and logits.is_cpu and _has_library():
        return _native_logprobs(logits.float().contiguous(), target_ids)
    found = []
    for position, (row, token_id) in enumerate(zip(_rows(logits), target_ids, strict=True)):
        peak = float(row[row.argmax()])
        _check_prompt_row(position, peak)
        found.append(_logprob(row, peak, token_id, top))
    return tuple(found)


def _native_logprobs(logits: Tensor, target_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    import torch

    from dibit.kernels.logprob_cpu import logprobs

    values, ranks, peaks = logprobs(logits, torch.tensor(target_ids, dtype=torch.int64))
    for position, peak in enumerate(peaks.tolist()):
        _check_prompt_row(position, peak)
    return tuple(map(TokenLogprob, target_ids, values.tolist(), ranks.tolist()))


def _check_prompt_row(position: int, peak: float) -> None:
    if not math.isfinite(peak):
        raise EngineFault(f"row {position} of the prompt's logits {_what_is_wrong(peak)}")


def prepare_draw(draws: Draws, row: int, request: Request, *, ahead: int = 0) -> None:
    """Ask for the next token of a request from its row, or for the highest logit where scores are edited first.

    ahead  tokens that come between the request's own and this draw
    """
    if request.params.greedy or _is_edited(request, ahead=ahead):
        draws.greedy(row)
    else:
        _fill_draw(draws, row, request, ahead=ahead)


def distribution(logits: Tensor, request: Request) -> tuple[Ids, Floats] | Exception:
    """What the next token of a request is drawn from: ids, ascending, and their probabilities in float64; or why there
    is nothing to draw from. logits [V]; the request's temperature is not 0."""
    [row] = _rows(logits[None])
    peak = float(row[row.argmax()])
    if not math.isfinite(peak):
        return _fault(request, peak)
    scores = _edited(row, request) if _is_edited(request) else row
    if not math.isfinite(scores[scores.argmax()]):
        return _nothing_left(request)
    ids, weights = kept(scores, request.params)
    return ids, weights / weights.sum(dtype=np.float64)


def beside(request: Request) -> str | None:
    """Why the next token of a request takes more than a draw from its logits, or None."""
    return "penalties" if _is_edited(request) else None if request.params.logprobs is None else "logprobs"


def _is_plain(request: Request) -> bool:
    """Whether the highest logit is all there is to know."""
    return request.params.greedy and _is_undisturbed(request)


def _is_undisturbed(request: Request) -> bool:
    return request.params.logprobs is None and not _is_edited(request)


def _is_edited(request: Request, *, ahead: int = 0) -> bool:
    params = request.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or request.num_output + ahead < params.min_tokens
    )


def _highest_on_device(logits: Tensor) -> Highest:
    """What is highest, found where the logits lie: only ids and peaks travel."""
    peaks, ids = logits.max(dim=-1)
    return Highest(ids.cpu().numpy(), peaks.float().cpu().numpy())


def _known(
    ids: npt.NDArray[np.integer[Any]] | memoryview,
    peaks: npt.NDArray[np.float32] | memoryview,
    requests: Sequence[Request],
) -> list[Sampled | Exception]:
    """The tokens of rows whose ids are known."""
    return [
        Sampled(token_id) if math.isfinite(peak) else _fault(request, peak)
        for request, token_id, peak in zip(requests, ids.tolist(), peaks.tolist(), strict=True)
    ]


def _fill_draw(draws: Draws, row: int, request: Request, *, ahead: int = 0) -> None:
    params = request.params
    draws.draw(
        row,
        temperature=params.temperature,
        min_p=params.min_p,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=request.seed,
    )
    draws.count(row, request.num_output + ahead)


def _drawn(rows: npt.NDArray[np.float32], highest: Highest, requests: Sequence[Request]) -> memoryview | None:
    """What `prepare_draw` asks of each row, or None without the library."""
    if all(request.params.greedy for request in requests) or not _has_library():
        return None
    import torch

    from dibit.kernels.sampling_cpu import Draws
    from dibit.kernels.sampling_cpu import sample as draw

    draws = Draws(len(requests))
    for row, request in enumerate(requests):
        prepare_draw(draws, row, request)
    ids = torch.from_numpy(np.array(highest.ids, dtype=np.int64))
    peaks = torch.from_numpy(np.array(highest.peaks, dtype=np.float32))
    return draw(torch.from_numpy(np.ascontiguousarray(rows)), ids, peaks, draws).numpy().data


def _drawn_on_device(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    from dibit.engine.device_sampling import draw

    params = [request.params for request in requests]
    ids: list[int] = draw(
        logits,
        temperature=[max(p.temperature, LEAST_TEMPERATURE) for p in params],
        min_p=[p.min_p for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        numbers=_uniforms(requests),
    ).tolist()
    return ids


def _uniforms(requests: Sequence[Request]) -> Sequence[float]:
    """The number that each request's next token is drawn with."""
    if not _has_library():
        return [uniform(request.seed, request.num_output) for request in requests]
    from dibit.kernels.sampling_cpu import Draws, uniforms

    draws = Draws(len(requests))
    for row, request in enumerate(requests):
        _fill_draw(draws, row, request)
    return uniforms(draws)


@functools.cache
def _has_library() -> bool:
    from dibit.kernels import native

    return native.unavailable() is None


def _choose(scores: Floats, request: Request) -> int:
    """The draw from scores [V] of which the highest is finite."""
    params = request.params
    if not _has_library():
        ids, weights = kept(scores, params)
        return int(ids[place(weights, uniform(request.seed, request.num_output))])
    import torch

    from dibit.kernels.sampling_cpu import Draws
    from dibit.kernels.sampling_cpu import sample as draw

    draws = Draws(1)
    _fill_draw(draws, 0, request)
    best = int(scores.argmax())
    row = torch.from_numpy(scores)[None]
    return int(draw(row, torch.tensor([best]), row[:, best], draws))


def _sample_row(row: Floats, best: int, drawn: int | None, peak: float, request: Request) -> Sampled | Exception:
    params = request.params
    token_id, scores, edited = best, row, _is_edited(request)
    if edited:
        scores = _edited(row, request)
        token_id = int(scores.argmax())
        if not math.isfinite(scores[token_id]):
            return _nothing_left(request)
    if not params.greedy:
        token_id = drawn if drawn is not None and not edited else _choose(scores, request)
    return Sampled(token_id, None if params.logprobs is None else _logprob(row, peak, token_id, params.logprobs))


def _edited(row: Floats, request: Request) -> Floats:
    """Scores [V] after bias, penalties and the ban of end tokens."""
    params = request.params
    scores = row.copy()
    if params.logit_bias:
        scores[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), dtype=scores.dtype)
    if params.repetition_penalty != 1.0:
        seen = np.array(request.token_ids, dtype=np.intp)
        old = scores[seen]
        scores[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.num_output:
        seen, counts = np.unique(np.array(request.output_ids, dtype=np.intp), return_counts=True)
        scores[seen] -= (params.frequency_penalty * counts + params.presence_penalty).astype(scores.dtype)
    if request.num_output < params.min_tokens:
        ends = {*request.eos_ids, *params.stop_token_ids}
        scores[[i for i in ends if i < len(scores)]] = -np.inf
    return scores


def _logprob(row: Floats, peak: float, token_id: int, top: int) -> TokenLogprob:
    norm = peak + math.log(np.exp(row - peak).sum(dtype=np.float64))
    value = row[token_id]
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        near = highest_and_more(row, min(top, len(row)))
        order = np.argsort(-row[near], kind="stable")[:top]
        likeliest = tuple((int(i), float(row[i]) - norm) for i in near[order])
    return TokenLogprob(token_id, float(value) - norm, 1 + int(np.count_nonzero(row > value)), likeliest)


def _rows(logits: Tensor) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = logits.detach().float().cpu().numpy()
    return rows


def _fault(request: Request, peak: float) -> EngineFault:
    return EngineFault(f"request {request.id}: the model's logits {_what_is_wrong(peak)}")


def _nothing_left(request: Request) -> EngineFault:
    return EngineFault(f"request {request.id}: min_tokens and logit_bias leave no token to choose")


def _what_is_wrong(peak: float) -> str:
    if math.isnan(peak):
        return "hold NaN"
    return "hold +inf" if peak > 0 else "have no finite value"
