"""The wheel outside a checkout: presets and verbs are in it. Needs PyPI for setuptools, so .ci/run has a stage for it."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PRESETS = {f"{path.stem}_{path.parent.name}": path for path in (ROOT / "configs").glob("*/*.py")}
VERBS = sorted(path.stem for path in (ROOT / "cv2jax" / "cli").glob("*.py") if path.stem not in ("main", "__init__"))

pytestmark = pytest.mark.full


def _run(*command: str | pathlib.Path, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built from a copy: setuptools leaves its build/ beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cv2jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = _run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", "dist", cwd=source)
    assert done.returncode == 0, done.stderr
    (found,) = (source / "dist").glob("cv2jax-*.whl")
    return found


@pytest.fixture(scope="module")
def programs(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """bin/ of a virtual environment with the wheel, which borrows the dependencies of the running one."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    done = _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=place)
    assert done.returncode == 0, done.stderr
    site = next(place.glob("lib/python*/site-packages"))
    # A directory named in a .pth file is searched, its own .pth files are not read: an editable cv2jax stays unseen.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return place / "bin"


def test_wheel_holds_the_presets_and_nothing_of_the_tests(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"cv2jax/{path.relative_to(ROOT)}" for path in PRESETS.values()} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cv2jax"}


def test_presets_are_found_outside_a_checkout(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = (
        "import cv2jax, cv2jax.config as c; print(cv2jax.__file__, *[c.load_config(n).name for n in c.preset_names()])"
    )
    done = _run(programs / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, *names = done.stdout.split()
    assert pathlib.Path(place).is_relative_to(programs.parent)
    assert names == sorted(PRESETS)


def test_train_looks_up_presets_outside_a_checkout(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = (programs / "cv2jax", "train", "speech_tokenizer_tny", "--workdir", "run")
    misspelt = _run(*command, cwd=tmp_path)
    assert misspelt.returncode == 2
    assert "did you mean 'speech_tokenizer_tiny'" in misspelt.stderr
    found = _run(
        programs / "cv2jax", "train", "speech_tokenizer_tiny", "--workdir", "run", "--corpus", "none", cwd=tmp_path
    )
    assert found.returncode == 2, found.stderr
    assert "none" in found.stderr
    assert "preset" not in found.stderr
    assert not (tmp_path / "run").exists()


def test_every_verb_is_there(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = _run(programs / "cv2jax", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == VERBS
