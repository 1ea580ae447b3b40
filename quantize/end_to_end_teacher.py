"""What the float model makes of the training text: its last hidden states, computed once and kept in a file.

The model's predictions over the whole vocabulary are one product with its head away from them, so they are exact at a
fraction of the room: 2 bytes per hidden size and token. The float model goes by block by block, as it does for
quantizing: memory holds one block and the hidden states of the text, which go to a file above a size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.checkpoint.safetensors_file import SafetensorsFile
from dibit.engine.checkpoint.shard_file import write_shard
from dibit.engine.errors import CheckpointError
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import load_embedding, load_float_block, load_head
from dibit.engine.models.spec import Arch, Sizes
from dibit.engine.models.weights import check_names, read_tensor
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.instruction import Examples
from dibit.quantize.precision import products
from dibit.quantize.streams import HiddenStates, StreamConfig, advance

STATES_NAME = "teacher_states"
# Tokens that go through a block at once.
BATCH_TOKENS = 2048


class Teacher:
    """Final hidden states of the counted tokens of every example, out of the file `path`; head [vocab, hidden]."""

    def __init__(self, path: Path, head: Tensor) -> None:
        self._file = SafetensorsFile(path)
        self.head = head

    def hidden(self, rows: Tensor) -> Tensor:
        """[R, hidden] float16 or float32: the counted tokens of these examples, one after another."""
        return torch.cat([self._file.read(str(row)) for row in rows.tolist()])

    def close(self) -> None:
        self._file.close()


def check_teacher(teacher: Checkpoint, sizes: Sizes, *, student: str) -> tuple[Arch, Sizes]:
    """Raises CheckpointError when the float model cannot teach a model of `sizes`."""
    if teacher.quantization is not None:
        raise CheckpointError(
            f"{teacher.name} is quantized itself ({teacher.quantization.method}); the teacher is the float model that "
            f"{student} was made from (--teacher MODEL)"
        )
    arch, own = resolve_arch(teacher.config)
    check_names(teacher, arch, own)
    if own.vocab != sizes.vocab:
        raise CheckpointError(
            f"{teacher.name} has a vocabulary of {own.vocab} tokens and {student} one of {sizes.vocab}; "
            "the teacher must have the same tokenizer: take the float model that it was made from (--teacher MODEL)"
        )
    return arch, own


@torch.inference_mode()
def listen(
    teacher: Checkpoint,
    arch: Arch,
    sizes: Sizes,
    examples: Examples,
    *,
    directory: Path,
    streams: StreamConfig,
    precision: str = "float32",
    tell: Callable[[str], None],
) -> Teacher:
    """The teacher's states, out of `directory` where an earlier run left them.

    precision  in which its blocks multiply matrices
    """
    path = directory / STATES_NAME
    if not path.exists():
        with products(precision):
            _write(teacher, arch, sizes, examples, path, streams=streams, tell=tell)
    # Outside of inference mode's tensors: these take part in training.
    with torch.inference_mode(mode=False):
        return Teacher(path, load_head(teacher, arch, sizes))


def _write(
    teacher: Checkpoint,
    arch: Arch,
    sizes: Sizes,
    examples: Examples,
    path: Path,
    *,
    streams: StreamConfig,
    tell: Callable[[str], None],
) -> None:
    samples, length = examples.tokens.shape
    stream = HiddenStates(samples, length, sizes.hidden, config=streams, directory=path.parent)
    stream.embed(load_embedding(teacher, arch, sizes), examples.tokens)
    cos, sin = sizes.rope.tables(length)
    for layer in range(sizes.layers):
        tell(f"the float model reads the text, block {layer + 1} of {sizes.layers}")
        block = load_float_block(teacher, arch, sizes, layer)
        advance(stream, block, cos, sin, batch=max(1, BATCH_TOKENS // length))
    norm = read_tensor(teacher, f"{arch.final_norm}.weight", (sizes.hidden,))

    def states(name: str) -> Tensor:
        x = stream.rows(torch.tensor([int(name)]))[0]
        return rms_norm_reference(x[examples.counted[int(name)]], norm, sizes.norm_eps)

    # |normalized| <= sqrt(hidden), so this bounds what has to be held.
    fits = float(norm.abs().max()) * sizes.hidden**0.5 < torch.finfo(torch.float16).max
    dtype = torch.float16 if fits else torch.float32
    counts = examples.counted.sum(dim=1).tolist()
    layout = {str(i): (dtype, (count, sizes.hidden)) for i, count in enumerate(counts)}
    write_shard(path, layout, lambda name: states(name).to(dtype))
