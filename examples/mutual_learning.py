"""Two networks teach each other: one call gives both their gradients (backends "torch" and "reference")."""

import torch
import torch.nn.functional as F

from mcld_kernels import mcld_loss

torch.manual_seed(0)
first, second = torch.nn.Linear(20, 10), torch.nn.Linear(20, 10)
optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.5)
for _ in range(5):
    inputs, target = torch.randn(64, 20), torch.randint(10, (64,))
    a, b = first(inputs), second(inputs)
    contrast = mcld_loss(a, b, target, temperature=0.5, direction="symmetric")  # b is not detached
    loss = F.cross_entropy(a, target) + F.cross_entropy(b, target) + contrast
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")
