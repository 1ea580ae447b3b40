"""Stages of the quantizer one by one: the first blocks quantized, all others in float, and what that does.

    python -m dibit.bench.ablation --calibration wiki.valid.txt --test wiki.test.raw

Every stage stands beside the one that it changes (`base`), with the same calibration text, over two seeds: the
divergence of the predictions from the float model's and their perplexity, on text that nothing learned from, and the
seconds that it took. A few blocks tell stages apart in a part of the time; bench/quality.py has whole models. The file
of results is written after every stage, and what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.bench.figures import RESULTS
from dibit.bench.machine import machine_facts
from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.errors import DibitError
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import Block
from dibit.engine.tokenizer import Tokenizer, load_tokenizer
from dibit.kernels.formats import Format, ZeroGrid
from dibit.quantize.block import BlockJob, quantize_block
from dibit.quantize.calibration import Calibration, load_segments
from dibit.quantize.divergence import compare
from dibit.quantize.fisher import FISHER_NAME, stored_token_weights
from dibit.quantize.importance import Model, Text, embedded, predictor
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
    """The float model and a test text, to see what changed first blocks do to its predictions."""

    def __init__(self, model: Model, text: Text, *, blocks: int) -> None:
        self._model, self._text = model, text
        self._rest = [model.block(layer) for layer in range(blocks, model.sizes.layers)]
        self._tables = model.sizes.rope.tables(text.tokens.shape[1])
        self._logits = predictor(model)
        self._reference = self._final([model.block(layer) for layer in range(blocks)])

    def _final(self, first: list[Block]) -> Tensor:
        """Hidden states [windows, length, hidden] behind `first` and the float blocks after them."""
        stream = embedded(self._model, self._text)
        for block in (*first, *self._rest):
            advance(stream, block, *self._tables, batch=BATCH)
        [(_, x)] = stream.batches(self._text.tokens.shape[0])
        return x

    def judge(self, first: list[Block]) -> tuple[float, float]:
        """Mean divergence from the float model, and perplexity."""
        kl, nll = [], []
        for own, float_own, ids in zip(self._final(first), self._reference, self._text.tokens, strict=True):
            found = compare(self._logits(float_own[:-1]), self._logits(own[:-1]), ids[1:])
            kl.append(float(found.kl.mean()))
            nll.append(-float(found.model.mean()))
        return math.fsum(kl) / len(kl), math.exp(math.fsum(nll) / len(nll))


def float_streams(model: Model, text: Text, *, blocks: int) -> list[HiddenStates]:
    """What enters each of the first blocks of the float model, and what leaves the last of them."""
    tables = model.sizes.rope.tables(text.tokens.shape[1])
    streams = [embedded(model, text)]
    for layer in range(blocks):
        streams.append(streams[-1].empty_like())
        advance(streams[-2], model.block(layer), *tables, batch=BATCH, into=streams[-1])
    return streams


def quantized_blocks(
    model: Model, stage: Stage, text: Text, floats: Sequence[HiddenStates], *, bits: int, group_size: int, seed: int
) -> list[Block]:
    """The first blocks as `stage` quantizes them from `text`; `floats` are its `float_streams`."""
    method = make_method(stage.method, stage.options)
    form = Format(bits, group_size, zero_grid=stage.zero_grid)
    weights = None
    if "token_weights" in method.needs:
        weights = stored_token_weights(text.directory / f"{seed}-{FISHER_NAME}", model, text, seed=seed)
    cos, sin = model.sizes.rope.tables(text.tokens.shape[1])
    quantized = embedded(model, text)
    made = []
    for layer, (float_stream, float_outputs) in enumerate(pairwise(floats)):
        block, sites = model.block(layer), model.sites(layer)
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

        def text_of(file: Path, samples: int, seed: int) -> Text:
            drawn = Calibration(file, samples, args.length, seed)
            return Text(load_segments(drawn, tokenizer.encode).tokens, StreamConfig(), Path(scratch))

        with torch.no_grad():
            judge = Judge(model, text_of(args.test, args.windows, 0), blocks=args.blocks)
        for seed in parse_integers(args.seeds):
            text = text_of(args.calibration, args.samples, seed)
            floats = float_streams(model, text, blocks=args.blocks)
            for stage in STAGES:
                if (stage.name, seed) in done:
                    continue
                print(f"{stage.name}, seed {seed}", file=sys.stderr, flush=True)
                began = time.monotonic()
                blocks = quantized_blocks(
                    model, stage, text, floats, bits=args.bits, group_size=args.group_size, seed=seed
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
