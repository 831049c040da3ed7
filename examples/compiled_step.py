"""The loss inside a compiled step. A new epoch changes a tensor and not the program, so nothing is compiled again."""

import torch
import torch.nn.functional as F

from mcld_kernels import MCLDLoss

torch.manual_seed(0)
model, criterion = torch.nn.Linear(20, 10), MCLDLoss(temperature=0.5, weight=3.0, warmup=2)


@torch.compile(fullgraph=True)
def loss_of(inputs, teacher, target):
    student = model(inputs)
    return F.cross_entropy(student, target) + criterion(student, teacher, target)


for epoch in range(3):
    criterion.set_epoch(epoch)
    loss = loss_of(torch.randn(64, 20), torch.randn(64, 10), torch.randint(10, (64,)))
    loss.backward()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
