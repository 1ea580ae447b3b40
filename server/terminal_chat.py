"""A conversation in the terminal over the offline engine."""

from __future__ import annotations

import sys

from dibit.engine import LLM, SamplingParams
from dibit.engine.errors import RequestError


def run_chat(llm: LLM, params: SamplingParams, *, system: str | None = None) -> None:
    """Reads turns from stdin until end of input or /exit; prints answers as they are generated."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            messages = list(opening)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(llm, messages, params)
        except RequestError as error:
            print(f"{error} (/reset starts over)", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Prints the answer as it comes and returns it; Ctrl-C cuts it short and keeps what was said."""
    said: list[str] = []
    try:
        for output in llm.stream(llm.tokenizer.apply_chat_template(messages), params):
            said.append(output.text)
            print(output.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(said)
