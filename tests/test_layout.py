"""The folders are as designed: imports run one way and nothing else of ours is installed."""

import ast
import configparser
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "synth_refine": {"synth_refine"},
    "third_party": {"third_party"},
    "adapters": {"adapters", "third_party", "synth_refine"},
    "benchmarks": {"benchmarks", "adapters", "third_party", "synth_refine"},
}
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "adapters",
    "benchmarks",
    "pyproject.toml",
    "setup.cfg",
    "synth_refine",
    "tests",
    "third_party",
}


def imported(source):
    """First parts of the absolute imports of a file, wherever in it they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        ours = set(imported(file.read_text())) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[folder], f"{file.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[folder])}"


def test_the_top_level_is_the_designed_one():
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    assert {line.split("/")[0] for line in listing.splitlines()} <= TOP_LEVEL


def test_only_the_product_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    assert packages
    assert {package.split(".")[0] for package in packages} == {"synth_refine"}


def test_tests_have_flat_unique_names():
    tests = list((ROOT / "tests").rglob("*.py"))
    assert not [file for file in tests if file.name == "__init__.py"]
    assert len({file.name for file in tests}) == len(tests)


def test_no_file_of_a_user_is_unpickled():
    for folder in MAY_IMPORT:
        for file in (ROOT / folder).rglob("*.py"):
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
