"""Runge–Kutta methods as frozen data: coefficients, order, error weights.

Sources: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, chapter II, for euler,
midpoint and rk4, for heun2 and heun3 (Heun 1900) and rk4_38 (Kutta 1901, the 3/8 rule);
adaptive_heun: heun2 with Euler's method embedded; fehlberg2: Fehlberg 1969 (NASA TR R-315),
RK1(2), continued with its second-order solution; bosh3: Bogacki & Shampine 1989; dopri5: Dormand &
Prince 1980; tsit5: Tsitouras 2011; dopri8: Prince & Dormand 1981, RK8(7)13M; implicit_euler and
trapezoid: Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.3; kvaerno3 and
kvaerno5: Kværnø 2004, the pairs 3/2 with γ³ − 3γ² + 3γ/2 = 1/6 and 5/4 with γ = 0.26.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, isfinite

from cnf.error import InputError, whole_number

Row = tuple[float, ...]
Weights = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Tableau:
    """A Runge–Kutta method: y1 = y + h Σ b_i k_i, k_i = f(t + c_i h, y + h Σ_j a_ij k_j).

    name: what errors and statistics call it; order: of y1; c: nodes, one for each stage;
    a: rows of stage weights, row i holds a_i1 … a_i,i−1 (the first row is empty); a diagonally
    implicit method's rows after the first hold a_ii too, one γ for all, and the last row is b;
    b: weights of y1; error: weights of y1 minus the embedded solution, or None where there is none.
    dense: a row for each stage, b_i(θ) = Σ_k dense_ik θ^k with k = 1, 2, …: inside the step the
    solution is y + h Σ b_i(θ) k_i; one row more where the field at the step's end takes part; or
    None where it has no such weights.
    Raises InputError where the coefficients are no finite numbers or do not fit together: shapes,
    Σ a_i = c_i, Σ b = 1, Σ error = 0 and error not 0 throughout. The order is taken at its word.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    dense: tuple[Row, ...] | None = None

    def __post_init__(self) -> None:
        order = whole_number(f"tableau {self.name!r}: order", self.order, 1)
        object.__setattr__(self, "order", order)
        try:
            object.__setattr__(self, "c", _row(self.c))
            object.__setattr__(self, "a", tuple(_row(row) for row in self.a))
            object.__setattr__(self, "b", _row(self.b))
            if self.error is not None:
                object.__setattr__(self, "error", _row(self.error))
            if self.dense is not None:
                object.__setattr__(self, "dense", tuple(_row(row) for row in self.dense))
        except (TypeError, ValueError) as wrong:
            raise InputError(
                f"tableau {self.name!r}: c, b and error are rows of numbers and a is a row of "
                f"such rows ({wrong})"
            ) from None
        _check(self)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of numbers alone: it is pickled too, and a name's differs from process to process."""
        return hash((self.order, self.c, self.a, self.b))

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its own error, so that steps can be chosen by it."""
        return self.error is not None

    @property
    def implicit(self) -> bool:
        """Whether the stages after the first are the solutions of equations."""
        return len(self.a[-1]) == self.stages

    @cached_property
    def fsal(self) -> bool:
        """Whether the last stage is f(t + h, y1), the next step's first ("first same as last")."""
        last = self.a[-1] if self.implicit else (*self.a[-1], 0.0)
        return self.stages > 1 and self.c[-1] == 1.0 and last == self.b

    @cached_property
    def a_weights(self) -> tuple[Weights, ...]:
        """Row by row the weights of a that are not 0, each with the index of its stage."""
        return tuple(map(_nonzero, self.a))

    @cached_property
    def later_stages(self) -> tuple[tuple[float, Weights], ...]:
        """(c, weights of a) of every stage after the first."""
        return tuple(zip(self.c[1:], self.a_weights[1:], strict=True))

    @cached_property
    def later_used_stages(self) -> tuple[tuple[float, Weights], ...]:
        """Those of `later_stages` that the solution reads, not the error's alone."""
        return self.later_stages[: self.used_stages - 1]

    @cached_property
    def b_weights(self) -> Weights:
        """The weights of b that are not 0, each with the index of its stage."""
        return _nonzero(self.b)

    @cached_property
    def error_weights(self) -> Weights:
        """The weights of the error that are not 0, each with the index of its stage."""
        return _nonzero(self.error or ())

    @cached_property
    def dense_order(self) -> int:
        """The order of the dense weights, told from how high powers of t they integrate: their
        error inside a step is O(h^(order + 1)); 0 without such weights.
        """
        if self.dense is None:
            return 0
        nodes = (*self.c, 1.0)[: len(self.dense)]
        power = 0
        while self._integrates(power, nodes, self.dense):
            power += 1
        return power

    def _integrates(self, power: int, nodes: Row, dense: tuple[Row, ...]) -> bool:
        """Whether Σ b_i(θ) c_i^p = θ^(p + 1)/(p + 1) at every θ."""
        for k, column in enumerate(zip(*dense, strict=True)):
            total = fsum(b * c**power for b, c in zip(column, nodes, strict=True))
            if abs(total - (1 / (power + 1) if k == power else 0.0)) > 1e-10:
                return False
        return power < len(dense[0])

    @cached_property
    def used_stages(self) -> int:
        """Stages that y1 needs: those after the last non-zero weight serve the error alone."""
        return max(i for i, weight in enumerate(self.b) if weight != 0.0) + 1


def _nonzero(row: Row) -> Weights:
    return tuple((i, weight) for i, weight in enumerate(row) if weight != 0.0)


def _row(values: Sequence[float]) -> Row:
    return tuple(float(value) for value in values)


def _check(tableau: Tableau) -> None:
    name, stages = tableau.name, tableau.stages
    for row in (tableau.c, *tableau.a, tableau.b, tableau.error or ()):
        for value in row:
            if not isfinite(value):
                raise InputError(f"tableau {name!r}: every entry must be finite, got {value}")
    if len(tableau.c) != stages or len(tableau.a) != stages:
        raise InputError(
            f"tableau {name!r}: b has {stages} stages, c has {len(tableau.c)} and a has "
            f"{len(tableau.a)} rows; give one entry and one row for each stage"
        )
    for i, row in enumerate(tableau.a):
        if len(row) != i + (tableau.implicit and i > 0):
            raise InputError(
                f"tableau {name!r}: row {i} of a has {len(row)} weights, expected {i}: "
                "an explicit method's row i weighs the stages before i and no other, and a "
                "diagonally implicit one's itself too, but for the first"
            )
        if not abs(fsum(row) - tableau.c[i]) <= 1e-10:
            raise InputError(
                f"tableau {name!r}: row {i} of a sums to {fsum(row):.12g}, but c[{i}] is "
                f"{tableau.c[i]:.12g}; the two must agree"
            )
    if not abs(fsum(tableau.b) - 1.0) <= 1e-10:
        raise InputError(f"tableau {name!r}: b sums to {fsum(tableau.b):.12g}, expected 1")
    if tableau.implicit:
        _check_implicit(tableau)
    error = tableau.error
    if error is not None and not (len(error) == stages and abs(fsum(error)) <= 1e-10):
        raise InputError(
            f"tableau {name!r}: error has {len(error)} weights that sum to {fsum(error):.3g}; "
            f"expected {stages} that sum to 0 (b minus the embedded method's weights)"
        )
    if error is not None and not any(error):
        raise InputError(
            f"tableau {name!r}: error is 0 throughout, so every step would pass for exact; "
            "give b minus the embedded method's weights, or None"
        )
    if tableau.dense is not None:
        _check_dense(tableau)


def _check_implicit(tableau: Tableau) -> None:
    """One matrix serves all stages, and the last one is the step's end."""
    diagonal = {row[-1] for row in tableau.a[1:]}
    if len(diagonal) != 1 or 0.0 in diagonal:
        raise InputError(
            f"tableau {tableau.name!r}: the diagonal of a must be one number other than 0 from the "
            f"second row on, got {sorted(diagonal)}"
        )
    if tableau.a[-1] != tableau.b:
        raise InputError(
            f"tableau {tableau.name!r}: an implicit method's last row of a must be b, so that its "
            "last stage is the end of the step"
        )


def _check_dense(tableau: Tableau) -> None:
    assert tableau.dense is not None
    ends = [fsum(row) for row in tableau.dense]
    more = len(ends) - tableau.stages
    if len({len(row) for row in tableau.dense}) > 1 or more not in (0, 1):
        raise InputError(
            f"tableau {tableau.name!r}: dense needs a row of equal length for each of the "
            f"{tableau.stages} stages, and at most one more for the field at the step's end"
        )
    b = (*tableau.b, *[0.0] * more)
    if any(abs(end - weight) > 1e-10 for end, weight in zip(ends, b, strict=True)):
        raise InputError(
            f"tableau {tableau.name!r}: the rows of dense sum to {ends}, expected {b}: at θ = 1 "
            "the interpolation must meet the step's end"
        )


def _difference(b: Sequence[float], embedded: Sequence[float]) -> Row:
    return tuple(x - y for x, y in zip(b, embedded, strict=True))


_BOSH3 = (2 / 9, 1 / 3, 4 / 9)
_FEHLBERG2 = (1 / 512, 255 / 256, 1 / 512)
_DOPRI5 = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_TSIT5 = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
# Shampine 1986, the fourth-order interpolation of Dormand and Prince's pair
_DOPRI5_DENSE = (
    (1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
    (0, 0, 0, 0),
    (0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
    (0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
    (0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
    (0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
    (0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
)


def _expanded(scale: float, *factors: Row) -> Row:
    """The coefficients of θ, θ², … of a product of polynomials, each from its constant term up."""
    product = [scale]
    for factor in factors:
        total = [0.0] * (len(product) + len(factor) - 1)
        for i, p in enumerate(product):
            for j, q in enumerate(factor):
                total[i + j] += p * q
        product = total
    return tuple(product[1:])


_SQUARE = (0.0, 0.0, 1.0)
# Tsitouras 2011, section 4
_TSIT5_DENSE = (
    _expanded(
        -1.0530884977290216,
        (0, 1),
        (-1.3299890189751412, 1),
        (0.7139816917074209, -1.4364028541716351, 1),
    ),
    _expanded(0.1017, _SQUARE, (1.2949852507374631, -2.1966568338249754, 1)),
    _expanded(2.490627285651252793, _SQUARE, (1.57803468208092486, -2.38535645472061657, 1)),
    _expanded(-16.54810288924490272, _SQUARE, (-1.21712927295533244, 1), (-0.61620406037800089, 1)),
    _expanded(
        47.37952196281928122, _SQUARE, (-1.203071208372362603, 1), (-0.658047292653547382, 1)
    ),
    _expanded(-34.87065786149660974, _SQUARE, (-1.2, 1), (-0.666666666666666667, 1)),
    _expanded(2.5, _SQUARE, (-1, 1), (-0.6, 1)),
)
_DOPRI8 = (
    *(14005451 / 335480064, 0, 0, 0, 0),
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8_EMBEDDED = (
    *(13451932 / 455176623, 0, 0, 0, 0),
    -808719846 / 976000145,
    1757004468 / 5645159321,
    656045339 / 265891186,
    -3867574721 / 1518517206,
    465885868 / 322736535,
    53011238 / 667516719,
    2 / 45,
    0,
)

_GAMMA = 0.435866521508459
_KVAERNO3 = (
    ((-4 * _GAMMA + 6) * _GAMMA - 1) / (4 * _GAMMA),
    (1 - 2 * _GAMMA) / (4 * _GAMMA),
    _GAMMA,
)
_KVAERNO3_LAST = (
    (6 * _GAMMA - 1) / (12 * _GAMMA),
    -1 / ((24 * _GAMMA - 12) * _GAMMA),
    ((-6 * _GAMMA + 6) * _GAMMA - 1) / (6 * _GAMMA - 3),
    _GAMMA,
)
_KVAERNO5 = (
    *(0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141),
    *(0.61943039072480676, 0.26),
)
_KVAERNO5_LAST = (
    *(0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046),
    *(0.62993304899016403, 0.06962479448202728, 0.26),
)

TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        Tableau("euler", 1, c=(0,), a=((),), b=(1,)),
        Tableau("midpoint", 2, c=(0, 1 / 2), a=((), (1 / 2,)), b=(0, 1)),
        Tableau("heun2", 2, c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2)),
        Tableau(
            "heun3",
            3,
            c=(0, 1 / 3, 2 / 3),
            a=((), (1 / 3,), (0, 2 / 3)),
            b=(1 / 4, 0, 3 / 4),
        ),
        Tableau(
            "rk4",
            4,
            c=(0, 1 / 2, 1 / 2, 1),
            a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
            b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        ),
        Tableau(
            "rk4_38",
            4,
            c=(0, 1 / 3, 2 / 3, 1),
            a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
            b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        ),
        Tableau(
            "adaptive_heun",
            2,
            c=(0, 1),
            a=((), (1,)),
            b=(1 / 2, 1 / 2),
            error=_difference((1 / 2, 1 / 2), (1, 0)),
        ),
        Tableau(
            "fehlberg2",
            2,
            c=(0, 1 / 2, 1),
            a=((), (1 / 2,), (1 / 256, 255 / 256)),
            b=_FEHLBERG2,
            error=_difference(_FEHLBERG2, (1 / 256, 255 / 256, 0)),
        ),
        Tableau(
            "bosh3",
            3,
            c=(0, 1 / 2, 3 / 4, 1),
            a=((), (1 / 2,), (0, 3 / 4), _BOSH3),
            b=(*_BOSH3, 0),
            error=_difference((*_BOSH3, 0), (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
        ),
        Tableau(
            "dopri5",
            5,
            c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
            a=(
                (),
                (1 / 5,),
                (3 / 40, 9 / 40),
                (44 / 45, -56 / 15, 32 / 9),
                (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
                (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
                _DOPRI5,
            ),
            b=(*_DOPRI5, 0),
            error=_difference(
                (*_DOPRI5, 0),
                (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
            ),
            dense=_DOPRI5_DENSE,
        ),
        Tableau(
            "tsit5",
            5,
            c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
            a=(
                (),
                (0.161,),
                (-0.008480655492356989, 0.335480655492357),
                (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
                (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
                (
                    5.86145544294642,
                    -12.92096931784711,
                    8.159367898576159,
                    -0.071584973281401,
                    -0.028269050394068383,
                ),
                _TSIT5,
            ),
            b=(*_TSIT5, 0),
            error=(
                -0.00178001105222577714,
                -0.0008164344596567469,
                0.007880878010261995,
                -0.1447110071732629,
                0.5823571654525552,
                -0.45808210592918697,
                0.015151515151515152,
            ),
            dense=_TSIT5_DENSE,
        ),
        Tableau(
            "dopri8",
            8,
            c=(
                *(0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200),
                *(5490023248 / 9719169821, 13 / 20, 1201146811 / 1299019798, 1, 1),
            ),
            a=(
                (),
                (1 / 18,),
                (1 / 48, 1 / 16),
                (1 / 32, 0, 3 / 32),
                (5 / 16, 0, -75 / 64, 75 / 64),
                (3 / 80, 0, 0, 3 / 16, 3 / 20),
                (
                    *(29443841 / 614563906, 0, 0),
                    77736538 / 692538347,
                    -28693883 / 1125000000,
                    23124283 / 1800000000,
                ),
                (
                    *(16016141 / 946692911, 0, 0),
                    61564180 / 158732637,
                    22789713 / 633445777,
                    545815736 / 2771057229,
                    -180193667 / 1043307555,
                ),
                (
                    *(39632708 / 573591083, 0, 0),
                    -433636366 / 683701615,
                    -421739975 / 2616292301,
                    100302831 / 723423059,
                    790204164 / 839813087,
                    800635310 / 3783071287,
                ),
                (
                    *(246121993 / 1340847787, 0, 0),
                    -37695042795 / 15268766246,
                    -309121744 / 1061227803,
                    -12992083 / 490766935,
                    6005943493 / 2108947869,
                    393006217 / 1396673457,
                    123872331 / 1001029789,
                ),
                (
                    *(-1028468189 / 846180014, 0, 0),
                    8478235783 / 508512852,
                    1311729495 / 1432422823,
                    -10304129995 / 1701304382,
                    -48777925059 / 3047939560,
                    15336726248 / 1032824649,
                    -45442868181 / 3398467696,
                    3065993473 / 597172653,
                ),
                (
                    *(185892177 / 718116043, 0, 0),
                    -3185094517 / 667107341,
                    -477755414 / 1098053517,
                    -703635378 / 230739211,
                    5731566787 / 1027545527,
                    5232866602 / 850066563,
                    -4093664535 / 808688257,
                    3962137247 / 1805957418,
                    65686358 / 487910083,
                ),
                (
                    *(403863854 / 491063109, 0, 0),
                    -5068492393 / 434740067,
                    -411421997 / 543043805,
                    652783627 / 914296604,
                    11173962825 / 925320556,
                    -13158990841 / 6184727034,
                    3936647629 / 1978049680,
                    -160528059 / 685178525,
                    248638103 / 1413531060,
                    0,
                ),
            ),
            b=_DOPRI8,
            error=_difference(_DOPRI8, _DOPRI8_EMBEDDED),
        ),
        Tableau("implicit_euler", 1, c=(0, 1), a=((), (0, 1)), b=(0, 1)),
        Tableau("trapezoid", 2, c=(0, 1), a=((), (1 / 2, 1 / 2)), b=(1 / 2, 1 / 2)),
        Tableau(
            "kvaerno3",
            3,
            c=(0, 2 * _GAMMA, 1, 1),
            a=((), (_GAMMA, _GAMMA), _KVAERNO3, _KVAERNO3_LAST),
            b=_KVAERNO3_LAST,
            error=_difference(_KVAERNO3_LAST, (*_KVAERNO3, 0)),
        ),
        Tableau(
            "kvaerno5",
            5,
            # the third stage lies beyond the end of the step
            c=(0, 0.52, 1.2303332099679081, 0.8957659843500759, 0.43639360985864756, 1, 1),
            a=(
                (),
                (0.26, 0.26),
                (0.13, 0.84033320996790809, 0.26),
                (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, 0.26),
                (
                    *(0.16648564323248321, 0.10450018841591720, 0.03631482272098715),
                    *(-0.13090704451073998, 0.26),
                ),
                _KVAERNO5,
                _KVAERNO5_LAST,
            ),
            b=_KVAERNO5_LAST,
            error=_difference(_KVAERNO5_LAST, (*_KVAERNO5, 0)),
        ),
    )
}
