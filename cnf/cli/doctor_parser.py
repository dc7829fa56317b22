"""The arguments of `cnf doctor` and the page that its `--help` prints; imports no torch."""

from __future__ import annotations

from typing import Any

from cnf.cli.argument import device_argument

DOCTOR_PAGE = """\
Say what is installed, what computes here and where data are found, and try cnf out.

The self-test takes about a second: a solution, a gradient and a log-density, each against its
formula.  It runs on --device.
"""

DOCTOR_EXAMPLES = """\
Exit code 1, with a sentence on stderr, where something is wrong.  A data set that is not found and
an optional package that is not installed are no faults.

examples:
  cnf doctor
  cnf doctor --device cuda                 the same test on the GPU
  cnf doctor --json > report.json          to go with a report of a fault
"""


def add_doctor_arguments(verb: Any) -> None:
    """Add the arguments of `cnf doctor` to its parser."""
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    device_argument(verb)
