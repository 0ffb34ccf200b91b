"""From a folder of images to an artifact, a page and a new folder; killed anywhere, the same bytes in the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
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
from synth_refine.images.sources import Images
from synth_refine.labels.artifact import Artifact, WrongBase, WrongIds, read_artifact, record
from synth_refine.labels.trees import apply_tree, new_places, revert_tree
from synth_refine.pipeline import Settings, given_logits, paper_thresholds, run
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
        image = Glyphs(32).draw([Job(true, number, 99, "", CLASSES[true], "")])[0]
        assert image is not None
        folder = root / "photos" / CLASSES[given]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03d}-{true}.png")
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


def test_from_the_folder_to_the_page_and_back(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(source / "photos")
    command = f"run photos --classes classes.yaml --out result --model glyphs --per-class 30 --encoder {GLYPH_CLIP} "
    command += "--threshold 0"
    assert cli.main([*command.split(), "--workers", "0", "--device", "cpu", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["count"] == COUNT
    assert summary["changed"] >= 40
    assert summary["synthetic"] == 90
    assert 0.5 <= float(summary["notes"]["domain gap (0.5 or less none, 1 full)"]) <= 1
    page = (source / "result" / "report" / "report.html").read_text()
    changes = read_csv("changes", source / "result" / "refined" / "changes.csv")
    assert all(one in page for one in changes["id"])
    assert content(source / "photos") == before

    written = content(source / "result")
    shutil.rmtree(source / "result" / "report")
    assert cli.main(["report", "result", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert content(source / "result") == written

    changed = [row for row, action in enumerate(changes["action"]) if action == "change"]
    table: dict[str, list[object]] = {
        "id": [changes["id"][row] for row in changed],
        "given": [CLASSES[int(changes["old"][row])] for row in changed],
        "decision": ["accept"] * len(changed),
        "label": [CLASSES[int(changes["new"][row])] for row in changed],
    }
    table["decision"][0], table["label"][0] = "reject", table["given"][0]
    (source / "decisions.csv").write_bytes(csv_bytes(table))
    decisions = ["--decisions", "decisions.csv"]
    assert cli.main(["apply", "result/refined", "--images", "photos", "--out", "new", *decisions]) == 0
    assert noise(source / "new") < noise(source / "photos") / 2
    assert (source / "new" / str(table["id"][0])).exists()
    assert cli.main(["revert", "result/refined", "--images", "new", "--out", "again", *decisions]) == 0
    assert content(source / "again") == before == content(source / "photos")


class Pixels:
    """Features are coarse pixels."""

    id, preprocess = "pixels", None

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.mark.slow
def test_killed_at_every_third_write_and_started_again_gives_the_same_bytes(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    for path in sorted((source / "photos").rglob("*.png"), key=lambda path: path.name)[36:]:
        path.unlink()
    (source / "photos" / "A" / "bad.png").write_bytes(b"no image")
    settings = Settings("photos", "out", "classes.yaml", model="glyphs", refiner="paper", per_class=4, workers=0)
    run(settings)
    expected = content(source / "out")
    assert {name.split("/")[0] for name in expected} >= {"config.yaml", "refined", "report", "synthetic", "features"}
    replace, deaths = os.replace, 0
    for point in range(0, 200, 3):
        shutil.rmtree(source / "out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child only computes and writes files
            child = os.fork()
        if child == 0:
            left = point

            def counted(origin: Any, target: Any) -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                replace(origin, target)

            os.replace = counted
            try:
                run(settings)
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        run(settings)
        assert content(source / "out") == expected
        if not os.WIFSIGNALED(status):
            break
        deaths += 1
    assert deaths > 10
    assert not [name for name in expected if name.endswith(".tmp")]


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
    assert cli.main(["run", "--config", "again.yaml", "--threshold", "auto"]) == 3
    assert "got another threshold: 'auto' for 0.4; take another folder" in capsys.readouterr().err
    assert content(source / "out") == expected
    assert cli.main(["run", "--config", "again.yaml", "--threshold", "auto", "--out", "other"]) == 0
    assert yaml.safe_load((source / "other" / "config.yaml").read_text())["threshold"] == "auto"
    assert "changed: " in capsys.readouterr().out


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


def test_patterns_of_files_are_recorded_with_their_folder(source: Path) -> None:
    (source / "shards").mkdir()
    (source / "shards" / "0.tar").touch()
    for images, expected in (
        ("shards/*.tar", str(source / "shards" / "*.tar")),
        ("nothing/*.tar", "nothing/*.tar"),
    ):
        assert yaml.safe_load(pipeline._config(Settings(images, "out")))["images"] == expected


def test_foreign_folders_and_class_names_that_lead_out_are_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    (source / "home").mkdir()
    foreign = source / "home" / ".editor.tmp"
    foreign.touch()
    settings = Settings("photos", "home", model="glyphs", per_class=6, workers=0)
    (source / "home" / "letter.txt").touch()
    with pytest.raises(InputError, match=r"out: expected an empty folder .* holds letter.txt"):
        run(settings)
    assert foreign.exists()
    with pytest.raises(InputError, match="out: expected a folder outside photos"):
        run(replace(settings, out="photos/result"))
    with pytest.raises(InputError, match="per_class: expected 1 or more, got 0"):
        run(replace(settings, per_class=0), dry_run=True)
    given = np.array([0, 1])
    artifact = record(
        given, given[::-1], ids=["A/0.png", "B/0.png"], settings={"source": "folder", "classes": ["A", "../../B"]}
    )
    with pytest.raises(InputError, match="artifact: expected names that a folder can have"):
        new_places(artifact)


def test_dry_run_checks_and_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(source)
    command = f"run photos --out out --model glyphs --encoder {GLYPH_CLIP} --dry-run --json"
    assert cli.main(command.split()) == 0
    assert json.loads(capsys.readouterr().out)["count"] == COUNT
    assert content(source) == before
    assert cli.main([*command.split(), "--classes", "missing.yaml"]) == 3


def test_embedded_images_are_what_refine_takes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--encoder", str(GLYPH_CLIP), "--device", "cpu", "--workers", "0"]
    assert cli.main(["generate", "--classes", "classes.yaml", "--out", "drawn", "--model", "glyphs"]) == 0
    assert cli.main(["embed", "photos", "--out", "real", *options]) == 0
    assert cli.main(["embed", "drawn", "--out", "synthetic", *options]) == 0
    command = "refine --refiner anchored --features real/features.npy --given real/given.csv --out refined"
    anchors = "--anchors synthetic/features.npy --anchor-labels synthetic/given.csv"
    assert cli.main([*command.split(), *anchors.split()]) == 0
    capsys.readouterr()
    apply = ["apply", "refined", "--images", "photos", "--out", "new"]
    assert cli.main(apply) == 3
    message = (
        "synth-refine: artifact: expected one with class names, .* that `embed` wrote as --classes, got none; .*\n"
    )
    assert re.fullmatch(message, capsys.readouterr().err)
    shutil.rmtree("refined")
    assert cli.main([*command.split(), *anchors.split(), "--classes", "real/classes.yaml"]) == 0
    assert cli.main(apply) == 0
    assert noise(source / "new") < noise(source / "photos") / 2
    assert cli.main(["revert", "refined", "--images", "new", "--out", "again"]) == 0
    assert content(source / "again") == content(source / "photos")
    Path("two.yaml").write_text("- A\n- O\n")
    assert cli.main([*command.split(), *anchors.split(), "--classes", "two.yaml", "--dry-run"]) == 3
    assert capsys.readouterr().err.endswith("synth-refine: classes: expected 3 names in two.yaml, got 2\n")
    artifact = read_artifact(source / "refined")
    truth = np.array([int(Path(one).stem[-1]) for one in artifact.ids or []])
    assert (artifact.labels != truth).mean() < (artifact.given != truth).mean() / 2
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner": "other"}, "refiner: expected anchored or paper, got 'other'"),
        ({"threshold": "high"}, "threshold: expected auto or a number from -1 to 1, got 'high'"),
        ({"threshold": 5.0}, "threshold: expected auto or a number from -1 to 1, got 5.0"),
        ({"device": "gpu"}, "device: expected one of torch such as cpu or cuda:1, got 'gpu'"),
        ({"device": "cuda:99"}, "device: expected cpu where torch finds no GPU, got cuda:99"),
        ({"seed": -1}, "seed, workers: expected 0 or more, got -1 and 2"),
        ({"encoder": "what"}, "encoder: expected open_clip:MODEL/TAG, timm:MODEL or a folder"),
        ({"images": "nowhere"}, "images: expected a folder, .csv, .tar or .parquet, got nothing: nowhere"),
        ({"model": "glyps"}, "^model: expected glyphs, .* got 'glyps'$"),
        ({"synthetic": "nowhere"}, "^synthetic: expected a folder, .csv, .tar or .parquet, got nothing: nowhere"),
        ({"synthetic": "drawn"}, "synthetic: expected an image of every class, got none of X"),
    ],
)
def test_bad_settings_are_one_clear_line(
    source: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "AO":
        (source / "drawn" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(source / "drawn" / name / "1.png")
    if "encoder" not in settings:
        monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    with pytest.raises(InputError, match=message) as caught:
        run(Settings(**{"images": "photos", "out": "out", "model": "glyphs", "workers": 2, **settings}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["images: 3\n", "what: 1\n", "- a\n", "seed: true\n", "templates: a photo\n", "a: ["])
def test_bad_configs_are_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match="config: ") as caught:
        pipeline.read_config(str(tmp_path / "c.yaml"))
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


def test_logits_of_a_row_come_from_heads_that_did_not_see_it() -> None:
    features, _ = blobs(300, 0)
    given = np.random.default_rng(1).integers(0, 3, 300)  # nothing to learn: only memory could tell them
    logits, _ = given_logits(features, given, features[:3], 3)
    assert (logits.argmax(axis=1) == given).mean() < 0.45
    features[5] = np.nan
    logits, spoken = given_logits(features, blobs(300, 0)[1], features[:3], 3)
    assert np.isnan(logits[5]).all()
    assert (np.delete(logits.argmax(axis=1) == blobs(300, 0)[1], 5)).mean() > 0.9
    assert spoken.argmax(axis=1).tolist() == [0, 1, 2]


def test_thresholds_of_the_paper_rule_keep_nine_in_ten_right() -> None:
    anchors, labels = blobs(300, 2)
    logits = anchors[:, :3] + np.random.default_rng(3).normal(size=(300, 3)).astype(np.float32)
    limits = paper_thresholds(anchors, labels, logits)
    assert limits.shape == (3,)
    assert np.isfinite(limits).all()
    knows_nothing = paper_thresholds(np.random.default_rng(4).normal(size=(300, 6)), labels, np.zeros((300, 3)))
    assert np.isinf(knows_nothing).sum() >= 2 or (knows_nothing > limits.max()).all()


def test_no_noise_is_estimated_where_synthetic_images_are_not_recognised() -> None:
    rng = np.random.default_rng(0)
    given, labels = np.arange(40) % 5, np.repeat(np.arange(5), 20)
    features, anchors = (rng.normal(size=(count, 16)).astype(np.float32) for count in (40, 100))
    images = Images([f"{row}.png" for row in range(40)], given, tuple("abcde"), lambda _: b"", "csv")
    refined = pipeline.refine(features, images, anchors, labels, Settings("", ""), {})
    assert float(refined.notes["held-out synthetic images recognised"]) < 0.5
    for when in ("before", "after"):
        assert refined.notes[f"wrong labels {when} (estimated)"].startswith("not estimated: fewer than half of the ")
    assert "noise not estimated" in refined.notes["decision"]
    assert all(np.isnan(row.noise_after) for row in refined.sweep)


def test_a_run_says_that_class_numbers_may_not_mean_the_same() -> None:
    features, labels = blobs(300, 0)
    images = Images([f"{row}.png" for row in range(300)], labels, tuple("abc"), lambda _: b"", "csv")
    settings = Settings("", "", refiner="paper")
    anchors, classes = blobs(60, 1)
    assert "warning" not in pipeline.refine(features, images, anchors, classes, settings, {}).notes
    notes = pipeline.refine(features, images, anchors, (classes + 1) % 3, settings, {}).notes
    assert notes["warning"].startswith("given labels and nearest prototypes name the same class for ")


# ---- trees ----


def small(ids: list[str], given: list[int], labels: list[int], kind: str = "folder") -> Artifact:
    settings = {"classes": ["cat", "dog"], "source": kind}
    return record(np.array(given), np.array(labels), num_classes=2, ids=ids, settings=settings)


def fill(folder: Path, ids: list[str]) -> None:
    for one in ids:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_bytes(one.encode())


def test_no_two_images_meet_in_one_place(tmp_path: Path) -> None:
    ids = ["cat/1.png", "cat/in/2.png", "dog/1.png", "dog/1~cat.png"]
    artifact = small(ids, [0, 0, 1, 1], [1, 1, 0, 1])
    assert new_places(artifact) == ["dog/1~cat~cat.png", "dog/in/2.png", "cat/1~dog.png", "dog/1~cat.png"]
    fill(tmp_path / "old", ids)
    for link in (False, True):
        new, back = tmp_path / f"new{link}", tmp_path / f"back{link}"
        apply_tree(artifact, tmp_path / "old", new, link=link)
        assert sorted(content(new)) == sorted(new_places(artifact))
        assert (new / "dog/in/2.png").samefile(tmp_path / "old/cat/in/2.png") == link
        revert_tree(artifact, new, back, link=link)
        assert content(back) == content(tmp_path / "old")


def test_a_class_that_loses_all_its_images_keeps_its_folder(tmp_path: Path) -> None:
    fill(tmp_path / "old", ["cat/1.png"])
    apply_tree(small(["cat/1.png"], [0], [1]), tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "cat").is_dir()
    assert list(content(tmp_path / "new")) == ["dog/1.png"]


def test_a_table_is_written_beside_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("path,label,by\na.png,cat,me\nb.png,dog,=you\n")
    artifact = small(["a.png", "b.png"], [0, 1], [1, 1], "csv")
    apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.csv")
    assert read_csv("new", tmp_path / "new.csv")["label"] == ["dog", "dog"]
    revert_tree(artifact, tmp_path / "new.csv", tmp_path / "back.csv")
    assert read_csv("back", tmp_path / "back.csv") == read_csv("old", tmp_path / "old.csv")
    with pytest.raises(InputError, match=r"out: expected a \.csv beside"):
        apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.txt")


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    ids = ["cat/1.png", "dog/2.png"]
    artifact = small(ids, [0, 1], [1, 1])
    fill(tmp_path / "old", ids)
    fill(tmp_path / "moved", ["dog/1.png", "dog/2.png"])
    fill(tmp_path / "more", [*ids, "dog/3.png"])
    before = content(tmp_path)
    for name, out, error in (
        ("moved", "new", WrongIds),
        ("more", "new", WrongIds),
        ("old", "more", InputError),
        ("old", "old/new", InputError),
        ("old", "no/new", InputError),
        ("nowhere", "new", InputError),
    ):
        with pytest.raises(error):
            apply_tree(artifact, tmp_path / name, tmp_path / out)
    apply_tree(artifact, tmp_path / "old", tmp_path / "new", dry_run=True)
    assert content(tmp_path) == before
    with pytest.raises(WrongBase):
        apply_tree(small(ids, [1, 1], [0, 1]), tmp_path / "old", tmp_path / "new")
    with pytest.raises(InputError, match=r"ids such as class/name\.jpg, got 'cat/\.\./\.\./x\.png'"):
        new_places(small(["cat/../../x.png"], [0], [1]))


def test_a_killed_apply_leaves_no_folder_and_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"cat/{row}.png" for row in range(4)]
    artifact = small(ids, [0] * 4, [0, 1, 0, 1])
    fill(tmp_path / "old", ids)
    copy = shutil.copy2

    def dying(origin: Path, target: Path) -> None:
        if origin.name == "2.png":
            raise KeyboardInterrupt
        copy(origin, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", dying)
        with pytest.raises(KeyboardInterrupt):
            apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    assert sorted(content(tmp_path / "new")) == ["cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


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
    arguments = ["run", "photos", "--classes", "classes.yaml", "--synthetic", "photos", "--out", "result"]
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
