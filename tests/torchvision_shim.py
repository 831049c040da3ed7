"""torchvision beside a build of torch that its compiled operators do not fit, as a CPU build is for PyPI's wheel.

Its Python then imports nowhere, since it gives fake kernels to operators that nobody has defined. With the two
definitions it imports; none of the tests calls the operators. timm, torchdistill and transformers import torchvision.
"""

import functools
import importlib
import importlib.util

import torch


@functools.cache
def install() -> None:
    """Make ``import torchvision`` work in this process, where it is installed. Call it before the frameworks."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as fault:
        if "torchvision::nms" not in str(fault):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # the definitions go with it
        importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []
