"""Real tables: test NLL beside zuko's NSF, MAF and CNF, kernel density estimates and mixtures.

    python benchmarks/tables.py [--seeds 5] [--seconds 60] [--data wine,digits] [--json FILE]

Every seed splits the rows 70/15/15.  All methods see the same training rows and choose by the same
validation rows: ours its maps, field and stopping time; zuko's flows their widths and stopping time
(Adam, weights of the best epoch); KernelDensity its bandwidth; GaussianMixture its covariances and
number of components.  wine and breast cancer are standardized by the training rows, and the NLL is
that of the standardized table; digits are (pixel + u)/17, with 20 noises u an image for ours, fresh
noise every epoch for zuko's, and the NLL that of these values.  zuko's flows see every column
standardized.  Nats, mean over seeds with its standard error; lower is better.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rivals import available
from sklearn import datasets
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from timing import machine
from torch import Tensor

import cnf

DRAWS, JUDGED_DRAWS = 20, 5  # noises of an image, to train on and to judge by
MOST_ROWS = 5000  # of digits, with several noises, for estimates that are made of rows


class Split(NamedTuple):
    """Rows as float32, (rows, dim); noisy: another draw of the training rows' noise, if any."""

    training: Tensor
    validation: Tensor
    test: Tensor
    noisy: Callable[[], Tensor]


class Fitted(NamedTuple):
    """NLL of the validation and of the test rows, in nats."""

    validation: float
    test: float


def split(name: str, seed: int) -> Split:
    """The table of that name, split by the seed."""
    values = getattr(datasets, f"load_{name}")().data
    order = np.random.default_rng(seed).permutation(len(values))
    first, second = round(0.7 * len(values)), round(0.85 * len(values))
    parts = [values[rows] for rows in np.split(order, [first, second])]
    if name == "digits":
        noise = torch.Generator().manual_seed(seed)

        def noisy(pixels: np.ndarray, draws: int) -> Tensor:
            tiled = np.tile(pixels, (draws, 1)).astype(np.float32)
            return cnf.data.dequantize(tiled, noise)

        training, *rest = parts
        judged = [noisy(part, JUDGED_DRAWS) for part in rest]
        return Split(noisy(training, DRAWS), *judged, lambda: noisy(training, 1))
    mean, scale = parts[0].mean(0), parts[0].std(0)
    tables = [torch.from_numpy((part - mean) / scale).float() for part in parts]
    return Split(*tables, lambda: tables[0])


# --- the methods ----------------------------------------------------------------------------------


def ours(data: Split, seconds: float, seed: int) -> Fitted:
    flow = cnf.Flow(data.training.shape[1], seed=seed)
    flow.fit(data.training, validation=data.validation, seconds=seconds, seed=seed, progress=False)
    with torch.no_grad():
        return Fitted(*(-flow.log_prob(x).mean().item() for x in (data.validation, data.test)))


def kernel(data: Split, seconds: float, seed: int) -> Fitted:
    rows = data.training[:MOST_ROWS].numpy()
    scale = rows.std(0).mean()
    found = []
    for bandwidth in scale * np.geomspace(0.05, 1.5, 20):
        model = KernelDensity(bandwidth=bandwidth).fit(rows)
        found.append(Fitted(-model.score(data.validation) / len(data.validation),
                            -model.score(data.test) / len(data.test)))  # fmt: skip
    return min(found)


def mixture(data: Split, seconds: float, seed: int) -> Fitted:
    rows = data.training[:MOST_ROWS].double().numpy()
    found = []
    for covariance in ("full", "tied", "diag"):
        for count in (1, 2, 3, 5, 10, 20, 40):
            for floor in (1e-6, 1e-3, 1e-2):
                if count * 5 > len(rows):
                    continue
                model = GaussianMixture(
                    count, covariance_type=covariance, reg_covar=floor * rows.var(0).mean(),
                    random_state=seed,
                )  # fmt: skip
                try:
                    model.fit(rows)
                except ValueError:  # a component has collapsed: not a candidate
                    continue
                found.append(Fitted(-model.score(data.validation), -model.score(data.test)))
    return min(found)


def zuko_flow(kind: str) -> Callable[[Split, float, int], Fitted]:
    def fit(data: Split, seconds: float, seed: int) -> Fitted:
        widths = [(64, 64), (256, 256)]
        return min(_stopped(kind, data, width, seconds / len(widths), seed) for width in widths)

    return fit


def _stopped(kind: str, data: Split, width: tuple[int, ...], seconds: float, seed: int) -> Fitted:
    """The best epoch by validation; the last 30 epochs and quarter of all may bring none."""
    import zuko

    torch.manual_seed(seed)
    dim = data.training.shape[1]
    flow = (
        zuko.flows.CNF(dim, hidden_features=width, exact=dim <= 16)
        if kind == "CNF"
        else getattr(zuko.flows, kind)(dim, transforms=5, hidden_features=width)
    )
    mean, scale = data.training.mean(0), data.training.std(0)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)

    def nll(x: Tensor) -> Tensor:
        return -flow().log_prob((x - mean) / scale).mean() + scale.log().sum()

    best, at, epoch, start = math.inf, 0, 0, time.perf_counter()
    weights = [p.detach().clone() for p in flow.parameters()]
    while time.perf_counter() - start < seconds and epoch - at <= max(30, epoch / 4):
        epoch += 1
        rows = data.noisy()
        for batch in rows[torch.randperm(len(rows))].split(256):
            optimizer.zero_grad()
            loss = nll(batch)
            if not math.isfinite(loss.item()):
                continue
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad():
            value = nll(data.validation).item()
        if value < best:
            best, at = value, epoch
            weights = [p.detach().clone() for p in flow.parameters()]
    with torch.no_grad():
        for parameter, weight in zip(flow.parameters(), weights, strict=True):
            parameter.copy_(weight)
        return Fitted(best, nll(data.test).item())


def methods() -> dict[str, Callable[[Split, float, int], Fitted]]:
    found = {"cnf": ours, "KernelDensity": kernel, "GaussianMixture": mixture}
    if available("zuko"):
        found |= {f"zuko {kind}": zuko_flow(kind) for kind in ("NSF", "MAF", "CNF")}
    return found


# --- what is shown --------------------------------------------------------------------------------


def verdict(values: dict[str, np.ndarray]) -> str:
    """Whether ours is the best, by the differences on the same splits."""
    best = min(values, key=lambda name: values[name].mean())
    if best == "cnf":
        return "cnf is the best"
    difference = values["cnf"] - values[best]
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return f"cnf is {difference.mean():+.2f} ± {error:.2f} from the best, {best} (paired)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one method on one split")
    parser.add_argument("--data", default="wine,breast_cancer,digits")
    parser.add_argument("--json", help="write the numbers here as well")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    numbers: dict[str, dict[str, list[float]]] = {}
    for name in arguments.data.split(","):
        found: dict[str, list[float]] = {method: [] for method in methods()}
        for seed in range(arguments.seeds):
            data = split(name, seed)
            for method, fit in methods().items():
                start = time.perf_counter()
                result = fit(data, arguments.seconds, seed)
                found[method].append(result.test)
                print(
                    f"{name} seed {seed} {method:16s} validation {result.validation:9.3f}  test "
                    f"{result.test:9.3f}  {time.perf_counter() - start:6.1f} s",
                    flush=True,
                )
        numbers[name] = found
        values = {method: np.array(nlls) for method, nlls in found.items()}
        print(f"\n{name}: test NLL, nats")
        for method, nlls in sorted(values.items(), key=lambda pair: pair[1].mean()):
            error = nlls.std(ddof=1) / math.sqrt(len(nlls)) if len(nlls) > 1 else math.nan
            print(f"  {method:16s} {nlls.mean():9.2f} ± {error:.2f}")
        print(f"  {verdict(values)}\n", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
