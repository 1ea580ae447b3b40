"""Streams to the byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from starlette.types import Message

from dibit.engine.errors import CapacityError, EngineFault
from dibit.server.sse import KEEP_ALIVE, ClientGoneError, EventStream, event, until_disconnect
from fakes import EOS, FakeRunner
from server_harness import CHAT, COMPLETIONS, MODEL, Live, events, serving


def test_a_chat_stream_to_the_byte() -> None:
    with serving(FakeRunner(num_blocks=64, max_model_len=128, reply=[*"Hé".encode(), EOS])) as live:
        response = live.chat(stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert "content-length" not in response.headers
        first = json.loads(response.text.split("\n")[0].removeprefix("data: "))
        head = (
            f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk",'
            f'"created":{first["created"]},"model":"{MODEL}","choices":['
        )
        expected = "".join(
            head + chunk + "\n\n"
            for chunk in (
                '{"index":0,"delta":{"role":"assistant","content":"H"},"logprobs":null,"finish_reason":null}],"usage":null}',
                '{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":null}],"usage":null}',
                '{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}],"usage":null}',
                '{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
                '],"usage":{"prompt_tokens":21,"completion_tokens":4,"total_tokens":25,'
                '"prompt_tokens_details":{"cached_tokens":0}}}',
            )
        )
        assert response.content == (expected + "data: [DONE]\n\n").encode()


def test_a_completion_stream_to_the_byte() -> None:
    with serving(FakeRunner(num_blocks=64, max_model_len=128, reply=b"ok")) as live:
        response = live.complete("x", stream=True, max_tokens=2)
        first = json.loads(response.text.split("\n")[0].removeprefix("data: "))
        head = (
            f'data: {{"id":"{first["id"]}","object":"text_completion",'
            f'"created":{first["created"]},"model":"{MODEL}","choices":['
        )
        assert response.text == (
            head + '{"index":0,"text":"o","logprobs":null,"finish_reason":null}]}\n\n'
            + head + '{"index":0,"text":"k","logprobs":null,"finish_reason":"length"}]}\n\n'
            + "data: [DONE]\n\n"
        )  # fmt: skip


def test_comments_while_queued() -> None:
    runner = FakeRunner(num_blocks=256, max_model_len=200, step_delay_s=0.01)
    with serving(runner, engine={"max_num_seqs": 1}, keep_alive_s=0.05) as live:
        long = {"model": MODEL, "prompt": "x", "max_tokens": 40, "stream": True}
        with live.http.stream("POST", COMPLETIONS, json=long):
            text = live.complete("y", stream=True, max_tokens=2).text
        assert text.startswith(KEEP_ALIVE.decode() * 2)
        assert len(events(text)) == 3
        stream = live.openai().completions.create(model=MODEL, prompt="y", stream=True, max_tokens=2)
        assert len(list(stream)) == 2, "clients skip comments"


def test_a_fault_after_the_start_is_one_event_and_the_end() -> None:
    runner = FakeRunner(num_blocks=256, max_model_len=200)

    def fail(step: Any) -> None:
        if step.chunks[0].request.num_output >= 3:
            raise RuntimeError("bad luck")

    runner.on_execute = fail
    with serving(runner) as live:
        for more in ({}, {"n": 2}):
            found = events(live.chat(stream=True, **more).text)
            assert all("choices" in chunk for chunk in found[:-1])
            assert len(found) > 3
            assert set(found[-1]) == {"error"}
            assert found[-1]["error"]["code"] == "engine_fault"
            assert "bad luck" in found[-1]["error"]["message"]
        with pytest.raises(openai.APIError, match="bad luck"):
            list(
                live.openai().chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
                )
            )
        assert live.busy() == 0


async def _forever() -> Message:
    await asyncio.sleep(3600)
    raise AssertionError


async def _run(stream: AsyncGenerator[bytes, None], *, keep_alive_s: float = 60.0) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await EventStream(stream, keep_alive_s=keep_alive_s)({"type": "http"}, _forever, send)
    return sent


def test_a_failure_before_the_first_event_is_no_stream() -> None:
    async def refused() -> AsyncGenerator[bytes, None]:
        raise CapacityError("full", retry_after_s=1)
        yield b""

    with pytest.raises(CapacityError):
        asyncio.run(_run(refused()))


def test_a_failure_after_a_comment_is_an_event() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.06)
        raise EngineFault("late")
        yield b""

    start, *rest = asyncio.run(_run(slow(), keep_alive_s=0.02))
    assert start["status"] == 200
    bodies = [message["body"] for message in rest]
    assert bodies[0] == KEEP_ALIVE
    assert json.loads(bodies[-2].removeprefix(b"data: "))["error"]["message"] == "late"
    assert rest[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_comments_fill_silence_only() -> None:
    async def steady() -> AsyncGenerator[bytes, None]:
        for i in range(30):
            await asyncio.sleep(0.005)
            yield event({"i": i})

    sent = asyncio.run(_run(steady(), keep_alive_s=0.1))
    assert KEEP_ALIVE not in [message.get("body") for message in sent]


@pytest.mark.parametrize("pause_s", [0.0, 3600.0])
def test_when_the_client_goes_the_generator_is_closed(pause_s: float) -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                await asyncio.sleep(pause_s)
                yield b"data: 1\n\n"
        finally:
            closed.append(True)

    async def gone() -> Message:
        await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        await EventStream(endless(), keep_alive_s=60)({"type": "http"}, gone, send)
        assert closed == [True]

    asyncio.run(main())


def test_work_ends_with_its_client_and_not_before() -> None:
    async def main() -> None:
        async def answer() -> int:
            await asyncio.sleep(0.01)
            return 5

        assert await until_disconnect(_forever, answer()) == 5

        async def gone() -> Message:
            return {"type": "http.disconnect"}

        async def never() -> None:
            await asyncio.sleep(3600)

        with pytest.raises(ClientGoneError):
            await until_disconnect(gone, never())

        async def wrong() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await until_disconnect(_forever, wrong())

    asyncio.run(main())


def test_a_slow_reader_gets_everything(live_slow: Live) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 180,
        "stream": True,
        "n": 2,
        "seed": 1,
    }
    with live_slow.http.stream("POST", CHAT, json=body) as response:
        text = "".join(response.iter_text(chunk_size=7))
    whole = live_slow.http.post(CHAT, json={**body, "stream": False}).json()
    texts = ["", ""]
    for chunk in events(text)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


@pytest.fixture
def live_slow() -> Any:
    with serving() as live:
        yield live
