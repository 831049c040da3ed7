"""Draws ``tiles-light.svg`` and ``tiles-dark.svg``, the figure of algorithm.md: ``python docs/figures/tiles.py``.

One contrast under way: the similarity matrix with one chunk of its rows in memory, and the results on its right.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
THEMES = {
    "light": {"ink": "#1f2328", "muted": "#59636e", "kept": "#0969da", "chunk": "#bc4c00", "out": "#1a7f37"},
    "dark": {"ink": "#f0f6fc", "muted": "#9da7b3", "kept": "#58a6ff", "chunk": "#f0883e", "out": "#3fb950"},
}
WIDTH, HEIGHT = 960, 520
TILE, TILES = 36, 8
SIDE = TILE * TILES
LEFT, TOP = 150, 138  # of the similarity matrix
CHUNK = (3, 5)  # rows of tiles that are in memory
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Drawing:
    def __init__(self, colours: dict[str, str]):
        self.colours, self.parts = colours, []

    def rect(self, x, y, width, height, colour, *, fill=0.0, stroke=1.5, dash=None):
        c = self.colours[colour]
        line = f' stroke="{c}" stroke-width="{stroke}"' if stroke else ""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{c}" fill-opacity="{fill}"{line}{dashes}/>'
        )

    def line(self, *points, colour="ink", arrow=True, stroke=1.5):
        path = " ".join(f"{'M' if i == 0 else 'L'} {x} {y}" for i, (x, y) in enumerate(points))
        end = f' marker-end="url(#{colour})"' if arrow else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colours[colour]}" stroke-width="{stroke}"{end}/>'
        )

    def text(self, x, y, text, *, colour="ink", size=14, anchor="middle", weight="normal", turn=None):
        turned = f' transform="rotate({turn} {x} {y})"' if turn else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{self.colours[colour]}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{turned}>{text}</text>'
        )

    def svg(self) -> str:
        arrows = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{colour}"/></marker>'
            for name, colour in self.colours.items()
        )
        title = "One contrast: a chunk of rows of the similarity matrix is in memory, the matrix never is"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" font-family="{SANS}">\n<title>{title}</title>\n<defs>{arrows}</defs>'
        )
        return "\n".join([head, *self.parts, "</svg>", ""])


def draw(colours: dict[str, str]) -> str:
    d = Drawing(colours)
    first, last = (TOP + TILE * i for i in CHUNK)
    middle, height = (first + last) / 2, last - first
    right, bottom = LEFT + SIDE, TOP + SIDE
    _inputs(d, first, height, bottom)
    _matrix(d, first, last, height)
    _results(d, first, middle, height, right)
    _steps(d)
    _legend(d)
    return d.svg()


def _inputs(d: Drawing, first, height, bottom) -> None:
    """Anchors on the left, candidates above."""
    d.rect(LEFT - 84, TOP, 64, SIDE, "kept", fill=0.12)
    d.rect(LEFT - 84, first, 64, height, "kept", fill=0.35)
    d.text(LEFT - 52, TOP - 10, "A", size=17, weight="bold")
    d.text(LEFT - 96, (TOP + bottom) / 2, "anchors: unit student rows (n × d)", colour="muted", turn=-90)
    d.rect(LEFT, TOP - 84, SIDE, 64, "kept", fill=0.35)
    d.text(LEFT - 12, TOP - 47, "K", size=17, weight="bold", anchor="end")
    d.text(LEFT + SIDE / 2, TOP - 94, "candidates: unit teacher rows (m × d)", colour="muted")


def _matrix(d: Drawing, first, last, height) -> None:
    """The similarity matrix: only the chunk is drawn solid; its positives are left out of the sums."""
    d.rect(LEFT, TOP, SIDE, SIDE, "muted", dash="5 5", stroke=1.5)
    d.text(LEFT + SIDE / 2, (TOP + first) / 2 - 4, "n × m similarities, never held whole", colour="muted")
    d.text(LEFT + SIDE / 2, (TOP + first) / 2 + 16, "rows above: done, E overwritten", colour="muted", size=13)
    d.text(LEFT + SIDE / 2, (last + TOP + SIDE) / 2 + 5, "rows below: to come", colour="muted", size=13)
    for i in range(*CHUNK):
        for j in range(TILES):
            x, y = LEFT + TILE * j, TOP + TILE * i
            d.rect(x, y, TILE, TILE, "chunk", fill=0.3, stroke=1)
            if i == j:
                d.line((x + 3, y + 3), (x + TILE - 3, y + TILE - 3), colour="ink", arrow=False, stroke=3)
    d.rect(LEFT, first, SIDE, height, "chunk", stroke=2.5)


def _results(d: Drawing, first, middle, height, right) -> None:
    """The loss of each anchor and its row of the gradient."""
    sums, grad = right + 58, right + 132
    for x, width, name, shape in ((sums, 16, "loss", "(n)"), (grad, 64, "gradient", "(n × d)")):
        d.rect(x, TOP, width, SIDE, "out", dash="3 4", stroke=1.2)
        d.rect(x, TOP, width, first - TOP, "out", fill=0.2)
        d.rect(x, first, width, height, "out", fill=0.45, stroke=2)
        d.text(x + width / 2, TOP - 28, name, weight="bold")
        d.text(x + width / 2, TOP - 10, shape, colour="muted", size=13)
    d.line((right + 4, middle - 14), (sums - 4, middle - 14))
    d.text((right + sums) / 2, middle - 22, "Σ", size=15)
    d.line((right + 4, middle + 14), (sums - 8, middle + 14), arrow=False)
    d.line((sums + 24, middle + 14), (grad - 4, middle + 14))
    d.text((right + sums) / 2, middle + 32, "E K", size=14)


def _steps(d: Drawing) -> None:
    x, y = LEFT + SIDE + 222, TOP - 84
    steps = (
        ("1  GEMM", "tiles of A Kᵀ / temperature", "chunk"),
        ("2  epilogue", "drop the positive (diagonal), E = exp", "chunk"),
        ("3  row sums", "loss = log1p(negatives / positive)", "out"),
        ("4  GEMM", "E K, a weighted mean of candidates", "chunk"),
        ("5  epilogue", "less the positive, project, scale", "out"),
    )
    d.text(x, y + 16, "For each chunk of rows", anchor="start", weight="bold", size=16)
    for i, (name, text, colour) in enumerate(steps):
        top = y + 52 + i * 52
        d.text(x, top, name, colour=colour, anchor="start", weight="bold", size=15)
        d.text(x, top + 19, text, anchor="start", size=14)
    d.text(x, y + 340, "Short rows on a GPU: step 2 keeps E of", anchor="start", colour="muted", size=13)
    d.text(x, y + 358, "a tile in registers, and no chunk exists.", anchor="start", colour="muted", size=13)


def _legend(d: Drawing) -> None:
    y = HEIGHT - 34
    entries = (
        (66, "kept", 0.35, None, "read by tiles"),
        (238, "chunk", 0.3, None, "one chunk of E, memory reused"),
        (532, "out", 0.45, None, "kept: the results"),
        (738, "muted", 0.0, "5 5", "not in memory"),
    )
    for x, colour, fill, dash, text in entries:
        d.rect(x, y, 18, 18, colour, fill=fill, dash=dash)
        d.text(x + 27, y + 14, text, anchor="start", size=14)


def main() -> None:
    for theme, colours in THEMES.items():
        (FOLDER / f"tiles-{theme}.svg").write_text(draw(colours), encoding="utf-8")


if __name__ == "__main__":
    main()
