"""torchvision, also beside a build of torch that its compiled module does not fit: then without its operators."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

# torchvision describes the shapes of these at its import, and its compiled module, which defines them, cannot be loaded
# beside every build of torch (a wheel for CUDA beside torch for the CPU). Neither the trainer nor a test calls them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a schema lives as long as its library


def import_torchvision() -> ModuleType:
    """The module torchvision. Where its operators are absent, their schemas are declared and it is imported again.

    Raises:
        ImportError: torchvision is not installed, or cannot be imported for another reason than its operators.
    """
    try:
        import torchvision
    except RuntimeError as fault:
        if "operator torchvision::" not in str(fault):
            raise ImportError(f"torchvision cannot be imported: {fault}") from fault
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision
    return torchvision
