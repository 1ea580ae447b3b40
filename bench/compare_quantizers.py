"""Other quantizers beside dibit's: the same model, the same calibration tokens, bits counted alike, one perplexity.

    python -m venv /path/to/side && /path/to/side/bin/pip install auto-round gptqmodel
    python -m dibit.bench.compare_quantizers auto-round:2 gptqmodel:2 llama.cpp:Q2_K dibit:fast:2 \\
        --python /path/to/side/bin/python --llama-cpp-bin DIR --calibration wiki.valid.txt --test wiki.test.raw

Every work is TOOL:WHAT: `auto-round:BITS`, `gptqmodel:BITS`, `gptqmodel+gptaq:BITS` (towards the float model's
outputs), `llama.cpp:TYPE` (with an importance matrix of the same tokens as text), `dibit:RECIPE:BITS` and
`dibit:RECIPE-fractional:BITS`. Asymmetric, groups of 64. A work whose record is in --work-dir is not done again, nor a
checkpoint made again that is there.

The measure is `dibit eval ppl`, window by window, so that all have one tokenization and one protocol. llama-perplexity
has another, not comparable: it scores the second half of each window only, each window begun with BOS where the model
has one. GGUF files are dequantized to float32 by llama-quantize and measured as floats; the others are measured as
they are served, int8 activations and an 8-bit head included, which is to their disadvantage. The embedding, which is
the head too, stays in float16 for all tools. Bits per weight are those stored for the linears of blocks, scales and
zero points included; `types` tells what llama.cpp made of rows that its types do not fit (its log, quantize.log, says
why: most need rows of a multiple of 256, and SmolLM2's have 576, so that Q2_K and its kind become 4-bit types there).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dibit.bench.llama_cpp import LlamaCpp, Ran, run
from dibit.bench.machine import machine_facts
from dibit.bench.quantizer_records import Made, Record, gguf_bits, packed_bits, perplexities, table
from dibit.engine.checkpoint import CheckpointWriter, open_checkpoint, resolve_model
from dibit.engine.errors import ConfigError, DibitError
from dibit.engine.tokenizer import load_tokenizer
from dibit.kernels import native
from dibit.quantize.calibration import Calibration, load_segments
from dibit.server.output import write_json

GROUP_SIZE = 64
SIDE = Path(__file__).with_name("quantizer_tools.py")
_DIBIT = [sys.executable, "-c", "from dibit.server.cli import main; main()"]


@dataclass(frozen=True)
class Work:
    """What a command line word asks for.

    tool  "auto-round", "gptqmodel", "llama.cpp" or "dibit"
    what  bits, the type of llama.cpp, or "RECIPE:BITS"
    """

    tool: str
    what: str
    gptaq: bool = False

    @classmethod
    def parse(cls, word: str) -> Work:
        """Raises ConfigError on a word that asks for nothing known."""
        tool, _, what = word.partition(":")
        gptaq = tool == "gptqmodel+gptaq"
        tool = "gptqmodel" if gptaq else tool
        bits = what.rpartition(":")[2] if tool == "dibit" else what
        known = tool == "llama.cpp" or (tool in ("auto-round", "gptqmodel", "dibit") and bits in ("2", "3", "4"))
        if not known or not what or (tool == "dibit" and ":" not in what):
            raise ConfigError(
                f"work {word!r}; there are auto-round:BITS, gptqmodel:BITS, gptqmodel+gptaq:BITS, llama.cpp:TYPE, "
                "dibit:RECIPE:BITS, of 2, 3 or 4 bits"
            )
        return cls(tool, what, gptaq)

    @property
    def name(self) -> str:
        return f"{self.tool}{'+gptaq' if self.gptaq else ''}-{self.what.replace(':', '-')}"


@dataclass(frozen=True)
class Setup:
    """What all works have in common."""

    model: str
    calibration: Path
    samples: int
    sequence_length: int
    seed: int
    iters: int
    test: Path
    context: int
    max_windows: int | None
    work_dir: Path
    side_python: Path | None
    llama_cpp: LlamaCpp | None
    threads: int


def record(work: Work, setup: Setup) -> Record:
    """Quantize and measure, or as much of it as earlier runs have left to do."""
    place = setup.work_dir / work.name
    place.mkdir(parents=True, exist_ok=True)
    made_note = place / "made.json"
    out = place / ("model.gguf" if work.tool == "llama.cpp" else "checkpoint")
    if not (made_note.exists() and out.exists()):
        print(f"{work.name}: quantizing", file=sys.stderr, flush=True)
        make = {"llama.cpp": _by_llama_cpp, "dibit": _by_dibit}.get(work.tool, _by_side_tool)
        write_json(make(work, setup, out), str(made_note))
    print(f"{work.name}: measuring", file=sys.stderr, flush=True)
    if out.suffix == ".gguf":
        bits, types = gguf_bits((place / "quantize.log").read_text())
    else:
        bits, types = packed_bits(out)
    losses = _window_losses(out, setup, place)
    found = Record(
        tool=work.tool + ("+gptaq" if work.gptaq else ""),
        what=work.what,
        made=Made(**json.loads(made_note.read_text())),
        bits_per_weight=bits,
        types=types,
        ppl=perplexities(losses),
        windows=len(losses),
        context=setup.context,
        measured_as="float32" if out.suffix == ".gguf" else "served",
        calibration={
            "text": setup.calibration.name,
            "samples": setup.samples,
            "sequence_length": setup.sequence_length,
            "seed": setup.seed,
        },
        machine=machine_facts(),
    )
    write_json(found, str(setup.work_dir / f"{work.name}.json"))
    return found


def prepare(setup: Setup) -> None:
    """The float checkpoint, and the calibration tokens as such and as text; made where they are not there yet."""
    setup.work_dir.mkdir(parents=True, exist_ok=True)
    with closing(open_checkpoint(resolve_model(setup.model))) as source:
        if not (setup.work_dir / "float").exists():
            with closing(CheckpointWriter(setup.work_dir / "float", source)) as writer:
                for name in source.names():
                    writer.add_float(name, source.export(name))
                writer.finish()
        tokenizer = load_tokenizer(source)
        drawn = Calibration(setup.calibration, setup.samples, setup.sequence_length, setup.seed)
        tokens = load_segments(drawn, tokenizer.encode).tokens
        save_file({"tokens": tokens}, _tokens(setup))
        (setup.work_dir / "calibration.txt").write_text(tokenizer.decode(tokens.flatten().tolist()), encoding="utf-8")


def _tokens(setup: Setup) -> Path:
    return setup.work_dir / "tokens.safetensors"


def _by_side_tool(work: Work, setup: Setup, out: Path) -> Made:
    if setup.side_python is None:
        raise ConfigError(f"{work.tool} runs in an environment of its own: --python names the interpreter that has it")
    settings: dict[str, str | int | float | bool] = {"iters": setup.iters} if work.tool == "auto-round" else {}
    settings |= {"gptaq": True} if work.gptaq else {}
    done, job = out.with_name("done.json"), out.with_name("job.json")
    note: dict[str, Any] = {
        "tool": work.tool,
        "model": str((setup.work_dir / "float").absolute()),
        "tokens": str(_tokens(setup).absolute()),
        "out": str(out.absolute()),
        "done": str(done.absolute()),
        "bits": int(work.what),
        "group_size": GROUP_SIZE,
        "seed": setup.seed,
        "settings": settings,
    }
    job.write_text(json.dumps(note, indent=2))
    ran = run([setup.side_python, "-P", SIDE, job.absolute()], shown=True)
    said = json.loads(done.read_text())
    return Made(said["versions"], settings, said["seconds"], ran.seconds, ran.peak_rss_bytes)


def _by_llama_cpp(work: Work, setup: Setup, out: Path) -> Made:
    tools = _llama_cpp(setup)
    source = setup.work_dir / "float.gguf"
    if not source.exists():
        tools.quantize(resolve_model(setup.model), source, "F16")
    importance = setup.work_dir / "importance.gguf"
    settings: dict[str, str | int | float | bool] = {"imatrix_chunks": setup.samples, "token_embedding_type": "f16"}
    spent = Ran(0.0, 0, "")
    if not importance.exists():
        aside = importance.with_name("importance.partial.gguf")
        asked = {"-m": source, "-f": setup.work_dir / "calibration.txt", "-o": aside, "-c": setup.sequence_length}
        asked |= {"-b": setup.sequence_length, "--chunks": setup.samples, "-t": setup.threads}
        spent = run([tools.directory / "llama-imatrix", *(str(word) for pair in asked.items() for word in pair)])
        aside.rename(importance)
    aside = out.with_name("partial.gguf")
    options: list[str | Path] = ["--imatrix", importance, "--token-embedding-type", "f16"]
    words = [tools.directory / "llama-quantize", *options, source, aside, work.what, str(setup.threads)]
    ran = run(["sh", "-c", 'exec "$@" 2>&1', "sh", *words])
    out.with_name("quantize.log").write_text(ran.stdout)
    aside.rename(out)
    return Made(
        {"llama.cpp": _commit(tools.version())},
        settings | {"imatrix_seconds": spent.seconds},
        ran.seconds,
        ran.seconds + spent.seconds,
        max(ran.peak_rss_bytes, spent.peak_rss_bytes),
    )


def _commit(version: str) -> str:
    found = re.search(r"commit (\w+)", version)
    return version if found is None else found[1]


def _llama_cpp(setup: Setup) -> LlamaCpp:
    if setup.llama_cpp is None:
        raise ConfigError("llama.cpp's programs are needed: --llama-cpp-bin names their directory")
    if not (setup.llama_cpp.directory / "llama-imatrix").is_file():
        raise ConfigError(f"{setup.llama_cpp.directory} has no llama-imatrix; build that target too")
    return setup.llama_cpp


def _by_dibit(work: Work, setup: Setup, out: Path) -> Made:
    recipe, _, bits = work.what.rpartition(":")
    recipe, _, grid = recipe.partition("-")
    words: list[str | Path] = [
        "--recipe",
        recipe,
        "--bits",
        bits,
        "--group-size",
        str(GROUP_SIZE),
        "--calibration",
        setup.calibration,
    ]
    text = {"--samples": setup.samples, "--sequence-length": setup.sequence_length, "--seed": setup.seed}
    words += [str(word) for pair in text.items() for word in pair]
    if grid:
        words += ["--zero-grid", grid]
    ran = run([*_DIBIT, "quantize", str(setup.work_dir / "float"), "--out", out, *words], shown=True)
    report = json.loads((out / "quantize_report.json").read_text())
    return Made(report["versions"], report["options"], report["seconds"], ran.seconds, ran.peak_rss_bytes)


def _window_losses(out: Path, setup: Setup, place: Path) -> list[float]:
    note = place / "ppl.json"
    if not note.exists():
        model = out
        if out.suffix == ".gguf":
            model = out.with_name("float32.gguf")
            _llama_cpp(setup).quantize(out, model, "F32")
        words: list[str | Path] = [
            "--text",
            setup.test,
            "--ctx",
            str(setup.context),
            "--threads",
            str(setup.threads),
            "--json",
            note,
        ]
        if setup.max_windows is not None:
            words += ["--max-windows", str(setup.max_windows)]
        run([*_DIBIT, "eval", "ppl", model, *words], shown=True)
        if model is not out:
            model.unlink()
    losses: list[float] = json.loads(note.read_text())["window_nll"]
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="+", metavar="TOOL:WHAT")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=Path, required=True, help="text that is learned from")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=200, help="of auto-round, for each block")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--work-dir", type=Path, default=Path("models/quantizers"))
    parser.add_argument("--python", type=Path, help="python of the environment that has auto-round and gptqmodel")
    parser.add_argument("--llama-cpp-bin", type=Path, help="directory with llama-quantize, llama-imatrix, ...")
    parser.add_argument("--threads", type=int, default=0, help="default: every core this process may use")
    parser.add_argument("--out", type=Path, help="all records as JSON")
    asked = parser.parse_args()
    try:
        works = [Work.parse(word) for word in asked.works]
        setup = Setup(
            model=asked.model,
            calibration=asked.calibration,
            samples=asked.samples,
            sequence_length=asked.sequence_length,
            seed=asked.seed,
            iters=asked.iters,
            test=asked.test,
            context=asked.ctx,
            max_windows=asked.max_windows,
            work_dir=asked.work_dir,
            side_python=asked.python,
            llama_cpp=None if asked.llama_cpp_bin is None else LlamaCpp(asked.llama_cpp_bin),
            threads=asked.threads or native.usable_cores(),
        )
        prepare(setup)
        records = [record(work, setup) for work in works]
        write_json(records, None if asked.out is None else str(asked.out))
    except DibitError as error:
        sys.exit(f"compare_quantizers: {error}")
    print(table(records))


if __name__ == "__main__":
    main()
