"""Measure how fast detectors are, side by side, or count the parameters and multiply-adds of networks."""

from detection.cli.benchmark import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
