"""Operators, blocks and the whole step: time and memory against their floor and against eager.

    linear_logps      floor: its two bare GEMMs                       rivals: plain eager, torch.compile of it
    lora_qkv, _mlp    floor: the frozen projections' forward + dX     rival: the same as PEFT writes it
    element-wise      floor: bytes moved / measured copy bandwidth    rival: transformers' expressions
    layer             bytes kept for the backward, per token          rival: stock transformers + PEFT
    train step        tokens/s                                        rival: stock PEFT + log_softmax

The gate first: tests/kernels must be green, or nothing is measured. Contestants run in turn within each round, so
that a ratio compares neighbours in time; ratios are of p20. Rows carry the load average of a shared machine.
With a GPU the Triton table is measured beside the twins; "memory" counts the head's peak bytes at a T4's
shapes on tensors without data, anywhere.

    python -m bench kernels [--rounds 5] [--only head,blocks,elementwise,layer,step,memory] [--compile]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from spinfast_kernels import reference
from spinfast_kernels.blocks import Lora
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bench import rows
from spinfast import attention, ops
from spinfast.packing import pack
from spinfast.policy.fuse import fuse
from spinfast.types import Group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16
TABLES = {"eager twin": ops.EAGER} | ({"triton": ops.triton_ops()} if DEVICE == "cuda" else {})
QWEN = {"D": 896, "F": 4864, "kv": 128, "V": 151_936}  # Qwen2.5-0.5B
RANK, SCALING = 16, 2.0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="head,blocks,elementwise,layer,step,memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain head as well")
    arguments = parser.parse_args(argv)
    gate = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-k", "not every_kernel_fits"]
    if subprocess.run(gate, stdout=sys.stderr).returncode:
        raise SystemExit("bench kernels: tests/kernels is red; no number without a green gate")
    parts = {"head": head, "blocks": lora_blocks, "elementwise": elementwise, "layer": layer, "step": step}
    parts["memory"] = head_memory
    for name in arguments.only.split(","):
        for row in parts[name](arguments):
            rows.write("kernels", row | {"dtype": str(DTYPE), "load_average": os.getloadavg()[0]}, DEVICE)


def randn(*shape, grad=False, dtype=DTYPE, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def race(contestants: dict, rounds: int) -> dict[str, dict]:
    """{name: percentiles in ms} of functions run in turn, after one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for lap in range(rounds + 1):
        for name, function in contestants.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if lap:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: rows.percentiles(times, "ms") for name, times in samples.items()}


def _synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def against(floor: str, times: dict[str, dict], **facts):
    """A row per contestant, with its ratio to the floor."""
    for name, percentiles in times.items():
        ratio = percentiles["p20_ms"] / times[floor]["p20_ms"]
        yield facts | {"what": name, **percentiles, "floor": floor, "times_floor": round(ratio, 3)}


# The head --------------------------------------------------------------------------------------------------------


def plain_logps(hidden, weight, targets):
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def head(arguments):
    N, D, V = 1024, QWEN["D"], QWEN["V"]
    hidden, weight = randn(N, D, grad=True), randn(V, D, scale=D**-0.5)
    targets = torch.randint(V, (N,), device=DEVICE)
    logits = torch.empty(N, V, dtype=DTYPE, device=DEVICE)
    forms = {"plain eager": plain_logps} | {name: table.linear_logps for name, table in TABLES.items()}
    if arguments.compile:
        forms["torch.compile"] = torch.compile(plain_logps)

    def gemms():
        torch.mm(hidden.detach(), weight.t(), out=logits)
        torch.mm(logits, weight)

    def both(form):
        hidden.grad = None
        form(hidden, weight, targets).sum().backward()

    contestants = {"two bare GEMMs": gemms} | {name: lambda form=form: both(form) for name, form in forms.items()}
    facts = {"op": "linear_logps", "pass": "forward+backward", "N": N, "D": D, "V": V, "gemm_gflop": 4e-9 * N * D * V}
    yield from against("two bare GEMMs", race(contestants, arguments.rounds), **facts)
    contestants = {"one bare GEMM": lambda: torch.mm(hidden.detach(), weight.t(), out=logits)}
    contestants |= {name: lambda form=form: form(hidden.detach(), weight, targets) for name, form in forms.items()}
    facts |= {"pass": "forward, no grad", "gemm_gflop": 2e-9 * N * D * V}
    yield from against("one bare GEMM", race(contestants, arguments.rounds), **facts)


class Peak(TorchDispatchMode):
    """The most bytes of storages made within that ever lived at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def watch(self, *tensors):
        """Count these as given, not as made within."""
        for tensor in tensors:
            self.seen[tensor.untyped_storage()._cdata] = None

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.seen[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.live -= size
        del self.seen[key]


def head_memory(arguments):
    """Peak extra bytes at 8,192 tokens, forward + backward, on fake tensors; Triton's launches do nothing there."""
    N, D, V = 8192, QWEN["D"], QWEN["V"]
    from spinfast_kernels import linear_logps as triton_head
    from triton.runtime.jit import KernelInterface

    class Nothing(KernelInterface):
        def run(self, *args, **kwargs):
            return None

    quiet = {name: Nothing() for name in ("_row_kernel", "_unit_kernel")}
    forms = {"plain eager": plain_logps, "eager twin": reference.linear_logps, "triton": triton_head.linear_logps}
    for name, form in forms.items():
        with FakeTensorMode(), mock.patch.multiple(triton_head, **quiet), Peak() as peak:
            hidden = torch.empty(N, D, dtype=torch.float16, requires_grad=True)
            weight, targets = torch.empty(V, D, dtype=torch.float16), torch.empty(N, dtype=torch.int64)
            given = peak.live
            form(hidden, weight, targets).sum().backward()
        facts = {"op": "linear_logps", "pass": "forward+backward", "N": N, "D": D, "V": V, "simulated": "fp16"}
        yield facts | {"what": name, "peak_extra_mib": round((peak.peak - given) / 2**20, 1)}


# Blocks of a layer -------------------------------------------------------------------------------------------------


def lora(D, O, bias=False):
    a = randn(RANK, D, grad=True, dtype=torch.float32, scale=D**-0.5)
    b = randn(O, RANK, grad=True, dtype=torch.float32, scale=RANK**-0.5)
    return Lora(randn(O, D, scale=D**-0.5), randn(O) if bias else None, a, b, SCALING)


def peft_linear(x, p):
    """What PEFT computes: an fp32 low-rank branch from an upcast input."""
    y = F.linear(x, p.weight, p.bias)
    return (y + F.linear(F.linear(x.float(), p.lora_A), p.lora_B) * p.scaling).to(y.dtype)


def frozen_linear(x, p):
    return F.linear(x, p.weight, p.bias)


def lora_blocks(arguments):
    T, D, kv, features = 2048, QWEN["D"], QWEN["kv"], QWEN["F"]
    x = randn(T, D, grad=True)
    qkv = [lora(D, O, True) for O in (D, kv, kv)]
    gate, up, down = lora(D, features), lora(D, features), lora(features, D)

    def plain_qkv(linear):
        return sum(linear(x, p).sum() for p in qkv)

    def plain_mlp(linear):
        return linear(F.silu(linear(x, gate)) * linear(x, up), down).sum()

    def gemms(projections):
        """Forward and dX of the projections alone."""
        for p in projections:
            y = torch.mm(inputs[p.weight.shape[1]], p.weight.t())
            torch.mm(y, p.weight)

    inputs = {D: randn(T, D), features: randn(T, features)}
    cases = {
        "lora_linear": ([gate], lambda f: f(x, gate).sum(), lambda t: t.lora_linear(x, *gate).sum()),
        "lora_qkv": (qkv, plain_qkv, lambda t: sum(y.sum() for y in t.lora_qkv(x, *qkv))),
        "lora_mlp": ([gate, up, down], plain_mlp, lambda t: t.lora_mlp(x, gate, up, down).sum()),
    }
    for op, (projections, plain, fused) in cases.items():
        contestants = {
            "frozen forward + dX": lambda plain=plain: plain(frozen_linear).backward(),
            "bare GEMMs of both": lambda projections=projections: gemms(projections),
            "PEFT eager": lambda plain=plain: plain(peft_linear).backward(),
        }
        for name, table in TABLES.items():
            contestants[name] = lambda fused=fused, table=table: fused(table).backward()
        facts = {"op": op, "pass": "forward+backward", "T": T, "D": D, "F": features, "rank": RANK}
        yield from against("frozen forward + dX", race(contestants, arguments.rounds), **facts)


def elementwise(arguments):
    T, D, features = 2048, QWEN["D"], QWEN["F"]
    gate, up, x = randn(T, features, grad=True), randn(T, features, grad=True), randn(T, D, grad=True)
    weight, angle = randn(D), torch.randn(T, 64, device=DEVICE)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    big = randn(T, features)

    def plain_norm(x):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(DTYPE)

    def plain_rope(q):
        heads = q.view(T, -1, 64)
        a, b = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    def both(form, *leaves):
        out = form(*leaves)
        torch.autograd.backward(out, torch.ones_like(out))

    size = DTYPE.itemsize
    cases = {  # op: (bytes read and written forward + backward at the least, plain, fused)
        "rms_norm": (5 * T * D * size, lambda: both(plain_norm, x), lambda t: both(t.rms_norm, x, weight, 1e-6)),
        "swiglu": (
            8 * T * features * size,
            lambda: both(lambda g, u: F.silu(g) * u, gate, up),
            lambda t: both(t.swiglu, gate, up),
        ),
        "rope": (
            4 * T * D * size,
            lambda: both(lambda q: plain_rope(q * 1), x),
            lambda t: both(lambda q: t.rope(q * 1, q[:, :64] * 1, cos, sin)[0], x),
        ),
    }
    for op, (moved, plain, fused) in cases.items():
        contestants = {"copy": big.clone, "transformers eager": plain}
        contestants |= {name: lambda fused=fused, table=table: fused(table) for name, table in TABLES.items()}
        times = race(contestants, arguments.rounds)
        copy_rate = 2 * big.numel() * size / times.pop("copy")["p20_ms"]  # bytes per ms
        for name, percentiles in times.items():
            share = moved / copy_rate / percentiles["p20_ms"]
            facts = {"op": op, "pass": "forward+backward", "T": T, "D": D, "F": features, "what": name}
            yield facts | percentiles | {"bytes_moved": moved, "share_of_copy_roofline": round(share, 3)}


# A layer and a step ------------------------------------------------------------------------------------------------


def peft(config):
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=attention.NAME)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(base.requires_grad_(False), config).train()


def batch(groups, vocabulary):
    """Pairs as long as gsm8k's: 115 prompt tokens, answers of 140."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    made = [Group(ids(115), (ids(140), ids(140))) for _ in range(groups)]
    return pack(made, list(range(groups)), "aten_efficient" if DEVICE == "cuda" else "sdpa").to(DEVICE)


def layer(arguments):
    """Bytes that the backward of one Qwen2.5-0.5B layer keeps, per token: its parameters left out."""
    config = Qwen2Config(
        vocab_size=512, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    model, packed = peft(config), batch(4, 512)
    kept = {"PEFT eager": _kept_bytes(model, packed)}
    for name, table in TABLES.items():
        unfuse = fuse(model, table)
        kept[name] = _kept_bytes(model, packed)
        unfuse()
    for name, size in kept.items():
        facts = {"op": "decoder layer", "what": name, "T": packed.tokens, "model": "Qwen2.5-0.5B"}
        yield facts | {"bytes_kept_per_token": round(size), "of_peft_eager": round(size / kept["PEFT eager"], 3)}


def _kept_bytes(model, packed):
    decoder = model.get_base_model().get_decoder()
    second, kept = decoder.layers[1], {}
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    x = randn(1, packed.tokens, 896, grad=True)
    angles = decoder.rotary_emb(x, packed.position_ids_T[None])
    with saved_tensors_hooks(note, lambda t: t):
        second(x, position_embeddings=angles, layout=packed.layout).sum().backward()
    return sum(size for pointer, (size, _) in kept.items() if pointer not in own) / packed.tokens


def step(arguments):
    """Forward, loss and backward of SPIN on packed pairs, SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model, packed = peft(config), batch(6, 49_152)
    weight = model.get_base_model().get_output_embeddings().weight
    opponent = torch.zeros(packed.sequences, device=DEVICE)

    def train(logps, table):
        unfuse = fuse(model, table) if table else lambda: None
        decoder = model.get_base_model().get_decoder()
        output = decoder(
            input_ids=packed.token_ids_T[None],
            position_ids=packed.position_ids_T[None],
            use_cache=False,
            layout=packed.layout,
        )
        values = logps(output.last_hidden_state[0].index_select(0, packed.scored_N), weight, packed.targets_N)
        ops.EAGER.pairwise_loss(values, packed.sequence_ids_N, opponent, beta=0.1).loss.backward()
        model.zero_grad()
        unfuse()

    contestants = {"PEFT eager + log_softmax": lambda: train(plain_logps, None)}
    contestants["PEFT eager + one-sweep head"] = lambda: train(ops.EAGER.linear_logps, None)
    contestants |= {name: lambda table=table: train(table.linear_logps, table) for name, table in TABLES.items()}
    times = race(contestants, arguments.rounds)
    base = times["PEFT eager + log_softmax"]["p20_ms"]
    for name, percentiles in times.items():
        facts = {
            "op": "train step",
            "what": name,
            "T": packed.tokens,
            "N": len(packed.targets_N),
            "model": "SmolLM2-135M",
        }
        rate = {"tokens_per_s": round(1e3 * packed.tokens / percentiles["p50_ms"], 1)}
        yield facts | percentiles | rate | {"speed_up": round(base / percentiles["p20_ms"], 3)}
