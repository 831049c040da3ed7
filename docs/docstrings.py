"""Extension of griffe, for mkdocs.yml: Sphinx roles become code, LaTeX a link to the page with the equations."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?(?:mcld_kernels\.)?([^`]+)`")
MATH = re.compile(r"^\.\. math::\n(?:(?:[ ]+.*)?\n)*", re.MULTILINE)
EQUATIONS = "the equations of [Losses](losses.md) hold.\n\n"


def to_markdown(text: str) -> str:
    text = MATH.sub(EQUATIONS, text)
    # A literal block of reStructuredText, "::" and an indented text, is an indented code block of Markdown.
    text = re.sub(r"::\n\n(?=[ ]{4})", ":\n\n", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    # A description that begins with ">" would be a quotation.
    text = re.sub(r"^( +[\w, ]+: )(>=? )", r"\1\\\2", text, flags=re.MULTILINE)
    return ROLE.sub(r"`\1`", text)


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
