"""Find feature maps of a layer that are nearly filtered copies of others, the redundancy that ghost modules use."""

from detection.cli.redundancy import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
