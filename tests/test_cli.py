"""The command: every example in its help runs, results on stdout, remarks on stderr, exit codes 0, 1, 2, 3."""

from __future__ import annotations

import configparser
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from synth_refine import cli
from synth_refine.labels import export
from synth_refine.labels.artifact import read_artifact
from synth_refine.labels.files import read_labels, read_labels_and_ids, write_labels
from synth_refine.scale import tables
from synth_refine.settings import Settings, flag, kind_of, of_command, usage_fault
from synth_refine.synthetic.generate import PER_CLASS
from synth_refine.synthetic.jobs import TEMPLATES
from synth_refine.synthetic.text_to_image import SDXL_TURBO

COMMANDS = ("refine", "scale", "review", "apply", "revert", "diff", "export", "verify", "env")
WRITERS = ("refine", "review", "apply", "revert", "export")
COUNT = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the examples name: features around their prototypes, and some wrong labels."""
    random = np.random.default_rng(0)
    truth = np.arange(COUNT) % 3
    np.save(tmp_path / "prototypes.npy", np.eye(3, 8, dtype=np.float32))
    np.save(tmp_path / "head.npy", 4 * np.eye(3, 8, dtype=np.float32))
    features = np.eye(3, 8)[truth] + 0.05 * random.standard_normal((COUNT, 8))
    np.save(tmp_path / "features.npy", features.astype(np.float16))
    np.save(tmp_path / "logits.npy", (4 * np.eye(3)[truth]).astype(np.float32))
    np.save(tmp_path / "synthetic.npy", np.eye(3, 8)[truth[:30]] + 0.05 * random.standard_normal((30, 8)) + 0.02)
    np.save(tmp_path / "synthetic_labels.npy", truth[:30])
    given = truth.copy()
    given[:15] = (given[:15] + 1) % 3
    np.save(tmp_path / "given.npy", given)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refined(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(paper("refined")) == 0
    (folder / "decisions.csv").write_text(
        '"id","given","decision","label"\n"0","1","accept","0"\n"1","2","reject","2"\n'
    )
    for arguments in (*example("review"), *example("apply")):
        assert cli.main(arguments) == 0
    capsys.readouterr()
    return folder


def example(command: str) -> list[list[str]]:
    """The arguments of the examples that a command's help shows."""
    lines = cli.EXAMPLES[command].replace("\\\n", " ").strip().splitlines()
    assert lines
    return [shlex.split(line)[1:] for line in lines]


def paper(out: str) -> list[str]:
    """A call of the paper's rule."""
    return [*example("refine")[1][:-1], out]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_run(command: str, refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert cli.EXAMPLES[command] in capsys.readouterr().out
    for arguments in example(command):
        assert arguments[0] == command
        changed = ["new-" + one if arguments[place - 1] == "--out" else one for place, one in enumerate(arguments)]
        expected = 1 if arguments == ["diff", "given.npy", "labels.npy"] else 0
        assert cli.main(changed) == expected
        assert capsys.readouterr().out


def test_the_anchored_refiner_is_the_default_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic = np.load("synthetic.npy")
    synthetic[[0, 4]] = np.nan
    np.save("synthetic.npy", synthetic)
    assert cli.main(example("refine")[0]) == 0
    said = capsys.readouterr()
    assert "2 of 30 synthetic images are left out: their features are not finite\n" in said.err
    found = json.loads(said.out)
    assert found["noise_before"] == pytest.approx(0.25, abs=0.1)
    assert found["noise_after"] < 0.1
    artifact = read_artifact("refined")
    assert (artifact.labels != np.arange(COUNT) % 3).sum() <= 1
    assert artifact.run["settings"] == {
        "refiner": "anchored",
        "threshold": None,
        "seed": 0,
        "force": False,
        "outliers": False,
    }
    assert set(artifact.run["inputs"]) == {"features", "given", "synthetic_features", "synthetic_labels"}
    assert bool((artifact.margin[artifact.changed] > 0).all())
    synthetic[2::3] = np.nan  # all of the last class
    np.save("synthetic.npy", synthetic)
    assert cli.main([*example("refine")[0][:-1], "again"]) == 3
    assert re.search(
        r"synth-refine: \w+: expected at least one image per class, got none for class 2\n", capsys.readouterr().err
    )


WAYS = {
    "refine": [example("refine")[0], paper("out"), [*example("refine")[0], "--refiner", "paper"]],
    "scale": example("scale"),
    "run": [
        ["run", "photos", "--out", "out"],
        ["run", "photos", "--out", "out", "--refiner", "paper"],
        ["run", "photos", "--out", "out", "--synthetic", "generated"],
    ],
}


@pytest.mark.parametrize(
    ("command", "number"), [(command, number) for command in WAYS for number in range(len(WAYS[command]))]
)
def test_options_without_use_are_refused(command: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In every way that a command goes, an option that would not count is wrong usage."""
    call, refused = WAYS[command][number], []
    given = vars(cli._parser().parse_args(call))
    fields = of_command(command)
    used = Settings(**{one.name: given[one.name] for one in fields if given[one.name] is not None}).used(command)
    for one in fields:
        if one.name not in used and given[one.name] is None:
            words = {"bool": [], "int": ["7"], "float": ["0.9"]}.get(kind_of(one), ["{category}"])
            words = list(one.metadata["choices"][-1:]) or words
            with pytest.raises(SystemExit) as stopped:
                cli.main([*call, flag(one), *words])
            assert stopped.value.code == 2
            assert " is only for " in capsys.readouterr().err
            refused.append(one.name)
    assert refused


@pytest.mark.parametrize(
    "line",
    [
        "refine --refiner anchored --weight 0.9 --strict",
        "refine --refiner paper --force --seed 7",
        "refine --features f --given g --prototypes p --out o",  # nothing to calibrate a threshold on
        "refine --features f --given g --out o",
        "refine --thresh 1",
        "refine --features f --given g --prototypes p --out o --threshold nan",
        "refine --features f --given g --prototypes p --out o --threshold 7",
        "scale --address x",
        "scale --features f --given g --prototypes p --out o --threshold 0.5 --head h --logits l",
        "scale --features f --given g --synthetic s --synthetic-labels l --out o --engine ray",
        "export a --format json-records --out b",
        "run photos",
        "run --out b",
        "run photos --out b --seed -1",
        "run photos --out b --templates cat",
        "run photos --out b --guidance hello",
        "embed --out b",
        "apply a --given b --out c --decisions d",
        "guess",
        "",
    ],
)
def test_wrong_usage_is_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(
            ("encoder: 3\n", "encoder"),
            ("what: 1\n", "what"),
            ("- a\n", "config"),
            ("seed: true\n", "seed"),
            ("a: [", "config"),
        ),
        *(("templates: a photo\n", "templates"), ("templates: []\n", "templates"), ("guidance: hello\n", "guidance")),
        *(("refiner: other\n", "refiner"), ("threshold: 5.0\n", "threshold"), ("weight: 0.9\n", "--weight")),
        *(
            ("synthetic: a\nmodel: b\n", "--model"),
            ("per_class: 0\n", "per_class"),
            ("size: 1.5\n", "size"),
            ("seed: true\n", "seed"),
        ),
    ],
)
def test_a_config_is_checked_as_options_are(
    text: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["run", "photos", "--out", "out", "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 3
    said = capsys.readouterr().err
    assert name in said
    assert str(tmp_path) in said
    assert said.count("\n") == 1


def test_refine_apply_and_revert_go_round(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = read_artifact("refined")
    assert artifact.labels.tolist() == (np.arange(COUNT) % 3).tolist()
    assert len(artifact.changed) == 15
    assert artifact.run["settings"] == {"refiner": "paper", "threshold": 0.6, "weight": 0.5, "strict": False}
    assert set(artifact.run["inputs"]) == {"features", "logits", "prototypes", "given"}
    assert read_labels("labels.npy").tolist() == artifact.labels.tolist()
    assert cli.main(example("revert")[0]) == 0
    assert Path("given-again.npy").read_bytes() == Path("given.npy").read_bytes()
    assert json.loads(capsys.readouterr().out)["changed"] == 15


def test_labels_come_back_in_the_type_and_with_the_ids_they_had(folder: Path) -> None:
    given = np.load("given.npy")
    np.save("small.npy", given.astype(np.uint8))
    refine = paper("refined")
    refine[refine.index("given.npy")] = "small.npy"
    assert cli.main(refine) == 0
    assert cli.main(["apply", "refined", "--given", "small.npy", "--out", "labels.npy"]) == 0
    assert cli.main(["revert", "refined", "--labels", "labels.npy", "--out", "again.npy"]) == 0
    assert Path("again.npy").read_bytes() == Path("small.npy").read_bytes()

    ids = [f"{row}.png" for row in range(COUNT)]
    write_labels("given.csv", given, ids)
    refine[refine.index("small.npy")], refine[refine.index("refined")] = "given.csv", "with-ids"
    assert cli.main(refine) == 0
    write_labels("shuffled.csv", given[::-1].copy(), ids[::-1])  # another order, told by the ids
    assert cli.main(["apply", "with-ids", "--given", "shuffled.csv", "--out", "labels.csv"]) == 0
    labels, names = read_labels_and_ids("labels.csv")
    assert names == ids[::-1]
    assert labels.tolist() == read_artifact("with-ids").labels[::-1].tolist()
    assert cli.main(["revert", "with-ids", "--labels", "labels.csv", "--out", "again.csv"]) == 0
    assert Path("again.csv").read_bytes() == Path("shuffled.csv").read_bytes()


def test_nothing_that_is_needed_to_revert_is_overwritten(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(refined)
    assert cli.main(paper("refined")) == 0  # the same again
    assert cli.main([{"0.6": "0.7"}.get(one, one) for one in paper("refined")]) == 3
    assert "settings" in capsys.readouterr().err
    for command, option, name in (("apply", "--given", "given.npy"), ("revert", "--labels", "labels.npy")):
        assert cli.main([command, "refined", option, name, "--out", name]) == 3
        assert f"out: expected another file than the labels read, got {name}" in capsys.readouterr().err
    assert files(refined) == before


def test_labels_are_not_written_over_anything_else(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.csv").write_text("mine\n")
    np.save("true.npy", np.arange(COUNT))
    before = files(refined)
    for command, option, name in (("apply", "--given", "given.npy"), ("revert", "--labels", "labels.npy")):
        for out in ("notes.csv", "true.npy", "prototypes.npy"):
            for more in ([], ["--dry-run"]):
                assert cli.main([command, "refined", option, name, "--out", out, *more]) == 3
                message = f"out: expected a new file, or one of the same labels, but {out} holds something else"
                assert capsys.readouterr().err == f"synth-refine: {message}\n"
    for arguments in example("apply"):  # the same again
        assert cli.main(arguments) == 0
    assert files(refined) == before


@pytest.mark.parametrize("command", WRITERS)
def test_a_dry_run_writes_nothing(command: str, refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(refined)
    for arguments in example(command):
        changed = ["new-" + one if arguments[place - 1] == "--out" else one for place, one in enumerate(arguments)]
        assert cli.main([*changed, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out)["written"] is False
    assert files(refined) == before


def test_diff_lists_the_changes(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "refined"]) == 0
    output = capsys.readouterr()
    assert output.out == Path("refined/changes.csv").read_text()
    assert len(output.out.splitlines()) == 16
    assert "1 -> 0: 5" in output.err
    assert cli.main(["diff", "given.npy", "refined"]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[:2] == ['"id","old","new"', "0,1,0"]
    assert output.err == "15 of 60 labels differ\n"
    assert cli.main(["diff", "labels.npy", "refined"]) == 0
    assert cli.main(["export", "labels.npy", "--format", "csv", "--out", "labels.csv"]) == 0
    write_labels("turned.csv", read_labels("labels.npy")[::-1].copy(), [str(row) for row in range(COUNT)][::-1])
    assert cli.main(["diff", "labels.csv", "turned.csv"]) == 0  # the ids tell the order
    write_labels("others.csv", read_labels("labels.npy"), [f"{row}.png" for row in range(COUNT)])
    capsys.readouterr()
    assert cli.main(["diff", "labels.csv", "others.csv"]) == 3
    assert capsys.readouterr().err == "synth-refine: others.csv: expected the ids of labels.csv, got others\n"


def test_verify_finds_problems(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "refined", "--labels", "given.npy"]) == 1
    assert re.fullmatch(r"synth-refine: labels: .* 15 of 60 differ, the first in row 0\n", capsys.readouterr().err)
    write_labels("short.csv", read_labels("labels.npy")[1:])
    assert cli.main(["verify", "refined", "--labels", "short.csv"]) == 1
    message = "synth-refine: labels: expected the 60 labels that this artifact is about, got 59\n"
    assert capsys.readouterr().err == message
    with open("refined/labels.npy", "ab") as file:
        file.write(b"\0")
    assert cli.main(["verify", "refined"]) == 1
    output = capsys.readouterr()
    assert "is not the file that run.json describes" in output.err
    assert output.out == ""
    assert cli.main(["verify", "nothing"]) == 3
    assert cli.main(["apply", "refined", "--given", "given.npy", "--out", "new.npy"]) == 3
    assert not Path("new.npy").exists()


def test_the_folder_of_a_run_is_no_artifact_but_holds_one(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("result").mkdir()
    Path("refined").rename("result/refined")
    assert cli.main(["apply", "result", "--given", "given.npy", "--out", "new.npy"]) == 3
    message = "synth-refine: artifact: result is the result of a run; its artifact is result/refined\n"
    assert capsys.readouterr().err == message


def test_a_review_is_an_artifact_of_its_own(refined: Path) -> None:
    before, after, labels = read_artifact("refined"), read_artifact("reviewed"), read_labels("reviewed.npy")
    assert after.given.tolist() == before.given.tolist()
    assert np.flatnonzero(labels != after.given).tolist() == [0]
    assert labels[0] == before.labels[0]
    assert cli.main(["revert", "reviewed", "--labels", "reviewed.npy", "--out", "given-again.npy"]) == 0
    assert Path("given-again.npy").read_bytes() == Path("given.npy").read_bytes()
    assert cli.main(["review", "refined", "decisions.csv", "--out", "refined"]) == 3
    assert read_artifact("refined").labels.tolist() == before.labels.tolist()


def test_export_passes_its_options_on(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "cifar10-1-ours.npy"]
    assert cli.main(["export", "refined", "--format", "plc", *out]) == 3
    assert "labels: expected 45000, which plc reads, got 60" in capsys.readouterr().err
    np.save("all.npy", np.concatenate([np.load("given.npy"), np.arange(60, 45_000) % 10]))
    assert cli.main(["export", "refined", "--format", "plc", *out, "--fill", "all.npy"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"labels": "cifar10-1-ours.npy", "written": True, "count": 45_000}
    assert "--noise_label_file cifar10-1-ours.npy --noise_level 0" in output.err
    np.save("long.npy", np.arange(50_000) % 10)
    assert cli.main(["export", "long.npy", "--format", "lra", *out, "--truncate"]) == 3
    assert cli.main(["export", "long.npy", "--format", "lra", *out, "--truncate", "--overwrite"]) == 0
    assert "what was there is now cifar10-1-ours.npy.bak" in capsys.readouterr().err
    cifar_n = ["export", "long.npy", "--format", "cifar-n", "--out", "human.pt", "--entry", "aggre_label"]
    assert cli.main([*cifar_n]) == 3
    assert cli.main([*cifar_n, "--clean-label", "long.npy"]) == 0
    assert cli.main(["diff", "human.pt", "long.npy"]) == 3  # which entry?
    assert read_labels("human.pt", key="aggre_label").tolist() == read_labels("long.npy").tolist()


def test_labels_of_cifar_n_are_refined_by_entry(folder: Path) -> None:
    from synth_refine.labels.formats import Rows, _pt

    given = np.load("given.npy")
    Path("human.pt").write_bytes(_pt(Rows(given, None, Path("human.pt"), None, given, "worse_label")))
    refine = paper("refined")
    refine[refine.index("given.npy")] = "human.pt"
    assert cli.main(refine) == 3
    assert cli.main([*refine, "--key", "worse_label"]) == 0
    assert read_artifact("refined").given.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("features.npy", np.zeros((COUNT, 8), int), "features: .*int64"),
        ("features.npy", np.zeros((5, 8)), r"(features|given): .*\(5"),
        ("features.npy", np.zeros((8, COUNT)), r"features: .*\(8, 60\), which is transposed"),
        ("features.npy", np.zeros(8), r"features: .*\(8,\)"),
        ("logits.npy", np.zeros(3), r"logits: .*\(3,\)"),
        ("logits.npy", np.zeros((5, 3)), r"logits: .*\(5, 3\)"),
        ("prototypes.npy", np.zeros((3, 8)), "prototypes: .*only zeros"),
        ("prototypes.npy", np.zeros((3, 9)), r"prototypes: .*\(3, 9\)"),
        ("given.npy", np.zeros(5, int), r"given: .*\(5,\)"),
        ("given.npy", np.full(COUNT, 3), "given: .*3 in row 0"),
        ("given.npy", np.zeros(COUNT), "(given|labels): .*given.npy holds float64"),
    ],
)
def test_bad_input_is_one_line_and_code_3(
    folder: Path, name: str, array: np.ndarray, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(name, array)
    assert cli.main(paper("refined")) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert re.match(f"synth-refine: {message}", output.err.splitlines()[-1])
    assert not Path("refined").exists()


def test_what_cannot_be_scored_is_counted_or_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = np.load("features.npy")
    features[7] = np.nan
    np.save("features.npy", features)
    assert cli.main(paper("refined")) == 0
    assert json.loads(capsys.readouterr().out)["abstained"] == 1
    assert [row for row in Path("refined/changes.csv").read_text().splitlines() if "abstain" in row] == [
        '7,2,2,"abstain","","","the image cannot be scored"'
    ]
    assert cli.main([*paper("refined"), "--strict"]) == 3


def test_labels_in_another_order_and_other_class_numbers_are_doubted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*example("refine")[0], "--dry-run"]
    assert cli.main(command) == 0
    assert "same class" not in capsys.readouterr().err
    np.save("synthetic_labels.npy", (np.load("synthetic_labels.npy") + 1) % 3)
    assert cli.main(command) == 0
    assert "do the class numbers mean the same" in capsys.readouterr().err
    rng, features = np.random.default_rng(0), np.tile(np.load("features.npy"), (9, 1))
    np.save("features.npy", features + rng.normal(scale=1e-3, size=features.shape))  # no copies of a picture
    np.save("given.npy", rng.permutation(np.tile(np.load("given.npy"), 9)))
    for other in (command, paper("other")):
        np.save("logits.npy", np.tile(np.load("logits.npy")[:COUNT], (9, 1)))
        assert cli.main(other) == 3
        assert "given: expected labels of these images in this order" in capsys.readouterr().err


def test_an_emptied_class_is_mentioned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("logits.npy", np.tile([9.0, 0, 0], (COUNT, 1)))
    assert cli.main([*paper("refined"), "--weight", "0"]) == 0
    assert "no image is left in class 1, 2" in capsys.readouterr().err


def test_help_and_wrong_usage_wait_for_no_heavy_import() -> None:
    calls = [
        ["--help"],
        [],
        ["guess"],
        *([name, "--help"] for name in cli.EXAMPLES),
        ["run", "photos"],
        ["embed", "photos"],
    ]
    calls.append([*paper("out"), "--force"])
    script = f"""if True:
        import sys
        import synth_refine
        from synth_refine.cli import main
        for arguments in {calls!r}:
            try:
                main(arguments)
            except SystemExit:
                continue
            raise AssertionError(arguments)
        print("heavy:", sorted({{"torch", "numpy", "PIL", "yaml"}} & set(sys.modules)))
        for name in synth_refine.__all__:
            assert getattr(synth_refine, name)
        print("torch" in sys.modules, hasattr(synth_refine, "nothing"))
        """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["heavy: []", "True False"]


def test_what_the_parser_offers_is_what_there_is() -> None:
    assert tuple(export.FORMATS) == cli.FORMATS
    given = Settings()
    assert given.shard_rows == tables.SHARD_ROWS
    assert (given.model, given.templates, given.per_class) == (SDXL_TURBO, TEMPLATES, PER_CLASS)


def help_of(command: str) -> str:
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as text:
        cli.main([command, "--help"])
    return text.getvalue()


def test_the_commands_in_the_documents_are_valid() -> None:
    root, count = Path(__file__).parents[1], 0
    for document in sorted(root.rglob("*.md")):
        for line in re.findall(r"^synth-refine .*$", document.read_text().replace("\\\n", " "), re.M):
            given = vars(cli._parser().parse_args(shlex.split(line, comments=True)[1:]))
            known = {one.name for one in of_command(given["command"])}
            entries = {name: value for name, value in given.items() if name in known and value is not None}
            assert usage_fault(given["command"], entries) is None, line
            count += 1
    assert count > 8


def test_it_is_said_before_a_hub_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["embed", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--encoder"]
    assert cli.main([*command, "timm:resnet18"]) == 3
    assert capsys.readouterr().err.startswith("timm:resnet18 is taken from this machine or else from its hub; HF_HUB_")
    assert cli.main([*command, str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("synth-refine: images: expected a folder")


def test_run_shows_what_it_cannot_do_without() -> None:
    assert help_of("run").startswith("usage: synth-refine run IMAGES --out FOLDER [options]\n")


def test_what_is_in_the_way_is_reported(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    Path("classes.yaml").write_text("- A\n- B\n")
    for out, message in {
        "file": f"out: expected a folder, got a file: {Path('file').absolute()}\n",
        "file/below": f"out: expected a folder, got a file: {Path('file').absolute()}\n",
        "other": "folder: expected an artifact or an empty folder",
    }.items():
        assert cli.main(paper(out)) == 3
        assert f"synth-refine: {message}" in capsys.readouterr().err
    for command in (
        [*paper("")[:-2], "--dry-run"],
        example("scale")[0][:-2],
        example("scale")[1][:-2],
        ["run", "photos"],
        ["embed", "photos"],
        ["generate", "--classes", "classes.yaml", "--model", "glyphs"],
    ):
        assert cli.main([*command, "--out", "file"]) == 3
        assert capsys.readouterr().err.endswith(f": out: expected a folder, got a file: {Path('file').absolute()}\n")
    for command in (["apply", "refined", "--given", "given.npy"], ["revert", "refined", "--labels", "labels.npy"]):
        for more in ([], ["--dry-run"]):
            assert cli.main([*command, "--out", "other", *more]) == 3
            assert capsys.readouterr().err == "synth-refine: out: expected a file to write, got a folder: other\n"
    assert cli.main(["export", "refined", "--format", "jsonl", "--out", "other"]) == 3
    assert capsys.readouterr().err == "synth-refine: path: expected a file to write, got a folder: other\n"
    assert cli.main(["apply", "refined", "--given", "given.npy", "--out", "no/where.npy"]) == 3
    assert cli.main(["apply", "refined", "--given", "given.npy", "--out", "labels.txt"]) == 3


def test_an_interrupt_is_no_traceback(
    refined: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    before = files(refined)
    assert cli.main(paper("refined")) == 130
    assert capsys.readouterr().err.endswith("synth-refine: interrupted; run the same command again to resume\n")
    assert files(refined) == before


def test_without_locks_it_is_said_where_the_commands_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Windows:
        def __getattr__(self, name: str) -> object:
            raise ModuleNotFoundError("No module named 'fcntl'", name="fcntl")

    monkeypatch.setitem(sys.modules, "synth_refine.commands", Windows())
    assert cli.main(["env"]) == 3
    assert "on Windows use WSL" in capsys.readouterr().err


def test_names_that_the_terminal_cannot_write_are_no_traceback(refined: Path) -> None:
    write_labels("one.csv", np.array([0]), ["猫.png"])
    write_labels("two.csv", np.array([1]), ["猫.png"])
    command = [sys.executable, "-m", "synth_refine.cli", "diff", "one.csv", "two.csv"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False)
    assert (done.returncode, done.stderr) == (1, b"1 of 1 labels differ\n")
    assert done.stdout.splitlines()[1] == rb'"\u732b.png",0,1'


def test_an_interrupt_while_torch_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "synth_refine.commands", Interrupted())
    assert cli.main(["env"]) == 130


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["numpy"] == np.__version__
    assert {"python", "synth-refine", "torch", "platform"} <= set(found)


def test_the_command_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "synth-refine"
    assert getattr(importlib.import_module(module), function) is cli.main


def test_a_reader_that_stops_is_no_error(
    refined: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with `synth-refine diff refined | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["diff", "refined"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_labels_beside_embedded_features_are_taken_by_their_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    true = np.arange(120) % 3
    np.save(tmp_path / "features.npy", (4 * np.eye(3, 6)[true] + rng.normal(size=(120, 6))).astype(np.float32))
    np.save(tmp_path / "drawn.npy", (4 * np.eye(3, 6)[true] + rng.normal(size=(120, 6))).astype(np.float32))
    np.save(tmp_path / "classes.npy", true)
    lines = [f"{number}.png,{label}" for number, label in enumerate(true)]
    (tmp_path / "given.csv").write_text("\n".join(["id,label", *lines, ""]))
    (tmp_path / "sorted.csv").write_text("\n".join(["id,label", *sorted(lines), ""]))
    (tmp_path / "other.csv").write_text("\n".join(["id,label", *lines[1:], "another.png,0", ""]))
    files = {"--features": "features.npy", "--synthetic": "drawn.npy", "--synthetic-labels": "classes.npy"}
    command = ["refine", *(one for name, path in files.items() for one in (name, str(tmp_path / path)))]
    refined = []
    for name in ("given", "sorted"):
        more = ["--given", str(tmp_path / f"{name}.csv"), "--out", str(tmp_path / name)]
        assert cli.main([*command, *more]) == 0
        refined.append(read_artifact(tmp_path / name))
    assert refined[0].ids == refined[1].ids
    np.testing.assert_array_equal(refined[0].labels, refined[1].labels)
    assert cli.main([*command, "--given", str(tmp_path / "other.csv"), "--out", str(tmp_path / "none")]) == 3
    assert "given: expected the ids of" in capsys.readouterr().err


def beside(folder: Path, classes: list[str], offset: float = 0.0, count: int = 120) -> list[int]:
    """What `embed` writes of images of animals, a class after the other; their classes by the order of `ANIMALS`."""
    true = [number % 3 for number in range(count)]
    folder.mkdir()
    rng = np.random.default_rng(count)
    np.save(folder / "features.npy", (4 * np.eye(3, 6)[true] + rng.normal(size=(count, 6)) + offset).astype("f4"))
    names = [ANIMALS[number] for number in true]
    rows = [f"{name}/{row}.png,{classes.index(name)},{name}" for row, name in enumerate(names)]
    (folder / "given.csv").write_text("\n".join(["id,label,class", *rows, ""]))
    (folder / "classes.yaml").write_text("".join(f"- {name}\n" for name in classes))
    return true


ANIMALS = ["cat", "dog", "owl"]


@pytest.mark.parametrize("command", ["refine", "scale"])
def test_classes_are_matched_by_name_and_rows_by_id(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features, labels and synthetic images that number their classes otherwise: the same labels by name."""
    monkeypatch.chdir(tmp_path)
    true = beside(Path("real"), ANIMALS)
    beside(Path("synthetic"), ["owl", "cat", "dog"], 0.5, 60)
    lines = Path("real/given.csv").read_text().splitlines()
    Path("names.csv").write_text(
        "\n".join(["id,label", *sorted(",".join(one.split(",")[::2]) for one in lines[1:]), ""])
    )
    Path("yaml").write_text("- dog\n- cat\n- owl\n")
    Path("birds.csv").write_text("id,label\n" + "".join(f"{row}.png,hen\n" for row in range(60)))
    call = f"{command} --features real/features.npy --synthetic synthetic/features.npy"
    labels, given = "--synthetic-labels synthetic/given.csv", "--given real/given.csv"
    for place, more in enumerate([given, "--given names.csv", f"{given} --classes real/classes.yaml"]):
        assert cli.main(f"{call} {labels} {more} --out {place}".split()) == 0
        made = read_artifact(str(place))
        assert made.labels.tolist() == made.given.tolist() == true
        assert (made.classes, made.ids) == (ANIMALS, [one.split(",")[0] for one in lines[1:]])
    capsys.readouterr()
    for more, message in (
        (f"{given} {labels} --classes yaml", "classes: expected 'cat', 'dog', 'owl' in this order"),
        (f"{given} --synthetic-labels birds.csv", "synthetic_labels: expected the ids of synthetic/given.csv"),
        ("--given birds.csv " + labels, "given: expected the ids of real/given.csv"),
    ):
        assert cli.main(f"{call} {more} --out none".split()) == 3
        assert capsys.readouterr().err.startswith(f"synth-refine: {message}")
    assert not Path("none").exists()


def test_an_artifact_over_shards_with_ids_applies_to_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside(Path("real"), ANIMALS)
    beside(Path("synthetic"), ANIMALS, 0.5, 60)
    table = Path("real/given.csv").read_text().replace("cat/0.png,0,cat", "dog/0.png,1,dog")
    Path("real/given.csv").write_text(table)
    for line in table.splitlines()[1:]:
        path = Path("photos", line.split(",")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    call = "scale --features real/features.npy --given real/given.csv --synthetic synthetic/features.npy"
    call += " --synthetic-labels synthetic/given.csv --shard-rows 50 --out refined --force"
    for _ in range(2):  # the second time it is there
        assert cli.main(call.split()) == 0
    assert '"dog/0.png",1,0,"change"' in Path("refined/changes.csv").read_text()
    assert cli.main(["apply", "refined", "--images", "photos", "--out", "new"]) == 0
    assert Path("new/cat/0.png").exists()
    assert cli.main(["revert", "refined", "--images", "new", "--out", "again"]) == 0
    assert Path("again/dog/0.png").exists()
