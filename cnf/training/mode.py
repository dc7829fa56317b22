"""A module in another mode than its own, for a while."""

from __future__ import annotations

from types import TracebackType

from torch import nn


class InMode:
    """Context in which every part of a module is in train() mode, or in eval(); after it each is
    in its own again, and not in that of the whole: a part may be frozen.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        self._module, self._training = module, training

    def __enter__(self) -> None:
        self._own = [(part, part.training) for part in self._module.modules()]
        self._module.train(self._training)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for part, training in self._own:
            part.training = training
