"""Attention of a decode step in one launch, in the interpreter: bit for bit what the launches it stands for give."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from random_weights import random_weight
from torch import Tensor
from triton.runtime import interpreter

from dibit.kernels.formats import Format
from dibit.kernels.kv import FP8, INT4, INT8, store_rows
from dibit.kernels.triton import fused, layout
from dibit.kernels.triton.attention import attend
from dibit.kernels.triton.decode import Rows, counters, decode_attended
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.qlinear import Prepared, Runs, launch_runs, plan_of, prepare
from dibit.kernels.triton.small import rope_kv_write

BLOCK_SIZE = 4
BLOCKS = 24
EVERY_ROW = Format(4, -1)


def packed(n: int, k: int, format: Format) -> TritonQWeight:
    scales = torch.rand(n, format.groups(k)).add(0.01).mul(0.05).half()
    return layout.pack(random_weight(n, k, format, scales=scales))


@dataclass
class Step:
    """Sequences with `lengths` keys of which the last `fresh` ones are this step's, a row for each of these."""

    lengths: list[int]
    heads: int
    kv_heads: int
    d: int
    fresh: int = 1
    k_type: torch.dtype = torch.float16
    v_type: torch.dtype = torch.float16
    format: Format = EVERY_ROW
    bias: bool = False
    split_keys: int = 8
    hidden: int = 64

    def __post_init__(self) -> None:
        self.tokens = len(self.lengths) * self.fresh
        width = -(-max(self.lengths) // BLOCK_SIZE) + 3
        order = torch.randperm(BLOCKS).to(torch.int32)
        tables = torch.zeros(len(self.lengths), width, dtype=torch.int32)
        for table, length in zip(tables, self.lengths, strict=True):
            needed = -(-length // BLOCK_SIZE)
            table[:needed], order = order[:needed], order[needed:]
        positions, slots = [], []
        for table, length in zip(tables.tolist(), self.lengths, strict=True):
            for position in range(length - self.fresh, length):
                positions.append(position)
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        self.positions, self.slots = torch.tensor(positions), torch.tensor(slots)
        self.rows = Rows(
            self.positions, self.slots, (self.positions + 1).to(torch.int32), tables.repeat_interleave(self.fresh, 0)
        )
        self.k_cache, self.v_cache = (
            store_rows(torch.randn(BLOCKS, self.kv_heads, BLOCK_SIZE, self.d), kind)
            for kind in (self.k_type, self.v_type)
        )
        angles = torch.rand(max(self.lengths), self.d // 2 - 1) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.o = packed(64, self.heads * self.d, self.format)
        self.arrivals = counters(self.kv_heads, self.cos.device)

    def qkv(self) -> Runs:
        w = packed((self.heads + 2 * self.kv_heads) * self.d, self.hidden, Format(4, 64))
        x, chosen = torch.randn(self.tokens, self.hidden), plan_of(w, self.tokens)
        bias = torch.randn(w.n) if self.bias else None
        return launch_runs(prepare(x, w, padded_tokens=chosen.padded_tokens(self.tokens)), w, chosen, bias=bias)

    def apart(self, qkv: Runs, *, activation_bits: int | None = None) -> tuple[Prepared, Tensor, Tensor]:
        """What the single launches give, and the caches they leave."""
        rows, k, v = self.rows, self.k_cache.clone(), self.v_cache.clone()
        q = rope_kv_write(qkv, rows.positions, self.cos, self.sin, k, v, rows.slots, self.heads)
        starts = torch.arange(self.tokens + 1, dtype=torch.int32)
        attended = attend(q, k, v, starts, rows.seq_lens, rows.block_tables, self.d**-0.5, split_keys=self.split_keys)
        return fused.attended_prepared(attended, self.o, activation_bits=activation_bits), k, v

    def at_once(self, qkv: Runs, *, activation_bits: int | None = None) -> tuple[Prepared, Tensor, Tensor]:
        k, v = self.k_cache.clone(), self.v_cache.clone()
        made = decode_attended(
            qkv,
            self.rows,
            k,
            v,
            self.cos,
            self.sin,
            self.d**-0.5,
            self.o,
            arrivals=self.arrivals,
            activation_bits=activation_bits,
            split_keys=self.split_keys,
        )
        return made, k, v

    def check(self, *, activation_bits: int | None = None) -> None:
        qkv = self.qkv()
        want, want_k, want_v = self.apart(qkv, activation_bits=activation_bits)
        made, k, v = self.at_once(qkv, activation_bits=activation_bits)
        assert torch.equal(as_bytes(k), as_bytes(want_k))
        assert torch.equal(as_bytes(v), as_bytes(want_v))
        assert not torch.equal(as_bytes(k), as_bytes(self.k_cache))
        for name in ("half", "sums", "factors"):
            assert torch.equal(getattr(made, name), getattr(want, name)), name
        assert made.tokens == want.tokens == self.tokens
        assert bool(torch.isfinite(made.half.float()).all())
        assert not self.arrivals.any(), "what the next launch counts in is not zero"


@pytest.fixture(params=["first", "last"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which programs are done first. A GPU promises nothing."""
    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx

    def backward(*index: int) -> None:
        forward(*(count - 1 - i for count, i in zip(builder.grid_dim, index, strict=True)))

    if request.param == "last":
        monkeypatch.setattr(builder, "set_grid_idx", backward)


def as_bytes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(2, 2, 24), (6, 2, 16), (5, 1, 32)], ids=["mha", "gqa-of-3", "mqa"]
)
@pytest.mark.parametrize("split_keys", [8, 512], ids=["splits", "one-split"])
def test_sequences_of_any_length(heads: int, kv_heads: int, d: int, split_keys: int) -> None:
    """A first key, a split's last key and the next one's first among them."""
    Step([1, 8, 9, 25], heads, kv_heads, d, split_keys=split_keys, bias=heads == 5).check()


@pytest.mark.parametrize("hidden", [64, 512], ids=["whole", "runs"])
def test_a_product_still_owed_or_not(hidden: int) -> None:
    step = Step([11, 3], 4, 2, 16, hidden=hidden)
    assert step.qkv().plan.partial == (hidden == 512)
    step.check()


@pytest.mark.parametrize(
    ("d", "keys", "values"),
    [(24, INT8, INT4), (24, INT4, INT8), (80, INT4, INT4), (80, INT8, INT8), (24, FP8, FP8)],
    ids=["k8v4", "k4v8", "int4", "int8", "fp8"],
)
def test_caches_of_low_bits(d: int, keys: torch.dtype, values: torch.dtype) -> None:
    """Attention sees the new row as it was rounded."""
    Step([1, 13], 4, 2, d, k_type=keys, v_type=values).check()


@pytest.mark.parametrize("fresh", [2, 5])
def test_several_tokens_of_a_sequence(fresh: int, order: None) -> None:
    """Keys of the tokens before are in no cache yet, some of them in another split."""
    Step([5, 10], 4, 2, 16, fresh=fresh).check()


@pytest.mark.parametrize(
    ("format", "activation_bits"),
    [(Format(3, 128), None), (Format(2, 64), None), (Format(8, -1), None), (Format(4, 32), 8), (Format(4, -1), 4)],
    ids=["3", "2", "8-channel", "a8", "a4-channel"],
)
def test_activations_of_every_weight(format: Format, activation_bits: int | None) -> None:
    """384 columns are two pieces of a row."""
    Step([9, 2], 12, 2, 32, format=format).check(activation_bits=activation_bits)


def test_rows_that_write_nothing() -> None:
    """Rows beyond a step's own, as a captured graph has them."""
    step = Step([6, 13], 4, 2, 16)
    step.slots[1] = -1
    qkv = step.qkv()
    want, want_k, want_v = step.apart(qkv)
    made, k, v = step.at_once(qkv)
    assert torch.equal(k, want_k)
    assert torch.equal(v, want_v)
    assert torch.equal(made.half[0], want.half[0])


def test_programs_may_arrive_in_any_order(order: None) -> None:
    Step([17, 4], 6, 2, 16).check()


def test_no_tokens() -> None:
    step = Step([4], 2, 1, 16)
    none = Rows(*(x[:0] for x in (step.positions, step.slots, step.rows.seq_lens, step.rows.block_tables)))
    made = decode_attended(
        step.qkv(), none, step.k_cache, step.v_cache, step.cos, step.sin, 1.0, step.o, arrivals=step.arrivals
    )
    assert made.tokens == 0
