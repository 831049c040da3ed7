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
def clkd_size(n: int, num_classes: int, /) -> int: ...
def clkd(
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
    gradient: int,
    loss: int,
    terms: int,
    instance_weight: float,
    category_weight: float,
    correlation_weight: float,
    instance: bool,
    category: bool,
    correlation: bool,
    row_factor: float,
    column_factor: float,
    gram_factor: float,
    eps: float,
    /,
) -> None: ...
