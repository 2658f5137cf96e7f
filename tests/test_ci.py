"""CI runs what the README says, the hooks run what CI runs, and the markers are those that are explained."""

import importlib
import pathlib
import pkgutil
import re
import subprocess
import tomllib

import pytest
import yaml

from cv2jax.cli.main import verbs

ROOT = pathlib.Path(__file__).parents[1]


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _readme_command(name: str, directory: pathlib.Path) -> subprocess.CompletedProcess[str]:
    code = f"set -euo pipefail; source {ROOT}/.ci/lib.sh; readme_command {name}"
    return subprocess.run(["bash", "-c", code], cwd=directory, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("extra", ["test", "dev"])
def test_what_the_tests_import_is_in_the_extra(extra: str) -> None:
    start = _read("setup.py").index(f'"{extra}": [')
    assert '"PyYAML>=' in _read("setup.py")[start:].split("]")[0]


@pytest.mark.parametrize(("name", "part"), [("test", "pytest"), ("quickstart", "cv2jax quickstart")])
def test_readme_holds_the_commands_that_ci_runs(name: str, part: str) -> None:
    done = _readme_command(name, ROOT)
    assert done.returncode == 0, done.stderr
    assert part in done.stdout
    assert done.stdout in _read("README.md")


def test_a_readme_without_the_command_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "README.md").write_text("```bash\ntrue\n```\n", encoding="utf-8")
    done = _readme_command("test", tmp_path)
    assert done.returncode == 1
    assert "<!-- test-command -->" in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "last"), [("true", 0, "2 passed in"), ("false", 1, "1 failed, 1 passed in")]
)
def test_a_failed_stage_fails_the_run_and_hides_no_other(command: str, code: int, last: str) -> None:
    script = f"set -euo pipefail; source .ci/lib.sh; stage first {command}; stage second echo seen; finish"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "\nseen\n" in done.stdout
    assert last in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["run", "full", "lib.sh"])
def test_scripts_are_valid_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hooks_run_the_lint_of_ci() -> None:
    stages = re.findall(r"^stage (?:lint|format|types) (.*)$", _read(".ci/run"), flags=re.MULTILINE)
    hooks = yaml.safe_load(_read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert len(stages) == 3
    assert [hook["entry"] for hook in hooks] == stages


def test_every_marker_is_run_somewhere_and_explained() -> None:
    options = tomllib.loads(_read("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    markers = {line.partition(":")[0] for line in options["markers"]}
    excluded = set(re.findall(r"not (\w+)", options["addopts"]))
    run = set(re.findall(r"pytest -m '?(\w+)", _read(".ci/run") + _read(".ci/full")))
    assert markers == excluded == run
    assert all(f"`{marker}`" in _read("CONTRIBUTING.md") for marker in markers)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md"])
def test_pages_name_only_verbs_that_exist(page: str) -> None:
    named = set(re.findall(r"(?:^\s*|`|&& |-- )cv2jax ([a-z0-9]+)", _read(page), flags=re.MULTILINE))
    assert named
    assert named <= set(verbs())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_only_code_that_exists(page: str) -> None:
    """Imports of their examples, and dotted names and files in their text."""
    text = _read(page)
    imports = re.findall(r"^from (cv2jax[\w.]*) import ([\w, ]+)", text, flags=re.MULTILINE)
    for module, names in imports:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module} has no {name.strip()}"
    assert bool(imports) == (page == "README.md")
    for dotted in re.findall(r"`(cv2jax(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(dotted) is not None
    for file in re.findall(r"`((?:cv2jax|configs|tests|launch)/[\w/]+\.\w+)`", text):
        assert (ROOT / file).is_file(), f"{page} names {file}"
