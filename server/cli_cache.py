"""`dibit cache`: the packed weights that earlier starts left on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dibit.server.options import Json

cache_app = typer.Typer(help="Packed weights kept on disk between starts.", no_args_is_help=True)
Directory = Annotated[
    Path | None, typer.Option("--cache-dir", help="left out: dibit/packed in the user's cache directory")
]


@cache_app.command("list")
def list_cache(*, cache_dir: Directory = None, json: Json = None) -> None:
    """What is kept, most recently used first.

    Example: dibit cache list
    """
    from dibit.engine.packed_cache import default_directory, entries
    from dibit.server.output import write_json

    directory = cache_dir or default_directory()
    found = entries(directory)
    if json != "-":
        for entry in found:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            typer.echo(f"{entry.nbytes / 1e6:10.1f} MB  {used}  {entry.model}")
        typer.echo(f"{sum(entry.nbytes for entry in found) / 1e6:10.1f} MB in {len(found)} files of {directory}")
    write_json(found, json)


@cache_app.command("clear")
def clear_cache(*, cache_dir: Directory = None) -> None:
    """Remove all of it. Servers that run keep what they have mapped; the next start packs again.

    Example: dibit cache clear
    """
    from dibit.engine.packed_cache import clear, default_directory

    directory = cache_dir or default_directory()
    removed = clear(directory)
    typer.echo(f"removed {sum(entry.nbytes for entry in removed) / 1e6:.1f} MB in {len(removed)} files of {directory}")
