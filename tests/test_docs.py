"""The documentation tells the truth: its commands exist with those options, its links lead somewhere, its code
compiles, and every figure file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dibit.server.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


def dibit_lines(page: Path) -> list[str]:
    text = page.read_text()
    in_blocks = [line.strip() for body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(dibit [^`]+)`", text)
    return [line for line in in_blocks + inline if line.startswith("dibit ")]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command object that the words after `dibit` name, and the words left."""
    node: Any = typer.main.get_command(app)
    while hasattr(node, "commands") and words and not words[0].startswith("-"):
        assert words[0] in node.commands, f"there is no command {words[0]!r}"
        node, words = node.commands[words[0]], words[1:]
    return node, words


def options_of(command: Any) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    for line in dibit_lines(page):
        words = shlex.split(line, comments=True)[1:]
        if "," in words[0]:  # a list of commands in running text
            continue
        command, rest = command_of(words)
        unknown = {w.split("=")[0] for w in rest if w.startswith("-") and w != "-"} - options_of(command)
        assert not unknown, f"{line!r} uses {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_result_files_exist(page: Path) -> None:
    for target in re.findall(r"bench/results/[\w./-]+\.jsonl?", page.read_text()):
        assert (ROOT / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_compiles(page: Path) -> None:
    for body in blocks(page, "python"):
        compile(body, page.name, "exec")


def test_every_command_has_help_and_an_example() -> None:
    def leaves(node: Any, path: str) -> list[tuple[str, Any]]:
        if hasattr(node, "commands"):
            return [leaf for name, child in node.commands.items() for leaf in leaves(child, f"{path} {name}")]
        return [(path, node)]

    for path, command in leaves(typer.main.get_command(app), "dibit"):
        assert f"Example: {path}" in (command.help or ""), f"{path} --help shows no example"
        for parameter in command.params:
            if parameter.name not in ("help", "model"):
                assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"
