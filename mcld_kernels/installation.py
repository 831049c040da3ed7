"""How this package was installed: from where, from which commit, and the commands that add compiled kernels."""

from __future__ import annotations

import json
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PACKAGE = Path(__file__).resolve().parent


def source() -> tuple[str, bool]:
    """The argument of ``pip install`` that this installation came from, and whether it is editable.

    A source tree that is imported without being installed counts as editable.
    """
    if (_PACKAGE.parent / "setup.py").exists():
        return str(_PACKAGE.parent), True
    try:
        record = json.loads(distribution("mcld-kernels").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        record = {}
    url = record.get("url", "mcld-kernels")
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    elif url.startswith("file://"):
        url = unquote(urlsplit(url).path)
    if record.get("subdirectory"):
        url += f"#subdirectory={record['subdirectory']}"
    return url, False


def cuda_command() -> str:
    """The command that installs this package again, from the same source, with the CUDA kernels."""
    return _command("MCLD_BUILD_CUDA=1")


def cpu_command() -> str:
    """The same with the CPU kernels alone."""
    return _command("MCLD_BUILD_CPU=1")


def _command(setting: str) -> str:
    """pip's cache goes by the source alone and would hand out the wheel without the kernels, hence ``--no-cache-dir``;
    an installed package of the same version would stay, hence ``--force-reinstall``.
    """
    origin, editable = source()
    command = f"{setting} pip install -v "
    if not Path(origin).is_dir():
        command += "--no-cache-dir "
    return command + "--force-reinstall --no-deps " + ("-e " if editable else "") + shlex.quote(origin)


def commit() -> str | None:
    """The commit that this package is at, with ``-dirty`` after it where files differ from it; None if unknown."""
    tree = _PACKAGE.parent
    if (tree / ".git").exists():
        try:
            git = ["git", "-C", str(tree)]
            head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        return head.strip() + ("-dirty" if changes.strip() else "")
    return build_commit()


def build_commit() -> str | None:
    """The commit that setup.py recorded: of a wheel, or of the last build of the module in a source tree."""
    return _record().get("commit")


def without_cpu_kernels() -> str | None:
    """The reason for which the build left the CPU kernels out, as setup.py recorded it; None if it did not."""
    return _record().get("without_cpu_kernels")


def _record() -> dict[str, str | None]:
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
