"""The measured table: where it is found, which files are rejected, and that "auto" and the Hopper kernels follow it."""

import json
from types import SimpleNamespace

import pytest
import torch

import mcld_kernels
from mcld_kernels import backends, info
from mcld_kernels.backends import timings
from mcld_kernels.backends.triton import configs

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
    head = {"schema": timings.SCHEMA, "package": mcld_kernels.__version__, "gpu": GPU, "date": "2020-01-01"}
    return head | {"rows": rows} | changed


def logits(batch, classes, dtype=torch.bfloat16):
    """Stand-ins for logits on that GPU, with the attributes that the choice reads."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype, shape=(batch, classes))


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with that GPU, without tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MCLD_TABLE", raising=False)
    monkeypatch.delenv("MCLD_HOPPER", raising=False)
    monkeypatch.setattr(timings, "SHIPPED", tmp_path / "shipped")
    caches = timings._in_use, timings._name
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def tuned_rows(tuning, at=0):
    """The rows, of which one has fields of Tunings."""
    rows = content()["rows"]
    rows[at] = rows[at] | {"tuning": tuning}
    return rows


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text if isinstance(text, (str, bytes)) else json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def table():
    return put(timings.user_path(GPU), content())


def choose(batch, classes, dtype=torch.bfloat16):
    x = logits(batch, classes, dtype)
    return backends.preference(x, x), timings.takes_hopper(x, x)


def test_without_a_table_the_order_is_fixed():
    assert choose(4096, 1000) == (("triton", "cuda"), False)
    assert "python -m mcld_kernels.calibrate" in timings.find(GPU)[1]


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (11, 0)], ids=str)
def test_blackwell_takes_triton_and_its_configurations_before_cuda(monkeypatch, capability):
    """Only Triton makes tcgen05.mma there; tests/test_triton_compile.py asserts that it does."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "unsupported_reason", lambda name, *rest: None)
    x = logits(4096, 1000)
    assert backends.choose("auto", x, x, False) == "triton"
    configs.architecture.cache_clear()
    assert configs.architecture(x.device) == "sm_100"
    configs.architecture.cache_clear()


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
    assert timings.order(student, teacher) == ("cuda", "triton")
    assert not timings.takes_hopper(student, teacher)


def test_cpu_logits_have_no_table(table):
    x = torch.randn(4, 3)
    assert timings.order(x, x) is None and not timings.takes_hopper(x, x)
    assert backends.choose("auto", x, x, False) == "torch"


@pytest.mark.parametrize(("value", "takes"), [("1", True), ("0", False), ("", None)])
def test_the_environment_overrules_the_table_for_hopper(table, monkeypatch, value, takes):
    monkeypatch.setenv("MCLD_HOPPER", value)
    assert choose(4096, 1000)[1] is (True if takes is None else takes)
    assert choose(256, 1000)[1] is bool(takes)


def test_auto_takes_what_the_table_says(table, monkeypatch):
    monkeypatch.setattr(backends, "unsupported_reason", lambda name, *rest: None)
    x = logits(4096, 1000)
    assert backends.choose("auto", x, x, False) == "cuda"
    x = logits(4096, 100)
    assert backends.choose("auto", x, x, False) == "triton"
    monkeypatch.setattr(backends, "unsupported_reason", lambda name, *rest: "no" if name == "triton" else None)
    assert backends.choose("auto", x, x, False) == "cuda"


def test_where_tables_are_looked_for(table, monkeypatch, tmp_path):
    """MCLD_TABLE, else the user's own, else the package's."""
    assert timings.find(GPU)[0].path == table
    shipped = put(timings.SHIPPED / timings.file_name(GPU), content())
    assert timings.find(GPU)[0].path == table
    table.unlink()
    assert timings.find(GPU)[0].path == shipped
    named = put(tmp_path / "mine.json", content(date="2021-01-01"))
    monkeypatch.setenv("MCLD_TABLE", str(named))
    assert timings.find(GPU)[0].date == "2021-01-01"
    monkeypatch.setenv("MCLD_TABLE", str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"nothing\.json.*no such file"):
        timings.find(GPU)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"package": "0.0.1"}, "0.0.1"), ({"schema": 99}, "measured with"), ({"gpu": "Another"}, "Another")],
)
def test_a_table_of_another_version_or_gpu_is_ignored_with_a_reason(changed, reason):
    put(timings.user_path(GPU), content(**changed))
    table, description = timings.find(GPU)
    assert table is None and "is ignored" in description and reason in description
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
            {"batch": 10**400},
            {"milliseconds": {"cuda": float("nan")}},
            {"milliseconds": {"cuda": float("inf")}},
            {"tuning": 3},
            {"tuning": {"cuda": 3}},
            {"milliseconds": {"triton": 1.0}, "tuning": {"cuda": {"max_flash_splits": 1}}},
        )
    ]
    + [
        json.dumps(content()).replace("4096", "1e400"),  # int of infinity
        json.dumps(content()).replace("0.8", "1e400"),
        "[" * 100_000,
        b"\xff\xfe table",
    ],
    ids=lambda text: str(text[:30]),
)
def test_a_broken_table_is_an_error_that_names_it(text):
    path = put(timings.user_path(GPU), text)
    with pytest.raises(ValueError, match="delete it, or measure again") as raised:
        choose(4096, 1000)
    assert str(path) in str(raised.value)


class TestTuning:
    """Fields of a backend's Tuning in a row of the table."""

    @pytest.fixture
    def tuned(self, monkeypatch):
        monkeypatch.setattr(backends, "unsupported_reason", lambda name, *rest: None)
        rows = tuned_rows(
            {"hopper": {"hopper_skew": 2, "chunk_bytes": 64 << 20}, "triton": {"library_product": True}}, 1
        )
        rows[0]["tuning"] = {"cuda": {"dependent_launches": True}}
        return put(timings.user_path(GPU), content(rows=rows))

    @pytest.mark.parametrize(
        ("backend", "batch", "fields"),
        [
            ("cuda", 4096, {"hopper_skew": 2, "chunk_bytes": 64 << 20}),  # the table takes the Hopper kernels there
            ("cuda", 256, {"dependent_launches": True}),  # and the portable ones there
            ("triton", 4096, {"library_product": True}),
            ("triton", 256, {}),
            ("torch", 4096, {}),
        ],
    )
    def test_a_kernel_set_has_them(self, tuned, monkeypatch, backend, batch, fields):
        given = []
        monkeypatch.setattr(
            backends._MODULES[backend], "kernel_set", lambda student, teacher, **more: given.append(more)
        )
        x = logits(batch, 1000)
        backends.kernel_set(backend, x, x)
        assert given == [fields]
        with backends.tuned(hopper=False):  # a measurement means the same with a table and without
            backends.kernel_set(backend, x, x)
        assert given[1] == ({"hopper": False} if backend == "cuda" else {})

    def test_auto_takes_them(self, tuned, monkeypatch):
        given = []
        monkeypatch.setattr(backends.cuda, "kernel_set", lambda student, teacher, **more: given.append(more))
        x = logits(4096, 1000)
        backends.kernel_set("auto", x, x)
        assert given[0]["hopper_skew"] == 2

    def test_what_is_set_by_hand_overrules_them(self, tuned, monkeypatch):
        x = logits(4096, 1000)
        monkeypatch.setenv("MCLD_HOPPER", "0")
        assert timings.tuning("cuda", x, x) == {}, "the portable kernels have no fields in that row"
        monkeypatch.setenv("MCLD_HOPPER", "1")
        monkeypatch.setenv("MCLD_CHUNK_MB", "16")
        assert timings.tuning("cuda", x, x) == {"hopper_skew": 2}

    def test_explain_and_info_show_them(self, tuned, monkeypatch):
        x = logits(4096, 1000)
        x.requires_grad = False
        words = backends.explain(x, x)
        assert words["triton"] == "can run, with library_product=True by the measured table"
        assert words["torch"] == words["reference"] == "can run"
        monkeypatch.setattr(info.torch, "empty", lambda *shape, **more: logits(256, 1000))
        assert info._auto("cuda:0")["bfloat16"] == "cuda, with dependent_launches=True by the measured table"
        assert timings.find(GPU)[1].endswith("5 shapes, 2 of them with forms of the kernels other than the defaults")

    @pytest.mark.parametrize(
        ("tuning", "reason"),
        [
            ({"cuda": {"blocks": 3}}, "it sets 'blocks' of 'cuda', which has dependent_launches, "),
            ({"cuda": {"hopper_skew": 2}}, "it sets 'hopper_skew' of 'cuda'"),
            ({"hopper": {"hopper_skew": 9}}, "hopper_skew = 9 of 'hopper'; calibration tries 1, 2, 3"),
            ({"hopper": {"hopper_skew": "2"}}, "hopper_skew = '2'"),
            ({"hopper": {"hopper_skew": True}}, "hopper_skew = True"),
            ({"hopper": {"hopper_skew": [2]}}, "hopper_skew = [2]"),
            ({"hopper": {"library_product": 0}}, "library_product = 0"),
            ({"hopper": {"chunk_bytes": 1 << 40}}, "chunk_bytes = 1099511627776"),
        ],
        ids=str,
    )
    def test_a_table_with_fields_that_calibration_does_not_try_is_ignored_with_the_reason(self, tuning, reason):
        put(timings.user_path(GPU), content(rows=tuned_rows(tuning)))
        table, description = timings.find(GPU)
        assert table is None and reason in description and "batch 256, 1000 classes" in description
        assert choose(4096, 1000) == (("triton", "cuda"), False)


def test_info_shows_the_table(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert info._tables() == {GPU: f"{table}: measured 2020-01-01, {len(ROWS)} shapes"}
    table.write_text("{")
    assert "no table of measurements" in info._tables()[GPU]


class TestWithoutAReadableCacheFolder:
    """Containers run without HOME, under a uid that has no entry, or under one that may not read the folder."""

    @pytest.fixture(autouse=True)
    def no_cache_variable(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")

    def test_no_home_folder(self, monkeypatch):
        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(timings.Path, "home", home)
        assert choose(4096, 1000) == (("triton", "cuda"), False)
        assert "no cache folder" in timings.find(GPU)[1]

    def test_the_shipped_table_is_used_then(self, monkeypatch):
        monkeypatch.setattr(timings.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        shipped = put(timings.SHIPPED / timings.file_name(GPU), content())
        assert timings.find(GPU)[0].path == shipped

    def test_a_folder_of_another_user(self, monkeypatch, tmp_path):
        read_bytes = timings.Path.read_bytes

        def denied(path):
            if ".cache" in path.parts:
                raise PermissionError(13, "Permission denied", str(path))
            return read_bytes(path)

        monkeypatch.setattr(timings.Path, "read_bytes", denied)
        monkeypatch.setattr(timings.Path, "is_file", denied)
        monkeypatch.setattr(timings.Path, "home", lambda: tmp_path)
        assert choose(4096, 1000) == (("triton", "cuda"), False)
        assert "Permission denied" in timings.find(GPU)[1]

    def test_a_named_table_that_cannot_be_read_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MCLD_TABLE", str(tmp_path))
        with pytest.raises(ValueError, match="MCLD_TABLE names .* cannot be read"):
            timings.find(GPU)
