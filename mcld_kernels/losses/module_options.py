"""Options of a loss's module: read, and assigned after their checks, under the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from ..options import is_readable

Value = TypeVar("Value")


class Option(Generic[Value]):
    """An attribute of a `LossModule` that is a field of its ``options``. A bad value raises, and changes nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: type) -> Option[Value]: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> Value: ...

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        return self if module is None else getattr(module.options, self.name)

    def __set__(self, module: LossModule, value: Value) -> None:
        module._replace_options(**{self.name: value})


class Fixed(Generic[Value]):
    """An attribute that is set once, by the constructor: assigned later, it would change nothing, or half of it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: type) -> Fixed[Value]: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> Value: ...

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        return self if module is None else module.__dict__[f"_{self.name}"]

    def __set__(self, module: nn.Module, value: Value) -> None:
        if f"_{self.name}" in module.__dict__:
            kind = type(module).__name__
            raise AttributeError(f"{self.name} is chosen when the module is made: make another {kind}; got {value!r}")
        module.__dict__[f"_{self.name}"] = value


class LossModule(nn.Module):
    """Keeps ``options``, a NamedTuple, and ``weight``, a tensor of weights or None where the options have them.

    It remembers the values that its tensors were given, so that `reset_parameters` can restore them.
    """

    options: Any
    if TYPE_CHECKING:  # a buffer or a parameter

        @property
        def weight(self) -> Tensor | None:
            """The tensor of weights; None where ``options.term_weight`` has numbers."""

        @weight.setter
        def weight(self, value: float | Sequence[float] | Tensor | None) -> None: ...

    _check_options: Callable[..., tuple[Any, Tensor | None]]  # the checks of a call, by keyword

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[str, Any] = {}  # by the name of a parameter or a buffer: numbers, nested as the tensor is

    def _keep_given(self, name: str, values: Tensor | None) -> None:
        """Remember ``values`` of the tensor of that name; nothing where they cannot be read, on "meta" or a GPU."""
        self._given.pop(name, None)
        if values is not None and is_readable(values):
            self._given[name] = values.detach().to(torch.float64).tolist()

    def reset_parameters(self) -> None:
        """Set buffers and parameters to their initial values, as after ``to_empty`` of a module made on "meta".

        Values that were assigned since count as initial. Those of a tensor that was given on "meta" or on a GPU are not
        known, and it is left as it is.
        """
        for name, values in self._given.items():
            held = getattr(self, name)
            if isinstance(held, Tensor):
                set_values(held, torch.tensor(values, dtype=held.dtype, device="cpu"))

    def _hold_weight(self, weight: Any) -> None:
        """Register ``weight``, checked: a parameter, another tensor as a buffer, or numbers, which the options have."""
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight if isinstance(weight, Tensor) else None)
        self._keep_given("weight", self._held_weight())

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module refuses numbers for a name that is a buffer or a parameter. A tensor in place of a tensor is left to
        # it: so do load_state_dict(assign=True) and FSDP, at every step, and calls check its values.
        if name == "weight" and not (isinstance(value, Tensor) and isinstance(self._held_weight(), Tensor)):
            if "weight" in self.__dict__["_buffers"] or "weight" in self.__dict__["_parameters"]:
                self._assign_weight(value)
                return
        super().__setattr__(name, value)

    def _held_weight(self) -> Tensor | None:
        return self.__dict__["_parameters"].get("weight", self.__dict__["_buffers"].get("weight"))

    def _assign_weight(self, value: Any) -> None:
        """Numbers, or a tensor in place of numbers. A parameter keeps its identity, which an optimizer may know."""
        options, tensor = self._checked(weight=value)
        held = self._held_weight()
        if isinstance(held, nn.Parameter):
            values = torch.tensor(options.term_weight, device="cpu").reshape(held.shape)
            set_values(held, values)
            self._keep_given("weight", values)
            return
        self._check_changed(options)
        self.options = options
        if isinstance(value, nn.Parameter):
            nn.Module.__setattr__(self, "weight", value)
        else:
            self.__dict__["_buffers"]["weight"] = None if tensor is None else value
        self._keep_given("weight", self._held_weight())

    def _checked(self, **changes: Any) -> tuple[Any, Tensor | None]:
        """Options with the changes, and the weight tensor if one came."""
        arguments = self.options._asdict()
        if "term_weight" in arguments:
            arguments["weight"] = arguments.pop("term_weight")
        return type(self)._check_options(**(arguments | changes))

    def _check_changed(self, options: Any) -> None:
        """Raise where the module cannot run with these options."""

    def _replace_options(self, **changes: Any) -> None:
        options, _ = self._checked(**changes)
        self._check_changed(options)
        self.options = options


def set_values(held: Tensor, values: Tensor) -> None:
    """Set a parameter or a buffer in place, to as many values."""
    values = values.detach().reshape(held.shape)
    if isinstance(placements := getattr(held, "placements", None), tuple):  # of FSDP: every rank assigns
        from torch.distributed.tensor import distribute_tensor  # half a second

        values = distribute_tensor(values, held.device_mesh, placements)  # type: ignore[attr-defined]
    with torch.no_grad():
        held.copy_(values)
