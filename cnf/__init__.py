"""Continuous normalizing flows and neural ODEs in PyTorch, on one differentiable ODE core."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnf import compat as compat
    from cnf import data as data
    from cnf import nets as nets
    from cnf.error import InputError as InputError
    from cnf.error import IntegrationError as IntegrationError
    from cnf.error import TrainingError as TrainingError
    from cnf.flow.base import DiagonalGaussian as DiagonalGaussian
    from cnf.flow.base import GaussianMixture as GaussianMixture
    from cnf.flow.base import StudentT as StudentT
    from cnf.flow.coupling import OptimalTransport as OptimalTransport
    from cnf.flow.divergence import ClosedForm as ClosedForm
    from cnf.flow.divergence import Hutchinson as Hutchinson
    from cnf.flow.divergence import Tangents as Tangents
    from cnf.flow.flow import Flow as Flow
    from cnf.flow.objective import FlowMatching as FlowMatching
    from cnf.flow.objective import MaximumLikelihood as MaximumLikelihood
    from cnf.flow.regularizer import Regularizer as Regularizer
    from cnf.flow.variational import ReverseKL as ReverseKL
    from cnf.ode.control import Adaptive as Adaptive
    from cnf.ode.control import FixedStep as FixedStep
    from cnf.ode.event import Event as Event
    from cnf.ode.gradient.adjoint import Adjoint as Adjoint
    from cnf.ode.gradient.backprop import Backprop as Backprop
    from cnf.ode.gradient.checkpoint import Checkpoint as Checkpoint
    from cnf.ode.gradient.reversible import Reversible as Reversible
    from cnf.ode.sensitivity import AdjointState as AdjointState
    from cnf.ode.sensitivity import adjoint_state as adjoint_state
    from cnf.ode.solution import Solution as Solution
    from cnf.ode.solution import solve as solve
    from cnf.ode.tableau import Tableau as Tableau
    from cnf.odenet.block import ODEBlock as ODEBlock
    from cnf.odenet.network import ODENet as ODENet

__version__ = "0.1.0"

# loaded when first used (PEP 562), so that `cnf --help` does not wait for torch
_HOMES = {
    "Adaptive": "cnf.ode.control",
    "Adjoint": "cnf.ode.gradient.adjoint",
    "AdjointState": "cnf.ode.sensitivity",
    "Backprop": "cnf.ode.gradient.backprop",
    "Checkpoint": "cnf.ode.gradient.checkpoint",
    "ClosedForm": "cnf.flow.divergence",
    "DiagonalGaussian": "cnf.flow.base",
    "Event": "cnf.ode.event",
    "FixedStep": "cnf.ode.control",
    "Flow": "cnf.flow.flow",
    "FlowMatching": "cnf.flow.objective",
    "GaussianMixture": "cnf.flow.base",
    "Hutchinson": "cnf.flow.divergence",
    "InputError": "cnf.error",
    "IntegrationError": "cnf.error",
    "MaximumLikelihood": "cnf.flow.objective",
    "OptimalTransport": "cnf.flow.coupling",
    "Regularizer": "cnf.flow.regularizer",
    "ReverseKL": "cnf.flow.variational",
    "ODEBlock": "cnf.odenet.block",
    "ODENet": "cnf.odenet.network",
    "Reversible": "cnf.ode.gradient.reversible",
    "Solution": "cnf.ode.solution",
    "StudentT": "cnf.flow.base",
    "Tableau": "cnf.ode.tableau",
    "Tangents": "cnf.flow.divergence",
    "TrainingError": "cnf.error",
    "adjoint_state": "cnf.ode.sensitivity",
    "solve": "cnf.ode.solution",
}

_ROOMS = ("compat", "data", "nets", "sklearn")

__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = import_module(f"cnf.{name}")
    else:
        raise AttributeError(f"module 'cnf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
