"""Archives of ``bench/gpu_report.py`` into the repository: ``python bench/publish.py gpu-correct.tar.gz ...``.

It writes what was measured, and nothing else:
  * bench/results/<gpu>-<date>-<command>/: report, rows, errors, summary and plot of each archive;
  * README.md: table and plot between its two ``gpu results`` comments, one line a case, from the rows of all archives;
  * mcld_kernels/tables/<gpu>.json: the table that backend="auto" chooses by, of the calibration, else of the long grid.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.harness import goals, machine, programs, report  # noqa: E402
from bench.harness.programs import Exit  # noqa: E402
from mcld_kernels import __version__, calibrate  # noqa: E402
from mcld_kernels.backends import timings  # noqa: E402

BEGIN, END = "<!-- gpu results: bench/publish.py writes what stands here -->", "<!-- end of gpu results -->"
RUNS = ("grid", "bench")  # folders of bench/run.py in an archive, the longest first
Record = dict[str, Any]


class Unpublishable(Exception):
    """An archive that holds nothing to publish; the message says why."""


@dataclass(kw_only=True)
class Archive:
    """The contents of one archive."""

    path: Path
    report: Record
    runs: dict[str, Record]  # results.json by folder
    errors: list[Record] = field(default_factory=list)
    table: Record | None = None
    summary: str = ""

    @property
    def run(self) -> Record | None:
        return next((self.runs[name] for name in RUNS if name in self.runs), None)

    @property
    def machine(self) -> Record:
        for phase in [*self.report["phases"].values(), *self.runs.values()]:
            if phase.get("machine", {}).get("gpu"):
                found: Record = phase["machine"]
                return found
        raise Unpublishable(f"{self.path.name} names no GPU: neither its ceilings nor its rows were measured on one")

    @property
    def name(self) -> str:
        gpu = timings.file_name(self.machine["gpu"]).removesuffix(".json")
        return f"{gpu}-{self.report['started'][:10]}-{self.report['command']}"


def load(path: Path) -> Archive:
    """Read an archive. Raises Unpublishable where it is none, or that of a rehearsal."""
    files: dict[str, bytes] = {}
    try:
        content_of_tar = gzip.decompress(path.read_bytes())  # to its end, where the checksum stands
        with tarfile.open(fileobj=io.BytesIO(content_of_tar)) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    files[str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))] = content.read()
        made = json.loads(files["report.json"])
        runs = {
            name: json.loads(files[f"{name}/results.json"])
            for name in (*RUNS, "forms", "profiles")
            if f"{name}/results.json" in files
        }
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError, zlib.error) as fault:
        raise Unpublishable(f"{path} is no archive of bench/gpu_report.py: {type(fault).__name__}: {fault}") from None
    if made.get("rehearsal"):
        raise Unpublishable(f"{path.name} is of a rehearsal: nothing in it was measured on a GPU")
    lines = [
        line for name in sorted(files) if re.fullmatch(r"errors-.*\.jsonl", name) for line in files[name].splitlines()
    ]
    errors = [row for row in map(_parsed, lines) if row is not None and "check" in row]
    table = json.loads(files["table.json"]) if "table.json" in files else None
    summary = files.get("summary.txt", b"").decode(errors="replace")
    return Archive(path=path, report=made, runs=runs, errors=errors, table=table, summary=summary)


def _parsed(line: bytes) -> Record | None:
    try:
        value: Record = json.loads(line)
        return value
    except ValueError:  # the last line of a process that was killed
        return None


def record(archive: Archive, root: Path) -> Path:
    """Write bench/results/<name>/. Raises FileExistsError: recorded results are never overwritten."""
    folder = root / "bench" / "results" / archive.name
    folder.mkdir(parents=True)
    report.write_json(folder / "report.json", archive.report)
    (folder / "summary.txt").write_text(archive.summary)
    if archive.errors:
        report.write_json(folder / "errors.json", {"checks": archive.errors})
    for name, run in archive.runs.items():
        stem = "results" if run is archive.run else name
        report.write_json(folder / f"{stem}.json", run)
        report.write_csv(folder / f"{stem}.csv", run["rows"])
    return folder


def merged_rows(archives: Sequence[Archive]) -> list[Record]:
    """The measured rows of all archives; of one provider at one case the latest."""
    rows: dict[tuple[Any, ...], Record] = {}
    for archive in sorted(archives, key=lambda entry: entry.report["started"]):
        if archive.run is not None:
            for row in archive.run["rows"]:
                if row["status"] == "ok":
                    rows[(*_case(row), row["provider"])] = row
    return list(rows.values())


def _case(row: Record) -> tuple[Any, ...]:
    return row.get("loss", "mcld"), row["mode"], row["dtype"], tuple(row["terms"]), row["classes"], row["batch"]


def markdown(rows: Sequence[Record]) -> str:
    """One line a case: the fastest of this package's backends by its kernels' time, and its time against others."""
    lines = [
        "| terms | C | B | dtype | backend | kernels | plain call | of GEMM "
        "| library | torch.compile | eager | attention | peak extra MiB |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["provider"]] = row
    for case, providers in sorted(cases.items(), key=lambda item: (item[0][3], item[0][4], item[0][2], item[0][5])):
        ours = [providers[name] for name in goals.OURS if name in providers]
        if not ours or case[0] != "mcld" or case[1] != "forward-backward":
            continue
        best = min(ours, key=lambda row: goals.best_time(row) or float("inf"))
        _, _, dtype, terms, classes, batch = case
        fraction = goals.of_gemm(best, providers)
        ratios = [goals.against(name)(best, providers) for name in ("library", "compile", "reference")]
        attention = [goals.against(name)(best, providers) for name in ("sdpa", "cudnn")]
        slowest = min((ratio for ratio in attention if ratio), default=None)
        cells = [
            "all" if len(terms) == 3 else " + ".join(terms), str(classes), str(batch), dtype, f"`{best['provider']}`",
            report.seconds(goals.best_time(best)), report.seconds(best["time"]["median_s"]),
            "" if fraction is None else f"{fraction:.0%}",
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in [*ratios, slowest]),
            report.mebibytes(best["peak_extra_bytes"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_section(archives: Sequence[Archive], rows: Sequence[Record], plot: str | None) -> str:
    """The text between the comments of the README."""
    run = next(archive.run for archive in archives if archive.run is not None)
    figure = f" ([plot]({plot}))" if plot else ""
    return (
        "Loss and gradient on a GPU, median, interleaved, every row past a correctness gate; kernels: with the "
        f"launches hidden, or the replay of a graph; ratios are of these times{figure}.\n\n{markdown(rows)}\n\n"
        f"{machine.caption(run)}. Recorded in {', '.join(f'`bench/results/{archive.name}`' for archive in archives)}."
    )


def into_readme(text: str, section: str) -> str:
    """The README with the section between its comments. Raises Unpublishable without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Unpublishable(f"README.md has no lines {BEGIN!r} and {END!r}, between which the table stands")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def auto_table(archives: Sequence[Archive]) -> Record | None:
    """The table for "auto": of the latest calibration, else of the latest benchmark with all terms; None of neither."""
    for archive in sorted(archives, key=lambda entry: entry.report["started"], reverse=True):
        if archive.table is not None:
            return archive.table | {key: archive.report.get(key) for key in ("commit", "dirty")}
    for archive in sorted(archives, key=lambda entry: entry.report["started"], reverse=True):
        if archive.run is not None:
            try:
                return calibrate.recorded_table(archive.run)
            except ValueError:  # no shape with two backends
                continue
    return None


def publish(paths: Sequence[Path], root: Path) -> list[str]:
    """Write everything; returns the written paths, relative to the root."""
    archives = [load(path) for path in paths]
    gpus = {archive.machine["gpu"] for archive in archives}
    if len(gpus) > 1:
        raise Unpublishable(f"the archives are of different GPUs: {', '.join(sorted(gpus))}; publish each alone")
    commits = {str(archive.report.get("commit")) for archive in archives}
    if len(commits) > 1:  # one table, whose ratios are of rows from all of them
        raise Unpublishable(f"the archives are of different commits: {', '.join(sorted(commits))}; publish each alone")
    names = [archive.name for archive in archives]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Unpublishable(f"two archives are of one command and day: {', '.join(twice)}")
    taken = [a.name for a in archives if (root / "bench" / "results" / a.name).exists()]
    if taken:
        raise Unpublishable(f"bench/results/{taken[0]} is there already: recorded results are not overwritten")
    rows, readme = merged_rows(archives), root / "README.md"
    into_readme(readme.read_text(), "")  # raises before anything is written
    written = [record(archive, root) for archive in archives]
    if rows:
        from bench.harness import plots

        run = next(archive.run for archive in archives if archive.run is not None)
        drawn = plots.plot(report.recordable(rows), written[0] / "results.png", machine.caption(run))
        plot = None if drawn is None else str(drawn.relative_to(root))
        readme.write_text(into_readme(readme.read_text(), readme_section(archives, rows, plot)))
        written.append(readme)
    table = auto_table(archives)
    if table is not None:
        path = root / "mcld_kernels" / "tables" / timings.file_name(table["gpu"])
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(table, indent=1) + "\n"
        parsed, reason = timings.parse(path, text.encode())  # raises for a table that `auto` could not read
        if parsed is None and table["package"] == __version__:
            raise Unpublishable(f"the table of {table['gpu']} would be ignored: {reason}")
        path.write_text(text)
        written.append(path)
    return [str(path.relative_to(root)) for path in written]


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish archives; returns one of the exit codes of ``--help``."""
    parser = argparse.ArgumentParser(
        description="Archives of gpu_report.py into bench/results/, the README and the package's table for 'auto'.",
        epilog=programs.EXIT_CODES,
    )
    parser.add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE", help="gpu-<command>.tar.gz")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository (default: this one)")
    options = parser.parse_args(arguments)
    programs.make_output_printable()
    try:
        written = publish(options.archives, options.root)
    except Unpublishable as fault:
        print(f"publish: {fault}", file=sys.stderr)
        return Exit.USAGE
    except OSError as fault:
        print(f"publish: the output cannot be written: {fault}", file=sys.stderr)
        return Exit.OUTPUT
    print("written: " + ", ".join(written))
    print("By hand: the sentence that no GPU has run this, in README.md and mcld_kernels/info.py (GPU_STATE).")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
