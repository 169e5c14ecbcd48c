"""The checksum of the frozen base: any bit, any exchange, any place in memory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinfast.policy import checksum as module
from spinfast.policy.checksum import checksum


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    data=st.data(),
)
def test_checksum_sees_any_bit_and_any_exchange(shape, dtype, data):
    tensor = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum({"w": tensor})
    assert checksum({"w": tensor.clone()}) == before
    bits = tensor.view(-1).view(torch.uint8)
    byte, bit = data.draw(st.integers(0, bits.numel() - 1)), data.draw(st.integers(0, 7))
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    assert checksum({"w": flipped}) != before
    turned = tensor.flatten().roll(1).view(shape)
    assert (checksum({"w": turned}) == before) == torch.equal(turned, tensor)
    assert checksum({"v": tensor}) != before


def test_checksum_does_not_depend_on_strides_and_sees_late_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    tensor = torch.arange(60.0).view(6, 10)
    assert checksum({"w": tensor.T}) == checksum({"w": tensor.T.contiguous()})
    assert checksum({"w": torch.cat([torch.ones(1), tensor.flatten()])[1:].view(6, 10)}) == checksum({"w": tensor})
    changed = tensor.clone()
    changed[5, 9] = -1
    assert checksum({"w": changed}) != checksum({"w": tensor})
