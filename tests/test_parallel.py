"""Training in several processes, as torchrun starts them, is training in one with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import torch
from third_party import plc, standard
from third_party.resnet import FeatureHead

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
inputs, soft = torch.randn(99, 6), torch.rand(99, 3).softmax(dim=1)
labels = soft.argmax(dim=1)
config = standard.Config(epochs=3, batch_size=16, lr=0.1, milestones=(2,))  # the last batch has 3 rows
found = []
for targets in (labels, soft):
    torch.manual_seed(1)
    model = FeatureHead(3, inputs.mean(dim=0), inputs.std(dim=0), hidden=8, dropout=0.0)
    accuracy = lambda network: {"right": (network(inputs).argmax(dim=1) == labels).float().mean().item()}
    result = standard.train(model, inputs, targets, config, measure=accuracy, seed=3, keep_best="right")
    found.append([result.history, model.head.weight.tolist(), result.best_epoch])
torch.manual_seed(1)
model = FeatureHead(3, inputs.mean(dim=0), inputs.std(dim=0), hidden=8, dropout=0.0)
config = plc.Config(epochs=4, batch_size=16, lr=0.1, warmup=1, window=2, delta=0.9)
start = torch.where(torch.rand(99) < 0.3, (labels + 1) % 3, labels)
result = plc.train(model, inputs, start, config, measure=accuracy, seed=3)
assert sum(epoch["flips"] for epoch in result.history) > 0
found.append([result.history, model.head.weight.tolist(), result.labels.tolist()])
with open(f"{sys.argv[1]}-{os.environ.get('RANK', 'alone')}.json", "w") as file:
    json.dump(found, file)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_history_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start in ([], torchrun):
        command = [sys.executable, *start, str(script), str(tmp_path / "history")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (json.loads((tmp_path / f"history-{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert first == second
    for (history, weights, best), (expected, expected_weights, expected_best) in zip(first, alone, strict=True):
        assert best == expected_best
        assert [sorted(epoch) for epoch in history] == [sorted(epoch) for epoch in expected]
        for epoch, wanted in zip(history, expected, strict=True):
            assert epoch == pytest.approx(wanted, rel=1e-5)
        for row, wanted in zip(weights, expected_weights, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5)
