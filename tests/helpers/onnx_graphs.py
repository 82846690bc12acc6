"""Small networks as ONNX graphs, for what changes such graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim
import torch
from torch import nn

from detection.export.onnx import canonicalize


def exported(network: nn.Module, x: torch.Tensor, folder: Path) -> onnx.ModelProto:
    """As detection.export has it before it changes it, shapes inferred."""
    path = folder / "plain.onnx"
    torch.onnx.export(network.eval(), (x,), path, opset_version=17, dynamo=False, do_constant_folding=True)
    return onnx.shape_inference.infer_shapes(onnxslim.slim(canonicalize(onnx.load(path))))


def outputs(model: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})
