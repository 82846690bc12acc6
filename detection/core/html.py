"""Pages for people that are one file each: style, plots and images are inside, and nothing is ever fetched.

A page is a list of `Section`s; a section's blocks come from the functions below. Text that is given to them is
escaped: file and class names may hold anything. The HTML itself stands in detection/core/templates/.
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

UNKNOWN = "–"
INK = "#010203"
"""What stands for the page's text color in a plot, until `figure` makes it that."""
PALETTE = ("#4c8ed9", "#e8833a", "#3fa66b", "#c957a8", "#8d76d8", "#b9a02c", "#d9534f", "#2aa7b5", "#8f9aa6", "#a9714b")
"""Colors of lines, to be told from each other on white and on black."""


@dataclass(frozen=True)
class Section:
    """A titled part of a page, with an entry in its navigation.

    Attributes:
        blocks: what the functions of this module give, in order.
        lead: a paragraph beneath the title.
    """

    title: str
    blocks: Sequence[Markup]
    lead: str = ""


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = ""
) -> None:
    """Write a page, atomically. Raises UserError where it cannot be written."""
    html = _templates().get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, footer=footer
    )  # fmt: skip
    # A lone surrogate, of a file name that is not UTF-8, is no reason to lose a page.
    data = html.encode("utf-8", "replace")
    write_output(Path(path), lambda file: file.write(data))


def heading(text: str) -> Markup:
    """A smaller title within a section."""
    return _block("heading", text)


def paragraph(text: str) -> Markup:
    return _block("paragraph", text)


def note(text: str, kind: str = "") -> Markup:
    """A remark that stands out; kind: "" (plain), "good", "warning" or "error"."""
    return _block("note", text, kind)


def marked(text: str, kind: str) -> Markup:
    """Text in the color of "good", "warning", "error" or "faint", for a cell of a table, say."""
    return _block("marked", text, kind)


def code(text: str) -> Markup:
    """Text as it stands, line by line."""
    return _block("code", text)


def details(summary: str, *blocks: Markup) -> Markup:
    """Blocks that are folded away until the summary is clicked."""
    return _block("details", summary, blocks)


def cards(items: Sequence[tuple[str, Any] | tuple[str, Any, str]]) -> Markup:
    """Numbers that matter: (name, value) or (name, value, remark) each; numbers are written by `number`."""
    return _block("cards", [(item[0], _cell(item[1]), item[2] if len(item) > 2 else "") for item in items])


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, left: int = 1, caption: str = "") -> Markup:
    """A table.

    Args:
        rows: cells are text, whole numbers, floats and None (see `number`), or what another function here gave.
        left: so many first columns are text, to the left.
    """
    return _block("table", header, [[_cell(cell) for cell in row] for row in rows], left, caption)


def figure(drawn: "Figure", caption: str = "") -> Markup:
    """A matplotlib figure as inline SVG, in the page's own text color; draw it within `plotting`."""
    text = io.StringIO()
    with plotting():
        # No date, and ids that depend on what is drawn alone: the same plot is the same bytes.
        drawn.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Names of groups, which nothing refers to, would be there in every plot of a page; metadata names a web site.
    svg = re.sub(r"<metadata>.*?</metadata>", "", re.sub(r'<g id="[^"]*"', "<g", svg), flags=re.DOTALL)
    return _block("plot", Markup(svg), caption)


def plots(items: Sequence[Markup]) -> Markup:
    """Figures beside each other, as many as there is room for."""
    return _block("plots", items)


@contextlib.contextmanager
def plotting() -> Iterator[type["Figure"]]:
    """matplotlib's Figure in the style of the pages, for a while; it needs no screen and leaves pyplot alone.

    >>> with plotting() as Figure:
    ...     drawn = Figure((4, 3))
    ...     drawn.subplots().plot([1, 2, 3])
    ...     block = figure(drawn)
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "detection",
        # A dollar sign in a class name is no formula.
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "grid.color": INK,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.prop_cycle": cycler(color=PALETTE),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(style):
        yield Figure


def data_uri(rgb: np.ndarray, max_side: int = 640, quality: int = 82) -> str:
    """An RGB uint8 [H, W, 3] image as a data URI (JPEG), made smaller where a side exceeds `max_side` pixels."""
    height, width = rgb.shape[:2]
    scale = max_side / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def image(source: str, caption: str = "", alt: str = "") -> Markup:
    """One image; `source` is what `data_uri` gave."""
    return _block("image", source, caption, alt or caption)


@dataclass
class Album:
    """Images of a page, all together no larger than a number of bytes; what comes too late is counted.

    One album serves several galleries: `gallery` gives the images added since the last one and forgets them.
    """

    max_bytes: int = 6_000_000
    used: int = 0
    left_out: int = 0
    _images: list[Markup] = field(default_factory=list)

    def add(self, rgb: np.ndarray, caption: str = "", *, max_side: int = 480, quality: int = 80) -> bool:
        """Take an image in, with its caption; False, and nothing done, where there is no room left."""
        if self.full:
            self.left_out += 1
            return False
        source = data_uri(rgb, max_side, quality)
        if self.used + len(source) > self.max_bytes:
            self.left_out += 1
            return False
        self.used += len(source)
        self._images.append(image(source, caption))
        return True

    @property
    def full(self) -> bool:
        """Whether reading another image would be for nothing: fewer than 2 % are left."""
        return self.used > 0.98 * self.max_bytes

    def gallery(self, side: int = 240) -> Markup:
        """The images as a grid whose columns are at least `side` pixels wide, and how many were left out."""
        block = _block("gallery", self._images, side, self.left_out)
        self._images, self.left_out = [], 0
        return block


def number(value: float | np.number | None, decimals: int = 3) -> str:
    """A number for people; None and NaN are a dash, whole numbers have their thousands apart."""
    if value is None or not np.isfinite(value):
        return UNKNOWN
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.{decimals}f}"


def _cell(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, int | float | np.number) else value


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
