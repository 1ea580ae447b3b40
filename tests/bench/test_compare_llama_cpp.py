"""The comparison with llama.cpp, with programs that stand in for its own, and on turns made by hand."""

from __future__ import annotations

import ast
import json
import stat
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import typer

from dibit.bench import compare_llama_cpp, llama_cpp
from dibit.bench.comparison import CASES, Case, Turn, format_rows, rows_of
from dibit.bench.llama_cpp import LlamaCpp, Ran, tensor_bytes
from dibit.bench.machine import MachineFacts
from dibit.bench.one_run import one_run
from dibit.bench.synthetic import LLAMA_1B, Shape, write_gguf, write_low_bit
from dibit.engine import LLM, SamplingParams
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.server.cli_bench import bench_app

TINY = Shape(hidden=64, layers=2, inter=128, heads=4, kv_heads=2, vocab=320)
CASE = Case("tiny-3", "tiny", TINY, 3, 4, "Q3_K_S", {"prefill": 2.0, "decode 1": 1.5}, bandwidth=0.5, start_s=3.0)
BATCHED = """
import json, sys
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a line that is no result")
for n in said["-npl"].split(","):
    print(json.dumps({"pl": int(n), "pp": int(said["-npp"]), "tg": int(said["-ntg"]), "speed_pp": 50.0,
                      "speed_tg": 10.0 * int(n), "said": said}))
"""
QUANTIZE = "import shutil, sys; shutil.copy(sys.argv[-3], sys.argv[-2])"
VERSION = "print('version: 7 (abc)')"


def options_of_decode() -> set[str]:
    bench: Any = typer.main.get_command(bench_app)
    return {name for parameter in bench.commands["decode"].params for name in parameter.opts}


@pytest.fixture
def tools(tmp_path: Path) -> LlamaCpp:
    for name, code in zip(llama_cpp.PROGRAMS, (VERSION, BATCHED, QUANTIZE), strict=True):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\n{code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return LlamaCpp(tmp_path)


def turn(side: Any, repeat: int, speed: float, **fields: Any) -> Turn:
    values = {"prefill": 2 * speed, "decode 1": speed}
    defaults = {"start_s": 4.0, "peak_rss_bytes": 10**9, "token_bytes": 5e7}
    return Turn("tiny-3", side, repeat, values, **{**defaults, **fields})


def test_rows_are_medians_of_neighbouring_turns() -> None:
    turns = []
    # The machine halves its speed in the second repeat; the ratio stays.
    for repeat, (ours, theirs) in enumerate([(20.0, 10.0), (10.0, 4.0), (24.0, 8.0)]):
        turns += [
            turn("llama.cpp", repeat, theirs),
            turn("dibit", repeat, ours, bandwidth_gb_s=2.0, tape_share=0.98, start_s=2.0, packed_bytes=6 * 10**8),
        ]
    turns.append(turn("dibit", 3, 1000.0))  # the other side has not answered yet
    rows = {row.work: row for row in rows_of(CASE, turns)}
    assert (rows["decode 1"].dibit, rows["decode 1"].llama_cpp, rows["decode 1"].ratio) == (20.0, 8.0, 2.5)
    assert [rows[work].met for work in ("prefill", "decode 1")] == [True, True]
    # 20 tokens of 50 MB a second of 2 GB/s.
    assert rows["share of bandwidth"].dibit == pytest.approx(50.0)
    assert rows["share of bandwidth"].llama_cpp == pytest.approx(20.0)
    assert rows["start to first token"].met is True
    assert rows["peak memory"].goal == "<= 900 MB"
    assert rows["peak memory"].met is False
    assert rows["step in the tape"].met is True
    assert rows["weights per token"].met is None
    table = format_rows(list(rows.values())).splitlines()
    assert table[2] == "| tiny | 3 | Q3_K_S | prefill | tok/s | 40 | 16 | 2.50 | >= 2 x | yes |"
    assert len({line.count("|") for line in table}) == 1
    assert rows_of(CASE, turns[:1]) == []


def test_the_goals_are_those_of_every_width() -> None:
    assert {(case.bits, case.type) for case in CASES if case.shape is LLAMA_1B} == {
        (4, "Q4_0"),
        (3, "Q3_K_S"),
        (2, "Q2_K"),
    }
    assert all(set(case.goals) == {"prefill", "decode 1", "decode 8", "decode 32"} for case in CASES)


def test_programs_are_read_and_their_failures_told(tools: LlamaCpp, tmp_path: Path) -> None:
    assert tools.version() == "version: 7 (abc)"
    batches, ran = tools.batched(tmp_path / "m", prompt_len=8, gen_len=4, sequences=(1, 4), threads=2)
    assert [(b.sequences, b.prompt_len, b.gen_len, b.decode_tok_s) for b in batches] == [(1, 8, 4, 10), (4, 8, 4, 40)]
    said = json.loads(ran.stdout.splitlines()[1])["said"]
    assert (said["-t"], said["-tb"]) == ("2", "2")
    assert int(said["-c"]) >= 4 * 12
    (tmp_path / "llama-batched-bench").write_text(f"#!{sys.executable}\nraise SystemExit('no such model')\n")
    with pytest.raises(ConfigError, match="ended with status 1:\nno such model"):
        tools.batched(tmp_path / "m", prompt_len=8, gen_len=4, sequences=(1,), threads=2)
    (tmp_path / "llama-quantize").unlink()
    with pytest.raises(ConfigError, match="no llama-quantize"):
        LlamaCpp(tmp_path)


def test_a_build_is_for_this_machine_and_repairs_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cmake").write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"said = pathlib.Path({str(tmp_path / 'said')!r})\n"
        "said.open('a').write(repr(sys.argv[1:]) + chr(10))\n"
        "if sys.argv[1] == '--build':\n"
        "    programs = pathlib.Path(sys.argv[2]) / 'bin'\n"
        "    programs.mkdir()\n"
        "    [(programs / name).touch() for name in sys.argv[4:-2]]\n"
    )
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ConfigError, match="--llama-cpp-source"):
        llama_cpp.build(tmp_path, tmp_path / "out", jobs=1)
    (tmp_path / "CMakeLists.txt").touch()
    tools = llama_cpp.build(tmp_path, tmp_path / "out", jobs=3)
    assert tools.directory == tmp_path / "out" / "bin"
    configure, make = (ast.literal_eval(line) for line in (tmp_path / "said").read_text().splitlines())
    assert "-DGGML_NATIVE=ON" in configure
    [include] = [word.removeprefix("-DCMAKE_CXX_FLAGS=-include ") for word in configure if "-include" in word]
    assert "const char (*)[64]" in Path(include).read_text()
    assert make[-2:] == ["-j", "3"]


def test_peak_memory_is_that_of_the_program_alone() -> None:
    here = bytearray(3 * 10**8)
    ran = llama_cpp.run([sys.executable, "-S", "-c", "x = bytearray(10**8); print(len(x) + 1)"])
    assert ran.stdout == "100000001\n"
    assert 10**8 < ran.peak_rss_bytes < 2 * 10**8 < len(here)
    assert ran.seconds > 0
    with pytest.raises(ConfigError, match="no such program"):
        llama_cpp.run(["no-such-program"])
    with pytest.raises(ConfigError, match="status -11"):
        llama_cpp.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_synthetic_checkpoint_runs(tmp_path: Path, bits: int) -> None:
    write_low_bit(tmp_path / "m", TINY, bits=bits)
    [done] = LLM(str(tmp_path / "m")).generate([[5, 300, 7]], SamplingParams(max_tokens=4, temperature=0.0, logprobs=1))
    assert len(done.token_ids) == 4
    assert done.logprobs is not None
    assert all(torch.isfinite(torch.tensor(token.logprob)) for token in done.logprobs)


def test_both_sides_have_the_same_structure(tmp_path: Path, tools: LlamaCpp) -> None:
    checkpoint, model = compare_llama_cpp.prepare(CASE, tmp_path / "models", tools, pure=False)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"tiny-3bit", "tiny-F16.gguf", "tiny-Q3_K_S.gguf"}
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(model).tensors}
    assert shapes["blk.1.ffn_down.weight"] == (128, 64)
    assert shapes["blk.0.attn_k.weight"] == (64, 32)
    assert "output.weight" not in shapes  # tied
    matrices = sum(n * k for _, _, n, k in TINY.linears()) * TINY.layers + 320 * 64
    assert tensor_bytes(model) == 2 * matrices + 4 * 64 * (2 * TINY.layers + 1)
    made = (checkpoint.stat().st_mtime_ns, model.stat().st_mtime_ns)
    again = compare_llama_cpp.prepare(CASE, tmp_path / "models", tools, pure=False)
    assert (again[0].stat().st_mtime_ns, again[1].stat().st_mtime_ns) == made


def test_one_run_counts_what_is_held(tmp_path: Path) -> None:
    write_low_bit(tmp_path / "m", TINY, bits=2)
    config = EngineConfig(device="cpu", max_model_len=64, max_num_seqs=1, head_bits=4)
    found = one_run(str(tmp_path / "m"), config, prompt_len=20, gen_len=5)
    assert found.tokens == 5
    assert 0 < found.loaded_s <= found.first_token_s <= found.finished_s
    # Two layers of two heads of 16 in float16, keys and values, 64 tokens.
    assert found.kv_bytes == 2 * 2 * 16 * 2 * 2 * 64
    assert found.weight_bytes > 320 * 64 // 2


def test_sides_take_turns_and_every_turn_is_kept(
    tmp_path: Path, tools: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = MachineFacts("cpu", 2, 1, "avx2", 8.0, 0, "2", "abc")
    monkeypatch.setattr(compare_llama_cpp, "machine_facts", lambda: facts)
    out, order = tmp_path / "out.json", []

    def ours(case: Case, checkpoint: Path, work: object, repeat: int) -> Turn:
        order.append(("dibit", repeat))
        return turn("dibit", repeat, 30.0, bandwidth_gb_s=10.0)

    def theirs(case: Case, model: Path, tools: LlamaCpp, work: object, repeat: int) -> Turn:
        if repeat == 1:
            assert len(json.loads(out.read_text())["turns"]) == 2
        order.append(("llama.cpp", repeat))
        return turn("llama.cpp", repeat, 10.0)

    monkeypatch.setattr(compare_llama_cpp, "measure_dibit", ours)
    monkeypatch.setattr(compare_llama_cpp, "measure_llama_cpp", theirs)
    work = compare_llama_cpp.Work()
    compare_llama_cpp.compare([CASE], tools, work, directory=tmp_path / "models", repeats=2, pure=False, out=out)
    assert order == [("dibit", 0), ("llama.cpp", 0), ("llama.cpp", 1), ("dibit", 1)]
    written = json.loads(out.read_text())
    assert len(written["turns"]) == 4
    assert written["llama_cpp"] == "version: 7 (abc)"
    assert {row["work"]: row["ratio"] for row in written["rows"]}["decode 1"] == 3.0


def test_what_a_turn_asks_of_both_sides(tmp_path: Path, tools: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    known = options_of_decode()
    asked = []

    def run(words: list[object]) -> Ran:
        said = [str(word) for word in words]
        if "dibit.bench.one_run" in said:
            return Ran(float(len(asked)), 10**9, json.dumps({"weight_bytes": 70, "kv_bytes": 7}))
        assert {word for word in said if word.startswith("--")} <= known
        given = dict(zip(said[6::2], said[7::2], strict=False))
        asked.append(given)
        batches = [int(batch) for batch in given["--batch-sizes"].split(",")]
        longest = max(batches) * (1 + int(given["--prompt-len"]) // 128) + int(given["--prompt-len"])
        assert int(given["--max-model-len"]) > longest + int(given["--gen-len"])
        assert int(given["--max-num-seqs"]) == max(batches)
        lines = [
            {
                "batch": batch,
                "prefill_tok_s": 1000.0 + int(given["--prompt-len"]),
                "decode_tok_s": 10.0 * batch + int(given["--prompt-len"]) / 1000,
                "weight_bytes_per_token": 50.0 / batch,
                "bandwidth_gb_s": 20.0,
                "tape_share": 0.9 + batch / 100,
            }
            for batch in batches
        ]
        Path(given["--json"]).write_text(json.dumps(lines))
        return Ran(1.0, 1, "")

    monkeypatch.setattr(compare_llama_cpp, "run", run)
    work = compare_llama_cpp.Work(prompt_len=64, batch_prompt_len=8, gen_len=4, batch_sizes=(1, 4), threads=2)
    ours = compare_llama_cpp.measure_dibit(CASE, tmp_path, work, 0)
    assert ours.tok_s == {"prefill": 1064.0, "decode 1": 10.008, "decode 4": 40.008, "decode 1 after 64": 10.064}
    assert (ours.token_bytes, ours.packed_bytes, ours.tape_share) == (50.0, 77, 0.91)
    assert [one["--head-bits"] for one in asked] == ["4", "4"]
    write_gguf(tmp_path / "m.gguf", TINY)
    theirs = compare_llama_cpp.measure_llama_cpp(CASE, tmp_path / "m.gguf", tools, work, 0)
    assert theirs.tok_s == {"prefill": 50.0, "decode 1": 10.0, "decode 4": 40.0, "decode 1 after 64": 10.0}
    assert theirs.tok_s.keys() == ours.tok_s.keys()
    with pytest.raises(ConfigError, match="start with 1"):
        compare_llama_cpp.Work(batch_sizes=(8, 32))
