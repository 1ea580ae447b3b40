"""Where memory lies on a machine with several NUMA nodes: spread over all of them, or on one with its cores.

A policy holds for what the calling thread and the threads it starts later allocate, so it is set before anything is
loaded. It goes straight to the kernel (set_mempolicy(2)); no library is needed. Linux on x86-64 and arm64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path

from dibit.engine.errors import ConfigError

NODES = Path("/sys/devices/system/node")
_BIND, _INTERLEAVE = 2, 3
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_CHOICES = "off, interleave (memory spread over all nodes) or node N (memory and threads on node N)"


def nodes() -> dict[int, frozenset[int]]:
    """Cores of each node; empty where the system does not tell."""
    found = {}
    for path in NODES.glob("node[0-9]*/cpulist"):
        found[int(path.parent.name.removeprefix("node"))] = _cores(path.read_text())
    return dict(sorted(found.items()))


def parse(choice: str) -> int | None:
    """Number of the node of "node 1" (or "node1", "1"); None for "off" and "interleave". Raises ConfigError."""
    if choice in ("off", "interleave"):
        return None
    match = re.fullmatch(r"(?:node)?\s*(\d+)", choice)
    if match is None:
        raise ConfigError(f"numa is {choice!r}; supported: {_CHOICES}")
    return int(match[1])


def apply(choice: str) -> None:
    """Sets the policy of this process for what follows. Raises ConfigError where it cannot be had."""
    node = parse(choice)
    if choice == "off":
        return
    there = nodes()
    if len(there) < 2:
        found = "one NUMA node" if there else "no NUMA nodes that it tells of"
        raise ConfigError(
            f"numa is {choice!r}, and this machine has {found}: all of its memory is equally near; leave --numa out"
        )
    if node is None:
        _set_policy(_INTERLEAVE, there)
        return
    if node not in there:
        raise ConfigError(f"numa is {choice!r}; this machine has the nodes {', '.join(map(str, there))}")
    cores = there[node] & os.sched_getaffinity(0)
    if not cores:
        raise ConfigError(f"numa is {choice!r}, and this process may not run on the cores of that node; choose another")
    os.sched_setaffinity(0, cores)
    _set_policy(_BIND, (node,))


def _set_policy(policy: int, chosen: dict[int, frozenset[int]] | tuple[int, ...]) -> None:
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or platform.system() != "Linux":
        raise ConfigError(f"--numa is for Linux on x86-64 and arm64, not {platform.system()} on {platform.machine()}")
    words = (ctypes.c_ulong * 16)()
    for node in chosen:
        words[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told of.
    if libc.syscall(ctypes.c_long(number), ctypes.c_int(policy), words, ctypes.c_ulong(64 * len(words) + 1)) != 0:
        raise ConfigError(f"the system refuses a memory policy: {os.strerror(ctypes.get_errno())}; leave --numa out")


def _cores(text: str) -> frozenset[int]:
    """Cores of a list such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
