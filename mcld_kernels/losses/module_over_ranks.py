"""The base of the losses' modules over ranks: it keeps the ranks that hold the global batch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..distributed import Gather, RanksOptions, ranks_options
from .module_options import LossModule


class ModuleOverRanks(LossModule):
    """A loss with ``process_group``. It keeps the group's name alone, so that it can be copied and pickled."""

    def __init__(self, process_group: dist.ProcessGroup | str | None, gather: Gather, even: bool):
        super().__init__()
        self.ranks = ranks_options(process_group, gather, even)
        self._gather, self._even = gather, even

    def _check_ranks(self, ranks: RanksOptions | None, options: Any) -> None:
        """Raise where the loss cannot run like this."""

    def _check_changed(self, options: Any) -> None:
        self._check_ranks(self.ranks, options)

    @property
    def process_group(self) -> str | None:
        """The name of the process group; None: the loss of this process's rows. Assign a group, its name or None."""
        return None if self.ranks is None else self.ranks.group

    @process_group.setter
    def process_group(self, value: dist.ProcessGroup | str | None) -> None:
        self._set_ranks(value, self._gather, self._even)

    @property
    def gather(self) -> Gather:
        """How the ranks exchange rows. Assign "all" or "ring"."""
        return self._gather

    @gather.setter
    def gather(self, value: Gather) -> None:
        self._set_ranks(self.process_group, value, self._even)

    @property
    def even(self) -> bool:
        """True: every rank has as many rows. Assign a bool."""
        return self._even

    @even.setter
    def even(self, value: bool) -> None:
        self._set_ranks(self.process_group, self._gather, value)

    def _set_ranks(self, group: dist.ProcessGroup | str | None, gather: Gather, even: bool) -> None:
        ranks = ranks_options(group, gather, even)
        self._check_ranks(ranks, self.options)
        self.ranks, self._gather, self._even = ranks, gather, even

    def _shown_ranks(self) -> str:
        """For `extra_repr`: what comes before the backend."""
        if self.ranks is None:
            return ""
        return f"process_group={self.ranks.group!r}, gather={self.ranks.gather!r}, even={self.ranks.even}, "
