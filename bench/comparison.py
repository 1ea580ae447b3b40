"""What the turns of dibit and llama.cpp come to: a row for every work of every case, beside what was to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dibit.bench.synthetic import LLAMA_1B, Shape

Side = Literal["dibit", "llama.cpp"]
SMOLLM2, LLAMA = "SmolLM2-135M", "Llama, 1B shape"
_EXTRA_MEMORY = 300e6


@dataclass(frozen=True)
class Case:
    """One model at one width against one type of llama.cpp.

    shape     of random weights; None: the demo model
    goals     ratio to reach, by work: prefill, decode 1, decode 8, ...
    bandwidth share of the read bandwidth to reach in decode 1; 0: not asked for
    start_s   a start to stay below; 0: not asked for
    """

    name: str
    model: str
    shape: Shape | None
    bits: int
    head_bits: int
    type: str
    goals: Mapping[str, float]
    bandwidth: float = 0.0
    start_s: float = 0.0


_BATCHES = {"decode 8": 2.0, "decode 32": 3.0}
CASES = (
    Case("smollm2-4", SMOLLM2, None, 4, 8, "Q4_0", {"prefill": 1.5, "decode 1": 1.8, **_BATCHES}, start_s=3.0),
    Case("smollm2-2", SMOLLM2, None, 2, 8, "Q4_0", {"prefill": 1.5, "decode 1": 2.5, **_BATCHES}, start_s=3.0),
    Case("1b-4", LLAMA, LLAMA_1B, 4, 4, "Q4_0", {"prefill": 2.0, "decode 1": 1.3, **_BATCHES}, 0.85, start_s=5.0),
    Case("1b-3", LLAMA, LLAMA_1B, 3, 4, "Q3_K_S", {"prefill": 2.0, "decode 1": 1.7, **_BATCHES}, 0.80),
    Case("1b-2", LLAMA, LLAMA_1B, 2, 4, "Q2_K", {"prefill": 2.0, "decode 1": 2.0, **_BATCHES}, 0.75),
)


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn.

    tok_s           tokens per second by work: prefill, decode 1, decode 8, ...
    start_s         of a process that answers with one token
    token_bytes     of weights read for a token at batch 1
    bandwidth_gb_s  read bandwidth measured in the turn; 0 for llama.cpp
    tape_share      part of the decode step at batch 1 that was native code without Python; 0 for llama.cpp
    packed_bytes    weights and KV cache that dibit held; 0 for llama.cpp
    """

    case: str
    side: Side
    repeat: int
    tok_s: Mapping[str, float]
    start_s: float
    peak_rss_bytes: int
    token_bytes: float
    bandwidth_gb_s: float = 0.0
    tape_share: float = 0.0
    packed_bytes: int = 0


@dataclass(frozen=True)
class Row:
    """A work of a case: medians of both sides, and whether it is what was wanted.

    ratio  median over the turns of dibit's figure over llama.cpp's
    goal   what was wanted, "" where nothing was
    met    None where nothing was wanted
    """

    case: str
    model: str
    bits: int
    type: str
    work: str
    unit: str
    dibit: float
    llama_cpp: float
    ratio: float
    goal: str
    met: bool | None


def rows_of(case: Case, turns: Sequence[Turn]) -> list[Row]:
    """The rows of a case, of the repeats that both sides finished."""
    ours = {turn.repeat: turn for turn in turns if turn.case == case.name and turn.side == "dibit"}
    theirs = {turn.repeat: turn for turn in turns if turn.case == case.name and turn.side == "llama.cpp"}
    pairs = [(ours[repeat], theirs[repeat]) for repeat in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return []

    def row(
        work: str, unit: str, value: Callable[[Turn], float], *, goal: str = "", reached: Callable[[Row], bool]
    ) -> Row:
        values = [(value(one), value(other)) for one, other in pairs]
        found = Row(
            case=case.name,
            model=case.model,
            bits=case.bits,
            type=case.type,
            work=work,
            unit=unit,
            dibit=statistics.median(one for one, _ in values),
            llama_cpp=statistics.median(other for _, other in values),
            ratio=statistics.median(one / other if other else 0.0 for one, other in values),
            goal=goal,
            met=None,
        )
        return replace(found, met=reached(found) if goal else None)

    def speed(work: str) -> Row:
        wanted = case.goals.get(work, 0.0)
        return row(
            work,
            "tok/s",
            lambda turn: turn.tok_s[work],
            goal=f">= {wanted:g} x" if wanted else "",
            reached=lambda found: found.ratio >= wanted,
        )

    bandwidth = statistics.median(one.bandwidth_gb_s for one, _ in pairs)
    most = statistics.median(one.packed_bytes for one, _ in pairs) + _EXTRA_MEMORY
    return [
        *(speed(work) for work in pairs[0][0].tok_s if work in pairs[0][1].tok_s),
        row(
            "share of bandwidth",
            "%",
            # One bandwidth for both: the turns in which it was measured lie beside those in which it was not.
            lambda turn: turn.tok_s["decode 1"] * turn.token_bytes / bandwidth / 1e7,
            goal=f">= {case.bandwidth:.0%}" if case.bandwidth else "",
            reached=lambda found: found.dibit >= case.bandwidth * 100,
        ),
        row("weights per token", "MB", lambda turn: turn.token_bytes / 1e6, reached=lambda found: True),
        row(
            "step in the tape",
            "%",
            lambda turn: turn.tape_share * 100,
            goal=">= 97%",
            reached=lambda found: found.dibit >= 97,
        ),
        row(
            "start to first token",
            "s",
            lambda turn: turn.start_s,
            goal=f"< {case.start_s:g} s" if case.start_s else "",
            reached=lambda found: found.dibit < case.start_s,
        ),
        row(
            "peak memory",
            "MB",
            lambda turn: turn.peak_rss_bytes / 1e6,
            goal=f"<= {most / 1e6:.0f} MB",
            reached=lambda found: found.dibit <= most / 1e6,
        ),
    ]


def format_rows(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| model | bits | llama.cpp | work | unit | dibit | llama.cpp | ratio | to reach | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        theirs = _short(row.llama_cpp) if row.llama_cpp else "–"
        ratio = f"{row.ratio:.2f}" if row.llama_cpp else "–"
        lines.append(
            f"| {row.model} | {row.bits} | {row.type} | {row.work} | {row.unit} | {_short(row.dibit)} | {theirs} | "
            f"{ratio} | {row.goal} | {'' if row.met is None else 'yes' if row.met else 'no'} |"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
