"""Options, terms and checks of KD, CKD, CLKD and MLKD, beside those of `options`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .cache_keys import fixed_index, fixed_sequence
from .distributed import RanksOptions
from .options import (
    MCLDOptions,
    are_classes,
    check_backend,
    check_eps,
    check_ignore_index,
    check_logits,
    check_one_element,
    check_positive,
    check_target,
    check_weight_values,
    instance_term,
    is_number,
    is_readable,
    label_bounds,
)

Negatives = Literal["teacher", "student"]
Reduction = Literal["mean", "sum"]
Views = Literal[1, 2]

CLKD_TERMS = ("instance", "category", "correlation")
MLKD_TERMS = ("correlation", "alignment", "supervised")


class CKDTerms(NamedTuple):
    """The CKD loss and its term, each of shape () and of the loss's dtype.

    ``loss`` carries the gradient; ``contrast`` is unweighted and detached, for logging; 0 if its weight is 0.
    """

    loss: Tensor
    contrast: Tensor


class CLKDTerms(NamedTuple):
    """The CLKD loss and its three terms, each of shape () and of the loss's dtype.

    ``loss`` carries the gradient; the terms are unweighted and detached, for logging. A term with weight 0 reads 0.
    """

    loss: Tensor
    instance: Tensor
    category: Tensor
    correlation: Tensor


class MLKDTerms(NamedTuple):
    """The MLKD loss and its three terms, each of shape () and of the loss's dtype.

    ``loss`` carries the gradient; the terms are unweighted and detached, for logging. A term with weight 0 reads 0.
    """

    loss: Tensor
    correlation: Tensor
    alignment: Tensor
    supervised: Tensor


class KDOptions(NamedTuple):
    """The options of a call after the checks."""

    temperature: float


class CKDOptions(NamedTuple):
    """The options of a call after the checks."""

    temperature: float
    term_weight: float  # 0 removes the term and its cost
    negatives: Negatives
    eps: float


class CLKDOptions(NamedTuple):
    """The options of a call after the checks."""

    term_weight: tuple[float, float, float]
    reduction: Reduction
    eps: float


class MLKDOptions(NamedTuple):
    """The options of a call after the checks."""

    correlation_temperature: float
    supervised_temperature: float
    term_weight: tuple[float, float, float]
    views: int
    ignore_index: int
    eps: float


def ckd_options(*, temperature: Any, weight: Any, negatives: Any, eps: Any) -> tuple[CKDOptions, Tensor | None]:
    """The options, and the weight tensor (1,) if one came."""
    numbers, tensor = _split_weight(weight, ("contrast",))
    return _cached(_cached_ckd_options, _ckd_options, temperature, numbers, negatives, eps), tensor


def _ckd_options(temperature: Any, weight: Any, negatives: Any, eps: Any) -> CKDOptions:
    return CKDOptions(
        temperature=check_positive("temperature", temperature),
        term_weight=_check_weights(weight, ("contrast",))[0],
        negatives=_check_choice("negatives", negatives, ("teacher", "student")),
        eps=check_eps(eps),
    )


@lru_cache(maxsize=256)
def ckd_as_mcld(options: CKDOptions) -> MCLDOptions:
    """The options as MCLD's instance-wise term."""
    direction = "teacher" if options.negatives == "teacher" else "self"
    return instance_term(options.temperature, options.eps, options.term_weight, direction)


def clkd_options(*, weight: Any, reduction: Any, eps: Any) -> tuple[CLKDOptions, Tensor | None]:
    """The options, and the weight tensor (3,) if one came."""
    numbers, tensor = _split_weight(weight, CLKD_TERMS)
    return _cached(_cached_clkd_options, _clkd_options, numbers, reduction, eps), tensor


def _clkd_options(weight: Any, reduction: Any, eps: Any) -> CLKDOptions:
    instance, category, correlation = _check_weights(weight, CLKD_TERMS)
    return CLKDOptions(
        term_weight=(instance, category, correlation),
        reduction=_check_choice("reduction", reduction, ("mean", "sum")),
        eps=check_eps(eps),
    )


def mlkd_options(
    *,
    correlation_temperature: Any,
    supervised_temperature: Any,
    weight: Any,
    views: Any,
    ignore_index: Any,
    eps: Any,
) -> tuple[MLKDOptions, Tensor | None]:
    """The options, and the weight tensor (3,) if one came."""
    numbers, tensor = _split_weight(weight, MLKD_TERMS)
    if not torch.compiler.is_compiling():  # a key of the cache must not change
        if type(views) is not int:
            views = fixed_index("views", views)
        if type(ignore_index) is not int:
            ignore_index = fixed_index("ignore_index", ignore_index)
    values = (correlation_temperature, supervised_temperature, numbers, views, ignore_index, eps)
    return _cached(_cached_mlkd_options, _mlkd_options, *values), tensor


def _mlkd_options(
    correlation_temperature: Any, supervised_temperature: Any, weight: Any, views: Any, ignore_index: Any, eps: Any
) -> MLKDOptions:
    correlation, alignment, supervised = _check_weights(weight, MLKD_TERMS)
    return MLKDOptions(
        correlation_temperature=check_positive("correlation_temperature", correlation_temperature),
        supervised_temperature=check_positive("supervised_temperature", supervised_temperature),
        term_weight=(correlation, alignment, supervised),
        views=_check_choice("views", views, (2, 1)),
        ignore_index=check_ignore_index(ignore_index),
        eps=check_eps(eps),
    )


_cached_ckd_options = lru_cache(maxsize=256, typed=True)(_ckd_options)
_cached_clkd_options = lru_cache(maxsize=256, typed=True)(_clkd_options)
_cached_mlkd_options = lru_cache(maxsize=256, typed=True)(_mlkd_options)
_FIXED = frozenset((float, int, str, tuple))
Options = TypeVar("Options")


def _cached(cached: Callable[..., Options], plain: Callable[..., Options], *values: Any) -> Options:
    # A compiler cannot trace the cache, and a list, or another sequence that can change, cannot be its key.
    if torch.compiler.is_compiling():
        return plain(*values)
    try:
        return cached(*(x if type(x) in _FIXED else fixed_sequence(x) for x in values))
    except TypeError:  # unhashable, or of the wrong type: the checks say which
        return plain(*values)


def check_gather(ranks: RanksOptions | None, name: str) -> None:
    """Refuse the ring for a loss without that form."""
    if ranks is not None and ranks.gather == "ring":
        raise NotImplementedError(
            f'gather="ring": {name} has no form in which rows travel around the ranks; pass gather="all". MCLD, and '
            'CKD with negatives="teacher", have one'
        )


def check_inputs(student: Tensor, teacher: Tensor, weight: Tensor | None, backend: str = "reference") -> None:
    """Check logits (or embeddings), weight tensor and the backend's name."""
    check_backend(backend)
    check_logits(student, teacher)
    if weight is not None and weight.device != student.device:
        raise ValueError(f"weight must be on the logits' device {student.device}; got {weight.device}")


def check_mlkd_target(target: Tensor | None, student: Tensor, options: MLKDOptions) -> bool | None:
    """Check the labels, where the supervised term needs them.

    Returns `LossInputs.labels_are_classes`; None where the labels are not read.
    """
    is_supervised = options.term_weight[2] != 0
    if target is None:
        if is_supervised:
            raise ValueError(
                "target is None, but labels (batch,) are needed by the supervised term: pass target, "
                "or turn the term off by weight=(correlation, alignment, 0)"
            )
        return None
    if isinstance(target, Tensor) and target.ndim == 2 and target.is_floating_point():
        raise ValueError(
            f"target must hold hard labels of shape (batch,), int64; got soft labels {tuple(target.shape)}, "
            f"{target.dtype}: pass hard labels, such as target.argmax(dim=1), or target=None with a supervised weight "
            "of 0"
        )
    if not is_supervised:
        return None
    check_target(target, student, options.ignore_index, read_values=False, takes_soft=False)
    if not is_readable(target) or target.numel() == 0:
        return None
    # Labels are compared with one another alone, so they may exceed the width of an embedding.
    most = torch.iinfo(torch.int64).max - 1
    bounds = label_bounds("target", target, options.ignore_index, most=most, allowed=">= 0 and below 2^63 - 1")
    return are_classes(bounds, student.shape[1], options.ignore_index)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")
    return choices[choices.index(value)]


def _split_weight(value: Any, names: tuple[str, ...]) -> tuple[Any, Tensor | None]:
    """Weights that are numbers, yet to be checked, and a tensor (terms,), checked, if one came: the numbers are 1.

    The tensor of one term may have shape () as well.
    """
    if not isinstance(value, Tensor):
        return value, None
    count = len(names)
    if count == 1:
        check_one_element("weight", value)
    elif value.shape != (count,):
        listed = ", ".join(names)
        raise ValueError(f"weight as a tensor must have shape {(count,)} ({listed}); got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"weight as a tensor must be of a floating dtype; got {value.dtype}")
    if is_readable(value):
        check_weight_values(value.reshape(count).tolist(), is_learned=value.requires_grad)
    return (1.0 if count == 1 else (1.0,) * count), value.reshape(count)


def _check_weights(value: Any, names: tuple[str, ...]) -> tuple[float, ...]:
    count = len(names)
    kind = f"{count} numbers ({', '.join(names)}) or a tensor"
    if count == 1:
        kind = "a number or a tensor of shape () or (1,)"
    values = (value,) if count == 1 else value
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise TypeError(f"weight must be {kind}; got {value!r}")
    if not all(map(is_number, values)):
        raise TypeError(f"weight must be {kind}; got {value!r}")
    for v in values:
        if not 0 <= v < math.inf:
            raise ValueError(f"weight must be finite and >= 0; got {value!r}")
    return tuple(float(v) for v in values)
