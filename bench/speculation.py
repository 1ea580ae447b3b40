"""What guessing ahead brings: acceptance and speed on prompts whose answers repeat them, and on others.

    python -m dibit.bench.speculation MODEL --json bench/results/speculation.json
    python -m dibit.bench.speculation MODEL --draft-model SMALLER

Two engines hold the model, one that guesses and one that does not. They answer every prompt in turns, greedily, one
request at a time; a ratio is of two answers given one after the other. Decoding is timed alone, from the first token
on. Every answer must be the same on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dibit.bench.machine import MachineFacts, machine_facts
from dibit.bench.speculation_prompts import KINDS, Kind
from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError, DibitError, RequestError
from dibit.server.output import emit


@dataclass(frozen=True)
class Turn:
    """A prompt answered by both engines, one after the other; tokens per second of decoding."""

    kind: str
    prompt: int
    prompt_tokens: int
    tokens: int
    off_tok_s: float
    on_tok_s: float
    drafts: int
    drafted: int
    accepted: int
    same: bool


@dataclass(frozen=True)
class KindResult:
    """Over all turns of a kind: medians of speeds, the median of ratios, sums of counts.

    acceptance       share of the drafted tokens that stood
    tokens_per_step  that a verifying step brought
    drafted_share    share of the tokens that came of verifying steps
    """

    kind: str
    tokens: int
    off_tok_s: float
    on_tok_s: float
    speed_up: float
    drafted: int
    accepted: int
    acceptance: float
    tokens_per_step: float
    drafted_share: float


@dataclass(frozen=True)
class SpeculationResult:
    model: str
    speculative: str
    draft_model: str | None
    num_speculative_tokens: int
    max_tokens: int
    repeats: int
    kinds: tuple[KindResult, ...]
    turns: tuple[Turn, ...]
    machine: MachineFacts

    def text(self) -> str:
        """The table, and what differed."""
        lines = [
            f"{self.machine.line()}; {self.model}\n",
            "| prompts | off tok/s | on tok/s | speed-up | drafted | accepted | tokens per such step | of all tokens |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r.kind} | {r.off_tok_s:.1f} | {r.on_tok_s:.1f} | {r.speed_up:.2f} | {r.drafted} | "
            f"{r.acceptance:.0%} | {r.tokens_per_step:.2f} | {r.drafted_share:.0%} |"
            for r in self.kinds
        ]
        differ = [f"{turn.kind} {turn.prompt}" for turn in self.turns if not turn.same]
        return "\n".join([*lines, *([f"ANSWERS DIFFER: {', '.join(differ)}"] if differ else [])])


@dataclass(frozen=True)
class _Answer:
    token_ids: list[int]
    decode_s: float
    drafts: int
    drafted: int
    accepted: int

    @property
    def tok_s(self) -> float:
        return (len(self.token_ids) - 1) / self.decode_s


def compare(
    model: str, config: EngineConfig, *, kinds: Sequence[Kind] = KINDS, max_tokens: int, repeats: int
) -> SpeculationResult:
    """`config` is that of the engine that guesses. Raises ConfigError."""
    if config.speculative == "off" or max_tokens < 2 or repeats < 1:
        raise ConfigError("one engine has to guess, over at least two tokens and one repeat")
    plain = dataclasses.replace(config, speculative="off", draft_model=None)
    cores = (build_core(model, plain), build_core(model, config))
    for core in cores:
        _answer(core, _encode(core, kinds[0].prompts[0]), max_tokens=max_tokens)
    turns = []
    for repeat in range(repeats):
        for kind in kinds:
            for number, text in enumerate(kind.prompts):
                turns.append(_turn(cores, kind.name, number, text, max_tokens=max_tokens, on_first=repeat % 2 == 1))
    return SpeculationResult(
        model=model,
        speculative=config.speculative,
        draft_model=config.draft_model,
        num_speculative_tokens=config.num_speculative_tokens,
        max_tokens=max_tokens,
        repeats=repeats,
        kinds=tuple(summarize(kind.name, [turn for turn in turns if turn.kind == kind.name]) for kind in kinds),
        turns=tuple(turns),
        machine=machine_facts(),
    )


def summarize(kind: str, turns: Sequence[Turn]) -> KindResult:
    """Figures of the turns of one kind; answers of a single token have no speed."""
    drafts, drafted, accepted, tokens = (
        sum(getattr(turn, name) for turn in turns) for name in ("drafts", "drafted", "accepted", "tokens")
    )
    timed = [turn for turn in turns if turn.tokens > 1]
    if not timed:
        raise ConfigError(f"no answer to a {kind} prompt has more than one token; nothing can be timed")
    return KindResult(
        kind=kind,
        tokens=tokens,
        off_tok_s=statistics.median(turn.off_tok_s for turn in timed),
        on_tok_s=statistics.median(turn.on_tok_s for turn in timed),
        speed_up=statistics.median(turn.on_tok_s / turn.off_tok_s for turn in timed),
        drafted=drafted,
        accepted=accepted,
        acceptance=accepted / drafted if drafted else 0.0,
        tokens_per_step=(drafts + accepted) / drafts if drafts else 0.0,
        drafted_share=(drafts + accepted) / tokens,
    )


def _turn(
    cores: tuple[EngineCore, EngineCore], kind: str, number: int, text: str, *, max_tokens: int, on_first: bool
) -> Turn:
    prompt_ids = _encode(cores[0], text)
    order = (1, 0) if on_first else (0, 1)
    found = {which: _answer(cores[which], prompt_ids, max_tokens=max_tokens) for which in order}
    off, on = found[0], found[1]
    single = len(on.token_ids) < 2
    return Turn(
        kind=kind,
        prompt=number,
        prompt_tokens=len(prompt_ids),
        tokens=len(on.token_ids),
        off_tok_s=0.0 if single else off.tok_s,
        on_tok_s=0.0 if single else on.tok_s,
        drafts=on.drafts,
        drafted=on.drafted,
        accepted=on.accepted,
        same=off.token_ids == on.token_ids,
    )


def _answer(core: EngineCore, prompt_ids: Sequence[int], *, max_tokens: int) -> _Answer:
    before = core.stats().speculation
    fitting = min(max_tokens, core.max_model_len - len(prompt_ids))
    core.add_request("answer", prompt_ids, SamplingParams(temperature=0.0, max_tokens=fitting))
    token_ids: list[int] = []
    first_s = time.perf_counter()
    while core.has_work:
        for output in core.step():
            if output.error is not None:
                raise ConfigError(f"the model failed: {output.error}")
            token_ids += output.token_ids
        if len(token_ids) == 1:
            first_s = time.perf_counter()
    decode_s = time.perf_counter() - first_s
    after = core.stats().speculation
    return _Answer(
        token_ids,
        decode_s,
        drafts=after.drafts - before.drafts,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
    )


def _encode(core: EngineCore, text: str) -> list[int]:
    """As a chat where the model has a template for it."""
    try:
        return core.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    except RequestError:
        return core.tokenizer.encode(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance and speed-up of speculation.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--draft-model", help="guess with this model instead of prompt lookup")
    parser.add_argument("--num-speculative-tokens", type=int, default=EngineConfig.num_speculative_tokens)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write every turn to this file")
    asked = parser.parse_args()
    try:
        config = EngineConfig(
            speculative="ngram" if asked.draft_model is None else "draft",
            draft_model=asked.draft_model,
            num_speculative_tokens=asked.num_speculative_tokens,
            threads=asked.threads,
            max_model_len=asked.max_model_len,
            max_num_seqs=1,
            prefix_cache=False,
        )
        result = compare(asked.model, config, max_tokens=asked.max_tokens, repeats=asked.repeats)
    except DibitError as error:
        sys.exit(f"speculation: {error}")
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
    emit(result, None if asked.json is None else str(asked.json))


if __name__ == "__main__":
    main()
