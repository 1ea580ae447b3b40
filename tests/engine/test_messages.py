"""Messages come out of MessagePack as they went in."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dibit.engine.config import SamplingParams
from dibit.engine.errors import CheckpointError, ConfigError, EngineDead
from dibit.engine.messages import Abort, Add, Command, Failed, Outputs, Ready, Report, Stop, encode
from dibit.engine.outputs import EngineStats, RequestOutput, SpeculationStats
from dibit.engine.request import FinishReason, TokenLogprob

NATURAL = st.integers(0, 2**63 - 1)
# Text is Unicode: surrogates are refused on the way in (admission.py), and no detokenizer makes them.
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
TOKENS = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
NUMBER = st.floats(allow_nan=False)
LOGPROBS = st.builds(
    TokenLogprob, NATURAL, NUMBER, NATURAL, st.lists(st.tuples(NATURAL, NUMBER), max_size=3).map(tuple)
)
SOME_LOGPROBS = st.none() | st.lists(LOGPROBS, max_size=3).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**40),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 2**63 - 1),
    logit_bias=st.dictionaries(NATURAL, st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=TEXT.filter(bool) | st.lists(TEXT.filter(bool), max_size=3),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
COMMANDS = st.one_of(
    st.builds(
        Add,
        request_id=TEXT,
        prompt_ids=TOKENS,
        params=PARAMS,
        max_tokens=NATURAL,
        seed=st.integers(-(2**63), 2**64 - 1),
        cache_salt=TEXT,
        stream=NATURAL,
    ),
    st.builds(Abort, NATURAL),
    st.just(Stop()),
)
OUTPUTS = st.builds(
    RequestOutput,
    request_id=TEXT,
    text=TEXT,
    token_ids=TOKENS,
    logprobs=SOME_LOGPROBS,
    prompt_logprobs=SOME_LOGPROBS,
    finished=st.booleans(),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | TEXT | NATURAL,
    error=st.none() | TEXT,
)
COUNTS = st.lists(st.tuples(TEXT, NATURAL), max_size=2).map(tuple)
STATS = st.builds(
    EngineStats,
    prefill_tok_s=NUMBER,
    untaped_steps=COUNTS,
    beside_tape=COUNTS,
    speculation=st.builds(SpeculationStats, accepted_at=TOKENS, drafting_s=NUMBER),
    **{field.name: NATURAL for field in dataclasses.fields(EngineStats) if field.type == "int"},
)
REPORTS = st.one_of(
    st.builds(Ready, NATURAL, NATURAL, STATS),
    st.builds(Outputs, st.lists(st.tuples(NATURAL, OUTPUTS), max_size=3).map(tuple), STATS),
    st.builds(Failed, TEXT, TEXT),
)


@given(COMMANDS)
def test_commands(command: Command) -> None:
    assert msgspec.msgpack.Decoder(Command).decode(encode(command)) == command


@given(REPORTS)
def test_reports(report: Report) -> None:
    assert msgspec.msgpack.Decoder(Report).decode(encode(report)) == report


@pytest.mark.parametrize(
    "error", [CheckpointError("no file"), ConfigError("too large"), EngineDead("gone"), MemoryError("no room")]
)
def test_an_error_arrives_as_what_it_was(error: Exception) -> None:
    again = Failed.of(error).exception()
    assert (type(again), str(again)) == (type(error), str(error))


def test_an_error_of_another_kind_keeps_its_name() -> None:
    again = Failed.of(KeyError("\udcff")).exception()
    assert isinstance(again, EngineDead)
    assert str(again) == r"the engine could not be loaded: KeyError: '\udcff'"


def test_numbers_of_numpy_become_pythons() -> None:
    ids, params = np.arange(3), SamplingParams(temperature=np.float32(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    add = Add("a", tuple(ids), params, max_tokens=1, seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    again = msgspec.msgpack.decode(encode(add), type=Add)
    assert again == add
    assert {type(i) for i in again.prompt_ids} == {int}
    with pytest.raises(TypeError, match="which no message carries"):
        encode(Add("a", (object(),), params, max_tokens=1, seed=0))  # type: ignore[arg-type]
