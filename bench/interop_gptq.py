"""Do GPTQ and AWQ checkpoints pass between dibit and GPTQModel unchanged? Every weight, to the bit.

    python -m venv /path/to/side && /path/to/side/bin/pip install gptqmodel
    python -m dibit.bench.interop_gptq --python /path/to/side/bin/python

A tiny random Llama is quantized by GPTQModel (in its own environment) and opened by dibit, then quantized by dibit and
opened by GPTQModel (in AWQ's form too). In each case the weights that dibit dequantizes must equal those that
GPTQModel's own modules dequantize. A JSON line per case goes to stdout; the exit status is 1 when any differs. Needs no
network and no GPU. `--only-by-dibit` leaves out the slow half, in which GPTQModel quantizes.

This file runs in both environments: the halves import what belongs to theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HIDDEN = 128
# bits, group size, symmetric, checkpoint_format
BY_TOOL = (
    (4, 32, True, "gptq"),
    (4, 32, False, "gptq"),
    (4, 64, False, "gptq_v2"),
    (3, 32, True, "gptq"),
    (3, 64, False, "gptq_v2"),
    (2, 32, True, "gptq"),
    (2, 64, False, "gptq_v2"),
    (8, 128, True, "gptq_v2"),
)
# (bits, group size) of each of the two layers, export; the mixed case needs `dynamic`
BY_DIBIT = (
    (((2, 32), (2, 32)), "gptq"),
    (((3, 32), (3, 32)), "gptq"),
    (((4, 64), (4, 64)), "gptq"),
    (((8, -1), (8, -1)), "gptq"),
    (((4, 64), (2, 32)), "gptq"),
    # Symmetric: GPTQModel refuses asymmetric files of version 1 that it did not write itself.
    (((4, 64), (4, 64)), "gptq-v1"),
    (((4, 32), (4, 32)), "awq"),
)


@dataclass(frozen=True)
class Case:
    """One checkpoint: who wrote it, and how far the two readings of it are apart.

    bits, group_size  of most modules
    mixed             some modules have another format
    """

    writer: str
    bits: int
    group_size: int
    mixed: bool
    symmetric: bool
    checkpoint_format: str
    modules: int
    weights: int
    max_difference: float
    reason: str
    versions: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="python of the environment that has gptqmodel")
    parser.add_argument("--only-by-dibit", action="store_true", help="leave out what GPTQModel quantizes")
    parser.add_argument("--as-tool", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_tool:
        for job in json.loads(arguments.as_tool.read_text()):
            _work_as_tool(job)
        return 0
    with tempfile.TemporaryDirectory(prefix="dibit-interop-") as folder:
        by_tool = () if arguments.only_by_dibit else BY_TOOL
        cases = _run(arguments.python, Path(folder), by_tool)
    for case in cases:
        print(json.dumps(asdict(case)))
    return int(any(case.max_difference > 0 for case in cases))


def _run(python: Path, folder: Path, by_tool: tuple[tuple[int, int, bool, str], ...]) -> list[Case]:
    """This environment's half: makes the model, has the other tool work, compares."""
    from dibit.bench.interop import write_rounded

    model = folder / "model"
    _make_model(model)
    jobs: list[dict[str, Any]] = []
    for bits, group_size, symmetric, label in by_tool:
        out = folder / f"tool-{bits}-{group_size}-{symmetric}-{label}"
        jobs.append(
            {
                "model": str(model),
                "out": str(out),
                "bits": bits,
                "group_size": group_size,
                "sym": symmetric,
                "format": label,
            }
        )
    for number, (formats, to) in enumerate(BY_DIBIT):
        out = folder / f"dibit-{number}"
        write_rounded(model, out, formats, to=to, symmetric=to == "gptq-v1")
        jobs.append({"out": str(out), "awq": to == "awq"})
    note = folder / "jobs.json"
    note.write_text(json.dumps(jobs))
    command = [str(python), "-P", __file__, "--python", str(python), "--as-tool", str(note)]
    # GPTQModel's pool asks for more workers than it grants itself on two cores.
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(f"the other environment failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [_case(Path(job["out"]), "gptqmodel" if "model" in job else "dibit") for job in jobs]


def _make_model(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dibit.engine.checkpoint import open_checkpoint, resolve_model

    torch.manual_seed(0)
    demo = open_checkpoint(resolve_model("demo"))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=demo.config["vocab_size"],
        max_position_embeddings=256,
        bos_token_id=demo.config["bos_token_id"],
        eos_token_id=demo.config["eos_token_id"],
        pad_token_id=demo.config["pad_token_id"],
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(out)
    demo.write_tokenizer(out)
    demo.close()


def _case(checkpoint_dir: Path, written_by: str) -> Case:
    from dibit.bench.interop import compare

    found = compare(checkpoint_dir)
    decision = found.checkpoint.zero_decision()
    return Case(
        writer=written_by,
        bits=found.quantization.bits,
        group_size=found.quantization.group_size,
        mixed=found.mixed,
        symmetric=found.quantization.symmetric,
        checkpoint_format=found.quantization.checkpoint_format,
        modules=found.modules,
        weights=found.weights,
        max_difference=found.max_difference,
        reason="" if decision is None else decision.reason,
        versions=json.loads(checkpoint_dir.with_suffix(".versions").read_text()),
    )


def _work_as_tool(job: dict[str, Any]) -> None:
    """The other environment's half: quantize if asked, then save what its own modules dequantize."""
    from importlib.metadata import version

    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from safetensors.torch import save_file

    out = Path(job["out"])
    if "model" in job:
        options = {key: job[key] for key in ("bits", "group_size", "sym", "format")}
        config = QuantizeConfig(**options, desc_act=False, device="cpu")
        model = GPTQModel.load(job["model"], config, dtype=torch.float16)
        torch.manual_seed(1)
        rows = [torch.randint(3, 40000, (64,)).tolist() for _ in range(32)]
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
        model.save(str(out))
    # Scales are float16 on disk; any other type here would round them before the product.
    backend = BACKEND.AWQ_TORCH if job.get("awq") else BACKEND.TORCH
    loaded = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
    weights = {}
    with torch.inference_mode():
        for name, module in loaded.named_modules():
            if not hasattr(module, "qweight"):
                continue
            # AWQ's module shows its weight only by multiplying; with ones and zeros that is exact.
            unit = torch.eye(module.in_features, dtype=torch.float16)
            w = module(unit) if job.get("awq") else module.dequantize_weight()
            weights[name.removeprefix("model.model.").replace("model.layers", "layers")] = w.T.contiguous()
    save_file({f"model.{name}": weight for name, weight in weights.items()}, out.with_suffix(".expected"))
    names = ("gptqmodel", "torch", "transformers")
    out.with_suffix(".versions").write_text(json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    sys.exit(main())
