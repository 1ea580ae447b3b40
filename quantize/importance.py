"""How much each block of the model matters, so that bits can go where they are needed.

Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan and Surdeanu, "Layer-Wise Quantization: A Pragmatic and Effective
Method for Quantizing LLMs Beyond Integer Bit-Levels", 2024, rank whole blocks by one of two scores:

    LIM   -cos(h_in, h_out), the hidden states that enter and leave the block: a block that turns them far matters.
          The mean over tokens, since first tokens carry activations that would drown all others; and taken at the
          block's own output, as behind the final norm the last block would seem to turn everything.
    ZD    minus the share of the block's weights more than one standard deviation above their mean, without any
          text: a block with few large weights matters.

Both say nothing about rounding itself. `error` and `measured` round one block at a time to each low width and look:
at the squared error of the block's output over its squared norm, token by token, or at the divergence of the model's
predictions, KL(float ‖ one block rounded). For the latter as many copies of the hidden states as there are blocks and
widths travel through the model together, so that every block is read once, and memory holds one block and the copies.
`fisher` estimates the same divergence from gradients (fisher.py), for every site of every block at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.models.decoder import Block, FloatLinear, load_embedding, load_float_block, load_head
from dibit.engine.models.spec import Arch, LinearSite, Sizes, sites
from dibit.engine.models.weights import read_float_site, read_tensor
from dibit.kernels.formats import Format, dequantize
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.stats import Stats
from dibit.quantize.streams import HiddenStates, StreamConfig, advance

ImportanceKind = Literal["lim", "zd", "measured", "error", "fisher", "depth", "random"]
IMPORTANCES: tuple[ImportanceKind, ...] = get_args(ImportanceKind)
NEED_TEXT: frozenset[ImportanceKind] = frozenset({"lim", "measured", "error", "fisher"})

# A hidden state of zeros has no relative error.
TINY = 1e-30

# Rows of logits that exist at a time, each as long as the vocabulary.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class Importance:
    """
    kind    what was computed
    scores  one per block, or per site; the higher, the sooner it gets more bits
    damage  what rounding each block alone to a width costs, by width; empty where it was not measured
    """

    kind: ImportanceKind
    scores: tuple[float, ...]
    damage: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def order(self, *, reverse: bool = False) -> tuple[int, ...]:
        """Numbers from the most important on (with `reverse`, from the least); equal ones from the first on."""
        sign = 1 if reverse else -1
        return tuple(sorted(range(len(self.scores)), key=lambda i: (sign * self.scores[i], i)))


@dataclass(frozen=True)
class Model:
    """A float model to be looked at."""

    checkpoint: Checkpoint
    arch: Arch
    sizes: Sizes

    def block(self, layer: int) -> Block:
        return load_float_block(self.checkpoint, self.arch, self.sizes, layer)

    def sites(self, layer: int) -> tuple[LinearSite, ...]:
        return sites(self.arch, self.sizes, layer)


@dataclass(frozen=True)
class Text:
    """Tokens [samples, length], and how their hidden states are kept; files of them go to `directory`."""

    tokens: Tensor
    streams: StreamConfig
    directory: Path


def rank_blocks(
    kind: ImportanceKind,
    model: Model,
    *,
    text: Text | None = None,
    formats: Sequence[Format] = (),
    symmetric: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Scores of kind `kind` for every block; those of "fisher" come from choose.py.

    text       for the kinds in NEED_TEXT
    formats    to which "error" and "measured" round, the lowest first; the scores are those of the first
    symmetric  of that rounding
    seed       of "random"
    progress   called with the number of each block
    """
    tell = progress or (lambda layer: None)
    layers = model.sizes.layers
    if kind == "depth":
        return Importance(kind, tuple(-float(layer) for layer in range(layers)))
    if kind == "random":
        scores = list(map(float, range(layers)))
        random.Random(seed).shuffle(scores)
        return Importance(kind, tuple(scores))
    if kind == "zd":
        return Importance(kind, tuple(_zd(model, layer, tell) for layer in range(layers)))
    if text is None or kind == "fisher":
        raise TypeError("fisher is computed in choose.py" if kind == "fisher" else f"{kind} needs text")
    with torch.inference_mode():
        if kind == "lim":
            return Importance(kind, _lim(model, text, tell))
        damage = _damage(model, text, formats, symmetric=symmetric, predictions=kind == "measured", tell=tell)
    return Importance(kind, damage[formats[0].bits], damage)


def _zd(model: Model, layer: int, tell: Callable[[int], None]) -> float:
    tell(layer)
    weights = [read_float_site(model.checkpoint, site) for site in model.sites(layer)]
    count = sum(w.numel() for w in weights)
    mean = math.fsum(float(w.sum(dtype=torch.float64)) for w in weights) / count
    square = math.fsum(float((w.double() - mean).square_().sum()) for w in weights) / count
    bound = mean + math.sqrt(square)
    return -sum(int((w.double() > bound).sum()) for w in weights) / count


def _lim(model: Model, text: Text, tell: Callable[[int], None]) -> tuple[float, ...]:
    stream = embedded(model, text)
    cos, sin = model.sizes.rope.tables(text.tokens.shape[1])
    scores = []
    for layer in range(model.sizes.layers):
        tell(layer)
        block = model.block(layer)
        total = 0.0
        for start, x in stream.batches(1):
            y = block.dense(x, cos, sin)
            total += float(F.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
            stream.write(start, y)
        scores.append(-total / text.tokens.numel())
    return tuple(scores)


def _damage(
    model: Model,
    text: Text,
    formats: Sequence[Format],
    *,
    symmetric: bool,
    predictions: bool,
    tell: Callable[[int], None],
) -> dict[int, tuple[float, ...]]:
    """By width, for every block: the error of its output, or with `predictions` the divergence of the model's."""
    # One stream of the float model and, for the predictions, one for each block and width.
    copies = 1 + (model.sizes.layers * len(formats) if predictions else 0)
    share = StreamConfig(text.streams.stream_type, text.streams.memory_bytes // copies)
    text = Text(text.tokens, share, text.directory)
    stream = embedded(model, text)
    rounded: dict[tuple[int, int], HiddenStates] = {}
    errors: dict[tuple[int, int], float] = {}
    cos, sin = model.sizes.rope.tables(text.tokens.shape[1])
    for layer in range(model.sizes.layers):
        tell(layer)
        block = model.block(layer)
        for other in rounded.values():
            advance(other, block, cos, sin, batch=1)
        for low_bit in formats:
            low = _round(model.block(layer), model.sites(layer), low_bit, symmetric=symmetric)
            if predictions:
                rounded[low_bit.bits, layer] = _stream(model, text)
                advance(stream, low, cos, sin, batch=1, into=rounded[low_bit.bits, layer])
            else:
                errors[low_bit.bits, layer] = _output_error(stream, block, low, cos, sin)
            del low
        advance(stream, block, cos, sin, batch=1)
    if predictions:
        errors = _divergences(model, stream, rounded)
    widths = [low_bit.bits for low_bit in formats]
    return {bits: tuple(errors[bits, layer] for layer in range(model.sizes.layers)) for bits in widths}


def _round(block: Block, sites: Sequence[LinearSite], format: Format, *, symmetric: bool) -> Block:
    for site in sites:
        linear = cast(FloatLinear, block.linears[site.key])
        weight = dequantize(RTN(symmetric=symmetric).quantize(linear.weight, format, Stats()))
        block.linears[site.key] = FloatLinear(weight, linear.bias)
    return block


def _output_error(stream: HiddenStates, block: Block, low: Block, cos: Tensor, sin: Tensor) -> float:
    """Each token weighs the same, or the huge states of a few would be all that counts."""
    total, tokens = 0.0, 0
    for _, x in stream.batches(1):
        y = block.dense(x, cos, sin)
        error = (low.dense(x, cos, sin) - y).double().square().sum(dim=-1)
        total += float((error / y.double().square().sum(dim=-1).clamp_min(TINY)).sum())
        tokens += x.shape[0] * x.shape[1]
    return total / tokens


def _divergences(
    model: Model, stream: HiddenStates, rounded: Mapping[tuple[int, int], HiddenStates]
) -> dict[tuple[int, int], float]:
    """Mean KL(float ‖ rounded) of the next-token distribution, in nats."""
    logits = predictor(model)

    def log_probabilities(x: Tensor) -> Tensor:
        return F.log_softmax(logits(x), dim=-1)

    totals = dict.fromkeys(rounded, 0.0)
    others = {key: other.batches(1) for key, other in rounded.items()}
    tokens = 0
    for _, x in stream.batches(1):
        pieces = torch.split(x[0], LOGIT_ROWS)
        tokens += x.shape[1]
        seen = {key: torch.split(next(batches)[1][0], LOGIT_ROWS) for key, batches in others.items()}
        for i, piece in enumerate(pieces):
            reference = log_probabilities(piece)
            for key, other in seen.items():
                divergence = F.kl_div(log_probabilities(other[i]), reference, reduction="sum", log_target=True)
                totals[key] += float(divergence)
    return {key: total / tokens for key, total in totals.items()}


def predictor(model: Model) -> Callable[[Tensor], Tensor]:
    """Final norm and head: hidden states behind the last block [.., hidden] -> logits [.., vocab]."""
    sizes = model.sizes
    norm = read_tensor(model.checkpoint, f"{model.arch.final_norm}.weight", (sizes.hidden,))
    head = load_head(model.checkpoint, model.arch, sizes)
    return lambda x: F.linear(rms_norm_reference(x, norm, sizes.norm_eps), head)


def _stream(model: Model, text: Text) -> HiddenStates:
    samples, length = text.tokens.shape
    return HiddenStates(samples, length, model.sizes.hidden, config=text.streams, directory=text.directory)


def embedded(model: Model, text: Text) -> HiddenStates:
    """The text as it enters the first block."""
    stream = _stream(model, text)
    stream.embed(load_embedding(model.checkpoint, model.arch, model.sizes), text.tokens)
    return stream
