"""A loss over an accumulated batch: the exact gradient of one large batch whose activations do not fit.

A contrast does not split into micro-batches, but it needs the logits alone, and logits are small. Two forward passes,
as GradCache (Gao et al., arXiv 2101.06983) makes for embeddings: the first, without gradients, gives the logits of the
whole batch; the loss of these gives the gradient by the logits; the second pass carries it back, chunk by chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def accumulate(model: Callable[..., Tensor], chunks: Sequence[Any], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Add the gradient of ``loss(model(whole batch))`` to the model's parameters, with the activations of one chunk.

    In place of ``loss(model(images)).backward()``::

        chunks = images.split(64)
        value = accumulate(model, chunks, lambda student: criterion(student, teacher, target))
        optimizer.step()

    The gradient is that of the large batch, up to rounding, at the cost of a second forward pass. ``loss`` sees the
    logits of all chunks, so any loss of them may be part of it, cross-entropy too, and a GradScaler may scale its
    result. Over ranks it is called once, as in a plain step; ranks may have different numbers of chunks.

    - Dropout: the second pass replays the random numbers of the first (the CPU's generator and the current GPU's).
    - Batch norm in training mode takes its statistics of a chunk, as in any accumulation, so the result is that of the
      large batch only without it (or with ``eval()``). The first pass leaves no trace in the model's buffers: running
      statistics advance once.
    - DistributedDataParallel and FSDP reduce the gradients once, in the last chunk.
    - A model that is not deterministic in other ways (another generator, state of its own) has a gradient that belongs
      to other logits than the loss.

    Args:
        model: gives the logits (rows of the chunk, classes) of a chunk: an nn.Module, or any function. The buffers
            behind a function are not known: running statistics there advance in both passes.
        chunks: the batch in parts, at least one: a tensor each, or a tuple or mapping of the model's arguments.
        loss: the loss, shape (), of the logits (rows of all chunks, classes). It is called once, with gradients
            enabled; what else it depends on gets its gradient too.

    Returns:
        What ``loss`` returned, detached.

    Raises:
        ValueError: there is no chunk, or the loss has not shape ().
        TypeError: the model returned something else than a tensor.
    """
    if len(chunks) == 0:
        raise ValueError("accumulate needs at least one chunk; got none")
    parts, states = [], []
    with torch.no_grad(), _autocast_uncached(), _buffers_kept(model):
        for chunk in chunks:
            states.append(_random_state())
            part = _apply(model, chunk)
            if not isinstance(part, Tensor):
                raise TypeError(f"the model must return a tensor of logits; got {type(part).__name__}")
            parts.append(part)
    sizes = [part.shape[0] for part in parts]
    logits = torch.cat(parts).requires_grad_()
    del parts
    with torch.enable_grad():
        value = loss(logits)
    if not isinstance(value, Tensor) or value.shape != ():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a tensor of shape (); got {got}")
    value.backward()
    gradients = [None] * len(chunks) if logits.grad is None else logits.grad.split(sizes)
    for i, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
        with _synchronized(model, is_last=i == len(chunks) - 1), torch.enable_grad():
            with _replayed(state):
                part = _apply(model, chunk)
            if gradient is not None:
                part.backward(gradient)
    return value.detach()


def _apply(model: Callable[..., Any], chunk: Any) -> Any:
    if isinstance(chunk, Mapping):
        return model(**chunk)
    return model(*chunk) if isinstance(chunk, (tuple, list)) else model(chunk)


def _random_state() -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Draw random numbers from ``state`` on, and afterwards from where the generators are now."""
    of_cpu, of_gpu = state
    with torch.random.fork_rng(devices=[] if of_gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)
        yield


@contextlib.contextmanager
def _autocast_uncached() -> Iterator[None]:
    """Keep no weight that autocast casts.

    In torch 2.6 one that is cast without gradients serves the second pass too, and its parameter gets no gradient.
    """
    is_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(is_cached)


@contextlib.contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Give the model's buffers back the values that they have now."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _synchronized(model: Any, is_last: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the last chunk alone."""
    if is_last:
        yield
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    elif hasattr(model, "no_sync"):  # DistributedDataParallel, FSDP
        with model.no_sync():
            yield
    else:
        yield
