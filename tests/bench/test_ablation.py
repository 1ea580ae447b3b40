"""Stages one by one: what the judge says of blocks, and what is kept and printed of a run."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from dibit.bench import ablation
from dibit.bench.ablation import Found, Judge, Stage, float_streams, quantized_blocks, table
from dibit.bench.memory_trace import write_float
from dibit.bench.synthetic import Shape
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.models import resolve_arch
from dibit.quantize.importance import Model, Text
from dibit.quantize.streams import StreamConfig

TINY = Shape(hidden=64, layers=3, inter=128, heads=4, kv_heads=2, vocab=300)


def test_float_blocks_are_no_change_and_fewer_bits_are_more_of_one(tmp_path: Path) -> None:
    write_float(tmp_path / "model", TINY)
    tokens = torch.randint(TINY.vocab, (3, 24), generator=torch.Generator().manual_seed(5))
    with closing(open_checkpoint(tmp_path / "model")) as source:
        model = Model(source, *resolve_arch(source.config))
        text = Text(tokens, StreamConfig(), tmp_path)
        judge, floats = Judge(model, text, blocks=2), float_streams(model, text, blocks=2)
        assert judge.judge([model.block(0), model.block(1)])[0] < 1e-6
        kl = [
            judge.judge(quantized_blocks(model, stage, text, floats, bits=bits, group_size=32, seed=0))[0]
            for stage in (Stage("gptq", None, "gptq"), Stage("block-ap", None, "block-ap", {"steps": 2, "batch": 1}))
            for bits in (2, 8)
        ]
    assert kl[0] > 100 * kl[1] > 0
    assert kl[2] > 100 * kl[3] > 0


def test_a_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_float(tmp_path / "model", TINY)
    text, out = tmp_path / "text.txt", tmp_path / "ablation.json"
    text.write_text(" ".join(f"w{i % 280}" for i in range(400)))
    stages = (Stage("first", None, "gptq"), Stage("second", "first", "gptq", {"asymmetric": True}))
    monkeypatch.setattr(ablation, "STAGES", stages)
    words = ["--model", tmp_path / "model", "--calibration", text, "--test", text, "--out", out, "--group-size", 32]
    words += ["--blocks", 1, "--samples", 4, "--length", 16, "--windows", 3]

    def run(seeds: str, *more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, words), "--seeds", seeds, *more])
        ablation.main()
        said = capsys.readouterr()
        assert "| second | first |" in said.out
        return said.err.splitlines()

    assert run("0") == ["first, seed 0", "second, seed 0"]
    assert run("0,1") == ["first, seed 1", "second, seed 1"]
    with pytest.raises(SystemExit):
        run("0", "--bits", "3")
    assert "other settings" in capsys.readouterr().err
    found = json.loads(out.read_text())["found"]
    assert [(one["stage"], one["seed"]) for one in found] == [(s, i) for i in (0, 1) for s in ("first", "second")]
    # Another seed draws another text to learn from, and the same one to judge by.
    assert found[0]["kl"] != found[2]["kl"]


def test_the_table_has_the_change_of_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ablation, "STAGES", (Stage("a", None, "gptq"), Stage("b", "a", "gptq"), Stage("c", "b", "gptq"))
    )
    measured = [("a", None, 0, 0.5), ("a", None, 1, 0.4), ("b", "a", 0, 0.4), ("b", "a", 1, 0.5)]
    text = table([Found(stage, base, seed, kl, ppl=30.0, seconds=2.0) for stage, base, seed, kl in measured])
    assert text.splitlines()[2:] == [
        "| a |  | 0.450 |  |  | 30.00 | 2 |",
        "| b | a | 0.450 | -20% | +25% | 30.00 | 2 |",
    ]
