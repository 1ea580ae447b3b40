"""What the kernels compile to, without a GPU: no spills, wide loads, nothing between a weight and its product.

Compiling needs kernels that were not imported for the interpreter, so it happens in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dibit.kernels.triton import report
from dibit.kernels.triton.aot import NoCompiler, compile_kernel, load_bytes, main_loop, weight_conversions
from dibit.kernels.triton.limits import MAX_WARPS, SHARED_BYTES
from dibit.kernels.triton.report_model import (
    GPUS,
    RECORDED,
    KernelReport,
    faults,
)

SOUND = KernelReport(
    kernel="qlinear int2-g128 M1",
    gpu="H100",
    arch=90,
    registers=90,
    spills=0,
    shared_bytes=12800,
    shared_limit=232448,
    occupancy=0.3,
    weight_load_bytes=16,
    weight_conversions=0,
    instr_per_weight=1.7,
    instr_budget=2.5,
    bytes=16_000_000,
    minimum_bytes=15_900_000,
    predicted_us=6.8,
    bandwidth_share=0.7,
)


def reported(gpus: str, products: str, others: str = "()") -> list[KernelReport]:
    code = (
        "import dataclasses, json\n"
        "from dibit.kernels.triton.report import *\n"
        f"gpus = [gpu for gpu in GPUS if gpu.name in {gpus}]\n"
        f"rows = kernel_reports(gpus, products={products}, others={others})\n"
        "print(json.dumps([dataclasses.asdict(row) for row in rows]))\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    return [KernelReport(**row) for row in json.loads(done.stdout)]


def test_batch_1_is_bound_by_memory_on_ampere_and_hopper() -> None:
    rows = reported("('A100', 'H100')", "[Product(Format(bits, 128), 1) for bits in (2, 3, 4)]")
    assert len(rows) == 6
    for row in rows:
        assert faults(row) == []
        assert row.weight_load_bytes == 16
        assert row.instr_per_weight is not None
        assert row.instr_budget is not None
        assert 0.5 < row.instr_per_weight < row.instr_budget
        assert row.bytes >= row.minimum_bytes


def test_few_tokens_and_every_other_kernel_on_a_small_gpu() -> None:
    products = "[Product(Format(4, 128), 16), Product(Format(4, 128), 64, activation_bits=8)]"
    rows = reported("('RTX 3060',)", products, "OTHERS")
    assert len(rows) == 2 + len(report.OTHERS)
    assert [row.kernel for row in rows[:2]] == ["qlinear int4-g128 M16", "qlinear int4-g128 a8 M64"]
    assert [fault for row in rows for fault in faults(row)] == []


def test_a_prediction_is_never_beyond_the_bandwidth() -> None:
    """Of a launch and of a whole decode step: no time is shorter than reading the bytes."""
    code = (
        "import dataclasses, json\n"
        "from dibit.kernels.triton.report import *\n"
        "gpu = next(gpu for gpu in GPUS if gpu.name == 'A100')\n"
        "print(json.dumps(dataclasses.asdict(predict_decode(gpu, Format(4, 128)))))\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)
    assert 0.3 < step["bandwidth_share"] < 1
    assert step["tok_s"] == pytest.approx(1e6 / step["step_us"])
    # 2.04e12 bytes a second over 3.5e9 bytes of weights is a ceiling.
    assert step["tok_s"] < 585
    assert 32 * report.LAYER_LAUNCHES < step["launches"] < 33 * report.LAYER_LAUNCHES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spills": 8}, "8 bytes a thread do not fit"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory; 232448 are there"),
        ({"weight_load_bytes": 4}, "weights are loaded 4 bytes at a time"),
        ({"weight_conversions": 2}, "2 changes of layout"),
        ({"instr_per_weight": 2.2}, "88% of the GPU's instructions"),
    ],
)
def test_every_rule_can_be_broken(changes: dict[str, Any], said: str) -> None:
    assert faults(SOUND) == []
    found = faults(dataclasses.replace(SOUND, **changes))
    assert found
    assert said in found[0]


def test_more_instructions_than_recorded_is_a_fault() -> None:
    kernel, recorded_by_arch = next(iter(RECORDED.items()))
    arch, recorded = next(iter(recorded_by_arch.items()))
    row = dataclasses.replace(SOUND, kernel=kernel, arch=arch, gpu="B200", instr_per_weight=recorded * 1.2)
    assert "recorded:" in faults(row)[0]
    assert faults(dataclasses.replace(row, instr_per_weight=recorded)) == []


def test_the_main_loop_is_the_innermost_with_products() -> None:
    listing = """
.L_x_0:
        /*0010*/                   IMAD R1, R2, R3, R4 ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0030*/                   LOP3.LUT R5, R6, 0xf000f, RZ, 0xc0, !PT ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/               @P2 BRA `(.L_x_2) ;
"""
    loop = main_loop(listing)
    assert loop is not None
    assert loop.instructions == 4
    assert loop.kinds == {"memory": 1, "bits": 1, "product": 1, "other": 1}
    assert main_loop("        /*0010*/   EXIT ;") is None


def test_widths_and_conversions_are_read_from_the_intermediate_form() -> None:
    form = """
#blocked1 = #ttg.blocked<{sizePerThread = [1, 2], threadsPerWarp = [8, 4]}>
%a = ttg.async_copy_global_to_local %p, %q mask %m {contiguity = 8 : i32} : tensor<64x32x!tt.ptr<i16>, #b> -> <i16>
%b = tt.load %r : tensor<16x8x!tt.ptr<f16>, #blocked1>
%c = ttg.local_load %w : !ttg.memdesc<64x32xi16> -> tensor<64x32xi16, #dot>
"""
    assert load_bytes(form, rows=64, columns=32) == 16
    assert load_bytes(form, rows=16, columns=8) == 4
    assert load_bytes(form, rows=64, columns=8) is None
    assert weight_conversions(form, rows=64, columns=32) == 0
    worse = form + "%d = ttg.convert_layout %c : tensor<64x32xi16, #x> -> tensor<64x32xi16, #dot>\n"
    assert weight_conversions(worse, rows=64, columns=32) == 1


def test_the_interpreter_is_no_compiler() -> None:
    from dibit.kernels.triton.device.prepare import prepare_kernel

    with pytest.raises(NoCompiler, match="unset TRITON_INTERPRET"):
        compile_kernel(prepare_kernel, types={}, constants={}, arch=80, warps=4, stages=3)


def test_every_gpu_has_its_architectures_limits() -> None:
    for gpu in GPUS:
        assert gpu.arch in SHARED_BYTES
        assert gpu.arch in MAX_WARPS
    a100 = next(gpu for gpu in GPUS if gpu.name == "A100")
    # 13.4 bytes a clock and processor arrive; at 4.19 bits a weight that is 25.5 weights for 128 lanes.
    assert a100.instructions_per_weight(4.1875) == pytest.approx(128 / (13.39 * 8 / 4.1875), rel=1e-3)
