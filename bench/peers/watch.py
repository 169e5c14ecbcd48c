"""The clock and the scales that every peer reports to: seconds per phase and step, losses, memory above the model.

CPU: resident memory, with the kernel's own high-water mark (VmHWM, reset once the model is loaded and its weights
are copied out of the mapped file). CUDA: the allocator's peaks.
"""

from __future__ import annotations

import ctypes
import gc
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file


class Watch:
    def __init__(self, device: str, capture: Path | None = None):
        self.device, self.capture = device, capture
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.memory: dict[str, float] = {}
        self.since = self.within = 0.0

    def loaded(self, model: torch.nn.Module, owned: bool = True) -> None:
        """The model is there and nothing else: memory counts from here. Not `owned`: its tensors are an engine's."""
        for tensor in [*model.parameters(), *model.buffers()] if owned else ():
            tensor.data = tensor.data.clone()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.memory["model_mib"] = torch.cuda.memory_allocated() / 2**20
            return
        ctypes.CDLL(None).malloc_trim(0)  # what loading gave back would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
        self.memory["model_mib"] = resident("VmRSS")

    @contextmanager
    def phase(self, name: str):
        """Seconds of the block, added to those of earlier blocks of this name; a phase within it is none of its."""
        before, self.within = (self.since, self.within), 0.0
        start = self.since = now(self.device)
        yield
        spent = now(self.device) - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.within
        self.since, self.within = (part + spent for part in before)

    def step(self, loss: float) -> None:
        """An optimizer step is done; `loss` is the mean over its pairs, before the step."""
        since, self.since = self.since, now(self.device)
        self.steps.append(self.since - since)
        self.losses.append(loss)

    def optimizer(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """For the gate: keep the gradients as the first step finds them."""
        if self.capture is not None:
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".default." in n}
            optimizer.register_step_pre_hook(lambda *_: self._take(trained))

    def _take(self, trained: dict[str, torch.nn.Parameter]) -> None:
        if not self.capture.exists():
            save_file({name: p.grad.float().cpu().contiguous() for name, p in trained.items()}, self.capture)

    def result(self) -> dict:
        if self.device == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
            self.memory |= {"peak_allocated_mib": peak, "peak_reserved_mib": reserved}
        else:
            peak = self.memory["peak_rss_mib"] = resident("VmHWM")
        self.memory["above_model_mib"] = peak - self.memory["model_mib"]
        found = {"seconds": self.seconds, "steps_s": self.steps, "losses": self.losses}
        return {**found, "threads": torch.get_num_threads(), **self.memory}


def now(device: str) -> float:
    """The time at which the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(field: str) -> float:
    """MiB of /proc/self/status' VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
