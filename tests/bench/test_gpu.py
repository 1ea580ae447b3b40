"""The GPU bench: a machine without a GPU is told so; sections are cut off, peers left out with a reason; on a GPU, the
checks pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.bench import gpu
from dibit.bench.charts import read_results
from dibit.bench.gpu_charts import gpu_charts, gpu_tables
from dibit.bench.gpu_peers import PEERS, WrongProduct, checked, torch_linear
from dibit.bench.gpu_records import (
    Bandwidth,
    Check,
    Decoding,
    GpuRun,
    Note,
    PeerTiming,
    Row,
    Timing,
    append,
    read,
)
from dibit.bench.plot import plot
from dibit.kernels.formats import Format
from dibit.kernels.triton import availability
from dibit.server.output import write_json

TIMING = Timing("Llama-2-7B", 4096, 4096, 1, 4, 128, us=8.0, predicted_us=6.0, weight_bytes=8_000_000)
ROWS: tuple[Row, ...] = (
    Check("qlinear", True, "fine"),
    Bandwidth(2000.0),
    TIMING,
    PeerTiming("torch", "Llama-2-7B", 4096, 4096, 1, 16, us=24.0),
    Decoding("demo", 8, 128, 900.5),
    Note("marlin", "vllm is not installed"),
)


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = availability.unavailable()
    assert reason is not None
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: False\n"
         "from dibit.bench.gpu import main; raise SystemExit(main(['--out', '/nowhere/x.json']))"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"gpu: {reason}" in done.stderr


def test_rows_come_back_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read(path)) == []
    for row in ROWS:
        append(path, row)
    with path.open("a") as file:
        file.write('{"row": "Check", "na')
    assert tuple(read(path)) == ROWS
    run = GpuRun("a GPU", "8.0", "2", "3")
    run.add(read(path))
    assert (run.checks, run.bandwidth, run.timings, run.peers, run.decoding, run.notes) == tuple([row] for row in ROWS)


def test_what_a_crashed_section_found_is_kept_and_time_passes_on(tmp_path: Path) -> None:
    run, given = GpuRun("a GPU", "8.0", "2", "3"), dict[str, float]()

    def start(arguments: Sequence[str], limit_s: float) -> str | None:
        name, _, path, _, seconds, *others = arguments
        assert others == ["--model", "some/model"]
        given[name] = float(seconds)
        append(Path(path), Check(name, True, ""))
        return "its process ended with status -6" if name == "first" else None

    out = tmp_path / "gpu.json"
    gpu.run_sections(run, {"first": 100.0, "second": 50.0}, out, model="some/model", start=start)
    assert list(given) == ["first", "second"]
    assert given["second"] > given["first"], "what the first one left"
    assert [check.name for check in run.checks] == ["first", "second"]
    assert run.notes == [Note("first", "its process ended with status -6")]
    assert len(json.loads(out.read_text())["checks"]) == 2


def test_a_section_that_hangs_is_killed_and_a_failing_one_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "section"
    monkeypatch.setattr(sys, "executable", str(script))
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    assert gpu.started(["checks"], 0.2) == "killed after 0 s"
    script.write_text("#!/bin/sh\nexit 3\n")
    assert gpu.started(["checks"], 20.0) == "its process ended with status 3"
    script.write_text("#!/bin/sh\nexit 0\n")
    assert gpu.started(["checks"], 20.0) is None


def test_a_peer_gets_a_weight_it_knows_and_must_multiply_it() -> None:
    w = random_weight(64, 256, Format(4, 128))
    symmetric = PEERS["marlin"].weight(w)
    assert set(symmetric.zeros.flatten().tolist()) == {8}
    assert PEERS["gemlite"].weight(w) is w
    x = torch.randn(3, 256, dtype=torch.float16)
    checked(torch_linear(w), w, x)
    with pytest.raises(WrongProduct):
        checked(torch_linear(symmetric), w, x)
    with pytest.raises(WrongProduct):
        checked(lambda x: torch_linear(w)(x) * float("nan"), w, x)


def test_marlin_is_given_the_codes_as_gptq_packs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM's functions, which unpacks eight codes of a column from a word and multiplies."""

    def repack(words: Tensor, order: Tensor, k: int, n: int, bits: int) -> Tensor:
        assert words.dtype == torch.int32
        assert words.shape == (k // 8, n)
        shifts = torch.arange(0, 32, bits)[None, :, None]
        return (words.long()[:, None] >> shifts & 15).reshape(k, n)

    def permute(scales: Tensor, k: int, n: int, group_size: int) -> Tensor:
        assert scales.shape == (k // group_size, n)
        return scales.repeat_interleave(group_size, 0)

    def apply(*, input: Tensor, weight: Tensor, weight_scale: Tensor, wtype: int, **others: object) -> Tensor:
        names = {"weight_zp", "g_idx", "g_idx_sort_indices", "workspace", "is_k_full"}
        assert others.keys() == names | {"output_size_per_partition", "input_size_per_partition"}
        return input @ ((weight - wtype) * weight_scale).to(input.dtype)

    utils = SimpleNamespace(
        marlin_make_empty_g_idx=lambda device: torch.empty(0, dtype=torch.int32),
        marlin_make_workspace_new=lambda device: torch.zeros(1),
        marlin_permute_scales=permute,
        apply_gptq_marlin_linear=apply,
    )
    folder = "vllm.model_executor.layers.quantization.utils"
    for name, module in {
        "vllm": SimpleNamespace(_custom_ops=SimpleNamespace(gptq_marlin_repack=repack)),
        folder: SimpleNamespace(marlin_utils=utils),
        "vllm.scalar_type": SimpleNamespace(scalar_types=SimpleNamespace(uint4b8=8)),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    w = PEERS["marlin"].weight(random_weight(64, 256, Format(4, 128)))
    checked(PEERS["marlin"].build(w), w, torch.randn(3, 256, dtype=torch.float16))


def full_run() -> GpuRun:
    run = GpuRun("NVIDIA A100", "8.0", "2", "3")
    run.add(ROWS)
    run.add(
        [
            Check("draws", False, "token 3, not 4"),
            Timing("Llama-2-7B", 4096, 4096, 16, 4, 128, us=10.0, predicted_us=None, weight_bytes=8_000_000),
            Timing("Llama-2-7B", 12288, 4096, 1, 4, 128, us=16.0, predicted_us=15.0, weight_bytes=24_000_000),
            PeerTiming("torch", "Llama-2-7B", 12288, 4096, 1, 16, us=80.0),
            PeerTiming("marlin", "Llama-2-7B", 12288, 4096, 1, 4, us=8.0),
            PeerTiming("gemlite", "Llama-2-7B", 4096, 4096, 1, 2, us=8.0),
        ]
    )
    return run


def test_charts_hold_what_was_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    write_json(full_run(), str(out))
    results = read_results([out])
    charts = {chart.name: {s.name: list(s.points) for s in chart.series} for chart in gpu_charts(results.gpus)}
    assert charts == {
        "NVIDIA-A100-predicted": {"as predicted": [(6.0, 6.0), (16.0, 16.0)], "4 bits": [(6.0, 8.0), (15.0, 16.0)]},
        "NVIDIA-A100-bandwidth": {"4 bits": [(1, pytest.approx((50 + 75) / 2)), (16, pytest.approx(40.0))]},
        "NVIDIA-A100-beside-torch": {"4 bits": [(1, 4.0)]},
        "NVIDIA-A100-beside-marlin": {"4 bits": [(1, 0.5)]},
    }
    checks, ratios, speeds, left_out = gpu_tables(results.gpus)
    assert checks.title == "NVIDIA A100: 1 of 2 checks failed"
    assert ratios.rows[0] == ("torch", "4", "1", "4.00", "3.00", "[4096, 4096]")
    assert speeds.rows == [("demo", "8", "900.5")]
    assert left_out.rows == [("marlin", "vllm is not installed")]
    page = plot(results, tmp_path / "pictures")[0].read_text()
    assert "NVIDIA A100: beside marlin" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_run_cut_short_still_makes_a_page(tmp_path: Path) -> None:
    run = GpuRun("NVIDIA A100", "8.0", "2", "3", notes=[Note("checks", "killed after 200 s")])
    write_json(run, str(tmp_path / "gpu.json"))
    results = read_results([tmp_path / "gpu.json"])
    assert gpu_charts(results.gpus) == []
    assert "killed after 200 s" in plot(results, tmp_path / "pictures")[0].read_text()


def test_a_run_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-PCIE-40GB")
    monkeypatch.setattr(gpu, "version", lambda package: "3.7.1")
    passed = True

    def started(arguments: Sequence[str], limit_s: float) -> str | None:
        rows = Path(arguments[2])
        if arguments[0] == "checks":
            append(rows, Check("draws", passed, "as it is"))
        if arguments[0] == "products":
            append(rows, Bandwidth(1500.0))
            append(rows, TIMING)
        return "killed after 90 s" if arguments[0] == "gemlite" else None

    monkeypatch.setattr(gpu, "started", started)
    out = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert (stored["gpu"], stored["capability"], len(stored["timings"])) == ("NVIDIA A100-PCIE-40GB", "8.0", 1)
    assert stored["notes"] == [{"section": "gemlite", "text": "killed after 90 s"}]
    assert (tmp_path / "results" / "gpu" / "bench.html").exists()
    assert "gemlite  killed after 90 s" in capsys.readouterr().out
    passed = False
    assert gpu.main(["--out", str(out), "--checks-only"]) == 1
    assert json.loads(out.read_text())["timings"] == []


def test_every_section_has_its_share_and_the_shares_are_nine_minutes() -> None:
    assert sum(gpu.SHARES_S.values()) == 540
    assert set(PEERS) <= set(gpu.SHARES_S)


@pytest.mark.gpu
def test_every_kernel_passes_on_this_gpu() -> None:
    """In a process of its own: this one may have imported the kernels for the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "dibit.bench.gpu", "--checks-only"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
