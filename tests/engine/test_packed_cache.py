"""Packed weights kept on disk: what is mapped computes what was packed, and nothing that goes wrong stops a start."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from tiny_models import MemoryWeights, Paged, hf_model, quantized, token_ids, weights_of

from dibit.engine import packed_cache
from dibit.engine.build import _packed_cache
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.models.decoder import Decoder
from dibit.engine.packed_cache import PackedCache, clear, default_directory, entries, trim
from dibit.kernels import native
from dibit.kernels.formats import Format, FormatError, QTensor
from dibit.kernels.qlinear_cpu import assemble, pack, qlinear

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the C++ kernels")

CPU = EngineConfig(backend="cpu")
FORMATS = [Format(2, 64, "fractional"), Format(3, 16), Format(4, 32), Format(8, -1)]


def low_bit() -> MemoryWeights:
    return quantized(weights_of(hf_model()), Format(4, 16))


def load(directory: Path, *, key: str = "one", weights: MemoryWeights | None = None) -> tuple[Decoder, PackedCache]:
    cache = PackedCache(directory, key=key, model="tiny")
    return load_decoder(weights or low_bit(), config=CPU, cache=cache), cache


def logits(decoder: Decoder) -> torch.Tensor:
    paged = Paged(decoder)
    ids = token_ids(9)
    return paged.logits((paged.request(ids), 0, len(ids)))


def random_weight(n: int, k: int, format: Format) -> QTensor:
    w = torch.randn(n, k)
    scales, zeros = format.ranges(w)
    return format.encode(w, scales, zeros)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_what_is_mapped_is_what_was_packed(tmp_path: Path, format: Format) -> None:
    packed = pack(random_weight(37, 192, format))
    first = PackedCache(tmp_path, key="k", model="m")
    assert first.get("w", packed.shape, format) is None
    first.put("w", packed)
    assert not entries(tmp_path)  # not before it is complete
    first.finish()

    second = PackedCache(tmp_path, key="k", model="m")
    mapped = second.get("w", packed.shape, format)
    assert mapped is not None
    assert second.mapped_bytes > packed.nbytes
    for part in ("codes", "zeros", "scales"):
        assert torch.equal(getattr(mapped, part), getattr(packed, part))
    x = torch.randn(3, 192)
    assert torch.equal(qlinear(x, mapped), qlinear(x, packed))


def test_the_second_start_reads_no_quantized_weight(tmp_path: Path) -> None:
    expected = logits(load(tmp_path)[0])
    weights = low_bit()

    def never(module: str) -> torch.Tensor | QTensor:
        raise AssertionError(f"{module} was read")

    weights.linear = never  # type: ignore[method-assign]
    decoder, cache = load(tmp_path, weights=weights)
    assert cache.mapped_bytes > 0
    assert torch.equal(logits(decoder), expected)


@pytest.mark.parametrize("place", ["weight", "index", "tail", "cut", "empty", "foreign"])
def test_a_damaged_file_is_made_again(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(load(tmp_path)[0])
    (path,) = tmp_path.glob("*.packed")
    good = path.read_bytes()
    data = bytearray(good)
    match place:
        case "weight":
            data[64 + 5] ^= 1
        case "index":
            data[-100] ^= 1
        case "tail":
            data[-1] ^= 1
        case "cut":
            del data[len(data) // 2 :]
        case "empty":
            data.clear()
        case "foreign":
            data[:8] = b"\x7fELF\0\0\0\0"
    path.write_bytes(data)

    with caplog.at_level(logging.WARNING):
        decoder, cache = load(tmp_path)
    assert [record.message for record in caplog.records if "made again" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert cache.mapped_bytes == 0
    assert torch.equal(logits(decoder), expected)
    assert path.read_bytes() == good


def test_another_key_has_another_file(tmp_path: Path) -> None:
    load(tmp_path, key="one")
    load(tmp_path, key="two")
    assert len(entries(tmp_path)) == 2


def test_a_file_of_another_model_is_removed(tmp_path: Path) -> None:
    load(tmp_path)
    other = quantized(weights_of(hf_model()), Format(2, 16))
    decoder, _ = load(tmp_path, weights=other)
    assert not entries(tmp_path)
    assert torch.equal(logits(decoder), logits(load_decoder(other, config=CPU)))


def test_a_file_of_another_model_that_stays_does_not_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path)
    other = quantized(weights_of(hf_model()), Format(2, 16))

    def refused(path: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refused)
    decoder, _ = load(tmp_path, weights=other)
    assert torch.equal(logits(decoder), logits(load_decoder(other, config=CPU)))


def test_a_model_that_does_not_load_leaves_nothing(tmp_path: Path) -> None:
    weights = low_bit()
    linear = weights.linear
    seen = []

    def fails_late(module: str) -> torch.Tensor | QTensor:
        seen.append(module)
        if len(seen) == 5:
            raise MemoryError
        return linear(module)

    weights.linear = fails_late  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        load(tmp_path, weights=weights)
    assert len(seen) == 5
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_cache, "SPARE_BYTES", 1 << 60)
    decoder, _ = load(tmp_path)
    assert not list(tmp_path.iterdir())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert torch.isfinite(logits(decoder)).all()


def test_a_cache_that_cannot_be_written_does_not_stop_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    load(tmp_path / "file")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(caplog.records)
    assert any("not kept" in record.message for record in caplog.records)


def test_the_least_recently_used_go_first_and_what_was_abandoned(tmp_path: Path) -> None:
    for age, key in enumerate(("new", "middle", "old")):
        _, cache = load(tmp_path, key=key)
        os.utime(cache.path, (1e9 - age, 1e9 - age))
    size = entries(tmp_path)[0].nbytes
    left = tmp_path / "x.packed.1.part"
    left.write_text("")
    begun = tmp_path / "y.packed.2.part"
    begun.write_text("")
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    trim(tmp_path, keep=cache.path, limit_bytes=2 * size)
    # "old" is kept because it was just made.
    assert [Path(e.path) == cache.path for e in entries(tmp_path)] == [False, False, True]
    trim(tmp_path, keep=tmp_path / "none", limit_bytes=2 * size)
    assert len(entries(tmp_path)) == 2
    assert not cache.path.exists()
    assert begun.exists()
    assert not left.exists()


def test_a_use_counts_as_one(tmp_path: Path) -> None:
    _, cache = load(tmp_path)
    os.utime(cache.path, (1e9, 1e9))
    load(tmp_path)
    assert time.time() - entries(tmp_path)[0].used < 60


def test_a_mapped_file_outlives_its_removal(tmp_path: Path) -> None:
    expected = logits(load(tmp_path)[0])
    decoder, _ = load(tmp_path)
    assert [entry.model for entry in clear(tmp_path)] == ["tiny"]
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(decoder), expected)


def test_a_missing_directory_is_an_empty_cache(tmp_path: Path) -> None:
    assert entries(tmp_path / "none") == clear(tmp_path / "none") == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(default_directory()) == os.environ["DIBIT_CACHE_DIR"]
    monkeypatch.delenv("DIBIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/dibit/packed")


def test_a_user_without_a_home_goes_without(low_bit_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIBIT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ConfigError, match="--cache-dir"):
        default_directory()
    checkpoint = open_checkpoint(low_bit_demo)
    try:
        assert _packed_cache(checkpoint, CPU) is None
    finally:
        checkpoint.close()


def test_parts_that_do_not_fit_together_are_refused() -> None:
    w = pack(random_weight(32, 64, Format(4, 32)))
    with pytest.raises(FormatError, match="packed codes of"):
        assemble(w.codes, w.zeros, w.scales, n=33, k=64, format=w.format)
    with pytest.raises(FormatError, match="packed scales of"):
        assemble(w.codes, w.zeros, w.scales.double(), n=32, k=64, format=w.format)
