"""Per-row label metadata, computed on the labels' device without a host synchronization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import SUM_TOLERANCE

IndexedLabels = TypeVar("IndexedLabels", bound="Labels")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of one side's n rows.

    A *class index* numbers the classes: the class itself or, with more classes than rows, only the classes that occur
    on either side. Tables by class index have num_classes_present rows: at most min(rows of both sides, C + 1).
    """

    key: Tensor  # (n,) int64: the label, or a negative number that equals no other where the label is ignored
    valid: Tensor  # (n,) bool: not ignored
    class_index: Tensor  # (n,) int64: ignored rows share one
    class_id: Tensor  # (n,) int64: the class, C where ignored
    poison: Tensor  # () 1, or NaN if a label of either side is out of range
    num_classes_present: int  # an upper bound that needs no synchronization
    num_classes: int

    @cached_property
    def counts(self) -> Tensor:
        """Rows of each class index, (num_classes_present,) int64."""
        counts = self.class_index.new_zeros(self.num_classes_present)
        return counts.index_add_(0, self.class_index, torch.ones_like(self.class_index))

    @cached_property
    def mean_factor(self) -> Tensor:
        """The factor of a row in a mean over the valid rows, (): poison / their number."""
        return self.poison / self.valid.sum().clamp(min=1)

    @cached_property
    def present(self) -> Tensor:
        """The classes that occur, (C,) bool."""
        occurs = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=self.class_id.device)
        return occurs.index_fill_(0, self.class_id, True)[: self.num_classes]

    @cached_property
    def order(self) -> Tensor:
        """Rows by class index, ties by row, so that sums over a class have a fixed order: (n,) int64."""
        return self.class_index.argsort(stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Start of each class index in `order`: (num_classes_present + 1,) int64."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])


class SoftLabels:
    """Class weights (n, C) of one side's rows, acc dtype, and their products with rows.

    Candidate j is a positive of anchor i by w_ij = <Y_i, Y_j> / sum_j <Y_i, Y_j>. The matrix w (n, m) is never made:
    sum_j w_ij K_j = Y_i (Y^T K) / (Y_i . sum_j Y_j), with a table of C rows in between. On a CPU, where rows have few
    entries, the entries alone are read; a GPU would have to synchronize for their number.
    """

    _SPARSE = 8  # entries are taken where they are at most this part of the weights

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.totals = weights.sum(0)  # (C,)
        self._entries: tuple[Tensor, ...] | None = None
        if weights.device.type == "cpu" and int(torch.count_nonzero(weights)) * self._SPARSE <= weights.numel():
            row, class_id = weights.nonzero(as_tuple=True)
            by_class, order = class_id.sort(stable=True)
            value, (n, num_classes) = weights[row, class_id], weights.shape
            self._entries = (
                class_id, value, _bag_starts(row, n),
                row[order], value[order], _bag_starts(by_class, num_classes),
            )  # fmt: skip

    def class_sums(self, rows: Tensor) -> Tensor:
        """Y^T rows: (C, width) acc dtype, from rows (n, width) of any dtype."""
        acc = self.weights.dtype
        if self._entries is None:
            return torch.mm(self.weights.T, rows.to(acc))
        *_, row, value, starts = self._entries
        # A bag adds row by row, in fp64 for the sake of large classes.
        sums = torch.empty(self.weights.shape[1], rows.shape[1], dtype=acc)
        for part in range(0, rows.shape[1], 128):
            wide = rows[:, part : part + 128].to(torch.float64).contiguous()
            sums[:, part : part + 128] = _bags(row, value.to(torch.float64), starts, wide)
        return sums

    def mix(self, table: Tensor) -> Tensor:
        """Y table: (n, width), from a table (C, width) acc dtype."""
        if self._entries is None:
            return torch.mm(self.weights, table)
        class_id, value, starts, *_ = self._entries
        return _bags(class_id, value, starts, table.contiguous())

    def share(self, totals: Tensor) -> Tensor:
        """1 / (Y_i . totals), 0 where there is no positive: (n,), from the sum of the candidates' weights (C,)."""
        total = torch.mv(self.weights, totals)
        return torch.where(total > 0, 1 / total, torch.where(total.isnan(), total, 0.0))


def _bag_starts(ids: Tensor, count: int) -> Tensor:
    """The first place of each of ``count`` ids in the ascending ``ids``."""
    return torch.searchsorted(ids, torch.arange(count))


def _bags(index: Tensor, value: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Sums of value x table[index] over the entries from each start to the next."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=value)


def hard_labels(weights: Tensor, ignore_index: int) -> Tensor:
    """The class of largest weight of rows (n, C): (n,) int64; ``ignore_index`` for rows of zeros.

    A row that is neither >= 0 with a sum of 1 nor zeros gets a label out of range, which poisons its term.
    """
    total = weights.sum(1)
    bad = ~(((total - 1).abs() <= SUM_TOLERANCE) | (total == 0)) | (weights < 0).any(1)
    classes = torch.where(total == 0, ignore_index, weights.argmax(1))
    return torch.where(bad, -1 if ignore_index != -1 else -2, classes)


def class_weights(target: Tensor, ignore_index: int, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Labels (n,) int64 or (n, C) floating as class weights (n, C); an ignored row has none."""
    if target.is_floating_point():
        weights = target.to(dtype)
        if 0 <= ignore_index < num_classes:
            weights = weights * (weights.argmax(1) != ignore_index)[:, None]
        return weights
    valid = (target != ignore_index) & (target >= 0) & (target < num_classes)
    weights = torch.zeros(target.shape[0], num_classes, dtype=dtype, device=target.device)
    return weights.scatter_(1, torch.where(valid, target, 0)[:, None], valid[:, None].to(dtype))


def with_tables(
    labels: IndexedLabels,
    *,
    counts: Tensor | None = None,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    mean_factor: Tensor | None = None,
) -> IndexedLabels:
    """Store tables that a kernel has computed, so that the properties do not compute them again. Returns ``labels``."""
    tables = {"counts": counts, "order": order, "starts": starts, "mean_factor": mean_factor}
    # A cached property reads the instance's dictionary first.
    vars(labels).update({name: table for name, table in tables.items() if table is not None})
    return labels


def index_labels(
    sides: tuple[Tensor, ...], ignore_index: int, num_classes: int, dtype: torch.dtype
) -> tuple[Labels, ...]:
    """Index the labels of each side, (n,) int64, with class indices in common. ``dtype`` is that of ``poison``."""
    target = torch.cat(sides) if len(sides) > 1 else sides[0]
    valid, class_id, key, poison = _clamped(target, ignore_index, num_classes, dtype)
    n = target.shape[0]
    class_index = class_id if num_classes < n else _dense_index(class_id)
    sizes = [side.shape[0] for side in sides]
    parts = zip(*(x.split(sizes) for x in (key, valid, class_index, class_id)), strict=True)
    return tuple(
        Labels(
            key=key_part,
            valid=valid_part,
            class_index=index_part,
            class_id=id_part,
            poison=poison,
            num_classes_present=min(n, num_classes + 1),
            num_classes=num_classes,
        )
        for key_part, valid_part, index_part, id_part in parts
    )


def index_labels_over_ranks(
    everything: Tensor,
    own: slice,
    ignore_index: int,
    num_classes: int,
    dtype: torch.dtype,
    further: Tensor | None = None,
) -> tuple[Labels, Labels, Labels | None]:
    """The labels of this rank's rows, of all rows, given as (B,), and of further candidates (q,).

    Class indices are those of the classes of this rank's rows, and one more, the last, for ignored rows and for rows of
    other classes: a table by class index has no more rows than this rank has, and one. `counts`, `mean_factor` and
    `present` of the second are those of the global batch; so is the `mean_factor` of the first.
    """
    batch = everything.shape[0]
    target = everything if further is None else torch.cat((everything, further))
    valid, class_id, key, poison = _clamped(target, ignore_index, num_classes, dtype)
    count = own.stop - own.start
    if num_classes < count or count == 0:
        present = num_classes + 1 if count else 1
        class_index = class_id if count else torch.zeros_like(class_id)
    else:
        present = count + 1
        ordered = class_id[own].sort().values
        numbers = torch.zeros_like(ordered)
        numbers[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        place = torch.searchsorted(ordered, class_id).clamp_(max=count - 1)
        class_index = torch.where(valid & (ordered[place] == class_id), numbers[place], count)
    parts = [
        Labels(
            key=key[rows],
            valid=valid[rows],
            class_index=class_index[rows],
            class_id=class_id[rows],
            poison=poison,
            num_classes_present=present,
            num_classes=num_classes,
        )
        for rows in (own, slice(0, batch), slice(batch, None))
    ]
    with_tables(parts[0], mean_factor=parts[1].mean_factor)
    return parts[0], parts[1], None if further is None else parts[2]


def has_bad_label(target: Tensor, ignore_index: int) -> bool:
    """True if a label (n,) of the CPU is negative and not ignored."""
    return bool(target.amin() < 0) and bool(((target < 0) & (target != ignore_index)).any())


def part_of_labels(labels: Labels, rows: slice) -> Labels:
    """The labels of some of the rows, without the tables."""
    return replace(
        labels,
        key=labels.key[rows],
        valid=labels.valid[rows],
        class_index=labels.class_index[rows],
        class_id=labels.class_id[rows],
    )


def _clamped(
    target: Tensor, ignore_index: int, num_classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """valid, class_id, key (n,) and poison () of labels (n,)."""
    valid = target != ignore_index
    # Bad labels are clamped, so that no kernel reads out of bounds; the poison makes their terms NaN.
    clamped = target.clamp(0, num_classes - 1)
    bad = valid & (target != clamped)
    poison = torch.where(bad.any(), torch.nan, 1.0).to(dtype)
    class_id = torch.where(valid, clamped, num_classes)
    n = target.shape[0]
    key = torch.where(valid, clamped, torch.arange(-1, -1 - n, -1, device=target.device))
    return valid, class_id, key, poison


def _dense_index(class_id: Tensor) -> Tensor:
    """Number the distinct values of ``class_id`` (n,) from 0, in their order: (n,) int64."""
    ordered, order = class_id.sort(stable=True)
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, steps.cumsum(0))
