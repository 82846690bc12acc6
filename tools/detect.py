"""Detect objects in images, folders, videos, cameras or streams; write annotated copies and JSON files."""

from detection.cli.detect import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
