"""From a low-bit checkpoint to one whose step sizes and norms fit a text, or answers to instructions.

Reads the checkpoint, the float model and the data; trains (end_to_end.py); writes an ordinary checkpoint of the same
codes. All that lies aside until it is whole is in OUT.partial, the state of the training too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, resolve_model
from dibit.engine.checkpoint.dispatch import export_for
from dibit.engine.checkpoint.json_file import read_object
from dibit.engine.checkpoint.shard_file import write_text
from dibit.engine.checkpoint.writer import check_out
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.spec import Arch, Sizes, float_shapes
from dibit.engine.models.weights import check_names
from dibit.engine.tokenizer import load_tokenizer
from dibit.kernels.formats import QTensor
from dibit.quantize.calibration import Calibration, load_segments
from dibit.quantize.end_to_end import (
    SAVE_EVERY_S,
    EndToEnd,
    EndToEndReport,
    EndToEndTraining,
    Progress,
    report,
)
from dibit.quantize.end_to_end_model import LowBitModel
from dibit.quantize.end_to_end_state import state_files
from dibit.quantize.end_to_end_teacher import STATES_NAME, Teacher, check_teacher, listen
from dibit.quantize.instruction import Examples, load_instructions
from dibit.quantize.journal import JOURNAL_NAME, Journal
from dibit.quantize.report import FINETUNE_REPORT_NAME, REPORT_NAME, QuantizeReport
from dibit.quantize.report_html import write_html
from dibit.quantize.streams import StreamConfig

logger = logging.getLogger(__name__)


def train_end_to_end(
    checkpoint: str,
    out: Path,
    *,
    settings: EndToEnd | None = None,
    text: Path | None = None,
    instructions: Path | None = None,
    samples: int = 256,
    sequence_length: int = 512,
    seed: int = 0,
    teacher: str | None = None,
    revision: str | None = None,
    streams: StreamConfig | None = None,
    overwrite: bool = False,
    method: str | None = None,
    describe: Callable[[EndToEndReport, Path], None] | None = None,
    save_every_s: float = SAVE_EVERY_S,
    progress: Progress | None = None,
) -> EndToEndReport:
    """Train the step sizes (and norms) of the low-bit `checkpoint` and write the result to the new directory `out`.

    checkpoint    directory or Hub id
    text          plain UTF-8 text of which `samples` pieces of `sequence_length` tokens are drawn
    instructions  instead of it, questions with answers (instruction.py): at most `samples`, each at most that long
    teacher       the float model that `checkpoint` was made from, for objective kl; left out, the one that its
                  report names
    revision      of a teacher from the Hub
    method        name of the method to record; left out, that of the checkpoint
    describe      puts reports beside finetune_report.json; left out, those of the checkpoint are kept
    save_every_s  seconds between states that a killed run continues from
    progress      called with (steps made, steps, note)

    Raises ConfigError, CheckpointError or, when nothing finite comes of it, TrainingFailure. The same call continues
    an interrupted run.
    """
    settings = settings or EndToEnd()
    if (text is None) == (instructions is None):
        raise ConfigError("give either a text (--text FILE) or instructions (--instructions FILE) to train on")
    check_out(Path(out), overwrite=overwrite)
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_checkpoint(resolve_model(checkpoint))))
        arch, sizes = resolve_arch(source.config)
        check_names(source, arch, sizes)
        if source.quantization is None:
            raise CheckpointError(
                f"{source.name} is a float model; quantize it first (`dibit quantize`), then train its step sizes"
            )
        float_model = _teacher(source, teacher, settings)
        told = None
        if float_model is not None:
            told = stack.enter_context(closing(open_checkpoint(resolve_model(float_model, revision=revision))))
            taught = check_teacher(told, sizes, student=source.name)
        examples = _examples(
            source, sizes, text=text, instructions=instructions, samples=samples, length=sequence_length, seed=seed
        )
        export = export_for(linear.format for linear in source.packed().values())
        writer = stack.enter_context(closing(CheckpointWriter(Path(out), source, export=export, overwrite=overwrite)))
        Journal(writer.directory, _settings(source, told, settings, examples, seed=seed))
        own: Teacher | None = None
        if told is not None:
            tell = _teller(progress, settings.steps)
            own = stack.enter_context(
                closing(
                    listen(
                        told,
                        *taught,
                        examples,
                        directory=writer.directory,
                        streams=streams or StreamConfig(),
                        precision=settings.precision,
                        tell=tell,
                    )
                )
            )
        model = LowBitModel(source, arch, sizes, norms=settings.norm_rate > 0)
        training = EndToEndTraining(
            model,
            examples,
            own,
            settings,
            seed=seed,
            directory=writer.directory,
            save_every_s=save_every_s,
            progress=progress,
        )
        course = training.run()
        found = report(
            course,
            settings,
            source=checkpoint,
            out=str(out),
            teacher=float_model,
            examples=examples,
            model=model,
        )
        _add(writer, source, model, arch, sizes)
        _describe(writer.directory, source, found, describe)
        meta = _meta(source)
        facts = {key: value for key, value in meta.items() if key not in ("quantizer", "method")}
        writer.finish(
            method=method or meta.get("method"),
            facts={**facts, "end_to_end": settings.objective},
            activation_bits=model.activation_bits,
            scratch=[JOURNAL_NAME, STATES_NAME, *(path.name for path in state_files(writer.directory))],
        )
    return found


def _add(writer: CheckpointWriter, source: Checkpoint, model: LowBitModel, arch: Arch, sizes: Sizes) -> None:
    packed = set(model.packed())
    norms = model.norms()
    for name in float_shapes(arch, sizes):
        module = name.removesuffix(".weight")
        if module in packed:
            writer.add_quantized(module, model.quantized(module))
        elif source.has(name):
            writer.add_float(name, norms[name] if name in norms else source.export(name))
        else:
            # A head that is packed: as it was.
            head = source.linear(module)
            assert isinstance(head, QTensor)
            writer.add_quantized(module, head)


def _describe(
    directory: Path,
    source: Checkpoint,
    found: EndToEndReport,
    describe: Callable[[EndToEndReport, Path], None] | None,
) -> None:
    write_text(
        directory / FINETUNE_REPORT_NAME, json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n"
    )
    if describe is not None:
        describe(found, directory)
        return
    if (source.path / REPORT_NAME).is_file():
        shutil.copyfile(source.path / REPORT_NAME, directory / REPORT_NAME)
        try:
            write_html(QuantizeReport.read(directory), directory)
        except CheckpointError as error:
            # Of another version: no reason to lose what was trained.
            logger.warning("no page for the report: %s", error)


def _meta(source: Checkpoint) -> Mapping[str, Any]:
    found = (source.config.get("quantization_config") or {}).get("meta")
    return found if isinstance(found, dict) else {}


def _teller(progress: Progress | None, steps: int) -> Any:
    return lambda note: None if progress is None else progress(0, steps, note)


def _teacher(source: Checkpoint, asked: str | None, settings: EndToEnd) -> str | None:
    """Name of the float model, where there has to be one or one was asked for."""
    if asked is not None:
        return asked
    if settings.objective != "kl":
        return None
    path = source.path / REPORT_NAME
    named = read_object(path).get("model") if path.is_file() else None
    if not isinstance(named, str):
        raise ConfigError(
            f"objective kl learns from the float model that {source.name} was made from, and no {REPORT_NAME} names "
            "it: give it (--teacher MODEL), or learn from the text alone (--objective ce)"
        )
    logger.info("the teacher is %s, which %s names", named, path)
    return named


def _examples(
    source: Checkpoint,
    sizes: Sizes,
    *,
    text: Path | None,
    instructions: Path | None,
    samples: int,
    length: int,
    seed: int,
) -> Examples:
    if not 2 <= length <= sizes.max_positions:
        raise ConfigError(
            f"sequences of {length} tokens; the model takes between 2 and {sizes.max_positions}: choose another length"
        )
    tokenizer = load_tokenizer(source)
    if instructions is not None:
        if samples < 1:
            raise ConfigError(f"samples is {samples}; it must be at least 1")
        examples = load_instructions(
            instructions,
            tokenizer,
            has_template=source.has_chat_template(),
            samples=samples,
            length=length,
            seed=seed,
        )
    else:
        assert text is not None
        segments = load_segments(Calibration(text, samples, length, seed), tokenizer.encode)
        counted = torch.ones_like(segments.tokens, dtype=torch.bool)
        counted[:, -1] = False
        facts: dict[str, int | str] = {
            "file": str(text),
            "sha256": segments.text_sha256,
            "tokens": segments.text_tokens,
            "samples": samples,
            "sequence_length": length,
        }
        examples = Examples(segments.tokens, counted, facts)
    highest = int(examples.tokens.max())
    if highest >= sizes.vocab:
        raise CheckpointError(
            f"the tokenizer gives token {highest}, and the model has {sizes.vocab}; "
            "the tokenizer files belong to another model"
        )
    return examples


def _settings(
    source: Checkpoint, teacher: Checkpoint | None, settings: EndToEnd, examples: Examples, *, seed: int
) -> dict[str, Any]:
    """All that the result depends on; what a continued run must have in common with the interrupted one."""
    return {
        "source": _files(source),
        "teacher": None if teacher is None else _files(teacher),
        "end_to_end": dataclasses.asdict(settings),
        "examples": {key: value for key, value in examples.facts.items() if key != "file"},
        "shape": list(examples.tokens.shape),
        "seed": seed,
        "version": version("dibit"),
    }


def _files(checkpoint: Checkpoint) -> list[list[Any]]:
    path = checkpoint.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
