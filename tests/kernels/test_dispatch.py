"""Choosing a body: the first that accepts, an explicit one or none, and every refusal with its reason."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from dibit.kernels import dispatch, native
from dibit.kernels.dispatch import IMPLS, Backend, Impl, NoKernel, report, resolve
from dibit.kernels.formats import Format, QTensor
from dibit.kernels.triton import availability

W4 = Format(bits=4, group_size=32)


def broken() -> str:
    return "is broken for this test"


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", broken)


def test_auto_takes_the_cpu_backend_on_a_cpu() -> None:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    assert [r.backend for r in report("cpu")] == ["cpu"] * len(IMPLS)


def test_auto_falls_back_and_says_why(without_native: None) -> None:
    chosen = resolve("qlinear", device="cpu", format=W4)
    assert chosen.backend == "reference"
    assert chosen.refusals == (("cpu", "is broken for this test"), ("triton", "runs on cuda, not on cpu"))


def test_auto_takes_the_gpu_kernels_where_they_run_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "unavailable", broken)
    chosen = resolve("qlinear", device="cuda", format=W4)
    assert chosen.backend == "reference"
    assert chosen.refusals == (("cpu", "runs on cpu, not on cuda"), ("triton", "is broken for this test"))
    with pytest.raises(NoKernel, match="triton is broken for this test"):
        resolve("qlinear", device="cuda", backend="triton", format=W4)
    monkeypatch.setattr(availability, "unavailable", lambda: None)
    for bodies in IMPLS.values():
        on_gpu = next(impl for impl in bodies if impl.refusal("cuda", W4) is None)
        assert on_gpu.backend == "triton"


def test_the_interpreter_is_asked_for_by_name_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NoKernel, match="TRITON_INTERPRET=1 tries it"):
        resolve("rms_norm", device="cpu", backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "unavailable", broken)
    assert resolve("rms_norm", device="cpu").backend == "reference"


def test_an_explicit_backend_never_falls_back(without_native: None) -> None:
    with pytest.raises(NoKernel, match="no kernel for qlinear on cpu in int4-g32: cpu is broken for this test"):
        resolve("qlinear", device="cpu", backend="cpu", format=W4)
    with pytest.raises(NoKernel, match="no body is called 'opencl'"):
        resolve("qlinear", device="cpu", backend="opencl")  # type: ignore[arg-type]
    assert resolve("qlinear", device="cpu", backend="reference").refusals == ()


def test_a_width_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only4 = Impl("cpu", "dibit.kernels.qlinear:qlinear_reference", bits=frozenset({4}))
    monkeypatch.setattr(dispatch, "IMPLS", MappingProxyType({"qlinear": (only4,)}))
    assert resolve("qlinear", device="cpu", format=W4).backend == "cpu"
    with pytest.raises(NoKernel, match=r"has no 3-bit kernel \(it has 4\)"):
        resolve("qlinear", device="cpu", format=Format(bits=3, group_size=32))


def test_what_a_body_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Impl("cpu", "dibit.kernels.qlinear:qlinear_reference")
    monkeypatch.setattr(dispatch, "IMPLS", MappingProxyType({"qlinear": (plain,)}))
    with pytest.raises(NoKernel, match="int2-g32-fractional: cpu has no kernel for fractional zero points"):
        resolve("qlinear", device="cpu", format=Format(2, 32, "fractional"))
    with pytest.raises(NoKernel, match="cpu has no kernel for activations of 6 bits"):
        resolve("qlinear", device="cpu", format=W4, activation_bits=6)


def test_the_cpu_and_the_reference_have_both() -> None:
    names: list[Backend] = ["reference"] if native.unavailable() is not None else ["reference", "cpu"]
    third = Format(3, 32, "fractional")
    for name in names:
        assert resolve("qlinear", device="cpu", backend=name, format=third, activation_bits=4).backend == name


@pytest.mark.parametrize("op", ["qlinear", "embedding"])
def test_pack_and_run_of_one_resolution_belong_together(op: str) -> None:
    w = QTensor(torch.ones(3, 32, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8), torch.ones(3, 1), W4)
    argument = torch.ones(2, 32) if op == "qlinear" else torch.tensor([0, 2])
    for chosen in {resolve(op, device="cpu", format=W4).backend, "reference"}:
        body = resolve(op, device="cpu", backend=chosen, format=W4)  # type: ignore[arg-type]
        assert body.pack is not None
        y = body.run(argument, body.pack(w))
        torch.testing.assert_close(y, torch.full((2, 3), 32.0) if op == "qlinear" else torch.ones(2, 32))
