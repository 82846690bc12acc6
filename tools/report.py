"""Write an HTML report about a run, or about the difference between two."""

from detection.cli.report import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
