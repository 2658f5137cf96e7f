"""Configurations: frozen keyword-only dataclasses, dotted overrides, validation, comparison.

One Python file in `configs/` is one experiment; its `get_config()` returns a `TrainConfig`. A config is a value:
hashable, printable, stored as JSON beside the checkpoint and compared on resume. Every user mistake is a `UserError`.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A user's mistake: one line that names the thing, the place and the mend; the CLI exits with its code."""

    exit_code = 2


RULE_TABLES = ("fsdp", "hybrid", "replicated")  # of MeshConfig.rules; their tables are in cv2jax/parallel/sharding.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis, -1 for `data` means all that remain; or a preset, which gives `data` and `fsdp`."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    preset: str = ""  # of cv2jax/parallel/presets.py: host, v5e-16, 2xv5e-256, gpu-8, …
    rules: str = "fsdp"  # hybrid: fsdp must stay inside a slice or host; replicated: parameters whole on every device

    def validate(self) -> None:
        """Raises UserError unless each axis is positive (`data` may be -1), the table known and both fit together."""
        if self.rules not in RULE_TABLES:
            hint = _suggest(self.rules, RULE_TABLES)
            raise UserError(f"mesh.rules={self.rules} is unknown{hint}; choose one of {', '.join(RULE_TABLES)}")
        if self.preset and (self.data, self.fsdp) != (-1, 1):
            raise UserError(f"mesh.preset={self.preset} gives mesh.data and mesh.fsdp: leave those, or the preset")
        if self.rules == "replicated" and self.tensor != 1:
            raise UserError(f"mesh.tensor={self.tensor}: mesh.rules=replicated splits no parameter; set 1, or fsdp")
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            if value < 1 and not (name == "data" and value == -1):
                raise UserError(
                    f"mesh.{name}={value}: give a positive number of devices (mesh.data may be -1: the rest)"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which prepared corpus to read, and how it is cut into batches of a few static shapes."""

    corpus: str = ""  # a directory written by `cv2jax prepare`; of the language model, by `cv2jax tokenize`
    train_split: str = "train"
    eval_split: str = "test"
    batch_seconds: float = 64.0  # audio in one global batch, padding included
    batch_multiple: int = 8  # every batch size is a multiple of it, whatever the mesh: the order knows no devices
    num_buckets: int = 4  # static shapes, that is: compilations
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_characters_per_second: float = 50.0  # text beyond is none that was spoken; audio under 1 s counts as 1 s
    prefix: Literal["", "none", "instruct", "speaker"] = ""  # language model: that its corpus must have; "": any
    row_length: int = 2048  # language model: positions of a packed row
    batch_rows: int = 8  # language model: rows of a global batch
    max_segments: int = 64  # language model: at most so many utterances in a row
    speech_tokens: str = ""  # flow: the file that `cv2jax encode` wrote for the corpus
    speaker_embeddings: str = ""  # flow: the file that `cv2jax embed` wrote for the corpus; "": a stand-in a speaker
    embedding_of: Literal["utterance", "speaker"] = "utterance"  # flow: each its own, or the mean of its speaker's
    speech_tokenizer: str = ""  # language model: workdir of the run that made its tokens, to read aloud what it says
    num_workers: int = 0  # processes that read and decode; 0 reads in threads of the main process
    num_threads: int = 2  # that read when num_workers is 0
    prefetch: int = 4  # batches read ahead; each worker process holds at least 4

    def validate(self) -> None:
        """Raises UserError for values no plan can be made from."""
        positive = "batch_seconds batch_multiple num_buckets max_seconds max_characters_per_second num_threads prefetch"
        positive += " row_length batch_rows max_segments"
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise UserError(f"data.{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"data.min_seconds={self.min_seconds}: must lie between 0 and data.max_seconds={self.max_seconds}"
            )
        if self.embedding_of == "speaker" and not self.speaker_embeddings:
            raise UserError(
                "data.embedding_of=speaker: there are no embeddings; give data.speaker_embeddings, a file of `cv2jax embed`"
            )
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, then a cosine to `final_learning_rate` or a constant, and a global-norm clip."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 5.0
    ema_decay: float = 0.0  # of a moving average of the parameters, which evaluation then uses; 0: none

    def validate(self) -> None:
        """Raises UserError for a rate, clip or warm-up that cannot be meant."""
        for name in ("learning_rate", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must be positive")
        for name in ("warmup_steps", "weight_decay", "final_learning_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must not be negative")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must lie in [0, 1)")
        if self.final_learning_rate > self.learning_rate:
            raise UserError(
                f"optimizer.final_learning_rate={self.final_learning_rate}: must not exceed "
                f"optimizer.learning_rate={self.learning_rate}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation: the kernels that `targets` name get trained factors, all else is frozen (Hu et al. 2021).

    A name is a glob over the end of a parameter's path: `query` is every `…/query/kernel`, `head_kernel` that parameter,
    `backbone/*/out` only those inside the backbone.
    """

    rank: int = 0  # of the factors; 0: off, everything is trained
    alpha: float = 16.0  # their product is scaled by alpha / rank
    targets: tuple[str, ...] = ("query", "key", "value", "out")
    also_trained: tuple[str, ...] = ()  # parameters trained as they are, such as head_kernel and head_bias

    def validate(self) -> None:
        """Raises UserError for a rank, scale or list of targets that cannot be meant."""
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank}: must be 0 (off) or more")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha}: must be positive")
        if self.rank and not self.targets:
            raise UserError("lora.targets=(): name the kernels to adapt, for example query, or set lora.rank=0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One experiment: a task (a file in `cv2jax/tasks`), its model, data, optimizer and mesh."""

    name: str
    task: str
    model: Any  # the task's own frozen config
    num_steps: int
    seed: int = 0
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    init_from: str = ""  # weights to start from: the workdir of a run, or a Qwen2 backbone's Hugging Face directory
    mesh: MeshConfig = MeshConfig()
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    log_every: int = 20
    evaluate_every: int = 200
    evaluate_utterances: int = 256  # held-out utterances each evaluation decodes; 0 decodes them all
    save_every: int = 200
    keep_checkpoints: int = 2
    stuck_seconds: float = 1800.0  # a step that takes longer ends the process, to be started again; 0: no watchdog
    profile_steps: str = ""  # first:end of a profiler trace, such as 100:105; SIGUSR1 traces a running process
    wandb: str = ""  # project on Weights & Biases, where the package wandb is installed; or CV2JAX_WANDB
    expected: tuple[str, ...] = ()  # "KIND NAME STEP LOW HIGH", where a metric lay by then; for `cv2jax doctor`

    def validate(self) -> None:
        """Raises UserError for counts that are not positive."""
        for name in ("num_steps", "log_every", "evaluate_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: must lie in 0 … 2³² - 1")
        for name in ("evaluate_utterances", "stuck_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 (all; none) or more")


def validate(config: Any) -> None:
    """Refuses values of a wrong type and numbers that are not finite, then runs every `validate()`; UserError."""
    _check_types(config)
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a finite number")
    _validate_all(config)


def _check_types(config: Any, prefix: str = "") -> None:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _is_of_type(value, hint):
            expected = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
            raise UserError(f"{prefix}{field.name}={value!r}: expected {expected}, got {type(value).__name__}")
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{prefix}{field.name}.")


def _is_of_type(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_type(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of_type(item, args[0]) for item in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _validate_all(config: Any) -> None:
    if hasattr(config, "validate"):
        config.validate()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _validate_all(value)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], **nested: type) -> T:
    """Builds `cls` from `to_dict`'s output; `nested` names the class of fields typed `Any`; unknown keys are errors."""
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(typing.cast(Any, cls))
    known = {field.name: nested.get(field.name, hints[field.name]) for field in fields}
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"config key '{key}' is unknown to {cls.__name__}{_suggest(key, known)}")
        hint = known[key]
        if dataclasses.is_dataclass(hint):
            made[key] = from_dict(typing.cast(type, hint), value)
        else:
            made[key] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


def flatten(config: Any) -> dict[str, Any]:
    """{'model.width': 128, ...} in field order, of a config."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return flatten_dict({k: flatten(v) if dataclasses.is_dataclass(v) else v for k, v in own.items()})


def flatten_dict(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.width': 128, ...} of nested dictionaries such as `to_dict` makes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def format_config(config: Any) -> str:
    """One `key = value` a line."""
    flat = flatten(config)
    width = max(map(len, flat))
    return "\n".join(f"{key:<{width}} = {value!r}" for key, value in flat.items())


def override(config: T, assignments: Iterable[str]) -> T:
    """Applies `key.sub=value` strings in order; a wrong key or type is a UserError that names both."""
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"override '{assignment}': write key=value, for example model.width=256")
        config = _replace(config, key.strip().split("."), text.strip(), key.strip())
    return config


def _replace(config: Any, path: list[str], text: str, full: str) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    if path[0] not in names:
        raise UserError(f"config key '{full}' is unknown{_suggest(path[0], names)}")
    current = getattr(config, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            inside = ", ".join(f.name for f in dataclasses.fields(current))
            raise UserError(f"config key '{full}' is a group: set one of {inside} inside it")
        return dataclasses.replace(config, **{path[0]: _replace(current, path[1:], text, full)})
    if len(path) > 1:
        raise UserError(f"config key '{full}': '{path[0]}' is a single value, nothing lies under it")
    hint = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: _parse(text, hint, full)})


def _parse(text: str, hint: Any, full: str) -> Any:
    """Reads `text` as the type `hint`; strings may be bare, everything else is a Python literal."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in args:
            if text in (str(choice), repr(choice)):
                return choice
        raise UserError(f"{full}={text}: choose one of {', '.join(map(str, args))}")
    if hint is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(text, next(arg for arg in args if arg is not type(None)), full)
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(repr(item), args[0], full) for item in value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{full}={text}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: ours → theirs` for every leaf on which two `to_dict` outputs differ, keys on one side included."""
    lines: list[str] = []
    for key in sorted(set(ours) | set(theirs)):
        a, b = ours.get(key, "absent"), theirs.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} → {b!r}")
    return lines


def preset_names() -> list[str]:
    """Names of the experiments shipped with the package: `speech_tokenizer_tiny` is `configs/tiny/speech_tokenizer.py`."""
    return sorted(f"{path.stem}_{path.parent.name}" for path in _preset_directory().glob("*/*.py"))


def load_config(name_or_path: str) -> TrainConfig:
    """The config of a shipped preset (`speech_tokenizer_tiny`) or of a Python file with `get_config()`.

    Raises UserError for an unknown name, and for a file that fails or returns something else.
    """
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        stage, _, size = name_or_path.rpartition("_")
        path = _preset_directory() / size / f"{stage}.py"
        if not path.is_file():
            names = preset_names()
            hint = _suggest(name_or_path, names)
            raise UserError(f"config '{name_or_path}' is not a shipped preset{hint}; shipped: {', '.join(names)}")
    elif not path.is_file():
        raise UserError(f"config file {path} does not exist; give a preset name or a .py file with get_config()")
    try:
        config = _run_config_file(path)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"config file {error.filename or path}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever a user's own code may raise
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"config file {path}: {type(error).__name__}: {message}") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"config file {path}: get_config() returns a {type(config).__name__}, not a TrainConfig")
    return config


def _run_config_file(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"cv2jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path} has no get_config(); add one that returns a TrainConfig")
    return module.get_config()


def _preset_directory() -> pathlib.Path:
    package = pathlib.Path(__file__).parent
    shipped = package / "configs"  # in a wheel; a checkout has configs/ beside the package
    return shipped if shipped.is_dir() else package.parent / "configs"


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
