"""What the modules of the losses over ranks share: the ranks that hold the global batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ..distributed import Gather, RanksOptions, ranks_options


class ModuleOverRanks(nn.Module):
    """A loss with ``process_group``. It keeps the group's name alone, so that it can be copied and pickled."""

    def __init__(self, process_group: dist.ProcessGroup | str | None, gather: Gather, even: bool):
        super().__init__()
        self.ranks = ranks_options(process_group, gather, even)
        self._gather, self._even = gather, even

    def _check_ranks(self, ranks: RanksOptions | None) -> None:
        """Raise where the loss cannot run like this."""

    @property
    def process_group(self) -> str | None:
        """The name of the process group; None: the loss of this process's rows. Assign a group, its name or None."""
        return None if self.ranks is None else self.ranks.group

    @process_group.setter
    def process_group(self, value: dist.ProcessGroup | str | None) -> None:
        ranks = ranks_options(value, self._gather, self._even)
        self._check_ranks(ranks)
        self.ranks = ranks

    def _shown_ranks(self) -> str:
        """For `extra_repr`: what comes before the backend."""
        if self.ranks is None:
            return ""
        return f"process_group={self.ranks.group!r}, gather={self.ranks.gather!r}, even={self.ranks.even}, "
