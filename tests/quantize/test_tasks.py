"""The evaluation harness on the runtime, with a task of our own; skipped where lm_eval is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.llm import LLM
from dibit.server.cli import main

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs:
  until: []
  max_gen_toks: 3
filter_list:
  - name: none
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}
QUESTIONS = ["w5 w6 w7", "w20 w3", "w9 w9 w50 w41 w2", "w33 w7 w8 w80"]


def test_without_the_harness_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dibit.quantize.tasks", raising=False)
    for words, message in (
        (["--tasks", "piqa"], "pip install 'dibit[eval]'"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "piqa", "--include-path", str(tmp_path / "none")], "not a directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["dibit", "eval", "tasks", "nowhere", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tasks() -> Any:
    pytest.importorskip("lm_eval")
    from dibit.quantize import tasks

    return tasks


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    threads = torch.get_num_threads()
    with LLM.of(build_core(tiny, EngineConfig(backend="reference", block_size=4, threads=1))) as llm:
        yield llm
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def own_tasks(tiny: Path, llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers an oracle gave: the likelier choice, and what it writes."""
    directory = tmp_path_factory.mktemp("tasks")
    oracle = LlamaForCausalLM.from_pretrained(tiny).eval()
    lines = []
    for i, question in enumerate(QUESTIONS):
        ids = [int(word[1:]) for word in question.split()]
        choices = [10 + i, 60 + i]
        with torch.no_grad():
            scores = oracle(torch.tensor([ids])).logits[0, -1]
            written = oracle.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        lines.append(
            {
                "question": question,
                "choices": [f"w{choice}" for choice in choices],
                "answer": int(scores[choices].argmax()),
                "written": llm.tokenizer.decode(written[0, len(ids) :].tolist()),
            }
        )
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, settings in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        (directory / f"{name}.yaml").write_text(f"task: dibit_{name}\n{source}{settings}")
    return directory


@pytest.mark.filterwarnings("default")
def test_own_tasks_run_through_the_engine(tasks: Any, llm: LLM, own_tasks: Path) -> None:
    names = [f"dibit_{name}" for name in TASKS]
    found = tasks.run_tasks(llm, names, include_path=own_tasks)
    results = {result.task: result for result in found.results}
    assert results["dibit_choose"].metrics["acc"] == 1
    assert results["dibit_choose"].samples == len(QUESTIONS)
    assert results["dibit_write"].metrics["exact_match"] == 1
    assert results["dibit_read"].metrics["word_perplexity"] > 1
    assert "acc_stderr" in results["dibit_choose"].metrics
    assert "dibit_choose" in found.text()
    limited = tasks.run_tasks(llm, names[:1], include_path=own_tasks, limit=2)
    assert limited.results[0].samples == 2


@pytest.fixture(scope="module")
def talking(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The same model with a chat template: w90 before and w91 behind a message, w92 where an answer begins."""
    path = tmp_path_factory.mktemp("talking") / "tiny"
    shutil.copytree(tiny, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    turns = "{% for message in messages %}w90 {{ message.content }} w91 {% endfor %}"
    settings["chat_template"] = turns + "{% if add_generation_prompt %}w92 {% endif %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    threads = torch.get_num_threads()
    with LLM.of(build_core(path, EngineConfig(backend="reference", block_size=4, threads=1))) as llm:
        yield llm
    torch.set_num_threads(threads)


@pytest.fixture
def asked(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that the harness asks of the model from here on."""
    found: list[Any] = []
    for name in ("likelihoods", "write"):
        answer = getattr(tasks, name)

        def heard(llm: LLM, requests: Any, *, answer: Any = answer, **rest: Any) -> Any:
            found.extend(requests)
            return answer(llm, requests, **rest)

        monkeypatch.setattr(tasks, name, heard)
    return found


@pytest.mark.filterwarnings("default")
def test_questions_are_put_into_the_chat_template(
    tasks: Any, talking: LLM, own_tasks: Path, tmp_path: Path, asked: list[Any]
) -> None:
    for name in ("choose", "write"):
        text = (own_tasks / f"{name}.yaml").read_text().replace(f"dibit_{name}", f"by_hand_{name}")
        (tmp_path / f"{name}.yaml").write_text(text.replace("{{question}}", "w90 {{question}} w91 w92"))
    tasks.run_tasks(talking, ["by_hand_choose", "by_hand_write"], include_path=tmp_path)
    by_hand = list(asked)
    asked.clear()
    found = tasks.run_tasks(talking, ["dibit_choose", "dibit_write"], include_path=own_tasks, chat_template=True)
    assert asked == by_hand
    # Two choices to weigh, and one text to write.
    assert len(asked) == 3 * len(QUESTIONS)
    assert {result.samples for result in found.results} == {len(QUESTIONS)}


@pytest.mark.filterwarnings("default")
def test_examples_are_turns_of_the_chat(tasks: Any, talking: LLM, own_tasks: Path, asked: list[Any]) -> None:
    tasks.run_tasks(talking, ["dibit_choose"], include_path=own_tasks, chat_template=True, shots=1)
    questions = [[int(word[1:]) for word in question.split()] for question in QUESTIONS]
    for i, request in enumerate(asked):
        question, answer, own = (turn[:-1] for turn in _split(request.context[:-1], 90))
        assert list(own) == questions[i // 2]
        assert list(question) in questions
        assert list(question) != list(own)
        assert len(answer) == 1
        assert request.context[-2:] == (91, 92)
        assert request.tokens == (10 + i // 2 + 50 * (i % 2),)


def _split(tokens: tuple[int, ...], mark: int) -> list[tuple[int, ...]]:
    """The pieces behind each mark."""
    starts = [i for i, token in enumerate(tokens) if token == mark]
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


@pytest.mark.filterwarnings("default")
def test_tasks_that_cannot_be_had(tasks: Any, llm: LLM, own_tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="riddles is not known"):
        tasks.run_tasks(llm, ["riddles"])
    text = (own_tasks / "choose.yaml").read_text().replace("questions.jsonl", "lost.jsonl")
    (tmp_path / "lost.yaml").write_text(text.replace("dibit_choose", "dibit_lost"))
    with pytest.raises(ConfigError, match=r"cannot be prepared.*docs/measure\.md"):
        tasks.run_tasks(llm, ["dibit_lost"], include_path=tmp_path)
