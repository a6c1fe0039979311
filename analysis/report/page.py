"""The page around the sections: one HTML document that asks for nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import tucka

from .markup import escape, note

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Browsers refuse every request, should one ever slip in."""


class Section(NamedTuple):
    """A part of the report.

    Attributes
    ----------
    key : str
        Its anchor.
    title : str
    sentence : str
        What the numbers say, in one plain sentence (not HTML).
    parts : tuple of str
        HTML: figures, tables.
    notes : tuple of str
        What is missing, and the option that would add it (not HTML).
    """

    key: str
    title: str
    sentence: str
    parts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def page(title: str, under: str, sections: Sequence[Section], missing: Sequence[str] = ()) -> str:
    """The HTML document of all sections.

    Parameters
    ----------
    title, under : str
        Heading, and a line below it (not HTML).
    sections : sequence of Section
        In their order.
    missing : sequence of str
        Whole sections that are not there, and what would add them.
    """
    asset = files(__package__)
    style, script = (asset.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    if missing:
        body = f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in missing)}</ul>"
        count = len(missing)
        sentence = f"{count} more {'part' if count == 1 else 'parts'} can be added with the options named here."
        sections = [*sections, Section("missing", "Not in this report", sentence, (body,))]
    links = "".join(f'<li><a href="#{section.key}">{escape(section.title)}</a></li>' for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="under">{escape(under)}</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{"".join(map(_section, sections))}</main>
<footer>Made by <code>python -m analysis report</code>, tucka {escape(tucka.__version__)}.</footer>
<script>
{script}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    return (
        f'<section id="{section.key}" aria-labelledby="{section.key}-title">\n'
        f'<h2 id="{section.key}-title">{escape(section.title)}</h2>\n'
        f'<p class="sentence">{escape(section.sentence)}</p>\n'
        f"{''.join(map(note, section.notes))}{chr(10).join(section.parts)}\n</section>\n"
    )
