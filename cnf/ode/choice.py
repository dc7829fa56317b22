"""Which method a name stands for."""

from __future__ import annotations

from cnf.error import InputError
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.method import ExplicitRungeKutta, Method
from cnf.ode.tableau import TABLEAUS, Tableau


def choose_method(method: str | Tableau | Method) -> Method:
    """The method of a name, a tableau, or itself; raises InputError with the list of names."""
    if isinstance(method, Tableau):
        return DiagonallyImplicit(method) if method.implicit else ExplicitRungeKutta(method)
    if not isinstance(method, str):
        if callable(getattr(method, "step", None)):
            return method
        raise InputError(f"method must be a name or a Tableau, got {type(method).__name__}")
    if method not in TABLEAUS:
        raise InputError(f"unknown method {method!r}; known are {', '.join(TABLEAUS)}")
    return choose_method(TABLEAUS[method])
