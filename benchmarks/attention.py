"""What a decode step's attention costs on a CPU: the measurement behind stage/attention/torch_paged.py.

    python benchmarks/attention.py --json

SmolLM2-135M's shapes (30 layers, 3 KV heads of 3 query heads, head size 64, float32), a context of 96 tokens in
6 blocks a row. Milliseconds for the layers of a step, best of a few runs that take turns:

- fused: gather, then torch's scaled_dot_product_attention;
- products: gather, then two batched products and a softmax, what stagemesh does;
- in place: the fused operator over a strided view of the cache, which needs evenly spaced blocks;
- gather: alone, into memory that stays, of consecutive and of scattered blocks;
- gather, new memory: the same into a buffer made at each layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import Report

LAYERS, KV_HEADS, GROUP, DIM = 30, 3, 3, 64
BLOCK, BLOCKS, WIDTH = 16, 1400, 6
LENGTH = BLOCK * WIDTH

Layer = Callable[[int], object]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("attention", options.json)
    with torch.inference_mode():
        for name, milliseconds in measure(make_layers(options.rows), options.rounds).items():
            report.add(f"{name}, {options.rows} rows", milliseconds, "ms", reference=f"{LAYERS} layers")
    report.finish()


def make_layers(rows: int) -> dict[str, Layer]:
    """What to time, by name; each takes the number of a layer."""
    cache = torch.randn(LAYERS, 2 * KV_HEADS * BLOCKS, BLOCK * DIM)
    heads = torch.arange(2 * KV_HEADS).unsqueeze(1) * BLOCKS
    consecutive = (heads + torch.arange(rows * WIDTH)).flatten()
    scattered = (heads + torch.randperm(BLOCKS)[: rows * WIDTH]).flatten()
    kept = torch.empty(len(consecutive), BLOCK * DIM)
    query = torch.randn(KV_HEADS * rows, GROUP, DIM)
    mask = torch.zeros(KV_HEADS * rows, GROUP, LENGTH)

    def gather(layer: int, pieces: torch.Tensor) -> torch.Tensor:
        torch.index_select(cache[layer], 0, pieces, out=kept)
        return kept.view(2, KV_HEADS * rows, LENGTH, DIM)

    def products(layer: int) -> torch.Tensor:
        keys, values = gather(layer, consecutive)
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=DIM**-0.5)
        return torch.bmm(scores.softmax(-1), values)

    def fused(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        shape = (KV_HEADS, rows, -1, DIM)
        return F.scaled_dot_product_attention(
            query.view(shape),
            keys.view(shape),
            values.view(shape),
            attn_mask=mask.view(*shape[:2], GROUP, LENGTH),
        )

    def in_place(layer: int) -> torch.Tensor:
        whole = cache[layer].view(2, KV_HEADS, -1, DIM)[:, :, : rows * LENGTH]
        keys, values = whole.unflatten(2, (rows, LENGTH))
        return fused(keys, values)

    return {
        "fused": lambda layer: fused(*gather(layer, consecutive)),
        "products": products,
        "in place": in_place,
        "gather, consecutive": lambda layer: gather(layer, consecutive),
        "gather, scattered": lambda layer: gather(layer, scattered),
        "gather, new memory": lambda layer: cache[layer].index_select(0, consecutive),
    }


def measure(layers: dict[str, Layer], rounds: int) -> dict[str, float]:
    """Best milliseconds of each over all layers."""
    best = dict.fromkeys(layers, float("inf"))
    for number in range(rounds + 1):
        for name, run in layers.items():
            began = time.perf_counter()
            for layer in range(LAYERS):
                run(layer)
            if number:  # the first round warms up
                best[name] = min(best[name], (time.perf_counter() - began) * 1e3)
    return best


if __name__ == "__main__":
    main()
