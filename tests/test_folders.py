"""Image folders as tasks: the same labels as from arrays, whatever is missing in one line, kills, noise by name."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.testing import assert_array_equal
from PIL import Image

from benchmarks import data, folders, pixels, run_combo
from benchmarks.folders import Folders, FolderTask
from benchmarks.pixels import PixelStore, read_resize
from benchmarks.records import read_records
from synth_refine import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import open_images
from third_party.mapped import MappedFile, MappedImages

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("bird", "cat", "dog")
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
QUICK = ("pixels.resize=16", "initial.epochs=3", "methods.standard.epochs=2", "methods.plc.epochs=2")


def write(folder: Path, per_class: int, seed: int, sides: tuple[int, int] = (16, 16)) -> None:
    """Noisy pictures of one colour per class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            picture = (np.array(COLOURS[label]) + rng.integers(-50, 51, (*sides, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / name / f"{number}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """photos/train, val and test, synthetic, and given.csv with a third of the labels wrong."""
    for number, (name, count) in enumerate({"train": 30, "val": 5, "test": 8, "synthetic": 12}.items()):
        write(tmp_path / ("synthetic" if name == "synthetic" else f"photos/{name}"), count, number)
    images = open_images(tmp_path / "photos" / "train")
    wrong = (images.labels + (np.arange(90) % 3 == 0)) % 3
    rows = np.random.default_rng(0).permutation(90)  # by id, in any order
    table = {"id": [images.ids[row] for row in rows], "label": [NAMES[wrong[row]] for row in rows]}
    (tmp_path / "given.csv").write_bytes(csv_bytes(table))
    return tmp_path


def task_of(root: Path, **more: Any) -> FolderTask:
    return FolderTask(Folders(root / "photos", root / "synthetic"), read_resize({"resize": 16}), root / "store", **more)


def run(root: Path, source: dict[str, str], *more: str) -> list[dict[str, Any]]:
    """The records of a small benchmark on the CPU."""
    config = str(ROOT / "benchmarks" / "configs" / "folder.yaml")
    options = {name: str(root / value) for name, value in source.items()} | {"config": config, "device": "cpu"}
    arguments = [text for pair in options.items() for text in (f"--{pair[0]}", pair[1])]
    assert run_combo.main([*arguments, "--out", str(root / "runs"), *more]) == 0
    return read_records((root / "runs" / Path(source.get("images") or source["data"]).stem).glob("*.json"))


FOLDERS = {"images": "photos", "synthetic": "synthetic", "given": "given.csv"}

# ---- the task ----


def test_the_labels_are_those_of_the_array_path(root: Path) -> None:
    """The same images as arrays, the validation images behind the training images, give the same task and runs."""
    task = task_of(root).load("given", root / "given.csv").task
    places = {name: root / "photos" / name for name in ("train", "val", "test")} | {"synthetic": root / "synthetic"}
    parts = {name: open_images(place) for name, place in places.items()}
    images = {name: np.stack([part.image(row) for row in range(len(part.ids))]) for name, part in parts.items()}
    arrays = {name: images[name] for name in ("test", "synthetic")}
    arrays |= {f"{name}_labels": parts[name].labels for name in ("test", "synthetic")}
    arrays["train"] = np.concatenate([images["train"], images["val"]])
    arrays["train_labels"] = np.concatenate([parts["train"].labels, parts["val"].labels])
    np.savez(root / "arrays.npz", **arrays)  # type: ignore[arg-type]
    np.save(root / "given.npy", task.train.labels.numpy())
    other = data.npz(root / "arrays.npz", root / "given.npy").task
    for name in ("train", "synthetic", "noisy_validation", "clean_validation", "test"):
        mine, theirs = getattr(task, name), getattr(other, name)
        assert isinstance(mine.inputs, MappedImages)
        assert_array_equal(mine.inputs.float(), theirs.inputs.float())
        assert_array_equal(mine.labels, theirs.labels)
    wanted = ("--method", "standard,plc", "--refine", "paper,anchored", *QUICK)
    folder = run(root, FOLDERS, *wanted)
    array = run(root, {"data": "arrays.npz", "given": "given.npy"}, *wanted)
    assert len(folder) == 4

    def by_name(record: dict[str, Any]) -> tuple[str, str]:
        return record["method"], record["refiner"]

    for mine, theirs in zip(sorted(folder, key=by_name), sorted(array, key=by_name), strict=True):
        assert mine["labels"] == theirs["labels"]
        assert mine["wrong_after_training"] == theirs["wrong_after_training"]
    assert any(record["labels"]["changed"] for record in folder)


@pytest.mark.slow
def test_every_method_runs_and_a_dry_run_says_what_it_takes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lra = [f"{name}.{one}" for name in ("lra-clip", "lra-simclr") for one in ("epochs=1", "warmup=0", "batch_size=20")]
    more = [f"methods.{one}" for one in (*lra, "lra-simclr.simclr.epochs=1", "lra-simclr.simclr.batch_size=30")]
    more += ["methods.plc.rotation=15", "methods.standard.smallest_crop=0.5", "methods.standard.network=resnet18"]
    more += ["methods.relabel.epochs=1", "--refine", "none", *QUICK]
    assert run(root, FOLDERS, "--dry-run", *more) == []
    said = capsys.readouterr().out
    assert "train: 90 x 16 x 16 x 3, 0.07 MB of disk" in said
    assert "of which 0.07 MB are to be written" in said
    assert not (root / "runs").exists()
    records = run(root, FOLDERS, *more)
    assert {record["method"] for record in records} == {"standard", "relabel", "plc", "lra-clip", "lra-simclr"}
    (root / "photos" / "test" / "cat" / "0.png").unlink()
    folders._sources.cache_clear()  # as in another process
    assert len(run(root, FOLDERS, "--method", "plc", *more)) == 6, "other images, another record"


def test_without_val_a_tenth_is_held_out_and_without_given_nobody_knows_the_truth(root: Path) -> None:
    shutil.rmtree(root / "photos" / "val")
    bench = task_of(root).load("given")
    assert bench.true_labels is None
    assert (len(bench.task.train.labels), len(bench.task.noisy_validation.labels)) == (81, 9)
    assert len(bench.task.clean_validation.labels) == 0
    named = task_of(root).load("uniform-0.3")
    assert named.true_labels is not None
    assert (named.task.train.labels != named.true_labels).any()
    assert_array_equal(named.true_labels, bench.task.train.labels)
    assert named.task.clean_validation.inputs is named.task.noisy_validation.inputs


def test_noise_by_name_with_the_class_map_and_the_posterior_of_the_config(root: Path) -> None:
    labels = open_images(root / "photos" / "train").labels
    flipped = task_of(root, flips={"cat": "dog"}).load("asymmetric-0.9").task.train.labels.numpy()
    assert set(flipped[labels == 1]) == {1, 2}
    assert_array_equal(flipped[labels != 1], labels[labels != 1])
    posterior = np.eye(3)[labels] + np.random.default_rng(0).random((90, 3))
    np.save(root / "posterior.npy", (posterior / posterior.sum(axis=1, keepdims=True)).astype(np.float32))
    pmd = task_of(root, posterior=root / "posterior.npy").load("pmd-1-0.40").task.train.labels.numpy()
    assert 0.25 < (pmd != labels).mean() < 0.55
    with pytest.raises(InputError, match=r"noise: expected a posterior \(90, 3\)"):
        task_of(root).load("pmd-1-0.40")
    np.save(root / "posterior.npy", np.ones((80, 3), np.float32) / 3)
    with pytest.raises(InputError, match=r"posterior: expected shape \(90, 3\), got \(80, 3\)"):
        task_of(root, posterior=root / "posterior.npy").load("pmd-1-0.40")
    with pytest.raises(InputError, match="expected the classes bird, cat, dog in flips, got 'cow' too"):
        task_of(root, flips={"cow": "dog"}).load("asymmetric-0.9")


def test_names_of_a_yaml_file_order_the_classes_and_reach_the_prompts(root: Path) -> None:
    words = {"dog": "spaniel", "bird": "wren", "cat": "tabby"}
    (root / "classes.yaml").write_text(yaml.safe_dump(words, sort_keys=False))
    named = Folders(root / "photos", root / "synthetic", root / "classes.yaml")
    bench = replace(task_of(root), folders=named).load("given")
    assert bench.class_names == ("spaniel", "wren", "tabby")
    assert bench.task.train.labels[0] == 1  # of bird/0.png
    shutil.copytree(root / "synthetic", root / "numbered")
    for number, name in enumerate(words):
        (root / "numbered" / name).rename(root / "numbered" / f"{number:02d}")
    again = replace(task_of(root), folders=replace(named, synthetic=root / "numbered")).load("given")
    birds = [one.synthetic.inputs[one.synthetic.labels == 1].float() for one in (bench.task, again.task)]
    assert torch.equal(*birds)


def test_tables_serve_as_splits(root: Path) -> None:
    expected = task_of(root).load("given").task.train
    images = open_images(root / "photos" / "train")
    (root / "photos" / "train").rename(root / "photos" / "all")
    (root / "photos").rename(root / "tables")
    table = {"path": [f"all/{one}" for one in images.ids], "label": [NAMES[label] for label in images.labels]}
    (root / "tables" / "train.csv").write_bytes(csv_bytes(table))
    found = replace(task_of(root), folders=Folders(root / "tables", root / "synthetic")).load("given").task.train
    assert_array_equal(found.labels, expected.labels)
    assert_array_equal(found.inputs.float(), expected.inputs.float())


# ---- bad input ----


def test_unreadable_images_are_left_out_counted_and_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "photos" / "train" / "cat" / "7.png").write_bytes(b"no picture")
    (root / "synthetic" / "dog" / "3.png").write_bytes(b"")
    bench = task_of(root).load("given", root / "given.csv")
    assert (len(bench.task.train.labels), len(bench.task.synthetic.labels)) == (89, 35)
    assert bench.true_labels is not None
    assert len(bench.true_labels) == 89
    said = capsys.readouterr().err
    assert "train: 1 unreadable images left out, cat/7.png; listed in" in said
    assert "synthetic: 1 unreadable images left out, dog/3.png; listed in" in said
    listed = [path.read_text() for path in root.glob("store/*/bad.csv")]
    assert sum("cat/7.png" in text and "expected JPEG" in text for text in listed) == 1


def misname(folder: str, old: str, new: str) -> Any:
    return lambda root: (root / folder / old).rename(root / folder / new)


def rewrite(change: Any) -> Any:
    return lambda root: (root / "given.csv").write_text(change((root / "given.csv").read_text()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "synthetic" / "dog"), "synthetic: .* every class, got none of 1: dog"),
        (misname("photos/test", "cat", "cats"), "images: .* classes bird, cat, dog in .*test, got 'cats' too"),
        (misname("synthetic", "cat", "tiger"), "the classes bird, cat, dog in .*synthetic, got 'tiger' too"),
        (rewrite(lambda text: "".join(text.splitlines(True)[:-5])), "given: .* every image .*, got none for 5: "),
        (rewrite(lambda text: re.sub(',"?dog"?\n', ",wolf\n", text)), "classes .* in .*given.csv, got 'wolf' too"),
        (misname("photos", "test", "unused"), "images: expected test .*, got none"),
        (misname(".", "synthetic", "elsewhere"), "synthetic: expected a folder"),
    ],
)
def test_what_is_missing_or_misnamed_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    damage(root)
    command = [text for name, value in FOLDERS.items() for text in (f"--{name}", str(root / value))]
    assert run_combo.main([*command, "--out", str(root / "runs"), "--device", "cpu", "pixels.resize=16"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said


def test_too_little_disk_is_said_before_the_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(InputError, match=r"out: expected 0\.13 MB of free disk for the pixels in .*, got 0\.00 MB"):
        task_of(root).load("given")
    assert not (root / "store").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "pixels: expected a block with resize"),
        ({"resize": 0}, "pixels.resize: expected a side"),
        ({"resize": 8, "crop": 9}, "pixels.crop: expected at most the resized side, 8, got 9"),
        ({"resize": 8, "size": 9}, "pixels: expected a block"),
        ({"resize": 8, "interpolation": "nearest"}, "pixels.interpolation: expected bilinear or bicubic"),
    ],
)
def test_an_unknown_size_is_named(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_resize(settings)


# ---- the pixels ----


@pytest.mark.parametrize("sides", [(20, 30), (30, 21), (24, 24), (16, 16)])
def test_pixels_are_those_of_torchvision(tmp_path: Path, sides: tuple[int, int]) -> None:
    from torchvision import transforms

    write(tmp_path / "photos", 2, 0, sides)
    images = open_images(tmp_path / "photos")
    for settings, steps in (
        ({"resize": 24, "crop": 16}, [transforms.Resize(24), transforms.CenterCrop(16)]),
        ({"resize": [18, 22]}, [transforms.Resize((18, 22))]),
    ):
        file, good = PixelStore(images, content_hashes(images), read_resize(settings), tmp_path / "store").open(0)
        expected = [np.asarray(transforms.Compose(steps)(images.image(row))) for row in range(6)]
        assert good.all()
        assert_array_equal(file.take(torch.arange(6)).permute(0, 2, 3, 1), np.stack(expected))


SCRIPT = """
import sys
from pathlib import Path
from benchmarks import pixels
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import open_images
pixels.MOST_ROWS, pixels.KEEP_SECONDS = 5, 0.0
images = open_images(sys.argv[1])
store = pixels.PixelStore(images, content_hashes(images), pixels.read_resize({"resize": 16}), Path(sys.argv[2]))
store.open(int(sys.argv[3]))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(root: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(root / "photos" / "train")]
    subprocess.run([*command, str(root / "whole"), "0"], cwd=ROOT, check=True)
    expected = content(root / "whole")
    [store] = [path.name for path in (root / "whole").iterdir()]
    journal, resumed = root / "out" / store / ".journal-0.jsonl", 0
    for kill, lines in enumerate((1, 6, 12)):  # of 18 blocks
        process = subprocess.Popen([*command, str(root / "out"), str(kill % 2)], cwd=ROOT)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed += journal.exists()
    assert resumed
    subprocess.run([*command, str(root / "out"), "0"], cwd=ROOT, check=True)
    assert content(root / "out") == expected


def test_a_damaged_row_is_decoded_again(root: Path) -> None:
    images = open_images(root / "photos" / "train")
    store = PixelStore(images, content_hashes(images), read_resize({"resize": 16}), root / "store")
    expected = store.open(0)[0].take(torch.arange(90))
    before = content(store.root)
    with open(store.root / pixels.ARRAY, "r+b") as array:
        array.seek(5000)
        array.write(bytes(100))
    assert content(store.root) != before
    pixels._opened.cache_clear()
    assert torch.equal(store.open(0)[0].take(torch.arange(90)), expected)
    assert content(store.root) == before


# ---- the tensor ----


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[MappedImages, torch.Tensor]:
    array = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    return MappedImages(MappedFile(tmp_path / "a.npy", array.shape, 128)), torch.from_numpy(array).permute(0, 3, 1, 2)


def test_images_in_a_file_are_a_tensor_of_which_rows_are_read_when_needed(
    mapped: tuple[MappedImages, torch.Tensor],
) -> None:
    images, expected = mapped
    assert (images.shape, images.dtype, images.device.type, len(images)) == (expected.shape, torch.uint8, "cpu", 50)
    rows = torch.tensor([3, 1, 1])
    for mine, theirs in (
        (images[10:20], expected[10:20]),
        (images[rows], expected[rows]),
        (images[torch.arange(50) % 2 == 0], expected[::2]),
        (images[5:][rows], expected[5:][rows]),
        (torch.split(images, 20)[2], expected[40:]),
    ):
        assert isinstance(mine, MappedImages)
        assert torch.equal(mine.float(), theirs.float())
    assert type(images.index_select(0, rows)) is torch.Tensor
    assert torch.equal(images.index_select(0, rows), expected[rows])
    assert torch.equal(images[:, 1], expected[:, 1])
    parts = [torch.tensor([4, 2]), torch.tensor([0]), torch.tensor([7, 7, 8]), torch.tensor([1])]
    for count in range(5):
        for batch, part in zip(images.batches(parts[:count]), parts[:count], strict=True):
            assert torch.equal(batch, expected[part])


def test_reading_all_of_a_large_file_leaves_the_process_small(tmp_path: Path) -> None:
    """Far more is read than may stay mapped; what the system keeps in its cache is not the process's."""
    script = """
import os, sys, torch
from third_party import mapped
mapped.KEPT_BYTES = 1 << 22
images = mapped.MappedImages(mapped.MappedFile(sys.argv[1], (2000, 128, 128, 3), 0))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, most = resident(), 0
for batch in images.batches(torch.randperm(2000).split(20)):
    most = max(most, resident())
print(most - before)
"""
    with open(tmp_path / "pixels", "wb") as file:
        file.truncate(2000 * 128 * 128 * 3)  # 98 MB
    command = [sys.executable, "-c", script, str(tmp_path / "pixels")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 40e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_all_rows_or_batches(
    mapped: tuple[MappedImages, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, expected = mapped
    rows = torch.tensor([3, 1], device="cuda")
    assert torch.equal(images.on(torch.device("cuda")).cpu(), expected)
    monkeypatch.setattr("third_party.mapped.fits", lambda size, device: False)
    there = images.on(torch.device("cuda"))
    assert isinstance(there, MappedImages)
    assert torch.equal(there[rows].float().cpu(), expected[[3, 1]].float())
    for batch in there.batches([rows, rows, rows]):
        assert torch.equal(batch.cpu(), expected[[3, 1]])
