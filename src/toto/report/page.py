"""One self-contained page: styles, plots and pictures inside, nothing fetched."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from toto.runtime.files import write_text

TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4", ".jpg": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs, plain text.
        plots: SVG texts, side by side.
        plots_in_row: how many of them fit beside each other on a wide screen, 2 or 3.
        pictures: files with their captions, embedded.
        table: rows of cells, the first row being the heading.
    """

    title: str
    text: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    plots_in_row: int = 2
    pictures: tuple[tuple[Path, str], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()


def write_page(path: Path, *, title: str, lead: str, facts: dict[str, str], sections: list[Section], foot: str) -> None:
    """Render the page and write it atomically.

    Args:
        path: the HTML file.
        title: heading of the page.
        lead: one sentence below it.
        facts: the few numbers that matter, name -> value.
        sections: the parts, in order.
        foot: what made it.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("toto.report", "."), autoescape=True)
    environment.filters["data_url"] = data_url
    environment.filters["is_video"] = lambda file: Path(file).suffix == ".mp4"
    values: dict[str, Any] = {"title": title, "lead": lead, "facts": facts, "sections": sections, "foot": foot}
    write_text(path, environment.get_template("page.html").render(values))


def data_url(path: Path) -> str:
    """A file as a data URL."""
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
