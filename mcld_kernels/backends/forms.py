"""Forms of the CUDA backends' kernels that only a clock can decide between, as `mcld_kernels.calibrate` compares them.

A form is a candidate of `timings` with other fields of its backend's Tuning, written "hopper:hopper_skew=2", several
fields joined by "+". What stands here is all that a table of measurements may set: no form takes more memory than a
chunk at the default budget, and none changes a result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Fields = dict[str, int]  # of a Tuning, bool included

MIB = 1 << 20
BUDGETS = ("chunk_bytes", "wave_bytes")  # fields that MCLD_CHUNK_MB overrules
GAIN = 0.97  # of the candidate's own time: a form that gains less is not taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Logits (batch, classes) of one dtype, at a float32 matmul precision."""

    dtype: str
    precision: str
    batch: int
    classes: int

    @property
    def low_latency(self) -> bool:
        """The few launches of backend "cuda" take it."""
        return max(self.batch, self.classes) <= 1024

    @property
    def flash(self) -> bool:
        """Rows are short enough for flash: 512 bytes."""
        return self.classes * (4 if self.dtype == "float32" else 2) <= 512

    @property
    def two_products(self) -> bool:
        return not self.low_latency and not self.flash

    @property
    def chunked(self) -> bool:
        """The exponentials of all rows are more than a chunk."""
        return self.two_products and self.batch >= 8192

    @property
    def waves(self) -> bool:
        """A chunk at the usual budget leaves much of a wave of blocks idle; below, both budgets give as many waves."""
        return self.two_products and self.batch >= 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The values of one field, beside its default, and the shapes at which they are compared."""

    candidates: tuple[str, ...]
    field: str
    values: tuple[int, ...]
    matters: Callable[[Shape], bool]


FORMS = (
    Form(candidates=("hopper",), field="hopper_skew", values=(1, 2, 3), matters=lambda x: x.two_products),
    Form(candidates=("hopper",), field="hopper_cluster", values=(2,), matters=lambda x: x.two_products),
    Form(candidates=("hopper",), field="library_product", values=(False,), matters=lambda x: x.two_products),
    Form(candidates=("triton",), field="library_product", values=(False, True), matters=lambda x: x.two_products),
    # The tables have 3 on sm_90 and 4 of half the depth for 16-bit operands on sm_80. Where 4 do not fit shared memory,
    # Triton's error rejects the form.
    Form(candidates=("triton",), field="product_stages", values=(3, 4), matters=lambda x: x.two_products),
    Form(
        candidates=("cuda",),
        field="library_product",
        values=(True,),
        matters=lambda x: x.two_products and (x.dtype, x.precision) == ("float32", "highest"),
    ),
    Form(
        candidates=("hopper",),
        field="chunk_bytes",
        values=(32 * MIB, 64 * MIB, 128 * MIB),
        matters=lambda x: x.chunked,
    ),
    Form(candidates=("hopper",), field="wave_bytes", values=(0,), matters=lambda x: x.waves),
    Form(candidates=("triton",), field="chunk_bytes", values=(64 * MIB,), matters=lambda x: x.chunked),
    Form(candidates=("hopper",), field="one_epilogue", values=(False,), matters=lambda x: not x.low_latency),
    Form(
        candidates=("hopper",),
        field="flash_row_bytes",
        values=(0,),
        matters=lambda x: x.flash and not x.low_latency,
    ),
    Form(
        candidates=("hopper",),
        field="min_hopper_flash_tiles",
        values=(1,),
        matters=lambda x: not x.low_latency and min(x.batch, x.classes) <= 256,
    ),
    Form(
        candidates=("cuda", "hopper"),
        field="max_flash_splits",
        values=(1,),
        matters=lambda x: not x.low_latency and min(x.batch, x.classes) <= 256,
    ),
    Form(candidates=("triton",), field="max_flash_splits", values=(1,), matters=lambda x: x.flash),
    Form(
        candidates=("cuda", "hopper"), field="dependent_launches", values=(True,), matters=lambda x: x.low_latency
    ),
    Form(
        candidates=("cuda", "hopper"),
        field="low_latency_limit",
        values=(0,),
        matters=lambda x: x.low_latency and max(x.batch, x.classes) >= 512,
    ),
)  # fmt: skip


def name(candidate: str, fields: Mapping[str, int]) -> str:
    """A form as it is written; the candidate itself without fields."""
    text = "+".join(f"{field}={value}" for field, value in sorted(fields.items()))
    return f"{candidate}:{text}" if text else candidate


def parse(form: str) -> tuple[str, Fields]:
    """The candidate and the fields of a form that `name` has written."""
    candidate, _, text = form.partition(":")
    values = {"True": True, "False": False}
    pairs = (item.partition("=") for item in text.split("+") if item)
    return candidate, {field: values[value] if value in values else int(value) for field, _, value in pairs}


def of_shape(candidates: Iterable[str], shape: Shape) -> list[str]:
    """The forms that are compared at a shape, of some candidates, with one field each."""
    return [
        name(candidate, {form.field: value})
        for candidate in candidates
        for form in FORMS
        if candidate in form.candidates and form.matters(shape)
        for value in form.values
    ]


def combined(milliseconds: Mapping[str, float]) -> list[str]:
    """For each candidate, one form of all fields that gain alone, where there are two or more of them."""
    best: dict[str, dict[str, tuple[float, int]]] = {}
    for form, time in milliseconds.items():
        candidate, fields = parse(form)
        base = milliseconds.get(candidate)
        if len(fields) == 1 and base is not None and time < GAIN * base:
            field, value = next(iter(fields.items()))
            taken = best.setdefault(candidate, {})
            taken[field] = min(taken.get(field, (time, value)), (time, value))
    return [
        name(candidate, {field: value for field, (_, value) in fields.items()})
        for candidate, fields in best.items()
        if len(fields) > 1
    ]


def fastest(milliseconds: Mapping[str, float]) -> dict[str, str]:
    """The form of each candidate: the fastest, if it gains, else the candidate itself."""
    chosen = {form: form for form in milliseconds if ":" not in form}
    for form, time in sorted(milliseconds.items(), key=lambda item: item[1], reverse=True):
        candidate = parse(form)[0]
        if candidate in chosen and ":" in form and time < GAIN * milliseconds[candidate]:
            chosen[candidate] = form
    return chosen


def unknown_reason(candidate: str, fields: Mapping[str, object]) -> str | None:
    """The reason why a table may not set these fields; None if it may."""
    for field, value in fields.items():
        known = [form.values for form in FORMS if form.field == field and candidate in form.candidates]
        if not known:
            names = sorted({form.field for form in FORMS if candidate in form.candidates})
            return f"it sets {field!r} of {candidate!r}, which has {', '.join(names) or 'no fields'} to set"
        if not any(value == allowed and type(value) is type(allowed) for allowed in known[0]):
            return f"it sets {field} = {value!r} of {candidate!r}; calibration tries {', '.join(map(str, known[0]))}"
    return None
