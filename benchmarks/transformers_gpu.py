"""transformers' own generation on a GPU, random weights, for scale: one JSON line in the yardstick's terms.

python benchmarks/transformers_gpu.py benchmarks/shapes/llama-3.1-8b --batch 64
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WARM_STEPS = 4


def main() -> None:
    """Time `generate` at two lengths; their difference is so many decode steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", help="folder with a config.json")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.model)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    began = time.perf_counter()
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    prompt = torch.randint(10, config.vocab_size - 10, (options.batch, options.prompt_len))
    inputs = {
        "input_ids": prompt.to(options.device),
        "attention_mask": torch.ones_like(prompt).to(options.device),
    }
    start_s = time.perf_counter() - began

    def seconds(num_tokens: int) -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model.generate(
            **inputs, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0
        )
        if options.device == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == options.prompt_len + num_tokens, out.shape
        return time.perf_counter() - begin

    seconds(WARM_STEPS)
    short, long = (min(seconds(count) for _ in range(2)) for count in (2, 2 + options.steps))
    step_s = (long - short) / options.steps
    facts = {
        "measure": "decode",
        "batch": options.batch,
        "prompt_len": options.prompt_len,
        "itl_ms_steady": round(step_s * 1e3, 4),
        "out_tok_s_steady": round(options.batch / step_s, 1),
        "start_s": round(start_s, 1),
        "torch": torch.__version__,
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
