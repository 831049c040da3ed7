r"""InfoNCE of embeddings: function, module and the composition from one contrast.

Anchors A (n, d) against candidates K (m, d), L_i = logsumexp_j(a_ij) - positive_i (van den Oord et al., arXiv
1807.03748). `infonce` has the derivation: frozen candidates give loss and gradient in one pass, 4 n m d flop.

A temperature that is a tensor on the CPU is read. On a GPU that would synchronize, so the unit anchors are divided by
it on the device, and the kernels run at temperature 1 with a maximum for each row. Its gradient is that of L_i,
-(A_i . dL_i/dA_i) / temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..info_nce_options import (
    MAX_LABEL,
    InfoNCEOptions,
    Reduction,
    check_info_nce_inputs,
    info_nce_as_mcld,
    info_nce_options,
    needs_labels,
    temperature_tensor,
    with_temperature_grad,
)
from ..infonce import Anchors, GradBuffer, Side, contrast
from ..kernels import KernelSet, LossInputs, LossOutputs, Positives, TermWeight, UnitRows
from ..labels import Labels, SoftLabels, class_weights, hard_labels
from ..ops import LossOperator, needs_grad
from ..options import Backend, check_backend, check_flag, check_positive
from ..plain_call import plain_call
from ..reference.info_nce import evaluate as evaluate_reference
from .module_options import Fixed, LossModule, Option, set_values


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positives: Positives = "diagonal",
    offset: int = 0,
    anchor_target: Tensor | None = None,
    candidate_target: Tensor | None = None,
    mask_same_class: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor:
    r"""InfoNCE: every anchor against all candidates, with one or several of them as its positive.

    With unit rows ``A``, ``K`` and the temperature ``t``,

    .. math::
        a_{ij} = A_i \cdot K_j / t, \qquad L_i = logsumexp_j a_{ij} - positive_i

    where ``positive_i`` is ``a[i, i + offset]`` or the mean of ``a[i, j]`` over the candidates of the anchor's label.
    In eager PyTorch, with the default options::

        similarities = F.normalize(anchors) @ F.normalize(candidates).T / temperature  # (n, m)
        loss = F.cross_entropy(similarities, torch.arange(len(anchors)) + offset)

    Source: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv
    1807.03748. Label positives are those of SupCon (Khosla et al., arXiv 2004.11362, the sum outside the logarithm),
    with the positives in the denominator; soft labels are this package's extension.

    Args:
        anchors: embeddings, (n, d), float16, bfloat16, float32 or float64, any strides.
        candidates: embeddings, (m, d), on the same device: a locked tower, a teacher, the keys of a queue. Constants
            give loss and gradient in one pass; candidates that require grad get theirs.
        temperature: > 0. A tensor of shape () or (1,) on the embeddings' device can change without recompiling,
            gets its gradient, and is not read on a GPU: 0 or less makes the loss NaN there.
        positives: "diagonal" (candidate i + offset) or "label" (all candidates with the anchor's label, averaged).
        offset: the candidate that is the positive of anchor 0, as where anchors are a part of a batch.
        anchor_target: labels, (n,), int64, in [0, 2^31 - 2] or ``ignore_index``; or soft labels, (n, classes),
            floating, with rows >= 0 of sum 1, for which candidate j is a positive of anchor i by ``w = Y @ Y.T``,
            divided by its sum over j. A row of zeros has no class. Read by ``positives="label"`` and
            ``mask_same_class`` alone: with ``positives="diagonal"`` and no mask labels change nothing, and SupCon's
            loss needs ``positives="label"`` beside them.
        candidate_target: the same for the candidates; None: ``anchor_target``, where n == m. Hard labels beside soft
            ones are in [0, classes).
        mask_same_class: with diagonal positives, drop candidates with the anchor's label (other than its positive) from
            the denominator; of soft labels the class with the largest weight counts.
        normalize: divide the rows by their L2 norm; False: dot products of the rows as they are.
        reduction: "mean" over the anchors that have a positive, "sum", or "none": (n,), 0 for an anchor without one.
        ignore_index: label of rows without a class. They stay candidates and anchors of diagonal positives, and are of
            the same class as no row.
        eps: a row with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto" (the fastest that can run), "reference", "torch", "triton" or "cuda". All give the same loss and
            gradient; only "reference" can be differentiated twice.

    Returns:
        Tensor of shape (), or (n,) with ``reduction="none"``, float64 for float64 embeddings and float32 otherwise. The
        gradient has the embeddings' dtype. No anchor gives 0. NaN or infinite embeddings give NaN; with
        ``normalize=False`` infinite dot products can make the loss infinite, and one of -inf that is no positive can
        leave it finite, as in eager PyTorch, with a gradient of NaN where an embedding is infinite.

    Raises:
        ValueError: shapes, devices, values or options do not fit, labels are missing or out of range.
        TypeError: a dtype or type does not fit.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.

    Labels out of range raise for labels on the CPU; on a GPU, and under torch.compile, they make the loss NaN.
    """
    options, tensor = info_nce_options(
        temperature=temperature,
        positives=positives,
        offset=offset,
        mask_same_class=mask_same_class,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
        eps=eps,
    )
    return evaluate(anchors, candidates, anchor_target, candidate_target, tensor, options, backend)


def evaluate(
    anchors: Tensor,
    candidates: Tensor,
    anchor_target: Tensor | None,
    candidate_target: Tensor | None,
    temperature: Tensor | None,
    options: InfoNCEOptions,
    backend: str,
) -> Tensor:
    """Check the tensors and run a backend."""
    if temperature is None and anchor_target is None and candidate_target is None:
        if (loss := plain_call(anchors, candidates, options, info_nce_as_mcld, backend)) is not None:
            return loss
    labels_are_good = check_info_nce_inputs(
        anchors, candidates, anchor_target, candidate_target, temperature, options, backend
    )
    if backend == "reference":
        return evaluate_reference(anchors, candidates, anchor_target, candidate_target, temperature, options)
    if not needs_labels(options):
        anchor_target = candidate_target = None
    if needs_grad(temperature):
        options = with_temperature_grad(options)
    extra = candidate_target, None
    return _OPERATOR(anchors, candidates, anchor_target, temperature, options, backend, labels_are_good, extra)[0]


class InfoNCELoss(LossModule):
    """:func:`mcld_kernels.info_nce` with its options kept, and a temperature that can be learned.

    Args:
        temperature, positives, offset, mask_same_class, normalize, reduction, ignore_index, eps, backend: as for
            :func:`mcld_kernels.info_nce`. A temperature that is a parameter is kept as one, another tensor as a buffer.
            Every option can be assigned later, for a schedule.
        learnable: make the temperature a parameter, as CLIP does: ``log_temperature``, its logarithm, so that it stays
            positive. It has the shape of ``temperature``: () for a number, (1,) for a tensor of one element, which FSDP
            can shard.

    Shapes:
        anchors: (n, d); candidates: (m, d); anchor_target: (n,) or (n, classes), candidate_target likewise; output: ()
        or (n,).

    Example::

        criterion = InfoNCELoss(temperature=0.07)
        loss = criterion(encoder(images), momentum_encoder(views))
    """

    temperature_tensor: Tensor | None
    positives = Option[Positives]()
    offset = Option[int]()
    mask_same_class = Option[bool]()
    normalize = Option[bool]()
    reduction = Option[Reduction]()
    ignore_index = Option[int]()
    eps = Option[float]()
    learnable = Fixed[bool]()
    _learnable: bool  # what a forward pass reads: torch 2.6 cannot trace a descriptor

    @staticmethod
    def _check_options(temperature_grad: bool = False, **arguments: Any) -> tuple[InfoNCEOptions, Tensor | None]:
        return info_nce_options(**arguments)

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        positives: Positives = "diagonal",
        offset: int = 0,
        mask_same_class: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        eps: float = 1e-12,
        backend: Backend = "auto",
        learnable: bool = False,
    ):
        super().__init__()
        check_backend(backend)
        self.options, _ = info_nce_options(
            temperature=temperature,
            positives=positives,
            offset=offset,
            mask_same_class=mask_same_class,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            eps=eps,
        )
        self.backend, self.learnable = backend, check_flag("learnable", learnable)
        given = temperature if isinstance(temperature, Tensor) else None
        if learnable:
            start = torch.tensor(self.options.temperature) if given is None else given.detach().clone()
            self.log_temperature = nn.Parameter(start.log())
            # A number is known even where the parameter is made on "meta".
            known = start if given is not None else torch.tensor(temperature, dtype=start.dtype, device="cpu")
            self._keep_given("log_temperature", known.log())
        else:
            if isinstance(given, nn.Parameter):
                self.temperature_tensor = given
            else:
                self.register_buffer("temperature_tensor", given)
            self._keep_given("temperature_tensor", given)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # nn.Module would register a parameter under the name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature. Assign a number, or a tensor; a parameter, learned too, gets a number in place."""
        if self.learnable:
            return self.log_temperature.exp()
        return self.options.temperature if self.temperature_tensor is None else self.temperature_tensor

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        options, tensor = self._checked(temperature=value)
        held = self.log_temperature if self.learnable else self.temperature_tensor
        if self.learnable or (isinstance(held, nn.Parameter) and not isinstance(value, nn.Parameter)):
            assert held is not None
            start = torch.tensor(options.temperature, device="cpu") if tensor is None else tensor.detach()
            values = (start.log() if self.learnable else start).reshape(held.shape)
            set_values(held, values)
            self._keep_given("log_temperature" if self.learnable else "temperature_tensor", values)
        else:
            self.options, self.temperature_tensor = options, value if isinstance(value, Tensor) else None
            if tensor is not None or self._given:
                self._keep_given("temperature_tensor", self.temperature_tensor)

    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        anchor_target: Tensor | None = None,
        candidate_target: Tensor | None = None,
    ) -> Tensor:
        tensor = self.log_temperature.exp() if self._learnable else self.temperature_tensor
        if tensor is not None:
            tensor = temperature_tensor(tensor)
        return evaluate(anchors, candidates, anchor_target, candidate_target, tensor, self.options, self.backend)

    def extra_repr(self) -> str:
        shown = self.options._asdict()
        del shown["temperature_grad"]
        if self.learnable:
            temperature = self.log_temperature.detach().exp()
            is_plain = type(temperature) is Tensor and not temperature.is_meta  # as a part of it on a rank is not
            shown["temperature"] = float(temperature) if is_plain else temperature
        elif self.temperature_tensor is not None:
            shown["temperature"] = self.temperature_tensor.detach()
        parts = [f"{name}={value!r}" for name, value in shown.items()]
        if self.learnable:
            parts.append("learnable=True")
        return ", ".join([*parts, f"backend={self.backend!r}"])


def compute(kernels: KernelSet, inputs: LossInputs) -> LossOutputs:
    """Loss and gradients; ``weight`` of the inputs is the temperature, `LossOutputs.terms` the gradient by it."""
    if (low_latency := kernels.info_nce_low_latency(inputs)) is not None:
        return low_latency(inputs)
    options, acc = inputs.options, inputs.acc_dtype
    n, anchor_weight = inputs.student.shape[0], inputs.extra["anchor_weight"]
    temperature, is_bounded = options.temperature, options.normalize
    anchors = _side(kernels, inputs, inputs.student, inputs.student_grad)
    candidates = _side(kernels, inputs, inputs.teacher, inputs.teacher_grad)
    factor = None
    if inputs.weight is not None:
        if inputs.weight.device.type == "cpu" and not kernels.tuning.scales_by_temperature:
            temperature = check_positive("temperature", float(inputs.weight))
        else:
            value = inputs.weight.to(acc)
            factor = torch.where(value > 0, 1 / value, torch.nan)
            anchors.unit = kernels.scale_rows(anchors.unit, factor)
            if anchors.projection is not None:
                anchors.projection.inv_norm = anchors.unit.inv_norm
            temperature, is_bounded = 1.0, False
    if needs_labels(options):
        _add_labels(kernels, inputs, anchors, candidates)

    per_anchor = anchors.unit.inv_norm.new_zeros(1, n)
    radial = torch.empty_like(per_anchor[0]) if options.temperature_grad else None
    contrast(
        kernels,
        Anchors(
            side=anchors,
            weights=(_term_weight(options, anchors, candidates),),
            per_anchor=per_anchor,
            has_partner=options.positives == "diagonal",
            anchor_weight=None if anchor_weight is None else anchor_weight.to(acc),
            radial=radial,
        ),
        candidates,
        temperature=temperature,
        offset=options.offset,
        mask_same_class=options.mask_same_class,
        is_bounded=is_bounded,
    )
    by_anchor = options.reduction == "none"
    loss = per_anchor[0] if by_anchor else kernels.reduce_terms(per_anchor, (0,), (1.0,), None)[0]
    if radial is None:
        by_temperature = torch.zeros_like(loss)
    else:
        by_temperature = -(radial if by_anchor else radial.sum()) * (1 / temperature if factor is None else factor)
    return LossOutputs(
        loss=loss,
        terms=by_temperature,
        student_grad=anchors.grad.result(),
        teacher_grad=candidates.grad.result(),
    )


def _side(kernels: KernelSet, inputs: LossInputs, x: Tensor, needs_gradient: bool) -> Side:
    """One side's rows as operands. Rows as they are have no direction to be projected out of the gradient."""
    operand, grad = kernels.operand_dtype(inputs.dtype), GradBuffer(x, needs_gradient)
    if inputs.options.normalize:
        return Side(unit=kernels.l2_normalize(x, operand, inputs.options.eps), grad=grad)
    unit = kernels.operand_rows(x, operand)
    projection = None
    if needs_gradient:
        zeros = torch.zeros(unit.rows.shape, dtype=unit.rows.dtype, device=x.device)
        projection = UnitRows(rows=zeros, inv_norm=unit.inv_norm, n=unit.n, d=unit.d)
    return Side(unit=unit, grad=grad, projection=projection)


def _add_labels(kernels: KernelSet, inputs: LossInputs, anchors: Side, candidates: Side) -> None:
    options, acc = inputs.options, inputs.acc_dtype
    target, theirs = inputs.target, inputs.extra["candidate_target"]
    assert target is not None
    targets = (target,) if theirs is None else (target, theirs)
    num_classes = next((t.shape[1] for t in targets if t.is_floating_point()), None)
    if num_classes is not None and options.positives == "label":
        soft = [SoftLabels(class_weights(t, options.ignore_index, num_classes, acc)) for t in targets]
        anchors.soft, candidates.soft = soft[0], soft[-1]
    hard = tuple(hard_labels(t.to(acc), options.ignore_index) if t.is_floating_point() else t for t in targets)
    labels = kernels.index_labels(hard, options.ignore_index, num_classes or MAX_LABEL + 1, acc)
    anchors.labels, candidates.labels = labels[0], labels[-1]


def _term_weight(options: InfoNCEOptions, anchors: Side, candidates: Side) -> TermWeight:
    """The weight of each anchor: its part in the mean, where it has a positive."""
    labels, n = anchors.labels, anchors.unit.n
    is_mean = options.reduction == "mean"
    if options.positives == "diagonal":
        factor = labels.poison if options.mask_same_class and labels is not None else None
        return TermWeight(term=0, positives="diagonal", constant=1 / n if is_mean else 1.0, factor=factor)
    assert labels is not None and candidates.labels is not None
    counted = labels.valid & _has_positive(anchors, labels, candidates, candidates.labels)
    factor = labels.poison / counted.sum().clamp(min=1) if is_mean else labels.poison
    return TermWeight(term=0, positives="label", constant=1.0, factor=factor, counted=counted)


def _has_positive(anchors: Side, labels: Labels, candidates: Side, theirs: Labels) -> Tensor:
    """The anchors with a candidate of their label, (n,) bool."""
    if anchors.soft is None or candidates.soft is None:
        return theirs.counts[labels.class_index] > 0
    return anchors.soft.share(candidates.soft.totals) > 0


def _flops(n: int, d: int, options: InfoNCEOptions, grads: int, m: int) -> int:
    """2 n m d for the similarities, and as many again for the gradient of each side."""
    return 2 * (1 + grads) * n * m * d


_OPERATOR = LossOperator(
    "info_nce",
    InfoNCEOptions,
    num_terms=1,
    compute=compute,
    flops=_flops,
    tensors=("anchors", "candidates", "anchor_target", "temperature_tensor"),
    extra=("candidate_target", "anchor_weight"),
    is_per_anchor=lambda options: options.reduction == "none",
    has_teacher_kernels=True,
)
