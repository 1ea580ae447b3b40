"""Do compressed-tensors checkpoints pass between dibit and that library (and transformers, which loads through it)?

    python -m venv SIDE && SIDE/bin/pip install torch transformers compressed-tensors
    python -m dibit.bench.interop_compressed_tensors --python SIDE/bin/python [--older OLDER/bin/python]

A tiny random Llama is quantized by dibit, exported, and loaded by transformers in the other environment: every weight
that it dequantizes must equal dibit's to the bit of float16, and greedy decoding must give the same tokens. Then the
library's own functions quantize and pack the model, and dibit must read the same weights. `--older` names an
environment with compressed-tensors before 0.13, which put ten 3-bit fields into a word; it only packs. A JSON line per
case goes to stdout; the exit status is 1 when any differs. Needs no network and no GPU.

This file runs in both environments: the halves import what belongs to theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HIDDEN = 128
TOKENS = 24
PROMPT = [5, 17, 2, 40, 33, 8]
# (bits, group size) of each of the two layers, symmetric
BY_DIBIT = (
    (((4, 32), (4, 32)), True),
    (((4, 32), (4, 32)), False),
    (((2, 32), (2, 32)), False),
    (((3, 64), (3, 64)), False),
    (((3, -1), (3, -1)), True),
    (((8, -1), (8, -1)), True),
    (((4, 64), (2, 32)), True),
)
BY_TOOL = ((2, 32, False), (3, 64, True), (3, 64, False), (3, -1, False), (4, 32, True), (4, 128, False), (8, -1, True))


@dataclass(frozen=True)
class Case:
    """One checkpoint: who wrote it, and how far the two readings of it are apart.

    bits, group_size  of most modules
    same_tokens       greedy tokens of both; None where only weights were compared
    """

    writer: str
    bits: int
    group_size: int
    mixed: bool
    symmetric: bool
    modules: int
    weights: int
    max_difference: float
    same_tokens: bool | None
    versions: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="python with transformers and compressed-tensors")
    parser.add_argument("--older", type=Path, help="python with compressed-tensors before 0.13")
    parser.add_argument("--as-tool", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_tool:
        for job in json.loads(arguments.as_tool.read_text()):
            _pack_as_tool(job) if "bits" in job else _load_as_tool(job)
        return 0
    with tempfile.TemporaryDirectory(prefix="dibit-interop-") as folder:
        cases = _run(arguments.python, arguments.older, Path(folder))
    for case in cases:
        print(json.dumps(asdict(case)))
    return int(any(case.max_difference > 0 or case.same_tokens is False for case in cases))


def _run(python: Path, older: Path | None, folder: Path) -> list[Case]:
    """This environment's half: makes the model, has the other tool work, compares."""
    from dibit.bench.interop import write_rounded

    model = folder / "model"
    _make_model(model)
    jobs: list[dict[str, Any]] = []
    for number, (formats, symmetric) in enumerate(BY_DIBIT):
        out = folder / f"dibit-{number}"
        write_rounded(model, out, formats, to="compressed-tensors", symmetric=symmetric)
        jobs.append({"out": str(out), "symmetric": symmetric})
    older_jobs = []
    for bits, group_size, symmetric in BY_TOOL:
        one = {"model": str(model), "bits": bits, "group_size": group_size, "symmetric": symmetric}
        jobs.append(one | {"out": str(folder / f"tool-{bits}-{group_size}-{symmetric}")})
        older_jobs.append(one | {"out": str(folder / f"older-{bits}-{group_size}-{symmetric}")})
    _have_done(python, jobs, folder)
    if older is not None:
        _have_done(older, older_jobs, folder)
        jobs += older_jobs
    return [_case(Path(job["out"]), "compressed-tensors" if "bits" in job else "dibit") for job in jobs]


def _have_done(python: Path, jobs: list[dict[str, Any]], folder: Path) -> None:
    note = folder / "jobs.json"
    note.write_text(json.dumps(jobs))
    command = [str(python), "-P", __file__, "--python", str(python), "--as-tool", str(note)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"the other environment failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _make_model(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(out)


def _case(checkpoint_dir: Path, written_by: str) -> Case:
    from dibit.bench.interop import compare

    found = compare(checkpoint_dir)
    facts = json.loads(checkpoint_dir.with_suffix(".facts").read_text())
    tokens = facts.get("tokens")
    return Case(
        writer=written_by,
        bits=found.quantization.bits,
        group_size=found.quantization.group_size,
        mixed=found.mixed,
        symmetric=found.quantization.symmetric,
        modules=found.modules,
        weights=found.weights,
        max_difference=found.max_difference,
        same_tokens=None if tokens is None else _greedy(checkpoint_dir) == tokens,
        versions=facts["versions"],
    )


def _greedy(checkpoint_dir: Path) -> list[int]:
    """The continuation of PROMPT by dibit's reference path, without rounding of activations or the head."""
    import torch

    from dibit.engine.batch import build_batch
    from dibit.engine.checkpoint import open_checkpoint
    from dibit.engine.config import EngineConfig, SamplingParams
    from dibit.engine.kv_cache import TYPES, allocate
    from dibit.engine.loader import load_decoder
    from dibit.engine.request import Request
    from dibit.engine.step import Chunk, Step

    checkpoint = open_checkpoint(checkpoint_dir)
    decoder = load_decoder(checkpoint, config=EngineConfig(backend="reference", head_bits=16))
    checkpoint.close()
    cos, sin = decoder.sizes.rope.tables(decoder.sizes.max_positions)
    ids = list(PROMPT)
    for _ in range(TOKENS):
        cache = allocate(decoder.sizes, num_blocks=8, block_size=16, stored=TYPES["float32"])
        request = Request(id="r", prompt_ids=tuple(ids), params=SamplingParams(), max_tokens=1, seed=0)
        request.block_ids = list(range(4))
        with torch.inference_mode():
            batch = build_batch(Step((Chunk(request, 0, len(ids)),)), block_size=16)
            logits = decoder.logits(decoder.hidden(batch, cache, cos, sin))
        ids.append(int(logits[-1].argmax()))
    return ids[len(PROMPT) :]


def _load_as_tool(job: dict[str, Any]) -> None:
    """The other environment: what transformers makes of an export."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = Path(job["out"])
    # transformers 5.23 has two ways, each with a limit: weights kept compressed have no room for packed zero points,
    # and weights dequantized while loading all take the scheme of one config group.
    model = AutoModelForCausalLM.from_pretrained(
        str(out),
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=not job["symmetric"]),
    )
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    # What was kept compressed has its weights since the first forward pass.
    weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("_proj")}
    save_file(weights, out.with_suffix(".expected"))
    _note(out, tokens=ids[len(PROMPT) :])


def _pack_as_tool(job: dict[str, Any]) -> None:
    """The other environment: the model quantized, packed and dequantized by the library's own functions."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-not-found]
    from compressed_tensors.quantization.lifecycle.forward import (  # type: ignore[import-not-found]
        dequantize,
        quantize,
    )
    from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file

    try:
        from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-not-found]
            pack_to_int32,
        )
    except ImportError:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import (  # type: ignore[import-not-found]
            pack_to_int32,
        )

    out, bits, symmetric = Path(job["out"]), job["bits"], job["symmetric"]
    channel = job["group_size"] == -1
    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else job["group_size"],
    }
    arguments = QuantizationArgs(**scheme)
    tensors: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for name, w in load_file(Path(job["model"]) / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = w
            continue
        module = name.removesuffix(".weight")
        grouped = w.reshape(w.shape[0], -1, w.shape[1] if channel else job["group_size"])
        scale, zero = calculate_qparams(grouped.amin(dim=2), grouped.amax(dim=2), arguments)
        zero = zero.to(torch.int8)
        codes = quantize(x=w, scale=scale, zero_point=zero, args=arguments, dtype=torch.int8)
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, bits)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = torch.tensor(w.shape)
        if not symmetric:
            tensors[f"{module}.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
        expected[module] = dequantize(x_q=codes, scale=scale, zero_point=zero, args=arguments).contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}},
    }
    (out / "config.json").write_text(json.dumps(config))
    save_file(expected, out.with_suffix(".expected"))
    _note(out)


def _note(out: Path, **facts: Any) -> None:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("compressed-tensors", "torch", "transformers")}
    out.with_suffix(".facts").write_text(json.dumps(facts | {"versions": versions}))


if __name__ == "__main__":
    sys.exit(main())
