"""Plans that were measured: one JSON file for each kind of GPU, in the package for those that come with it (`SHIPPED`)
and in the user's cache, which wins. A file of other kernels or another triton, or a damaged one, is not used, and one
line in the log says so.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.plan import CONFIGS, MAX_SPLITS, Tuned

log = logging.getLogger(__name__)

VERSION = 1
"""Of the kernels: what was measured with others means nothing."""
SHIPPED = Path(__file__).with_name("tuned")


def directory() -> Path:
    """$DIBIT_TUNED_DIR, or dibit/tuned in the user's cache directory (XDG)."""
    if given := os.environ.get("DIBIT_TUNED_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dibit" / "tuned"


def key_of(w: TritonQWeight) -> str:
    """Of everything that a plan depends on but the GPU."""
    return f"{w.format.bits} bits, groups of {w.format.group_size}, {w.padded_rows} x {w.geometry.columns}"


@functools.cache
def kept_on(device: torch.device) -> dict[str, Tuned]:
    """What is kept for the GPU `device`; read once."""
    return kept(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


def tuned_for(w: TritonQWeight) -> Tuned | None:
    """What is kept for products with `w` on the GPU that holds it."""
    found = kept_on(w.codes.device)
    return found.get(key_of(w)) if found else None


def file_name(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


def kept(gpu_name: str) -> dict[str, Tuned]:
    """All shapes measured on a kind of GPU; the user's before those that came with the package."""
    found: dict[str, Tuned] = {}
    for folder in (SHIPPED, directory()):
        path = folder / file_name(gpu_name)
        try:
            found |= _read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is not used: %s (`dibit kernels tune` writes it anew)", path, error)
    return found


def keep(gpu_name: str, measured: Mapping[str, Tuned], *, folder: Path | None = None) -> Path:
    """Add shapes to the user's file, or to one in another folder. Raises OSError where it cannot be written."""
    path = (folder or directory()) / file_name(gpu_name)
    try:
        all_shapes = _read(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        all_shapes = {}
    all_shapes |= measured
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "version": VERSION,
            "triton": triton.__version__,
            "gpu": gpu_name,
            "shapes": {
                key: {"splits": t.splits, "configs": {str(tokens): name for tokens, name in t.configs.items()}}
                for key, t in sorted(all_shapes.items())
            },
        },
        indent=2,
    )
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)
    kept_on.cache_clear()
    return path


def _read(path: Path) -> dict[str, Tuned]:
    """Raises ValueError for a file of other kernels, and whatever a damaged one leads to."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (stored["version"], stored["triton"]) != (VERSION, triton.__version__):
        raise ValueError(f"it was measured with triton {stored['triton']} and kernels {stored['version']}")
    return {key: _tuned(entry) for key, entry in stored["shapes"].items()}


def _tuned(entry: dict[str, Any]) -> Tuned:
    splits, configs = entry["splits"], {int(tokens): name for tokens, name in entry["configs"].items()}
    if unknown := set(configs.values()) - CONFIGS.keys():
        raise ValueError(f"it names configurations that do not exist: {', '.join(map(str, unknown))}")
    if splits is not None and not (isinstance(splits, int) and 1 <= splits <= MAX_SPLITS):
        raise ValueError(f"{splits} splits; 1 to {MAX_SPLITS} are possible")
    return Tuned(splits, configs)
