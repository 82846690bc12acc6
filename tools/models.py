"""List the detectors that come with the toolkit: classes, AP, size and cost."""

from detection.cli.models import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
