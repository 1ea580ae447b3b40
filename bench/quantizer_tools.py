"""Other quantizers at work: the half of compare_quantizers.py that runs in their environment, with nothing of dibit.

`python -P quantizer_tools.py JOB.json` quantizes one float checkpoint on given tokens and writes `out`, a GPTQ
checkpoint, and `done`, a JSON file with the tool's version and the seconds that its own work took. Both tools get the
same tokens in the same order, and the settings of their documentation but for those in the job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Of learning: the tool's default.
_BATCH = 8


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    # GPTQModel keeps finished layers in the current directory.
    os.chdir(out.parent)
    from safetensors.torch import load_file

    tokens = load_file(job["tokens"])["tokens"]
    names, seconds = TOOLS[job["tool"]](job, tokens)
    from importlib.metadata import version

    note = {"versions": {name: version(name) for name in (*names, "torch", "transformers")}, "seconds": seconds}
    Path(job["done"]).write_text(json.dumps(note))


def auto_round(job: dict[str, Any], tokens: Any) -> tuple[tuple[str, ...], float]:
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.split(tokens, _BATCH)]
    began = time.perf_counter()
    quantizer = AutoRound(
        job["model"],
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        scheme={"bits": job["bits"], "group_size": job["group_size"], "sym": False, "data_type": "int"},
        dataset=batches,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        batch_size=min(_BATCH, tokens.shape[0]),
        device_map="cpu",
        seed=job["seed"],
        **job["settings"],
    )
    # It makes a directory of its own choice in the one that it is given.
    aside = Path(job["out"]).with_name("auto-round")
    quantizer.quantize_and_save(str(aside), format="auto_gptq")
    seconds = time.perf_counter() - began
    next(aside.rglob("config.json")).parent.rename(job["out"])
    return ("auto-round",), seconds


def gptqmodel(job: dict[str, Any], tokens: Any) -> tuple[tuple[str, ...], float]:
    # Its pool asks for more workers than it grants itself on few cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from gptqmodel.quantization.config import GPTAQConfig  # type: ignore[import-not-found]

    settings = dict(job["settings"])
    if settings.pop("gptaq", False):
        settings["gptaq"] = GPTAQConfig(device="cpu")
    torch.manual_seed(job["seed"])
    began = time.perf_counter()
    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], sym=False, format="gptq_v2", device="cpu", **settings
    )
    model = GPTQModel.load(job["model"], config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    model.quantize(rows, batch_size=1)
    model.save(job["out"])
    return ("gptqmodel",), time.perf_counter() - began


TOOLS = {"auto-round": auto_round, "gptqmodel": gptqmodel}

if __name__ == "__main__":
    main()
