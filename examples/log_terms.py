"""Log the three terms: they are unweighted and detached, and the category-wise one is before the warm-up."""

import torch

from mcld_kernels import MCLDLoss

torch.manual_seed(0)
criterion = MCLDLoss(temperature=0.5, weight=(3.0, 3.0, 1.0))
student, teacher = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
terms = criterion.terms(student, teacher, torch.randint(10, (64,)))
terms.loss.backward()  # only `loss` has a gradient
print({name: round(value.item(), 3) for name, value in terms._asdict().items()})
