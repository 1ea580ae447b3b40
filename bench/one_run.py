"""One request in a process of its own: how long from its start to the first token, and how much memory at most.

`python -m dibit.bench.one_run MODEL --prompt-len 512 --gen-len 64` prints a JSON object. The process is the measure:
the interpreter's start, the imports and the load are in the time, everything that was ever held in the peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from dataclasses import dataclass

import psutil

from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.runner import ModelRunner


@dataclass(frozen=True)
class OneRun:
    """Times in seconds, since the process started; sizes in bytes.

    weight_bytes  of the packed weights
    kv_bytes      of the KV cache
    """

    loaded_s: float
    first_token_s: float
    finished_s: float
    weight_bytes: int
    kv_bytes: int
    tokens: int


def one_run(model: str, config: EngineConfig, *, prompt_len: int, gen_len: int) -> OneRun:
    """`gen_len` greedy tokens after a random prompt."""
    core = build_core(model, config)
    assert isinstance(core.runner, ModelRunner)
    loaded_s = _age_s()
    draw = random.Random(0)
    prompt = [draw.randrange(core.tokenizer.vocab_size) for _ in range(prompt_len)]
    core.add_request("one", prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=gen_len))
    tokens, first_token_s = 0, 0.0
    while core.has_work:
        for output in core.step():
            if output.token_ids and not tokens:
                first_token_s = _age_s()
            tokens += len(output.token_ids)
    return OneRun(
        loaded_s=loaded_s,
        first_token_s=first_token_s,
        finished_s=_age_s(),
        weight_bytes=core.runner.decoder.nbytes,
        kv_bytes=core.runner.cache.nbytes,
        tokens=tokens,
    )


def _age_s() -> float:
    return time.time() - psutil.Process().create_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--head-bits", type=int, choices=(4, 8, 16), default=8)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    config = EngineConfig(
        device="cpu",
        max_model_len=asked.prompt_len + asked.gen_len,
        max_num_seqs=1,
        head_bits=asked.head_bits,
        threads=asked.threads,
    )
    found = one_run(asked.model, config, prompt_len=asked.prompt_len, gen_len=asked.gen_len)
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
