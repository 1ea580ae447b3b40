"""AffineQuant: OmniQuant, then matrices and rotations in place of single scales where a block's inside allows them.

Ma, Li, Zheng, Ling, Xiao, Wang, Wen, Chao and Ji, "AffineQuant: Affine Transformation Quantization for Large Language
Models", ICLR 2024. Everything learned merges into the weights, so the result is an ordinary checkpoint:

    norm -> linears    a scale for each channel, as in OmniQuant
    v -> o             those scales, times a matrix for every kv head
    q <-> k            an angle for every pair of dimensions of a kv head
    up -> down         a scale for each channel, on request

transforms.py has the algebra, the gradual mask and the stability factor. The block is trained with OmniQuant first;
matrices and angles then begin as if they were not there, and the state that loses least on the held-out text is kept,
so that no block loses more than under OmniQuant with the same `steps`. How near the matrices came to being singular is
logged, and stands in the notes of the block's training.

The paper's settings for weights alone also have a dense matrix between each norm and its linears. Nothing can take its
inverse over, the model would have to multiply by it: two more products of hidden x hidden in each block, more bytes
than the block's 3-bit weights where the model is small. `dense=true` trains it too, after the rest, and notes what the
block would lose with it; the checkpoint that is written is the one without.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear, Linear
from dibit.quantize.block import BlockJob, QuantizedBlock
from dibit.quantize.methods.omniquant import Learned, OmniQuant, Task
from dibit.quantize.report import TrainingReport
from dibit.quantize.stats import Need
from dibit.quantize.trainer import Group, Schedule, TrainingFailure, train
from dibit.quantize.transforms import Mixing, PairTurning, Transform, ValueMixing

logger = logging.getLogger(__name__)

DENSE_KEYS = ("qkv", "gate_up")


@dataclass(frozen=True)
class AffineQuant:
    """Learned clipping, scaling, mixing and turning.

    symmetric         zero points in the middle of the code range
    steps             optimizer steps of OmniQuant for each block
    affine_steps      further steps, with matrices and angles
    batch             calibration sequences in a step
    held_out          share of the calibration sequences that chooses the state to keep
    search            start from the ranges of least weight error instead of nearly the whole ones
    clip_rate         learning rate of the clipping logits
    transform_down    learn scales between up and down too, as is always done where activations are rounded
    transform_rate    learning rate of the logarithms of the scales
    alpha             share of the inputs, against the weights, in the first scales
    values            learn matrices between v and o
    pairs             learn angles of q and k, in models that do not normalize them
    affine_rate       learning rate of the matrices, before the stability factor, and of the angles
    stability         factor on what stands beside the diagonal of the matrices
    stages            how many times the band that is learned grows, from beside the diagonal to the whole matrix
    dense             measure dense matrices at the norms too; they are not part of the result
    dense_stability   their stability factor
    relative          errors count in proportion to the size of the hidden state of their token (relative.py)
    precision         in which steps multiply matrices: auto (bfloat16 on CPUs with matrix units), float32 or bfloat16
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"float_stream"})

    symmetric: bool = False
    steps: int = 160
    affine_steps: int = 160
    batch: int = 2
    held_out: float = 0.125
    search: bool = True
    clip_rate: float = 5e-2
    transform_down: bool = False
    transform_rate: float = 5e-3
    alpha: float = 0.5
    values: bool = True
    pairs: bool = True
    affine_rate: float = 2e-2
    stability: float = 0.1
    stages: int = 8
    dense: bool = False
    dense_stability: float = 0.1
    relative: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        self.first()
        self.schedule()
        for name in ("affine_rate", "stability", "dense_stability"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie above 0 and at most at 1")
        if self.stages < 1:
            raise ConfigError(f"stages is {self.stages}; it must be at least 1")
        if not (self.values or self.pairs):
            raise ConfigError("values=false and pairs=false leave nothing affine; use omniquant")

    def first(self) -> OmniQuant:
        """What comes before the matrices."""
        names = {field.name for field in dataclasses.fields(OmniQuant)} & {f.name for f in dataclasses.fields(self)}
        return OmniQuant(**{name: getattr(self, name) for name in names})

    def schedule(self) -> Schedule:
        return dataclasses.replace(self.first().schedule(), steps=self.affine_steps)

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        first = self.first()
        task = first.prepare(job)
        learned = first.start(task)
        try:
            before = train(job, learned, first.schedule(), task.data, baseline=task.baseline)
        except TrainingFailure as failure:
            return task.failed(failure)
        mixed = learned.with_transforms(self._transforms(job))
        try:
            after = train(job, mixed, self.schedule(), task.data, baseline=task.baseline)
        except TrainingFailure as failure:
            kept, report = learned, _joined(before, failure.report)
        else:
            kept, report = mixed if _best(after) < _best(before) else learned, _joined(before, after)
        notes = [note for transform in kept.transforms for note in transform.notes()]
        if kept is learned:
            notes.append("with matrices and angles it never lost less on the held-out text; scales alone are kept")
        found = task.result(kept, report)
        if self.dense:
            # Last: it trains on from the state that was kept.
            notes.append(self._dense(task, kept))
        for note in notes:
            logger.info("layers.%d: %s", job.layer, note)
        return dataclasses.replace(found, training=dataclasses.replace(report, notes=(*report.notes, *notes)))

    def _transforms(self, job: BlockJob) -> list[Transform]:
        sizes = job.block.sizes
        found: list[Transform] = []
        if self.values:
            mixing = Mixing(
                sizes.kv_heads,
                sizes.head_dim,
                rate=self.affine_rate,
                stability=self.stability,
                stages=self.stages,
                steps=self.affine_steps,
            )
            found.append(ValueMixing(mixing))
        # Norms of q and k have a weight for each of a pair's dimensions, so that a turn before them is not one after.
        if self.pairs and not job.block.head_norms:
            found.append(PairTurning(sizes, rate=self.affine_rate))
        return found

    def _dense(self, task: Task, kept: Learned) -> str:
        """What dense matrices at the norms would add to `kept`."""
        mixings = {
            key: Mixing(
                1,
                task.job.block.sizes.hidden,
                rate=self.affine_rate,
                stability=self.dense_stability,
                stages=self.stages,
                steps=self.affine_steps,
            )
            for key in DENSE_KEYS
        }
        online = _Online(kept.with_transforms([_Columns(mixings)]), mixings)
        try:
            report = train(task.job, online, self.schedule(), task.data, baseline=task.baseline)
        except TrainingFailure as failure:
            return f"dense matrices at the norms, not part of the result: {failure}"
        gain = _best(report) / report.validation[0][1]
        states = "; ".join(mixing.note(f"at {key}") for key, mixing in mixings.items())
        return (
            f"dense matrices at the norms, not part of the result, would lose {_best(report):.4g} "
            f"on the held-out text, {gain:.3f} times as much as without ({states})"
        )


@dataclass(frozen=True)
class _Columns:
    """Dense matrices on the columns of the linears behind the norms. On its own it changes what the block computes:
    `_Online` multiplies the inputs by the inverses."""

    mixings: dict[str, Mixing]

    def groups(self) -> Sequence[Group]:
        return [group for mixing in self.mixings.values() for group in mixing.groups()]

    def fold(self, block: Block) -> None:
        for key, mixing in self.mixings.items():
            linear = cast(FloatLinear, block.linears[key])
            block.linears[key] = FloatLinear(linear.weight @ mixing.matrices()[0].float().T, linear.bias)

    def project(self) -> None:
        for mixing in self.mixings.values():
            mixing.project()

    def notes(self) -> Sequence[str]:
        return ()


@dataclass(frozen=True)
class _Online:
    """What is learned, with products by inverses in front of its linears."""

    learned: Learned
    mixings: dict[str, Mixing]

    def groups(self) -> Sequence[Group]:
        return self.learned.groups()

    def block(self) -> Block:
        block = self.learned.block()
        for key, mixing in self.mixings.items():
            block.linears[key] = _Behind(torch.linalg.inv(mixing.matrices()[0]).float(), block.linears[key])
        return block

    def project(self) -> None:
        self.learned.project()


@dataclass(frozen=True)
class _Behind:
    inverse: Tensor
    linear: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x @ self.inverse)


def _best(report: TrainingReport) -> float:
    return min(loss for _, loss in report.validation)


def _joined(before: TrainingReport, after: TrainingReport) -> TrainingReport:
    """One course out of two; the second begins where the best state of the first is taken up again."""
    first = before.steps
    seconds = before.seconds + after.seconds
    part = after.seconds / seconds if seconds else 0.0
    return dataclasses.replace(
        before,
        steps=first + after.steps,
        losses=(*before.losses, *((first + step, loss) for step, loss in after.losses)),
        validation=(*before.validation, *((first + step, loss) for step, loss in after.validation if step > 0)),
        best_step=first + after.best_step if after.best_step else before.best_step,
        skipped=before.skipped + after.skipped,
        restarts=before.restarts + after.restarts,
        notes=(*before.notes, *after.notes),
        seconds=seconds,
        tokens_per_s=before.tokens_per_s * (1 - part) + after.tokens_per_s * part,
        matmul_share=before.matmul_share * (1 - part) + after.matmul_share * part,
    )
