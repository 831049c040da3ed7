"""The table of settings in training.md: ``python docs/training_settings.py`` writes it into the page again."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

from trainer import settings  # noqa: E402

BEGIN, END = "<!-- begin: settings -->\n", "<!-- end: settings -->"


def main() -> None:
    page = ROOT / "docs" / "training.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{settings.reference()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
