"""transformers as the judge: the same checkpoint, dequantized to float32, in somebody else's implementation.

    python -m dibit.bench.oracle MODEL --text FILE --ctx 2048 --max-windows 32 [--json FILE]

prints the perplexity that `dibit eval ppl` must reproduce (same windows, same protocol).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.tokenizer import load_tokenizer
from dibit.kernels.formats import QTensor, dequantize


def transformers_model(path: Path) -> Any:
    """A float32 transformers model in eval mode that holds the (dequantized) weights of the checkpoint at `path`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(path)
    settings = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "model_type")}
    config = AutoConfig.for_model(checkpoint.config["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.to_empty(device="cpu")
    state = {}
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        if checkpoint.has(name):
            state[name] = checkpoint.tensor(name).float()
        elif leaf == "weight" and module in checkpoint.packed():
            packed = checkpoint.linear(module)
            assert isinstance(packed, QTensor)
            state[name] = dequantize(packed)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if config.tie_word_embeddings:
        model.tie_weights()
        missing = [name for name in missing if name != "lm_head.weight"]
    assert not missing, f"the checkpoint lacks {missing}"
    # Buffers made on the meta device hold nothing: make the rotary tables anew.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    return model.eval()


@torch.inference_mode()
def transformers_perplexity(path: Path, text: Path, *, context: int, max_windows: int | None) -> tuple[float, int]:
    """Perplexity and number of windows, by the protocol of quantize/evaluate.py."""
    model = transformers_model(path)
    ids = load_tokenizer(open_checkpoint(path)).encode(text.read_text(encoding="utf-8"))
    windows = len(ids) // context
    if max_windows is not None:
        windows = min(windows, max_windows)
    losses = []
    for i in range(windows):
        window = torch.tensor([ids[i * context : (i + 1) * context]])
        logits = model(window).logits[0, :-1].float()
        losses.append(float(F.cross_entropy(logits, window[0, 1:])))
        print(f"window {i + 1}/{windows} ppl {math.exp(math.fsum(losses) / len(losses)):.3f}", file=sys.stderr)
    return math.exp(math.fsum(losses) / windows), windows


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a checkpoint's dequantized weights in transformers.")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ppl, windows = transformers_perplexity(
        resolve_model(args.model), args.text, context=args.ctx, max_windows=args.max_windows
    )
    result = {
        "model": args.model,
        "ppl": ppl,
        "windows": windows,
        "context": args.ctx,
        "runtime": "transformers float32",
    }
    print(f"ppl {ppl:.4f} over {windows} windows of {args.ctx}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
