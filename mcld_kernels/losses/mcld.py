"""MCLD, multi-perspective contrastive logit distillation: functions, module and operator.

The instance- and sample-wise terms contrast the rows of the logits, the category-wise term contrasts their columns.
Each is InfoNCE (`infonce`). `mcld_contrasts` composes the loss in one process, `mcld_ranks` over ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import reference, replay
from ..distributed import Gather, RanksOptions, ranks_options, report
from ..ops import LossOperator
from ..options import (
    Backend,
    Direction,
    MCLDOptions,
    MCLDTerms,
    check_backend,
    check_flag,
    check_mcld_inputs,
    check_weight_tensor,
    is_number,
    mcld_options,
)
from ..plain_call import replayed_call
from .mcld_contrasts import compute, count_flops
from .mcld_ranks import compute_over_ranks
from .module_options import Fixed, Option
from .module_over_ranks import ModuleOverRanks

_RAMP_ONE = 1 << 52  # the ramp as an integer: exact for every float64 in [0, 1] of that resolution


def mcld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    temperature: float | Sequence[float] = 0.1,
    weight: float | Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: Direction = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> Tensor:
    r"""Multi-perspective contrastive logit distillation: three InfoNCE losses between student and teacher logits.

    With ``rn``/``cn`` dividing rows/columns by their L2 norm and ``t`` a term's temperature,

    .. math::
        a = rn(S)\, rn(T)^\top / t, \qquad b = cn(S)^\top cn(T) / t

        L_{instance} = mean_i (logsumexp_j a_{ij} - a_{ii})

        L_{sample} = mean_i (logsumexp_j a_{ij} - mean_{j: y_j = y_i} a_{ij})

        L_{category} = mean_k (logsumexp_l b_{kl} - b_{kk})

        L = w_{instance} L_{instance} + w_{sample} L_{sample} + w_{category} L_{category}

    In eager PyTorch, with the default options::

        rows = F.normalize(student) @ F.normalize(teacher).T / temperature  # (batch, batch)
        columns = F.normalize(student, dim=0).T @ F.normalize(teacher, dim=0) / temperature  # (classes, classes)
        same = (target[:, None] == target).float()  # (batch, batch)
        loss = (
            F.cross_entropy(rows, torch.arange(len(rows)))
            + F.cross_entropy(rows, same / same.sum(1, keepdim=True))
            + F.cross_entropy(columns, torch.arange(len(columns)))
        )

    The formulas are a reconstruction of MCLD (Wang and Zhou, "Multi-perspective Contrastive Logit Distillation",
    arXiv 2411.10693) from its published description; constants of the paper are not claimed. Cross-entropy with the
    labels is the task's own loss and not part of this one.

    Args:
        student: logits, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: logits of the same shape and device. Usually a constant; if it requires grad (mutual learning) it gets
            its gradient, from backends "torch" and "reference". Logits of two dtypes are computed in the wider one.
        target: labels, (batch,), int64, in [0, classes) or ``ignore_index``; or soft labels, (batch, classes),
            floating, rows >= 0 with a sum of 1, as mixup and label smoothing make them: in the sample-wise term teacher
            row j is then a positive of row i by ``w = target @ target.T``, divided by its sum over j, and elsewhere the
            class with the largest weight counts (this package's extension). A row of zeros has no class. Needed by the
            sample-wise term, ``mask_same_class`` and ``present_only``.
        candidates: further teacher rows, (rows, classes), for the row terms of student anchors: those of earlier steps
            in a :class:`mcld_kernels.TeacherQueue`. Constants, normalised like the teacher's rows, in the wider
            dtype of student and teacher. Where both row terms have weight 0, they change nothing.
        candidate_target: their labels, as ``target``; None: they are of the same class as no row.
        temperature: > 0; one for all terms, or three (instance, sample, category).
        weight: >= 0; one for all terms, or three (instance, sample, category). A weight of 0 removes the term and its
            cost. A tensor of shape (3,) on the logits' device computes all three terms, can change without
            recompiling, and gets its gradient.
        direction: which side anchors the row terms: "student", "teacher", or "symmetric" (the mean of both).
        mask_same_class: for the instance-wise term, drop candidates with the anchor's label (other than its positive)
            from the denominator.
        present_only: for the category-wise term, only classes that occur in ``target`` are anchors.
        ignore_index: label of rows without a class. They stay candidates and instance-wise anchors, but are no anchor
            of the sample-wise term, are of the same class as no row, and do not make a class present.
        eps: a row or column with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto" (the fastest that can run), "reference", "torch", "triton" or "cuda"; see
            :func:`mcld_kernels.backends.explain`. All give the same loss and gradient; only "reference" can be
            differentiated twice.
        process_group: a torch.distributed process group (or its name), to take the loss of the global batch, the
            rows of all its ranks; None: of this process's rows. Every rank must make the same calls; it returns
            (number of ranks) x (the part of its own anchors), so that the mean over ranks of loss, terms and gradients,
            as DistributedDataParallel takes it, is that of the global batch. Ranks may hold unequal numbers of rows,
            or none.
        gather: over ranks, "all" (the teacher's rows of all ranks are gathered) or "ring" (they travel around the ranks
            in blocks, for batches whose gathered rows do not fit). Both give the same value and gradient.
        even: over ranks, True says that all ranks hold the same number of rows: on a GPU nothing is read on the host
            then, which a CUDA graph needs.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise: sums are taken in that
        dtype. The gradient has the logits' dtype. Products follow the logits' dtype, for float32 the float32 matmul
        precision of torch; autocast does not change them. An empty batch, and a term without anchors, give 0.

        NaN or infinite logits give NaN. A row whose sum of squares overflows counts as infinite.

    Raises:
        ValueError: shapes, devices, values or options do not fit, labels are missing, soft, or out of range; over
            ranks on all of them, with the rank and what is wrong there, or with the ranks' difference.
        TypeError: a dtype or type does not fit.
        RuntimeError: a collective failed: a rank has ended, or ran other code until the group's timeout.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.

    Labels out of range raise for labels on the CPU. Reading labels on a GPU would synchronise it, so there, and under
    torch.compile, they make the terms that use labels NaN.
    """
    ranks, extra = ranks_options(process_group, gather, even), (candidates, candidate_target)
    try:
        options, weight_tensor = mcld_options(
            temperature=temperature,
            weight=weight,
            direction=direction,
            mask_same_class=mask_same_class,
            present_only=present_only,
            ignore_index=ignore_index,
            eps=eps,
        )
        key = None
        if weight_tensor is None and ranks is None and candidates is None and candidate_target is None:
            key = replay.call_key(student, teacher, target, options, backend)
            if key is not None and (loss := replayed_call(student, teacher, target, key)) is not None:
                return loss
        labels_are_classes = check_mcld_inputs(student, teacher, target, weight_tensor, options, backend, *extra)
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    if backend == "reference":
        return reference.mcld.evaluate(student, teacher, target, weight_tensor, options, *extra, ranks).loss
    loss, _ = _OPERATOR(
        student, teacher, target, weight_tensor, options, backend, labels_are_classes, extra, ranks, key
    )
    return loss


def mcld_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    temperature: float | Sequence[float] = 0.1,
    weight: float | Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: Direction = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: Backend = "auto",
    process_group: dist.ProcessGroup | str | None = None,
    gather: Gather = "all",
    even: bool = False,
) -> MCLDTerms:
    """:func:`mcld_loss` and its parts: ``MCLDTerms(loss, instance, sample, category)``, each of shape ().

    ``loss`` is what :func:`mcld_loss` returns, with its gradient; the three terms are unweighted and detached, for
    logging. A term with weight 0 is not computed and reads 0. Arguments and errors as :func:`mcld_loss`.
    """
    ranks = ranks_options(process_group, gather, even)
    try:
        options, weight_tensor = mcld_options(
            temperature=temperature,
            weight=weight,
            direction=direction,
            mask_same_class=mask_same_class,
            present_only=present_only,
            ignore_index=ignore_index,
            eps=eps,
        )
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    return evaluate(student, teacher, target, weight_tensor, options, backend, candidates, candidate_target, ranks)


def evaluate(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    options: MCLDOptions,
    backend: str,
    candidates: Tensor | None = None,
    candidate_target: Tensor | None = None,
    ranks: RanksOptions | None = None,
    key: replay.Key | None = None,
) -> MCLDTerms:
    """Check the tensors and run a backend: the loss, with its gradient, and its terms.

    key: of the call, where it is to be kept for calls of the loss alone (`replay`).
    """
    extra = candidates, candidate_target
    try:
        labels_are_classes = check_mcld_inputs(student, teacher, target, weight, options, backend, *extra)
    except (TypeError, ValueError) as error:
        report(ranks, error)
        raise
    if backend == "reference":
        return reference.mcld.evaluate(student, teacher, target, weight, options, *extra, ranks)
    loss, terms = _OPERATOR(student, teacher, target, weight, options, backend, labels_are_classes, extra, ranks, key)
    return MCLDTerms(loss, *terms.unbind())


class MCLDLoss(ModuleOverRanks):
    """:func:`mcld_kernels.mcld_loss` with its options kept, and a warm-up of the category-wise term.

    The weight of the category-wise term is multiplied by a ramp from 0 to 1: by epochs (``warmup``), by training steps
    (``warmup_steps``), or by both, of which :meth:`set_epoch` takes precedence once it has been called.

    Args:
        temperature, weight, direction, mask_same_class, present_only, ignore_index, eps, backend: as for
            :func:`mcld_kernels.mcld_loss`. ``weight`` as a tensor becomes a buffer, or a parameter if it is one.
            Numbers are in ``options.term_weight``, and the attribute ``weight`` is None.
            Every option can be assigned later, for a schedule: ``criterion.temperature = 0.5``,
            ``criterion.weight = (1, 1, 0.5)``. Numbers assigned to a parameter set its values in place.
        process_group, gather, even: as for :func:`mcld_kernels.mcld_loss`. The module keeps the group's name alone, and
            can be copied and pickled.
        warmup: epochs until the ramp is 1: ``min(epoch / warmup, 1)``, with the epoch from :meth:`set_epoch`, counted
            from 0, fractions welcome. 0: no ramp by epochs.
        warmup_steps: training steps until the ramp is 1: ``min(step / warmup_steps, 1)``. The module counts its calls
            in training mode with gradients enabled; the count is in the state_dict. 0: no ramp by steps.
        uncertainty_weighting: learn the weights as Kendall, Gal and Cipolla (arXiv 1705.07115) do: with a parameter
            ``log_variance`` (3,), the loss is ``sum(exp(-log_variance) x weight x term + log_variance / 2)`` over the
            active terms. A plain parameter as ``weight`` has the term as its gradient: an optimizer drives it
            below 0.

    Shapes:
        student, teacher: (batch, classes); target: (batch,) int64 or (batch, classes); candidates: (rows, classes) with
        candidate_target (rows,); output: ().

    Example::

        criterion = MCLDLoss(weight=(1.0, 1.0, 0.5), warmup=20)
        for epoch in range(epochs):
            for step, (images, target) in enumerate(loader):
                criterion.set_epoch(epoch + step / len(loader))
                student = model(images)
                loss = F.cross_entropy(student, target) + criterion(student, teacher(images), target)
    """

    epoch_ramp: Tensor
    steps: Tensor
    direction = Option[Direction]()
    mask_same_class = Option[bool]()
    present_only = Option[bool]()
    ignore_index = Option[int]()
    eps = Option[float]()
    uncertainty_weighting = Fixed[bool]()
    _uncertainty_weighting: bool  # what a forward pass reads: torch 2.6 cannot trace a descriptor
    _check_options = staticmethod(mcld_options)

    def __init__(
        self,
        *,
        temperature: float | Sequence[float] = 0.1,
        weight: float | Sequence[float] | Tensor = (1.0, 1.0, 1.0),
        direction: Direction = "student",
        mask_same_class: bool = False,
        present_only: bool = False,
        ignore_index: int = -100,
        eps: float = 1e-12,
        backend: Backend = "auto",
        process_group: dist.ProcessGroup | str | None = None,
        gather: Gather = "all",
        even: bool = False,
        warmup: float = 0,
        warmup_steps: int = 0,
        uncertainty_weighting: bool = False,
    ):
        super().__init__(process_group, gather, even)
        self.warmup, self.warmup_steps = warmup, warmup_steps
        check_backend(backend)
        self.options, tensor = mcld_options(
            temperature=temperature,
            weight=weight,
            direction=direction,
            mask_same_class=mask_same_class,
            present_only=present_only,
            ignore_index=ignore_index,
            eps=eps,
        )
        self.uncertainty_weighting = check_flag("uncertainty_weighting", uncertainty_weighting)
        if uncertainty_weighting and tensor is None:
            # The gradient by a tensor of weights does not know of weights beside it.
            tensor = torch.tensor(self.options.term_weight)
            self._hold_weight(tensor)
            self._keep_given("weight", torch.tensor(self.options.term_weight, device="cpu"))
            self.options = self.options._replace(term_weight=_ones_where(self.options.active))
        else:
            self._hold_weight(tensor)
        self.backend = backend
        if uncertainty_weighting:
            self.log_variance = nn.Parameter(torch.zeros(3))
            self._keep_given("log_variance", torch.zeros(3, device="cpu"))
        # What forward reads does not change with every epoch: a compiled program is guarded by it.
        self._epoch, self._has_epoch, self._has_warned = 0.0, False, False
        # Tensors, so that a new epoch changes data and not the compiled program; integers, since half() rounds floats.
        self.register_buffer("epoch_ramp", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=warmup_steps > 0)

    @property
    def temperature(self) -> tuple[float, float, float]:
        """Temperatures of the three terms. Assign one number or three."""
        return self.options.temperature

    @temperature.setter
    def temperature(self, value: float | Sequence[float]) -> None:
        self._replace_options(temperature=value)

    @property
    def warmup(self) -> float:
        """Epochs until the ramp is 1. Assigned, it counts from the next :meth:`set_epoch`."""
        return self._warmup

    @warmup.setter
    def warmup(self, value: float) -> None:
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"warmup must be a finite number of epochs >= 0; got {value!r}")
        self._warmup = float(value)

    @property
    def warmup_steps(self) -> int:
        """Training steps until the ramp is 1; 0: no ramp by steps, and no count in the state_dict."""
        return self._warmup_steps

    @warmup_steps.setter
    def warmup_steps(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"warmup_steps must be a whole number of training steps >= 0; got {value!r}")
        self._warmup_steps = value
        (self._non_persistent_buffers_set.discard if value else self._non_persistent_buffers_set.add)("steps")

    def _assign_weight(self, value: float | Sequence[float] | Tensor) -> None:
        super()._assign_weight(value)
        if self.uncertainty_weighting and self.weight is None:
            self.__dict__["_buffers"]["weight"] = torch.tensor(self.options.term_weight, device=self.steps.device)
            self._keep_given("weight", torch.tensor(self.options.term_weight, device="cpu"))
            self.options = self.options._replace(term_weight=_ones_where(self.options.active))

    @property
    def effective_weight(self) -> Tensor:
        """The weights of the three terms in the next training step, ramp included: (3,), detached."""
        weight = self._weight()
        base = torch.tensor(self.options.term_weight, device=self.steps.device)
        return base if weight is None else (weight.detach() * base.to(weight))

    def set_epoch(self, epoch: float) -> None:
        """Set the epoch for the warm-up: a finite number >= 0, counted from 0; fractions of an epoch are welcome."""
        if torch.compiler.is_compiling():
            # As a factor of a tensor the epoch stays a variable of the program; a comparison would fix its value.
            ramp = torch.ones((), dtype=torch.float64, device=self.epoch_ramp.device) * epoch / (self.warmup or 1.0)
            self.epoch_ramp.copy_(ramp.clamp(0, 1) * _RAMP_ONE)
        else:
            if not is_number(epoch) or not 0 <= epoch < math.inf:
                raise ValueError(f"epoch must be a finite number >= 0; got {epoch!r}")
            self._epoch = float(epoch)
            self.epoch_ramp.fill_(int(min(epoch / (self.warmup or 1.0), 1.0) * _RAMP_ONE))
        self._has_epoch = True

    def reset_parameters(self) -> None:
        """As for every loss's module; the count of steps is 0 again, and the epoch that of `set_epoch`."""
        super().reset_parameters()
        with torch.no_grad():
            self.steps.zero_()
            self.epoch_ramp.zero_()
            if self._has_epoch:
                self.set_epoch(self._epoch)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        candidates: Tensor | None = None,
        candidate_target: Tensor | None = None,
    ) -> Tensor:
        key = None
        if candidates is None and candidate_target is None and self._has_options_alone:
            key = replay.call_key(student, teacher, target, self.options, self.backend)
            # A loss that was left behind when the model moved follows it below.
            if key is not None and self.steps.device == student.device:
                if (loss := replayed_call(student, teacher, target, key)) is not None:
                    return loss
        return self._terms(student, teacher, target, candidates, candidate_target, key).loss

    def terms(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        candidates: Tensor | None = None,
        candidate_target: Tensor | None = None,
    ) -> MCLDTerms:
        """The loss and its three terms, as :func:`mcld_kernels.mcld_terms`; the category term is before the warm-up."""
        return self._terms(student, teacher, target, candidates, candidate_target, None)

    @property
    def _has_options_alone(self) -> bool:
        """True where a call depends on its tensors and the options: no weight, no warm-up, one process."""
        has_more = self.warmup or self.warmup_steps or self._uncertainty_weighting
        return self.weight is None and self.ranks is None and not has_more

    def _terms(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        candidates: Tensor | None,
        candidate_target: Tensor | None,
        key: replay.Key | None,
    ) -> MCLDTerms:
        if isinstance(student, Tensor) and self.steps.device != student.device:
            # A loss is easily left behind when a model moves; its counters follow the logits once.
            self.steps, self.epoch_ramp = self.steps.to(student.device), self.epoch_ramp.to(student.device)
        if self.weight is not None:
            check_weight_tensor(self.weight)
        is_training = self.training and torch.is_grad_enabled()
        if is_training and self.warmup and not self.warmup_steps and not self._has_epoch:
            self._warn_of_missing_epoch()
        result = evaluate(
            student, teacher, target, self._weight(), self.options, self.backend, candidates, candidate_target,
            self.ranks, key,
        )  # fmt: skip
        if self._uncertainty_weighting:
            active = torch.tensor(self.options.active, device=self.log_variance.device)
            loss = result.loss + (self.log_variance * active).sum().to(result.loss) / 2
            # Not by _replace, which torch 2.6 cannot trace.
            result = MCLDTerms(loss, result.instance, result.sample, result.category)
        if is_training and self.warmup_steps:
            self.steps.add_(1)
        return result

    def _ramp(self) -> Tensor | None:
        """The factor of the category-wise term, (); None without a warm-up."""
        if self.warmup and (self._has_epoch or not self.warmup_steps):
            return (
                self.epoch_ramp.to(torch.float64 if self.epoch_ramp.device.type == "cpu" else torch.float32) / _RAMP_ONE
            )
        if self.warmup_steps:
            return (self.steps / self.warmup_steps).clamp(max=1)
        return None

    def _weight(self) -> Tensor | None:
        """The factors of the options' weights, (3,); None where these alone count."""
        weight, ramp = self.weight, self._ramp()
        if self._uncertainty_weighting:
            learned = (-self.log_variance).exp()
            weight = learned if weight is None else weight * learned
        if ramp is None:
            return weight
        dtype = ramp.dtype if weight is None else weight.dtype
        ones = torch.ones((), dtype=dtype, device=ramp.device)
        ramps = torch.stack((ones, ones, ramp.to(dtype)))
        return ramps if weight is None else weight * ramps

    def _warn_of_missing_epoch(self) -> None:
        if self._has_warned or torch.compiler.is_compiling():
            return
        self._has_warned = True
        warnings.warn(
            f"MCLDLoss(warmup={self.warmup:g}) has been called in training and set_epoch() has not: the category-wise "
            "term has weight 0 until it is. Call set_epoch(epoch), counted from 0, or count steps by warmup_steps=.",
            stacklevel=4,
        )

    def extra_repr(self) -> str:
        shown = self.options._asdict()
        term_weight = shown.pop("term_weight")
        shown["weight"] = term_weight if self.weight is None else self.weight.detach()
        if len(set(shown["temperature"])) == 1:
            shown["temperature"] = shown["temperature"][0]
        parts = [f"{name}={value!r}" for name, value in shown.items()]
        parts.append(f"warmup={self.warmup:g}")
        if self.warmup_steps:
            parts.append(f"warmup_steps={self.warmup_steps}")
        if self.uncertainty_weighting:
            parts.append("uncertainty_weighting=True")
        return ", ".join([*parts, f"{self._shown_ranks()}backend={self.backend!r}"])


def _ones_where(active: tuple[bool, bool, bool]) -> tuple[float, float, float]:
    return float(active[0]), float(active[1]), float(active[2])


_OPERATOR = LossOperator(
    "mcld",
    MCLDOptions,
    num_terms=3,
    compute=compute,
    flops=count_flops,
    extra=("candidates", "candidate_target"),
    compute_over_ranks=compute_over_ranks,
)
