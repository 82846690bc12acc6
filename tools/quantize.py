"""Write smaller files of a detector (fp16, int8), and measure their AP and speed."""

from detection.cli.quantize import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
