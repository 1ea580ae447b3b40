"""Perplexity against average bits, one curve per way of choosing which blocks get more of them.

    python -m dibit.bench.bits_curve --test wiki.test.raw --calibration wiki.valid.txt --method gptq

Every step is a `dibit` command, printed before it runs, and is skipped when its result is there, so that a run may be
stopped and continued. A plan is made once and used by every method; checkpoints are deleted once they are measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dibit.bench.figures import RESULTS, run


@dataclass(frozen=True)
class Order:
    """A curve: the importance, and the options that it is asked for with."""

    name: str
    options: tuple[str, ...]
    needs_text: bool = False


ORDERS = (
    Order("lim", ("--importance", "lim"), needs_text=True),
    Order("zd", ("--importance", "zd")),
    Order("error", ("--importance", "error"), needs_text=True),
    Order("measured", ("--importance", "measured"), needs_text=True),
    Order("fisher", ("--importance", "fisher"), needs_text=True),
    Order("per-linear", ("--per-linear",), needs_text=True),
    Order("depth", ("--importance", "depth")),
    Order("random-0", ("--importance", "random", "--seed", "0")),
    Order("random-1", ("--importance", "random", "--seed", "1")),
    Order("random-2", ("--importance", "random", "--seed", "2")),
    Order("lim-reverse", ("--importance", "lim", "--reverse"), needs_text=True),
    Order("zd-reverse", ("--importance", "zd", "--reverse")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity against average bits per weight.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity")
    parser.add_argument("--calibration", type=Path, required=True, help="text that methods and importances learn from")
    parser.add_argument("--method", default="gptq", choices=("rtn", "gptq", "awq"))
    parser.add_argument("--budgets", default="2.25,2.5,2.75,3,3.5,4", help="average bits of code")
    parser.add_argument("--choices", default="2,4", help="widths to choose from")
    parser.add_argument("--orders", default=",".join(order.name for order in ORDERS))
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--sequence-length", default="512")
    parser.add_argument("--windows", default="16")
    parser.add_argument("--models", type=Path, default=Path("models/bits-curve"))
    parser.add_argument("--results", type=Path, default=RESULTS / "bits-curve")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = [order for order in ORDERS if order.name in args.orders.split(",")]
    budgets = [budget.strip() for budget in args.budgets.split(",")]
    for order in chosen:
        for budget in budgets:
            measure(order, budget, args)
    print(table(chosen, budgets, args))


def result(order: Order, budget: str, args: argparse.Namespace) -> Path:
    name = f"{args.method}-{args.choices.replace(',', '')}-{order.name}-{budget}.json"
    return Path(args.results) / name


def measure(order: Order, budget: str, args: argparse.Namespace) -> None:
    quality = result(order, budget, args)
    if quality.exists():
        return
    out = args.models / quality.stem
    plan = args.results / f"plan-{args.choices.replace(',', '')}-{order.name}-{budget}.json"
    text = ["--calibration", str(args.calibration), "--samples", args.samples]
    text += ["--sequence-length", args.sequence_length]
    if not plan.exists():
        # By rounding, which takes seconds: the seed of a random order must not draw other text for the method too.
        rounded = args.models / f"{quality.stem}-plan"
        words = ["quantize", args.model, "--out", str(rounded), "--bits-budget", budget, "--bits-choices", args.choices]
        words += ["--group-size", args.group_size, *order.options, "--save-plan", str(plan), "--overwrite"]
        run([*words, *(text if order.needs_text else [])])
        shutil.rmtree(rounded)
    words = ["quantize", args.model, "--out", str(out), "--method", args.method, "--plan", str(plan)]
    words += [] if args.method == "rtn" else text
    if not out.exists():
        run(words)
    words = ["eval", "ppl", str(out), "--text", str(args.test), "--ctx", "2048", "--max-windows", args.windows]
    run([*words, "--json", str(quality)])
    shutil.rmtree(out)


def table(orders: list[Order], budgets: list[str], args: argparse.Namespace) -> str:
    lines = ["| order | " + " | ".join(budgets) + " |", "| --- |" + " --- |" * len(budgets)]
    for order in orders:
        found = [json.loads(result(order, budget, args).read_text())["ppl"] for budget in budgets]
        lines.append(f"| {order.name} | " + " | ".join(f"{ppl:.2f}" for ppl in found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
