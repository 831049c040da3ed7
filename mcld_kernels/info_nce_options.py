"""The options of `info_nce`, and the checks of its arguments; those that other losses share are in `options`."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from . import remedies
from .cache_keys import fixed_index
from .kernels import Positives
from .options import (
    MCLDOptions,
    check_backend,
    check_dense,
    check_eps,
    check_flag,
    check_ignore_index,
    check_matrix,
    check_one_element,
    check_positive,
    check_soft_labels,
    instance_term,
    is_readable,
    label_bounds,
)

Reduction = Literal["mean", "sum", "none"]

POSITIVES: tuple[Positives, ...] = ("diagonal", "label")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
MAX_LABEL = (1 << 31) - 2  # kernels compare labels as 32-bit integers


class InfoNCEOptions(NamedTuple):
    """The options of a call after the checks: plain values, the same for every backend."""

    temperature: float  # 1 where a tensor has it
    positives: Positives
    offset: int
    mask_same_class: bool
    normalize: bool
    reduction: Reduction
    ignore_index: int
    eps: float
    temperature_grad: bool = False  # the gradient by the tensor of temperature is needed

    @property
    def needs_labels(self) -> bool:
        return needs_labels(self)


def needs_labels(options: InfoNCEOptions) -> bool:
    # A function, since torch 2.6 cannot trace a property of a NamedTuple.
    return options.positives == "label" or options.mask_same_class


def with_temperature_grad(options: InfoNCEOptions) -> InfoNCEOptions:
    """The options of a call whose gradient by the tensor of temperature is needed."""
    # Not by _replace, which torch 2.6 cannot trace.
    return InfoNCEOptions(
        temperature=options.temperature,
        positives=options.positives,
        offset=options.offset,
        mask_same_class=options.mask_same_class,
        normalize=options.normalize,
        reduction=options.reduction,
        ignore_index=options.ignore_index,
        eps=options.eps,
        temperature_grad=True,
    )


@lru_cache(maxsize=256)
def info_nce_as_mcld(options: InfoNCEOptions) -> MCLDOptions | None:
    """The options where they ask for the mean over pairs, MCLD's instance-wise term; else None."""
    if (options.positives, options.reduction, options.offset) != ("diagonal", "mean", 0):
        return None
    if options.mask_same_class or not options.normalize or options.temperature_grad:
        return None
    return instance_term(options.temperature, options.eps)


def info_nce_options(
    *,
    temperature: float | Tensor,
    positives: str,
    offset: int,
    mask_same_class: bool,
    normalize: bool,
    reduction: str,
    ignore_index: int,
    eps: float,
) -> tuple[InfoNCEOptions, Tensor | None]:
    """Check everything that does not depend on the embeddings. Returns the options, and a temperature tensor as ()."""
    tensor = None
    if isinstance(temperature, Tensor):
        tensor, temperature = temperature_tensor(temperature), 1.0
    if torch.compiler.is_compiling():
        options = _info_nce_options(
            temperature, positives, offset, mask_same_class, normalize, reduction, ignore_index, eps
        )
        return options, tensor
    # A key of the cache must not change.
    if type(offset) is not int:
        offset = fixed_index("offset", offset)
    if type(ignore_index) is not int:
        ignore_index = fixed_index("ignore_index", ignore_index)
    values = (temperature, positives, offset, mask_same_class, normalize, reduction, ignore_index, eps)
    try:
        return _cached_info_nce_options(*values), tensor
    except TypeError:  # unhashable, or of the wrong type: the checks say which
        return _info_nce_options(*values), tensor


def _info_nce_options(
    temperature: Any,
    positives: Any,
    offset: Any,
    mask_same_class: Any,
    normalize: Any,
    reduction: Any,
    ignore_index: Any,
    eps: Any,
) -> InfoNCEOptions:
    if positives not in POSITIVES:
        raise ValueError(f"positives must be one of {', '.join(map(repr, POSITIVES))}; got {positives!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}")
    if isinstance(offset, bool) or not isinstance(offset, (SupportsIndex, torch.SymInt)):
        raise TypeError(f"offset must be an int; got {type(offset).__name__}")
    if offset < 0:  # type: ignore[operator]
        raise ValueError(f"offset must be >= 0, the first candidate that is a positive; got {offset}")
    if check_flag("mask_same_class", mask_same_class) and positives == "label":
        raise ValueError(
            "mask_same_class drops candidates of the anchor's label that are not its positive; with positives='label' "
            "all of them are positives: pass mask_same_class=False, or positives='diagonal'"
        )
    if positives == "label" and offset:
        raise ValueError(f"offset places diagonal positives; with positives='label' it must be 0; got {offset}")
    return InfoNCEOptions(
        temperature=check_positive("temperature", temperature),
        positives=positives,
        offset=offset if isinstance(offset, torch.SymInt) else operator.index(offset),  # type: ignore[arg-type]
        mask_same_class=mask_same_class,
        normalize=check_flag("normalize", normalize),
        reduction=reduction,
        ignore_index=check_ignore_index(ignore_index),
        eps=check_eps(eps),
    )


_cached_info_nce_options = lru_cache(maxsize=256, typed=True)(_info_nce_options)


def temperature_tensor(value: Tensor) -> Tensor:
    """A tensor of temperature, () or (1,), floating, as one of shape ().

    Its value is read where it can be read without a synchronization.
    """
    if value.shape != ():
        check_one_element("temperature", value)
        value = value.reshape(())
    if not value.is_floating_point():
        raise TypeError(f"temperature as a tensor must be of a floating dtype; got {value.dtype}")
    if is_readable(value):
        check_positive("temperature", float(value.detach()))
    return value


def check_info_nce_inputs(
    anchors: Tensor,
    candidates: Tensor,
    anchor_target: Tensor | None,
    candidate_target: Tensor | None,
    temperature: Tensor | None,
    options: InfoNCEOptions,
    backend: str = "reference",
) -> bool:
    """Check the tensors of a call against its options. Reads no value of a tensor that is not on the CPU.

    Returns True where all labels that are needed were read, and are good.
    """
    check_backend(backend)
    for name, tensor in (("anchors", anchors), ("candidates", candidates)):
        check_matrix(name, tensor, "embeddings", "(rows, d)")
    n, m = anchors.shape[0], candidates.shape[0]
    if anchors.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"anchors (n, d) and candidates (m, d) must have the same d; got {tuple(anchors.shape)} and "
            f"{tuple(candidates.shape)}"
        )
    if anchors.shape[1] == 0:
        raise ValueError(f"embeddings need at least one column; got anchors of shape {tuple(anchors.shape)}")
    if anchors.device != candidates.device:
        raise ValueError(
            f"anchors and candidates must be on one device; got {anchors.device} and {candidates.device}: "
            "pass candidates.to(anchors.device)"
        )
    if temperature is not None and temperature.device != anchors.device:
        raise ValueError(
            f"temperature must be on the embeddings' device {anchors.device}; got {temperature.device}: move it there"
        )
    if options.positives == "diagonal" and options.offset + n > m:
        raise ValueError(
            f"positives='diagonal' pairs anchor i with candidate i + offset: {n} anchors and offset={options.offset} "
            f"need {options.offset + n} candidates; got {m}"
        )
    if anchor_target is None:
        if needs_labels(options):
            reason = "positives='label'" if options.positives == "label" else "mask_same_class=True"
            raise ValueError(f"anchor_target is None, but {reason} needs labels (n,) or (n, classes): pass them")
        if candidate_target is not None:
            raise ValueError("candidate_target without anchor_target: pass both, or neither")
        return False
    read_values = needs_labels(options)
    # Hard labels beside soft ones are classes of theirs.
    bounds = _bounds(candidate_target, "candidate_target"), _bounds(anchor_target, "anchor_target")
    were_read = _check_labels("anchor_target", anchor_target, anchors, options.ignore_index, read_values, *bounds[0])
    if candidate_target is not None:
        were_read &= _check_labels(
            "candidate_target", candidate_target, candidates, options.ignore_index, read_values, *bounds[1]
        )
        if anchor_target.ndim == candidate_target.ndim == 2 and anchor_target.shape[1] != candidate_target.shape[1]:
            raise ValueError(
                "anchor_target and candidate_target must have the same number of classes; got "
                f"{anchor_target.shape[1]} and {candidate_target.shape[1]}"
            )
    elif read_values and n != m:
        raise ValueError(
            f"candidate_target is None, which stands for anchor_target where there are as many candidates as anchors; "
            f"got {n} anchors and {m} candidates: pass candidate_target"
        )
    return were_read


def _bounds(target: Any, name: str) -> tuple[int, str]:
    """The largest hard label beside ``target``, and the words for what is allowed."""
    if isinstance(target, Tensor) and target.ndim == 2 and target.is_floating_point():
        return target.shape[1] - 1, f"in [0, {target.shape[1]}), the classes of {name}"
    return MAX_LABEL, f"in [0, {MAX_LABEL}]"


def _check_labels(
    name: str, target: Tensor, rows: Tensor, ignore_index: int, read_values: bool, most: int, allowed: str
) -> bool:
    """Returns True where the values were read. most, allowed: as for `label_bounds`, of hard labels."""
    n = rows.shape[0]
    if not isinstance(target, Tensor):
        raise TypeError(
            f"{name} must be a tensor of labels ({n},), int64, or ({n}, classes); got {type(target).__name__}"
            f"{remedies.of_no_tensor(name, target)}"
        )
    if type(target) is not Tensor or target.layout is not torch.strided or target.is_nested:
        check_dense(name, target)
    if target.device != rows.device:
        raise ValueError(
            f"{name} must be on the embeddings' device {rows.device}; got {target.device}: "
            f"pass {name}.to({str(rows.device)!r})"
        )
    if target.ndim == 2 and target.is_floating_point():
        check_soft_labels(name, target, n, read_values=read_values)
        return False
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name} must be of dtype int64, or soft labels ({n}, classes) floating; got {target.dtype}"
            f"{remedies.of_label_dtype(name, target)}"
        )
    if target.shape != (n,):
        remedy = remedies.of_label_shape(name, target, n)
        raise ValueError(f"{name} must have shape ({n},), a label for each row; got {tuple(target.shape)}{remedy}")
    if not read_values or not is_readable(target):
        return False
    if n:
        label_bounds(name, target, ignore_index, most=most, allowed=allowed)
    return True
