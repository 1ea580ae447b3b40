"""Which body each op runs on: one readable table, resolved once at load.

A body is chosen for a device and, where it matters, a weight format. `backend="auto"` takes the first body of the
table that accepts; an explicit backend is used or refused, never replaced. Every refusal keeps its reason, so that
`report()` can print why a fast path was not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from dibit.kernels.formats import BITS, ZERO_GRIDS, Format, ZeroGrid
from dibit.kernels.qlinear import ACTIVATION_BITS

Backend = Literal["auto", "cpu", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "triton", "reference")


class NoKernel(RuntimeError):
    """No body of the table accepts the op on this device; the message lists each body and why not."""


@dataclass(frozen=True)
class Impl:
    """One body of an op. `available` names a function that returns None, or the reason it cannot run here.

    zero_grids       readings of the zero field that it computes with
    activation_bits  widths to which it can round its input
    """

    backend: str
    target: str
    pack: str | None = None
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    bits: frozenset[int] = frozenset(BITS)
    zero_grids: frozenset[ZeroGrid] = frozenset({"integer"})
    activation_bits: frozenset[int] = frozenset()
    available: str | None = None

    def refusal(self, device: str, format: Format | None, activation_bits: int | None = None) -> str | None:
        """Why this body cannot serve, or None."""
        if device not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))}, not on {device}"
        if format is not None and format.bits not in self.bits:
            return f"has no {format.bits}-bit kernel (it has {', '.join(map(str, sorted(self.bits)))})"
        if format is not None and format.zero_grid not in self.zero_grids:
            return f"has no kernel for {format.zero_grid} zero points"
        if activation_bits is not None and activation_bits not in self.activation_bits:
            return f"has no kernel for activations of {activation_bits} bits"
        if self.available is not None:
            reason: str | None = _load(self.available)()
            return reason
        return None


@dataclass(frozen=True)
class Resolved:
    """The chosen body of an op, with the bodies that were passed over and why."""

    op: str
    backend: str
    run: Callable[..., Any]
    pack: Callable[..., Any] | None
    refusals: tuple[tuple[str, str], ...]


_CPU_ONLY = frozenset({"cpu"})
_NATIVE = "dibit.kernels.native:unavailable"
_ALL_GRIDS = frozenset(ZERO_GRIDS)
_ALL_ACTIVATIONS = frozenset(ACTIVATION_BITS)


def _reference(target: str, pack: str | None = None) -> Impl:
    return Impl(
        "reference",
        f"dibit.kernels.{target}",
        pack=pack,
        zero_grids=_ALL_GRIDS,
        activation_bits=_ALL_ACTIVATIONS,
    )


def _cpu(target: str, pack: str | None = None) -> Impl:
    return Impl(
        "cpu",
        f"dibit.kernels.{target}",
        pack=pack,
        devices=_CPU_ONLY,
        zero_grids=_ALL_GRIDS,
        activation_bits=_ALL_ACTIVATIONS,
        available=_NATIVE,
    )


def _triton(target: str, pack: str | None = None) -> Impl:
    return Impl(
        "triton",
        f"dibit.kernels.{target}",
        pack=pack,
        devices=frozenset({"cuda"}),
        zero_grids=_ALL_GRIDS,
        activation_bits=_ALL_ACTIVATIONS,
        available="dibit.kernels.triton.availability:unavailable",
    )


def _interpreted(impl: Impl) -> Impl:
    """The same body on the CPU, for whoever asks for it by name: it stands behind the reference, which accepts all."""
    return replace(impl, devices=_CPU_ONLY, available="dibit.kernels.triton.availability:interpreter_unavailable")


_PACK_CPU = "dibit.kernels.qlinear_cpu:pack"
_PACK_REFERENCE = "dibit.kernels.qlinear:pack"
_PACK_TRITON = "dibit.kernels.triton.layout:pack"

_BODIES: dict[str, tuple[Impl, Impl, Impl]] = {
    "qlinear": (
        _cpu("qlinear_cpu:qlinear", _PACK_CPU),
        _triton("triton.qlinear:qlinear", _PACK_TRITON),
        _reference("qlinear:qlinear_reference", _PACK_REFERENCE),
    ),
    "embedding": (
        _cpu("embedding_cpu:embedding", _PACK_CPU),
        _triton("triton.small:embedding", _PACK_TRITON),
        _reference("embedding:embedding_reference", _PACK_REFERENCE),
    ),
    "rms_norm": (
        _cpu("norm_cpu:rms_norm"),
        _triton("triton.small:rms_norm"),
        _reference("norm:rms_norm_reference"),
    ),
    "add_rms_norm": (
        _cpu("norm_cpu:add_rms_norm"),
        _triton("triton.small:add_rms_norm"),
        _reference("norm:add_rms_norm_reference"),
    ),
    "head_norm": (
        _cpu("norm_cpu:head_norm"),
        _triton("triton.head_norm:head_norm"),
        _reference("norm:head_norm_reference"),
    ),
    "rope_kv_write": (
        _cpu("rope_cpu:rope_kv_write"),
        _triton("triton.small:rope_kv_write"),
        _reference("rope:rope_kv_write_reference"),
    ),
    "paged_attention": (
        _cpu("attention_cpu:paged_attention"),
        _triton("triton.attention:paged_attention"),
        _reference("attention:paged_attention_reference"),
    ),
    "silu_mul": (
        _cpu("activation_cpu:silu_mul"),
        _triton("triton.small:silu_mul"),
        _reference("activation:silu_mul_reference"),
    ),
    "concat": (
        _cpu("concat_cpu:concat"),
        _triton("concat:concat_reference"),
        _reference("concat:concat_reference"),
    ),
    "argmax": (
        _cpu("argmax_cpu:argmax"),
        _triton("triton.small:argmax"),
        _reference("argmax:argmax_reference"),
    ),
}

IMPLS: dict[str, tuple[Impl, ...]] = {op: (*bodies, _interpreted(bodies[1])) for op, bodies in _BODIES.items()}


def resolve(
    op: str,
    *,
    device: str,
    backend: Backend = "auto",
    format: Format | None = None,
    activation_bits: int | None = None,
) -> Resolved:
    """The body of `op` for a device type ("cpu", "cuda"), a weight format and a width of the activations.

    Raises NoKernel with every reason.
    """
    refusals: list[tuple[str, str]] = []
    for impl in IMPLS[op]:
        if backend not in ("auto", impl.backend):
            continue
        reason = impl.refusal(device, format, activation_bits)
        if reason is None:
            pack = None if impl.pack is None else _load(impl.pack)
            return Resolved(op, impl.backend, _load(impl.target), pack, tuple(refusals))
        refusals.append((impl.backend, reason))
    tried = "; ".join(f"{name} {reason}" for name, reason in refusals) or f"no body is called {backend!r}"
    raise NoKernel(f"no kernel for {op} on {device}{f' in {format.name}' if format else ''}: {tried}")


def report(device: str, backend: Backend = "auto") -> list[Resolved]:
    """One resolution per op, for `dibit doctor` and the start-up log."""
    return [resolve(op, device=device, backend=backend) for op in IMPLS]


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
