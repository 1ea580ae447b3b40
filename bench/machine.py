"""What a figure depends on besides the code: processor, cores, instruction set, versions, commit."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dibit.engine.doctor import cpu_name
from dibit.kernels import native

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class MachineFacts:
    """Written beside every figure.

    cores        that this process may use
    threads      that the kernels use now
    cache_bytes  of the last level, 0 where the system does not say
    commit       of the checkout that was measured, "+" appended when files differ from it; "unknown" outside of one
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    memory_gb: float
    cache_bytes: int
    torch: str
    commit: str

    def line(self) -> str:
        """What a table of figures begins with."""
        return f"{self.cpu}, {self.threads} threads, {self.isa}; dibit {self.commit}"


def machine_facts() -> MachineFacts:
    """The facts of this machine, now. Raises NativeError when the C++ kernels are not built."""
    return MachineFacts(
        cpu=cpu_name(),
        cores=native.usable_cores(),
        threads=native.threads(),
        isa=native.isa(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        cache_bytes=last_level_cache_bytes(),
        torch=torch.__version__,
        commit=commit_id(),
    )


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 0 where the system does not say."""
    found = (re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()) for path in _CACHES.glob("index*/size"))
    return max((int(m[1]) * _UNITS.get(m[2], 1) for m in found if m is not None), default=0)


def commit_id() -> str:
    """Of this checkout, see `MachineFacts`."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*args: str) -> str | None:
    """Output of git in this checkout, or None without one (an installed wheel, no git)."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
