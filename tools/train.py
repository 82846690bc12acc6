"""Train a detector from a config."""

from detection.cli.run_tool import run_tool
from detection.cli.train import main

if __name__ == "__main__":
    run_tool(main)
