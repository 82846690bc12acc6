"""Measure how long annotation files take to read, against pycocotools; each way in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser, existing_file
from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.data.formats.index_cache import FROM_BYTES, places_of

EXAMPLE = """\
example:
  python tools/make_coco_like.py --out /tmp/coco_like.json
  python tools/dev/annotation_speed.py /tmp/coco_like.json
"""
WAYS = {
    "pycocotools.COCO(file)": "from pycocotools.coco import COCO\ndef read(): return COCO(path)",
    "read, no cache": (
        "from detection.data.formats.detect_format import read_annotations\n"
        "def read(): return read_annotations(path, images='.', cache=False)"
    ),
    "read, cache written": (
        "from detection.data.formats.detect_format import read_annotations\n"
        "def read(): return read_annotations(path, images='.')"
    ),
    "opened from cache": (
        "from detection.data.formats.detect_format import read_annotations\n"
        "def read(): return read_annotations(path, images='.')"
    ),
}
# A process of its own for each: what one leaves behind in memory is not counted for the next.
_MEASURE = """
import contextlib, io, json, resource, sys, time
path = sys.argv[1]
{way}
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    result = read()
seconds = time.perf_counter() - start
try:
    # What Linux calls maxrss is not less than that of the process that started this one.
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
except (OSError, IndexError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak]))
"""


def compare_reading(annotations: str | Path) -> str:
    """A table: seconds and peak memory of each way to read `annotations`, and what part they are of pycocotools'.

    Raises:
        UserError: the file is absent, too small for a cache, or one way fails.
    """
    path = Path(annotations)
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist")
    if path.stat().st_size < FROM_BYTES:
        raise UserError(f"{path} has less than {FROM_BYTES >> 20} MB: nothing is cached, nothing is to be gained")
    for place in places_of(path):
        place.unlink(missing_ok=True)
    found = {name: _measure(name, path) for name in WAYS}
    seconds, memory = found["pycocotools.COCO(file)"]
    lines = [
        f"{path}, {path.stat().st_size / 1e6:.0f} MB",
        f"{'':<24}{'seconds':>8}{'ratio':>8}{'peak MB':>9}{'ratio':>8}",
    ]
    for name, (own, peak) in found.items():
        lines.append(f"{name:<24}{own:>8.2f}{own / seconds:>8.3f}{peak / 1e6:>9.0f}{peak / memory:>8.3f}")
    return "\n".join(lines)


def _measure(name: str, path: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", _MEASURE.format(way=WAYS[name]), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} failed on {path}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("dev/annotation_speed", __doc__, EXAMPLE)
    parser.add_argument("annotations", metavar="JSON", type=existing_file, help="COCO file of 16 MB or more")
    print(compare_reading(parser.parse(arguments).annotations))
    return 0


if __name__ == "__main__":
    run_tool(main)
