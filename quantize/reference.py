"""A float model's predictions on a text, with one block of it in memory at a time.

To be compared with, a model need not be loaded: its hidden states over all windows go through the blocks one after
another, as in calibration, and only the last ones are kept, a few kilobytes for each token, in a file when they are
many. Final norm and head are applied when the predictions are wanted. Nothing is approximated: the arithmetic is
float32, as where the whole model is loaded, and only the order of sums may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import load_embedding, load_float_block, load_head
from dibit.engine.models.weights import check_names, read_tensor
from dibit.engine.tokenizer import Tokenizer, load_tokenizer
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.evaluate import text_windows
from dibit.quantize.importance import LOGIT_ROWS
from dibit.quantize.streams import HiddenStates, StreamConfig, advance

# Larger hidden states go to a file.
MEMORY_BYTES = 1 << 30


class StreamedReference:
    """The predictions for the windows of `text` (evaluate.py), computed up to the final norm when this returns.

    directory  where hidden states go that are too large for memory
    threads    that torch uses in this process from now on; None: as they are
    progress   called with (blocks done, blocks)
    windows    of token ids
    Raises ConfigError when the model is quantized or the windows are longer than it allows, UserError on the text.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Path,
        *,
        context: int,
        max_windows: int | None = None,
        directory: Path,
        streams: StreamConfig | None = None,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if checkpoint.quantization is not None:
            raise ConfigError(
                f"{checkpoint.name} is quantized; only a float reference runs block by block: load this one whole"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        arch, sizes = resolve_arch(checkpoint.config)
        check_names(checkpoint, arch, sizes)
        if context > sizes.max_positions:
            raise ConfigError(
                f"windows of {context} tokens are longer than the {sizes.max_positions} positions of "
                f"{checkpoint.name}; use a smaller --ctx"
            )
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        self.windows = text_windows(self.tokenizer, text, context=context, max_windows=max_windows)
        self.vocab = sizes.vocab
        kept = streams or StreamConfig(memory_bytes=MEMORY_BYTES)
        with torch.inference_mode():
            embedding = load_embedding(checkpoint, arch, sizes)
            self._states = HiddenStates(len(self.windows), context, sizes.hidden, config=kept, directory=directory)
            self._states.embed(embedding, torch.tensor(self.windows))
            if not sizes.tied_head:
                del embedding
            cos, sin = sizes.rope.tables(context)
            for layer in range(sizes.layers):
                if progress is not None:
                    progress(layer, sizes.layers)
                advance(self._states, load_float_block(checkpoint, arch, sizes, layer), cos, sin, batch=1)
            if progress is not None:
                progress(sizes.layers, sizes.layers)
            self._norm = read_tensor(checkpoint, f"{arch.final_norm}.weight", (sizes.hidden,))
            self._eps = sizes.norm_eps
            self._head = embedding if sizes.tied_head else load_head(checkpoint, arch, sizes)

    def logits(self, window: int, start: int, count: int) -> Tensor:
        """Of up to `count` tokens of a window from `start` on, float32 [n, V]."""
        with torch.inference_mode():
            x = self._states.rows(torch.tensor([window]))[0, start : start + count]
            return F.linear(rms_norm_reference(x, self._norm, self._eps), self._head)


class StreamedSide:
    """A reference as one of the two models that divergence.py compares: logits that wait for the other's."""

    def __init__(self, reference: StreamedReference) -> None:
        self.tokenizer, self.vocab = reference.tokenizer, reference.vocab
        self._reference = reference
        self._window = -1
        self._done = 0
        self._waiting: Tensor = torch.empty(0, self.vocab)

    @property
    def ready(self) -> int:
        """Rows of logits that wait."""
        return self._waiting.shape[0]

    def begin(self, window: Sequence[int]) -> None:
        self._window += 1
        self._done = 0
        if list(window) != self._reference.windows[self._window]:
            raise ValueError("the reference was computed for other windows")

    def step(self) -> None:
        rows = self._reference.logits(self._window, self._done, LOGIT_ROWS)
        self._done += rows.shape[0]
        self._waiting = torch.cat([self._waiting, rows])

    def take(self, count: int) -> Tensor:
        """The first `count` rows that wait."""
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def end(self) -> None:
        self._waiting = self._waiting[:0]
