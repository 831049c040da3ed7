"""`MCLDLoss`: the loss as a module, with the warm-up of the category-wise term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, backends, functional
from .arguments import MCLDTerms


class MCLDLoss(nn.Module):
    """:func:`mcld_kernels.mcld_loss` with its options kept.

    Args:
        temperature, weight, direction, mask_same_class, present_only, ignore_index, eps, backend, process_group: as for
            :func:`mcld_kernels.mcld_loss`. ``weight`` as a tensor becomes a buffer, or a parameter if it is one.
        warmup: epochs over which the category-wise term comes in: its weight is multiplied by ``min(epoch / warmup,
            1)``. 0 means no warm-up. Tell the module the epoch with :meth:`set_epoch`.

    Shapes:
        student, teacher: (batch, classes); target: (batch,) int64; output: ().

    Example::

        criterion = MCLDLoss(weight=(1.0, 1.0, 0.5), warmup=20)
        for epoch in range(epochs):
            for step, (images, target) in enumerate(loader):
                criterion.set_epoch(epoch + step / len(loader))
                student = model(images)
                loss = F.cross_entropy(student, target) + criterion(student, teacher(images), target)
    """

    ramp: Tensor
    weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float | Sequence[float] = 0.1,
        weight: Sequence[float] | Tensor = (1.0, 1.0, 1.0),
        direction: str = "student",
        mask_same_class: bool = False,
        present_only: bool = False,
        ignore_index: int = -100,
        eps: float = 1e-12,
        backend: str = "auto",
        process_group: Any = None,
        warmup: float = 0,
    ):
        super().__init__()
        if not arguments.is_number(warmup) or not math.isfinite(warmup) or warmup < 0:
            raise ValueError(f"warmup must be a finite number of epochs >= 0; got {warmup!r}")
        backends.check_name(backend)
        self.options, tensor = arguments.options(
            temperature=temperature,
            weight=weight,
            direction=direction,
            mask_same_class=mask_same_class,
            present_only=present_only,
            ignore_index=ignore_index,
            eps=eps,
            process_group=process_group,
        )
        self.backend, self.warmup = backend, float(warmup)
        if isinstance(tensor, nn.Parameter):
            self.weight = tensor
        else:
            self.register_buffer("weight", tensor)
        # The ramp is a tensor, so that a new epoch changes data and not the compiled program.
        self.register_buffer("ramp", torch.tensor([1.0, 1.0, 0.0 if warmup else 1.0]), persistent=False)

    def set_epoch(self, epoch: float) -> None:
        """Set the epoch, counted from 0, fractions allowed, for the warm-up of the category-wise term."""
        if not arguments.is_number(epoch) or not math.isfinite(epoch) or epoch < 0:
            raise ValueError(f"epoch must be a finite number >= 0; got {epoch!r}")
        if self.warmup:
            self.ramp[2].fill_(min(float(epoch) / self.warmup, 1.0))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return self.terms(student, teacher, target).loss

    def terms(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> MCLDTerms:
        """The loss and its three terms, as :func:`mcld_kernels.mcld_terms`; the category term is before the warm-up."""
        weight = self.weight
        if self.warmup:
            # A loss is easily left behind when a model moves; its three numbers follow the logits once.
            if isinstance(student, Tensor) and self.ramp.device != student.device:
                self.ramp = self.ramp.to(student.device)
            weight = self.ramp if weight is None else weight * self.ramp.to(weight.dtype)
        return functional.evaluate(student, teacher, target, weight, self.options, self.backend)

    def extra_repr(self) -> str:
        shown = self.options._asdict()
        scale = shown.pop("scale")
        shown["weight"] = scale if self.weight is None else self.weight.detach()
        if len(set(shown["temperature"])) == 1:
            shown["temperature"] = shown["temperature"][0]
        parts = [f"{name}={value!r}" for name, value in shown.items()]
        return ", ".join([*parts, f"warmup={self.warmup:g}", f"backend={self.backend!r}"])
