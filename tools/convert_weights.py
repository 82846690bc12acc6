"""Identify and check a file of GhostNet weights (PaddleClas, MindCV, PyTorch), or convert it to PyTorch's layout."""

from detection.cli.convert_weights import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
