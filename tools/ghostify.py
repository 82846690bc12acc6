"""Replace a network's convolutions with ghost modules; report the cost saved and the error it brings."""

from detection.cli.ghostify import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
