"""The compiled module (csrc/bindings.cpp).

A launcher takes the fields of its structure in csrc/launchers.h by keyword: tensors by their addresses (0: null),
enumerations by their numbers in `constants`. Each also takes ``plan``, a `Plan` that records the launch. `hopper_*` are
there where ``info()["hopper"]`` is true.
"""

from collections.abc import Sequence
from typing import TypedDict

class Info(TypedDict):
    version: str
    compiler: str
    cuda: str
    architectures: list[str]
    hopper: bool

class Types(TypedDict):
    float32: int
    float16: int
    bfloat16: int

class Precisions(TypedDict):
    bf16: int
    fp16: int
    tf32: int
    tf32x3: int

class Constants(TypedDict):
    types: Types
    precisions: Precisions
    row_padding: int
    narrow_pitch: int
    pitch_multiple: int
    large_tile: int
    small_tile: int
    fp16_lift: int
    flash_rows: int
    flash_row_bytes: int
    max_sorted_classes: int
    max_sort_blocks: int
    sort_rows: int
    low_latency_limit: int
    low_latency_tile: int
    hopper_similarity_rows: int
    hopper_similarity_columns: int
    hopper_flash_rows: int
    hopper_flash_columns: dict[int, int]  # by pitch

class TermWeight(TypedDict):
    factor: int
    counted: int
    weight: int
    constant: float
    term_weight: float
    label_positives: bool

class LowLatencyMatrix(TypedDict):
    student: int
    teacher: int
    student_inv_norm: int
    teacher_inv_norm: int
    exponentials: int
    row_sums: int
    column_sums: int
    product: int
    weighted_teacher: int
    weighted_product: int
    product_coef: int
    partner_coef: int
    class_mean_coef: int
    projection: int
    per_anchor: int
    n: int
    d: int
    pitch: int
    inv_temperature: float
    terms: Sequence[bool]
    masked: bool
    columns: bool
    student_anchors: bool

class CudaError(RuntimeError): ...

constants: Constants

def info() -> Info: ...
def driver_version() -> tuple[int, int] | None: ...
def normalize_rows(
    *,
    x: int,
    row_stride: int,
    column_stride: int,
    out: int,
    inv_norm: int,
    square_sums: int,
    n: int,
    d: int,
    padded_rows: int,
    pitch: int,
    splits: int,
    eps: float,
    type: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def normalize_columns(
    *,
    x: int,
    row_stride: int,
    column_stride: int,
    out: int,
    inv_norm: int,
    square_sums: int,
    n: int,
    d: int,
    padded_rows: int,
    pitch: int,
    splits: int,
    eps: float,
    type: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def index_labels(
    *,
    target: int,
    n: int,
    num_classes: int,
    ignore_index: int,
    key: int,
    class_index: int,
    valid: int,
    histogram: int,
    rank: int,
    sums: int,
    blocks: int,
    rows_per_block: int,
    device: int,
    stream: int,
) -> None: ...
def sort_labels(
    *,
    class_index: int,
    histogram: int,
    rank: int,
    sums: int,
    n: int,
    num_classes_present: int,
    blocks: int,
    rows_per_block: int,
    first: int,
    counts: int,
    starts: int,
    order: int,
    poison: int,
    mean_factor: int,
    device: int,
    stream: int,
) -> None: ...
def class_means(
    *,
    unit: int,
    order: int,
    starts: int,
    counts: int,
    out: int,
    num_classes_present: int,
    pitch: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def positive_cosines(
    *,
    anchors: int,
    candidates: int,
    class_means: int,
    class_index: int,
    positive: int,
    label_positive: int,
    n: int,
    m: int,
    offset: int,
    pitch: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def similarity(
    *,
    anchors: int,
    candidates: int,
    exponentials: int,
    row_sums: int,
    row_maxima: int,
    column_sums: int,
    split_products: int,
    splits: int,
    anchor_keys: int,
    candidate_keys: int,
    rows: int,
    m: int,
    pitch: int,
    exp_pitch: int,
    padded_rows: int,
    offset: int,
    scale_log2: float,
    shift: float,
    precision: int,
    tile: int,
    device: int,
    stream: int,
) -> None: ...
def row_sums(
    *,
    tile_sums: int,
    tile_maxima: int,
    row_maxima: int,
    total: int,
    neg_lse: int,
    inv_neg_sum: int,
    rows: int,
    pitch: int,
    tiles: int,
    accumulate: bool,
    shift: float,
    device: int,
    stream: int,
) -> None: ...
def rescale(
    *,
    exponentials: int,
    tile_maxima: int,
    row_maxima: int,
    rows: int,
    padded_rows: int,
    exp_pitch: int,
    tile: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def scale_rows(
    *,
    x: int,
    out: int,
    factor: int,
    rows: int,
    padded_rows: int,
    pitch: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def product(
    *,
    exponentials: int,
    operand: int,
    out: int,
    alpha: int,
    rows: int,
    contraction: int,
    exp_pitch: int,
    pitch: int,
    transposed: bool,
    accumulate: bool,
    precision: int,
    tile: int,
    device: int,
    stream: int,
) -> None: ...
def flash(
    *,
    anchors: int,
    candidates: int,
    product: int,
    row_sums: int,
    row_maxima: int,
    candidate_factor: int,
    candidate_shift: int,
    anchor_keys: int,
    candidate_keys: int,
    n: int,
    m: int,
    d: int,
    pitch: int,
    padded_rows: int,
    offset: int,
    splits: int,
    scale_log2: float,
    shift: float,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def combine_splits(
    *,
    products: int,
    split_maxima: int,
    row_maxima: int,
    out: int,
    rows: int,
    padded_rows: int,
    pitch: int,
    splits: int,
    device: int,
    stream: int,
) -> None: ...
def loss_epilogue(
    *,
    neg_lse: int,
    inv_neg_sum: int,
    positive: int,
    label_positive: int,
    partner_coef: int,
    product_coef: int,
    class_mean_coef: int,
    per_anchor: int,
    rows: int,
    pitch: int,
    inv_temperature: float,
    weights: Sequence[TermWeight],
    device: int,
    stream: int,
) -> None: ...
def reduce_terms(
    *,
    per_anchor: int,
    width: int,
    parts: Sequence[int],
    term_weight: Sequence[float],
    weight: int,
    loss: int,
    terms: int,
    device: int,
    stream: int,
) -> None: ...
def grad_epilogue(
    *,
    out: int,
    row_stride: int,
    column_stride: int,
    unit: int,
    partner: int,
    class_means: int,
    inv_norm: int,
    product: int,
    product_coef: int,
    partner_coef: int,
    class_mean_coef: int,
    class_index: int,
    projection: int,
    rows: int,
    d: int,
    pitch: int,
    product_pitch: int,
    offset: int,
    partner_rows: int,
    accumulate: bool,
    type: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def anchor_epilogue(
    *,
    out: int,
    row_stride: int,
    unit: int,
    partner: int,
    class_means: int,
    class_index: int,
    inv_norm: int,
    products: int,
    tile_sums: int,
    per_anchor: int,
    rows: int,
    d: int,
    pitch: int,
    product_rows: int,
    product_pitch: int,
    sums_pitch: int,
    per_anchor_pitch: int,
    offset: int,
    partner_rows: int,
    splits: int,
    tiles: int,
    shift: float,
    inv_temperature: float,
    weights: Sequence[TermWeight],
    accumulate: bool,
    type: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def low_latency(
    *,
    student: int,
    teacher: int,
    student_strides: Sequence[int],
    teacher_strides: Sequence[int],
    target: int,
    ignore_index: int,
    weight: int,
    term_weight: Sequence[float],
    batch: int,
    num_classes: int,
    eps: float,
    present_only: bool,
    mask_same_class: bool,
    dependent: bool,
    matrices: Sequence[LowLatencyMatrix],
    key: int,
    num_valid: int,
    poison: int,
    counts: int,
    class_means: int,
    loss: int,
    terms: int,
    gradient: int,
    type: int,
    gradient_type: int,
    precision: int,
    device: int,
    stream: int,
) -> None: ...
def hopper_similarity(
    *,
    anchors: int,
    candidates: int,
    exponentials: int,
    row_sums: int,
    row_maxima: int,
    column_sums: int,
    split_products: int,
    splits: int,
    anchor_keys: int,
    candidate_keys: int,
    rows: int,
    m: int,
    pitch: int,
    exp_pitch: int,
    padded_rows: int,
    offset: int,
    scale_log2: float,
    shift: float,
    precision: int,
    skew: int,
    cluster: int,
    device: int,
    stream: int,
) -> None: ...
def hopper_flash(
    *,
    anchors: int,
    candidates: int,
    product: int,
    row_sums: int,
    row_maxima: int,
    candidate_factor: int,
    candidate_shift: int,
    anchor_keys: int,
    candidate_keys: int,
    n: int,
    m: int,
    d: int,
    pitch: int,
    padded_rows: int,
    offset: int,
    splits: int,
    scale_log2: float,
    shift: float,
    precision: int,
    device: int,
    stream: int,
) -> None: ...

class Plan:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def pointers(self, index: int) -> list[int]: ...
    def place(self, ranges: Sequence[tuple[int, int, int, int]]) -> None: ...
    def run(self, bases: Sequence[int], device: int, stream: int, first: int, last: int) -> None: ...
