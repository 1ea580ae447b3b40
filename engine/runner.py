"""The Runner that owns a model and its KV cache: a step in, tokens out.

Logits are computed for the rows that need them and no others: the last token of a chunk that samples, and the tokens
of prompts whose log-probabilities were asked for, these in slices of at most 64 MB. A step that samples from all of its
sequences and computes a few tokens, one of each and its drafts, is replayed from a tape where there can be one, on a
GPU from a CUDA graph.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dibit.engine import device_sampling
from dibit.engine.batch import Batch, build_batch
from dibit.engine.config import EngineConfig
from dibit.engine.decode_graph import Capture, CudaCapture, DecodeGraphs
from dibit.engine.decode_tape import DecodeTapes
from dibit.engine.kv_cache import allocate
from dibit.engine.memory_plan import LOGIT_BYTES, CacheSize, activation_bytes, free_memory, size_cache
from dibit.engine.models.decoder import Decoder
from dibit.engine.prompt_slices import PromptSlices, at_once
from dibit.engine.request import Request, TokenLogprob
from dibit.engine.sampler import Highest, beside, prompt_logprobs, sample
from dibit.engine.step import Chunk, Sampled, Step, StepCounts, StepResult, joined
from dibit.engine.verification import verify
from dibit.kernels import native
from dibit.kernels.tape import Tape

log = logging.getLogger(__name__)

WARM_UP_TOKENS = 16
MAX_DRAFTED_ROWS = 64


class Choose(Protocol):
    """engine.sampler.sample, or what stands for it."""

    def __call__(
        self, logits: Tensor, requests: Sequence[Request], *, highest: Highest | None = None
    ) -> list[Sampled | Exception]: ...


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which of a step's tokens need logits: `index` holds one per request of `sampling`, then those of the chunks
    with drafts, then the prompt spans."""

    index: list[int]
    sampling: list[Request]
    drafted: list[Chunk]
    spans: list[tuple[Chunk, int]]


class ModelRunner:
    """Implements step.Runner. Raises ConfigError when the cache that the settings ask for has no room.

    free_bytes  memory that the cache may be taken from (None: what is free now, with the weights already held)
    draft_block_bytes  of a block in the cache of a draft model, which is to have as many
    size        of the cache, where it is decided already
    choose      tokens of rows (None: engine.sampler.sample)
    capture     makes decode steps repeatable (None: CUDA graphs on a GPU, tapes on a CPU)

    taped_steps    steps whose decoding was replayed from a tape or graph (the recording of one counts too)
    untaped        the other steps by what kept them from it: "prefill", "prompt_logprobs", "no_tape", "rows" (more
                   tokens than a tape has rows)
    beside_tape    rows of taped steps whose token was chosen after it, by reason: "penalties", "logprobs"
    scoring_s  seconds spent on logits and log-probabilities of prompts
    listener   is given (request id, place of the first token, logits [n, vocab] of the tokens from there on) of prompts
               whose log-probabilities were asked for, as they are computed; the tensor is not the listener's to keep
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        *,
        free_bytes: int | None = None,
        draft_block_bytes: int = 0,
        size: CacheSize | None = None,
        choose: Choose | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.decoder = decoder
        self.config = config
        sizes = decoder.sizes
        if size is None:
            free = free_memory(decoder.device) if free_bytes is None else free_bytes
            longest = config.max_model_len or sizes.max_positions
            free -= activation_bytes(sizes, config, max_model_len=longest, gpu=decoder.device.type == "cuda")
            size = size_cache(
                sizes, config, quantized=decoder.quantized, free_bytes=free, draft_block_bytes=draft_block_bytes
            )
        if size.note is not None:
            log.warning("%s", size.note)
        self.threads = set_threads(config, decoder)
        self._choose = choose
        self._max_model_len = size.max_model_len
        self._rows_per_slice = max(1, LOGIT_BYTES // (4 * sizes.vocab))
        cos, sin = sizes.rope.tables(size.max_model_len)
        self._cos, self._sin = cos.to(decoder.device), sin.to(decoder.device)
        self.cache = allocate(
            sizes,
            num_blocks=size.num_blocks,
            block_size=config.block_size,
            stored=size.stored,
            device=decoder.device,
        )
        self.taped_steps = 0
        self.untaped: Counter[str] = Counter()
        self.beside_tape: Counter[str] = Counter()
        self.scoring_s = 0.0
        self.listener: Callable[[str, int, Tensor], None] | None = None
        self._tapes = self._repeated(capture)
        self._slices = PromptSlices(decoder, self.cache, self._cos, self._sin)

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @property
    def block_size(self) -> int:
        return self.cache.block_size

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def num_layers(self) -> int:
        return self.decoder.sizes.layers

    @property
    def step_counts(self) -> StepCounts:
        return StepCounts(self.taped_steps, tuple(self.untaped.items()), tuple(self.beside_tape.items()))

    @property
    def untaped_steps(self) -> int:
        return self.untaped.total()

    @property
    def tape_s(self) -> float:
        """Seconds spent in tapes so far."""
        return 0.0 if self._tapes is None else self._tapes.replay_s

    def decode_tape(self, count: int) -> Tape | None:
        """The tape of steps that compute `count` tokens, once there is one."""
        return self._tapes.tape(count) if isinstance(self._tapes, DecodeTapes) else None

    def execute(self, step: Step) -> StepResult:
        """Compute a step. Faults of single rows are in `failed`; anything else raises."""
        sliced = [chunk for chunk in step.chunks if not chunk.whole]
        if not sliced:
            return self._execute(step)
        results = [self._slice(chunk) for chunk in sliced]
        if len(sliced) < len(step.chunks):
            results.append(self._execute(Step(tuple(chunk for chunk in step.chunks if chunk.whole))))
        else:
            self.untaped["prefill"] += 1
        return joined(results)

    def _execute(self, step: Step) -> StepResult:
        reason = next(filter(None, map(_more_than_decoding, step.chunks)), None)
        if reason is None and self._tapes is not None:
            if step.num_tokens <= self._tapes.max_rows:
                return self._replay(self._tapes, step)
            reason = "rows"
        self.untaped[reason or "no_tape"] += 1
        return self._compute(step)

    def _replay(self, tapes: DecodeTapes | DecodeGraphs, step: Step) -> StepResult:
        decoded = tapes.run(step.chunks)
        if tapes.refusal is None:
            self.taped_steps += 1
            self.beside_tape.update(reason for chunk in step.chunks if (reason := beside(chunk.request)) is not None)
        else:
            log.info("decode steps run op by op: %s", tapes.refusal)
            self._tapes = None
            self.untaped["no_tape"] += 1
        drawn = _Drawn(self._choose or sample)
        if step.num_tokens == len(step.chunks):
            drawn.sample(decoded.logits, [chunk.request for chunk in step.chunks], highest=decoded.highest)
            return drawn.result()
        row = 0
        for chunk in step.chunks:
            row += chunk.count - 1
            rows = slice(row, row + 1 + len(chunk.drafts))
            known = decoded.highest.of(rows)
            if chunk.drafts:
                drawn.verify(decoded.logits[rows], chunk, highest=known)
            else:
                drawn.sample(decoded.logits[rows], [chunk.request], highest=known)
            row = rows.stop
        return drawn.result()

    def _repeated(self, capture: Capture | None) -> DecodeTapes | DecodeGraphs | None:
        """What replays decode steps, if anything."""
        device = self.decoder.device
        if not self.config.tape:
            return None
        if capture is None and device.type == "cuda":
            capture = CudaCapture(device)
        model = (self.decoder, self.cache, self._cos, self._sin)
        rows, length = min(self._most_rows(), self._rows_per_slice), self.max_model_len
        if capture is not None:
            return DecodeGraphs(*model, max_rows=rows, max_model_len=length, capture=capture)
        return DecodeTapes(*model, max_rows=rows, max_model_len=length) if device.type == "cpu" else None

    def _most_rows(self) -> int:
        """Tokens of the largest step that is worth a tape: a longer one hardly notices the Python between its ops."""
        sequences, drafts = self.config.max_num_seqs, self.config.num_speculative_tokens
        if self.config.speculative == "off":
            return sequences
        return min(max(sequences, min(MAX_DRAFTED_ROWS, sequences * (1 + drafts))), self.config.max_batch_tokens)

    @torch.inference_mode()
    def _compute(self, step: Step) -> StepResult:
        rows = _rows(step)
        everything = rows.index == list(range(step.num_tokens))
        batch = build_batch(
            step, block_size=self.block_size, rows=None if everything else rows.index, device=self.decoder.device
        )
        return self._result(rows, self.decoder.hidden(batch, self.cache, self._cos, self._sin))

    @torch.inference_mode()
    def _slice(self, chunk: Chunk) -> StepResult:
        """Some layers of a chunk; its result is empty before the last one."""
        rows = _rows(Step((at_once(chunk),)))
        if chunk.first_layer == 0:
            step = Step((at_once(chunk),))
            batch = build_batch(step, block_size=self.block_size, rows=rows.index, device=self.decoder.device)
            self._slices.begin(chunk, batch)
        hidden = self._slices.run(chunk)
        return StepResult({}) if hidden is None else self._result(rows, hidden)

    def _result(self, rows: _Rows, hidden: Tensor) -> StepResult:
        """What comes of final hidden states [R, hidden]."""
        drawn = _Drawn(self._choose or sample)
        for start in range(0, len(rows.sampling), self._rows_per_slice):
            requests = rows.sampling[start : start + self._rows_per_slice]
            drawn.sample(self.decoder.logits(hidden[start : start + len(requests)]), requests)
        first = len(rows.sampling)
        for chunk in rows.drafted:
            count = 1 + len(chunk.drafts)
            drawn.verify(self.decoder.logits(hidden[first : first + count]), chunk)
            first += count
        scored: dict[str, tuple[TokenLogprob, ...]] = {}
        for chunk, count in rows.spans:
            scored[chunk.request.id] = self._score(chunk, hidden[first : first + count])
            first += count
        return drawn.result(scored)

    def _score(self, chunk: Chunk, hidden: Tensor) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the prompt tokens that follow the chunk's own."""
        began = time.perf_counter()
        top = chunk.request.params.prompt_logprobs or 0
        found: list[TokenLogprob] = []
        for start in range(0, hidden.shape[0], self._rows_per_slice):
            piece = hidden[start : start + self._rows_per_slice]
            first = chunk.start + start + 1
            targets = chunk.request.prompt_ids[first : first + piece.shape[0]]
            logits = self.decoder.logits(piece)
            found += prompt_logprobs(logits, targets, top)
            if self.listener is not None:
                self.listener(chunk.request.id, first - 1, logits)
        self.scoring_s += time.perf_counter() - began
        return tuple(found)

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Run a prefill and a decode step that write nothing, so that the first request finds threads started and
        weights in memory, and on a GPU capture the graphs of decode steps. Returns the seconds it took."""
        began = time.monotonic()
        device = self.decoder.device
        for tokens in (min(WARM_UP_TOKENS, self.max_model_len, self.config.max_batch_tokens), 1):
            blocks = -(-tokens // self.block_size)
            batch = Batch(
                tokens=torch.zeros(tokens, dtype=torch.int64, device=device),
                positions=torch.arange(tokens, device=device),
                slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
                cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=device),
                seq_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
                block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None],
                rows=torch.tensor([tokens - 1], device=device),
            )
            logits = self.decoder.logits(self.decoder.hidden(batch, self.cache, self._cos, self._sin))
        if logits.device.type != "cpu":
            device_sampling.warm_up(logits)
        if isinstance(self._tapes, DecodeGraphs):
            log.info("%d CUDA graphs of decode steps captured", self._tapes.warm_up())
        return time.monotonic() - began


def set_threads(config: EngineConfig, decoder: Decoder) -> int:
    """Size the thread pools of this process for a model, and return the number of compute threads.

    Under low-bit weights all heavy ops are native and torch is left one thread: workers of two pools that spin on
    the same cores slow both down. Float linears are torch's, so there both pools get every thread.
    """
    threads = config.threads or native.usable_cores()
    uses_native = config.backend != "reference" and decoder.device.type == "cpu" and native.unavailable() is None
    if uses_native:
        native.set_threads(threads)
    torch.set_num_threads(1 if uses_native and decoder.quantized else threads)
    return threads


def _more_than_decoding(chunk: Chunk) -> str | None:
    """What there is to compute of a chunk besides one token and a draw, or None."""
    request = chunk.request
    # Two tokens are what a draft model has to read after all of its drafts were accepted.
    if chunk.count > 2 or not chunk.samples:
        return "prefill"
    asked = request.params.prompt_logprobs is not None and chunk.stop < request.num_prompt
    return "prompt_logprobs" if asked else None


class _Drawn:
    """What a step's rows of logits come to, request by request."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._sampled: dict[str, Sampled] = {}
        self._failed: dict[str, str] = {}
        self._further: dict[str, tuple[Sampled, ...]] = {}

    def sample(self, logits: Tensor, requests: Sequence[Request], *, highest: Highest | None = None) -> None:
        """A row for each request."""
        for request, outcome in zip(requests, self._choose(logits, requests, highest=highest), strict=True):
            if isinstance(outcome, Exception):
                self._fail(request, outcome)
            else:
                self._sampled[request.id] = outcome

    def verify(self, logits: Tensor, chunk: Chunk, *, highest: Highest | None = None) -> None:
        """A row for the chunk's last token and one for each of its drafts."""
        request = chunk.request
        found = verify(logits, request, chunk.drafts, chunk.odds, highest=highest)
        if isinstance(found, Exception):
            self._fail(request, found)
        else:
            self._sampled[request.id], self._further[request.id] = found[0], found[1:]

    def result(self, scored: dict[str, tuple[TokenLogprob, ...]] | None = None) -> StepResult:
        return StepResult(self._sampled, scored or {}, self._failed, self._further)

    def _fail(self, request: Request, error: Exception) -> None:
        self._failed[request.id] = f"{type(error).__name__}: {error}"


def _rows(step: Step) -> _Rows:
    index: list[int] = []
    sampling: list[Request] = []
    drafted: list[Chunk] = []
    draft_rows: list[int] = []
    spans: list[tuple[Chunk, int]] = []
    span_rows: list[int] = []
    first = 0
    for chunk in step.chunks:
        request = chunk.request
        last = first + chunk.count - 1
        if chunk.drafts:
            draft_rows += range(last, last + 1 + len(chunk.drafts))
            drafted.append(chunk)
        elif chunk.samples:
            index.append(last)
            sampling.append(request)
        if request.params.prompt_logprobs is not None:
            count = min(chunk.stop, request.num_prompt - 1) - chunk.start
            if count > 0:
                spans.append((chunk, count))
                span_rows += range(first, first + count)
        first += chunk.count + len(chunk.drafts)
    return _Rows(index + draft_rows + span_rows, sampling, drafted, spans)
