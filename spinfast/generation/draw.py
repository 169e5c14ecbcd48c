"""Drawing tokens: inverse CDF in fp32 with one uniform per (request, step).

The uniforms are SplitMix64 (Steele, Lea, Flood 2014) of the request's seed as a counter-based stream, so that a draw
does not depend on the batch. Shape suffixes: S answers, V vocabulary, K entries, B blocks, b entries of a block.
"""

from __future__ import annotations

import math

import torch

BLOCK = 256  # vocabulary entries summed first when a token is drawn
NUCLEUS = 256  # candidates looked at first when top_p < 1; rows that need more are looked at again


def uniform(seed_S: torch.Tensor, step_S: torch.Tensor) -> torch.Tensor:
    """Output number `step` of the SplitMix64 stream that starts at `seed`, as a double in [0, 1) of 48 bits."""

    def shifted(z, bits):  # a logical shift of signed integers
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = seed_S + (step_S + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return shifted(z ^ shifted(z, 31), 16).double() * 2.0**-48


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def sample(logits_SV: torch.Tensor, uniform_S: torch.Tensor, temperature: float, top_p: float):
    """(token ids, log-probs they are drawn by), both (S,): the inverse CDF; greedy at temperature 0, scored at 1."""
    probs_SV = torch.softmax(logits_SV if temperature in (0, 1) else logits_SV / temperature, dim=-1)
    if temperature == 0:
        token_S1 = logits_SV.argmax(-1, keepdim=True)
        return token_S1[:, 0], probs_SV.gather(1, token_S1)[:, 0].log()
    if top_p < 1:
        probs_SV = probs_SV.where(probs_SV >= _nucleus_floor(probs_SV, top_p), 0.0)
        probs_SV = probs_SV / probs_SV.sum(-1, keepdim=True)
    token_S1 = _inverse_cdf(probs_SV, uniform_S[:, None])
    return token_S1[:, 0], probs_SV.gather(1, token_S1)[:, 0].log()


def _inverse_cdf(weights_SV: torch.Tensor, uniform_S1: torch.Tensor) -> torch.Tensor:
    """The token (S, 1) under which `uniform` falls. Two levels, blocks then tokens, spare a scan of the vocabulary."""
    block = math.gcd(weights_SV.shape[1], BLOCK)
    blocks_SBb = weights_SV.unflatten(1, (-1, block))
    block_S1, rest_S1 = _search(blocks_SBb.sum(-1), uniform_S1)
    within_S1, _ = _search(blocks_SBb.take_along_dim(block_S1[:, :, None], 1)[:, 0], rest_S1)
    return block_S1 * block + within_S1


def _search(weights_SK: torch.Tensor, uniform_S1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry (S, 1) under which `uniform` of the total falls, never one of weight 0, and how far into it."""
    cdf_SK = weights_SK.cumsum(-1, dtype=torch.float64)
    target_S1 = (uniform_S1 * cdf_SK[:, -1:]).minimum(cdf_SK[:, -1:].nextafter(torch.zeros_like(uniform_S1)))
    found_S1 = torch.searchsorted(cdf_SK, target_S1, right=True).clamp(max=cdf_SK.shape[1] - 1)  # NaN ends beyond
    weight_S1 = weights_SK.gather(1, found_S1)
    return found_S1, (target_S1 - cdf_SK.gather(1, found_S1) + weight_S1) / weight_S1


def _nucleus_floor(probs_SV: torch.Tensor, top_p: float, candidates: int = NUCLEUS) -> torch.Tensor:
    """The smallest probability (S, 1) in the nucleus: fewest likeliest tokens of mass >= top_p, ties included."""
    candidates = min(candidates, probs_SV.shape[1])
    top_SK = probs_SV.topk(candidates).values
    mass_SK = top_SK.cumsum(-1, dtype=torch.float64)
    floor_S1 = top_SK.gather(1, (mass_SK < top_p).sum(-1, keepdim=True).clamp(max=candidates - 1))
    short_S = mass_SK[:, -1] < top_p
    if candidates < probs_SV.shape[1] and short_S.any():
        floor_S1[short_S] = _nucleus_floor(probs_SV[short_S], top_p, 8 * candidates)
    return floor_S1
