"""The options of the losses, and every check of an argument."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from . import remedies
from .cache_keys import fixed_index, fixed_sequence

Direction = Literal["student", "teacher", "symmetric"]
Backend = Literal["auto", "reference", "torch", "triton", "cuda"]

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "triton", "cuda")
TERMS = ("instance", "sample", "category")
INSTANCE, SAMPLE, CATEGORY = range(3)
DIRECTIONS: tuple[Direction, ...] = ("student", "teacher", "symmetric")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_TYPES = (Tensor, nn.Parameter)  # of which an address and strides, or checks made once, say all
_INT64 = 1 << 63
SUM_TOLERANCE = 1e-2  # of a row of soft labels: fp16 and bf16 weights add up to 1 within it


class MCLDTerms(NamedTuple):
    """The MCLD loss and its three terms, each of shape () and of the loss's dtype.

    ``loss`` carries the gradient; ``instance``, ``sample`` and ``category`` are unweighted and detached, for logging.
    A term that is not computed (weight 0) reads 0.
    """

    loss: Tensor
    instance: Tensor
    sample: Tensor
    category: Tensor


class MCLDOptions(NamedTuple):
    """The options of a call after the checks: plain values, the same for every backend."""

    temperature: tuple[float, float, float]
    term_weight: tuple[float, float, float]  # weights known to Python; 0 removes the term and its cost
    direction: Direction
    mask_same_class: bool
    present_only: bool
    ignore_index: int
    eps: float

    @property
    def active(self) -> tuple[bool, bool, bool]:
        """The terms that are computed."""
        return self.term_weight[0] != 0, self.term_weight[1] != 0, self.term_weight[2] != 0


@lru_cache(maxsize=256)
def instance_term(temperature: float, eps: float, weight: float = 1.0, direction: str = "student") -> MCLDOptions:
    """MCLD with the instance-wise term alone.

    direction: also "self", for kernels alone: student rows against one another, with their teacher rows as positives.
    """
    return MCLDOptions((temperature,) * 3, (weight, 0.0, 0.0), direction, False, False, -100, eps)  # type: ignore[arg-type]


def label_terms(options: MCLDOptions) -> tuple[bool, bool, bool]:
    """The terms that are computed and read the labels."""
    # A function, since torch 2.6 cannot trace a property of a NamedTuple.
    instance, sample, category = options.term_weight
    return instance != 0 and options.mask_same_class, sample != 0, category != 0 and options.present_only


@lru_cache(maxsize=256)
def row_groups(options: MCLDOptions) -> tuple[tuple[int, ...], ...]:
    """The active row terms, those together that share one contrast."""
    instance, sample, _ = options.active
    if instance and sample and not options.mask_same_class and options.temperature[0] == options.temperature[1]:
        return ((INSTANCE, SAMPLE),)
    return tuple((term,) for term, active in ((INSTANCE, instance), (SAMPLE, sample)) if active)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator dtype, of sums and of the loss: fp64 for fp64 logits, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds a gradient until the upstream gradient is known.

    A mean over a large batch has gradients below the range of fp16, and a GradScaler's factor comes only in backward.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for the device; "meta" has none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def float32_precision() -> str:
    """torch's float32 matmul precision: "highest", "high" or "medium"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Settings of one backend, newer than this one, have been used, and may differ from it.
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def mcld_options(
    *,
    temperature: float | Sequence[float],
    weight: float | Sequence[float] | Tensor,
    direction: str,
    mask_same_class: bool,
    present_only: bool,
    ignore_index: int,
    eps: float,
) -> tuple[MCLDOptions, Tensor | None]:
    """Check everything that does not depend on the logits. Returns the options and the weight tensor, if one came."""
    weight_tensor: Tensor | None = None
    if isinstance(weight, Tensor):
        check_weight_tensor(weight)
        weight_tensor, weight = weight, 1.0
    if torch.compiler.is_compiling():
        options = _mcld_options(temperature, weight, direction, mask_same_class, present_only, ignore_index, eps)
        return options, weight_tensor
    # A key of the cache must neither change nor lack a hash.
    if type(temperature) is not float:
        temperature = fixed_sequence(temperature)
    if type(weight) is not tuple:
        weight = fixed_sequence(weight)
    if type(ignore_index) is not int:
        ignore_index = fixed_index("ignore_index", ignore_index)
    values = (temperature, weight, direction, mask_same_class, present_only, ignore_index, eps)
    try:
        return _cached_mcld_options(*values), weight_tensor
    except TypeError:  # unhashable, or of the wrong type: the checks say which
        return _mcld_options(*values), weight_tensor


def _mcld_options(
    temperature: Any,
    weight: Any,
    direction: Any,
    mask_same_class: Any,
    present_only: Any,
    ignore_index: Any,
    eps: Any,
) -> MCLDOptions:
    return MCLDOptions(
        temperature=check_temperatures(temperature),
        term_weight=_three_weights(weight),
        direction=check_direction(direction),
        mask_same_class=check_flag("mask_same_class", mask_same_class),
        present_only=check_flag("present_only", present_only),
        ignore_index=check_ignore_index(ignore_index),
        eps=check_eps(eps),
    )


_cached_mcld_options = lru_cache(maxsize=256, typed=True)(_mcld_options)


def check_mcld_inputs(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: MCLDOptions,
    backend: str = "reference",
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
) -> bool | None:
    """Check the tensors of a call against its options. Reads no value of a tensor that is not on the CPU.

    Returns True or False where the labels were read: every one is a class, and none is ignored.
    """
    check_backend(backend)
    check_logits(student, teacher)
    if weight is not None and weight.device != student.device:
        raise ValueError(f"weight must be on the logits' device {student.device}; got {weight.device}")
    if candidates is not None or candidate_target is not None:
        _check_candidates(candidates, candidate_target, teacher, options)
    if target is None:
        if any(label_terms(options)):
            _raise_missing_target(options, weight)
        return False
    return check_target(target, student, options.ignore_index, read_values=any(label_terms(options)))


def _check_candidates(candidates: Any, candidate_target: Tensor | None, teacher: Tensor, options: MCLDOptions) -> None:
    """Further teacher rows (rows, classes), constants, and their labels."""
    if candidates is None:
        raise ValueError("candidate_target without candidates: pass both, or candidates alone")
    check_matrix("candidates", candidates, "teacher rows", "(rows, classes)")
    rows, classes = candidates.shape
    if classes != teacher.shape[1]:
        raise ValueError(f"candidates must have shape (rows, {teacher.shape[1]}); got {tuple(candidates.shape)}")
    if candidates.device != teacher.device:
        raise ValueError(f"candidates must be on the logits' device {teacher.device}; got {candidates.device}")
    if candidates.requires_grad:
        raise ValueError("candidates are rows of earlier steps and get no gradient: pass candidates.detach()")
    if options.direction == "teacher":
        raise ValueError(
            "candidates are teacher rows, for student anchors; with direction='teacher' the candidates are student "
            "rows: pass direction='student' or 'symmetric', or no candidates"
        )
    if candidate_target is not None:
        check_target(
            candidate_target, candidates, options.ignore_index, read_values=any(label_terms(options)),
            name="candidate_target", shape="rows",
        )  # fmt: skip


def check_backend(name: Any) -> None:
    """Raise ValueError if ``name`` is neither "auto" nor a backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Student and teacher: dense floating tensors (batch, classes) of one shape and device, with a class."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if (
            type(logits) is not Tensor
            or logits.layout is not torch.strided
            or logits.is_nested
            or logits.dtype not in DTYPES
            or logits.ndim != 2
        ):
            check_matrix(name, logits, "logits", "(batch, classes)")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape (batch, classes); got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}{remedies.of_shapes(student, teacher)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device; got {student.device} and {teacher.device}: "
            "pass teacher.to(student.device)"
        )
    if student.shape[1] == 0:
        raise ValueError(f"student and teacher need at least one class; got shape {tuple(student.shape)}")


def check_matrix(name: str, x: Tensor, content: str, shape: str) -> None:
    """A dense floating tensor of two dimensions, which the messages call ``content`` of ``shape``."""
    if not isinstance(x, Tensor):
        remedy = remedies.of_no_tensor(name, x)
        raise TypeError(f"{name} must be a tensor of {content} {shape}; got {type(x).__name__}{remedy}")
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested:
        check_dense(name, x)
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be of a floating dtype ({names}); got {x.dtype}{remedies.of_dtype(name, x)}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(x.shape)}{remedies.of_rank(name, x)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """A dense tensor: neither sparse, nested, masked nor distributed."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        if tensor.layout == torch.strided and not tensor.is_nested:
            return
        if not tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}: pass {name}.to_dense()")
    if kind.__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain tensor; got a DTensor: pass {name}.full_tensor() or .to_local()")
    if kind.__name__ == "MaskedTensor" or tensor.is_nested or tensor.layout != torch.strided:
        shown = "nested tensor" if tensor.is_nested else kind.__name__
        raise TypeError(f"{name} must be a dense tensor (batch, classes); got a {shown}, layout {tensor.layout}")


def is_number(value: Any) -> bool:
    """True for one real number (of Python, numpy or a symbolic shape), but not for a bool."""
    return isinstance(value, (Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """As math.isfinite, by comparisons alone: those a compiler can guard on."""
    return bool(-math.inf < value < math.inf)


def check_temperatures(value: Any) -> tuple[float, float, float]:
    """One temperature or three; each is positive and finite."""
    values = (value,) * 3 if is_number(value) else tuple(value) if isinstance(value, Sequence) else None
    if values is None or len(values) != 3 or not all(map(is_number, values)):
        remedy = ": pass numbers, as of temperature.tolist()" if isinstance(value, Tensor) else ""
        raise TypeError(f"temperature must be one number or three (instance, sample, category); got {value!r}{remedy}")
    for v in values:
        if not 0 < v < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {value!r}")
    return float(values[0]), float(values[1]), float(values[2])


def check_positive(name: str, value: Any) -> float:
    """One positive, finite number."""
    if not is_number(value):
        remedy = f": pass a number, as of {name}.item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number; got {value!r}{remedy}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value!r}")
    return float(value)


def _three_weights(value: Any) -> tuple[float, float, float]:
    values = (value,) * 3 if is_number(value) else value
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
        accepted = "one number, three numbers (instance, sample, category) or a tensor of three"
        raise TypeError(f"weight must be {accepted}; got {value!r}")
    if not all(map(is_number, values)):
        raise TypeError(f"weight must be three numbers (instance, sample, category); got {value!r}")
    check_weight_values(values)
    return float(values[0]), float(values[1]), float(values[2])


def check_one_element(name: str, value: Tensor) -> None:
    """A tensor of shape () or (1,), as a parameter that FSDP shards must have."""
    if value.shape not in ((), (1,)):
        remedy = f": pass {name}.reshape(())" if value.numel() == 1 else ""
        raise ValueError(f"{name} as a tensor must have shape () or (1,); got {tuple(value.shape)}{remedy}")


def check_weight_tensor(value: Tensor, *, read_values: bool = True) -> None:
    """A tensor of three weights (3,), floating. Values are read where they can be read without a synchronization."""
    if value.shape != (3,):
        raise ValueError(f"weight as a tensor must have shape (3,); got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"weight as a tensor must be of a floating dtype; got {value.dtype}")
    if read_values and is_readable(value):
        check_weight_values(value.tolist(), is_learned=value.requires_grad)


def check_weight_values(values: Sequence[float], *, is_learned: bool = False) -> None:
    for v in values:
        if not 0 <= v < math.inf:
            reason = (
                "; an optimizer drives a weight that requires a gradient below 0, since that gradient is the term: "
                "learn its logarithm, with a penalty on small weights, as MCLDLoss(uncertainty_weighting=True) does"
            )
            raise ValueError(
                f"weight must be finite and >= 0; got {tuple(values)!r}{reason if is_learned and v < 0 else ''}"
            )


def check_direction(value: Any) -> Direction:
    if value not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}; got {value!r}")
    return value  # type: ignore[no-any-return]


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")
    return value


def check_ignore_index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"ignore_index must be an int; got {type(value).__name__}")
    number = operator.index(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"ignore_index must fit int64, the dtype of target; got {number}")
    return number


def check_eps(value: Any) -> float:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"eps must be a finite number >= 0; got {value!r}")
    return float(value)


def is_readable(tensor: Tensor) -> bool:
    """True where values can be read: on the CPU, in eager mode, of a tensor neither fake, traced nor transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in PLAIN_TYPES
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_observed(tensor: Tensor) -> bool:
    """True where the operations on a tensor are traced, transformed or watched, or it is of another kind or device."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or tensor.device.type not in ("cpu", "cuda")
        or type(tensor) not in PLAIN_TYPES
    )


def _raise_missing_target(options: MCLDOptions, weight: Tensor | None) -> None:
    reasons = (
        "mask_same_class of the instance-wise term",
        "the sample-wise term (weight[1] other than 0)",
        "present_only of the category-wise term",
    )
    needed = [reason for reason, used in zip(reasons, label_terms(options), strict=True) if used]
    remedy = "a term: weight 0"
    if weight is not None:
        remedy = "a term: three numbers as weight, with a 0; a tensor computes all three terms, whatever its values"
    raise ValueError(
        f"target is None, but labels (batch,) are needed by {' and '.join(needed)}: pass target, "
        f"or turn that off ({remedy})"
    )


def check_target(
    target: Tensor,
    student: Tensor,
    ignore_index: int,
    *,
    read_values: bool,
    name: str = "target",
    shape: str = "batch",
    takes_soft: bool = True,
) -> bool | None:
    """Labels (batch,), int64, or soft labels (batch, classes); their values where ``read_values`` and readable.

    Returns as `check_mcld_inputs`.
    """
    if not isinstance(target, Tensor):
        remedy = remedies.of_no_tensor(name, target)
        raise TypeError(f"{name} must be a tensor of labels ({shape},), int64; got {type(target).__name__}{remedy}")
    if type(target) is not Tensor or target.layout is not torch.strided or target.is_nested:
        check_dense(name, target)
    batch, classes = student.shape
    if target.device != student.device:
        raise ValueError(
            f"{name} must be on the logits' device {student.device}; got {target.device}: "
            f"pass {name}.to({str(student.device)!r})"
        )
    # Reading labels on a GPU would synchronize it; there a bad label makes the terms that use it NaN instead.
    if takes_soft and target.ndim == 2 and target.is_floating_point():
        check_soft_labels(name, target, batch, num_classes=classes, read_values=read_values)
        return False
    if target.dtype != torch.int64:
        soft = f", or soft labels ({shape}, classes) of a floating dtype" if takes_soft else ""
        remedy = remedies.of_label_dtype(name, target)
        raise TypeError(f"{name} must be of dtype int64{soft}; got {target.dtype}{remedy}")
    if target.shape != (batch,):
        remedy = remedies.of_label_shape(name, target, batch)
        raise ValueError(f"{name} must have shape ({shape},) = ({batch},); got {tuple(target.shape)}{remedy}")
    if read_values and batch > 0 and is_readable(target):
        bounds = label_bounds(name, target, ignore_index, most=classes - 1, allowed=f"in [0, {classes})")
        return are_classes(bounds, classes, ignore_index)
    return None


def label_bounds(name: str, target: Tensor, ignore_index: int, *, most: int, allowed: str) -> tuple[int, int]:
    """The smallest and the largest of some labels (batch,) that can be read; batch > 0.

    Raises ValueError where one is outside [0, most], which the message calls ``allowed``, and not ``ignore_index``.
    """
    low, high = (int(bound) for bound in torch.aminmax(target))
    if low < 0 or high > most:
        bad = target[((target < 0) | (target > most)) & (target != ignore_index)]
        if bad.numel():
            raise ValueError(
                f"{name} holds {int(bad[0])}; labels must be {allowed} or equal ignore_index={ignore_index}"
            )
    return low, high


def are_classes(bounds: tuple[int, int], num_classes: int, ignore_index: int) -> bool:
    """True where labels from bounds[0] to bounds[1] are all in [0, num_classes), and none is ignored."""
    return bounds[0] >= 0 and bounds[1] < num_classes and not 0 <= ignore_index < num_classes


def check_soft_labels(name: str, target: Tensor, n: int, *, num_classes: int | None = None, read_values: bool) -> None:
    """Soft labels (n, C) floating: rows >= 0 that add up to 1, or zeros; their values where they can be read."""
    if target.shape[0] != n or (num_classes is not None and target.shape[1] != num_classes):
        shown = "classes" if num_classes is None else num_classes
        raise ValueError(f"{name} as soft labels must have shape ({n}, {shown}); got {tuple(target.shape)}")
    if target.shape[1] == 0:
        raise ValueError(f"{name} as soft labels needs at least one class; got shape {tuple(target.shape)}")
    if target.requires_grad:
        raise ValueError(f"{name} gets no gradient: pass {name}.detach()")
    if not read_values or n == 0 or not is_readable(target):
        return
    total = target.to(torch.float64).sum(1)
    bad = ~(((total - 1).abs() <= SUM_TOLERANCE) | (total == 0)) | (target < 0).any(1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{name} as soft labels must have rows >= 0 with a sum of 1 (or of 0: no class); row {row} has a sum of "
            f"{float(total[row]):.4g} and a minimum of {float(target[row].min()):.4g}"
        )
