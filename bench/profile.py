"""Where a training step's time goes: torch's profiler by class of operator, spinfast beside the eager loop.

    python -m bench profile [--model MODEL|random:SHAPE] [--count 8]

Self time of every operator in the training phase of one iteration (scoring excluded), summed by class. Rows go to
results/profile.jsonl; `python -m bench results` draws them. Numba's kernels have no events of their own: they are
self time of the autograd functions that call them, with the Python between. The profiler itself costs some 5 us per
operator, so many small operators look a little worse than they are.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from bench import rows, shapes
from bench.peers import eager_loop, spinfast_loop
from bench.peers import work as given
from bench.peers.watch import Watch

CLASSES = {  # class -> what the operator's name contains; the first that fits
    "GEMMs": ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "gemm"),
    "attention": ("attention", "_PackedAttention"),
    "optimizer": ("_foreach", "_fused_adam", "Optimizer"),
    "copies and casts": ("::copy_", "::_to_copy", "::cat", "::clone", "::contiguous", "Memcpy"),
    "softmax and head": ("softmax", "::exp", "::amax", "::gather", "::scatter", "_row_kernel", "_unit_kernel"),
    "reductions": ("::sum", "::mean", "norm", "vecdot", "::pow", "rsqrt"),
    "element-wise": ("::mul", "::add", "::sub", "::div", "::neg", "::where", "::max", "elementwise", "_kernel", "silu"),
    "memory and indexing": ("::empty", "::zero", "::fill", "::index", "embedding", "::resize", "Memset"),
    "compiled parts and Python": ("_Projections", "_Mlp", "_RmsNorm", "_SwiGlu", "_Rope", "_LinearLogps"),
}
OTHER = "other"


class Profiled(Watch):
    """A watch that profiles the training phase."""

    @contextmanager
    def phase(self, name: str):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with super().phase(name):
            if name != "train":
                yield
                return
            with profiler(activities=activities) as self.profile:
                yield

    def by_class(self) -> dict[str, float]:
        """Milliseconds of self time."""
        found = dict.fromkeys([*CLASSES, OTHER], 0.0)
        for name, time in self.operators().items():
            found[operator_class(name)] += time
        return found

    def operators(self) -> dict[str, float]:
        events = self.profile.key_averages()
        if self.device == "cpu":
            return {event.key: event.self_cpu_time_total / 1e3 for event in events}
        # a kernel's time stands on its own event and on the operator's that launched it; Triton's have no operator
        operators = [e for e in events if e.device_type == DeviceType.CPU and "::" in e.key]
        alone = [e for e in events if e.device_type == DeviceType.CUDA and e.key.endswith("_kernel")]
        return {e.key: e.self_device_time_total / 1e3 for e in operators + alone}


def operator_class(name: str) -> str:
    return next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), OTHER)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench profile", description=__doc__)
    parser.add_argument("--model", default=shapes.SMOLLM2)
    parser.add_argument("--count", type=int, default=8, help="pairs, 4 to a step")
    arguments = parser.parse_args(argv)
    device = shapes.device()
    kind, dtype = device.device.type, str(device.dtype).removeprefix("torch.")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = given.prepare(
            Path(scratch), arguments.model, arguments.count, device=kind, dtype=dtype, pairs_per_step=4
        )
        facts = given.facts(work.groups())
        for name, peer in {"spinfast": spinfast_loop, "eager": eager_loop}.items():
            watch = Profiled(kind)
            peer.play(work, watch)
            found[name] = watch.by_class()
    for name, times in found.items():
        shown = {key: round(value, 1) for key, value in times.items()}
        row = {"what": "training", "peer": name, "model": arguments.model, "dtype": dtype, **facts, "self_ms": shown}
        rows.write("profile", row | {"total_ms": round(sum(times.values()), 1)}, kind)
    return 0
