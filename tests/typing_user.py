"""A user's code with every public name, for `mypy --strict` and pyright (tests/test_typing.py); it is not run.

A ``type: ignore`` stands where the checker must complain: an ignore that nothing needs is an error too.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mcld_kernels
from mcld_kernels import (
    CKDLoss,
    CKDTerms,
    CLKDLoss,
    CLKDTerms,
    InfoNCELoss,
    KDLoss,
    MCLDLoss,
    MCLDTerms,
    MLKDLoss,
    MLKDTerms,
    TeacherQueue,
    __version__,
    accumulate,
    backends,
    ckd_loss,
    ckd_terms,
    clkd_loss,
    clkd_terms,
    info_nce,
    kd_loss,
    mcld_loss,
    mcld_terms,
    mlkd_loss,
    mlkd_terms,
    reference,
)
from mcld_kernels.distributed import count_collectives


class Distiller(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.criterion = MCLDLoss(
            temperature=(0.1, 0.1, 0.2),
            weight=[1.0, 1.0, 0.5],
            direction="symmetric",
            mask_same_class=True,
            present_only=True,
            ignore_index=-1,
            eps=1e-6,
            backend="auto",
            warmup=20,
        )

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = self.student(images)
        with torch.no_grad():
            teacher: Tensor = self.teacher(images)
        loss: Tensor = self.criterion(logits, teacher, target)
        return loss + self.criterion.forward(logits, teacher)

    def epoch(self, epoch: int) -> None:
        self.criterion.set_epoch(epoch)
        self.criterion.set_epoch(epoch + 0.5)


def schedule(criterion: MCLDLoss, sibling: CKDLoss, embeddings: InfoNCELoss) -> float:
    criterion.temperature, criterion.weight, criterion.eps = 0.5, (1, 1, 0.5), 1e-6
    criterion.direction, criterion.warmup_steps = "symmetric", 100
    criterion.direction = "both"  # type: ignore[assignment]
    sibling.weight, sibling.gather = 2.0, "ring"
    embeddings.temperature, embeddings.reduction = 0.2, "sum"
    eps: float = criterion.eps
    return eps + sibling.temperature


def functions(student: Tensor, teacher: Tensor, target: Tensor, weight: nn.Parameter) -> list[Tensor]:
    terms: MCLDTerms = mcld_terms(student, teacher, target, temperature=0.1, weight=weight)
    loss, instance, sample, category = terms
    losses: list[Tensor] = [loss, instance, sample, category, terms.loss, terms.instance, terms.sample, terms.category]
    losses.append(mcld_loss(student, teacher, target, direction="teacher", backend="torch"))
    losses.append(mcld_loss(student, teacher, weight=(1, 0, 1)))
    losses.append(reference.mcld_loss(student, teacher, target))
    losses.append(reference.mcld_terms(student, teacher, target, direction="student").loss)
    losses.append(kd_loss(student, teacher, temperature=2, backend="torch"))
    losses.append(info_nce(student, teacher, temperature=weight, positives="label", anchor_target=target))
    losses.append(reference.info_nce(student, teacher, offset=0, normalize=False, reduction="none"))
    losses.append(info_nce(student, teacher, reduction="median"))  # type: ignore[arg-type]
    queue = TeacherQueue(64, 10, dtype=torch.bfloat16)
    queue.enqueue(teacher, target)
    losses.append(mcld_loss(student, teacher, target, candidates=queue.candidates, candidate_target=queue.target))
    embeddings = InfoNCELoss(temperature=0.07, learnable=True)
    losses.append(embeddings.forward(student, teacher))
    losses.append(reference.kd_loss(student, teacher, temperature=2.0))
    criteria: list[nn.Module] = [KDLoss(temperature=4.0, backend="reference"), MCLDLoss()]
    losses.extend(criterion(student, teacher, target) for criterion in criteria)
    losses.append(KDLoss().forward(student, teacher))
    losses.append(MCLDLoss().terms(student, teacher, target).loss)
    return losses


def family(student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    ckd: CKDTerms = ckd_terms(student, teacher, target, temperature=0.5, weight=10, negatives="student")
    losses: list[Tensor] = [*ckd, ckd.loss, ckd.contrast]
    losses.append(ckd_loss(student, teacher, weight=weight, eps=1e-6, backend="torch"))
    losses.append(reference.ckd_loss(student, teacher, negatives="teacher"))
    losses.append(reference.ckd_terms(student, teacher).contrast)
    clkd: CLKDTerms = clkd_terms(student, teacher, target, weight=(0.5, 1, 0), reduction="sum")
    losses += [*clkd, clkd.loss, clkd.instance, clkd.category, clkd.correlation]
    losses.append(clkd_loss(student, teacher, weight=weight, eps=1e-6, backend="torch"))
    losses.append(reference.clkd_loss(student, teacher, reduction="mean"))
    losses.append(reference.clkd_terms(student, teacher).instance)
    mlkd: MLKDTerms = mlkd_terms(student, teacher, target, weight=(50, 20, 1), views=1, ignore_index=-1)
    losses += [*mlkd, mlkd.loss, mlkd.correlation, mlkd.alignment, mlkd.supervised]
    losses.append(mlkd_loss(student, teacher, weight=weight, correlation_temperature=1, supervised_temperature=0.1))
    losses.append(reference.mlkd_loss(student, teacher, target, views=2))
    losses.append(reference.mlkd_terms(student, teacher, target).supervised)
    losses.append(MLKDLoss(weight=[20, 10, 0.5], eps=1e-6, backend="torch")(student, teacher, target))
    criteria: list[nn.Module] = [CLKDLoss(weight=[0.5, 1.0, 0.4], reduction="sum")]
    criteria += [CKDLoss(temperature=0.5, weight=weight, negatives="student", backend="auto")]
    losses.extend(criterion(student, teacher, target) for criterion in criteria)
    return losses


def over_ranks(network: nn.Module, images: Tensor, teacher: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    criterion = MCLDLoss(process_group=group, gather="ring", even=True)
    criterion.process_group = "dp"
    name: str | None = criterion.process_group
    losses = [mcld_loss(images, teacher, target, process_group=name, gather="all")]
    losses.append(reference.mcld_loss(images, teacher, target, process_group=group))
    losses.append(mlkd_loss(images, teacher, target, process_group=group, gather="all", even=True))
    losses.append(CLKDLoss(process_group=group)(images, teacher))
    losses.append(accumulate(network, [images[:8], images[8:]], lambda student: criterion(student, teacher, target)))
    losses.append(accumulate(network, [(images,), {"input": images}], torch.sum))
    with count_collectives() as collectives:
        sizes: list[int] = [collective.num_bytes for collective in collectives]
    return torch.stack(losses) * sum(sizes)


def machine(student: Tensor, teacher: Tensor) -> str:
    names: tuple[str, ...] = backends.available()
    reasons: dict[str, str] = backends.explain(student, teacher)
    reason: str | None = backends.unavailable_reason("cuda")
    try:
        mcld_kernels.mcld_loss(student, teacher, backend="cuda")
    except backends.BackendUnavailable as error:
        return f"{__version__} {names} {reasons} {reason} {error}"
    return " ".join(backends.NAMES)


def mistakes(student: Tensor, teacher: Tensor) -> None:
    mcld_loss(student, teacher, direction="teachers")  # type: ignore[arg-type]
    mcld_terms(student, teacher, backend="cpu")  # type: ignore[arg-type]
    MCLDLoss(direction="both", backend="triton")  # type: ignore[arg-type]
    MCLDLoss(0.1)  # type: ignore[call-arg]
    mcld_loss(student, teacher, gather="none")  # type: ignore[arg-type]
    mcld_loss(student, teacher, process_group=3)  # type: ignore[arg-type]
    ckd_loss(student, teacher, negatives="both")  # type: ignore[arg-type]
    mlkd_loss(student, teacher, target=None, views=3)  # type: ignore[arg-type]
    clkd_loss(student, teacher, reduction="none")  # type: ignore[arg-type]
    CKDLoss(1.0)  # type: ignore[call-arg]
    kd_loss(student, teacher, backend="gpu")  # type: ignore[arg-type]
    reference.mcld_loss(student, teacher, temperature="cold")  # type: ignore[arg-type]
