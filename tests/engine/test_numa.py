"""NUMA policies, as far as a machine of one node can tell: choices, messages, and the call itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dibit.engine import numa
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError


def machine(path: Path, *cores: str) -> Path:
    for node, text in enumerate(cores):
        (path / f"node{node}").mkdir()
        (path / f"node{node}" / "cpulist").write_text(text + "\n")
    return path


def test_nodes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", machine(tmp_path, "0-2,8", "3", ""))
    assert numa.nodes() == {0: frozenset({0, 1, 2, 8}), 1: frozenset({3}), 2: frozenset()}


@pytest.mark.parametrize(
    ("choice", "node"), [("off", None), ("interleave", None), ("node 3", 3), ("node12", 12), ("0", 0)]
)
def test_choices(choice: str, node: int | None) -> None:
    assert numa.parse(choice) == node


@pytest.mark.parametrize("choice", ["", "on", "node", "node -1", "node 1,2"])
def test_other_choices_are_refused_with_the_settings(choice: str) -> None:
    with pytest.raises(ConfigError, match="supported: off, interleave"):
        EngineConfig(numa=choice)


@pytest.mark.parametrize("choice", ["interleave", "node 0"])
def test_one_node_is_said(choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", machine(tmp_path, "0-1"))
    with pytest.raises(ConfigError, match="one NUMA node"):
        numa.apply(choice)
    numa.apply("off")


def test_a_node_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", machine(tmp_path, "0-1", "2-3"))
    with pytest.raises(ConfigError, match="has the nodes 0, 1"):
        numa.apply("node 2")


def test_a_node_without_cores_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", machine(tmp_path, "4000", "4001"))
    with pytest.raises(ConfigError, match="may not run on the cores"):
        numa.apply("node 1")


@pytest.mark.skipif(sys.platform != "linux", reason="memory policies are Linux's")
def test_a_policy_reaches_the_kernel(tmp_path: Path) -> None:
    """With two nodes pretended, the second one without memory: node 0 and its cores are what this process gets."""
    core = min(os.sched_getaffinity(0))
    machine(tmp_path, str(core), "4000")
    program = (
        "import os; from pathlib import Path; from dibit.engine import numa; "
        f"numa.NODES = Path({str(tmp_path)!r}); numa.apply('node 0'); "
        "print(sorted(os.sched_getaffinity(0))); print(Path('/proc/self/numa_maps').read_text()[:4000])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "refuses a memory policy" in ended.stderr:
        pytest.skip("memory policies are not allowed here")
    if "numa_maps" in ended.stderr:
        pytest.skip("this kernel does not show policies")
    first, _, maps = ended.stdout.partition("\n")
    assert first == f"[{core}]", ended.stderr
    assert "bind" in maps
