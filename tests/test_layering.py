"""The house rules of the design, checked from the source: who imports whom, mesh axes, sizes, docstrings, no stubs."""

import ast
import functools
import itertools
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "cv2jax"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    **dict.fromkeys(("config", "shapes"), 0),
    **dict.fromkeys(("audio", "files", "parallel"), 1),
    "remote": 2,  # on files
    **dict.fromkeys(("nn", "text"), 2),
    **dict.fromkeys(("data", "models", "synthesis"), 3),
    **dict.fromkeys(("train", "convert", "evaluation"), 4),
    "tasks": 5,
    "jobs": 6,
    "cli": 7,
}
# A job is a file of jobs/ with a verb of its name; the other files of jobs/ are parts that jobs share. These two run
# whole jobs one after the other, which is what they are for.
COMPOSING_JOBS = ("quickstart", "ablate")
VERBS = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - {"main", "__init__"}

# Third-party packages with only one home: package → files (or folders) that may import it.
HOMES = {
    "orbax": ("train/checkpoint.py",),  # its v1 interface still moves between releases
    "apache_beam": ("jobs/prepare_beam.py",),  # only in the extra [beam]
    "espeakng_loader": ("jobs/",),  # copyleft, and only in the extra [corpus]
    "tensorboardX": ("train/metrics.py",),
    "pyworld": ("audio/f0.py",),  # only in the extra [vocoder]
    "pesq": ("evaluation/perceptual.py",),  # only in the extra [judges], and the next two
    "pystoi": ("evaluation/perceptual.py",),
    "pocketsphinx": ("evaluation/grammar.py",),
}
MAX_FILE_LINES, MAX_MEDIAN_FILE_LINES = 400, 200
MAX_FUNCTION_LINES, COMMON_FUNCTION_LINES, COMMON_SHARE = 80, 50, 0.9
MIN_ANNOTATED_SHARE = 0.95

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _where(path: pathlib.Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def _dotted(path: pathlib.Path) -> str:
    """cv2jax/audio/mel.py → cv2jax.audio.mel; a package's __init__ is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: pathlib.Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, also inside functions; `from a import b` gives a.b."""
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.rstrip(".")  # of an f-string, the part before the first brace


def _layering_error(source: str, target: str) -> str | None:
    """Why `source` may not import `target`; both are dotted names, None if it may."""
    src, dst = source.split(".")[1:], target.split(".")[1:]
    if not dst or dst[0].startswith("__"):
        return None  # `import cv2jax` for its version or place
    if not src:
        return f"cv2jax/__init__.py imports {target}: importing cv2jax must cost nothing"
    if dst[0] not in LEVELS:
        return f"{source} imports {target}, and '{dst[0]}' has no level in the design"
    if src[0] == dst[0]:
        return _inside_error(source, target, src, dst)
    if LEVELS[dst[0]] >= LEVELS[src[0]]:
        return f"{source} (level {LEVELS[src[0]]}) imports {target} (level {LEVELS[dst[0]]}): only downwards"
    if (src[0], dst[0]) == ("train", "models"):
        return f"{source} imports {target}: train/ knows no concrete model"
    return None


def _inside_error(source: str, target: str, src: list[str], dst: list[str]) -> str | None:
    """Within one package imports are free, except between models, between jobs and between verbs."""
    if len(src) == 1 or len(dst) == 1 or src[1] == dst[1]:
        return None
    if src[0] == "models":
        return f"{source} imports {target}: models do not know their siblings"
    if src[0] == "jobs" and dst[1] in VERBS and src[1] not in COMPOSING_JOBS:
        return f"{source} imports {target}: only {' and '.join(COMPOSING_JOBS)} compose jobs"
    if src[0] == "cli" and dst[1] in VERBS:
        return f"{source} imports {target}: verbs do not know each other"
    return None


def _axis_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, axis) wherever code names a mesh axis; "data" is an ordinary word elsewhere than in a spec or mesh.shape."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor"):
            yield node.lineno, str(node.value)
        inside: Iterable[ast.AST] = ()
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("PartitionSpec", "P", "Mesh"):
            inside = ast.walk(node)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("mesh.shape"):
            inside = ast.walk(node.slice)
        for part in inside:
            if isinstance(part, ast.Constant) and part.value == "data":
                yield part.lineno, "data"


def _functions(tree: ast.Module) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def _length(function: FunctionNode) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def _public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, FunctionNode | ast.ClassDef]]:
    """Public classes, functions and methods, with `__call__`; flax's `setup` is its contract, not ours to explain."""
    for node in body:
        if not isinstance(node, FunctionNode | ast.ClassDef):
            continue
        if (node.name.startswith("_") and node.name != "__call__") or (inside and node.name == "setup"):
            continue
        yield f"{inside}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from _public(node.body, f"{node.name}.")


def _arguments(function: FunctionNode) -> list[ast.arg]:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [arg for arg in named if arg.arg not in ("self", "cls")]


def _stubs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Functions that do nothing; a Protocol's methods are declarations, not stubs."""
    declared = {
        id(function)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases)
        for function in node.body
    }
    for function in _functions(tree):
        nothing = all(
            isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in function.body
        )
        if nothing and id(function) not in declared:
            yield function.lineno, f"{function.name} does nothing"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, node.id


def _assert_none(errors: Iterable[str]) -> None:
    found = list(errors)
    assert not found, "\n" + "\n".join(found)


def test_every_package_has_a_level() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names - {"__init__", "configs"} <= set(LEVELS)


def test_imports_point_downwards() -> None:
    _assert_none(
        f"{_where(path, line)}: {error}"
        for path in FILES
        for line, target in _imports(path, _tree(path))
        if target.split(".")[0] == "cv2jax"
        if (error := _layering_error(_dotted(path), target))
    )


def test_third_party_packages_stay_at_home() -> None:
    errors = []
    for path, (line, target) in ((p, found) for p in FILES for found in _imports(p, _tree(p))):
        inner, package = path.relative_to(PACKAGE).as_posix(), target.split(".")[0]
        if inner.startswith("synthesis/") and package == "flax":
            errors.append(f"{_where(path, line)}: synthesis/ drives functions that it is given, without flax")
        if package in HOMES and not inner.startswith(HOMES[package]):
            errors.append(f"{_where(path, line)}: {package} is imported only by {', '.join(HOMES[package])}")
        if package in ("torch", "tensorflow", "onnxruntime") and not inner.startswith(
            ("convert/", "jobs/bench_lm_torch", "jobs/bench_flow_torch")
        ):
            errors.append(f"{_where(path, line)}: {package} is no dependency of cv2jax")
    _assert_none(errors)


def test_mesh_axes_are_named_only_in_parallel_and_config() -> None:
    _assert_none(
        f"{_where(path, line)}: names the mesh axis '{axis}'; use cv2jax.parallel"
        for path in [*FILES, *sorted((ROOT / "configs").glob("*/*.py"))]
        if path.relative_to(ROOT).as_posix() != "cv2jax/config.py" and path.parent.name != "parallel"
        for line, axis in _axis_names(_tree(path))
    )


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    _assert_none(
        f"{_where(path, n)}: {n} lines, at most {MAX_FILE_LINES}" for path, n in lengths.items() if n > MAX_FILE_LINES
    )
    assert statistics.median(lengths.values()) <= MAX_MEDIAN_FILE_LINES


def test_functions_are_short() -> None:
    lengths = {_where(path, f.lineno) + f" {f.name}": _length(f) for path in FILES for f in _functions(_tree(path))}
    _assert_none(f"{w}: {n} lines, at most {MAX_FUNCTION_LINES}" for w, n in lengths.items() if n > MAX_FUNCTION_LINES)
    long = [f"{where}: {n} lines" for where, n in lengths.items() if n > COMMON_FUNCTION_LINES]
    assert len(long) <= (1 - COMMON_SHARE) * len(lengths), "\n".join(long)


def test_every_module_and_public_name_has_a_docstring() -> None:
    modules = (p for p in FILES if p.name != "__init__.py" and not ast.get_docstring(_tree(p)))
    names = (
        f"{_where(path, node.lineno)}: {name} has no docstring"
        for path in FILES
        for name, node in _public(_tree(path).body)
        if not ast.get_docstring(node)
    )
    _assert_none(itertools.chain((f"{_where(p, 1)}: the module has no docstring" for p in modules), names))


def test_arguments_are_annotated() -> None:
    arguments = [(p, arg) for p in FILES for f in _functions(_tree(p)) for arg in _arguments(f)]
    bare = [f"{_where(path, arg.lineno)}: {arg.arg} has no type" for path, arg in arguments if arg.annotation is None]
    assert len(bare) <= (1 - MIN_ANNOTATED_SHARE) * len(arguments), "\n".join(bare)


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    left = (
        f"{_where(path, number)}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    )
    stubs = (f"{_where(path, line)}: {what}" for path in FILES for line, what in _stubs(_tree(path)))
    _assert_none(itertools.chain(left, stubs))


def test_every_test_asserts_something() -> None:
    checks = re.compile(r"\bassert|raises|assert_|warns|check_")
    errors = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for function in _functions(ast.parse(text)):
            segment = ast.get_source_segment(text, function) or ""
            if function.name.startswith("test_") and not checks.search(segment):
                errors.append(f"{_where(path, function.lineno)}: {function.name} asserts nothing")
    _assert_none(errors)


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("cv2jax.cli.train", "cv2jax.config", True),
        ("cv2jax.config", "cv2jax.audio.mel", False),
        ("cv2jax.nn.attention", "cv2jax.text.characters", False),  # the same level
        ("cv2jax.models.speech_tokenizer.fsq", "cv2jax.models.speech_tokenizer.config", True),
        ("cv2jax.models.speech_tokenizer.fsq", "cv2jax.models.text_speech_lm.model", False),
        ("cv2jax.synthesis.engine", "cv2jax.models.hift_vocoder", False),
        ("cv2jax.train.loop", "cv2jax.models.speech_tokenizer.model", False),
        ("cv2jax.tasks.speech_tokenizer", "cv2jax.models.speech_tokenizer.model", True),
        ("cv2jax.jobs.prepare", "cv2jax.jobs.train", False),
        ("cv2jax.jobs.quickstart", "cv2jax.jobs.prepare", True),
        ("cv2jax.jobs.corpus", "cv2jax.jobs.espeak", True),
        ("cv2jax.train.run", "cv2jax.__version__", True),
        ("cv2jax.audio.mel", "cv2jax.strange", False),
    ],
)
def test_the_layering_rule(source: str, target: str, allowed: bool) -> None:
    assert (_layering_error(source, target) is None) is allowed


def test_the_checks_find_what_they_look_for() -> None:
    source = """
import importlib
def f(x, *rest, k: int):
    from . import mel
    importlib.import_module(f"cv2jax.tasks.{k}")
def g() -> None:
    "Only words."
def h():
    raise NotImplementedError
spec = PartitionSpec(None, ("data", "fsdp"))
plain = {"data": 1}
"""
    tree = ast.parse(source)
    path = PACKAGE / "audio" / "made_up.py"
    assert {name for _, name in _imports(path, tree)} == {"importlib", "cv2jax.audio.mel", "cv2jax.tasks"}
    assert sorted(axis for _, axis in _axis_names(tree)) == ["data", "fsdp"]
    assert [what for _, what in _stubs(tree)] == ["g does nothing", "NotImplementedError"]
    first = next(_functions(tree))
    assert [arg.arg for arg in _arguments(first) if arg.annotation is None] == ["x", "rest"]
    assert _length(first) == 3
    assert [name for name, node in _public(tree.body) if not ast.get_docstring(node)] == ["f", "h"]
