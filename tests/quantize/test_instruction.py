"""Instruction data: only answers count, in exactly the tokens that serving would show; bad rows are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dibit.engine.errors import ConfigError
from dibit.engine.tokenizer import Tokenizer, load_tokenizer_directory
from dibit.quantize import quantize_checkpoint
from dibit.quantize.end_to_end import EndToEnd
from dibit.quantize.finetune import train_end_to_end
from dibit.quantize.instruction import Examples, load_instructions

SYSTEM, USER, ASSISTANT, END = 89, 90, 91, 1
NAMES = "{'system': 'w89', 'user': 'w90', 'assistant': 'w91'}"
TEMPLATE = (
    "{% for m in messages %}{{ " + NAMES + "[m.role] }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)
# Shows only the first word of an answer once the conversation has gone on.
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split()[0] }}")


def tokenizer(model: Path, folder: Path, template: str | None) -> Tokenizer:
    folder.mkdir()
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer_directory(folder)


def load(tiny: Path, tmp_path: Path, rows: Any, *, template: str | None = TEMPLATE, **changes: Any) -> Examples:
    path = tmp_path / "rows"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    chosen = tokenizer(tiny, tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}", template)
    options = {"has_template": template is not None, "samples": None, "length": 32, "seed": 0, **changes}
    return load_instructions(path, chosen, **options)


def shown(examples: Examples, i: int = 0) -> tuple[list[int], list[int]]:
    """Tokens of an example without padding, and those whose prediction counts."""
    tokens, counted = examples.tokens[i].tolist(), examples.counted[i].tolist()
    while tokens and tokens[-1] == 0:
        tokens.pop()
    return tokens, [tokens[t + 1] for t in range(len(tokens) - 1) if counted[t]]


def test_alpaca_rows(tiny: Path, tmp_path: Path) -> None:
    rows: list[Mapping[str, str]] = [{"instruction": "w5 w6", "input": "w7", "output": "w8 w9"}]
    assert shown(load(tiny, tmp_path, rows)) == ([USER, 5, 6, 7, END, ASSISTANT, 8, 9, END], [8, 9, END])
    rows = [{"instruction": "w5", "output": "w8"}]
    assert shown(load(tiny, tmp_path, rows)) == ([USER, 5, END, ASSISTANT, 8, END], [8, END])


def test_every_answer_of_a_conversation_counts_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    words = [
        ("system", "w3"),
        ("user", "w4"),
        ("assistant", "w5 w6"),
        ("user", "w7"),
        ("assistant", "w8"),
        ("user", "w9"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in words]}
    tokens, counted = shown(load(tiny, tmp_path, json.dumps(row) + "\n\n"))
    assert tokens == [SYSTEM, 3, END, USER, 4, END, ASSISTANT, 5, 6, END, USER, 7, END, ASSISTANT, 8, END]
    assert counted == [5, 6, END, 8, END]


def test_a_template_that_forgets_gives_one_example_per_answer(tiny: Path, tmp_path: Path) -> None:
    words = [("user", "w4"), ("assistant", "w5 w6"), ("user", "w7"), ("assistant", "w8 w9")]
    row = {"messages": [{"role": role, "content": content} for role, content in words]}
    found = load(tiny, tmp_path, [row], template=FORGETFUL)
    assert [shown(found, i) for i in range(2)] == [
        ([USER, 4, END, ASSISTANT, 5, 6, END], [5, 6, END]),
        ([USER, 4, END, ASSISTANT, 5, END, USER, 7, END, ASSISTANT, 8, 9, END], [8, 9, END]),
    ]


def test_without_a_template_the_wording_is_alpacas(tiny: Path, tmp_path: Path) -> None:
    found = load(tiny, tmp_path, [{"instruction": "w5", "output": "w8 w9"}], template=None, length=64)
    tokens, counted = shown(found)
    assert counted == [8, 9, END]
    assert tokens[-3:] == [8, 9, END]
    assert 5 in tokens[:-3]
    with pytest.raises(ConfigError, match="no chat template"):
        load(tiny, tmp_path, [{"messages": [{"role": "user", "content": "w5"}]}], template=None)


def test_long_rows_lose_their_end_and_rows_without_an_answer_are_left_out(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"instruction": "w5", "output": "w8 w9 w10 w11"},
        {"instruction": "w5 w6 w7 w8 w9 w10", "output": "w8"},
        {"instruction": "w5", "output": ""},
    ]
    found = load(tiny, tmp_path, rows, length=7)
    assert shown(found) == ([USER, 5, END, ASSISTANT, 8, 9, 10], [8, 9, 10])
    assert {key: found.facts[key] for key in ("rows", "samples", "cut", "empty")} == {
        "rows": 3,
        "samples": 1,
        "cut": 2,
        "empty": 1,
    }
    assert "empty answer" in caplog.text
    assert "lose their end" in caplog.text


def test_a_batch_is_as_long_as_it_must_be(tiny: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "w5", "output": "w8 " * n} for n in (1, 9, 3)]
    found = load(tiny, tmp_path, rows)
    lengths = found.counted.sum(dim=1)
    short = torch.tensor([int(lengths.argmin())])
    tokens, counted = found.take(short)
    assert tokens.tolist() == [[USER, 5, END, ASSISTANT, 8, END]]
    assert counted.tolist() == [[False, False, False, True, True, False]]
    assert found.take(torch.arange(3))[0].shape == found.tokens.shape


def test_the_draw_follows_the_seed(tiny: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "output": f"w{i + 1}"} for i in range(5, 25)]
    draws = [load(tiny, tmp_path, rows, samples=6, seed=seed).tokens for seed in (0, 0, 1)]
    assert draws[0].shape[0] == 6
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no rows"),
        ("{", "line 1"),
        ('[{"instruction": "w5"}', "no JSON array"),
        ([{"prompt": "w5", "completion": "w6"}], "row 1 .* keys prompt, completion"),
        (["w5"], "row 1 .* str"),
        ([{"instruction": 5, "output": "w6"}], "instruction is int"),
        ([{"messages": []}], "must be a list"),
        ([{"messages": [{"role": "tool", "content": "w5"}]}], "role 'tool'"),
        ([{"messages": [{"role": "user", "content": [{"text": "w5"}]}]}], "type list"),
        ([{"messages": [{"content": "w5"}]}], "without role"),
        ([{"messages": [{"role": "user", "content": "w5"}]}], "no answer to learn"),
        ([{"instruction": "w5 " * 40, "output": "w6"}], "none with an answer"),
    ],
)
def test_bad_rows_are_named(tiny: Path, tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny, tmp_path, rows)


def test_a_file_that_cannot_be_read_is_named(tiny: Path, tmp_path: Path) -> None:
    chosen = tokenizer(tiny, tmp_path / "tokenizer", TEMPLATE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("absent", "cannot be read"), ("binary", "not UTF-8")):
        with pytest.raises(ConfigError, match=message):
            load_instructions(tmp_path / name, chosen, has_template=True, samples=1, length=8, seed=0)


def test_a_checkpoint_learns_to_answer(tiny: Path, tmp_path: Path) -> None:
    """Without a teacher: cross entropy of the answers falls."""
    low = tmp_path / "low"
    quantize_checkpoint(str(tiny), low, method="rtn", bits=3, group_size=32)
    (low / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"instruction": f"w{5 + i} w{7 + i}", "output": "w20 w21 w22"} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = train_end_to_end(
        str(low),
        tmp_path / "out",
        settings=EndToEnd(objective="ce", steps=24, batch=3, held_out=0.25, scale_rate=0.02, norm_rate=0.02),
        instructions=tmp_path / "rows.json",
        sequence_length=16,
    )
    assert report.tokens == 24 * 3 * 4
    assert report.best.nll < 0.9 * report.first.nll
    assert report.data["samples"] == 12
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
