"""Whatever formats the linears have, the config that is written says so to whoever reads it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.engine.checkpoint.export_config import quantization_config
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.quantization_config import parse_quantization
from dibit.kernels.formats import Format

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in LINEARS]
KINDS = st.sampled_from([Format(2, 64), Format(3, 64), Format(4, 64), Format(4, -1), Format(8, 32), None])


@settings(max_examples=40)
@given(
    st.one_of(
        st.lists(KINDS, min_size=len(MODULES), max_size=len(MODULES)),
        # By whole layers, as budgets give them.
        st.lists(KINDS, min_size=12, max_size=12).map(lambda found: [kind for kind in found for _ in LINEARS]),
    )
)
def test_mixed_formats_come_back(kinds: list[Format | None]) -> None:
    chosen = dict(zip(MODULES, kinds, strict=True))
    if not any(chosen.values()):
        return
    packed = {module: PackedModule(f.bits, f.group_size, symmetric=False) for module, f in chosen.items() if f}
    names = [f"{module}.{'qweight' if kind else 'weight'}" for module, kind in chosen.items()]
    names.append("model.layers.0.input_layernorm.weight")
    config = quantization_config(packed, names, method="rtn", facts={})
    read = parse_quantization(config, "config.json")
    for module, kind in chosen.items():
        assert read.format_of(module) == kind, module


def test_one_pattern_serves_all_linears_of_a_layer_and_their_fused_names() -> None:
    packed = {module: PackedModule(2 if ".3." in module else 4, 64, symmetric=False) for module in MODULES}
    config = quantization_config(packed, [], method="gptq", facts={})
    assert list(config["dynamic"]) == [r"+:model\.layers\.3\."]
    read = parse_quantization(config, "config.json")
    assert read.format_of("model.layers.3.self_attn.qkv_proj") == Format(2, 64)
    assert read.format_of("model.layers.11.self_attn.qkv_proj") == Format(4, 64)
