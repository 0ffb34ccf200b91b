"""Training in several processes, as torchrun starts them, is training in one with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command

from benchmarks import run_combo
from benchmarks.records import read_records

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import json, os, shutil, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from third_party import loop, lra_diffusion, plc, standard
from third_party.lra_diffusion import LabelDiffusion
from third_party.resnet import FeatureHead, resnet_small

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "alone")
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
loop.CHECKPOINT_SECONDS = 0.0
torch.manual_seed(0)
inputs, soft = torch.randn(99, 6), torch.rand(99, 3).softmax(dim=1)
images = torch.randint(0, 256, (99, 3, 8, 8), dtype=torch.uint8)
labels = soft.argmax(dim=1)
found = {}


def head():
    torch.manual_seed(1)
    return FeatureHead(3, inputs.mean(dim=0), inputs.std(dim=0), hidden=8, dropout=0.3)


# The denoiser normalises what an image encoder gives. A bias at its end has no gradient but for rounding, of which Adam
# makes whole steps: these encoders have none, so that predictions can be compared, too.
def encoder_of_features():
    torch.manual_seed(1)
    model = FeatureHead(16, inputs.mean(dim=0), inputs.std(dim=0), hidden=8, dropout=0.3)
    model.head.bias = None
    return model


class EncoderOfPixels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.2)
        self.first, self.last = nn.Linear(192, 16), nn.Linear(16, 16, bias=False)

    def forward(self, images):
        return self.last(self.dropout(self.first(self.norm(images.float()).flatten(1)).relu()))


def accuracy(network):
    return {"right": (network(inputs).argmax(dim=1) == labels).float().mean().item()}


config = standard.Config(epochs=3, batch_size=16, lr=0.1, milestones=(2,))  # the last batch has 3 rows
for name, targets in {"standard": labels, "standard soft": soft}.items():
    model = head()
    result = standard.train(model, inputs, targets, config, measure=accuracy, seed=3, keep_best="right")
    found[name] = [result.history, model.head.weight.tolist(), result.best_epoch]

torch.manual_seed(1)
model = resnet_small(3).double()  # what rounding does would grow too fast otherwise
of_images = lambda network: {"mean": network(images).mean().item()}
result = standard.train(model, images, labels, replace(config, lr=0.01), measure=of_images, seed=3)
found["standard pixels"] = [result.history, model.head.weight.tolist(), None]

model = head()
config = plc.Config(epochs=4, batch_size=16, lr=0.1, warmup=1, window=2, delta=0.9)
start = torch.where(torch.rand(99) < 0.3, (labels + 1) % 3, labels)
result = plc.train(model, inputs, start, config, measure=accuracy, seed=3)
assert sum(epoch["flips"] for epoch in result.history) > 0
found["plc"] = [result.history, model.head.weight.tolist(), result.labels.tolist()]


class Killed(Exception):
    pass


def lra(name, encoder, config, inputs, fatal=None, resumed=None):
    torch.manual_seed(2)
    features = torch.randn(99, 5) + 2 * torch.nn.functional.one_hot(labels, 5)
    model = LabelDiffusion(encoder, 3, 5, width=16)
    predicted = []

    def measure(predict):
        classes = predict(inputs, features)
        predicted.append(classes.tolist())
        if len(predicted) == fatal:
            raise Killed
        return {"right": (classes == labels).float().mean().item()}

    result = lra_diffusion.train(
        model, inputs, features, labels, config, measure=measure, seed=3, checkpoint=resumed
    )
    found[name] = [result.history, model.denoiser.head.weight.tolist(), predicted[-1]]


short = lra_diffusion.Config(epochs=4, batch_size=16, lr=0.01, warmup=1, neighbours=5, measure_every=1)
short = replace(short, measure_batch=40)
released = replace(lra_diffusion.PRESETS["released"], epochs=4, batch_size=16, lr=0.01, neighbours=5, warmup=0)
lra("lra paper", encoder_of_features(), short, inputs)
lra("lra paper pixels", EncoderOfPixels(), replace(short, crop_padding=1), images)
lra("lra released pixels", EncoderOfPixels(), replace(released, crop_padding=1, measure_batch=40), images)
lra("lra untrained", encoder_of_features(), replace(short, train_image_encoder=False, use_ema=False), inputs)

checkpoint = folder / f"{'alone' if rank == 'alone' else 'two'}.safetensors"
try:
    lra("killed", encoder_of_features(), short, inputs, fatal=3, resumed=checkpoint)
except Killed:
    pass
if rank == "0":
    shutil.copy(checkpoint, folder / "of-two.safetensors")
if rank != "alone":
    torch.distributed.barrier()
lra("lra resumed", encoder_of_features(), short, inputs, resumed=checkpoint)
if rank == "alone":
    lra("lra of two processes", encoder_of_features(), short, inputs, resumed=folder / "of-two.safetensors")

(folder / f"{rank}.json").write_text(json.dumps(found))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*arguments: str) -> str:
    """Standard output of Python with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *arguments]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_have_the_history_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run(*TORCHRUN, str(script), str(tmp_path))
    run(str(script), str(tmp_path))
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert first == second
    assert alone["lra resumed"] == alone["lra paper"]
    assert first["lra resumed"] == first["lra paper"]
    first["lra of two processes"] = first["lra resumed"]
    assert set(first) == set(alone)
    for name, (history, weights, more) in first.items():
        expected, expected_weights, expected_more = alone[name]
        assert more == expected_more, name
        assert [sorted(epoch) for epoch in history] == [sorted(epoch) for epoch in expected]
        for epoch, wanted in zip(history, expected, strict=True):
            assert epoch == pytest.approx(wanted, rel=1e-4), name
        for row, wanted in zip(weights, expected_weights, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4), name


@pytest.mark.slow
def test_the_benchmark_in_two_processes_writes_the_records_of_one(
    arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--method", "plc,lra-clip", "--refine", "paper"]
    more += ["methods.lra-clip={epochs: 3, warmup: 1, measure_every: 1, batch_size: 50, train_image_encoder: false}"]
    printed = run(*TORCHRUN, str(ROOT / "benchmarks" / "run_combo.py"), *command(arrays, tmp_path / "two", *more))
    assert run_combo.main(command(arrays, tmp_path / "one", *more)) == 0
    assert printed == capsys.readouterr().out, "the first process alone prints the table"
    assert not list(tmp_path.glob("two/blobs/.work/*lra-clip*.safetensors")), "finished runs leave no checkpoint"
    ones, twos = (read_records([tmp_path / name / "blobs"]) for name in ("one", "two"))
    assert len(ones) == 2
    for one, two in zip(ones, twos, strict=True):
        assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
        for epoch, wanted in zip(two["history"], one["history"], strict=True):
            assert epoch == pytest.approx(wanted, rel=1e-4)
        different = {name for name in one if one[name] != two[name]}
        assert different <= {"environment", "history", "refine_seconds", "train_seconds"}
