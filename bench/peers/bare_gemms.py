"""Not a peer but the floor: the base's products of the whole iteration, each once, and nothing in between.

Real weights, activations in reused buffers. Low-rank products, attention, norms, loss and optimizer are left out, so
no implementation reaches it.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from bench.peers.spinfast_loop import budget_of, steps_of
from bench.peers.watch import Watch
from bench.peers.work import Work
from bench.roofline import bandwidth_gbs, gemm_gflops, projections, work_of
from spinfast.train import batches

VOCAB_BLOCK = 4096


def play(work: Work, watch: Watch) -> dict:
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.torch_dtype).to(work.device)
    watch.loaded(model)
    names = projections(model.config)
    weights = [m.weight for n, m in model.get_decoder().named_modules() if n.rsplit(".", 1)[-1] in names]
    blocks = model.get_output_embeddings().weight.split(VOCAB_BLOCK)
    budget = budget_of(work)
    packed = [batch for groups in steps_of(work) for batch in batches(groups, budget)]
    sizes = [(batch.tokens, len(batch.targets_N)) for batch in packed]
    buffer = Buffers(work)
    with torch.no_grad():
        with watch.phase("score"):
            for tokens, scored in sizes:
                products(weights, tokens, buffer, backward=False)
                products(blocks, scored, buffer, backward=False)
        with watch.phase("train"):
            for tokens, scored in sizes:
                products(weights, tokens, buffer, backward=True)
                products(blocks, scored, buffer, backward=True)
    rates = gemm_gflops(model.config, sizes[0][0], work.torch_dtype, work.device)
    return {
        "work": work_of(model.config, packed, work.torch_dtype.itemsize),
        "gemm_gflops": rates,
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
