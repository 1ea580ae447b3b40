"""The README's table: one model at several widths, made, measured, and printed as Markdown.

    python -m dibit.bench.figures --test wiki.test.raw --calibration wiki.valid.txt

Every step is a `dibit` command, printed before it runs, and is skipped when its result is there: remove a file to
measure it again. Checkpoints go to --models, JSON to --results. Run the speeds on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.engine.checkpoint import resolve_model
from dibit.engine.checkpoint.inspect import inspect_checkpoint

RESULTS = Path(__file__).parent / "results" / "smollm2-135m"
DIBIT = [sys.executable, "-c", "from dibit.server.cli import main; main()"]
ORACLE = [sys.executable, "-m", "dibit.bench.oracle"]
# Rows whose perplexity is computed in transformers too, from the dequantized weights.
JUDGED = ("float", "rtn-4", "gptq-4")


@dataclass(frozen=True)
class Variant:
    """A row of the table; method None is the float model as it comes."""

    method: str | None
    bits: int

    @property
    def name(self) -> str:
        return "float" if self.method is None else f"{self.method}-{self.bits}"


VARIANTS = (
    Variant(None, 32),
    Variant("rtn", 8),
    Variant("rtn", 4),
    Variant("gptq", 4),
    Variant("rtn", 3),
    Variant("gptq", 3),
    Variant("rtn", 2),
    Variant("gptq", 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and measure the README's table.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity")
    parser.add_argument("--calibration", type=Path, required=True, help="text that gptq learns from")
    parser.add_argument("--models", type=Path, default=Path("models/figures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--table", action="store_true", help="print the table of what has been measured, and end")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for variant in VARIANTS:
            make(variant, args)
        for variant in VARIANTS:
            measure(variant, args)
    print(table(args))


def place(variant: Variant, args: argparse.Namespace) -> str:
    return args.model if variant.method is None else str(args.models / variant.name)


def make(variant: Variant, args: argparse.Namespace) -> None:
    if variant.method is None or Path(place(variant, args)).exists():
        return
    words = ["quantize", args.model, "--out", place(variant, args), "--method", variant.method]
    words += ["--bits", str(variant.bits), "--group-size", "64"]
    if variant.method != "rtn":
        words += ["--calibration", str(args.calibration), "--samples", "128", "--sequence-length", "512"]
    run(words)


def measure(variant: Variant, args: argparse.Namespace) -> None:
    quality, speed = (args.results / f"{variant.name}-{kind}.json" for kind in ("ppl", "decode"))
    if not quality.exists():
        words = ["eval", "ppl", place(variant, args), "--text", str(args.test), "--ctx", "2048"]
        run([*words, "--max-windows", str(args.windows), "--json", str(quality)])
    judged = args.results / f"{variant.name}-transformers.json"
    if variant.name in JUDGED and not judged.exists():
        words = [place(variant, args), "--text", str(args.test), "--ctx", "2048"]
        run([*words, "--max-windows", str(args.windows), "--json", str(judged)], command=ORACLE)
    # Speed does not depend on how the integers were chosen.
    if variant.method != "gptq" and not speed.exists():
        words = ["bench", "decode", place(variant, args), "--prompt-len", "512", "--gen-len", "128"]
        run([*words, "--batch-sizes", "1,8,32", "--json", str(speed)])


def run(words: list[str], command: list[str] = DIBIT) -> None:
    name = "dibit" if command is DIBIT else "python -m dibit.bench.oracle"
    print("+", name, shlex.join(words), file=sys.stderr, flush=True)
    subprocess.run([*command, *words], check=True)


def table(args: argparse.Namespace) -> str:
    lines = [
        "| weights | size MB | perplexity | prefill tok/s | decode tok/s, batch 1 | 8 | 32 | of bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        quality = args.results / f"{variant.name}-ppl.json"
        ppl = f"{read(quality)['ppl']:.2f}" if quality.exists() else "not measured"
        speeds = args.results / f"{variant.name}-decode.json"
        cells = ["", "", "", "", ""]
        if speeds.exists():
            by_batch = {entry["batch"]: entry for entry in read(speeds)}
            cells = [
                f"{by_batch[1]['prefill_tok_s']:.0f}",
                *(f"{by_batch[batch]['decode_tok_s']:.0f}" for batch in (1, 8, 32)),
                f"{by_batch[1]['bandwidth_share']:.0%}",
            ]
        name = "float32" if variant.method is None else f"{variant.bits} bits, {variant.method.upper()}"
        lines.append("| " + " | ".join([name, size(variant, args), ppl, *cells]) + " |")
    return "\n".join(lines)


def size(variant: Variant, args: argparse.Namespace) -> str:
    """Megabytes of weights on disk, of float models as float16 (what a Hub checkpoint of them takes)."""
    if variant.method is None:
        return f"{inspect_checkpoint(resolve_model(args.model)).parameters * 2 / 1e6:.0f}"
    files = Path(place(variant, args)).glob("*.safetensors")
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
