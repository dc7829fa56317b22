"""Which method a name stands for."""

from __future__ import annotations

from cnf.error import InputError
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.leapfrog import Leapfrog
from cnf.ode.method import ExplicitRungeKutta, Method
from cnf.ode.oracle import EXPLICIT, PREFIX, STIFF, Oracle
from cnf.ode.switching import Switching
from cnf.ode.tableau import TABLEAUS, Tableau

OTHERS: dict[str, Method] = {
    "leapfrog": Leapfrog(),
    "auto": Switching(
        ExplicitRungeKutta(TABLEAUS["dopri5"]), DiagonallyImplicit(TABLEAUS["kvaerno5"])
    ),
}
SOLVERS = (*EXPLICIT, *STIFF)
NAMES = [*TABLEAUS, *OTHERS, *(PREFIX + solver for solver in SOLVERS)]


def choose_method(method: str | Tableau | Method) -> Method:
    """The method of a name, a tableau, or itself; raises InputError with the list of names."""
    if isinstance(method, Tableau):
        return DiagonallyImplicit(method) if method.implicit else ExplicitRungeKutta(method)
    if not isinstance(method, str):
        if callable(getattr(method, "step", None)):
            return method
        raise InputError(f"method must be a name or a Tableau, got {type(method).__name__}")
    if method in OTHERS:
        return OTHERS[method]
    if method.removeprefix(PREFIX) in SOLVERS and method.startswith(PREFIX):
        return Oracle(method.removeprefix(PREFIX))
    if method not in TABLEAUS:
        raise InputError(f"unknown method {method!r}; known are {', '.join(NAMES)}")
    return choose_method(TABLEAUS[method])
