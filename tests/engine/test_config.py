"""Settings of an engine and of a request: what is refused, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dibit.engine.config import MAX_STOP_STRINGS, EngineConfig, SamplingParams
from dibit.engine.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_num_seqs", 0, "max_num_seqs is 0; it must be at least 1"),
        ("max_batch_tokens", -3, "max_batch_tokens is -3"),
        ("max_queued", 0, "max_queued is 0"),
        ("block_size", 0, "block_size is 0"),
        ("max_model_len", 0, "max_model_len is 0; it must be at least 1, or left out"),
        ("kv_bytes", -1, "kv_bytes is -1"),
        ("threads", 0, "threads is 0"),
        ("max_num_seqs", 300, r"max_batch_tokens \(256\) is smaller than max_num_seqs \(300\)"),
        ("kv_memory_share", 0.0, "kv_memory_share is 0.0"),
        ("kv_memory_share", 0.99, "kv_memory_share is 0.99"),
        ("head_bits", 5, "head_bits is 5; supported: 4, 8, 16"),
        ("device", "tpu", "device is 'tpu'; supported: auto, cpu, cuda"),
        ("backend", "mkl", "backend is 'mkl'; supported"),
        ("kv_type", "int2", "kv_type is 'int2'; supported"),
    ],
)
def test_engine_settings_that_cannot_hold(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("max_tokens", 0, "max_tokens"),
        ("min_tokens", -1, "min_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("top_p", 0.0, "top_p"),
        ("top_p", 1.01, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.5, "min_p"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("frequency_penalty", -2.5, "frequency_penalty"),
        ("logit_bias", {5: 101.0}, "logit_bias"),
        ("logprobs", 21, "logprobs"),
        ("prompt_logprobs", -1, "prompt_logprobs"),
        ("stop", ["a", ""], "stop"),
        ("stop", [str(i) for i in range(MAX_STOP_STRINGS + 1)], "stop"),
    ],
)
def test_request_settings_out_of_range(field: str, value: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == param
    assert field in str(caught.value) or "stop" in str(caught.value)


def test_min_tokens_within_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(5\) is larger than max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_no_output_only_where_the_prompt_is_scored() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy


def test_settings_are_frozen() -> None:
    for value in (EngineConfig(), SamplingParams()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.max_tokens = 3  # type: ignore[misc,union-attr]
