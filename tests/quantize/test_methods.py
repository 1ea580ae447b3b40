"""RTN and GPTQ on plain tensors: the algebra against a naive column-by-column solution, and its failures."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.kernels.formats import BITS, Format, QTensor, dequantize
from dibit.quantize.grid import search_grid
from dibit.quantize.methods import METHODS, make_method
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.stats import HessianSum, SiteFailure, Stats, output_error

# The algorithm of the paper, without what was found to help since.
PAPER = {"range_search": False, "static_groups": False, "act_order": False, "refit": False}
FORMATS = [Format(bits, group) for bits in BITS for group in (-1, 16)]
NONE = Stats()


def correlated(k: int, seed: int, tokens: int = 300) -> Tensor:
    """Rows with a few strong common directions and a few loud columns, like hidden states."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) * 0.3 + torch.randn(tokens, 6, generator=g) @ torch.randn(6, k, generator=g)
    x[:, :: k // 4] *= 5
    return x


def weight(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1000 + seed)) * 0.05


def statistics(x: Tensor) -> Stats:
    collected = HessianSum(x.shape[1])
    for start in range(0, x.shape[0], 37):
        collected.add(x[start : start + 37])
    return collected.stats()


def error(q: QTensor, w: Tensor, stats: Stats) -> float:
    assert stats.hessian is not None
    return output_error([dequantize(q) - w], [w], [stats.hessian])


def same(a: QTensor, b: QTensor) -> bool:
    return bool(torch.equal(a.codes, b.codes) and torch.equal(a.zeros, b.zeros) and torch.equal(a.scales, b.scales))


def naive_gptq(w: Tensor, format: Format, hessian: Tensor, *, damp: float, symmetric: bool) -> QTensor:
    """The definition: after each column, the least-squares update of all later ones from a freshly inverted Hessian."""
    w, h = w.double(), hessian.double()
    k = w.shape[1]
    h = h + damp * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    width = format.columns_per_group(k)
    codes = torch.zeros_like(w, dtype=torch.uint8)
    single = Format(format.bits, -1)
    scales, zeros = [], []
    for i in range(k):
        if i % width == 0:
            s, z = single.ranges(w[:, i : i + width].float(), symmetric=symmetric)
            scales.append(s)
            zeros.append(z)
        codes[:, i] = single.encode(w[:, i : i + 1].float(), scales[-1], zeros[-1]).codes[:, 0]
        rounded = (codes[:, i].double() - zeros[-1][:, 0].double()) * scales[-1][:, 0].double()
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= torch.outer((w[:, i] - rounded) / inverse[0, 0], inverse[0])
    return QTensor(codes, torch.cat(zeros, 1), torch.cat(scales, 1), format)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_within_half_a_step(format: Format, *, symmetric: bool) -> None:
    w = weight(7, 96, 0)
    q = RTN(symmetric=symmetric).quantize(w, format, NONE)
    step = q.scales.repeat_interleave(format.columns_per_group(96), dim=1)
    # The largest weight of a symmetric group sits half a code beyond the last one; float16 scales move the ends.
    assert bool(((dequantize(q) - w).abs() <= step * (0.51 + (2 ** (format.bits - 11)))).all())
    if symmetric:
        assert bool((q.zeros == 1 << (format.bits - 1)).all())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_columns", [1, 24, 128])
def test_gptq_is_the_naive_solution(format: Format, block_columns: int, *, symmetric: bool) -> None:
    w, stats = weight(9, 48, 1), statistics(correlated(48, 1))
    assert stats.hessian is not None
    expected = naive_gptq(w, format, stats.hessian, damp=0.01, symmetric=symmetric)
    found = GPTQ(symmetric=symmetric, block_columns=block_columns, **PAPER).quantize(w, format, stats)
    assert same(found, expected)


def test_a_hand_computed_case() -> None:
    """Two columns, 2 bits, H = [[2, 1], [1, 1]]: H⁻¹ = [[1, -1], [-1, 2]], so the error of w_0 goes to w_1 in full."""
    w = torch.tensor([[1.2, 3.0]])
    stats = Stats(tokens=1, hessian=torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    q = GPTQ(damp=0.0, **PAPER).quantize(w, Format(2, -1), stats)
    # Range 0..3: scale 1, zero 0. w_0 = 1.2 -> 1, error 0.2; w_1 = 3.0 + 0.2 -> 3 (clamped).
    assert q.codes.tolist() == [[1, 3]]
    w = torch.tensor([[1.4, 1.3, 3.0]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = GPTQ(damp=0.0, **PAPER).quantize(w, Format(2, -1), Stats(tokens=1, hessian=hessian))
    # 1.4 -> 1, error 0.4; 1.3 + 0.4 = 1.7 -> 2, where rounding to nearest says 1.
    assert q.codes.tolist() == [[1, 2, 3]]
    assert RTN().quantize(w, Format(2, -1), NONE).codes.tolist() == [[1, 1, 3]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize(("search", "static"), [(False, False), (False, True), (True, True)])
def test_gptq_without_correlations_is_rounding(bits: int, group_size: int, *, search: bool, static: bool) -> None:
    w = weight(11, 192, 2)
    stats = Stats(tokens=1, hessian=torch.eye(192, dtype=torch.float64) * 3)
    target = Format(bits, group_size)
    options = {"range_search": search, "static_groups": static, "act_order": static, "refit": False}
    gptq = GPTQ(block_columns=50, **options).quantize(w, target, stats)
    ranges = search_grid(w, target) if search else target.ranges(w)
    assert same(gptq, target.encode(w, *ranges))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_beats_rtn_on_correlated_inputs(bits: int, group_size: int, *, symmetric: bool) -> None:
    target = Format(bits, group_size)
    for seed in range(4):
        w, stats = weight(24, 96, seed), statistics(correlated(96, seed))
        rtn = error(RTN(symmetric=symmetric).quantize(w, target, NONE), w, stats)
        for options in (PAPER, {**PAPER, "static_groups": True}, {**PAPER, "refit": True}, {}):
            gptq = GPTQ(symmetric=symmetric, **options).quantize(w, target, stats)
            assert error(gptq, w, stats) < rtn, (seed, options)


def test_act_order_helps_when_a_few_columns_are_loud() -> None:
    target, gains = Format(3, 16), []
    for seed in range(8):
        w, stats = weight(24, 96, seed), statistics(correlated(96, seed))
        plain = GPTQ(act_order=False).quantize(w, target, stats)
        ordered = GPTQ().quantize(w, target, stats)
        gains.append(error(plain, w, stats) / error(ordered, w, stats))
    assert sum(gains) / len(gains) > 1.0


def test_range_search_lowers_the_weight_error_of_heavy_tails() -> None:
    g = torch.Generator().manual_seed(5)
    w = torch.randn(16, 128, generator=g) ** 3
    plain = dequantize(RTN().quantize(w, Format(3, 64), NONE))
    searched = dequantize(RTN(range_search=True).quantize(w, Format(3, 64), NONE))

    def norm(found: Tensor) -> float:
        return float((found - w).abs().pow(2.4).sum())

    assert norm(searched) < 0.95 * norm(plain)


def test_range_search_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(13, 64, 3)
    whole = RTN(range_search=True).quantize(w, Format(2, 32), NONE)
    monkeypatch.setattr("dibit.quantize.methods.rtn.SEARCH_ELEMENTS", 100)
    assert same(RTN(range_search=True).quantize(w, Format(2, 32), NONE), whole)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_where_they_stand(*, act_order: bool) -> None:
    x = correlated(64, 4)
    x[:, [0, 17, 63]] = 0
    w, stats = weight(5, 64, 4), statistics(x)
    q = GPTQ(**{**PAPER, "static_groups": True, "act_order": act_order}).quantize(w, Format(4, 32), stats)
    rtn = RTN().quantize(w, Format(4, 32), NONE)
    assert torch.equal(q.codes[:, [0, 17, 63]], rtn.codes[:, [0, 17, 63]])
    assert error(q, w, stats) < error(rtn, w, stats)


def test_all_inputs_dead_is_rtn() -> None:
    w = weight(5, 32, 4)
    stats = statistics(torch.zeros(10, 32))
    assert same(GPTQ(**PAPER).quantize(w, Format(4, 16), stats), RTN().quantize(w, Format(4, 16), NONE))
    assert same(GPTQ().quantize(w, Format(4, 16), stats), Format(4, 16).encode(w, *search_grid(w, Format(4, 16))))


def test_fewer_tokens_than_columns_need_damping() -> None:
    w, stats = weight(6, 64, 6), statistics(correlated(64, 6, tokens=9))
    q = GPTQ(damp=0.0).quantize(w, Format(4, 32), stats)
    assert error(q, w, stats) < error(RTN().quantize(w, Format(4, 32), NONE), w, stats)


def test_a_hessian_that_cannot_be_factored_fails_the_site() -> None:
    w, indefinite = weight(6, 32, 7), -torch.eye(32, dtype=torch.float64)
    with pytest.raises(SiteFailure, match="factored"):
        GPTQ().quantize(w, Format(4, 32), Stats(tokens=1, hessian=indefinite))
    with pytest.raises(SiteFailure, match="not finite"):
        GPTQ().quantize(w, Format(4, 32), Stats(tokens=1, hessian=indefinite * float("nan")))
    with pytest.raises(SiteFailure, match="statistics"):
        GPTQ().quantize(w, Format(4, 32), NONE)


def test_damping_grows_until_the_factor_exists() -> None:
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[3, 4] = hessian[4, 3] = 1.05  # an eigenvalue of -0.05: damping of 0.01 is not enough, 0.09 is
    w = weight(6, 32, 8)
    q = GPTQ(damp=0.01, damp_increment=0.01).quantize(w, Format(4, 32), Stats(tokens=1, hessian=hessian))
    assert bool(torch.isfinite(dequantize(q)).all())
    with pytest.raises(SiteFailure):
        GPTQ(damp=0.01, damp_increment=5.0).quantize(w, Format(4, 32), Stats(tokens=1, hessian=hessian))


def test_inputs_are_left_alone() -> None:
    w, stats = weight(6, 64, 9), statistics(correlated(64, 9))
    assert stats.hessian is not None
    before_w, before_h = w.clone(), stats.hessian.clone()
    GPTQ().quantize(w, Format(2, 32), stats)
    assert torch.equal(w, before_w)
    assert torch.equal(stats.hessian, before_h)


def test_rows_are_independent() -> None:
    """What lets the pipeline quantize q, k and v as one stacked weight and split the result."""
    w, stats = weight(12, 64, 10), statistics(correlated(64, 10))
    whole = GPTQ().quantize(w, Format(3, 16), stats)
    for start, stop in ((0, 5), (5, 12)):
        assert same(GPTQ().quantize(w[start:stop], Format(3, 16), stats), whole.rows(start, stop))


@pytest.mark.parametrize("k", [64, 1040])
def test_the_hessian_is_the_mean_outer_product(k: int) -> None:
    x = correlated(k, 11, tokens=101)
    stats = statistics(x)
    assert stats.hessian is not None
    assert stats.tokens == 101
    assert stats.hessian.dtype == (torch.float64 if k < 1024 else torch.float32)
    exact = x.double().T @ x.double() / 101
    torch.testing.assert_close(stats.hessian.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_output_error_is_measured_on_the_inputs() -> None:
    x, w = correlated(64, 12), weight(6, 64, 12)
    delta = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    stats = statistics(x)
    assert stats.hessian is not None
    expected = float(((x @ delta.T) ** 2).sum() / ((x @ w.T) ** 2).sum())
    assert output_error([delta], [w], [stats.hessian]) == pytest.approx(expected, rel=1e-4)
    assert torch.tensor(output_error([delta], [w * 0], [stats.hessian])).isnan()


def test_methods_by_name() -> None:
    assert make_method("gptq", {"damp": 0.05, "symmetric": True}) == GPTQ(damp=0.05, symmetric=True)
    with pytest.raises(ConfigError, match="supported: rtn, gptq"):
        make_method("magic", {})
    with pytest.raises(ConfigError, match="no option damp; it has: symmetric, range_search"):
        make_method("rtn", {"damp": 0.05})


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_option_is_described_and_plain(kind: type) -> None:
    """The command line makes its options from the fields and the docstring."""
    text = "\n".join(base.__doc__ or "" for base in kind.__mro__)
    for field in dataclasses.fields(kind):
        assert re.search(rf"^    (\w+, )*{field.name}(, \w+)* ", text, re.MULTILINE), field.name
        assert type(field.default) in (int, float, bool, str)


@pytest.mark.parametrize(
    "options",
    [{"damp": -0.1}, {"damp": 2.0}, {"damp_increment": 0.0}, {"block_columns": 0}, {"static_groups": False}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        make_method("gptq", options)
