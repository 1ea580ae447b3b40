"""Recording native ops and replaying them: the same bits, nothing forgotten, refusals that name the op."""

from __future__ import annotations

import array
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.activation_cpu import silu_mul
from dibit.kernels.argmax_cpu import argmax
from dibit.kernels.attention_cpu import paged_attention
from dibit.kernels.embedding_cpu import embedding
from dibit.kernels.formats import Format
from dibit.kernels.norm_cpu import add_rms_norm, rms_norm
from dibit.kernels.qlinear_cpu import CpuQWeight, pack, qlinear
from dibit.kernels.rope_cpu import rope_kv_write
from dibit.kernels.tape import Tape, Workspace, record

HEADS, KV_HEADS, D, VOCAB, HIDDEN, BLOCK, BLOCKS = 4, 2, 8, 101, 48, 4, 12
MAX_ROWS = 6


def weight(n: int, k: int, bits: int = 4) -> CpuQWeight:
    fmt = Format(bits, 16)
    w = torch.randn(n, k)
    return pack(fmt.encode(w, *fmt.ranges(w)))


class Model:
    """Every op that a tape can hold, one after another, over buffers that change from step to step."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(5)
        width = (HEADS + 2 * KV_HEADS) * D
        self.table = weight(VOCAB, HIDDEN, 8)
        self.qkv, self.o = weight(width, HIDDEN, 3), weight(HIDDEN, HEADS * D, 2)
        self.gate_up, self.down = weight(2 * 80, HIDDEN), weight(HIDDEN, 80)
        self.bias, self.norm = torch.randn(width), torch.randn(HIDDEN)
        angles = torch.randn(BLOCK * BLOCKS, D // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.k, self.v = (torch.zeros(BLOCKS, KV_HEADS, BLOCK, D, dtype=torch.float16) for _ in range(2))
        self.rows = rows
        self.tokens, self.positions, self.slots = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
        self.lengths = torch.ones(rows, dtype=torch.int32)
        self.tables = torch.zeros(rows, BLOCKS, dtype=torch.int32)
        self.starts = torch.arange(rows + 1, dtype=torch.int32)

    def set_step(self, step: int) -> None:
        """Tokens, lengths and tables of another step; each row has blocks of its own."""
        for row in range(self.rows):
            length = 1 + (step + row) % (2 * BLOCK)
            blocks = [2 * row + 1, 2 * row]
            self.tokens[row] = (31 * step + 7 * row) % VOCAB
            self.positions[row] = length - 1
            self.slots[row] = blocks[(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK
            self.lengths[row] = length
            self.tables[row, :2] = torch.tensor(blocks, dtype=torch.int32)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        residual = embedding(self.tokens, self.table)
        h = rms_norm(residual, self.norm, 1e-5)
        for _ in range(2):
            qkv = qlinear(h, self.qkv, self.bias)
            q = rope_kv_write(qkv, self.positions, self.cos, self.sin, self.k, self.v, self.slots, HEADS)
            attended = paged_attention(q, self.k, self.v, self.starts, self.lengths, self.tables, 0.3)
            h, residual = add_rms_norm(qlinear(attended, self.o), residual, self.norm, 1e-5)
            h, residual = add_rms_norm(
                qlinear(silu_mul(qlinear(h, self.gate_up)), self.down), residual, self.norm, 1e-5
            )
        logits = qlinear(h, self.table)
        return logits, *argmax(logits)


@dataclass
class Recorded:
    tape: Tape
    outputs: tuple[Tensor, Tensor, Tensor]


def record_model(model: Model, workspace: Workspace) -> Recorded:
    with record(workspace) as recording:
        outputs = model.forward()
    assert recording.refusal is None
    made = recording.tape()
    assert made is not None
    return Recorded(made, outputs)


def poison(workspace: Workspace) -> None:
    for slot in workspace._slots:
        slot.memory.fill_(0xFF)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS])
def test_a_replay_is_the_computation(rows: int, threads: int, isa: str) -> None:
    native.set_threads(threads)
    plain, taped, workspace = Model(rows), Model(rows), Workspace(MAX_ROWS)
    plain.set_step(0)
    taped.set_step(0)
    recorded = record_model(taped, workspace)
    expected = plain.forward()
    assert all(torch.equal(a, b) for a, b in zip(recorded.outputs, expected, strict=True))
    for step in range(1, 12):
        plain.set_step(step)
        taped.set_step(step)
        poison(workspace)
        recorded.tape.run()
        expected = plain.forward()
        assert all(torch.equal(a, b) for a, b in zip(recorded.outputs, expected, strict=True)), step
        assert torch.equal(taped.k, plain.k)
        assert torch.equal(taped.v, plain.v)


def test_threads_and_instruction_set_may_change_under_a_tape(isas: tuple[str, ...]) -> None:
    model = Model(3)
    model.set_step(4)
    recorded = record_model(model, Workspace(3))
    expected = [output.clone() for output in recorded.outputs]
    for threads in (1, 3, 2):
        native.set_threads(threads)
        for name in isas:
            native.set_isa(name)
            recorded.outputs[0].fill_(float("nan"))
            recorded.tape.run()
            assert torch.equal(recorded.outputs[1], expected[1])
            # The vector kernels of two instruction sets round differently; qlinear's do not.
            assert torch.allclose(recorded.outputs[0], expected[0], atol=1e-3)


def test_tapes_of_several_sizes_share_their_memory(isas: tuple[str, ...]) -> None:
    workspace = Workspace(MAX_ROWS)
    models = {rows: Model(rows) for rows in (2, 1, MAX_ROWS, 3)}
    for model in models.values():
        model.set_step(1)
    recorded = {}
    sizes = []
    for rows, model in models.items():
        recorded[rows] = record_model(model, workspace)
        sizes.append(workspace.nbytes)
    assert len(set(sizes)) == 1
    for rows in (3, 1, 2, MAX_ROWS, 1):
        poison(workspace)
        recorded[rows].tape.run()
        fresh = Model(rows)
        fresh.set_step(1)
        assert torch.equal(recorded[rows].outputs[0], fresh.forward()[0])


def test_a_refused_op_is_named_and_ends_the_run(isas: tuple[str, ...]) -> None:
    model = Model(2)
    model.set_step(0)
    recorded = record_model(model, Workspace(2))
    model.lengths[1] = BLOCK * BLOCKS + 1
    recorded.outputs[1].fill_(-5)
    with pytest.raises(native.NativeError, match=r"dibit_paged_attention .*status 2.*op 5 of a tape of \d+"):
        recorded.tape.run()
    assert recorded.outputs[1].tolist() == [-5, -5]
    model.set_step(0)
    recorded.tape.run()
    model.tokens[0] = VOCAB
    with pytest.raises(native.NativeError, match="dibit_embedding"):
        recorded.tape.run()


def test_what_a_tape_cannot_hold_refuses_it(isas: tuple[str, ...]) -> None:
    with record(Workspace(2)) as recording:
        h = rms_norm(torch.ones(2, 16), torch.ones(16), 1e-5)
        silu_mul(h + 1)
    assert recording.refusal is not None
    assert recording.tape() is None
    x = torch.ones(2, 16)
    with record(Workspace(2)) as recording:
        rms_norm(x, x[0], 1e-5)
    assert recording.refusal is not None
    with record(Workspace(2)) as recording:
        native.entry("dibit_advise_huge", native.POINTER, native.INT)(0, 0)
    assert recording.refusal == "dibit_advise_huge cannot be recorded"
    assert recording.tape() is None


def test_a_recording_ends_with_its_block_even_when_that_fails(isas: tuple[str, ...]) -> None:
    workspace = Workspace(2)
    x, w = torch.ones(2, 16), torch.ones(16)
    recordings = []

    def broken() -> None:
        with record(workspace) as recording:
            recordings.append(recording)
            rms_norm(x, w, 1e-5)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    rms_norm(x, w, 1e-5)
    assert recordings[0].tape().names == ("dibit_rms_norm",)
    assert tape._recording is None


def test_only_the_recording_thread_is_recorded(isas: tuple[str, ...]) -> None:
    x, w = torch.ones(2, 16), torch.ones(16)
    workspace = Workspace(2)
    with record(workspace) as recording:
        here = rms_norm(x, w, 1e-5)
        elsewhere: list[Tensor] = []
        other = threading.Thread(target=lambda: elsewhere.append(rms_norm(x + 1, w, 1e-5)))
        other.start()
        other.join()
    made = recording.tape()
    assert made is not None
    assert len(made) == 1
    poison(workspace)
    assert bool(here.isnan().all())
    assert torch.allclose(elsewhere[0], torch.ones(2, 16), atol=1e-4)


def test_outputs_that_live_keep_their_memory_and_others_give_it_back() -> None:
    workspace = Workspace(8)
    kept = workspace.take((2, 10), torch.float32)
    dropped = workspace.take((2, 10), torch.float32)
    assert kept.data_ptr() != dropped.data_ptr()
    address, held = dropped.data_ptr(), workspace.nbytes
    assert held == 2 * 8 * 10 * 4
    del dropped
    again = workspace.take((3, 10), torch.float32)
    assert again.data_ptr() == address
    assert workspace.nbytes == held
    assert again.data_ptr() % 64 == kept.data_ptr() % 64 == 0
    ids = workspace.take((8,), torch.int64)
    assert (ids.dtype, ids.shape) == (torch.int64, (8,))
    assert len({t.data_ptr() for t in (kept, again, ids)}) == 3
    for rows in (0, 9):
        with pytest.raises(ValueError, match=f"{rows} rows"):
            workspace.take((rows, 10), torch.float32)


@pytest.mark.parametrize("words", [[999], [1], [1, 0, 0], [2**64 - 1]], ids=["unknown", "bare", "cut", "huge"])
def test_words_that_are_no_tape_are_refused(words: list[int], isas: tuple[str, ...]) -> None:
    with pytest.raises(native.NativeError, match="status -1"):
        Tape(array.array("Q", words), ["broken"], {"broken": 0}, Workspace(1)).run()


def test_an_empty_tape_runs(isas: tuple[str, ...]) -> None:
    Tape(array.array("Q"), [], {}, Workspace(1)).run()


def test_tapes_and_single_ops_on_several_threads(isas: tuple[str, ...]) -> None:
    """A tape has the pool to itself; whoever comes meanwhile waits, and nobody waits for ever."""
    native.set_threads(2)
    models = [Model(2) for _ in range(2)]
    for model in models:
        model.set_step(3)
    recorded = [record_model(model, Workspace(2)) for model in models]
    expected = recorded[0].outputs[0].clone()
    x, big = torch.randn(4, HIDDEN), weight(4000, HIDDEN)
    alone = qlinear(x, big)
    wrong: list[str] = []

    def replay(mine: Recorded) -> None:
        for _ in range(40):
            mine.outputs[0].fill_(float("nan"))
            mine.tape.run()
            if not torch.equal(mine.outputs[0], expected):
                wrong.append("tape")

    def compute() -> None:
        same = [torch.equal(qlinear(x, big), alone) for _ in range(40)]
        wrong.extend("op" for kept in same if not kept)

    threads = [threading.Thread(target=replay, args=(mine,)) for mine in recorded] + [threading.Thread(target=compute)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        native.set_threads(3)
        native.set_threads(2)
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert wrong == []


def test_threads_may_be_sent_away_right_after_an_op(isas: tuple[str, ...]) -> None:
    """A worker that comes late to a range and finds the pool closing leaves; it does not wait for another range."""
    x, w = torch.randn(1, HIDDEN), weight(2000, HIDDEN)
    expected = qlinear(x, w)
    for count in range(150):
        native.set_threads(2 + count % 3)
        assert torch.equal(qlinear(x, w), expected)
        native.set_threads(1)


def test_recording_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch; from dibit.kernels.tape import Workspace, empty, record\n"
        "with record(Workspace(4)) as recording:\n"
        "    empty(2, 3); torch.ones(2).add(1)\n"
        "print('torch._dynamo' in sys.modules, recording.refusal)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split(maxsplit=1)[0] == "False"
    assert "cannot be recorded" in ended.stdout
