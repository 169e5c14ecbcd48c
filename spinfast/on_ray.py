"""A run on the workers of Ray Train: python -m spinfast.on_ray --workers 2 [--gpus] CONFIG.yaml [as `spinfast run`]

Each worker starts the process that torchrun would have started, one of the ranks (spread.py). Where one ends, Ray
starts all of them again, elsewhere if it must, and the run goes on where it was: the run directory has to be one that
all machines see. Optional: pip install "ray[train]".
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def train_func(config: dict) -> None:
    """On every worker. config: "words" of the command line, "cwd" where it was given."""
    from ray import train, util
    from ray.train.collective import broadcast_from_rank_zero

    with socket.socket() as free:
        free.bind(("", 0))
        meeting = broadcast_from_rank_zero((util.get_node_ip_address(), free.getsockname()[1]))
    here = train.get_context()
    ranks = {
        "RANK": here.get_world_rank(),
        "WORLD_SIZE": here.get_world_size(),
        "LOCAL_RANK": here.get_local_rank(),
        "LOCAL_WORLD_SIZE": here.get_local_world_size(),
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": meeting[1],
    }
    command = [sys.executable, "-m", "spinfast.run", *config["words"]]
    environment = os.environ | {name: str(value) for name, value in ranks.items()}
    if code := subprocess.call(command, cwd=config["cwd"], env=environment):
        raise RuntimeError(f"rank {here.get_world_rank()} ended with exit code {code}")


def _workers(text: str) -> int | tuple[int, int]:
    least, several, most = text.partition("-")
    return (int(least), int(most)) if several else int(least)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m spinfast.on_ray", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=_workers, default=2, help="ranks: 2, or 1-4 as they are to be had")
    parser.add_argument("--gpus", action="store_true", help="one card for each")
    parser.add_argument("--failures", type=int, default=3, help="how often all are started again")
    options, words = parser.parse_known_args(argv)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        train_func,
        train_loop_config={"words": words, "cwd": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # of Ray's own group, of which the ranks know nothing
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.failures)),
    ).fit()


if __name__ == "__main__":
    main()
