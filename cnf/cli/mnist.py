"""`cnf mnist`: a task's own file does the work; those of a verb's name have another."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module

FILES = {
    "classify": "classify",
    "generate": "mnist_generate",
    "sample": "mnist_sample",
    "bpd": "mnist_bpd",
}


def run(arguments: Namespace) -> None:
    """Run the task that was named."""
    import_module(f"cnf.cli.{FILES[arguments.task]}").run(arguments)
