"""A counter of kernel launches and of torch operations that launch a kernel on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Counts launches of kernels, which the tests report, and torch operations that would launch one on a GPU."""

    def __init__(self):
        super().__init__()
        self.launches: list[str] = []
        self.operations: list[str] = []
        self.inside = False  # in a launch, whose emulation runs operations of its own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        on_host = name in ("promote_types", "empty", "empty_like", "empty_strided", "new_empty") or function.is_view
        if not (self.inside or on_host):
            self.operations.append(str(function))
        return function(*args, **(kwargs or {}))
