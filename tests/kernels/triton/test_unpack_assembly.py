"""Inline assembly of unpack.py, which no interpreter runs, carried out here: the codes that the layout holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels.formats import PER_CHANNEL, Format
from dibit.kernels.triton import layout

UNPACK = Path(layout.__file__).parent / "device" / "unpack.py"
_STATEMENT = re.compile(r"(and|or|xor|shl|shr)\.[bu]32\s+(\S+), (\S+), (\S+)")


def carried_out(function: str, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of the assembly in `function` for 32-bit registers, int64 tensors in [0, 2^32)."""
    tree = ast.parse(UNPACK.read_text(encoding="utf-8"))
    body = next(f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == function)
    call = next(c for c in ast.walk(body) if isinstance(c, ast.Call) and ast.unparse(c.func).endswith("elementwise"))
    text, constraints = (ast.literal_eval(argument) for argument in call.args[:2])
    outputs = constraints.count("=")
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in re.split(r"[{};]", text):
        if not statement.strip() or ".reg" in statement:
            continue
        found = _STATEMENT.fullmatch(statement.strip())
        assert found is not None, statement
        operation, target, *operands = found.groups()
        a, b = (registers[o] if o in registers else torch.tensor(int(o, 0)) for o in operands)
        made = {"and": a & b, "or": a | b, "xor": a ^ b, "shl": a << b, "shr": a >> b}[operation]
        registers[target] = made & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def packed(bits: int) -> tuple[Tensor, list[Tensor], layout.Geometry]:
    """Codes [64, columns] of one unit, its word sets as registers [64, 8] of two words, its geometry."""
    geometry = layout.Geometry.of(Format(bits, PER_CHANNEL), 1)
    w = random_weight(64, geometry.unit_columns, Format(bits, PER_CHANNEL))
    words = layout.pack(w).codes[0, 0].to(torch.int64) & 0xFFFF
    return w.codes.to(torch.int64), list(words[..., ::2] | words[..., 1::2] << 16), geometry


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_are_codes_times_their_powers(bits: int) -> None:
    codes, sets, geometry = packed(bits)
    found = [plane for words in sets for plane in carried_out(f"planes_{bits}", [words])]
    if bits == 3:
        found += carried_out("last_plane_3", sets)
    assert len(found) == geometry.planes
    for p, plane in enumerate(found):
        want = codes[:, 16 * p : 16 * p + 16] << layout.plane_shift(bits, p)
        assert torch.equal(plane & 0xFFFF, want[:, ::2])
        assert torch.equal(plane >> 16, want[:, 1::2])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_are_codes_where_activations_are_put(bits: int) -> None:
    """Byte `byte` of a register's field is a neighbour in its word, or of the same plane in the next word."""
    codes, sets, _ = packed(bits)
    found = carried_out(f"bytes_{bits}", sets)
    fields_of_a_byte = 1 if bits == 3 else 8 // bits
    for f, field in enumerate(found):
        for byte in range(4):
            # As device/prepare.py's byte_place: planes of a byte's fields stand together, its word's other byte after.
            pair, inner = divmod(f, fields_of_a_byte)
            plane = pair * 2 * fields_of_a_byte + byte % 2 * fields_of_a_byte + inner
            want = codes[:, 16 * plane + byte // 2 : 16 * plane + 16 : 2]
            assert torch.equal((field >> (8 * byte)) & 0xFF, want ^ 0x80 if bits == 8 else want)
