"""A queue of teacher rows of earlier steps: further candidates of the row terms, as MoCo's keys (arXiv 1911.05722)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import remedies
from ..info_nce_options import MAX_LABEL
from ..labels import hard_labels
from ..options import (
    DTYPES,
    acc_dtype,
    check_dense,
    check_eps,
    check_ignore_index,
    check_matrix,
    check_soft_labels,
    is_readable,
    label_bounds,
)
from .module_options import Fixed


class TeacherQueue(nn.Module):
    """The last ``size`` teacher rows, normalised, and their labels, in buffers of fixed shape.

    `candidates` and `target` are the rows enqueued so far, the loss's further candidates; `enqueue` overwrites the
    oldest. Buffers are written in place, on their device, without a synchronization, and all are in the state_dict.
    Places not filled yet are no candidates, and shapes are constant once the queue is full.

    The number of filled places follows from the buffer ``pointer``. On a CPU it is read there. On a GPU, where reading
    would synchronize, and in a compiled program, Python counts along: `enqueue`, `reset`, load_state_dict, and moving,
    copying or pickling the queue keep its count and the buffers together. Where anything else has written the buffers,
    an average of modules or a loader in place, ``queue.load_state_dict(queue.state_dict())`` reads the number once.
    load_state_dict takes rows and pointer together: where one is missing, or of another size, the queue stays as it
    was; without labels, rows get ``ignore_index``.

    Args:
        size: rows that are kept.
        classes: entries of a row: classes of logits, or the width of embeddings.
        dtype: of the rows; bfloat16 takes half the memory of float32.
        ignore_index: the label of rows that are enqueued without one. The loss that reads `target` must have the same:
            to another, these labels are out of range.
        eps: a row with L2 norm <= eps is kept as zeros.
        device: of the buffers. A queue made on "meta" is empty after ``to_empty``; after ``to_empty`` of a queue on
            another device call `reset_parameters`.

    Example::

        queue = TeacherQueue(65536, classes, device="cuda")
        loss = mcld_loss(student, teacher, target, candidates=queue.candidates, candidate_target=queue.target)
        loss.backward()
        queue.enqueue(teacher, target)  # after the step, outside a compiled program

    Over ranks every rank enqueues the gathered rows of all, so that their queues stay equal. A queue inside a module
    that DistributedDataParallel wraps is a buffer that rank 0 broadcasts: keep it outside, or pass
    ``broadcast_buffers=False``.
    """

    rows: Tensor
    labels: Tensor
    pointer: Tensor
    size = Fixed[int]()
    classes = Fixed[int]()
    # What `enqueue` reads: torch 2.6 cannot trace a descriptor.
    _size: int
    _classes: int

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        ignore_index: int = -100,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("size", size), ("classes", classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1; got {value!r}")
        if dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise TypeError(f"dtype must be floating ({names}); got {dtype}")
        self.size, self.classes = size, classes
        self._ignore_index, self.eps = check_ignore_index(ignore_index), eps
        self.register_buffer("rows", torch.zeros(size, classes, dtype=dtype, device=device))
        self.register_buffer("labels", torch.full((size,), self.ignore_index, dtype=torch.int64, device=device))
        # The number of rows ever enqueued: the next one is written at pointer % size.
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))
        self._length = 0

    @property
    def ignore_index(self) -> int:
        """The label of rows that are enqueued without one. Assigning it changes the rows that are held as well."""
        return self._ignore_index

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        value = check_ignore_index(value)
        self.labels.masked_fill_(self.labels == self._ignore_index, value)
        self._ignore_index = value

    @property
    def eps(self) -> float:
        """A row with L2 norm <= eps is kept as zeros. It can be assigned."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = check_eps(value)

    def __len__(self) -> int:
        """The number of filled places, at most ``size``."""
        # On a CPU the buffer decides, whoever wrote it.
        if is_readable(self.pointer):
            self._length = self._filled_places()
        return self._length

    def _filled_places(self) -> int:
        """The length by ``pointer``, whose value is read."""
        return min(max(int(self.pointer), 0), self._size)

    @property
    def is_full(self) -> bool:
        """True once every place is filled; from then on shapes do not change."""
        return len(self) == self.size

    @property
    def candidates(self) -> Tensor:
        """The rows enqueued so far, (len(queue), classes): a view, of unit length, in no order."""
        return self.rows[: len(self)]

    @property
    def target(self) -> Tensor:
        """Their labels, (len(queue),) int64: a view."""
        return self.labels[: len(self)]

    @torch.no_grad()
    def enqueue(self, rows: Tensor, target: Tensor | None = None) -> None:
        """Keep rows (n, classes) and their labels in place of the oldest; of more than ``size`` rows, the last
        ``size``.

        rows: logits or embeddings of any floating dtype. A row whose sum of squares overflows counts as infinite, and
        is kept as NaN: losses are NaN until it is overwritten. target: (n,) int64, >= 0 or ``ignore_index``; or soft
        labels (n, C), rows >= 0 with a sum of 1, of which the class with the largest weight is kept, ``ignore_index``
        for a row of zeros; None: ``ignore_index`` for all.

        Raises ValueError or TypeError for arguments that do not fit, and RuntimeError under CUDA graph capture before
        the queue is full, because the graph would keep the number of rows of that step. The values of labels are
        checked on a CPU. On a GPU, and under torch.compile, labels out of range make the losses that use them NaN.
        """
        check_matrix("rows", rows, "teacher rows", "(n, classes)")
        if rows.shape[1] != self._classes:
            raise ValueError(f"rows must have shape (n, {self._classes}); got {tuple(rows.shape)}")
        if rows.device != self.rows.device:
            raise ValueError(
                f"rows must be on the queue's device {self.rows.device}; got {rows.device}: move the queue"
            )
        n = rows.shape[0]
        labels, filled = self._labels(target, n), len(self)
        if filled < self._size and rows.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the queue holds {filled} of {self._size} rows: fill it before a CUDA graph is captured, because "
                "the graph would keep that number"
            )
        if n > self._size:
            self.pointer.add_(n - self._size)
            rows, labels, n = rows[-self._size :], labels[-self._size :], self._size
        acc = torch.promote_types(torch.promote_types(rows.dtype, self.rows.dtype), torch.float32)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=acc)
        norm.nan_to_num_(nan=torch.nan, posinf=torch.nan)  # an overflow must show, not read as a zero direction
        unit = rows.to(acc) * torch.where(norm <= self.eps, 0.0, 1 / norm)
        place = (self.pointer + torch.arange(n, device=rows.device)) % self._size
        self.rows.index_copy_(0, place, unit.to(self.rows.dtype))
        self.labels.index_copy_(0, place, labels)
        self.pointer.add_(n)
        if filled < self._size:
            self._length = min(filled + n, self._size)

    def _labels(self, target: Tensor | None, n: int) -> Tensor:
        if target is None:
            return torch.full((n,), self.ignore_index, dtype=torch.int64, device=self.rows.device)
        if not isinstance(target, Tensor):
            remedy = remedies.of_no_tensor("target", target)
            raise TypeError(f"target must be a tensor of labels ({n},), int64; got {type(target).__name__}{remedy}")
        check_dense("target", target)
        if target.device != self.rows.device:
            raise ValueError(f"target must be on the queue's device {self.rows.device}; got {target.device}")
        if target.is_floating_point() and target.ndim == 2:
            check_soft_labels("target", target, n, read_values=True)
            return hard_labels(target.to(acc_dtype(target.dtype)), self.ignore_index)
        if target.dtype != torch.int64:
            remedy = remedies.of_label_dtype("target", target)
            raise TypeError(f"target must be of dtype int64, or soft labels ({n}, classes); got {target.dtype}{remedy}")
        if target.shape != (n,):
            raise ValueError(f"target must have shape ({n},), a label for each row; got {tuple(target.shape)}")
        if n and is_readable(target):
            label_bounds("target", target, self.ignore_index, most=MAX_LABEL, allowed=f"in [0, {MAX_LABEL}]")
        return target

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue."""
        self.rows.zero_()
        self.labels.fill_(self.ignore_index)
        self.pointer.zero_()
        self._length = 0

    def reset_parameters(self) -> None:
        """As `reset`: what FSDP2's recipe calls on every module after ``to_empty``."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherQueue:
        was_meta = self.pointer.is_meta
        len(self)  # the number goes along to a device where it is not read
        super()._apply(fn, recurse)
        if was_meta and not self.pointer.is_meta:  # to_empty: there were no values to move
            self.reset()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Rows and pointer are of one queue: both are loaded or neither is, and rows that come without labels have none.
        keys = {prefix + name: buffer for name, buffer in self.named_buffers()}
        came = {key: state_dict.get(key) for key in keys}
        fitting = {key for key, value in came.items() if isinstance(value, Tensor) and value.shape == keys[key].shape}
        is_complete = {prefix + "rows", prefix + "pointer"} <= fitting
        if not is_complete and fitting:
            state_dict = {**state_dict, **{key: keys[key].clone() for key in fitting}}  # stays as it is
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]
        if is_complete and prefix + "labels" not in fitting:
            self.labels.fill_(self.ignore_index)
        if not self.pointer.is_meta:
            self._length = self._filled_places()

    def extra_repr(self) -> str:
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return f"size={self.size}, classes={self.classes}, dtype={dtype}, filled={len(self)}"
