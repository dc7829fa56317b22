"""Two processes as torchrun starts them; the machine's other cores are left to other tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of processes that find this very package, and keep to a thread each."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="session")
def torchrun(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program or module in two processes, in a folder."""

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*TORCHRUN, *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
        )

    return run
