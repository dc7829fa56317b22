"""The command line: `main` reads the arguments and leaves the work to the verb's own file.

Nothing here waits for torch: a verb is loaded when it is called.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

from cnf import __version__
from cnf.cli.parser import parse
from cnf.error import InputError, InstallationError, IntegrationError, TrainingError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
WRONG_PLACE = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 the program failed, 2 wrong input or use, 130 interrupted.

    argv: the arguments, by default those of the process.  Errors of the user, of the integration
    and of files are one sentence on stderr; any other keeps its traceback.
    """
    try:
        return _run(argv)
    except InputError as error:
        return _fail(WRONG_INPUT, error)
    except (InstallationError, IntegrationError, TrainingError) as error:
        return _fail(FAILED, error)
    except KeyboardInterrupt as interrupt:
        return _fail(INTERRUPTED, "; ".join(["interrupted", *map(str, interrupt.args)]))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        return _fail(
            WRONG_INPUT, "the memory does not hold this; ask for less: fewer rows, smaller widths"
        )
    except BrokenPipeError:  # whoever read our output has stopped, as in `cnf --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        code = WRONG_INPUT if isinstance(error, WRONG_PLACE) else FAILED
        return _fail(code, f"{where}{error.strerror or error}")


def _is_memory(error: Exception) -> bool:
    """Whether it is for want of memory, which torch tells by words alone."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(one in str(error) for one in words)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parse(argv, __version__)
    except SystemExit:  # --help and --version have been answered
        arguments = None
    if arguments is not None:
        if "OMP_WAIT_POLICY" not in os.environ and _cores_are_busy():
            # idle threads sleep: spinning ones keep others, and each other, from the cores
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        with _joined(arguments):
            import_module(f"cnf.cli.{arguments.verb}").run(arguments)
    sys.stdout.flush()  # a closed pipe shows here, not after the last line of this program
    return DONE


def _joined(arguments: Namespace) -> AbstractContextManager[None]:
    """The other processes of this command, where torchrun or the like has started several."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not named or os.environ["WORLD_SIZE"] == "1":
        return nullcontext()
    return import_module("cnf.cli.rank").joined(arguments)


def _cores_are_busy() -> bool:
    """Whether other programs keep more than a quarter of the cores at work just now.

    Not the load average, which a run of ours that has just ended would still fill.
    """
    try:
        before = _idle_and_all()
        time.sleep(0.1)
        idle, every = (now - then for now, then in zip(_idle_and_all(), before, strict=True))
    except (OSError, ValueError):  # no such figures here
        return True
    return idle < 0.75 * every


def _idle_and_all() -> tuple[int, int]:
    """Idle and all ticks of all cores since the machine started, as Linux tells them."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _fail(code: int, message: object) -> int:
    print(f"cnf: {' '.join(str(message).split())}", file=sys.stderr)
    return code
