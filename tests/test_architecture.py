"""The shape of the code: import arrows, import cost, file sizes, the packages list, the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine"},
    "quantize": {"quantize", "engine", "kernels"},
    "bench": {"bench", "server", "quantize", "engine", "kernels"},
}
# quantize may use these parts of the engine; evaluation alone uses the runtime.
EVALUATION = {"evaluate.py", "divergence.py", "likelihood.py", "tasks.py"}
QUANTIZE_FROM_ENGINE = (
    "dibit.engine.models",
    "dibit.engine.checkpoint",
    "dibit.engine.errors",
    "dibit.engine.tokenizer",
)
COMPOSITION_ROOT = set((ROOT / "server").glob("cli*.py"))
HEAVY = {
    "kernels": {"transformers", "fastapi", "uvicorn", "pydantic", "safetensors"},
    "engine": {"fastapi", "uvicorn", "pydantic", "triton"},
    "server": {"torch", "triton", "transformers"},
    "quantize": {"fastapi", "uvicorn", "pydantic", "triton"},
    "bench": set(),
}
MAX_LINES = 400


def modules() -> list[Path]:
    return sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    names = imported(path)
    if path not in COMPOSITION_ROOT:
        reached = {name.split(".")[1] for name in names if name.startswith("dibit.")}
        assert reached <= MAY_IMPORT[folder], f"{folder} may not import dibit.{reached - MAY_IMPORT[folder]}"
    heavy = {name.split(".")[0] for name in names} & HEAVY[folder]
    assert not heavy, f"{folder} may not import {heavy}"
    if folder == "quantize" and path.name not in EVALUATION:
        engine = {n for n in names if n.startswith("dibit.engine.") and not n.startswith(QUANTIZE_FROM_ENGINE)}
        assert not engine, f"quantize may not use {engine}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_a_person_can_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", ["dibit.kernels.dispatch", "dibit.engine", "dibit.server.cli", "dibit.quantize"])
def test_importing_is_cheap_and_does_nothing(name: str) -> None:
    code = (
        f"import sys, os; before = dict(os.environ); import {name}\n"
        "assert dict(os.environ) == before, 'the environment changed'\n"
        "heavy = {'triton', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, f'imported {heavy}'\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packages_list_is_the_tree() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"dibit." + ".".join(path.parent.relative_to(ROOT).parts) for path in modules()}
    assert declared == found


def test_every_c_source_is_built() -> None:
    extension = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "csrc").glob("*")}
    assert set(extension["sources"]) | set(extension["depends"]) == found


def test_kernels_is_no_regular_package() -> None:
    """A kernels/__init__.py would be imported by transformers in place of the Hub's `kernels` library."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names() -> None:
    import dibit.engine
    import dibit.quantize
    import dibit.server

    assert set(dibit.engine.__all__) == {"LLM", "AsyncEngine", "Completion", "EngineConfig", "SamplingParams", "errors"}
    assert set(dibit.server.__all__) == {"create_app"}
    assert set(dibit.quantize.__all__) == {"METHODS", "quantize_checkpoint"}
