"""The compiled kernels for a CPU (csrc/cpu): tensors come by their addresses (0: null)."""

NORMALIZE: int
ROW_SUMS: int
ROW_GRADIENT: int
COLUMN_SUMS: int
FINISH: int
ALL_STEPS: int

def isas() -> list[str]: ...
def layout(n: int, num_classes: int, sample: bool, category: bool, /) -> dict[str, int]: ...
def low_latency(
    steps: int,
    isa: int,
    threads: int,
    student: int,
    student_row: int,
    student_column: int,
    teacher: int,
    teacher_row: int,
    teacher_column: int,
    target: int,
    target_stride: int,
    n: int,
    num_classes: int,
    work: int,
    gradient: int,
    loss: int,
    terms: int,
    row_temperature: float,
    column_temperature: float,
    instance_weight: float,
    sample_weight: float,
    category_weight: float,
    instance: bool,
    sample: bool,
    category: bool,
    anchors: int,
    eps: float,
    /,
) -> None: ...
def normalize(
    isa: int,
    threads: int,
    x: int,
    x_stride: int,
    rows: int,
    rows_stride: int,
    inv_norm: int,
    n: int,
    d: int,
    eps: float,
    by_columns: bool,
    /,
) -> None: ...
def grad_epilogue(
    isa: int,
    threads: int,
    product: int,
    product_stride: int,
    product_factor: int,
    partner: int,
    partner_stride: int,
    first: int,
    last: int,
    partner_factor: int,
    class_means: int,
    class_means_stride: int,
    class_index: int,
    mean_factor: int,
    unit: int,
    unit_stride: int,
    inv_norm: int,
    out: int,
    out_stride: int,
    n: int,
    d: int,
    accumulate: bool,
    by_columns: bool,
    /,
) -> None: ...
def softmax_kl_size(n: int, num_classes: int, threads: int, /) -> int: ...
def softmax_kl(
    isa: int,
    threads: int,
    student: int,
    student_row: int,
    student_column: int,
    teacher: int,
    teacher_row: int,
    teacher_column: int,
    n: int,
    num_classes: int,
    work: int,
    student_grad: int,
    teacher_grad: int,
    loss: int,
    terms: int,
    temperature: float,
    /,
) -> None: ...
