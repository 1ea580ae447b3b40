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


PAPERS_GPTQ = "--method gptq -O range_search=false -O static_groups=false -O act_order=false -O refit=false"
TEXT = "--samples 128 --sequence-length 512"


@dataclass(frozen=True)
class Variant:
    """A row of the table; `words` are options of `dibit quantize`, empty for the float model as it comes."""

    name: str
    title: str
    words: str = ""

    @property
    def learns(self) -> bool:
        return "--method rtn" not in self.words


VARIANTS = (
    Variant("float", "float32"),
    *(Variant(f"rtn-{bits}", f"{bits} bits, RTN", f"--method rtn --bits {bits}") for bits in (8, 4, 3, 2)),
    *(
        Variant(f"gptq-{bits}", f"{bits} bits, the paper's GPTQ", f"{PAPERS_GPTQ} --bits {bits} {TEXT}")
        for bits in (4, 3, 2)
    ),
    Variant("fast-2", "2 bits, `--recipe fast`", "--recipe fast --bits 2 --samples 64"),
    Variant(
        "fast-fractional-2",
        "2 bits, `--recipe fast --zero-grid fractional`",
        "--recipe fast --zero-grid fractional --bits 2 --samples 64",
    ),
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
        speeds(args)
    print(table(args))


def place(variant: Variant, args: argparse.Namespace) -> str:
    return str(args.models / variant.name) if variant.words else args.model


def make(variant: Variant, args: argparse.Namespace) -> None:
    if not variant.words or Path(place(variant, args)).exists():
        return
    words = ["quantize", args.model, "--out", place(variant, args), "--group-size", "64", *variant.words.split()]
    run([*words, "--calibration", str(args.calibration)] if variant.learns else words)


def measure(variant: Variant, args: argparse.Namespace) -> None:
    quality = args.results / f"{variant.name}-ppl.json"
    if not quality.exists():
        words = ["eval", "ppl", place(variant, args), "--text", str(args.test), "--ctx", "2048"]
        run([*words, "--max-windows", str(args.windows), "--json", str(quality)])
    judged = args.results / f"{variant.name}-transformers.json"
    if variant.name in JUDGED and not judged.exists():
        words = [place(variant, args), "--text", str(args.test), "--ctx", "2048"]
        run([*words, "--max-windows", str(args.windows), "--json", str(judged)], command=ORACLE)


def speeds(args: argparse.Namespace) -> None:
    """All widths in one process, taking turns: the machine's drift is in none of the ratios. The float model apart."""
    # Speed does not depend on how the integers were chosen.
    low = [place(variant, args) for variant in VARIANTS if variant.words and not variant.learns]
    for models, name in ((low, "decode"), ([args.model], "float-decode")):
        speed = args.results / f"{name}.json"
        if not speed.exists():
            words = ["bench", "decode", *models, "--prompt-len", "32", "--gen-len", "128", "--batch-sizes", "1,8,32"]
            profile = ["--profile"] if models is low else []  # float models have no tape to look into
            run([*words, *profile, "--repeats", "5", "--json", str(speed)])
    speed = args.results / "decode-512.json"
    if not speed.exists():
        words = ["bench", "decode", *low, "--prompt-len", "512", "--gen-len", "64", "--batch-sizes", "1,8"]
        run([*words, "--repeats", "5", "--json", str(speed)])


def run(words: list[str], command: list[str] = DIBIT) -> None:
    name = "dibit" if command is DIBIT else "python -m dibit.bench.oracle"
    print("+", name, shlex.join(words), file=sys.stderr, flush=True)
    subprocess.run([*command, *words], check=True)


def table(args: argparse.Namespace) -> str:
    lines = [
        "| weights | MB | ppl | in transformers | prefill tok/s | decode tok/s at batch 1 | 8 | 32 | of bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_model = {
        (Path(entry["model"]).name, entry["batch"]): entry
        for name in ("float-decode", "decode")
        if (args.results / f"{name}.json").exists()
        for entry in read(args.results / f"{name}.json")
    }
    longer = args.results / "decode-512.json"
    prefill = {Path(e["model"]).name: e for e in read(longer) if e["batch"] == 1} if longer.exists() else {}
    for variant in VARIANTS:
        entries = [by_model.get((Path(place(variant, args)).name, batch)) for batch in (1, 8, 32)]
        cells = ["" if entry is None else f"{entry['decode_tok_s']:.0f}" for entry in entries]
        entry = prefill.get(Path(place(variant, args)).name)
        cells.insert(0, "" if entry is None else f"{entry['prefill_tok_s']:.0f}")
        cells.append("" if entries[0] is None else f"{entries[0]['bandwidth_share']:.0%}")
        quality = [ppl(args.results / f"{variant.name}-{kind}.json") for kind in ("ppl", "transformers")]
        lines.append("| " + " | ".join([variant.title, size(variant, args), *quality, *cells]) + " |")
    return "\n".join(lines)


def ppl(path: Path) -> str:
    if not path.exists():
        return ""
    found = read(path)["ppl"]
    return f"{found:.2f}" if found < 100 else f"{found:.3g}"


def size(variant: Variant, args: argparse.Namespace) -> str:
    """Megabytes of weights on disk, of float models as float16 (what a Hub checkpoint of them takes)."""
    if not variant.words:
        return f"{inspect_checkpoint(resolve_model(args.model)).parameters * 2 / 1e6:.0f}"
    files = Path(place(variant, args)).glob("*.safetensors")
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
