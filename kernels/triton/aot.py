"""Compiles a kernel for a GPU that is not there, and reads its machine code.

No driver is needed: Triton, ptxas and the disassembler come with the triton package. What can be known without running
is taken from three places: registers, stack and shared memory from the object file; the instructions of the main loop
from the disassembly; widths of loads and changes of layout from Triton's last intermediate form.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dibit.kernels.triton.limits import REGISTERS
from dibit.kernels.triton.qlinear import MAX_REGISTERS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_PRODUCT = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
_KINDS = (
    ("product", _PRODUCT),
    ("integer to float", re.compile(r"^(I2F|I2FP|F2F|F2FP)")),
    ("bits", re.compile(r"^U?(LOP3|PLOP3|SHF|SHL|SHR|PRMT)")),
    ("float", re.compile(r"^(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|MUFU|FMNMX|FSEL|FSETP)")),
    ("address", re.compile(r"^(U?IMAD|U?IADD|U?LEA|VIADD|MOV|UMOV|U?ISETP|SEL)")),
    ("memory", re.compile(r"^(LDG|LDGSTS|LDS|LDSM|STS|STG|LDC|LDGDEPBAR|DEPBAR)")),
    ("barrier", re.compile(r"^(BAR|WARPSYNC|SYNCS|WARPGROUP)")),
)


class NoCompiler(RuntimeError):
    """Kernels cannot be compiled here; the message says why."""


@dataclass(frozen=True)
class Loop:
    """The innermost loop with the most matrix products: instructions a warp issues in one pass, by kind."""

    instructions: int
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class Compiled:
    """What a kernel is on one architecture.

    spills       bytes of a thread's values that do not fit its registers
    loop         None when the kernel has no loop
    ttgir        Triton's last intermediate form
    """

    registers: int
    spills: int
    shared_bytes: int
    loop: Loop | None
    ttgir: str


def compile_kernel(
    kernel: Any,
    *,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    warps: int,
    stages: int,
    multiples_of_16: Sequence[str] = (),
) -> Compiled:
    """Compile for sm_`arch`. `types` gives each runtime argument's type ("*fp16", "i32"); pointers are taken to be
    aligned to 16 bytes, as torch's are, and `multiples_of_16` names the integers that launches make so."""
    if not hasattr(kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise NoCompiler("the kernels were imported for the interpreter; unset TRITON_INTERPRET to compile them")
    names = list(kernel.arg_names)
    aligned = [name for name, kind in types.items() if kind.startswith("*")] + list(multiples_of_16)
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    # As ptxas is told at a launch.
    most = min(MAX_REGISTERS, REGISTERS // (32 * warps))
    made = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": most},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = [tuple(map(int, found)) for found in _USAGE.findall(_run("cuobjdump", "-res-usage", file.name))]
        listing = _run("nvdisasm", "-c", file.name)
    if not usage:
        raise NoCompiler("cuobjdump printed no resource usage; the triton package is incomplete")
    return Compiled(
        registers=max(registers for registers, _, _ in usage),
        spills=max(stack + local for _, stack, local in usage),
        shared_bytes=int(made.metadata.shared),
        loop=main_loop(listing),
        ttgir=made.asm["ttgir"],
    )


def main_loop(listing: str) -> Loop | None:
    """The innermost loop with the most products in a disassembly; without products, the longest innermost one."""
    addresses: list[int] = []
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            for name in waiting:
                labels[name] = len(opcodes)
            waiting = []
            addresses.append(int(found[1], 16))
            opcodes.append(found[2])
            if found[2].startswith("BRA") and (target := _TARGET.search(found[3])):
                jumps.append((len(opcodes) - 1, target[1]))
    loops = [(labels[name], at) for at, name in jumps if name in labels and labels[name] < at]
    inner = [
        (first, last)
        for first, last in loops
        if not any(
            (a, b) != (first, last) and first <= a and b <= last and _products(opcodes[a : b + 1]) for a, b in loops
        )
    ]
    if not inner:
        return None
    first, last = max(inner, key=lambda span: (_products(opcodes[span[0] : span[1] + 1]), span[1] - span[0]))
    body = opcodes[first : last + 1]
    return Loop(len(body), dict(Counter(map(_kind, body))))


def load_bytes(ttgir: str, *, rows: int, columns: int) -> int | None:
    """Bytes of the narrowest global copy or load of a tensor [rows, columns]; None where there is none."""
    sizes = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "f32": 4, "i32": 4, "i64": 8}
    tensor = rf"tensor<{rows}x{columns}x!tt\.ptr<(\w+)>"
    copies = re.findall(rf"async_copy_global_to_local[^\n]*?contiguity = (\d+)[^\n]*?{tensor}", ttgir)
    widths = [int(contiguity) * sizes[element] for contiguity, element in copies]
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir))
    for element, layout in re.findall(rf"= tt\.load [^\n]*{tensor}, (#\w+)>", ttgir):
        if layout in layouts:
            widths.append(max(map(int, layouts[layout].split(", "))) * sizes[element])
    return min((16, *widths)) if widths else None


def weight_conversions(ttgir: str, *, rows: int, columns: int) -> int:
    """Changes of layout, or stores to shared memory, of a weight operand [rows, columns] after it was loaded."""
    tensor = rf"tensor<{rows}x{columns}x(?:[if]16|i8)\b"
    return len(re.findall(rf"(?:convert_layout|local_alloc|local_store) %[^\n]*{tensor}", ttgir))


def _products(opcodes: Sequence[str]) -> int:
    return sum(1 for opcode in opcodes if _PRODUCT.match(opcode))


def _kind(opcode: str) -> str:
    return next((name for name, pattern in _KINDS if pattern.match(opcode)), "other")


def _run(tool: str, flag: str, path: str) -> str:
    done = subprocess.run([TOOLS / tool, flag, path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoCompiler(f"{tool} failed: {done.stderr.strip()[:300]}")
    return done.stdout
