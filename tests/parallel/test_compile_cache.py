"""The compile cache: where it lies, whose wish wins, what a kill or a damaged file does to it, and that it is used."""

import os
import pathlib
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator

import jax
import pytest

from cv2jax.cli import main
from cv2jax.config import UserError
from cv2jax.parallel import compile_cache
from cv2jax.parallel.compile_cache import machine, share_compiled, tidy, use_compile_cache

PLACE = "JAX_COMPILATION_CACHE_DIR"
COMPILE = """
from cv2jax.parallel.compile_cache import use_compile_cache
use_compile_cache()
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: 3 * x + 1)(2.0)), len(hits))
"""


@pytest.fixture(autouse=True)
def _not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_ours", False)


@pytest.fixture
def settings() -> Iterator[None]:
    """JAX's settings are put back."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_it_lies_in_the_users_cache_alone_and_bounded(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    use_compile_cache(environment)
    directory = tmp_path / "cv2jax" / "compiled" / machine()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert environment == {
        "XDG_CACHE_HOME": str(tmp_path),
        PLACE: str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    assert not caplog.records


@pytest.mark.parametrize("environment", [{}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "not/absolute"}])
def test_it_lies_in_the_home_otherwise(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compile_cache(environment)
    assert environment[PLACE] == str(tmp_path / ".cache" / "cv2jax" / "compiled" / machine())


def test_the_users_settings_win(tmp_path: pathlib.Path) -> None:
    for environment in ({PLACE: "/mine"}, {PLACE: ""}, {"CV2JAX_COMPILE_CACHE": "0"}):
        before = dict(environment, XDG_CACHE_HOME=str(tmp_path))
        after = dict(before)
        use_compile_cache(after)
        assert after == before
    choosy = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    use_compile_cache(choosy)
    assert choosy["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7"


def test_an_unknown_wish_is_named() -> None:
    with pytest.raises(UserError, match="CV2JAX_COMPILE_CACHE=yes: 0 turns the compile cache off"):
        use_compile_cache({"CV2JAX_COMPILE_CACHE": "yes"})


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cv2jax").write_text("a file")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    use_compile_cache(environment)
    assert PLACE not in environment
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/cv2jax/compiled/{machine()}: no compile cache there ([Errno 20] Not a directory: "
        f"'{tmp_path}/cv2jax/compiled/{machine()}'); CV2JAX_COMPILE_CACHE=0 spares this line"
    ]


def test_another_kind_of_cpu_has_another_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = machine(), pathlib.Path.read_text
    assert machine() == before
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self, **how: read(self, **how).replace("flags", "flags\t: amx")
    )
    assert machine() != before


def _entry(directory: pathlib.Path, key: str, data: bytes, used: float = 0.0) -> pathlib.Path:
    path = directory / f"{key}-cache"
    path.write_bytes(data)
    if used:
        os.utime(path, (used, used))
    return path


def test_what_a_kill_left_half_written_goes_and_each_entry_is_read_once(tmp_path: pathlib.Path) -> None:
    whole = zlib.compress(bytes(1000))
    _entry(tmp_path, "jit_whole-1", whole)
    torn = [_entry(tmp_path, f"jit_torn-{i}", data) for i, data in enumerate((b"", whole[:-3], b"\x28\xb5\x2f\xfdx"))]
    old = _entry(tmp_path, "jit_old-5", b"never asked again", used=1e9)
    os.utime(tmp_path / "jit_whole-1-cache")
    (tmp_path / ".tidied").touch()
    tidy(tmp_path)
    assert not any(path.exists() for path in torn)
    assert {path.name for path in tmp_path.glob("jit*")} == {"jit_whole-1-cache", old.name}


def test_what_was_used_longest_ago_goes_first(tmp_path: pathlib.Path) -> None:
    data = zlib.compress(os.urandom(1000))
    for key, used in (("jit_b", 2e9), ("jit_a", 1e9), ("jit_c", 3e9)):
        _entry(tmp_path, key, data, used)
    tidy(tmp_path, max_bytes=2 * len(data))
    assert {path.name for path in tmp_path.glob("jit*")} == {"jit_b-cache", "jit_c-cache"}


def test_programs_are_kept_and_damage_does_no_harm(tmp_path: pathlib.Path) -> None:
    """Two processes at once, then one with what they left, one with entries damaged later, one with entries torn now."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERSIST"))}
    ours |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMPILE]
        return subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output.startswith("7.0 "), output
        return output.split()[1], errors

    both = [start(), start()]
    assert all(errors == "" for _, errors in map(finish, both))
    again, errors = finish(start())
    assert (int(again) > 0, errors) == (True, "")
    directory = tmp_path / "cv2jax" / "compiled" / machine()
    entries = list(directory.glob("*-cache"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-20])
        os.utime(entry, (1e9, 1e9))  # as if it had been found whole before
    hits, errors = finish(start())
    assert hits == "0"
    assert "Error reading persistent compilation cache entry" in errors
    for entry in entries:
        os.utime(entry)
    assert finish(start()) == ("0", "")
    assert finish(start()) == (again, "")


def test_the_processes_of_a_run_share_a_directory_of_it(tmp_path: pathlib.Path, settings: None) -> None:
    share_compiled(tmp_path / "compiled", first=True)
    assert not (tmp_path / "compiled").exists()  # the user chose another place
    use_compile_cache({"XDG_CACHE_HOME": str(tmp_path)})
    share_compiled(tmp_path / "compiled", first=True)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled" / machine())
    assert (tmp_path / "compiled" / machine()).is_dir()
    assert not jax.config.jax_share_binary_between_hosts


def test_every_verb_uses_it_but_those_that_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(main, "use_compile_cache", lambda: calls.append("used"))
    assert main.run(["train"]) == 2
    assert calls == ["used"]
    assert main.run(["bench"]) == 2
    assert calls == ["used"]
