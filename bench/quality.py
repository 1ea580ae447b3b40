"""The table of docs/quality.md: methods on one model, made, measured, and printed as Markdown.

    python -m dibit.bench.quality --test wiki.test.raw --calibration wiki.valid.txt

Every step is a `dibit` command, printed before it runs, and is skipped when its result is there: remove a file to
measure it again. A run that was interrupted goes on where it was. Checkpoints go to --models, one JSON per row to
--results: perplexity, time, memory, tokens trained on per second, and the commands.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.bench.figures import PAPERS_GPTQ, RESULTS, read, run

# Rates for little text: Block-AP's defaults are those of thousands of sequences.
BLOCK_AP = "--method block-ap -O start=rtn -O steps=45 -O weight_rate=0.012 -O scale_rate=0.005 -O zero_rate=0.01"
TUNED = "--samples 256 --sequence-length 512 --steps 56"


@dataclass(frozen=True)
class Row:
    """
    name    of the checkpoint and of the result
    title   in the table
    words   options of `dibit quantize`; empty with `source`
    source  the row whose checkpoint `dibit finetune` trains with the options `tune`
    """

    name: str
    title: str
    words: str = ""
    source: str = ""
    tune: str = ""


W2 = "--bits 2 --group-size 64"
# Of quantize_report.json.
KEPT = (
    "method",
    "options",
    "bits_per_weight",
    "calibration",
    "seed",
    "threads",
    "seconds",
    "peak_rss_bytes",
    "versions",
)
ROWS = (
    Row("rtn-2", "RTN", f"{W2} --method rtn"),
    Row("gptq-2", "GPTQ, the paper's", f"{W2} {PAPERS_GPTQ} --samples 128"),
    Row("awq-2", "AWQ", f"{W2} --method awq --samples 32"),
    Row("omni-2", "OmniQuant", f"{W2} --method omniquant --samples 32 -O steps=64"),
    Row("affine-2", "AffineQuant", f"{W2} --method affinequant --samples 32 -O steps=64 -O affine_steps=64"),
    Row("bap-2", "Block-AP", f"{W2} {BLOCK_AP} --samples 64"),
    Row(
        "eqat-2",
        "EfficientQAT (Block-AP, then step sizes on the next token)",
        source="bap-2",
        tune=f"--objective ce {TUNED} -O norm_rate=0",
    ),
    Row("fast-2", "`--recipe fast`", f"{W2} --recipe fast --samples 64"),
    Row(
        "fastfrac-2",
        "`--recipe fast --zero-grid fractional`",
        f"{W2} --recipe fast --zero-grid fractional --samples 64",
    ),
    Row(
        "best-2",
        "the same, then `dibit finetune` as in `--recipe best`",
        source="fastfrac-2",
        tune=f"--objective kl {TUNED}",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and measure the table of docs/quality.md.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--test", type=Path, help="text for perplexity")
    parser.add_argument("--calibration", type=Path, help="text that methods learn from")
    parser.add_argument("--models", type=Path, default=Path("models/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS / "quality")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--table", action="store_true", help="print the table of what has been measured, and end")
    args = parser.parse_args()
    if not args.table:
        if args.test is None or args.calibration is None:
            parser.error("--test and --calibration are needed to measure; --table prints what there is")
        args.results.mkdir(parents=True, exist_ok=True)
        wanted = [row for row in ROWS if not args.only or row.name in args.only.split(",")]
        for row in wanted:
            if not (args.results / f"{row.name}.json").exists():
                measure(row, args)
    print(table(args.results))


def measure(row: Row, args: argparse.Namespace) -> None:
    """Make the checkpoint where it is not there, take its perplexity, write the row."""
    made = make_words(row, args)
    out = args.models / row.name
    if not out.exists():
        if row.source and not (args.models / row.source).exists():
            run(make_words(next(other for other in ROWS if other.name == row.source), args))
        run(made)
    found = args.models / f"{row.name}-ppl.json"
    judged = ["eval", "ppl", str(out), "--text", str(args.test), "--ctx", "2048"]
    judged += ["--max-windows", str(args.windows), "--json", str(found)]
    if not found.exists():
        run(judged)
    record: dict[str, Any] = {"name": row.name, "title": row.title, "commands": [["dibit", *made], ["dibit", *judged]]}
    record |= {"perplexity": read(found), "quantize": quantized(read(out / "quantize_report.json"))}
    if row.source:
        report = read(out / "finetune_report.json")
        names = ("settings", "data", "seconds", "tokens", "tokens_per_s", "matmul_share", "held_out", "best_step")
        record["finetune"] = {name: report[name] for name in names}
    target = args.results / f"{row.name}.json"
    aside = target.with_suffix(".part")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.rename(target)


def make_words(row: Row, args: argparse.Namespace) -> list[str]:
    """The command that makes the checkpoint, after `dibit`."""
    out = ["--out", str(args.models / row.name)]
    if row.source:
        words = [
            "finetune",
            str(args.models / row.source),
            *out,
            "--teacher",
            args.model,
            "--text",
            str(args.calibration),
        ]
        return [*words, *row.tune.split()]
    words = ["quantize", args.model, *out, *row.words.split()]
    return words if "--method rtn" in row.words else [*words, "--calibration", str(args.calibration)]


def quantized(report: dict[str, Any]) -> dict[str, Any]:
    """What a row needs of quantize_report.json."""
    found = {name: report[name] for name in KEPT}
    if found["calibration"]:
        found["calibration"] = {**found["calibration"], "text": Path(found["calibration"]["text"]).name}
    training = [block["tokens_per_s"] for block in report.get("training", ()) if block]
    found["tokens_per_s"] = statistics.median(training) if training else None
    shares = [block["matmul_share"] for block in report.get("training", ()) if block]
    found["matmul_share"] = statistics.median(shares) if shares else None
    return found


def table(results: Path) -> str:
    lines = [
        "| method | bits with scales and zero points | perplexity | minutes | peak GB | trained on, tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        path = results / f"{row.name}.json"
        if not path.exists():
            continue
        record = read(path)
        made, tuned = record["quantize"], record.get("finetune")
        seconds = made["seconds"] + (tuned["seconds"] if tuned else 0.0)
        speed = tuned["tokens_per_s"] if tuned else made["tokens_per_s"]
        ppl = record["perplexity"]["ppl"]
        cells = [
            row.title,
            f"{made['bits_per_weight']:.2f}",
            f"{ppl:.2f}" if ppl < 1000 else f"{ppl:.3g}",
            f"{seconds / 60:.0f}" if seconds >= 60 else f"{seconds / 60:.1f}",
            f"{made['peak_rss_bytes'] / 1e9:.2f}",
            "" if speed is None else f"{speed:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
