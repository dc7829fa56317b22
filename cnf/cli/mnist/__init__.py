"""`cnf mnist`: a task's own file does the work."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module


def run(arguments: Namespace) -> None:
    """Run the task that was named."""
    import_module(f"cnf.cli.mnist.{arguments.task}").run(arguments)
