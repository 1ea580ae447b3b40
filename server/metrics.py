"""GET /metrics: the engine's counters in the text format of Prometheus. Open to everyone, and always on.

Names are vLLM's under the prefix `dibit:` where it has one for the same thing, so that a dashboard needs a search and
replace. Reference: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Response

from dibit.engine.outputs import EngineStats
from dibit.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "dibit:"


@dataclass(frozen=True)
class Family:
    """A name with its samples: values by their label, or one value under the label None."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Mapping[str | None, float]
    label: str = ""

    def lines(self, model: str) -> Iterable[str]:
        yield f"# HELP {PREFIX}{self.name} {self.help}"
        yield f"# TYPE {PREFIX}{self.name} {self.kind}"
        for value_of_label, value in self.samples.items():
            labels = f'model_name="{_escaped(model)}"'
            if value_of_label is not None:
                labels += f',{self.label}="{_escaped(value_of_label)}"'
            yield f"{PREFIX}{self.name}{{{labels}}} {value:.12g}"


def families(stats: EngineStats) -> list[Family]:
    """All that is reported of an engine."""
    spoken = stats.speculation
    used = stats.num_blocks - stats.free_blocks
    ended: dict[str | None, float] = {
        "stop": stats.finished - stats.cut,
        "length": stats.cut,
        "abort": stats.aborted,
        "error": stats.failed,
    }
    return [
        _gauge("num_requests_running", "requests that are computed", stats.running),
        _gauge("num_requests_waiting", "requests that wait for room", stats.waiting),
        _gauge("kv_cache_usage_perc", "share of the KV blocks in use, 0 to 1", used / max(1, stats.num_blocks)),
        _gauge("backlog_tokens", "tokens to compute before every request decodes", stats.backlog_tokens),
        _counter("prompt_tokens_total", "tokens of prompts that were computed", stats.prompt_tokens),
        _counter("generation_tokens_total", "tokens generated", stats.generation_tokens),
        Family("request_success_total", "counter", "requests ended, by reason", ended, "finished_reason"),
        _counter("prefix_cache_queries_total", "tokens looked up in the prefix cache", stats.prefix_queries),
        _counter("prefix_cache_hits_total", "tokens found in the prefix cache", stats.prefix_hits),
        _counter("num_preemptions_total", "requests that gave their KV blocks back", stats.preemptions),
        _counter("steps_total", "steps of the engine", stats.steps),
        _counter("taped_steps_total", "steps replayed from a tape", stats.taped_steps),
        Family("untaped_steps_total", "counter", "steps run op by op, by reason", dict(stats.untaped_steps), "reason"),
        Family(
            "untaped_draws_total",
            "counter",
            "tokens of replayed steps that were chosen beside the tape, by reason",
            dict(stats.beside_tape),
            "reason",
        ),
        _counter("spec_decode_num_drafts_total", "sequences of drafted tokens that were verified", spoken.drafts),
        _counter("spec_decode_num_draft_tokens_total", "drafted tokens", spoken.drafted),
        _counter("spec_decode_num_accepted_tokens_total", "drafted tokens that stood", spoken.accepted),
        _counter("spec_decode_num_emitted_tokens_total", "tokens that verifying steps brought", spoken.emitted),
        Family(
            "spec_decode_num_accepted_tokens_per_pos_total",
            "counter",
            "drafted tokens that stood, by their place in the draft",
            {str(place): count for place, count in enumerate(spoken.accepted_at)},
            "position",
        ),
        _counter("spec_decode_draft_seconds_total", "seconds that a draft model took", spoken.drafting_s),
    ]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters and gauges in the text format of Prometheus."""
        found = families(service.engine.stats())
        lines = [line for family in found for line in family.lines(service.model_name)]
        return Response("\n".join(lines) + "\n", headers={"Content-Type": CONTENT_TYPE})

    return routes


def _gauge(name: str, help: str, value: float) -> Family:
    return Family(name, "gauge", help, {None: value})


def _counter(name: str, help: str, value: float) -> Family:
    return Family(name, "counter", help, {None: value})


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
