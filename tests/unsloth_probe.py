"""Run by test_unsloth.py, each time in a process of its own: Unsloth rewrites transformers when it is imported.

python unsloth_probe.py cpu|gpu MODEL DTYPE OUT: one packed batch through the stock policy and through Unsloth's, with
the same adapter. Log-probs and adapter gradients go to OUT, what Unsloth made of the model to stdout.

cpu: Unsloth's CPU backend, loaded as a run loads it. gpu (with UNSLOTH_ALLOW_CPU=1 TRITON_INTERPRET=1): the forwards
that Unsloth runs on CUDA, decoder and layers, on CPU tensors, their Triton kernels interpreted; only the rotary tables,
which live on the card, are given to them.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from spinfast.config import Lora
from spinfast.device import profile
from spinfast.ops import EAGER
from spinfast.packing import pack
from spinfast.policy.transformers import load_base, load_policy
from spinfast.scoring import answer_logps
from spinfast.types import Adapter, Group

GROUPS = [
    Group(tuple(range(5, 25)), (tuple(range(30, 47)), tuple(range(100, 109)))),
    Group(tuple(range(200, 207)), ((5, 6, 7), tuple(range(60, 90)))),
]
MAX_SEQ_LENGTH = 64  # shorter than the packed row


def measure(policy, name: str) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    logps = answer_logps(policy, pack(GROUPS, range(len(GROUPS)), "sdpa"))
    logps.sum().backward()
    gradients = {f"{name}/{key}": p.grad.float().clone() for key, p in policy.trainable_parameters().items()}
    return {f"{name}/logps": logps.detach().float()} | gradients


def noise(adapter: Adapter) -> Adapter:
    draw = torch.Generator().manual_seed(1)
    tensors = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in adapter.tensors.items()}
    return Adapter(adapter.config, tensors)


def cpu_base(path: Path, device):
    from spinfast.policy import unsloth

    return unsloth.load_base(path, device, load_in_4bit=False, max_seq_length=MAX_SEQ_LENGTH)


def gpu_base(path: Path, device):
    """A stock model whose classes have the forwards that Unsloth gives them on CUDA."""
    from unsloth.models.llama import LlamaDecoderLayer_fast_forward, LlamaModel_fast_forward

    base = load_base(path, device.dtype, device.device)
    decoder = base.get_decoder()
    decoder.max_seq_length = MAX_SEQ_LENGTH
    rows = torch.arange(base.config.max_position_embeddings)[None]
    tables = [table[0] for table in decoder.rotary_emb(torch.zeros(1, dtype=device.dtype), rows)]
    decoder.rotary_emb.extend_rope_embedding = lambda *args, **kwargs: None
    decoder.rotary_emb.get_cached = lambda length, index: tables
    type(decoder).forward = LlamaModel_fast_forward
    type(decoder.layers[0]).forward = LlamaDecoderLayer_fast_forward
    return base


def main(flavour: str, path: Path, dtype: str, out_file: str) -> None:
    device = profile("cpu", dtype)
    options = {"lora": Lora(r=4, alpha=8), "ops": EAGER, "profile": device, "load_in_4bit": False, "seed": 0}
    stock = load_policy(path, "tiny", "0", **options)
    adapter = noise(stock.adapter())
    stock.load_adapter(adapter)
    out = measure(stock, "stock")

    from spinfast.policy import unsloth

    base = {"cpu": cpu_base, "gpu": gpu_base}[flavour](path, device)
    policy = load_policy(path, "tiny", "0", **options, base=base, fuse=unsloth.fuse)
    policy.load_adapter(adapter)
    out |= measure(policy, "unsloth")
    policy.checkpoint_layers(2)
    out |= measure(policy, "recomputed")
    save_file(out, out_file)
    attention, mlp = policy.decoder.layers[0].self_attn, policy.decoder.layers[0].mlp
    seams = [attention.apply_qkv, attention.apply_o, attention.forward, mlp.forward]
    policy.unfuse()
    print(
        json.dumps(
            {
                "seams": sorted({seam.func.__module__ for seam in seams}),
                "left": sorted({"apply_qkv", "apply_o", "forward"} & (vars(attention).keys() | vars(mlp).keys())),
                "layer": type(policy.decoder.layers[0]).forward.__qualname__,
                "decoder": type(policy.decoder).forward.__qualname__,
                "names": sorted(policy.trainable_parameters()) == sorted(stock.trainable_parameters()),
                "dtypes": sorted({str(p.dtype) for p in policy.trainable_parameters().values()}),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
