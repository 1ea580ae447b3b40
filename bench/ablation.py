"""Stages of the quantizer one by one: the first blocks quantized, all others in float, and what that does.

    python -m dibit.bench.ablation --calibration wiki.valid.txt --test wiki.test.raw

Every stage stands beside the one that it changes (`base`), with the same calibration text, over two seeds: the
divergence of the predictions from the float model's and their perplexity, on text that nothing learned from, and the
seconds that it took. A few blocks tell stages apart in a fiftieth of the time of whole models; bench/quality.py has
those. The file of results is written after every stage, and what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.bench.figures import RESULTS
from dibit.bench.machine import machine_facts
from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.errors import DibitError
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import Block, load_embedding, load_head
from dibit.engine.models.weights import read_tensor
from dibit.engine.tokenizer import Tokenizer, load_tokenizer
from dibit.kernels.formats import Format, ZeroGrid
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.block import BlockJob, quantize_block
from dibit.quantize.calibration import Calibration, load_segments
from dibit.quantize.divergence import compare
from dibit.quantize.fisher import FISHER_NAME, stored_token_weights
from dibit.quantize.importance import Model, Text
from dibit.quantize.methods import make_method
from dibit.quantize.streams import HiddenStates, StreamConfig, advance
from dibit.server.options import parse_integers
from dibit.server.output import write_json

BATCH = 4
SETTINGS = ("bits", "group_size", "blocks", "samples", "windows", "length")


@dataclass(frozen=True)
class Stage:
    """`method` with `options`; what it adds to the stage named `base`."""

    name: str
    base: str | None
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    zero_grid: ZeroGrid = "integer"


_PAPER = {"range_search": False, "static_groups": False, "act_order": False, "refit": False}
_RECIPE = {"asymmetric": True}
# Rates for little text, as in quality.py.
_TRAINED = {"steps": 45, "weight_rate": 0.012, "scale_rate": 0.005, "zero_rate": 0.01}
STAGES = (
    Stage("gptq, the paper's", None, "gptq", _PAPER),
    Stage("refit", "gptq, the paper's", "gptq", {**_PAPER, "refit": True}),
    Stage("range search, static groups", "refit", "gptq", {"act_order": False}),
    Stage("columns by importance", "range search, static groups", "gptq"),
    Stage("asymmetric", "columns by importance", "gptq", _RECIPE),
    Stage("fractional zero points", "asymmetric", "gptq", _RECIPE, "fractional"),
    Stage(
        "errors relative to the token", "fractional zero points", "gptq", {**_RECIPE, "relative": True}, "fractional"
    ),
    Stage("fisher weights", "fractional zero points", "gptq", {**_RECIPE, "fisher": True}, "fractional"),
    Stage("permuted", "fractional zero points", "gptq", {**_RECIPE, "rearrange": "permute"}, "fractional"),
    Stage("rotated", "fractional zero points", "gptq", {**_RECIPE, "rearrange": "rotate"}, "fractional"),
    Stage("block-ap from rounding", None, "block-ap", {**_TRAINED, "start": "rtn"}, "fractional"),
    Stage("block-ap from gptq", "fractional zero points", "block-ap", {**_TRAINED, "start": "gptq"}, "fractional"),
    Stage(
        "codes settle",
        "block-ap from gptq",
        "block-ap",
        {**_TRAINED, "start": "gptq", "settle": 0.5},
        "fractional",
    ),
)


@dataclass(frozen=True)
class Found:
    """kl in nats a token, ppl, both over the test tokens; seconds of quantizing."""

    stage: str
    base: str | None
    seed: int
    kl: float
    ppl: float
    seconds: float


class Judge:
    """The float model and test tokens [windows, length], to see what changed first blocks do to its predictions."""

    def __init__(self, model: Model, tokens: Tensor, *, blocks: int, directory: Path) -> None:
        self.model, self.tokens, self.blocks = model, tokens, blocks
        self._directory = directory
        self._rest = [model.block(layer) for layer in range(blocks, model.sizes.layers)]
        self._tables = model.sizes.rope.tables(tokens.shape[1])

    def stream(self, tokens: Tensor) -> HiddenStates:
        """The embedded tokens."""
        sizes = self.model.sizes
        samples, length = tokens.shape
        made = HiddenStates(samples, length, sizes.hidden, config=StreamConfig(), directory=self._directory)
        made.embed(self._embedding, tokens)
        return made

    def final(self, first: list[Block]) -> Tensor:
        """Hidden states [windows, length, hidden] behind `first` and the float blocks after them, normalized."""
        stream = self.stream(self.tokens)
        for block in (*first, *self._rest):
            advance(stream, block, *self._tables, batch=BATCH)
        [(_, x)] = stream.batches(self.tokens.shape[0])
        return rms_norm_reference(x, self._norm, self.model.sizes.norm_eps)

    def judge(self, first: list[Block]) -> tuple[float, float]:
        """Mean divergence from the float model, and perplexity."""
        kl, nll = [], []
        for own, float_own, ids in zip(self.final(first), self._reference, self.tokens, strict=True):
            found = compare(float_own[:-1] @ self._head.T, own[:-1] @ self._head.T, ids[1:])
            kl.append(float(found.kl.mean()))
            nll.append(-float(found.model.mean()))
        return math.fsum(kl) / len(kl), math.exp(math.fsum(nll) / len(nll))

    @cached_property
    def _reference(self) -> Tensor:
        return self.final([self.model.block(layer) for layer in range(self.blocks)])

    @cached_property
    def _embedding(self) -> Tensor:
        return load_embedding(self.model.checkpoint, self.model.arch, self.model.sizes)

    @cached_property
    def _head(self) -> Tensor:
        return load_head(self.model.checkpoint, self.model.arch, self.model.sizes)

    @cached_property
    def _norm(self) -> Tensor:
        arch, sizes = self.model.arch, self.model.sizes
        return read_tensor(self.model.checkpoint, f"{arch.final_norm}.weight", (sizes.hidden,))


def quantized_blocks(
    judge: Judge, stage: Stage, tokens: Tensor, *, bits: int, group_size: int, seed: int, directory: Path
) -> list[Block]:
    """The first blocks as `stage` quantizes them from tokens [samples, length]."""
    model, method = judge.model, make_method(stage.method, stage.options)
    form = Format(bits, group_size, zero_grid=stage.zero_grid)
    weights = None
    if "token_weights" in method.needs:
        text = Text(tokens, StreamConfig(), directory)
        weights = stored_token_weights(directory / f"{seed}-{FISHER_NAME}", model, text, seed=seed)
    cos, sin = model.sizes.rope.tables(tokens.shape[1])
    quantized, float_stream = judge.stream(tokens), judge.stream(tokens)
    made = []
    for layer in range(judge.blocks):
        block, sites = model.block(layer), model.sites(layer)
        float_outputs = float_stream.empty_like()
        advance(float_stream, model.block(layer), cos, sin, batch=BATCH, into=float_outputs)
        job = BlockJob(
            layer=layer,
            block=block,
            sites=sites,
            formats={site.name: form for site in sites},
            quantized=quantized,
            float_stream=float_stream,
            float_outputs=float_outputs,
            cos=cos,
            sin=sin,
            batch=BATCH,
            seed=seed,
            token_weights=None if weights is None else weights.of_block(layer, sites),
        )
        quantize_block(job, method, name=stage.method, progress=lambda note: None)
        advance(quantized, block, cos, sin, batch=BATCH)
        float_stream = float_outputs
        made.append(block)
    return made


def table(found: list[Found]) -> str:
    """Means over seeds, and of each stage its change to its base, seed by seed."""
    by_name = {(one.stage, one.seed): one for one in found}
    seeds = sorted({one.seed for one in found})
    lines = [
        "| stage | beside | KL | " + " | ".join(f"change, seed {seed}" for seed in seeds) + " | perplexity | seconds |"
    ]
    lines.append("| --- | --- | --- | " + "--- | " * len(seeds) + "--- | --- |")
    for stage in STAGES:
        own = [by_name[stage.name, seed] for seed in seeds if (stage.name, seed) in by_name]
        if not own:
            continue
        changes = []
        for seed in seeds:
            one, base = by_name.get((stage.name, seed)), by_name.get((stage.base or "", seed))
            changes.append("" if one is None or base is None else f"{one.kl / base.kl - 1:+.0%}")
        kl, ppl, seconds = (sum(getattr(one, name) for one in own) / len(own) for name in ("kl", "ppl", "seconds"))
        cells = [stage.name, stage.base or "", f"{kl:.3f}", *changes, f"{ppl:.2f}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stages of the quantizer one by one, on the first blocks of a model.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=Path, help="text that is learned from")
    parser.add_argument("--test", type=Path, help="text for divergence and perplexity")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and end")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in SETTINGS}
    earlier: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "found": []}
    )
    found = [Found(**one) for one in earlier["found"]]
    if not args.table:
        if args.calibration is None or args.test is None:
            parser.error("--calibration and --test are needed to measure; --table prints what there is")
        if earlier["settings"] != settings:
            parser.error(f"{args.out} is of other settings, {earlier['settings']}; give these, or another --out")
        try:
            measure(args, settings, found)
        except DibitError as error:
            sys.exit(f"ablation: {error}")
    print(table(found))


def measure(args: argparse.Namespace, settings: Mapping[str, Any], found: list[Found]) -> None:
    done = {(one.stage, one.seed) for one in found}
    with closing(open_checkpoint(resolve_model(args.model))) as source, tempfile.TemporaryDirectory() as scratch:
        model = Model(source, *resolve_arch(source.config))
        tokenizer: Tokenizer = load_tokenizer(source)
        drawn = Calibration(args.test, args.windows, args.length, 0)
        test = load_segments(drawn, tokenizer.encode).tokens
        with torch.no_grad():
            judge = Judge(model, test, blocks=args.blocks, directory=Path(scratch))
        for seed in parse_integers(args.seeds):
            text = Calibration(args.calibration, args.samples, args.length, seed)
            tokens = load_segments(text, tokenizer.encode).tokens
            for stage in STAGES:
                if (stage.name, seed) in done:
                    continue
                print(f"{stage.name}, seed {seed}", file=sys.stderr, flush=True)
                began = time.monotonic()
                blocks = quantized_blocks(
                    judge,
                    stage,
                    tokens,
                    bits=args.bits,
                    group_size=args.group_size,
                    seed=seed,
                    directory=Path(scratch),
                )
                seconds = time.monotonic() - began
                with torch.no_grad():
                    kl, ppl = judge.judge(blocks)
                found.append(Found(stage.name, stage.base, seed, kl, ppl, seconds))
                record = {
                    "settings": settings,
                    "machine": asdict(machine_facts()),
                    "found": [asdict(one) for one in found],
                }
                write_json(record, str(args.out))


if __name__ == "__main__":
    main()
