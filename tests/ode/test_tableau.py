"""A tableau is consistent, meets its order's conditions, and says so where it is not."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from scipy.integrate import RK23, RK45

from cnf.error import InputError
from cnf.ode.tableau import TABLEAUS, Tableau

IMPLICIT = ["implicit_euler", "trapezoid", "kvaerno3", "kvaerno5"]
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
Tree = tuple["Tree", ...]  # a rooted tree is the tuple of its branches


def forests(nodes: int, largest: int) -> Iterator[Tree]:
    """Every multiset of trees with `nodes` nodes in all and none of more than `largest`."""
    if nodes == 0:
        yield ()
    for size in range(1, min(nodes, largest) + 1):
        for tree in forests(size - 1, size - 1):
            for rest in forests(nodes - size, size):
                if not rest or (size, tree) >= (nodes_of(rest[0]), rest[0]):
                    yield (tree, *rest)


def nodes_of(tree: Tree) -> int:
    return 1 + sum(map(nodes_of, tree))


def density(tree: Tree) -> int:
    return nodes_of(tree) * prod(map(density, tree))


def stage_weights(tree: Tree, a: np.ndarray) -> np.ndarray:
    """Σ over the stages of every branch, one number for each stage of the root."""
    return np.prod([np.ones(len(a)), *(a @ stage_weights(branch, a) for branch in tree)], axis=0)


def residuals(tableau: Tableau, b: np.ndarray, order: int) -> list[float]:
    """Σ b_i Φ_i − 1/γ for every tree of `order` nodes (Hairer, Nørsett & Wanner I, II.2)."""
    s = tableau.stages
    a = np.array([[*row, *[0.0] * (s - len(row))] for row in tableau.a])
    trees = list(forests(order - 1, order - 1))
    return [float(b @ stage_weights(tree, a) - 1 / density(tree)) for tree in trees]


def test_there_are_as_many_trees_as_theory_counts():
    counts = [len(list(forests(n - 1, n - 1))) for n in range(1, 10)]
    assert counts == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)
def test_every_order_condition_holds_up_to_the_stated_order_and_not_beyond(tableau):
    b = np.array(tableau.b)
    for order in range(1, tableau.order + 1):
        assert np.abs(residuals(tableau, b, order)).max() < 1e-12
    # 8e-6 for dopri8, whose trees of 9 nodes have small weights; rounding leaves 1e-14
    assert np.abs(residuals(tableau, b, tableau.order + 1)).max() > 1e-6


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_embedded_solution_is_one_order_lower(name):
    tableau = TABLEAUS[name]
    embedded = np.array(tableau.b) - np.array(tableau.error)
    for order in range(1, tableau.order):
        assert np.abs(residuals(tableau, embedded, order)).max() < 1e-12
    assert np.abs(residuals(tableau, embedded, tableau.order)).max() > 1e-5


@pytest.mark.parametrize(("name", "peer"), [("dopri5", RK45), ("bosh3", RK23)])
def test_the_coefficients_are_those_of_scipy(name, peer):
    tableau = TABLEAUS[name]
    assert np.allclose(tableau.b[:-1], peer.B, atol=1e-15)
    assert np.allclose(tableau.c[:-1], peer.C, atol=1e-15)
    assert np.allclose(np.abs(tableau.error), np.abs(peer.E), atol=1e-15)


@pytest.mark.parametrize(("name", "tableau"), TABLEAUS.items())
def test_a_tableau_is_known_by_its_own_name_and_holds_floats(name, tableau):
    assert tableau.name == name
    assert all(type(x) is float for row in (tableau.c, tableau.b, *tableau.a) for x in row)


def test_first_same_as_last_is_derived_and_never_assumed():
    fsal = {name for name, tableau in TABLEAUS.items() if tableau.fsal}
    assert fsal == {"bosh3", "dopri5", "tsit5", *IMPLICIT}
    nearly = TABLEAUS["bosh3"]
    other = Tableau("other", 1, nearly.c, (*nearly.a[:-1], (0.0, 0.0, 1.0)), nearly.b, nearly.error)
    assert not other.fsal


USED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "rk4_38": 4}
USED |= {"adaptive_heun": 2, "fehlberg2": 3, "bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 13}
USED |= {"implicit_euler": 2, "trapezoid": 2, "kvaerno3": 4, "kvaerno5": 7}


@pytest.mark.parametrize(("name", "stages"), USED.items())
def test_a_fixed_step_evaluates_the_stages_that_the_solution_uses(name, stages):
    assert TABLEAUS[name].used_stages == stages


def test_an_implicit_method_is_told_by_its_diagonal():
    assert [name for name, tableau in TABLEAUS.items() if tableau.implicit] == IMPLICIT
    mine = Tableau("mine", 2, c=(0, 1), a=((), (0.5, 0.5)), b=(0.5, 0.5))
    assert mine.implicit and not mine.adaptive


@pytest.mark.parametrize("name", ["implicit_euler", "kvaerno3", "kvaerno5"])
def test_a_stiff_part_is_damped_wholly(name):
    """R(∞) = 0: what is infinitely stiff is gone after one step."""
    tableau = TABLEAUS[name]
    s, z = tableau.stages, -1e9
    a = np.array([[*row, *[0.0] * (s - len(row))] for row in tableau.a])
    growth = 1 + z * np.array(tableau.b) @ np.linalg.solve(np.eye(s) - z * a, np.ones(s))
    assert abs(growth) < 1e-6


def test_a_tableau_that_was_pickled_in_another_process_is_the_same_key():
    program = "import pickle, sys; from cnf.ode.tableau import TABLEAUS; t = TABLEAUS['dopri5']"
    program += "; hash(t); sys.stdout.buffer.write(pickle.dumps(t))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True
    )
    assert pickle.loads(run.stdout) in {TABLEAUS["dopri5"]}


def test_a_tableau_given_as_lists_or_arrays_equals_one_given_as_tuples():
    lists = Tableau("mine", 2, c=[0, 1], a=[[], [1]], b=np.array([0.5, 0.5]))
    assert lists == Tableau("mine", 2, c=(0, 1), a=((), (1,)), b=(0.5, 0.5))
    assert hash(lists) == hash(Tableau("mine", 2, c=(0, 1), a=((), (1,)), b=(0.5, 0.5)))


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "order 0": (dict(order=0), "order"),
    "a row too few": (dict(a=((),)), "rows"),
    "a node too many": (dict(c=(0, 1, 1)), "c has 3"),
    "a first stage that is implicit": (dict(a=((0,), (0.5, 0.5))), "row 0 of a has 1 weights"),
    "an end that is no stage": (dict(a=((), (0.4, 0.6))), "last row of a must be b"),
    "a diagonal of 0": (dict(a=((), (1, 0))), "diagonal of a must be one number other than 0"),
    "two numbers on the diagonal": (
        dict(c=(0, 1, 1), a=((), (0.5, 0.5), (0, 0, 1)), b=(0, 0, 1), error=None),
        "diagonal of a must be one number",
    ),
    "a row that is implicit among explicit ones": (
        dict(c=(0, 1, 1), a=((), (0.5, 0.5), (0, 1)), b=(0, 1, 0), error=None),
        "row 1 of a has 2 weights",
    ),
    "a first stage off the start": (dict(c=(0.5, 1)), "row 0"),
    "a row that misses its node": (dict(a=((), (0.9,))), "sums to 0.9"),
    "weights that miss 1": (dict(b=(0.5, 0.4)), "b sums to 0.9"),
    "no stage at all": (dict(c=(), a=(), b=()), "b sums to 0"),
    "an error that misses 0": (dict(error=(0.5, 0.5)), "sum to 0"),
    "an error of another length": (dict(error=(0.5, -0.25, -0.25)), "3 weights"),
    "a weight that is no number": (dict(b=(NAN, NAN)), "nan"),
    "a node that is no number": (dict(c=(0, NAN)), "nan"),
    "an error that is no number": (dict(error=(NAN, NAN)), "nan"),
    "a stage weight that is no number": (dict(a=((), (NAN,))), "nan"),
    "an infinite node and row": (dict(c=(0, INF), a=((), (INF,))), "inf"),
    "infinite weights that cancel": (dict(b=(INF, -INF)), "finite, got inf"),
    "infinite errors that cancel": (dict(error=(INF, -INF)), "finite, got inf"),
    "an error that is 0 throughout": (dict(error=(0, 0)), "0 throughout"),
    "an error too short": (dict(error=()), "0 weights"),
    "half an order": (dict(order=1.5), "order must be a whole number"),
    "an order in words": (dict(order="2"), "order must be a whole number"),
    "an order that is no number": (dict(order=NAN), "order must be a whole number"),
    "an order that is a truth value": (dict(order=True), "order must be a whole number"),
    "a first row that is not empty": (dict(a=((0,), (1,))), "row 0 of a has 1 weights"),
    "a row too many": (dict(a=((), (1,), (0, 1))), "3 rows"),
    "no nodes": (dict(c=None), "rows of numbers"),
    "a word for a weight": (dict(b=("half", 0.5)), "rows of numbers"),
    "a complex weight": (dict(b=(0.5 + 0j, 0.5)), "rows of numbers"),
    "numbers for rows": (dict(a=(0, 1)), "rows of numbers"),
}


@pytest.mark.parametrize(("change", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tableau_is_refused_with_a_sentence(change, says):
    good = dict(name="mine", order=2, c=(0, 1), a=((), (1,)), b=(0.5, 0.5), error=(0.5, -0.5))
    with pytest.raises(InputError, match=says):
        Tableau(**{**good, **change})
