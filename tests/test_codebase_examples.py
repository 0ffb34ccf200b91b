"""The recipes of synth_refine/labels/README.md, run against a dataset or a loader of that codebase's shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dataset_shapes as shapes
import numpy as np
import pytest
import torch

from synth_refine.labels.artifact import record, write_artifact
from synth_refine.labels.files import read_labels, write_labels
from synth_refine.labels.inject import StaleWarning, verify

README = (Path(__file__).parents[1] / "synth_refine" / "labels" / "README.md").read_text()
IMPORTS = README.split("```python\n")[1].split("```")[0]
EXAMPLES = dict(re.findall(r"\*\*([^*\n]+)\*\*\n```python\n(.*?)```", README, re.DOTALL))


def changed(labels: np.ndarray, classes: int) -> np.ndarray:
    refined = labels.copy()
    refined[::7] = (refined[::7] + 1) % classes
    return refined


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with the files that the examples name, and what a training script would have at hand."""
    monkeypatch.chdir(tmp_path)
    for folder in ("noisy_labels", "noise_label", "cifar-10", "data", "annotations"):
        Path(folder).mkdir()
    names: dict[str, Any] = {"np": np, "Subset": torch.utils.data.Subset}
    exec(IMPORTS, names)
    return names


def check(codebase: str, names: dict[str, Any]) -> None:
    exec(EXAMPLES[codebase], names)


@pytest.fixture
def cifar(names: dict[str, Any]) -> np.ndarray:
    """Labels as published, for 45,000 images and for all; and refined ones."""
    given = np.random.default_rng(0).integers(0, 10, 50_000)
    write_labels("given-50000.npy", given)
    write_labels("refined-50000.npy", changed(given, 10))
    write_artifact("refined", record(given[:45_000], changed(given[:45_000], 10), num_classes=10))
    return given


def test_plc_and_lra(names: dict[str, Any], cifar: np.ndarray) -> None:
    check("PLC", names)
    check("LRA-diffusion", names)
    for folder in ("noisy_labels", "noise_label"):
        assert np.load(f"{folder}/cifar10-1-0.35-ours.npy").tolist() == changed(cifar[:45_000], 10).tolist()


def test_dividemix_and_unicon(names: dict[str, Any], cifar: np.ndarray) -> None:
    check("DivideMix", names)
    check("UNICON", names)
    expected = [*changed(cifar[:45_000], 10).tolist(), *cifar[45_000:].tolist()]
    assert json.loads(Path("cifar-10/0.2_sym.json").read_text()) == expected
    with np.load("cifar-10/clean_0.2000_sym.npz") as file:
        assert file["label"].tolist() == expected


def test_cifar_n(names: dict[str, Any], cifar: np.ndarray) -> None:
    names["train_set"] = type("Cifar", (), {"targets": cifar.tolist()})()
    check("CIFAR-N", names)
    assert read_labels("data/CIFAR-10_refined.pt", key="worse_label").tolist() == changed(cifar, 10).tolist()
    assert read_labels("data/CIFAR-10_refined.pt", key="clean_label").tolist() == cifar.tolist()


def test_elr_and_co_teaching(names: dict[str, Any]) -> None:
    given = shapes.given_labels()
    write_labels("refined-50000.npy", changed(given, 4))
    names["data_loader"] = type("Loader", (), {"train_dataset": shapes.Elr(given)})()
    check("ELR, ELR+, SOP", names)
    names["train_dataset"] = shapes.CoTeaching(given)
    with pytest.warns(StaleWarning, match="noise_or_not"):
        check("Co-teaching", names)
    assert names["train_dataset"].train_noisy_labels == changed(given, 4).tolist()


def test_key_value_files(names: dict[str, Any]) -> None:
    dataset = shapes.KeyValue(shapes.given_labels())
    write_labels("refined.csv", changed(shapes.given_labels(), 4), list(dataset.train_labels)[:40])
    check("Clothing1M in DivideMix, UNICON, ELR+", names)
    lines = [line.split() for line in Path("annotations/noisy_label_kv.txt").read_text().splitlines()]
    dataset.train_labels = {path: int(label) for path, label in lines}
    verify(dataset, *(names["labels"], names["paths"]), k=None)


def test_torchvision(names: dict[str, Any], tmp_path: Path) -> None:
    given = shapes.given_labels(count=50_000)
    names["cifar"] = shapes.cifar10(given[:1])
    names["cifar"].targets, names["cifar"].data = given.tolist(), np.zeros((50_000, 2, 2, 3), np.uint8)
    write_artifact("refined", record(given[:45_000], changed(given[:45_000], 4), num_classes=4))
    check("torchvision CIFAR10", names)
    assert names["cifar"].targets == [*changed(given[:45_000], 4), *given[45_000:]]

    names["folder"] = shapes.image_folder(tmp_path / "images", shapes.given_labels())
    paths = [Path(path).relative_to(tmp_path / "images").as_posix() for path, _ in names["folder"].samples]
    write_labels("refined.csv", changed(np.array(names["folder"].targets), 4)[::-1].copy(), paths[::-1])
    check("torchvision ImageFolder", names)
    assert names["folder"].targets == read_labels("refined.csv")[::-1].tolist()


def test_hugging_face_and_others(names: dict[str, Any]) -> None:
    pytest.importorskip("datasets")
    names["dataset"] = shapes.hugging_face(shapes.given_labels())
    write_labels("refined.npy", changed(shapes.given_labels(), 4))
    check("Hugging Face", names)
    assert names["dataset"]["label"][:] == read_labels("refined.npy").tolist()
    names["dataset"] = shapes.Own(shapes.given_labels())
    check("Anything else", names)
    assert names["dataset"].hidden.tolist() == shapes.given_labels().tolist()
