"""Build HTML pages that are one self-contained file: they include styles, plots and images, and load nothing.

A page is a list of `Section`s. The functions of this module create the blocks of a section; they escape all text, since
file and class names may contain any characters. The HTML templates are in detection/core/templates/.
"""

import base64
import contextlib
import functools
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup

from detection.core.outputs import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"
TEXT_COLOR = "#010203"
"""Placeholder in plots; `figure` replaces it by the text color of the page."""
PALETTE = ("#4c8ed9", "#e8833a", "#3fa66b", "#c957a8", "#8d76d8", "#b9a02c", "#d9534f", "#2aa7b5", "#8f9aa6", "#a9714b")
"""Line colors that are distinguishable on white and on black."""


@dataclass(frozen=True)
class Section:
    """A part of a page with a title and a link in the navigation.

    Attributes:
        blocks: HTML blocks from the functions of this module.
        lead: paragraph below the title.
    """

    title: str
    blocks: Sequence[Markup]
    lead: str = ""


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = ""
) -> None:
    """Write a page atomically. Raises UserError if it cannot be written."""
    html = _templates().get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, footer=footer
    )  # fmt: skip
    # Replace lone surrogates, from file names that are not UTF-8.
    data = html.encode("utf-8", "replace")
    write_output(Path(path), lambda file: file.write(data))


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return _block("heading", text)


def paragraph(text: str) -> Markup:
    return _block("paragraph", text)


def note(text: str, kind: str = "") -> Markup:
    """A highlighted note; kind: "" (plain), "good", "warning" or "error"."""
    return _block("note", text, kind)


def colored(text: str, kind: str) -> Markup:
    """Text in the color of "good", "warning", "error" or "faint", for example in a table cell."""
    return _block("colored", text, kind)


def code(text: str) -> Markup:
    """Preformatted text."""
    return _block("code", text)


def details(summary: str, *blocks: Markup) -> Markup:
    """Blocks that are hidden until the user clicks on the summary."""
    return _block("details", summary, blocks)


def cards(items: Sequence[tuple[str, Any] | tuple[str, Any, str]]) -> Markup:
    """Key figures: (name, value) or (name, value, remark) each; numbers are formatted by `format_number`."""
    return _block("cards", [(item[0], _cell(item[1]), item[2] if len(item) > 2 else "") for item in items])


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, left: int = 1, caption: str = "") -> Markup:
    """A table.

    Args:
        rows: cells are text, numbers or None (see `format_number`), or blocks.
        left: number of left-aligned columns.
    """
    return _block("table", header, [[_cell(cell) for cell in row] for row in rows], left, caption)


def figure(figure: "Figure", caption: str = "") -> Markup:
    """A matplotlib figure as inline SVG in the text color of the page; create it inside `plotting`."""
    text = io.StringIO()
    with plotting():
        # No date, and fixed ids: the same plot gives the same bytes.
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    # Remove unused group ids, which would repeat in every plot of a page, and metadata, which contains a URL.
    svg = re.sub(r"<metadata>.*?</metadata>", "", re.sub(r'<g id="[^"]*"', "<g", svg), flags=re.DOTALL)
    return _block("plot", Markup(svg), caption)


def row(items: Sequence[Markup]) -> Markup:
    """Blocks side by side, wrapped at the width of the page."""
    return _block("row", items)


@contextlib.contextmanager
def plotting() -> Iterator[type["Figure"]]:
    """Context that sets the style of the pages and yields matplotlib's Figure class; needs no display, and no pyplot.

    >>> with plotting() as Figure:
    ...     figure = Figure((4, 3))
    ...     figure.subplots().plot([1, 2, 3])
    ...     block = figure(figure)
    """
    # matplotlib takes a second to import, and a page without plots does not need it.
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "detection",
        # Do not parse dollar signs in class names as formulas.
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "grid.color": TEXT_COLOR,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.prop_cycle": cycler(color=PALETTE),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT_COLOR),
    }
    with matplotlib.rc_context(style):
        yield Figure


def data_uri(rgb: np.ndarray, max_side: int = 640, quality: int = 82) -> str:
    """An RGB uint8 [H, W, 3] image as a JPEG data URI, scaled down if a side exceeds `max_side` pixels."""
    height, width = rgb.shape[:2]
    scale = max_side / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def image(source: str, caption: str = "", alt: str = "") -> Markup:
    """One image; `source` comes from `data_uri`."""
    return _block("image", source, caption, alt or caption)


@dataclass
class Album:
    """Images of a page with a common limit of `max_bytes`; images above the limit are omitted and counted.

    One album can serve several galleries: `gallery` returns the images added since its last call.
    """

    max_bytes: int = 6_000_000
    used_bytes: int = 0
    num_omitted: int = 0
    _images: list[Markup] = field(default_factory=list)

    def add(self, rgb: np.ndarray, caption: str = "", *, max_side: int = 480, quality: int = 80) -> bool:
        """Add an image with its caption; returns False and counts it as omitted if it exceeds the limit."""
        if self.is_full:
            self.num_omitted += 1
            return False
        source = data_uri(rgb, max_side, quality)
        if self.used_bytes + len(source) > self.max_bytes:
            self.num_omitted += 1
            return False
        self.used_bytes += len(source)
        self._images.append(image(source, caption))
        return True

    @property
    def is_full(self) -> bool:
        """Whether less than 2 % of `max_bytes` is left, so that reading another image is useless."""
        return self.used_bytes > 0.98 * self.max_bytes

    def gallery(self, side: int = 240) -> Markup:
        """The images as a grid with columns of at least `side` pixels, and the number of omitted images."""
        block = _block("gallery", self._images, side, self.num_omitted)
        self._images, self.num_omitted = [], 0
        return block


def format_number(value: float | np.number | None, decimals: int = 3) -> str:
    """Format a number; None and NaN become a dash, integers get a thousands separator."""
    if value is None or not np.isfinite(value):
        return MISSING
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.{decimals}f}"


def _cell(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return format_number(value) if value is None or isinstance(value, int | float | np.number) else value


def _block(name: str, *arguments: Any) -> Markup:
    return getattr(_templates().get_template("blocks.html").module, name)(*arguments)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("detection.core", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
