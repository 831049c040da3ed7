"""timm: its logit distillation task with any loss in place of the KL divergence, also for timm's own train.py.

    python python/adapters/timm_task.py MCLDLoss temperature=0.5 weight=3 warmup_steps=5000 -- \\
        train.py --data-dir ... --model resnet18 --kd-model-name resnet34 ...

starts the script after ``--`` with the loss, under torchrun as well. timm's --kd-temperature has no effect then;
--task-loss-weight and --distill-loss-weight keep theirs.
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.task
import torch
import torch.distributed as dist
from timm.task import LogitDistillationTask
from torch import Tensor, nn


class LossTask(LogitDistillationTask):
    """``LogitDistillationTask`` with ``distill_loss(student, teacher, target)``; all other arguments are timm's.

    No epoch reaches a task: a warm-up counts steps (``MCLDLoss(warmup_steps=...)``). The count is in timm's
    checkpoints and comes back with --resume. With mixup or cutmix the target is soft, (batch, classes);
    ``soft_labels=False`` gives the loss its most likely class, True the target as it is, for a loss that takes one, as
    MCLDLoss does. ``sync``: over several ranks,
    take the loss of the global batch, as `sync_over_ranks` says.
    """

    def __init__(
        self, *args: Any, distill_loss: nn.Module, soft_labels: bool = False, sync: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.distill_loss, self.soft_labels, self.sync = distill_loss, soft_labels, sync

    def prepare_distributed(self, *args: Any, **kwargs: Any) -> LossTask:
        super().prepare_distributed(*args, **kwargs)
        if self.sync:
            sync_over_ranks(self.distill_loss)
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student = self.trainable_module(input)
        task_loss = self.criterion(student, target)
        with torch.no_grad():
            teacher = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        labels = target if target.ndim == 1 or self.soft_labels else target.argmax(dim=1)
        kd_loss = self.distill_loss(student, teacher, labels)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": student, "task_loss": task_loss, "kd_loss": kd_loss}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else self.distill_loss.state_dict()

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, **kwargs: Any) -> None:
        if state and not kwargs.get("ema"):
            self.distill_loss.load_state_dict(state, strict=strict)


def sync_over_ranks(loss: nn.Module) -> None:
    """Where there are several ranks, let the loss be that of the global batch, the rows of all of them.

    ValueError for a loss without ``process_group``. One whose rows do not meet, as KDLoss, needs none: the mean of even
    ranks is the global one.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if not hasattr(loss, "process_group"):
            raise ValueError(
                f"sync=True: {type(loss).__name__} has no process_group, so each rank would see its own rows alone; "
                "pass sync=False if that is what you want"
            )
        loss.process_group = dist.group.WORLD


def use(make_loss: Callable[[], nn.Module], **options: bool) -> None:
    """Let timm's own train.py, imported or run after this, build its logit distillation with ``make_loss()``.

    ``options``: ``soft_labels`` and ``sync`` of `LossTask`. timm's optimizer has the student's parameters alone: a loss
    that has some raises ValueError.
    """
    if any(True for _ in make_loss().parameters()):
        raise ValueError(
            "the loss has parameters, and the optimizer of timm's train.py has those of the student alone: weights and "
            "a temperature that are learned need a training loop of your own"
        )

    class Task(LossTask):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, distill_loss=make_loss(), **options, **kwargs)

    timm.task.LogitDistillationTask = Task


def main(arguments: Sequence[str]) -> None:
    """``LOSS key=value ... -- SCRIPT its arguments``: run timm's script with a loss of mcld_kernels."""
    import mcld_kernels

    usage = "timm_task.py LOSS [key=value ...] -- train.py [timm's arguments]"
    if "--" not in arguments[1:-1]:
        sys.exit(f"usage: {usage}")
    split = list(arguments).index("--")
    name, *pairs = arguments[:split]
    if not name.endswith("Loss") or not hasattr(mcld_kernels, name):
        losses = ", ".join(other for other in mcld_kernels.__all__ if other.endswith("Loss"))
        sys.exit(f"mcld_kernels has no loss {name!r}; it has {losses}")
    bad = [pair for pair in pairs if "=" not in pair]
    if bad:
        sys.exit(f"{bad[0]!r} is not an option of the form key=value; usage: {usage}")
    options = {key: _value(text) for key, text in (pair.split("=", 1) for pair in pairs)}
    of_task = {key: bool(options.pop(key)) for key in ("soft_labels", "sync") if key in options}
    try:
        use(lambda: getattr(mcld_kernels, name)(**options), **of_task)
    except (TypeError, ValueError) as error:
        sys.exit(f"{name}: {error}")
    script, *rest = arguments[split + 1 :]
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word, as in direction=symmetric


if __name__ == "__main__":
    main(sys.argv[1:])
