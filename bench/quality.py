"""The tables of docs/quality.md: methods on one model, made, measured, and printed as Markdown.

    python -m dibit.bench.quality --test wiki.test.raw --calibration wiki.valid.txt

Every step is a `dibit` command, printed before it runs, and is skipped when its result is there: remove a file to
measure it again. A run that was interrupted goes on where it was. Checkpoints go to --models, one JSON per row to
--results: perplexity, divergence from the float model, time, memory, tokens trained on per second, and the commands.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.bench.figures import PAPERS_GPTQ, RESULTS, read, run
from dibit.server.output import write_json

# Rates for little text: Block-AP's defaults are those of thousands of sequences.
RATES = "-O weight_rate=0.012 -O scale_rate=0.005 -O zero_rate=0.01"
BLOCK_AP = f"--method block-ap -O start=rtn -O steps=45 {RATES}"
BLOCK_AP_LONG = f"--method block-ap -O start=rtn -O steps=96 {RATES}"
TUNED = "--samples 256 --sequence-length 512 --steps 56"
TUNED_LONG = "--samples 448 --sequence-length 512 --steps 112"
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


@dataclass(frozen=True)
class Way:
    """A method in every table.

    title   in the table
    words   options of `dibit quantize`, without the width; empty with `source`
    source  the way whose checkpoint `dibit finetune` trains with the options `tune`
    """

    title: str
    words: str = ""
    source: str = ""
    tune: str = ""


WAYS = {
    "rtn": Way("RTN", "--method rtn"),
    "gptq": Way("GPTQ, the paper's", f"{PAPERS_GPTQ} --samples 128"),
    "awq": Way("AWQ", "--method awq --samples 32"),
    "omni": Way("OmniQuant", "--method omniquant --samples 32 -O steps=64"),
    "affine": Way("AffineQuant", "--method affinequant --samples 32 -O steps=64 -O affine_steps=64"),
    "bap": Way("Block-AP", f"{BLOCK_AP} --samples 64"),
    "eqat": Way(
        "EfficientQAT (Block-AP, then step sizes on the next token)",
        source="bap",
        tune=f"--objective ce {TUNED} -O norm_rate=0",
    ),
    "baplong": Way("Block-AP, twice the steps on four times the text", f"{BLOCK_AP_LONG} --samples 256"),
    "eqatlong": Way(
        "EfficientQAT, twice the steps on four times the text",
        source="baplong",
        tune=f"--objective ce {TUNED_LONG} -O norm_rate=0",
    ),
    "fast": Way("`--recipe fast`", "--recipe fast --samples 64"),
    "fastfrac": Way("`--recipe fast --zero-grid fractional`", "--recipe fast --zero-grid fractional --samples 64"),
    "tuned": Way("`--recipe fast`, then `dibit finetune`", source="fast", tune=f"--objective kl {TUNED}"),
    "best": Way(
        "`--recipe fast --zero-grid fractional`, then `dibit finetune` (56 steps)",
        source="fastfrac",
        tune=f"--objective kl {TUNED}",
    ),
    "bestce": Way(
        "`--recipe fast --zero-grid fractional`, then `dibit finetune --objective ce` (56 steps)",
        source="fastfrac",
        tune=f"--objective ce {TUNED} -O norm_rate=0",
    ),
    "bestce84": Way(
        "`--recipe fast --zero-grid fractional`, then `dibit finetune --objective ce` (84 steps, norms too)",
        source="fastfrac",
        tune="--objective ce --samples 384 --sequence-length 512 --steps 84",
    ),
    "bestcelong": Way(
        "`--recipe fast --zero-grid fractional`, then `dibit finetune --objective ce` (112 steps)",
        source="fastfrac",
        tune=f"--objective ce {TUNED_LONG} -O norm_rate=0",
    ),
    "recipe": Way("`--recipe best --zero-grid fractional`", "--recipe best --zero-grid fractional"),
    "recipece": Way(
        "`--recipe best --zero-grid fractional`, then `dibit finetune --objective ce` (56 steps)",
        source="recipe",
        tune=f"--objective ce {TUNED} -O norm_rate=0",
    ),
    "recipecelong": Way(
        "`--recipe best --zero-grid fractional`, then `dibit finetune --objective ce` (112 steps)",
        source="recipe",
        tune=f"--objective ce {TUNED_LONG} -O norm_rate=0",
    ),
    "smooth": Way("RTN with SmoothQuant's scales", "--method smoothquant --samples 32"),
}
LEARNED = ("omni", "affine", "bap", "eqat", "fastfrac", "best", "bestce84")


@dataclass(frozen=True)
class Table:
    """Rows of one width; their names end in `suffix`."""

    suffix: str
    title: str
    words: str
    ways: tuple[str, ...]
    seed: int = 0


ALL = ("rtn", "gptq", "awq", "omni", "affine", "bap", "eqat", "fast", "fastfrac", "best")
ROUNDED = ("smooth", "omni", "affine")
TABLES = (
    Table(
        "2",
        "2 bits, groups of 64",
        "--bits 2 --group-size 64",
        (*ALL, "eqatlong", "bestce", "bestce84", "bestcelong", "recipe", "baplong", "recipece", "recipecelong"),
    ),
    Table("2-seed1", "2 bits, groups of 64, second seed", "--bits 2 --group-size 64", LEARNED, seed=1),
    Table(
        "3",
        "3 bits, groups of 64",
        "--bits 3 --group-size 64",
        ("rtn", "gptq", "bap", "eqat", "fast", "fastfrac", "best", "bestce"),
    ),
    Table("3pc", "3 bits, a scale for each row", "--bits 3 --group-size=-1", ALL),
    # Four bits have no fractional zero points.
    Table("4", "4 bits, groups of 64", "--bits 4 --group-size 64", ("rtn", "gptq", "eqat", "fast", "tuned")),
    Table("w8a8", "8-bit weights and activations", "--bits 8 --group-size=-1 --activation-bits 8", ROUNDED),
    Table("w6a6", "6-bit activations, 8-bit weights", "--bits 8 --group-size=-1 --activation-bits 6", ROUNDED),
    Table("w4a4", "4-bit weights and activations", "--bits 4 --group-size=-1 --activation-bits 4", ROUNDED),
)


@dataclass(frozen=True)
class Row:
    """One checkpoint: `way` at the width of `table`."""

    table: Table
    way: str

    @property
    def name(self) -> str:
        return f"{self.way}-{self.table.suffix}"

    @property
    def source(self) -> Row | None:
        source = WAYS[self.way].source
        return Row(self.table, source) if source else None


ROWS = tuple(Row(table, way) for table in TABLES for way in table.ways)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and measure the table of docs/quality.md.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--test", type=Path, help="text for perplexity")
    parser.add_argument("--calibration", type=Path, help="text that methods learn from")
    parser.add_argument("--models", type=Path, default=Path("models/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS / "quality")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--whole", action="store_true", help="then the perplexity of the whole text too")
    parser.add_argument("--table", action="store_true", help="print the tables of what has been measured, and end")
    args = parser.parse_args()
    if not args.table:
        if args.test is None or args.calibration is None:
            parser.error("--test and --calibration are needed to measure; --table prints what there is")
        args.results.mkdir(parents=True, exist_ok=True)
        wanted = [row for row in ROWS if not args.only or row.name in args.only.split(",")]
        for row in wanted:
            measure(row, args)
            if args.whole:
                measure_whole(row, args)
    print(text_of(args.results))


def measure(row: Row, args: argparse.Namespace) -> None:
    """Make the checkpoint where it is not there, measure it, write the row."""
    target = args.results / f"{row.name}.json"
    if target.exists() and "divergence" in read(target):
        return
    made = make_words(row, args)
    out = args.models / row.name
    if not out.exists():
        if row.source and not (args.models / row.source.name).exists():
            run(make_words(row.source, args))
        run(made)
    found = args.models / f"{row.name}-ppl.json"
    judged = ["eval", "ppl", str(out), "--text", str(args.test), "--ctx", "2048"]
    judged += ["--max-windows", str(args.windows), "--json", str(found)]
    if not found.exists():
        run(judged)
    apart = args.models / f"{row.name}-kl.json"
    compared = ["eval", "kl", str(out), "--reference", args.model, "--text", str(args.test), "--ctx", "512"]
    compared += ["--max-windows", "8", "--json", str(apart)]
    if not apart.exists():
        run(compared)
    title = WAYS[row.way].title
    commands = [["dibit", *words] for words in (made, judged, compared)]
    record: dict[str, Any] = {"name": row.name, "title": title, "commands": commands}
    record |= {
        "perplexity": read(found),
        "divergence": read(apart),
        "quantize": quantized(read(out / "quantize_report.json")),
    }
    if row.source:
        report = read(out / "finetune_report.json")
        names = ("settings", "data", "seconds", "tokens", "tokens_per_s", "matmul_share", "held_out", "best_step")
        record["finetune"] = {name: report[name] for name in names}
        record["finetune"]["data"] |= {"file": Path(report["data"]["file"]).name}
    write_json(record, str(target))


def measure_whole(row: Row, args: argparse.Namespace) -> None:
    """Add the perplexity of every window of the text to a row that is there."""
    target = args.results / f"{row.name}.json"
    record = read(target)
    if "whole" in record:
        return
    out, found = args.models / row.name, args.models / f"{row.name}-whole.json"
    judged = ["eval", "ppl", str(out), "--text", str(args.test), "--ctx", "2048", "--json", str(found)]
    if not found.exists():
        run(judged)
    record["commands"].append(["dibit", *judged])
    write_json(record | {"whole": read(found)}, str(target))


def make_words(row: Row, args: argparse.Namespace) -> list[str]:
    """The command that makes the checkpoint, after `dibit`."""
    way, text = WAYS[row.way], str(args.calibration)
    end = ["--out", str(args.models / row.name)]
    if row.table.seed:
        end += ["--seed", str(row.table.seed)]
    if row.source:
        words = ["finetune", str(args.models / row.source.name), *end, "--teacher", args.model, "--text", text]
        return [*words, *way.tune.split()]
    words = ["quantize", args.model, *end, *row.table.words.split(), *way.words.split()]
    return words if row.way == "rtn" else [*words, "--calibration", text]


def quantized(report: dict[str, Any]) -> dict[str, Any]:
    """What a row needs of quantize_report.json."""
    found = {name: report[name] for name in KEPT}
    if found["calibration"]:
        found["calibration"] = {**found["calibration"], "text": Path(found["calibration"]["text"]).name}
    # Reports of before methods trained have no such list.
    training = [block for block in report.get("training", ()) if block]
    for name in ("tokens_per_s", "matmul_share"):
        found[name] = statistics.median(block[name] for block in training) if training else None
    return found


def text_of(results: Path) -> str:
    """The tables of what has been measured."""
    parts = []
    for table in TABLES:
        rows = [row for row in ROWS if row.table is table and (results / f"{row.name}.json").exists()]
        if rows:
            parts.append("\n".join([f"### {table.title}", "", *lines(rows, results)]))
    return "\n\n".join(parts)


def lines(rows: list[Row], results: Path) -> list[str]:
    records = [read(results / f"{row.name}.json") for row in rows]
    columns = ["method", "bits with scales and zero points", "perplexity"]
    columns += ["of the whole text"] if any("whole" in record for record in records) else []
    columns += ["KL", "minutes", "peak GB", "trained on, tokens/s"]
    found = [columns, ["---"] * len(columns)]
    for row, record in zip(rows, records, strict=True):
        made, tuned = record["quantize"], record.get("finetune")
        seconds = made["seconds"] + (tuned["seconds"] if tuned else 0.0)
        speed = tuned["tokens_per_s"] if tuned else made["tokens_per_s"]
        whole, apart = record.get("whole"), record.get("divergence")
        cells = {
            "method": WAYS[row.way].title,
            "bits with scales and zero points": f"{made['bits_per_weight']:.2f}",
            "perplexity": ppl_text(record["perplexity"]["ppl"]),
            "of the whole text": "" if whole is None else ppl_text(whole["ppl"]),
            "KL": "" if apart is None else f"{apart['kl_mean']:.2f}",
            "minutes": f"{seconds / 60:.0f}" if seconds >= 60 else f"{seconds / 60:.1f}",
            "peak GB": f"{made['peak_rss_bytes'] / 1e9:.2f}",
            "trained on, tokens/s": "" if speed is None else f"{speed:.0f}",
        }
        found.append([cells[column] for column in columns])
    return ["| " + " | ".join(cells) + " |" for cells in found]


def ppl_text(ppl: float) -> str:
    return f"{ppl:.2f}" if ppl < 1000 else f"{ppl:.3g}"


if __name__ == "__main__":
    main()
