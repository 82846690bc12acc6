"""Export a checkpoint to ONNX, OpenVINO, TorchScript or torch.export, and compare the outputs with PyTorch's."""

from detection.cli.export import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
