"""Goals, and what is published of a report, without a GPU."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench import publish
from bench.harness import goals, phases
from bench.harness.programs import Exit
from mcld_kernels.backends import timings

ROOT = Path(__file__).resolve().parent.parent


def recorded(provider, seconds, batch=4096, classes=1000, terms=("instance", "sample"), **more):
    row = {"loss": "mcld", "mode": "forward-backward", "dtype": "bfloat16", "terms": list(terms), "classes": classes}
    row |= {"batch": batch, "provider": provider, "status": "ok", "reason": None}
    row["time"] = dict.fromkeys(("median_s", "p20_s", "p80_s"), 2 * seconds)
    row |= {"kernels_time": {"median_s": seconds}, "graph_time": None, "peak_extra_bytes": 100 << 20}
    return row | {"flop": 4 * batch**2 * classes, "gemm_flop_per_s": 7.9e14, "speedup_over_reference": None} | more


class TestGoals:
    def test_kernel_time_decides_and_plain_time_stands_beside_it(self):
        rows = [recorded("triton", 1e-4), recorded("cuda", 0.9e-4), recorded("library", 1.2e-4)]
        rows += [recorded("reference", 2.7e-4), recorded("compile", 9.0, batch=16384)]
        judged = {
            goal["goal"].rpartition(" >=")[0]: goal for goal in goals.judge(rows) if goal["regime"] == goals.MIDDLE
        }
        assert {goal["backend"] for goal in judged.values()} == {"cuda"}
        fraction = judged["fraction of the GEMM ceiling"]
        assert fraction["value"] == pytest.approx(4 * 4096**2 * 1000 / 0.9e-4 / 7.9e14) and fraction["reached"]
        assert (fraction["seconds"], fraction["kernel_seconds"]) == pytest.approx((1.8e-4, 0.9e-4))
        assert judged["times the library path"]["value"] == pytest.approx(1.2 / 0.9)
        assert judged["times eager"]["reached"] is True
        assert judged["times torch.compile"]["reached"] is None  # measured at another batch size alone

    def test_memory_is_held_to_600_mb_and_three_half_copies(self):
        allowed = 600_000_000 + 3 * 2 * 2 * 4096 * 1000
        for extra, reached in ((allowed, True), (allowed + 1, False)):
            judged = goals.judge([recorded("cuda", 1e-4, peak_extra_bytes=extra)])
            assert [goal["reached"] for goal in judged if "600 MB" in goal["goal"]] == [reached]


class TestPublish:
    ROWS = [recorded(name, time) for name, time in (("triton", 1.1e-4), ("hopper", 1e-4), ("library", 1.3e-4))]
    ALL = [recorded(name, time, 256, terms=("instance", "sample", "category"), graph_time={"median_s": time})
           for name, time in (("triton", 4e-5), ("cuda", 2e-5), ("reference", 4e-4))]  # fmt: skip

    def archive(self, folder, command, rows, table=None, rehearsal=False, day="01", gpu="NVIDIA H200"):
        machine = {"gpu": gpu, "cpu": "c", "threads": 8, "load_1min": 1.0, "float32_matmul_precision": "highest"}
        started = f"2030-01-{day}T00:00:00Z"
        head = {"machine": machine, "versions": {"torch": "2.11", "mcld_kernels": timings.__version__}, "commit": "abc"}
        head |= {"dirty": False, "started": started, "ceilings": {}, "options": {}, "complete": True, "rows": rows}
        work = folder / f"work-{command}"
        (work / "bench").mkdir(parents=True)
        (work / "bench" / "results.json").write_text(json.dumps(head))
        phase = {"status": "ok", "machine": machine}
        content = {"command": command, "started": started, "rehearsal": rehearsal, "phases": {"ceilings": phase}}
        (work / "report.json").write_text(json.dumps(content | {"commit": "abc", "dirty": False}))
        (work / "errors-cuda.jsonl").write_text('{"begun": "x"}\n{"check": "a", "ratio": 0.5}\n{"cut')
        (work / "summary.txt").write_text("the summary\n")
        if table is not None:
            (work / "table.json").write_text(json.dumps(table))
        path = folder / f"gpu-{command}.tar.gz"
        phases.archive(path, work)
        return path

    def of_commit(self, path, commit):
        """The archive with another commit in its report."""
        work = path.parent / path.name.replace("gpu-", "work-").removesuffix(".tar.gz")
        content = json.loads((work / "report.json").read_text())
        (work / "report.json").write_text(json.dumps(content | {"commit": commit}))
        phases.archive(path, work)
        return path

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "repository"
        root.mkdir()
        (root / "README.md").write_text((ROOT / "README.md").read_text())
        return root

    def test_rows_table_and_plot(self, tmp_path, root, capsys):
        row = {"dtype": "bfloat16", "precision": "highest", "batch": 256, "classes": 100}
        row["milliseconds"] = {"triton": 2.0, "cuda": 1.0}
        table = {"schema": timings.SCHEMA, "package": timings.__version__, "gpu": "NVIDIA H200", "date": "2030-01-02"}
        paths = [
            self.archive(tmp_path, "correct", self.ROWS),
            self.archive(tmp_path, "safe", self.ALL, table | {"rows": [row]}, day="02"),
        ]
        assert publish.main([*map(str, paths), "--root", str(root)]) == Exit.OK
        shown = capsys.readouterr().out
        folder = root / "bench" / "results" / "nvidia-h200-2030-01-01-correct"
        names = {entry.name for entry in folder.iterdir()}
        assert {"report.json", "results.json", "results.csv", "results.png", "errors.json", "summary.txt"} <= names
        assert "bench/results/nvidia-h200-2030-01-02-safe" in shown and "README.md" in shown
        text = (root / "README.md").read_text()
        assert text.startswith((ROOT / "README.md").read_text().partition(publish.BEGIN)[0])
        section = text.partition(publish.BEGIN)[2].partition(publish.END)[0]
        assert "| instance + sample | 1000 | 4096 | bfloat16 | `hopper` | 100 µs | 200 µs | 85% | 1.30x |" in section
        assert "| all | 1000 | 256 | bfloat16 | `cuda` | 20 µs | 40 µs |" in section and "20.00x" in section
        assert f"]({folder.relative_to(root)}/results.png)" in section and "NVIDIA H200" in section
        path = root / "mcld_kernels" / "tables" / "nvidia-h200.json"
        parsed, reason = timings.parse(path, path.read_bytes())
        assert parsed is not None and parsed.rows[0].milliseconds == {"triton": 2.0, "cuda": 1.0}, reason
        # What is recorded stays: a second time nothing is written.
        assert publish.main([str(paths[0]), "--root", str(root)]) == Exit.USAGE
        assert "not overwritten" in capsys.readouterr().err

    def test_without_a_calibration_the_table_is_of_the_rows(self, tmp_path, root):
        publish.publish([self.archive(tmp_path, "speed", self.ALL)], root)
        made = json.loads((root / "mcld_kernels" / "tables" / "nvidia-h200.json").read_text())
        assert made["rows"][0]["milliseconds"] == pytest.approx({"triton": 0.08, "cuda": 0.04})

    def test_what_cannot_be_published_says_why(self, tmp_path, root, capsys):
        rehearsal = self.archive(tmp_path, "speed", self.ROWS, rehearsal=True)
        other = [self.archive(tmp_path, "safe", self.ROWS, gpu="B"), self.archive(tmp_path, "correct", self.ROWS)]
        (tmp_path / "text").write_text("no archive")
        for paths, message in (
            ([rehearsal], "of a rehearsal"),
            (other, "different GPUs"),
            ([tmp_path / "text"], "is no archive"),
        ):
            assert publish.main([*map(str, paths), "--root", str(root)]) == Exit.USAGE
            assert message in capsys.readouterr().err
        (tmp_path / "again").mkdir()
        again = self.archive(tmp_path / "again", "correct", self.ROWS)
        assert publish.main([str(other[1]), str(again), "--root", str(root)]) == Exit.USAGE
        assert "two archives are of one command and day" in capsys.readouterr().err
        assert publish.main([str(other[1]), str(self.of_commit(again, "def")), "--root", str(root)]) == Exit.USAGE
        assert "different commits: abc, def" in capsys.readouterr().err
        (root / "README.md").write_text("no comments")
        with pytest.raises(publish.Unpublishable, match="has no lines"):
            publish.publish([other[1]], root)
        assert [entry.name for entry in root.iterdir()] == ["README.md"]

    def test_no_damaged_archive_is_published(self, tmp_path, root, capsys):
        path = self.archive(tmp_path, "speed", self.ROWS)
        whole = path.read_bytes()
        begin = whole.index(b"\0", 10) + 1  # after the header, which names a file and is of no matter
        for place in (*range(begin, len(whole), 97), len(whole) - 6):  # the last one in the checksum
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert publish.main([str(path), "--root", str(root)]) == Exit.USAGE, place
            assert "is no archive of bench/gpu_report.py" in capsys.readouterr().err
        assert [entry.name for entry in root.iterdir()] == ["README.md"]
