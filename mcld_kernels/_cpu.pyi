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
