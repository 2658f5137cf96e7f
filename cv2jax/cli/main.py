"""`cv2jax VERB …`: finds the verb's file, parses its flags with absl, turns a mistake into one line and exit code 2."""

import importlib
import io
import logging as standard_logging
import os
import pathlib
import select
import sys
from typing import Any

from absl import app, flags, logging

import cv2jax
from cv2jax.config import UserError
from cv2jax.parallel.compile_cache import use_compile_cache

EXIT_USER_ERROR = UserError.exit_code
MEASURING_VERBS = ("bench",)  # they tell what compiling takes
EXIT_BROKEN_PIPE = 141  # what a shell shows for a program that SIGPIPE ended


def verbs() -> list[str]:
    """Every verb: one file each in this folder."""
    return sorted(p.stem for p in pathlib.Path(__file__).parent.glob("*.py") if p.stem not in ("main", "__init__"))


def _summary(verb: str) -> str:
    """First docstring line of a verb's file, read without importing it."""
    text = pathlib.Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8")
    return text.split('"""')[1].strip().splitlines()[0]


def _overview() -> str:
    rows = "\n".join(f"  {verb:<12} {_summary(verb)}" for verb in verbs())
    head = f"cv2jax {cv2jax.__version__}: CosyVoice 2 in JAX\n\nusage: cv2jax VERB ... [--flags]"
    return f"{head}\n\n{rows}\n\n`cv2jax VERB --help` explains a verb and its flags."


def _verb_help(verb: str, module: Any, values: flags.FlagValues) -> str:
    body = (module.__doc__ or "").strip()
    return f"usage: cv2jax {verb} {module.USAGE}\n\n{body}\n\nflags:\n{values.get_help()}"


def run(argv: list[str]) -> int:
    """Runs `argv` (without the program's name) and returns the exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _silence_closed_outputs():  # a pipe of our own, a defect
            raise
        return EXIT_BROKEN_PIPE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "-help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(cv2jax.__version__)
        return 0
    verb = argv[0]
    try:
        if verb not in verbs():
            raise UserError(f"there is no such verb; choose one of {', '.join(verbs())}")
        module = importlib.import_module(f"cv2jax.cli.{verb}")
        values = flags.FlagValues()
        module.define_flags(values)
        if any(word in ("--help", "-h", "-help") for word in argv[1:]):
            print(_verb_help(verb, module, values))
            return 0
        try:
            positional = values([f"cv2jax {verb}", *argv[1:]])[1:]
        except flags.Error as error:
            raise UserError(f"{error}; see `cv2jax {verb} --help`") from error
        if verb not in MEASURING_VERBS:
            use_compile_cache()
        return module.main(positional, values) or 0
    except UserError as error:
        print(f"cv2jax {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:  # a place the user named that cannot be read or written; others are defects
        if not isinstance(error.filename, str) or not error.strerror:
            raise
        print(f"cv2jax {verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"cv2jax {verb}: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def _silence_closed_outputs() -> bool:
    """Points stdout and stderr to nowhere where their reader is gone (`… | head`); whether there was one."""
    found = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            found = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return found


def _print_any_path() -> None:
    r"""Has stdout spell what its encoding lacks as \uNNNN, as stderr does: the bytes of a path may be no text."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _set_up_log() -> None:
    """Our own messages from INFO up, those of libraries (Orbax tells of every array) from WARNING up, on stderr."""
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    ours = str(pathlib.Path(cv2jax.__file__).parent)
    handler = logging.get_absl_handler()
    handler.addFilter(lambda record: record.levelno >= standard_logging.WARNING or record.pathname.startswith(ours))
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def main() -> None:
    """Console entry point: absl's own flags are marked parsed (grain's workers ask for that), ours are the verb's."""
    argv = sys.argv[1:]
    _print_any_path()
    _set_up_log()
    app.run(lambda _: sys.exit(run(argv)), argv=[sys.argv[0]])


if __name__ == "__main__":
    main()
