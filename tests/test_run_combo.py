"""The benchmark from its command line: what runs, what is recorded, what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import command

from benchmarks import run_combo
from benchmarks.records import read_records, weights_used

ROOT = Path(__file__).resolve().parent.parent


def test_every_method_with_and_without_refinement(arrays, tmp_path, capsys):
    assert run_combo.main(command(arrays, tmp_path, "--seeds", "0,1", "--json")) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 3 * 2 * 2
    assert records == sorted(read_records([tmp_path / "blobs"]), key=records.index)
    for record in records:
        labels = record["labels"]
        assert labels["noise_before"] == pytest.approx(0.25, abs=0.05)
        moved = (labels["wrong_to_right"] - labels["right_to_wrong"]) / labels["images"]
        assert labels["noise_after"] == pytest.approx(labels["noise_before"] - moved)
        assert set(record["test_accuracy"]) == {"last", "best_noisy_validation", "best_clean_validation"}
        assert len(record["history"]) == record["settings"]["method"]["epochs"]
        assert record["environment"]["versions"]["torch"]
    unrefined, refined = (
        {r["labels"]["noise_after"] for r in records if r["refiner"] == name} for name in ("none", "paper")
    )
    assert max(refined) < min(unrefined)


def test_the_table_is_printed_and_a_second_call_runs_nothing(arrays, tmp_path, capsys, monkeypatch):
    arguments = command(arrays, tmp_path, "--method", "standard")
    assert run_combo.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("\n") == 4
    assert "| confused | standard | paper" in first
    monkeypatch.setattr(run_combo, "ADAPTERS", dict.fromkeys(run_combo.ADAPTERS))
    assert run_combo.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_a_changed_setting_is_another_record(arrays, tmp_path, capsys):
    arguments = command(arrays, tmp_path, "--method", "standard", "--refine", "none")
    for override in ("methods.standard.epochs=1", "methods.standard.epochs=2", "threshold=0.9"):
        assert run_combo.main([*arguments, override]) == 0
    assert len(list(tmp_path.glob("blobs/*.json"))) == 2, "the threshold does not touch a run without refiner"


def test_records_are_named_by_the_content_of_the_files_that_settings_name(arrays, tmp_path, capsys):
    def planned(*more):
        assert run_combo.main([*command(arrays, tmp_path, "--method", "standard", "--dry-run"), *more]) == 0
        return capsys.readouterr().out

    (weights := tmp_path / "weights.safetensors").write_bytes(b"one")
    before = planned(f"encoder_weights={weights}")
    assert planned(f"encoder_weights={weights}") == before
    weights.write_bytes(b"two")
    after = planned(f"encoder_weights={weights}")
    assert [old == new for old, new in zip(before.splitlines(), after.splitlines(), strict=True)] == [True, False]
    for block in ("methods.standard", "initial"):
        weights.write_bytes(b"one")
        first = planned(f"{block}.pretrained={weights}")
        weights.write_bytes(b"two")
        assert planned(f"{block}.pretrained={weights}") != first
    (folder := tmp_path / "clip").mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    first = planned(f"encoder={folder}")
    (folder / "open_clip_model.safetensors").write_bytes(b"three")
    assert planned(f"encoder={folder}") != first
    assert planned("encoder=clip", "encoder_weights=openai")


def test_records_are_named_by_the_content_of_the_synthetic_images(tmp_path, capsys):
    def planned(root, *more):
        arguments = ["--config", str(ROOT / "benchmarks" / "configs" / "cifar10.yaml"), "--data-root", str(root), *more]
        assert run_combo.main([*arguments, "--out", str(tmp_path), "--device", "cpu", "--dry-run"]) == 0
        return capsys.readouterr().out

    names = [tmp_path / "here" / "synthetic" / "cifar10", tmp_path / "there" / "elsewhere"]
    for folder in names:
        folder.mkdir(parents=True)
        (folder / "image.png").write_bytes(b"one")
    by_default = planned(tmp_path / "here")
    assert planned(tmp_path / "there", "--synthetic", str(names[1])) == by_default
    (names[0] / "image.png").write_bytes(b"two")
    assert planned(tmp_path / "here") != by_default


OWN_METHOD = """
from adapters import Outcome

def run(task, labels, options, seed, checkpoint=None):
    return Outcome({"last": 0.5}, labels, [], {"depth": 3, **options})
"""


def test_a_method_of_the_users_own_needs_no_line_of_ours(arrays, tmp_path, monkeypatch, capsys):
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "loop.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    method = "their_package.loop:run"
    arguments = command(arrays, tmp_path, "--method", f"{method},standard", "--refine", "none,paper")
    assert run_combo.main([*arguments, f"methods.{method}.depth=5", "methods.standard.epochs=1"]) == 0
    records = [record for record in read_records([tmp_path / "blobs"]) if record["method"] == method]
    assert [record["refiner"] for record in records] == ["none", "paper"]
    assert all(record["settings"]["method"] == {"depth": 5} for record in records)
    assert capsys.readouterr().out.count(method) == 2
    assert run_combo.main(command(arrays, tmp_path, "--method", "their_package.loop:walk")) == 3
    assert "got 'their_package.loop:walk' (module 'their_package.loop' has no attribute" in capsys.readouterr().err


def test_an_adapter_without_defaults_is_one_line(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run_combo.ADAPTERS, "mine", run_combo.ADAPTERS["standard"])
    assert run_combo.main(command(arrays, tmp_path, "--method", "mine", "methods.mine.epochs=1")) == 3
    assert capsys.readouterr().err == "error: method: expected the defaults of mine in adapters.DEFAULTS, got none\n"


def test_noise_by_name_joins_the_label_files(arrays, tmp_path, capsys):
    more = ["--noise", "clean,uniform-0.3", "--method", "standard", "--refine", "none", "methods.standard.epochs=1"]
    assert run_combo.main(command(arrays, tmp_path, *more)) == 0
    noise = {record["noise"]: record["labels"]["noise_before"] for record in read_records([tmp_path / "blobs"])}
    assert noise["clean"] == 0
    assert 0.2 < noise["uniform-0.3"] < 0.4
    assert "confused" in noise


def test_settings_may_depend_on_the_noise_and_the_command_line_has_the_last_word(arrays, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    block = 'by_noise:\n  "clean, uniform-*": {threshold: 0.5, methods: {plc: {warmup: 1}}}\n'
    config.write_text((arrays / "quick.yaml").read_text() + block)

    def settings(*more):
        out = tmp_path / f"runs{len(more)}"
        arguments = ["--method", "plc", "--refine", "paper", "--noise", "uniform-0.3", "--config", str(config), *more]
        assert run_combo.main(command(arrays, out, *arguments)) == 0
        return {record["noise"]: record["settings"] for record in read_records([out / "blobs"])}

    found = settings()
    assert {noise: one["refiner"] for noise, one in found.items()} == {
        "confused": {"threshold": 0.0},
        "uniform-0.3": {"threshold": 0.5},
    }
    assert {noise: one["method"]["warmup"] for noise, one in found.items()} == {"confused": 2, "uniform-0.3": 1}
    found = settings("threshold=0.25", "methods.plc.warmup=0")
    assert {one["refiner"]["threshold"] for one in found.values()} == {0.25}
    assert {one["method"]["warmup"] for one in found.values()} == {0}
    for line in ("by_noise: 3", "by_noise: {clean: {seeds: 3}}", "by_noise: {clean: {threshold: 7}}"):
        config.write_text((arrays / "quick.yaml").read_text() + line)
        assert run_combo.main(command(arrays, tmp_path, "--config", str(config))) == 3
        assert capsys.readouterr().err.splitlines()[-1].split(": expected")[0] in (
            "error: by_noise",
            "error: threshold",
        )


def test_dry_run_writes_nothing(arrays, tmp_path, capsys):
    assert run_combo.main(command(arrays, tmp_path / "out", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("to do  ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_without_true_labels_the_noise_is_unknown(arrays, tmp_path, capsys):
    arguments = command(arrays, tmp_path, "--method", "standard")
    del arguments[2:4]  # no --given: the labels in the file are the given ones
    assert run_combo.main(arguments) == 0
    assert "unknown" in capsys.readouterr().out
    [record, _] = read_records([tmp_path / "blobs"])
    assert record["labels"]["noise_before"] is None
    assert "wrong_to_right" not in record["labels"]


BAD_COMMANDS = {
    "unknown method": (
        ["--method", "plcc"],
        "method: expected standard, relabel, plc, lra-clip, lra-simclr or package.module:function, got 'plcc'",
    ),
    "method without settings": (
        ["--method", "lra-clip"],
        "method: expected a block of settings at methods.lra-clip in ",
    ),
    "unknown refiner": (["--refine", "magic"], "refine: expected one of none, paper"),
    "unknown option": (["methods.plc.epoch=3"], "plc: unknown option 'epoch'"),
    "option of the wrong type": (["methods.plc.epochs=many"], "plc: option 'epochs': expected int, got 'many'"),
    "option of the initial classifier": (["initial.epoch=3"], "initial: unknown option 'epoch'"),
    "unknown key": (["thresold=3"], "config: expected the keys"),
    "no value": (["threshold"], "override: expected key=value, got 'threshold'"),
    "no block": (["threshold.x=1"], "override: expected a block at threshold, got 0.0"),
    "no YAML": (["threshold=["], "override: expected a YAML value, got 'threshold=['"),
    "no number": (["weight=abc"], "weight: expected a number, got 'abc'"),
    "no weight": (["weight=2"], "weight: expected a number in [0, 1], got 2"),
    "no score": (["threshold=5"], "threshold: expected a score, in [-0.5, 1] at weight 0.5, got 5"),
    "too low": (["threshold=-0.4", "weight=0.3"], "threshold: expected a score, in [-0.3, 1] at weight 0.3, got -0.4"),
    "no seed": (["seeds=x"], "seeds: expected integers from 0, got 'x'"),
    "no settings": (["methods=plc"], "methods: expected a block of settings, got 'plc'"),
    "no device": (["--device", "foo"], "device: expected auto, cpu or a device that is there, got 'foo'"),
    "no config": (["--config", "nowhere.yaml"], "config: expected a YAML file, nowhere.yaml cannot be read"),
    "no labels": (["--given", "nowhere.npy"], "given: nowhere.npy cannot be read: No such file or directory"),
    "unknown encoder": (["encoder=sight", "--refine", "paper"], "encoder: expected "),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_one_line(case, arrays, tmp_path, capsys):
    more, message = BAD_COMMANDS[case]
    assert run_combo.main(command(arrays, tmp_path, *more)) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")


def test_missing_arrays_are_one_line(arrays, tmp_path, capsys):
    np.savez(tmp_path / "short.npz", train=np.zeros((3, 2)))
    assert run_combo.main(["--data", str(tmp_path / "short.npz"), "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: data: expected the array train_labels in ")
    assert run_combo.main(["--data", str(tmp_path / "none.npz"), "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: data: cannot be read")


def without_times(records):
    return [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]


def test_ctrl_c_leaves_whole_records_and_the_same_command_resumes(arrays, tmp_path, monkeypatch, capsys):
    arguments = command(arrays, tmp_path, "--method", "standard,plc", "--refine", "none")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(run_combo.ADAPTERS, "plc", interrupted)
        assert run_combo.main(arguments) == 130
    assert capsys.readouterr().err.endswith("stopped; run the same command again to resume\n")
    assert [record["method"] for record in read_records([tmp_path / "blobs"])] == ["standard"]
    assert run_combo.main(arguments) == 0
    assert {record["method"] for record in read_records([tmp_path / "blobs"])} == {"standard", "plc"}


@pytest.mark.slow
def test_killed_in_the_middle_of_a_run_it_ends_the_same(arrays, tmp_path):
    options = ["--method", "plc", "methods.plc.epochs=200", "--refine", "none"]
    assert run_combo.main(command(arrays, tmp_path / "whole", *options)) == 0
    script = "import sys; from third_party import loop; loop.CHECKPOINT_SECONDS = 0; from benchmarks import run_combo; "
    script += "sys.exit(run_combo.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", script, *command(arrays, tmp_path / "cut", *options)]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("cut/blobs/.work/confused_plc*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("cut/blobs/*.json"))
    assert run_combo.main(command(arrays, tmp_path / "cut", *options)) == 0
    whole, cut = (without_times(read_records([tmp_path / name / "blobs"])) for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.slow
def test_two_sets_of_labels_at_once_give_the_same_records_and_no_process_outlives_a_kill(arrays, tmp_path):
    options = ["--method", "standard,plc", "methods.plc.epochs=60", "--refine", "none", "--seeds", "0,1"]
    assert run_combo.main(command(arrays, tmp_path / "whole", *options)) == 0
    arguments = command(arrays, tmp_path / "cut", *options, "jobs=2")
    script = [sys.executable, str(ROOT / "benchmarks" / "run_combo.py"), *arguments]
    with subprocess.Popen(script, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("cut/blobs/*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert run_combo.main(arguments) == 0
    whole, cut = (without_times(read_records([tmp_path / name / "blobs"])) for name in ("whole", "cut"))
    assert whole == cut


def test_settings_without_weights_use_none_wherever_one_works(monkeypatch):
    monkeypatch.chdir(ROOT / "benchmarks" / "glyph_clip")
    assert weights_used({"epochs": 3}) == {}
