"""What the device can do, and what a SPIN step asks of it: GEMM rates at the model's own shapes, stream bandwidth,
FLOPs and bytes of an iteration.

    limit_s = max(FLOPs / best GEMM rate, bytes / bandwidth)

FLOPs per token and weight: 2 to score, 4 to train (no weight gradient for a frozen base), the head on answer tokens
only, rank-r products and attention included. Bytes: the weights once per pass of a microbatch, and what a layer's
backward must keep (its input, q, k, v, attention's output, gate, up), written and read. A reachable limit, lower
than this one's, is the floor "bare GEMMs" of `python -m bench peers` (`play`): the base's products of the whole
iteration, each once, with real weights, activations in reused buffers, and nothing in between.

    python -m bench roofline [--model MODEL] [--tokens 1536]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench import rows, shapes
from bench.peers.spinfast_loop import budget_of, steps_of
from bench.peers.watch import Watch, now
from bench.peers.work import Work
from spinfast.scoring import batches
from spinfast.types import PackedBatch

RANK, VOCAB_BLOCK = 16, 4096


def projections(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """name -> (inputs, outputs) of a layer's seven linear weights."""
    D, F = config.hidden_size, config.intermediate_size
    d = getattr(config, "head_dim", None) or D // config.num_attention_heads
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    return {
        "q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D),
        "gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D),
    }  # fmt: skip


def work_of(config: PretrainedConfig, batches: list[PackedBatch], itemsize: int) -> dict[str, dict[str, float]]:
    """{"score": {"flop", "bytes"}, "train": ...} for these microbatches."""
    shapes = projections(config).values()
    layers, V, D = config.num_hidden_layers, config.vocab_size, config.hidden_size
    weights = layers * sum(i * o for i, o in shapes)
    low_rank = layers * sum(RANK * (i + o) for i, o in shapes)
    q = projections(config)["o_proj"][0]
    kept = layers * (sum(o for _, o in shapes) + q)  # both inputs, q, k, v, attention's output, gate, up
    tokens, scored = sum(b.tokens for b in batches), sum(len(b.targets_N) for b in batches)
    seen = sum(q * kv - q * (q - 1) // 2 for b in batches for q, kv in b.layout.segments)
    attention = 4 * layers * q * seen  # two products forward, five backward
    head, passes = 2 * scored * V * D, len(batches) * (weights + V * D) * itemsize
    return {
        "score": {"flop": 2 * tokens * (weights + low_rank) + attention + head, "bytes": passes},
        "train": {
            "flop": 4 * tokens * weights + 6 * tokens * low_rank + 3.5 * attention + 2 * head,
            "bytes": 2 * passes + 2 * tokens * kept * itemsize,
        },
    }


def gemm_gflops(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Rate of y = x W^T for each of the model's shapes and the head (a block of its vocabulary), median of many."""
    shapes = projections(config) | {"head": (config.hidden_size, min(config.vocab_size, VOCAB_BLOCK))}
    rates = {}
    for name, (i, o) in shapes.items():
        x, w = (torch.randn(n, i, dtype=dtype, device=device) for n in (tokens, o))
        y = torch.empty(tokens, o, dtype=dtype, device=device)
        rates[name] = 2e-9 * tokens * i * o / seconds(lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y), device)
    return rates


def bandwidth_gbs(device: str, mib: int = 512) -> float:
    """Bytes read plus written per second by a copy too large for any cache."""
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2e-9 * mib * 2**20 / seconds(lambda: target.copy_(source), device)


def seconds(call, device: str, least: float = 0.15) -> float:
    """Median time of a call, after a warm-up, over at least five calls and `least` seconds."""
    samples: list[float] = []
    call()
    end = now(device) + least
    while len(samples) < 5 or now(device) < end:
        start = now(device)
        call()
        samples.append(now(device) - start)
    return statistics.median(samples)


# The floor of `python -m bench peers` ------------------------------------------------------------------------------


def play(work: Work, watch: Watch) -> dict:
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.torch_dtype).to(work.device)
    watch.loaded(model)
    names = projections(model.config)
    weights = [m.weight for n, m in model.get_decoder().named_modules() if n.rsplit(".", 1)[-1] in names]
    blocks = model.get_output_embeddings().weight.split(VOCAB_BLOCK)
    budget = budget_of(work)
    packed = [batch for groups in steps_of(work) for batch in batches(groups, budget)]
    buffer = Buffers(work)
    phases = ("train",) if work.method in ("sft", "grpo") else ("score", "train")
    for phase in phases:
        with watch.phase(phase), torch.no_grad():
            for batch in packed:
                products(weights, batch.tokens, buffer, backward=phase == "train")
                products(blocks, len(batch.targets_N), buffer, backward=phase == "train")
    return {
        "work": {p: w for p, w in work_of(model.config, packed, work.torch_dtype.itemsize).items() if p in phases},
        "gemm_gflops": gemm_gflops(model.config, packed[0].tokens, work.torch_dtype, work.device),
        "copy_gb_per_s": bandwidth_gbs(work.device),
    }


class Buffers(dict):
    """(rows, columns) -> a matrix."""

    def __init__(self, work: Work):
        super().__init__()
        self.options = {"dtype": work.torch_dtype, "device": work.device}

    def __missing__(self, shape: tuple[int, int]) -> torch.Tensor:
        self[shape] = torch.full(shape, 0.01, **self.options)
        return self[shape]


def products(weights, rows: int, buffer: Buffers, backward: bool) -> None:
    """y = x W^T, and dx = dy W, for each weight."""
    for weight in weights:
        outputs, inputs = weight.shape
        torch.mm(buffer[rows, inputs], weight.t(), out=buffer[rows, outputs])
        if backward:
            torch.mm(buffer[rows, outputs], weight, out=buffer[rows, inputs])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench roofline")
    parser.add_argument("--model", default="random:SmolLM2-135M", help="a model, or random:NAME for a shape alone")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1536])
    arguments = parser.parse_args(argv)
    device = shapes.device()
    config, kind = shapes.config_of(arguments.model), device.device.type
    bandwidth = bandwidth_gbs(kind)
    for tokens in arguments.tokens:
        rates = gemm_gflops(config, tokens, device.dtype, kind)
        row = {
            "model": arguments.model, "dtype": str(device.dtype).removeprefix("torch."), "tokens": tokens,
            "gemm_gflops": {n: round(r, 1) for n, r in rates.items()},
            "best_gflops": round(max(rates.values()), 1), "copy_gb_per_s": round(bandwidth, 2),
        }  # fmt: skip
        rows.write("roofline", row, kind)
    return 0
