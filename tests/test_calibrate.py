"""bench/calibrate.py: from recorded runs to the table that "auto" chooses by."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import mcld_kernels
from bench import calibrate
from bench.cases import TERMS
from mcld_kernels import measured

GPU = "NVIDIA Test 9000"


def record(provider, median, batch=4096, classes=1000, dtype="bfloat16", status="ok", terms=TERMS, **more):
    row = {"provider": provider, "batch": batch, "classes": classes, "dtype": dtype, "status": status}
    row |= {"terms": list(terms), "mode": "forward-backward", "reason": None if status == "ok" else "it is wrong"}
    return row | {"time": {"median_s": median} if status == "ok" else None} | more


def recorded(*rows, precision="highest", gpu=GPU, complete=True):
    machine = {"float32_matmul_precision": precision} | ({"gpu": gpu} if gpu else {})
    versions = {"mcld_kernels": mcld_kernels.__version__, "torch": torch.__version__}
    head = {
        "machine": machine,
        "versions": versions,
        "started": "2020-01-01T10:00:00Z",
        "commit": "abc",
        "dirty": False,
    }
    return head | {"rows": list(rows), "complete": complete}


def test_only_what_was_right_and_whole_gets_into_the_table():
    run = recorded(
        record("reference", 9.0),
        record("triton", 2e-3),
        record("cuda", 1e-3),
        record("hopper", 5e-4, status="FAILED"),
        record("triton", 3e-3, batch=256),
        record("cuda", 1e-9, batch=256, mode="forward"),
        record("cuda", 1e-9, batch=256, terms=("instance",)),
    )
    first, second = calibrate.table([run])["rows"]
    assert first["milliseconds"] == {"triton": 2.0, "cuda": 1.0} and first["batch"] == 4096
    assert second["milliseconds"] == {"triton": 3.0} and second["precision"] == "highest"


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([recorded(record("triton", 1.0))], "two of triton, cuda, hopper"),
        ([recorded(record("triton", 1.0), record("cuda", 1.0), gpu=None)], "one GPU"),
        ([recorded(record("cuda", 1.0)), recorded(record("cuda", 1.0), gpu="Another")], "one GPU"),
    ],
)
def test_what_makes_no_table(runs, why):
    with pytest.raises(ValueError, match=why):
        calibrate.table(runs)


def test_the_package_reads_what_is_written(tmp_path, monkeypatch, capsys):
    """From a recorded run by --from to the choice."""
    source = tmp_path / "results.json"
    source.write_text(json.dumps(recorded(record("triton", 2e-3), record("cuda", 1.5e-3), record("hopper", 1e-3))))
    monkeypatch.setenv("MCLD_TABLE", str(tmp_path / "made" / "table.json"))
    assert calibrate.main(["--from", str(source)]) == 0
    assert "hopper 1.000 ms, cuda 1.500 ms, triton 2.000 ms" in capsys.readouterr().out
    table, said = measured.find(GPU)
    assert table.rows[0].milliseconds["hopper"] == 1.0 and "2020-01-01" in said
    source.write_text(json.dumps(recorded(record("cuda", 1.0))))
    assert calibrate.main(["--from", str(source)]) == 1
    assert "no table" in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench/run.py replaced: ``bench.answers`` maps the providers asked for to what a run records."""
    found = SimpleNamespace(answers={}, asked=[])

    def run(command, timeout, check):
        value = dict(zip(command, command[1:], strict=False))
        found.asked.append(value["--providers"])
        answer = found.answers[value["--providers"]]
        if answer == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        folder = calibrate.Path(value["--output"])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(answer | {"started": "2020-01-01T10:00:00Z"}))
        return SimpleNamespace(returncode=0 if answer["complete"] else 1)

    monkeypatch.setattr(calibrate.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibrate, "_out", lambda: tmp_path)
    return found


BOTH = recorded(record("triton", 2e-3), record("cuda", 1e-3))


@pytest.mark.parametrize(
    "trial",
    [
        "hangs",
        recorded(),
        recorded(record("hopper", 1, status="FAILED")),
        recorded(record("hopper", 1), complete=False),
    ],
    ids=["hangs", "cannot run", "wrong", "cut short"],
)
def test_hopper_kernels_that_fail_their_trial_are_left_out(bench, trial, tmp_path, capsys):
    bench.answers = {"hopper": trial, "triton,cuda": BOTH}
    assert calibrate.main(["--output", str(tmp_path / "table.json"), "--matmul-precision", "highest"]) == 0
    assert bench.asked == ["hopper", "triton,cuda"]
    assert "left out" in capsys.readouterr().out


def test_hopper_kernels_that_pass_take_part(bench, tmp_path):
    run = recorded(record("triton", 2e-3), record("hopper", 1e-3))
    bench.answers = {"hopper": recorded(record("hopper", 1)), "triton,cuda,hopper": run}
    assert calibrate.main(["--output", str(tmp_path / "table.json")]) == 0
    assert bench.asked == ["hopper", "triton,cuda,hopper", "triton,cuda,hopper"]  # fp32 at two precisions
    assert "hopper" in json.loads((tmp_path / "table.json").read_text())["rows"][0]["milliseconds"]


def test_a_run_that_hangs_makes_no_table(bench, tmp_path, capsys):
    bench.answers = {"hopper": recorded(), "triton,cuda": "hangs"}
    assert calibrate.main(["--output", str(tmp_path / "table.json")]) == 1
    assert not (tmp_path / "table.json").exists()
    assert "no run came to its end" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert calibrate.main([]) == 3
    assert "no CUDA device" in capsys.readouterr().err
