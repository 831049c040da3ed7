"""The measured table: who finds it, what is refused, and that "auto" and the Hopper kernels follow it."""

import json
from types import SimpleNamespace

import pytest
import torch

import mcld_kernels
from mcld_kernels import backends, info, measured

GPU = "NVIDIA Test 9000"
ROWS = [
    ("bfloat16", "highest", 256, 1000, {"triton": 0.2, "cuda": 0.1, "hopper": 0.1}),
    ("bfloat16", "highest", 4096, 1000, {"triton": 1.0, "cuda": 1.5, "hopper": 0.8}),
    ("bfloat16", "highest", 4096, 100, {"triton": 0.3, "cuda": 0.5, "hopper": 0.4}),
    ("float32", "highest", 1024, 1000, {"triton": 2.0, "cuda": 1.0}),
    ("float32", "high", 1024, 1000, {"triton": 1.0, "cuda": 2.0}),
]


def content(**changed):
    keys = "dtype", "precision", "batch", "classes", "milliseconds"
    rows = [dict(zip(keys, row, strict=True)) for row in ROWS]
    head = {"schema": measured.SCHEMA, "package": mcld_kernels.__version__, "gpu": GPU, "date": "2020-01-01"}
    return head | {"rows": rows} | changed


def logits(batch, classes, dtype=torch.bfloat16):
    """What the choice looks at of logits on that GPU."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype, shape=(batch, classes))


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with that GPU, without tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MCLD_TABLE", raising=False)
    monkeypatch.delenv("MCLD_HOPPER", raising=False)
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    measured._in_use.cache_clear()
    yield
    measured._in_use.cache_clear()


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.fixture
def table():
    return put(measured.user_path(GPU), content())


def choose(batch, classes, dtype=torch.bfloat16):
    x = logits(batch, classes, dtype)
    return backends.preference(x, x), measured.takes_hopper(x, x)


def test_without_a_table_the_order_is_fixed():
    assert choose(4096, 1000) == (("triton", "cuda"), False)
    assert "bench/calibrate.py" in measured.find(GPU)[1]


@pytest.mark.parametrize(
    ("batch", "classes", "dtype", "order", "hopper"),
    [
        (4096, 1000, torch.bfloat16, ("cuda", "triton"), True),
        (256, 1000, torch.bfloat16, ("cuda", "triton"), False),  # no faster: the portable kernels stay
        (4096, 100, torch.bfloat16, ("triton", "cuda"), True),
        (8000, 90, torch.bfloat16, ("triton", "cuda"), True),  # the nearest
        (1, 1, torch.bfloat16, ("cuda", "triton"), False),
        (700, 2000, torch.bfloat16, ("cuda", "triton"), False),
        (4096, 1000, torch.float16, ("cuda", "triton"), True),  # not measured: the other 16-bit type
        (1024, 1000, torch.float32, ("cuda", "triton"), False),
        (1024, 1000, torch.float64, ("triton", "cuda"), False),  # nothing like it was measured
    ],
)
def test_the_nearest_row_decides(table, batch, classes, dtype, order, hopper):
    assert choose(batch, classes, dtype) == (order, hopper)


def test_float32_goes_by_its_matmul_precision(table, matmul_precision):
    matmul_precision("high")
    assert choose(1024, 1000, torch.float32)[0] == ("triton", "cuda")
    matmul_precision("medium")  # not measured
    assert choose(1024, 1000, torch.float32) == (("triton", "cuda"), False)


def test_mixed_dtypes_go_by_the_wider(table):
    student, teacher = logits(4096, 1000, torch.bfloat16), logits(4096, 1000, torch.float32)
    assert measured.order(student, teacher) == ("cuda", "triton")
    assert not measured.takes_hopper(student, teacher)


def test_cpu_logits_have_no_table(table):
    x = torch.randn(4, 3)
    assert measured.order(x, x) is None and not measured.takes_hopper(x, x)
    assert backends.choose("auto", x, x, False) == "torch"


@pytest.mark.parametrize(("value", "takes"), [("1", True), ("0", False), ("", None)])
def test_the_environment_overrules_the_table_for_hopper(table, monkeypatch, value, takes):
    monkeypatch.setenv("MCLD_HOPPER", value)
    assert choose(4096, 1000)[1] is (True if takes is None else takes)
    assert choose(256, 1000)[1] is bool(takes)


def test_auto_takes_what_the_table_says(table, monkeypatch):
    monkeypatch.setattr(backends, "reason", lambda name, *rest: None)
    x = logits(4096, 1000)
    assert backends.choose("auto", x, x, False) == "cuda"
    x = logits(4096, 100)
    assert backends.choose("auto", x, x, False) == "triton"
    monkeypatch.setattr(backends, "reason", lambda name, *rest: "not here" if name == "triton" else None)
    assert backends.choose("auto", x, x, False) == "cuda"


def test_where_tables_are_looked_for(table, monkeypatch, tmp_path):
    """MCLD_TABLE, else the user's own, else the package's."""
    assert measured.find(GPU)[0].path == table
    shipped = put(measured.SHIPPED / measured.file_name(GPU), content())
    assert measured.find(GPU)[0].path == table
    table.unlink()
    assert measured.find(GPU)[0].path == shipped
    asked = put(tmp_path / "mine.json", content(date="2021-01-01"))
    monkeypatch.setenv("MCLD_TABLE", str(asked))
    assert measured.find(GPU)[0].date == "2021-01-01"
    monkeypatch.setenv("MCLD_TABLE", str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"nothing\.json.*no such file"):
        measured.find(GPU)


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"package": "0.0.1"}, "0.0.1"), ({"schema": 99}, "measured with"), ({"gpu": "Another"}, "Another")],
)
def test_a_table_of_something_else_is_ignored_and_says_so(changed, why):
    put(measured.user_path(GPU), content(**changed))
    found, said = measured.find(GPU)
    assert found is None and "is ignored" in said and why in said
    assert choose(4096, 1000) == (("triton", "cuda"), False)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps(content(rows=[{}])), json.dumps(content(rows=3))]
    + [
        json.dumps(content(rows=[dict(content()["rows"][0], **changed)]))
        for changed in (
            {"milliseconds": {}},
            {"milliseconds": {"eager": 1.0}},
            {"milliseconds": {"cuda": 0}},
            {"batch": 0},
        )
    ],
)
def test_a_broken_table_is_an_error_that_names_it(text):
    path = put(measured.user_path(GPU), text)
    with pytest.raises(ValueError, match="delete it, or measure again") as raised:
        choose(4096, 1000)
    assert str(path) in str(raised.value)


def test_info_shows_the_table(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert info._tables() == {GPU: f"{table}: measured 2020-01-01, {len(ROWS)} shapes"}
    table.write_text("{")
    assert "no table of measurements" in info._tables()[GPU]
