"""The READMEs are true: their tables come from the committed records, their links, commands and recipes exist."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import run_ablation, run_combo, table
from synth_refine import cli

ROOT = Path(__file__).resolve().parent.parent
READMES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md")), *sorted(ROOT.glob("synth_refine/*/*.md"))]
README = ROOT / "README.md"
by_path = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))


@by_path
def test_tables_and_figures_come_from_records(path):
    text = path.read_text()
    assert text.count("<!-- python benchmarks/table.py") == text.count("<!-- end -->") == len(table.BLOCK.findall(text))
    assert table.updated(text) == text


def test_an_old_table_is_renewed(tmp_path):
    text = "# A\n\n<!-- python benchmarks/table.py benchmarks/results/from_folder -->\n\n| old |\n\n<!-- end -->\n\nB\n"
    (path := tmp_path / "README.md").write_text(text)
    assert table.main(["--update", str(path)]) == 0
    renewed = path.read_text()
    assert renewed == table.updated(renewed)
    assert renewed.startswith("# A\n\n<!-- python")
    assert "| digits " in renewed
    assert "| old |" not in renewed
    assert renewed.endswith("<!-- end -->\n\nB\n")


@by_path
def test_links_pictures_and_named_files_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    for named in re.findall(r"(?:synth_refine|benchmarks|third_party|adapters|tests)/[\w./-]+\.\w+", text):
        assert (ROOT / named).exists(), named


def commands(start):
    for path in READMES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in () if language else block.replace("\\\n", " ").splitlines():
                if line.startswith(start):
                    yield shlex.split(line, comments=True)[len(shlex.split(start)) :]


@pytest.mark.parametrize("command", list(commands("synth-refine")), ids=" ".join)
def test_commands_are_understood(command):
    cli._parser().parse_args(command)


@pytest.mark.parametrize("script", [run_combo, run_ablation])
def test_benchmark_commands_are_understood(script):
    found = list(commands(f"python benchmarks/{script.__name__.split('.')[1]}.py"))
    assert found
    for command in found:
        script.parse(command)


def test_recipes_are_those_that_run():
    recipe = re.compile(r"\*\*([^*\n]+)\*\*[^\n]*\n```python\n(.*?)```", re.DOTALL)
    known = dict(recipe.findall((ROOT / "synth_refine" / "labels" / "README.md").read_text()))
    shown = dict(recipe.findall(README.read_text()))
    assert len(shown) == 3
    assert shown.items() <= known.items()  # tests/test_codebase_examples.py runs those


def test_the_first_screen_leads_on():
    text = README.read_text()
    assert len(text.splitlines()) < 220
    assert re.search(r"^pip install '\.\[test\]'", text, re.MULTILINE)  # the checks of this repository run this line
