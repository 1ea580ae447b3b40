"""Settings of an engine and of a request: frozen, validated once, defaults written here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from dibit.engine import numa
from dibit.engine.errors import ConfigError, RequestError

Device = Literal["auto", "cpu", "cuda"]
BackendName = Literal["auto", "cpu", "triton", "reference"]
GPTQZero = Literal["auto", "v1", "v2"]
Speculative = Literal["off", "ngram", "draft"]
TransportName = Literal["auto", "thread", "process"]
KVType = Literal["auto", "float32", "float16", "bfloat16", "fp8", "int8", "k8v4", "int4"]

# A line of the log, in every process.
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class EngineConfig:
    """How a model is held and served.

    device            where the model runs ("auto": an NVIDIA GPU where the triton kernels run on one, else the CPU)
    backend           body of every op: "auto" takes the fastest that fits, a named one is used or refused
    max_model_len     longest sequence, prompt and output together (None: the model's own limit, or what fits)
    max_num_seqs      sequences in one step
    max_batch_tokens  tokens in one step; a longer prompt is prefilled in chunks of at most this many
    max_itl_ratio     how many times longer a prompt may make a step beside requests that decode than it takes without
                      it; more where prompts are more than those (0: no bound; chunker.py)
    itl_slo_ms        ms between two tokens that are fine: beside requests that decode, prompts may make a step this
                      long whatever max_itl_ratio says (0: the ratio alone decides)
    max_queued        requests waiting beyond the running ones before CapacityError
    block_size        tokens in a KV block
    kv_bytes          size of the KV cache (None: what max_num_seqs full-length sequences need, at most
                      kv_memory_share of free memory)
    kv_memory_share   share of the free memory that the KV cache may take when kv_bytes is not given
    kv_type           element type of the KV cache: float32, float16, bfloat16; fp8: e4m3 without scales; int8 or int4
                      codes with scales; k8v4: keys in int8, values in int4 ("auto": float16 under low-bit weights,
                      float32 under float weights)
    head_bits         bits at which the token embedding and head are held under low-bit weights; 16 keeps the
                      checkpoint's floats
    gptq_zero         how a GPTQ checkpoint stores its zero points: v1 (minus one), v2, or "auto" to decide
    threads           compute threads (None: every core this process may use)
    prefix_cache      reuse the KV blocks of a shared prompt prefix
    tape              replay decode steps: as recorded lists of native calls where every op of the model is native, on a
                      GPU as CUDA graphs
    speculative       guess tokens ahead and verify several in one step, where measured to pay: "ngram" proposes what
                      followed the last tokens earlier in the same text, "draft" what a smaller model (draft_model)
                      says; under low-bit weights tokens are those of "off", but for "draft" without a seed, where
                      they are others of the same distribution
    draft_model       the smaller model, named as a model is; it needs the same tokenizer
    num_speculative_tokens  most tokens guessed ahead of a sequence in one step
    prompt_lookup_max  longest run of last tokens that is looked for
    prompt_lookup_min  shortest run of last tokens that is looked for
    numa              on a machine of several NUMA nodes: "interleave" spreads memory over all of them, "node N" keeps
                      memory and threads on one
    cache             keep packed weights on disk and map them on the next start (CPU)
    cache_dir         where they are kept (None: dibit/packed in the user's cache directory)
    """

    device: Device = "auto"
    backend: BackendName = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_batch_tokens: int = 256
    max_itl_ratio: float = 2.0
    itl_slo_ms: float = 0.0
    max_queued: int = 256
    block_size: int = 32
    kv_bytes: int | None = None
    kv_memory_share: float = 0.5
    kv_type: KVType = "auto"
    head_bits: Literal[4, 8, 16] = 8
    gptq_zero: GPTQZero = "auto"
    threads: int | None = None
    prefix_cache: bool = True
    tape: bool = True
    speculative: Speculative = "off"
    draft_model: str | None = None
    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    numa: str = "off"
    cache: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_batch_tokens",
            "max_queued",
            "block_size",
            "num_speculative_tokens",
            "prompt_lookup_min",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_model_len", "kv_bytes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1, or left out")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) is smaller than max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs one token a step; raise the first or lower the second"
            )
        if self.max_itl_ratio != 0 and not 1 < self.max_itl_ratio < math.inf:
            raise ConfigError(f"max_itl_ratio is {self.max_itl_ratio}; it must be more than 1, or 0 for no bound")
        if not 0 <= self.itl_slo_ms < math.inf:
            raise ConfigError(f"itl_slo_ms is {self.itl_slo_ms}; it must be a number of milliseconds, or 0 for none")
        if self.itl_slo_ms and not self.max_itl_ratio:
            raise ConfigError(
                f"itl_slo_ms is {self.itl_slo_ms} and max_itl_ratio is 0: without a bound there is nothing to widen; "
                "set max_itl_ratio, to just over 1 where the milliseconds alone are to count"
            )
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ConfigError(
                f"prompt_lookup_max ({self.prompt_lookup_max}) is smaller than prompt_lookup_min "
                f"({self.prompt_lookup_min}); raise the first or lower the second"
            )
        if (self.speculative == "draft") != (self.draft_model is not None):
            raise ConfigError(
                f"speculative is {self.speculative!r} and draft_model is {self.draft_model!r}; "
                'speculative "draft" and a draft_model go together'
            )
        if not 0 < self.kv_memory_share <= 0.95:
            raise ConfigError(f"kv_memory_share is {self.kv_memory_share}; it must lie in (0, 0.95]")
        numa.parse(self.numa)
        if self.head_bits not in (4, 8, 16):
            raise ConfigError(f"head_bits is {self.head_bits}; supported: 4, 8, 16")
        for name, allowed in (
            ("device", get_args(Device)),
            ("backend", get_args(BackendName)),
            ("gptq_zero", get_args(GPTQZero)),
            ("speculative", get_args(Speculative)),
            ("kv_type", get_args(KVType)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; supported: {', '.join(allowed)}")


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends.

    Order of application: logit_bias, repetition/presence/frequency penalties, temperature, min_p, top_k, top_p, draw.
    temperature 0 is greedy. top_k 0 (or -1) and top_p 1 and min_p 0 switch a filter off. The same seed gives the
    same tokens whatever else is in the batch; it has 64 bits, signed or not; None draws one per request. `logprobs`
    asks for the chosen token's log-probability and that many alternatives (0: the chosen one only), of the model's
    distribution before any of the above; `prompt_logprobs` likewise for every prompt token but the first. `stop`
    strings are not part of the text unless include_stop_str_in_output.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, low=0 if self.prompt_logprobs is not None else 1)
        _within("min_tokens", self.min_tokens, low=0)
        _within("temperature", self.temperature, low=0.0, high=100.0)
        _within("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _within("top_k", self.top_k, low=-1, high=2**63 - 1)
        _within("min_p", self.min_p, low=0.0, high=1.0)
        _within("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True)
        _within("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _within("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        if self.seed is not None:
            _within("seed", self.seed, low=-(2**63), high=2**64 - 1)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, low=-100.0, high=100.0, param="logit_bias")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), low=0, high=MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"{len(self.stop)} stop strings; at most {MAX_STOP_STRINGS} are supported", param="stop")
        if any(not s for s in self.stop):
            raise RequestError("a stop string is empty; leave it out", param="stop")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                param="min_tokens",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _within(
    name: str,
    value: float,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    param: str | None = None,
) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} is {value}; it must lie in {bracket}{low}, {high}]", param=param or name)
