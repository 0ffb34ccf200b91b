"""The folders are as designed: imports run one way, files stay short, and what is imported is declared."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {".ci", ".gitignore", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "setup.cfg", "tests"}
FOLDERS = {
    "synth_refine": {"synth_refine"},
    "third_party": {"third_party"},
    "adapters": {"adapters", "third_party", "synth_refine"},
    "benchmarks": {"benchmarks", "adapters", "third_party", "synth_refine"},
}
ROOMS = {
    "__init__": {"_io"},  # and lazily what a user types
    "_io": set(),
    "images": {"_io"},
    "labels": {"_io", "images"},
    "refine": {"_io", "labels"},
    "synthetic": {"_io", "images"},
    "review": {"_io", "labels"},
    "scale": {"_io", "refine", "labels"},
    "noise": {"_io"},
    "settings": {"_io", "refine"},
    "summary": {"_io", "labels", "refine"},
    "pipeline": {"_io", "images", "labels", "refine", "synthetic", "review", "scale", "settings", "summary"},
    "commands": {
        "_io",
        "images",
        "labels",
        "refine",
        "synthetic",
        "review",
        "scale",
        "settings",
        "summary",
        "pipeline",
    },
    "cli": {"_io", "settings", "commands"},
}
"""What each folder and file of synth_refine may import of the others."""

MOST_LINES = 400
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "ray": "ray[data]",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Where the import has another name. Triton comes with torch, markupsafe with jinja2."""

COME_ALONG = {"triton", "markupsafe"}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it, but not for type checkers alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(name: str) -> str | None:
    """The file of ours that a name lies in, relative to the root without its ending."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if (ROOT / f"{path}.py").is_file():
            return path
        if (ROOT / path / "__init__.py").is_file():
            return f"{path}/__init__"
    return None


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder: str) -> None:
    assert files(folder)
    for file in files(folder):
        ours = {name.split(".")[0] for name in imports(file)} & set(FOLDERS)
        assert ours <= FOLDERS[folder], f"{file.relative_to(ROOT)} imports {sorted(ours - FOLDERS[folder])}"


def test_stages_import_earlier_stages_alone() -> None:
    for file in files("synth_refine"):
        own = file.relative_to(ROOT / "synth_refine")
        room = own.parts[0].removesuffix(".py")
        for name in imports(file):
            if (found := module(name)) and found != "synth_refine/__init__":
                other = found.split("/")[1]
                assert other in {room, *ROOMS[room]}, f"{own} imports {name}"


def test_no_two_files_import_each_other() -> None:
    graph = {}
    for folder in FOLDERS:
        for file in files(folder):
            own = file.relative_to(ROOT).with_suffix("").as_posix()
            found = {module(name) for name in imports(file)} - {None}
            graph[own] = {one for one in found if not one.endswith("__init__")}
    assert len(graph) > 50
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_file_is_long() -> None:
    lengths = {
        file.relative_to(ROOT / "synth_refine").as_posix(): len(file.read_text().splitlines())
        for file in files("synth_refine")
    }
    assert not {name for name, count in lengths.items() if count > MOST_LINES}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_only_the_product_is_installed_and_all_of_it() -> None:
    assert setup()["options"]["packages"] == "find:"
    assert setup()["options.packages.find"]["include"] == "synth_refine*"
    for file in files("synth_refine"):
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} would not be found"


def test_what_is_imported_is_declared() -> None:
    extras = setup()["options.extras_require"]
    text = setup()["options"]["install_requires"] + "".join(extras[name] for name in extras if name != "test")
    declared = {re.split(r"[><=! ]", line)[0] for line in text.split("\n")}
    for file in files("synth_refine"):
        for name in {name.split(".")[0] for name in imports(file)} - {*sys.stdlib_module_names, "synth_refine"}:
            assert name in COME_ALONG or DISTRIBUTIONS.get(name, name) in declared, f"{file} imports {name}"


def test_the_top_level_is_the_designed_one() -> None:
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    assert {line.split("/")[0] for line in listing.splitlines()} <= TOP_LEVEL | set(FOLDERS)


def test_tests_have_flat_unique_names() -> None:
    assert not [file for file in files("tests") if file.name == "__init__.py"]
    assert len({file.name for file in files("tests")}) == len(files("tests"))


def test_no_file_of_a_user_is_unpickled() -> None:
    for file in (one for folder in FOLDERS for one in files(folder)):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            name = ast.unparse(node.func)
            where = f"{file.relative_to(ROOT)}:{node.lineno}"
            assert name not in {"pickle.load", "pickle.loads", "yaml.load", "joblib.load", "eval", "exec"}, where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where
            assert keywords.get("allow_pickle", "False") == "False", where
            if name in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle") == "False", where
