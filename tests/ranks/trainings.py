"""Small trainings in double precision and by fixed steps; as a program each rank does them all.

`torchrun … trainings.py FOLDER` leaves FOLDER/RANK.npz with what every rank came to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnf.error import IntegrationError
from cnf.flow import split
from cnf.flow.coupling import OptimalTransport
from cnf.flow.divergence import Hutchinson
from cnf.flow.flow import Flow
from cnf.flow.image import ImageFlow
from cnf.flow.regularizer import Regularizer
from cnf.odenet.recipe import ImageTraining, Split, build
from cnf.odenet.settings import Settings
from cnf.training.loop import Best, Plan, Training
from cnf.training.ranks import Ranks, here
from cnf.training.seed import seeded


def rows(count: int = 400) -> Tensor:
    """Skewed rows of two columns that depend on each other, and a third."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return torch.stack([x[:, 0].exp(), x[:, 1] + x[:, 0] ** 2, x[:, 2].round()], 1)


def flow(**settings: object) -> Flow:
    made = Flow(2, hidden=(8, 8), method="rk4", step_size=0.25, seed=0, **settings)
    return made.double()


def weights(module: nn.Module) -> Tensor:
    """All that a module knows, in one vector."""
    kept = (*module.parameters(), *module.buffers())
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in kept])


def flow_matching() -> Tensor:
    """Groups of 128 rows, of which one goes across both ranks and the last is a short one."""
    fit = {"steps": 6, "batch_size": 300, "seed": 3, "progress": False}
    return weights(flow().fit(rows()[:, :2], method="fm", **fit))


def conditional() -> Tensor:
    made, x = flow(context=1, context_dropout=0.3), rows()
    fit = {"steps": 6, "batch_size": 64, "seed": 3, "progress": False}
    return weights(made.fit(x[:, :2], x[:, 2:], method="fm", **fit))


def coupled() -> Tensor:
    made, x = flow(context=1), rows()
    fit = {"steps": 6, "batch_size": 64, "seed": 3, "progress": False}
    return weights(made.fit(x[:, :2], x[:, 2:], method="fm", coupling=OptimalTransport(16), **fit))


def likelihood() -> Tensor:
    made = flow(divergence=Hutchinson(probes=2, law="gaussian"))
    added = Regularizer(kinetic=0.01, jacobian=0.01, steer=0.2)
    fit = {"steps": 6, "batch_size": 50, "seed": 3, "progress": False}
    return weights(made.fit(rows()[:, :2], method="ml", regularizer=added, **fit))


def mapped(folder: Path) -> Callable[[], Tensor]:
    """A fit to a file that is not loaded, in both phases."""

    def training() -> Tensor:
        path = folder / f"rows-{here().rank}.npy"
        np.save(path, rows().numpy()[:, :2])
        kept, split.LAZY_BYTES = split.LAZY_BYTES, 0
        try:
            x = np.load(path, mmap_mode="r")
            fit = {"steps": 8, "batch_size": 64, "seed": 3, "progress": False}
            return weights(flow().fit(x, **fit))
        finally:
            split.LAZY_BYTES = kept

    return training


def classification() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(90, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    parts = [(images[some], labels[some]) for some in (slice(60), slice(60, 81), slice(81, 90))]
    split = Split(*parts[0], *parts[1], *parts[2], 2)
    settings = Settings(dataset="digits", net="odenet", width=4, method="rk4", nfe=4, shift=1,
                        steps=6, batch_size=20, validation=21)  # fmt: skip
    with seeded(0, torch.device("cpu")):
        training = ImageTraining(build(settings, split.shape, 2).double(), split, settings)
        errors = [record.error for record in training]
    training.select()
    return torch.cat(
        [weights(training.net), torch.tensor(errors), torch.tensor([training.best.score])]
    )


def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(17, (60, 1, 4, 4), generator=generator)
    labels = torch.randint(2, (60,), generator=generator)
    with seeded(0, torch.device("cpu")):
        made = ImageFlow((1, 4, 4), classes=2, width=8, levels=17, label_dropout=0.3, seed=0)
        made.double().fit(
            pixels, labels, method="fm", steps=5, batch_size=20, progress=False,
            validation=(pixels[:8], labels[:8]),
        )  # fmt: skip
    return weights(made)


TRAININGS = {
    "images": images,
    "flow matching": flow_matching,
    "conditional": conditional,
    "coupled": coupled,
    "likelihood": likelihood,
    "classification": classification,
}


# --- what only several ranks can show -------------------------------------------------------------


class Failing(nn.Module):
    """A loss that the last rank cannot give at its third call, nor the first at its fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3 and here().rank == here().world - 1:
            raise IntegrationError("no solution")
        scale = float("nan") if self.calls == 5 and here().is_first else 1.0
        return scale * (self.weight - x).square().sum()


def skipping() -> Tensor:
    module = Failing()
    training = Training(module, lambda: torch.arange(3.0), Plan("demo", steps=6),
                        validate=lambda: float(here().rank), best=Best())  # fmt: skip
    losses = [record.loss for record in training]
    return torch.cat([module.weight.detach(), torch.tensor([*losses, training.skipped])])


def timed() -> Tensor:
    """A budget in seconds, of ranks of which one is slow."""

    def batch() -> Tensor:
        time.sleep(0.02 * here().rank)
        return torch.arange(3.0)

    training = Training(
        Failing(), batch, Plan("demo", seconds=0.6), validate=lambda: 0.0, best=Best()
    )
    return torch.tensor([list(training)[-1].step])


def gathered() -> Tensor:
    ranks, numbers = here(), torch.arange(7)
    return ranks.whole(numbers[ranks.share(7)], 7)


def unseeded() -> Tensor:
    """Fits without a seed, of flows that differ over ranks."""
    torch.manual_seed(here().rank)
    made = Flow(2, hidden=(4,), whiten=False).double()
    return weights(made.fit(rows()[:, :2], method="fm", steps=3, batch_size=20, progress=False))


TOGETHER = {"skipping": skipping, "timed": timed, "gathered": gathered, "unseeded": unseeded}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ranks: Ranks = here()
    with ranks.together():
        trainings = TRAININGS | {"mapped": mapped(folder)} | TOGETHER
        found = {name: training().numpy() for name, training in trainings.items()}
    np.savez(folder / f"{ranks.rank}.npz", **found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
