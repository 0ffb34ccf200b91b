"""The README is true: its tables come from the committed records, its links and commands exist."""

import re
from pathlib import Path

import pytest

from benchmarks import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TABLES = re.findall(r"<!-- python benchmarks/table\.py ([^\n]+) -->\n\n((?:\|[^\n]*\n|\n(?=\|))+)", README)


@pytest.mark.parametrize(("arguments", "shown"), TABLES, ids=[arguments for arguments, _ in TABLES])
def test_tables_come_from_records(arguments, shown, capsys):
    assert table.main([str(ROOT / argument) for argument in arguments.split()]) == 0
    assert capsys.readouterr().out == shown


def test_there_are_tables():
    assert len(TABLES) == README.count("<!-- python benchmarks/table.py")
    assert TABLES


def test_scripts_configs_and_pictures_exist():
    paths = re.findall(r"(?:benchmarks|third_party)/[\w./-]+\.\w+", README)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
