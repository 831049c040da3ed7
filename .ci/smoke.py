"""An installed package at work: the loss and its gradient on every backend that runs here, against the reference."""

from __future__ import annotations

import torch

import mcld_kernels

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
logits = torch.randn(96, 20, device=device, requires_grad=True)
teacher = torch.randn(96, 20, device=device)
target = torch.randint(20, (96,), device=device)

results = {}
for backend in ("auto", *mcld_kernels.backends.NAMES):
    if backend == "auto" or mcld_kernels.backends.unsupported_reason(backend, logits, teacher, False) is None:
        loss = mcld_kernels.mcld_loss(logits, teacher, target, backend=backend)
        results[backend] = loss.detach(), *torch.autograd.grad(loss, logits)
for loss, grad in results.values():
    torch.testing.assert_close(loss, results["reference"][0])
    torch.testing.assert_close(grad, results["reference"][1], rtol=1e-4, atol=1e-6)
print(f"{mcld_kernels.__file__}: torch {torch.__version__} on {device}: {', '.join(results)} agree")
