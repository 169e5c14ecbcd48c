"""Adapters as dense products: what vLLM's own loops compute, with one, two and none, eager and compiled."""

import pytest
import torch

from spinfast.generation import vllm_compat

pytest.importorskip("vllm")
WIDTHS = (14, 6)  # of the layer's slices
TOKENS = (7, 0, 7, 7, 0)  # whose adapter each has; 0 is none
MIXED = (9, 0, 7, 9, 7)
SLOTS = {TOKENS: (7,), MIXED: (7, 9)}  # whose stands in each


class Reference:
    """y += scale (x A') B' in float64, a token at a time."""

    def __init__(self, ids):
        self.slots = [SLOTS.get(ids, (7,)).index(adapter) if adapter else None for adapter in ids]

    def shrink(self, x, a):
        own = [a[slot or 0, 0].double() @ row.double() for row, slot in zip(x, self.slots, strict=True)]
        return torch.stack(own)

    def expand(self, y, x, b, scale=1.0):
        y = y.double()
        for token, slot in enumerate(self.slots):
            if slot is not None:
                width = min(y.shape[1], b.shape[2])
                y[token, :width] += scale * (b[slot, 0, :width].double() @ x[token].double())
        return y

    def linear(self, y, x, a, b, scale=1.0):
        parts = zip(y.split(WIDTHS, dim=1), a, b, strict=True)
        return torch.cat([self.expand(part, self.shrink(x, A), B, scale) for part, A, B in parts], dim=1)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    """vLLM for CUDA pins what it copies to the card, where there is none too."""
    if torch.cuda.is_available():
        yield
        return
    from vllm.platforms import current_platform
    from vllm.utils.platform_utils import is_pin_memory_available

    monkeypatch.setattr(type(current_platform), "is_pin_memory_available", classmethod(lambda cls: False))
    is_pin_memory_available.cache_clear()
    yield
    is_pin_memory_available.cache_clear()


@pytest.fixture
def numbers():
    draw = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=draw)

    return make


def wrapper(ids, on_gpu: bool):
    made = vllm_compat.dense_adapters(16, 4, torch.device("cpu"))
    told(made, ids, on_gpu)
    return made


def told(made, ids, on_gpu: bool):
    """What vLLM does before a forward. A GPU's wrapper decides nothing on the host."""
    from vllm.lora.layers import LoRAMapping

    slots = SLOTS.get(ids, (7,))
    made.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(slots), len(slots), 66)
    if on_gpu:
        made.no_lora = False


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("ids", [(7,) * 5, (0,) * 5, TOKENS, MIXED], ids=["all", "none", "some", "two"])
@pytest.mark.parametrize("vocabulary", [70, 64])  # the adapter's part of it: padded, or the padding left out
def test_every_layer_adds_what_its_tokens_have(numbers, ids, on_gpu, vocabulary):
    made, exact = wrapper(ids, on_gpu), Reference(ids)
    x, y, embedded, logits = numbers(5, 12), numbers(5, 20), numbers(5, 4), numbers(5, 66)
    slots = len(SLOTS.get(ids, (7,)))
    a = [numbers(slots, 1, 4, 12) for _ in range(3)]
    b = [numbers(slots, 1, width, 4) for width in (*WIDTHS, vocabulary)]
    found = y.clone()
    made.add_lora_linear(found, x, tuple(a[:2]), tuple(b[:2]), 0.5, WIDTHS)
    torch.testing.assert_close(found.double(), exact.linear(y, x, a[:2], b[:2], 0.5), rtol=1e-5, atol=1e-5)
    found = logits.clone()
    made.add_lora_logits(found, x, a[2], b[2], 0.5)
    wanted = exact.expand(logits, exact.shrink(x, a[2]), b[2], 0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found = y[:, :14].clone()
    made.add_lora_embedding(found, embedded, b[0])
    torch.testing.assert_close(found.double(), exact.expand(y[:, :14], embedded, b[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ids", SLOTS, ids=["one", "two"])
def test_in_two_parts(numbers, ids):
    made, exact, slots = wrapper(ids, True), Reference(ids), len(SLOTS[ids])
    x, y, a = numbers(5, 12), numbers(5, 23), [numbers(slots, 1, 4, 12) for _ in WIDTHS]
    b = [numbers(slots, 1, width, 4) for width in WIDTHS]
    shrunk, found = torch.zeros(2, 5, 4), y.clone()
    made.add_shrink(shrunk, x, tuple(a), 0.5)
    made.add_expand(found, shrunk, tuple(b), WIDTHS, offset_start=3)
    torch.testing.assert_close(found[:, 3:].double(), exact.linear(y[:, 3:], x, a, b, 0.5), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, :3], y[:, :3])
    found.fill_(9.0)
    made.add_expand(found, shrunk, tuple(b), WIDTHS, offset_start=3, add_inputs=False)
    alone = exact.linear(torch.zeros(5, 20), x, a, b, 0.5)
    torch.testing.assert_close(found[:, 3:].double(), alone, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_overflows_leaves_other_tokens_alone(numbers):
    made, x, y = wrapper((0,) * 5, True), numbers(5, 12), numbers(5, 20)
    a = tuple(torch.full((1, 1, 4, 12), torch.inf) for _ in WIDTHS)
    found = y.clone()
    made.add_lora_linear(found, x, a, tuple(numbers(1, 1, width, 4) for width in WIDTHS), 1.0, WIDTHS)
    assert torch.equal(found, y)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_once_for_all(numbers, backend):
    """As vLLM compiles: one graph, any number of tokens, the adapter on or off without another compilation."""
    made = wrapper(TOKENS, True)
    a, b = (tuple(numbers(1, 1, *shape) for shape in shapes) for shapes in ([(4, 12)] * 2, [(14, 4), (6, 4)]))

    def layer(x, weight):
        y = x @ weight
        made.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
        return y

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    weight = numbers(12, 20)
    for ids in (TOKENS, (7,) * 8, (0,) * 3, (7, 0, 0)):
        told(made, ids, True)
        x = numbers(len(ids), 12)
        exact = Reference(ids).linear(x @ weight, x, a, b)
        torch.testing.assert_close(compiled(x, weight).double(), exact, rtol=1e-5, atol=1e-5)
    assert graphs["unique_graphs"] == before + 1
