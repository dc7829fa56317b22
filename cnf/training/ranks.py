"""One training shared by several processes, the ranks of torch.distributed.

Each rank takes its rows of every batch, and all take the same step.  Random numbers belong to rows
of the whole batch: every rank's generator is in the same state, draws for all rows and keeps what
is its own rows'.  So a training depends on the number of ranks by rounding alone.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnf.error import InputError, IntegrationError, TrainingError

if dist.is_available():
    # DistributedDataParallel loads it, and its functions' defaults are the process group of that
    # moment, which would outlive all else: none, if it is loaded now
    import torch.distributed.nn.functional

SEEDS = 2**31


@dataclass(frozen=True)
class Ranks:
    """How many processes share the work, and which of them this one is; by itself: one alone.

    What a rank calls together with the others, they must call too, in the same order.  Raises
    TrainingError where another rank has gone.

    >>> Ranks(1, 2).share(5)
    slice(2, 5, None)
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What trains and draws inside does so as one of these ranks."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    # rows -------------------------------------------------------------------------------------

    def share(self, total: int) -> slice:
        """This rank's rows of so many: consecutive, and the ranks' shares differ by one at most."""
        return slice(self.rank * total // self.world, (self.rank + 1) * total // self.world)

    def batch_size(self, wanted: int) -> int:
        """Rows of a whole batch: as many as wanted, less what the ranks cannot share evenly.

        Raises InputError where there is not a row for each.
        """
        if wanted < self.world:
            raise InputError(
                f"a batch of {wanted} rows leaves none for some of {self.world} ranks; take a "
                "larger batch or fewer ranks"
            )
        return wanted - wanted % self.world

    def whole(self, part: Tensor, total: int | None = None) -> Tensor:
        """All ranks' rows in order, (total, …), of which `part` is this one's share.

        total: by default as many for every rank as for this one.  No gradient goes through it.
        """
        if self.world == 1:
            return part
        total = len(part) * self.world if total is None else total
        sizes = [rows.stop - rows.start for rows in (at.share(total) for at in self._all())]
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part.detach()
        found = [torch.empty_like(padded) for _ in sizes]
        with connected():
            dist.all_gather(found, padded)
        rows = torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])
        # laid out as the part is: the order in which randn_like fills a tensor depends on it
        return rows.mT.contiguous().mT if part.ndim == 2 and part.mT.is_contiguous() else rows

    def _all(self) -> list[Ranks]:
        return [Ranks(rank, self.world) for rank in range(self.world)]

    # numbers ----------------------------------------------------------------------------------

    def agreed(self, *values: float) -> tuple[float, ...]:
        """The largest of every value over the ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of the ranks."""
        return bool(self.agreed(flag)[0])

    def mean(self, *values: float) -> tuple[float, ...]:
        """The mean of every value over the ranks; not finite where one rank's is not."""
        return tuple(total / self.world for total in self._reduced(values, dist.ReduceOp.SUM))

    def _reduced(
        self, values: tuple[float, ...], how: dist.ReduceOp.RedOpType
    ) -> tuple[float, ...]:
        if self.world == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        with connected():
            dist.all_reduce(found, how)
        return tuple(found.tolist())

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block in which a solve that fails on one rank raises IntegrationError on all."""
        failure: IntegrationError | None = None
        try:
            yield
        except IntegrationError as error:
            failure = error
        if self.any(failure is not None):
            raise failure or IntegrationError("a solve failed on another rank")

    def told(self, text: str) -> str:
        """What the first rank has to say."""
        if self.world == 1:
            return text
        said = [text]
        with connected():
            dist.broadcast_object_list(said, 0)
        return said[0]

    def seed(self, seed: int | None) -> int | None:
        """The seed, or where there is none one that all ranks have in common."""
        if seed is not None or self.world == 1:
            return seed
        return int(self.agreed(torch.randint(SEEDS, ()).item())[0])

    # modules ----------------------------------------------------------------------------------

    def give(self, module: nn.Module) -> None:
        """The first rank's parameters and buffers, to the modules of all."""
        if self.world == 1:
            return
        with connected(), torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)

    def over(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the ranks; the first one's weights."""
        if self.world == 1:
            return module
        with connected(), warnings.catch_warnings():
            # torch 2.13 renames the argument to one that torch 2.6 does not know
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


ALONE = Ranks()
_CURRENT: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def here() -> Ranks:
    """The ranks of the process group that the program has joined; alone where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # its threads end with the last module over it: one that needs the interpreter while that ends
    # aborts the process
    gc.collect()


def parted() -> bool:
    """Whether this rank was the first, which goes on alone: the process group is left."""
    is_first = here().is_first
    leave()
    return is_first


def current() -> Ranks:
    """The ranks that train together just now: see `Ranks.together`."""
    return _CURRENT.get()


def row_noise(rows: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Random numbers for `rows` of this rank: those of its rows among the whole batch's.

    draw: how many rows → numbers, whose first dimension is the rows'.
    """
    ranks = current()
    total = rows * ranks.world
    return draw(total)[ranks.share(total)]


@contextmanager
def connected() -> Iterator[None]:
    """A block that talks to the other ranks; TrainingError says that one of them has gone."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _TRANSPORTS):
            raise TrainingError(
                f"rank {here().rank} of {here().world} has lost another rank, which died or did "
                "not answer in time; its own message, or torchrun's report, says why"
            ) from error
        raise


_TRANSPORTS = ("gloo", "Gloo", "NCCL")  # in what the backends say when a connection breaks
