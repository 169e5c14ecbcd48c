"""A study under torchrun: each rank takes cells in turn, as processes of one study do."""

from __future__ import annotations

import json
from functools import partial

from ranks import become, free_port
from test_study import write_study
from warm import FORK, SECONDS, child


def test_ranks_take_cells_and_the_first_one_tells(tmp_path, tiny_model):
    path = write_study(tmp_path, tiny_model("llama"), axes={"adapter.r": [2, 4]})
    output, port = tmp_path / "said", free_port()
    words = ["study", str(path), "--dir", str(tmp_path / "out")]
    ranks = [FORK.Process(target=child, args=(words, str(output), partial(become, r, 2, port, 60))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    said = output.read_text()
    assert [process.exitcode for process in ranks] == [0, 0], said
    cells = [*tmp_path.glob("out/cells/*")]
    assert len(cells) == 4
    assert all((cell / "outcomes.json").exists() for cell in cells)
    begun = [sum("data: 12 examples" in line for line in (cell / "log.txt").open()) for cell in cells]
    assert begun == [1] * 4  # each by one of them
    assert said.count("index.html, scores.csv") == 1
    assert len({json.loads(line)["cell"] for line in (tmp_path / "out" / "runs.jsonl").open()}) == 4
