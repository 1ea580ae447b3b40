"""What /metrics says after requests, read as Prometheus reads it."""

from __future__ import annotations

import re

import pytest

from dibit.engine.step import StepCounts
from fakes import FakeRunner
from server_harness import MODEL, Live, serving, wait_until

LINE = re.compile(r'(dibit:[a-z_]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)+)\} (\S+)')


def scrape(live: Live) -> dict[tuple[str, str], float]:
    """Values by name and the label beside the model's name."""
    answer = live.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text.endswith("\n")
    found: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, "a family comes once, its samples together"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = LINE.fullmatch(line)
            assert match is not None, line
            assert match[1] == list(kinds)[-1]
            assert (kinds[match[1]] == "counter") == match[1].endswith("_total")
            first, _, rest = match[2].partition(",")
            assert first.startswith("model_name=")
            found[match[1].removeprefix("dibit:"), rest] = float(match[3])
    return found


def test_counters_of_requests_and_speculation() -> None:
    runner = FakeRunner(num_blocks=1024, reply=list(b"the same again, "))
    runner.step_counts = StepCounts(7, (("prefill", 2), ("rows", 1)), (("penalties", 3),))
    with serving(runner, engine={"speculative": "ngram", "prompt_lookup_min": 1}) as live:
        before = scrape(live)
        assert before["generation_tokens_total", ""] == 0
        assert before["spec_decode_num_accepted_tokens_per_pos_total", 'position="4"'] == 0
        assert live.complete("hi", max_tokens=80).status_code == 200
        wait_until(lambda: live.engine.stats().finished == 1)
        after = scrape(live)
    assert after.keys() == before.keys()
    assert after["generation_tokens_total", ""] == 80
    assert after["request_success_total", 'finished_reason="length"'] == 1
    assert after["request_success_total", 'finished_reason="stop"'] == 0
    assert after["num_requests_running", ""] == 0
    assert after["kv_cache_usage_perc", ""] == 0
    assert after["taped_steps_total", ""] == 7
    assert after["untaped_steps_total", 'reason="prefill"'] == 2
    assert after["untaped_steps_total", 'reason="rows"'] == 1
    assert after["untaped_draws_total", 'reason="penalties"'] == 3
    drafts, accepted = (after[f"spec_decode_num_{name}_total", ""] for name in ("drafts", "accepted_tokens"))
    assert 0 < accepted <= after["spec_decode_num_draft_tokens_total", ""]
    assert after["spec_decode_num_emitted_tokens_total", ""] <= drafts + accepted
    places = [value for (name, _), value in after.items() if name.endswith("per_pos_total")]
    assert len(places) == 5
    assert sum(places) == accepted
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize("name", ['a "b" \\ c', MODEL])
def test_names_are_escaped_and_no_key_is_asked_for(name: str) -> None:
    with serving(model_name=name, api_key="secret") as live:
        assert scrape(live)["num_requests_waiting", ""] == 0
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        assert f'model_name="{escaped}"' in live.http.get("/metrics").text
