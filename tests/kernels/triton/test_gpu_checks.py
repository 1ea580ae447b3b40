"""The checks that `make gpu` runs, tried in the interpreter: they pass on sound kernels and fail on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.bench import gpu_checks
from dibit.bench.gpu_checks import run_checks
from dibit.kernels.formats import Format
from dibit.kernels.triton import qlinear, small
from dibit.kernels.triton.layout import TritonQWeight


def test_sound_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "BITS", ())
    monkeypatch.setattr(gpu_checks, "ROUNDED", ())
    monkeypatch.setattr(gpu_checks, "_attention", lambda lengths, tokens, device, **types: "left to its own tests")
    checks = list(run_checks(torch.device("cpu")))
    assert [check.detail for check in checks if not check.passed] == []
    assert len(checks) == 9


def test_rounded_activations_are_the_same_at_every_m(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Format(4, 128), torch.device("cpu"), (2, 33)
    assert "M [33] with integers" in gpu_checks._rounded(*arguments)
    sound = qlinear.qlinear

    def other_bits(x: Tensor, w: TritonQWeight, *, activation_bits: int) -> Tensor:
        y = sound(x, w, activation_bits=activation_bits)
        return y if x.shape[0] > 2 else y * (1 + 2.0**-23)

    monkeypatch.setattr(qlinear, "qlinear", other_bits)
    with pytest.raises(AssertionError, match="bits at M 2 are not those at M 33"):
        gpu_checks._rounded(*arguments)


def test_a_wrong_product_and_a_kernel_that_raises_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, w: object, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
        return torch.zeros(x.shape[0], 192) if out is None else out.zero_()

    def broken(gate_up: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(gpu_checks, "BITS", (4,))
    monkeypatch.setattr(gpu_checks, "ROUNDED", ())
    monkeypatch.setattr(gpu_checks, "_attention", lambda lengths, tokens, device, **types: "left to its own tests")
    monkeypatch.setattr(qlinear, "qlinear", wrong)
    monkeypatch.setattr(small, "silu_mul", broken)
    found = {check.name: check for check in run_checks(torch.device("cpu"))}
    assert not found["qlinear int4-g64"].passed
    assert "times what is allowed" in found["qlinear int4-g64"].detail
    last = found["norm, silu, rope, embedding, argmax"]
    assert not last.passed
    assert "no kernel image" in last.detail
