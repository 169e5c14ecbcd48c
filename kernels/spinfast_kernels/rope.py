"""Rotary embedding in place: (a, b) -> (a cos - b sin, b cos + a sin) on the halves of every head.

cos and sin are rows of the packed position ids, shared by all heads and by q and k (grouped-query attention changes
only the number of heads). The inverse is the rotation by -sin, so the backward saves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rope_kernel(x_io, cos_in, sin_in, heads, d, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One program per token: all its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    half = d // 2
    cos = tl.load(cos_in + token * d + channel, mask=channel < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_in + token * d + channel, mask=channel < half, other=0.0).to(tl.float32)[None, :] * sign
    at = x_io + (token * heads + head[:, None]) * d + channel[None, :]
    inside = (head < heads)[:, None] & (channel < half)[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    dtype = x_io.dtype.element_ty
    tl.store(at, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(at + half, (b * cos + a * sin).to(dtype), mask=inside)


def rotate(x_THd, cos_Td, sin_Td, sign):
    """In place on contiguous x."""
    T, H, d = x_THd.shape
    if x_THd.numel():
        tile = {"HEADS": triton.next_power_of_2(H), "HALF": triton.next_power_of_2(d // 2)}
        _rope_kernel[(T,)](x_THd, cos_Td.contiguous(), sin_Td.contiguous(), H, d, sign, **tile)
