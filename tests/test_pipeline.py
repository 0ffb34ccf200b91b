"""From a folder of images to an artifact, a page and a new folder; killed anywhere, the same bytes in the end."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from adapters.lra_diffusion import GLYPH_CLIP
from synth_refine import InputError, cli, pipeline
from synth_refine._io import ray as on_ray
from synth_refine._io.csv import csv_bytes, read_csv
from synth_refine.images import encoders
from synth_refine.images.encoders import encoder_by_name
from synth_refine.images.listing import Images
from synth_refine.labels.artifact import read_artifact
from synth_refine.labels.files import read_labels
from synth_refine.pipeline import run
from synth_refine.refine import front
from synth_refine.refine.prototypes import class_prototypes
from synth_refine.settings import Settings
from synth_refine.summary import summarized
from synth_refine.synthetic.glyphs import Glyphs
from synth_refine.synthetic.jobs import Job

CLASSES = ("A", "O", "X")
COUNT = 240


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses nothing the system has taken over, so waiting for the disk proves nothing here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class of 240 letters, 30 % of them in the next class's folder; their names hold the truth."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        true = number % 3
        given = (true + 1) % 3 if rng.random() < 0.3 else true
        image = Glyphs(32).generate([Job(true, number, 99, "", CLASSES[true], "")])[0]
        assert image is not None
        folder = root / "photos" / CLASSES[given]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03d}-{true}.png")
        if number < 30:
            (root / "drawn" / CLASSES[true]).mkdir(parents=True, exist_ok=True)
            image.rotate(90).save(root / "drawn" / CLASSES[true] / f"{number}.png")
    (root / "classes.yaml").write_text("- A\n- O\n- X\n")
    return root / "photos"


@pytest.fixture
def source(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the working folder."""
    shutil.copytree(photos.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def noise(folder: Path) -> float:
    """Share of the images in a folder that is not of their class."""
    wrong = [CLASSES[int(path.stem.split("~")[0][-1])] != path.parent.name for path in folder.rglob("*.png")]
    assert len(wrong) == COUNT
    return sum(wrong) / COUNT


def test_from_the_folder_to_the_page_and_back(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(source / "photos")
    command = f"run photos --classes classes.yaml --out result --model glyphs --per-class 30 --encoder {GLYPH_CLIP} "
    command += "--threshold 0"
    assert cli.main([*command.split(), "--workers", "0", "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert "synth-refine review result/refined decisions.csv --out reviewed" in said.err.replace(str(source) + "/", "")
    assert summary["count"] == COUNT
    assert said.err.splitlines()[-1].startswith("  synth-refine export ")  # no doubt is said again behind what is next
    assert summary["changed"] >= 40
    assert summary["synthetic"] == 90
    assert 0.5 <= summary["synthetic_accuracy"] <= 1
    wrong = noise(source / "photos")
    assert summary["noise_before"]["value"] == pytest.approx(wrong, abs=0.1)
    assert summary["noise_after"]["value"] < wrong / 2
    page = (source / "result" / "report" / "report.html").read_text()
    changes = read_csv("changes", source / "result" / "refined" / "changes.csv")
    assert all(one in page for one in changes["id"])
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert shown["folder"] == "../../photos/"
    assert 2 in shown["kind"]  # suspicious kept labels
    assert None not in shown["odds"]
    assert content(source / "photos") == before

    written = content(source / "result")
    shutil.rmtree(source / "result" / "report")
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: pytest.fail("report needs no encoder"))
    assert cli.main(["report", "result", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert content(source / "result") == written
    assert cli.main(["report", "result", "--single-file", "--audit", "5"]) == 0
    assert "report.html will hold" in capsys.readouterr().err

    changed = [row for row, action in enumerate(changes["action"]) if action == "change"]
    table: dict[str, list[object]] = {
        "id": [changes["id"][row] for row in changed],
        "given": [CLASSES[int(changes["old"][row])] for row in changed],
        "decision": ["accept"] * len(changed),
        "label": [CLASSES[int(changes["new"][row])] for row in changed],
    }
    table["decision"][0], table["label"][0] = "reject", table["given"][0]
    (source / "decisions.csv").write_bytes(csv_bytes(table))
    assert cli.main(["review", "result/refined", "decisions.csv", "--out", "reviewed"]) == 0
    assert cli.main(["apply", "reviewed", "--images", "photos", "--out", "new"]) == 0
    assert noise(source / "new") < noise(source / "photos") / 2
    assert (source / "new" / str(table["id"][0])).exists()
    assert cli.main(["verify", "reviewed", "--images", "new"]) == 0
    assert cli.main(["revert", "reviewed", "--images", "new", "--out", "again"]) == 0
    assert content(source / "again") == before == content(source / "photos")
    assert cli.main(["apply", "reviewed", "--given", "result/images.csv", "--out", "labels.csv"]) == 0
    names = read_csv("labels", source / "labels.csv")
    assert names["label"][names["id"].index(str(table["id"][1]))] == table["label"][1]
    assert changes["new_class"] == [CLASSES[int(one)] for one in changes["new"]]

    capsys.readouterr()
    for command, code, message in (
        ("apply reviewed --images new --out more", 3, "but new holds them where apply puts them: already applied?"),
        ("revert reviewed --images photos --out more", 3, "but photos holds them as given: not applied yet?"),
        ("verify reviewed --images photos", 1, "but photos holds them as given: not applied yet?"),
        ("apply decisions.csv --images photos --out more", 3, "`synth-refine review` makes one of decisions"),
    ):
        assert cli.main(command.split()) == code
        assert message in capsys.readouterr().err
    moved = next((source / "new" / "A").iterdir())
    moved.rename(source / "new" / "O" / f"moved-{moved.name}")
    assert cli.main(["revert", "reviewed", "--images", "new", "--out", "more"]) == 3
    message = f"images: expected every image of new where apply puts it, got none at A/{moved.name}"
    assert capsys.readouterr().err == f"synth-refine: {message}\n"
    (source / "one.csv").write_bytes(csv_bytes({name: cells[:1] for name, cells in table.items()}))
    assert cli.main(["review", "result/refined", "one.csv", "--out", "begun"]) == 0
    assert json.loads(capsys.readouterr().out)["undecided"] == len(changes["id"]) - 1


class Pixels:
    """Features are coarse pixels."""

    id, preprocess = "pixels", None

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


def test_bad_images_keep_their_label_and_are_listed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    (source / "photos" / "A" / "bad.png").write_bytes(b"<html>")
    for refiner in ("paper", "anchored"):
        settings = Settings("photos", refiner, model="glyphs", refiner=refiner, per_class=6, workers=0)
        assert run(settings).bad == 1  # type: ignore[union-attr]
        artifact = read_artifact(source / refiner / "refined")
        row = (artifact.ids or []).index("A/bad.png")
        assert artifact.labels[row] == 0
        assert artifact.action[row] == "abstain"
        table = read_csv("bad", source / refiner / "bad.csv")
        assert (table["set"], table["id"]) == (["images"], ["A/bad.png"])
        assert "an HTML page" in table["reason"][0]
    kept = content(source / "photos")
    for name, data in (("mended", (source / "photos" / "A" / "000-0.png").read_bytes()), ("gone", None)):
        bad = source / "photos" / "A" / "bad.png"
        bad.unlink() if data is None else bad.write_bytes(data)
        before = content(source / "photos")
        assert before != kept
        assert cli.main(["apply", "anchored/refined", "--images", "photos", "--out", name]) == 0
        assert content(source / name).get("A/bad.png") == data
        assert cli.main(["revert", "anchored/refined", "--images", name, "--out", f"{name}-back"]) == 0
        assert content(source / f"{name}-back") == before


def test_a_saved_config_runs_again_and_options_come_first(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    first = ["run", "photos", "--out", "out", "--model", "glyphs", "--per-class", "6", "--refiner", "paper"]
    assert cli.main([*first, "--workers", "0", "--threshold", "0.4"]) == 0
    expected = content(source / "out")
    assert yaml.safe_load(expected["config.yaml"])["threshold"] == 0.4
    shutil.copy(source / "out" / "config.yaml", source / "again.yaml")
    shutil.rmtree(source / "out")
    assert cli.main(["run", "--config", "again.yaml"]) == 0
    assert content(source / "out") == expected
    for more in ([], ["--dry-run"]):
        assert cli.main(["run", "--config", "again.yaml", "--per-class", "7", *more]) == 3
    assert "got other per_class: 7 for 6" in capsys.readouterr().err
    assert content(source / "out") == expected
    assert cli.main(["run", "--config", "again.yaml", "--threshold", "auto", "--out", "other"]) == 0
    assert yaml.safe_load((source / "other" / "config.yaml").read_text())["threshold"] == "auto"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    capsys.readouterr()
    assert cli.main(["report", "other"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{COUNT} images of 3 classes, 18 synthetic images"
    assert any(line.startswith("look first at ") for line in lines)
    assert len(lines) <= 20


def test_another_threshold_is_tried_in_the_same_folder_and_nothing_is_embedded_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded: list[int] = []

    class Counting(Pixels):
        def embed(self, images: Tensor) -> Tensor:
            embedded.append(len(images))
            return super().embed(images)

    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Counting())
    begin = ["run", "photos", "--workers", "0", "--refiner", "paper"]
    command = [*begin, "--model", "glyphs", "--per-class", "6"]
    assert cli.main([*command, "--threshold", "0.4", "--out", "out"]) == 0
    before, count = content(source / "out"), sum(embedded)
    assert count == COUNT + 18
    for _ in range(2):
        assert cli.main([*command, "--threshold", "0.7", "--out", "out"]) == 0
        after = content(source / "out")
        assert {name: data for name, data in after.items() if not name.startswith("with-")} == before
    assert cli.main(["report", "out/with-threshold-0.7"]) == 0
    assert content(source / "out") == after
    left, right = (read_artifact(f"out/{name}refined") for name in ("", "with-threshold-0.7/"))
    assert len(left.changed) > len(right.changed)
    assert right.run["settings"]["threshold"] == 0.7
    assert cli.main([*command, "--threshold", "0.4", "--seed", "1", "--out", "out"]) == 3  # other synthetic images
    assert cli.main([*begin, "--out", "else", "--cache", "out/features", "--synthetic", "out/synthetic"]) == 0
    assert sum(embedded) == count
    assert not (source / "else" / "features").exists()
    (source / "out" / "summary.json").unlink()
    assert cli.main([*command, "--threshold", "0.8", "--out", "out"]) == 3
    assert "out: expected a finished run in" in capsys.readouterr().err


def test_synthetic_images_of_something_else_change_nothing_and_can_be_looked_at(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    rng = np.random.default_rng(0)
    for number in range(60):
        (source / "noise" / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            source / "noise" / CLASSES[number % 3] / f"{number}.png"
        )
    rng.shuffle(paths := sorted((source / "photos").rglob("*.png")))
    for place, path in enumerate(paths):  # labels that say nothing: the same as synthetic images that do not
        path.rename(source / "photos" / CLASSES[place % 3] / f"{place}-{path.name}")
    assert cli.main(["run", "photos", "--synthetic", "noise", "--out", "out", "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert "the synthetic images show your classes" in said.err
    assert json.loads(said.out)["changed"] == 0
    assert (source / "out" / "report" / "report.html").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_the_buffers_of_a_batch_serve_the_next_one(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page fault per page of every buffer of every batch took most of the time of a small network."""
    pages = 1 << 14  # above what glibc keeps by itself

    class Large(Pixels):
        def embed(self, images: Tensor) -> Tensor:
            return super().embed(images) + torch.ones(pages * resource.getpagesize() // 4).mean()

    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Large())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert cli.main(["embed", "photos", "--out", "real", "--workers", "0"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4 * pages  # of 15 batches


def test_classes_with_one_prompt_are_doubted(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("birds.yaml").write_text("hen: bird\nowl: bird\ncat: cat\n")
    assert cli.main(["generate", "--classes", "birds.yaml", "--out", "g", "--model", "glyphs", "--per-class", "1"]) == 0
    assert "warning: the classes hen, owl have one prompt, 'bird'" in capsys.readouterr().err


def test_a_result_can_be_made_again_from_any_folder(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    first = ["run", "photos", "--out", "out", "--model", "glyphs", "--per-class", "6", "--refiner", "paper"]
    assert cli.main([*first, "--workers", "0"]) == 0
    expected = content(source / "out")
    assert yaml.safe_load(expected["config.yaml"])["out"] == str(source / "out")
    (source / "elsewhere").mkdir()
    monkeypatch.chdir(source / "elsewhere")
    assert cli.main(["run", "--config", "../out/config.yaml"]) == 0
    assert content(source / "out") == expected
    assert cli.main(["report", "../out"]) == 0
    assert content(source / "out") == expected
    assert not content(source / "elsewhere")


def test_changed_images_or_classes_are_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was applied could not be reverted once the artifact is replaced."""
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    run_it = ["run", "photos", "--classes", "classes.yaml", "--synthetic", "drawn", "--out", "out"]
    run_it += ["--refiner", "paper", "--workers", "0"]
    embed_it = ["embed", "photos", "--classes", "classes.yaml", "--out", "embedded", "--workers", "0"]
    assert cli.main(run_it) == cli.main(embed_it) == 0
    expected = content(source / "out"), content(source / "embedded")
    first = next((source / "photos" / "A").iterdir())
    data, names = first.read_bytes(), Path("classes.yaml")
    for change, undo in (
        (lambda: first.rename("one"), lambda: Path("one").rename(first)),
        (lambda: first.rename("photos/O/0.png"), lambda: Path("photos/O/0.png").rename(first)),
        (lambda: Image.new("RGB", (32, 32)).save(first), lambda: first.write_bytes(data)),
        (lambda: names.write_text("- O\n- A\n- X\n"), lambda: names.write_text("- A\n- O\n- X\n")),
    ):
        change()
        for command, name in ((run_it, "out"), (embed_it, "embedded")):
            assert cli.main(command) == 3
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("synth-refine: out: expected the ")
            assert f"{name} was begun with" in said
        assert (content(source / "out"), content(source / "embedded")) == expected
        undo()
    assert cli.main(run_it) == cli.main(embed_it) == 0
    assert (content(source / "out"), content(source / "embedded")) == expected


def test_foreign_folders_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    (source / "home").mkdir()
    foreign = source / "home" / ".editor.tmp"
    foreign.touch()
    settings = Settings("photos", "home", model="glyphs", per_class=6, workers=0)
    (source / "home" / "letter.txt").touch()
    with pytest.raises(InputError, match=r"out: expected a new or empty folder, .* holds letter.txt"):
        run(settings)
    assert foreign.exists()
    with pytest.raises(InputError, match="out: expected a folder outside photos"):
        run(replace(settings, out="photos/result"))


def test_dry_run_checks_and_writes_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(source)
    command = f"run photos --out out --model glyphs --encoder {GLYPH_CLIP} --dry-run --json"
    assert cli.main(command.split()) == 0
    assert json.loads(capsys.readouterr().out)["count"] == COUNT
    assert content(source) == before
    assert cli.main([*command.split(), "--classes", "missing.yaml"]) == 3
    (source / "out").mkdir()
    (source / "out" / "mine.txt").touch()
    assert cli.main(command.split()) == 3
    assert "out: expected a new or empty folder" in capsys.readouterr().err
    monkeypatch.setattr(Glyphs, "load", lambda _: (_ for _ in ()).throw(InputError("model: not here")))
    assert cli.main([*command.split(), "--out", "other"]) == 3
    assert "model: not here" in capsys.readouterr().err


def test_embedded_images_are_what_refine_takes(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--encoder", str(GLYPH_CLIP), "--device", "cpu", "--workers", "0"]
    assert cli.main(["generate", "--classes", "classes.yaml", "--out", "glyphs", "--model", "glyphs"]) == 0
    assert cli.main(["embed", "photos", "--out", "real", *options]) == 0
    assert cli.main(["embed", "glyphs", "--out", "synthetic", *options]) == 0
    command = "refine --refiner anchored --features real/features.npy --given real/given.csv --out refined"
    synthetic = "--synthetic synthetic/features.npy --synthetic-labels synthetic/given.csv"
    assert cli.main([*command.split(), *synthetic.split()]) == 0
    assert cli.main(["apply", "refined", "--images", "photos", "--out", "new"]) == 0
    assert noise(source / "new") < noise(source / "photos") / 2
    assert cli.main(["revert", "refined", "--images", "new", "--out", "again"]) == 0
    assert content(source / "again") == content(source / "photos")
    Path("two.yaml").write_text("- A\n- O\n")
    assert cli.main([*command.split(), *synthetic.split(), "--classes", "two.yaml", "--dry-run"]) == 3
    assert capsys.readouterr().err.endswith("by which the given labels are numbered, got 'A', 'O' in two.yaml\n")
    artifact = read_artifact(source / "refined")
    truth = np.array([int(Path(one).stem[-1]) for one in artifact.ids or []])
    assert (artifact.labels != truth).mean() < (artifact.given != truth).mean() / 2
    Path("config.yaml").write_text(yaml.safe_dump({"encoder": str(GLYPH_CLIP), "workers": 0, "threshold": 0.5}))
    monkeypatch.setattr("synth_refine._io.progress.LINE_SECONDS", 0.0)
    capsys.readouterr()
    same = ["embed", "photos", "--out", "same", "--config", "config.yaml", "--device", "cpu"]
    assert cli.main(same) == 0
    assert re.search(r"^embedding: .*240/240 \[", capsys.readouterr().err, re.M)  # a line, since this is no terminal
    assert Path("same/features.npy").read_bytes() == Path("real/features.npy").read_bytes()
    assert cli.main([*same, "--batch-rows", "240"]) == 3  # other batches round otherwise
    shutil.rmtree("same")
    assert cli.main([*same, "--batch-rows", "240"]) == 0
    np.testing.assert_allclose(np.load("same/features.npy"), np.load("real/features.npy"), atol=1e-4)
    before = content(source)
    assert cli.main(["embed", "photos", "--out", "real", *options]) == 0  # the same again
    capsys.readouterr()
    for out, message in (
        ("refined", "out: expected a new or empty folder"),
        ("photos/A", "out: expected a folder outside"),
    ):
        assert cli.main(["embed", "photos", "--out", out, *options]) == 3
        assert message in capsys.readouterr().err
    assert content(source) == before


@pytest.mark.parametrize("refiner", ["anchored", "paper"])
def test_every_command_gives_the_same_labels(refiner: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One front door: the same features, given labels and synthetic features, whoever asks."""
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    given = "--classes classes.yaml --workers 0"
    for command in (
        "generate --classes classes.yaml --out generated --model glyphs --per-class 30 --seed 1",
        f"embed photos --out real {given}",
        f"embed generated --out synthetic {given}",
    ):
        assert cli.main(command.split()) == 0
    np.save("given.npy", read_labels("real/given.csv"))
    synthetic = "--synthetic synthetic/features.npy --synthetic-labels synthetic/given.csv"
    more, instead = f"--refiner {refiner}", synthetic
    if refiner == "paper":
        labels = read_labels("synthetic/given.csv")
        np.save("prototypes.npy", class_prototypes(np.load("synthetic/features.npy"), labels, 3))
        np.save("logits.npy", np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32))
        more, instead = f"{more} --logits logits.npy --threshold 0.4", "--prototypes prototypes.npy"
    for command in (
        f"run photos --synthetic generated --out out {given} {more}",
        f"refine --features real/features.npy --given real/given.csv {synthetic} {more} --out refined",
        f"scale --features real/features.npy --given given.npy {instead} {more} --shard-rows 100 --out scaled",
    ):
        assert cli.main(command.split()) == 0
    run, refined, scaled = (read_artifact(folder).labels for folder in ("out/refined", "refined", "scaled"))
    assert len(read_artifact("refined").changed) > 20
    assert run.tolist() == refined.tolist()
    assert scaled.tolist() == refined.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner": "other"}, "refiner: expected anchored or paper, got 'other'"),
        ({"templates": ()}, "templates: expected a list of texts with {category} where the class goes, got "),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda, got 'gpu'"),
        ({"device": "cuda:99"}, "device: expected cpu where torch finds no GPU, got cuda:99"),
        ({"seed": -1}, "seed: expected a whole number of 0 or more, got -1"),
        ({"encoder": "what"}, "encoder: expected open_clip:MODEL/TAG, timm:MODEL or a folder"),
        ({"images": "nowhere"}, "images: expected a folder, .csv, .tar or .parquet, got nothing: nowhere"),
        ({"model": "glyps"}, "^model: expected glyphs, .* got 'glyps'$"),
        ({"synthetic": "nowhere"}, "^synthetic: expected a folder, .csv, .tar or .parquet, got nothing: nowhere"),
        ({"synthetic": "two"}, "synthetic: expected an image of every class, got none of X"),
    ],
)
def test_bad_settings_are_one_clear_line(
    source: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "AO":
        (source / "two" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(source / "two" / name / "1.png")
    if "encoder" not in settings:
        monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    with pytest.raises(InputError, match=message) as caught:
        run(Settings(**{"images": "photos", "out": "out", "workers": 2, **settings}))
    assert "\n" not in str(caught.value)


def test_encoders_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder_by_name(str(GLYPH_CLIP)).embed(torch.zeros((1, 3, 32, 32), dtype=torch.uint8)).shape == (1, 64)
    asked: list[tuple[Any, ...]] = []
    for name in ("open_clip_encoder", "timm_encoder"):
        monkeypatch.setattr(encoders, name, lambda *arguments, device: asked.append((*arguments, device)))
    for name in ("open_clip:ViT-L-14-quickgelu/openai", "open_clip:hf-hub:a/b", "timm:resnet18.a1_in1k"):
        encoder_by_name(name)
    encoder_by_name("timm:resnet18", "w.safetensors", device="cuda")
    assert asked == [
        ("ViT-L-14-quickgelu", "openai", "cpu"),
        ("hf-hub:a/b", None, "cpu"),
        ("resnet18.a1_in1k", None, "cpu"),
        ("resnet18", "w.safetensors", "cuda"),
    ]


def blobs(count: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (3 * np.eye(3, 6)[labels] + rng.normal(size=(count, 6))).astype(np.float32), labels


def embedded(features: Any, labels: Any) -> pipeline.Embedded:
    """Images that nobody has to decode."""
    ids = [f"{row}.png" for row in range(len(labels))]
    classes = tuple("abcde"[: labels.max() + 1])
    return pipeline.Embedded(Images(ids, labels, classes, lambda _: b"", "csv"), features, [""] * len(ids))


def test_what_cannot_be_estimated_is_null_and_doubts_come_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real = embedded(rng.normal(size=(40, 16)).astype(np.float32), np.arange(40) % 5)
    synthetic = embedded(rng.normal(size=(100, 16)).astype(np.float32), np.repeat(np.arange(5), 20))
    result, artifact = pipeline.refined(real, synthetic, Settings(), {}, lambda _: None)
    summary = summarized(Path("out"), artifact, result, 0, 100)
    assert summary.synthetic_accuracy is not None
    assert summary.synthetic_accuracy < 0.5
    assert (summary.noise_before, summary.noise_after) == (None, None)
    assert summary.lines()["noise before"] == "not estimated"

    said: list[str] = []
    real, synthetic = embedded(*blobs(300, 0)), embedded(*blobs(60, 1))
    pipeline.refined(real, synthetic, Settings(refiner="paper"), {}, said.append)
    assert said == []
    turned = embedded(synthetic.features, (synthetic.images.labels + 1) % 3)
    monkeypatch.setattr(front, "refine_labels", lambda *_, **__: pytest.fail(said[0]))
    with pytest.raises(pytest.fail.Exception, match="warning: given labels and nearest prototypes name the same class"):
        pipeline.refined(real, turned, Settings(refiner="paper"), {}, said.append)


def test_the_engine_is_checked_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(str(tmp_path / "none"), str(tmp_path / "out"), engine="ray")
    monkeypatch.setattr(on_ray, "find_spec", lambda _: None)
    missing = r"engine: ray is not installed; install it with `pip install 'synth-refine\[ray\]'`$"
    with pytest.raises(InputError, match=missing):
        run(settings, dry_run=True)
    with pytest.raises(InputError, match="engine: expected local or ray, got 'dask'"):
        pipeline.embed(replace(settings, engine="dask"))


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_a_cluster_takes_gpus_only_where_the_device_is_one(
    source: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int
) -> None:
    """The driver itself needs no GPU: it has the encoder for its id alone."""

    class Rows(list[Any]):
        context = SimpleNamespace()

        def map_batches(self, _: Any, **options: Any) -> Rows:
            return Rows([*self, options.get("num_gpus", 0)])

        def iter_rows(self) -> Any:
            raise InputError(f"{self[-1]} GPUs, driver on {devices}")

    data = SimpleNamespace(from_items=lambda *_, **__: Rows(), ActorPoolStrategy=lambda **_: None)
    cloudpickle = SimpleNamespace(dumps=lambda _: b"")
    ray = SimpleNamespace(data=data, cloudpickle=cloudpickle, cluster_resources=lambda: {"GPU": 2.0})
    devices: list[str] = []
    monkeypatch.setattr(on_ray, "find_spec", lambda _: True)
    monkeypatch.setattr(on_ray, "_connected", lambda _: ray)
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, device: devices.append(device) or Pixels())
    settings = Settings("photos", "features", classes="classes.yaml", engine="ray", device=device)
    with pytest.raises(InputError, match=rf"^{gpus} GPUs, driver on \['cpu'\]$"):
        pipeline.embed(settings)


def test_a_dry_run_names_the_engine_and_another_one_may_go_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    monkeypatch.setattr(on_ray, "find_spec", lambda _: True)
    arguments = ["run", "photos", "--classes", "classes.yaml", "--synthetic", "drawn", "--out", "result"]
    arguments += ["--refiner", "paper"]
    on_cluster = [*arguments, "--engine", "ray", "--address", "head:6379"]
    assert cli.main([*on_cluster, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["engine"], said["address"]) == ("ray", "head:6379")
    assert not (source / "result").exists()
    assert cli.main([*arguments, "--workers", "0"]) == 0
    features = content(source / "result" / "features")
    assert cli.main(on_cluster) == 0  # nothing is missing, so no cluster is asked for
    assert content(source / "result" / "features") == features
    assert cli.main(["report", "result"]) == 0


def test_one_of_two_label_columns_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((32, 32)).save(picture, "PNG")
    pq.write_table(pa.table({"img": [picture.getvalue()], "label": ["cat"], "labels": ["pet"]}), "a.parquet")
    command = ["embed", "a.parquet", "--encoder", str(GLYPH_CLIP), "--workers", "0"]
    assert cli.main([*command, "--out", "no"]) == 3
    assert "label: expected one column of labels in a.parquet, got label, labels; name one" in capsys.readouterr().err
    assert cli.main([*command, "--label", "labels", "--out", "out"]) == 0
    assert Path("out/classes.yaml").read_text() == "- pet\n"
