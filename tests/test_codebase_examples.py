"""The recipes of synth_refine/labels/README.md, run against a dataset or a loader of that codebase's shape."""

from __future__ import annotations

import gc
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import dataset_shapes as shapes
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from synth_refine.labels.artifact import record, write_artifact
from synth_refine.labels.files import read_labels, write_labels
from synth_refine.labels.inject import StaleWarning, verify

README = (Path(__file__).parents[1] / "synth_refine" / "labels" / "README.md").read_text()
IMPORTS = README.split("```python\n")[1].split("```")[0]
ALL = dict(re.findall(r"\*\*([^*\n]+)\*\*\n```python\n(.*?)```", README, re.DOTALL))


CLASSES = 10
GIVEN = np.random.default_rng(0).integers(0, CLASSES, 50_000)
REFINED = np.where(np.arange(50_000) % 7 == 0, (GIVEN + 1) % CLASSES, GIVEN)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with the files that the recipes name, and what a training script would have at hand."""
    monkeypatch.chdir(tmp_path)
    for folder in ("noisy_labels", "noise_label", "cifar-10", "data/cifar10", "clothing1m", "noise_file"):
        Path(folder).mkdir(parents=True)
    write_labels("given-50000.npy", GIVEN)
    write_labels("refined-50000.npy", REFINED)
    write_artifact("refined", record(GIVEN[:45_000], REFINED[:45_000], num_classes=CLASSES))
    names: dict[str, Any] = {}
    exec(IMPORTS, names)
    return names


def run(codebase: str, names: dict[str, Any], **more: Any) -> dict[str, Any]:
    names.update(more)
    exec(ALL[codebase], names)
    return names


def of(dataset: Any) -> Any:
    return DataLoader(dataset, batch_size=2)


def cifar() -> Any:
    dataset = shapes.cifar10(GIVEN)
    dataset.classes = list("0123456789")
    return dataset


class SplitLoader(DataLoader[Any]):
    """ELR's: a loader with the datasets of both splits."""

    def __init__(self, dataset: Any, held_out: Any) -> None:
        super().__init__(dataset)
        self.train_dataset, self.val_dataset = dataset, held_out


def test_label_files(names: dict[str, Any]) -> None:
    for codebase in ("PLC", "LRA-diffusion", "DivideMix", "UNICON", "InstanceGM", "SSR", "T-Revision"):
        if codebase == "T-Revision":
            np.save("data/cifar10/train_labels.npy", GIVEN)
        run(codebase, names)
    for folder in ("noisy_labels", "noise_label"):
        assert np.load(f"{folder}/cifar10-1-0.35-ours.npy").tolist() == REFINED[:45_000].tolist()
    filled = [*REFINED[:45_000].tolist(), *GIVEN[45_000:].tolist()]
    assert json.loads(Path("cifar-10/0.1_sym.json").read_text()) == filled
    with np.load("data/cifar10/clean_0.1000_sym.npz") as file:
        assert file["label"].tolist() == filled
    assert torch.load("cifar-10/ours.pt", weights_only=True).tolist() == REFINED.tolist()
    assert shapes.Ssr(noise_file="noise_file/ours.json").cifar_label == REFINED.tolist()
    assert np.load("data/cifar10/train_labels.npy").tolist() == REFINED.tolist()
    assert np.load(Path("data/cifar10/train_labels.npy.bak").rename("data/old.npy")).tolist() == GIVEN.tolist()


def test_cifar_n_and_promix(names: dict[str, Any]) -> None:
    run("CIFAR-N, ProMix", names, train_set=cifar())
    for key, labels in (("worse_label", REFINED), ("clean_label", GIVEN)):
        assert read_labels("data/CIFAR-10_ours.pt", key=key).tolist() == labels.tolist()
    verify(shapes.ProMix(read_labels("data/CIFAR-10_ours.pt", key="worse_label")), REFINED)


def test_key_value_files(names: dict[str, Any]) -> None:
    dataset = shapes.KeyValue(shapes.given_labels())
    refined = shapes.refined_labels(shapes.given_labels())
    Path("clothing1m/noisy_label_kv.txt").write_text("old\n")
    write_labels("refined.csv", refined, list(dataset.train_labels)[:40])
    run("Clothing1M in DivideMix, UNICON, ELR+", names)
    lines = [line.split() for line in Path("clothing1m/noisy_label_kv.txt").read_text().splitlines()]
    dataset.train_labels = {path: int(label) for path, label in lines}
    verify(dataset, names["labels"], k=None)


@pytest.mark.parametrize("kind", [shapes.Elr, shapes.Sop])
def test_elr_and_sop(names: dict[str, Any], kind: Any) -> None:
    loader = SplitLoader(kind(GIVEN), kind(GIVEN, seed=4))
    run("ELR, SOP", names, data_loader=loader)
    for split in (loader.train_dataset, loader.val_dataset):
        assert (split.train_labels == REFINED[split.indexs]).all()


def test_elr_plus_trains_on_both_loaders(names: dict[str, Any]) -> None:
    loaders = [SplitLoader(shapes.Elr(GIVEN, seed=seed), None) for seed in (1, 2)]
    run("ELR+", names, data_loader1=loaders[0], data_loader2=loaders[1])
    for loader in loaders:
        assert (loader.dataset.train_labels == REFINED[loader.dataset.indexs]).all()  # type: ignore[attr-defined]


def test_datasets_in_memory(names: dict[str, Any]) -> None:
    dataset: Any = shapes.CoTeaching(GIVEN)
    with pytest.warns(StaleWarning, match="noise_or_not"):
        run("Co-teaching, JoCoR", names, train_dataset=dataset, train_loader=of(dataset))
    assert dataset.train_noisy_labels == REFINED.tolist()
    dataset = shapes.TRevision(GIVEN)  # as PES: permuted, and the split is not kept
    run("PES", names, train_dataset=dataset, train_loader=of(dataset), split_index=dataset.chosen)
    assert (dataset.train_labels == REFINED[dataset.chosen]).all()
    dataset = cifar()
    run("DISC", names, train_loader=of(dataset))
    assert dataset.targets == REFINED.tolist()
    dataset = shapes.Ldmi(GIVEN[:40_000])
    run("L_DMI", names, train_dataset_noisy=dataset, train_loader_noisy=of(dataset))
    assert dataset.targets == REFINED[:40_000].tolist()
    dataset = cifar()
    run("torchvision CIFAR10, MNIST and kin", names, cifar=dataset)
    assert dataset.targets == [*REFINED[:45_000].tolist(), *GIVEN[45_000:].tolist()]
    dataset = shapes.Own(GIVEN)
    run("Anything else", {**names, "read_artifact": None}, dataset=dataset, labels=REFINED)
    assert dataset.hidden.tolist() == GIVEN.tolist()


def test_folders_of_images(names: dict[str, Any], tmp_path: Path) -> None:
    folder = shapes.image_folder(tmp_path / "images", shapes.given_labels())
    ids = [Path(path).relative_to(tmp_path / "images").as_posix() for path, _ in folder.samples]
    given, order = np.array(folder.targets), np.random.default_rng(0).permutation(len(ids))
    refined, classes = shapes.refined_labels(given), {"classes": folder.classes}
    shutil.rmtree("refined")
    artifact = record(given[order], refined[order], ids=[ids[row] for row in order], num_classes=4, settings=classes)
    write_artifact("refined", artifact)

    class DataModule:
        """Lightning's: whose setup builds the dataset anew for every stage."""

        def setup(self, stage: str | None = None) -> None:
            self.train_set = ImageFolder(folder.root, transform=shapes.TO_TENSOR)

    read = names["read_artifact"]
    run("torchvision ImageFolder", names, folder=folder)
    assert folder.targets == refined.tolist()
    run("lightly", names, lightly_dataset=shapes.Wrapper(ImageFolder(folder.root, transform=shapes.TO_TENSOR)))
    verify(names["lightly_dataset"], read("refined"), k=None)
    module = run("Lightning", names, DataModule=DataModule)["Refined"]()
    for stage in ("fit", "validate"):
        module.setup(stage)
        assert module.train_set.targets == refined.tolist()
    stream = run("webdataset and other streams", names, stream=Stream(ids))["stream"]
    assert [sample["cls"] for sample in stream] == refined.tolist()
    timm = pytest.importorskip("timm.data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm leaves files open
        run("timm ImageDataset", names, dataset=timm.ImageDataset(folder.root, transform=shapes.TO_TENSOR))
        gc.collect()


class Stream(list[str]):
    """webdataset's way to map."""

    def map(self, change: Any) -> Any:
        return [change({"__key__": one, "cls": -1}) for one in self]


def test_tools(names: dict[str, Any]) -> None:
    for module in ("pandas", "pyarrow", "sklearn"):
        pytest.importorskip(module)
    shutil.rmtree("refined")
    given, refined = GIVEN[:200] % 2, GIVEN[:200] % 2
    refined = np.where(np.arange(200) % 7 == 0, 1 - given, given)
    ids = [f"{row}.png" for row in range(200)]
    write_artifact("refined", record(given, refined, ids=ids))
    for tool in ("Label Studio", "FiftyOne", "cleanlab", "pandas, Parquet"):
        run(tool, names)
    tasks = json.loads(Path("tasks.json").read_text())
    assert [task["data"]["image_id"] for task in tasks] == ids[::7]
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=photos/0.png"
    for name in ("samples.csv", "label_issues.csv", "issues.csv"):
        assert len(Path(name).read_text().splitlines()) == 201, name
    assert names["table"]["refined"].tolist() == refined.tolist()
    assert Path("refined.parquet").read_bytes()[:4] == b"PAR1"
    features, synthetic = (4.0 * np.eye(2)[one] + np.linspace(0, 1, len(one))[:, None] for one in (refined, given[:20]))
    run("scikit-learn", names, features=features, given=given, synthetic=synthetic, intended=given[:20])
    assert (names["refined"] != refined).mean() < 0.05 < (given != refined).mean()


def test_hugging_face(names: dict[str, Any]) -> None:
    pytest.importorskip("datasets")
    write_labels("refined.npy", shapes.refined_labels(shapes.given_labels()))
    run("Hugging Face", names, dataset=shapes.hugging_face(shapes.given_labels()))
    assert names["dataset"]["label"][:] == read_labels("refined.npy").tolist()


def test_every_recipe_is_in_the_table_and_above() -> None:
    source = Path(__file__).read_text()
    assert [name for name in ALL if f'"{name}"' not in source] == []
    assert re.findall(r"(?m)^\| ([^|]+?) \| [^|]+ \| (?:file|object)[^|]* \|$", README) == list(ALL)
