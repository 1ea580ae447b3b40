"""What an error at each output of a linear costs the float model, from one pass forward and back.

Near the float model the divergence of the predictions, KL(float ‖ changed), is half of E (g · Δy)², where Δy is the
change of a linear's output and g the gradient, at that output, of the loss on tokens that the model itself draws: the
Fisher information (Kim et al., "GuidedQuant", ICML 2025; Tseng et al., "YAQA", 2025, use it to weight Hessians). The
pass goes block by block: forward, keeping the hidden states before every block; then back, from the last block to the
first, each computed again from its stored input. Memory holds one block and the streams, and those go to files when
they are large.

Two things are made of it: weights of the calibration tokens, for GPTQ's Hessians and for training losses, and the
damage that rounding a site to a width does, for maps of bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models.decoder import FloatLinear, Linear, load_embedding, load_head
from dibit.engine.models.spec import LinearSite
from dibit.engine.models.weights import read_tensor
from dibit.kernels.formats import Format, dequantize
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.grid import search_grid
from dibit.quantize.importance import LOGIT_ROWS, Model, Text
from dibit.quantize.streams import HiddenStates, StreamConfig

logger = logging.getLogger(__name__)

# Not .safetensors: the writer of checkpoints owns those.
FISHER_NAME = "token_weights.st"
# Of squared gradients the few largest, mostly at first tokens, would be all that counts.
CLIP_QUANTILE = 0.999
# The rest is the same for every token: gradients of little text are noisy.
STRENGTH = 0.5

Tell = Callable[[int], None]


class Visitor(Protocol):
    """Sees every site of a block, for some segments at a time; the last block comes first."""

    def block(self, layer: int, sites: Sequence[LinearSite], weights: Mapping[str, Tensor]) -> None:
        """A block begins. `weights` [N, K] by site name."""
        ...

    def site(self, site: LinearSite, start: int, x: Tensor, gradient: Tensor) -> None:
        """Inputs x [B, T, K] of the segments from `start` on, and the loss's gradient [B, T, N] at the outputs."""
        ...

    def output(self, layer: int, start: int, gradient: Tensor) -> None:
        """The gradient [B, T, hidden] at the block's output."""
        ...


def visit_gradients(model: Model, text: Text, visitor: Visitor, *, seed: int, tell: Tell | None = None) -> None:
    """Run the float model over `text` forward and back. `tell(block)` before each block, on both ways."""
    tell = tell or (lambda layer: None)
    layers = model.sizes.layers
    samples, length = text.tokens.shape
    share = StreamConfig(text.streams.stream_type, text.streams.memory_bytes // (layers + 1))

    def stream(config: StreamConfig) -> HiddenStates:
        return HiddenStates(samples, length, model.sizes.hidden, config=config, directory=text.directory)

    states = [stream(share) for _ in range(layers + 1)]
    cos, sin = model.sizes.rope.tables(length)
    with torch.no_grad():
        embedding = load_embedding(model.checkpoint, model.arch, model.sizes)
        states[0].embed(embedding, text.tokens)
        for layer in range(layers):
            tell(layer)
            block = model.block(layer)
            for start, x in states[layer].batches(1):
                states[layer + 1].write(start, block.dense(x, cos, sin))
    # Gradients are far smaller than hidden states: float16 would lose them.
    gradients = stream(StreamConfig("float32", share.memory_bytes))
    _head_gradients(model, states.pop(), gradients, embedding, seed=seed)
    for layer in reversed(range(layers)):
        tell(layer)
        _back(model, layer, states.pop(), gradients, visitor, cos, sin)


def _head_gradients(
    model: Model, states: HiddenStates, gradients: HiddenStates, embedding: Tensor, *, seed: int
) -> None:
    """Of the sum of the losses, at the last block's output."""
    sizes = model.sizes
    norm = read_tensor(model.checkpoint, f"{model.arch.final_norm}.weight", (sizes.hidden,))
    head = embedding if sizes.tied_head else load_head(model.checkpoint, model.arch, sizes)
    draws = torch.Generator().manual_seed(seed)
    for start, x in states.batches(1):
        pieces = []
        for piece in torch.split(x[0], LOGIT_ROWS):
            rows = piece.clone().requires_grad_()
            logits = F.linear(rms_norm_reference(rows, norm, sizes.norm_eps), head)
            drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=draws)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            pieces.append(cast(Tensor, rows.grad))
        gradients.write(start, torch.cat(pieces)[None])


def _back(
    model: Model, layer: int, states: HiddenStates, gradients: HiddenStates, visitor: Visitor, cos: Tensor, sin: Tensor
) -> None:
    block, listed = model.block(layer), model.sites(layer)
    floats = {site.name: cast(FloatLinear, block.linears[site.key]) for site in listed}
    visitor.block(layer, listed, {name: linear.weight for name, linear in floats.items()})
    taps = {site.name: _Tap(floats[site.name]) for site in listed}
    block.linears.update({site.key: cast(Linear, taps[site.name]) for site in listed})
    others = gradients.batches(1)
    for start, x in states.batches(1):
        arriving = next(others)[1]
        visitor.output(layer, start, arriving)
        x.requires_grad_()
        block.dense(x, cos, sin).backward(arriving)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for site in listed:
                tap = taps[site.name]
                visitor.site(site, start, tap.x, cast(Tensor, tap.y.grad))
            gradients.write(start, cast(Tensor, x.grad))


class _Tap:
    x: Tensor
    y: Tensor

    def __init__(self, linear: FloatLinear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        self.x = x.detach()
        self.y = self._linear(x)
        self.y.retain_grad()
        return self.y


class TokenWeights:
    """The mean squared gradient over the outputs of every linear and block, at every token: rank-one statistics."""

    def __init__(self, samples: int, length: int) -> None:
        self._shape = (samples, length)
        self.found: dict[str, Tensor] = {}

    def block(self, layer: int, sites: Sequence[LinearSite], weights: Mapping[str, Tensor]) -> None:
        names = [f"layers.{layer}", *(part.module for site in sites for part in site.parts)]
        self.found.update((name, torch.zeros(self._shape)) for name in names)

    def site(self, site: LinearSite, start: int, x: Tensor, gradient: Tensor) -> None:
        rows = torch.split(gradient, [part.n for part in site.parts], dim=-1)
        for part, own in zip(site.parts, rows, strict=True):
            self._put(part.module, start, own)

    def output(self, layer: int, start: int, gradient: Tensor) -> None:
        self._put(f"layers.{layer}", start, gradient)

    def _put(self, name: str, start: int, gradient: Tensor) -> None:
        self.found[name][start : start + gradient.shape[0]] = gradient.square().mean(dim=-1)


class Damage:
    """What rounding each site alone costs: the mean of (g · Δy)² / 2 over tokens, in nats, by width and site name.

    A site is rounded to nearest on searched grids (grid.py), as any method that is worth the bits will do better.
    """

    def __init__(self, formats: Sequence[Format], tokens: int, *, symmetric: bool) -> None:
        self._formats, self._tokens, self._symmetric = formats, tokens, symmetric
        self.found: dict[int, dict[str, float]] = {low.bits: {} for low in formats}
        self._deltas: dict[str, list[Tensor]] = {}

    def block(self, layer: int, sites: Sequence[LinearSite], weights: Mapping[str, Tensor]) -> None:
        self._deltas = {name: [self._rounded(w, low) - w for low in self._formats] for name, w in weights.items()}

    def _rounded(self, w: Tensor, low: Format) -> Tensor:
        return dequantize(low.encode(w, *search_grid(w, low, symmetric=self._symmetric)))

    def site(self, site: LinearSite, start: int, x: Tensor, gradient: Tensor) -> None:
        for low, delta in zip(self._formats, self._deltas[site.name], strict=True):
            cost = float(((x @ delta.T) * gradient).sum(dim=-1).square().sum(dtype=torch.float64)) / 2
            found = self.found[low.bits]
            found[site.name] = found.get(site.name, 0.0) + cost / self._tokens

    def output(self, layer: int, start: int, gradient: Tensor) -> None:
        pass


def stored_token_weights(path: Path, model: Model, text: Text, *, seed: int, tell: Tell | None = None) -> StoredWeights:
    """The token weights in the file `path`, which are computed first if an earlier run has not left them there.

    Raises ConfigError when the file cannot be written.
    """
    if not path.exists():
        samples, length = text.tokens.shape
        weights = TokenWeights(samples, length)
        visit_gradients(model, text, weights, seed=seed, tell=tell)
        aside = path.with_name(path.name + ".new")
        try:
            save_file(weights.found, str(aside))
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write the weights of the tokens to {path}: {error}") from error
    return StoredWeights(path)


class StoredWeights:
    """Token weights in a file, read a block at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of_block(self, layer: int, sites: Sequence[LinearSite]) -> dict[str, Tensor]:
        """[samples, length] by module name, and by "layers.N" for the block's output; 1 on average, clipped."""
        names = [f"layers.{layer}", *(part.module for site in sites for part in site.parts)]
        with safe_open(str(self._path), framework="pt") as file:
            return {name: _normalized(file.get_tensor(name), name) for name in names}


def _normalized(found: Tensor, name: str) -> Tensor:
    if not bool(found.isfinite().all()):
        raise CheckpointError(
            f"the gradients at {name} are not finite: the weights of the checkpoint are damaged or overflow; "
            "leave the option fisher out"
        )
    # Over sorted values, as torch.quantile refuses large inputs.
    bound = found.flatten().sort().values[int((found.numel() - 1) * CLIP_QUANTILE)]
    clipped = found.clamp_max(float(bound))
    mean = clipped.mean()
    return 1 - STRENGTH + STRENGTH * clipped / mean if float(mean) > 0 else torch.ones_like(clipped)
