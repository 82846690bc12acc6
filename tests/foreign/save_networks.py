"""Save random GhostNets of PaddleClas or MindCV, and what the framework itself makes of an image with them.

Runs in an environment of the framework's own (see docs/weights.md), which has neither PyTorch nor this project:

    python tests/foreign/save_networks.py paddle FOLDER
    python tests/foreign/save_networks.py mindspore FOLDER

For each width it writes `ghostnet_WIDTH.pdparams` or `.ckpt`, in the framework's own way, and beside it a `.npz` with
`image` [2, 3, 97, 131], `logits` [2, 1000] and `c2` to `c5`. `check.py` compares. In the folder `samples` are files of
a few numbers, copies of which, in tests/foreign/samples, `make test` reads.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

WIDTHS = (0.5, 1.0, 1.3)
LAST_BLOCKS = (2, 4, 10, 15)
"""The flat indices of the last block of strides 4, 8, 16 and 32."""
PASSES = 20
"""In training mode, which give the batch norms the statistics of their inputs: without, values grow to millions."""


def random_value(rng, name, shape):
    """Numbers for a weight or statistic, so that no layer is neutral and gates open and shut."""
    last = name.rsplit(".", 1)[-1]
    if last in ("_variance", "moving_variance"):
        value = rng.uniform(0.5, 1.5, shape)
    elif last in ("weight", "gamma") and len(shape) == 1:
        value = rng.uniform(0.2, 1, shape)
    elif last in ("_mean", "moving_mean", "beta") or "_batch_norm" in name:
        value = rng.uniform(-0.2, 0.2, shape)
    elif "excitation.bias" in name:
        value = rng.uniform(-0.5, 1.5, shape)
    elif "conv_expand.bias" in name:
        value = rng.uniform(-4, 4, shape)
    elif len(shape) == 1:
        value = rng.uniform(-0.2, 0.2, shape)
    else:
        inputs = shape[0] if len(shape) == 2 and "_block" in name else np.prod(shape[1:])
        value = rng.normal(0, np.sqrt(2 / inputs), shape)
    return value.astype(np.float32)


def paddle_networks(folder):
    import paddle

    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    weight = paddle.to_tensor([[1.5, -2, 3], [4, 5, 6]])
    tensors = {"weight": weight, "half": weight.astype("float16"), "steps": paddle.to_tensor([7])}
    for protocol in (2, 3, 4):
        paddle.save(tensors, str(samples / f"protocol{protocol}.pdparams"), protocol=protocol)
    paddle.save({"bfloat16": weight.astype("bfloat16")}, str(samples / "bfloat16.pdparams"))
    paddle.save({"weight": weight, "epoch": 3}, str(samples / "mixed.pdparams"))
    paddle.save(weight.value().get_tensor(), str(samples / "eval.pdparams"))

    module = paddleclas_ghostnet()
    build = {0.5: module.GhostNet_x0_5, 1.0: module.GhostNet_x1_0, 1.3: module.GhostNet_x1_3}
    for width in WIDTHS:
        rng = np.random.default_rng(int(10 * width))
        # Paddle wants names of parameters to be unique; a new scope of names makes them so for each network.
        with paddle.utils.unique_name.guard():
            network = build[width]()
        network.set_state_dict({k: random_value(rng, k, v.shape) for k, v in network.state_dict().items()})
        network.train()
        with paddle.no_grad():
            for _ in range(PASSES):
                network(paddle.to_tensor(rng.normal(size=(8, 3, 96, 96)).astype(np.float32)))
        network.eval()
        # Protocol 2 is what Paddle wrote when the published files were made, 4 what it writes today.
        for protocol in (2, 4):
            path = folder / f"ghostnet_{width}_protocol{protocol}.pdparams"
            paddle.save(network.state_dict(), str(path), protocol=protocol)
        image = rng.normal(size=(2, 3, 97, 131)).astype(np.float32)
        with paddle.no_grad():
            x = network.conv1(paddle.to_tensor(image))
            features = []
            for block in network.ghost_bottleneck_list:
                x = block(x)
                features.append(x.numpy())
            logits = network(paddle.to_tensor(image)).numpy()
        for protocol in (2, 4):
            write(
                folder / f"ghostnet_{width}_protocol{protocol}.npz", image, logits, [features[i] for i in LAST_BLOCKS]
            )


def paddleclas_ghostnet():
    """PaddleClas's module of GhostNet alone: the package as a whole needs a dozen others, OpenCV among them."""
    package = Path(importlib.util.find_spec("paddleclas").submodule_search_locations[0])
    for name in ("ppcls", "ppcls.arch", "ppcls.arch.backbone", "ppcls.arch.backbone.model_zoo", "ppcls.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(package / name.replace(".", "/"))]
        sys.modules[name] = module
    downloads = types.ModuleType("ppcls.utils.save_load")
    downloads.load_dygraph_pretrain = None
    sys.modules[downloads.__name__] = downloads
    return importlib.import_module("ppcls.arch.backbone.model_zoo.ghostnet")


def mindspore_networks(folder):
    import mindspore
    from mindcv.models import ghostnet_050, ghostnet_100, ghostnet_130

    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    numbers = np.array([[1.5, -2, 3], [4, 5, 6]])
    tensors = {
        "weight": mindspore.Tensor(numbers, mindspore.float32),
        "half": mindspore.Tensor(numbers, mindspore.float16),
        "bfloat16": mindspore.Tensor(numbers, mindspore.bfloat16),
        "double": mindspore.Tensor(numbers, mindspore.float64),
        "steps": mindspore.Tensor([7, 8], mindspore.int32),
        "scalar": mindspore.Tensor(1.5, mindspore.float32),
    }
    entries = [{"name": name, "data": tensor} for name, tensor in tensors.items()]
    mindspore.save_checkpoint(entries, str(samples / "types.ckpt"), append_dict={"epoch": 3, "note": "text"})
    mindspore.save_checkpoint(entries[:1], str(samples / "checksum.ckpt"), crc_check=True)

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    for width, build in ((0.5, ghostnet_050), (1.0, ghostnet_100), (1.3, ghostnet_130)):
        rng = np.random.default_rng(int(10 * width))
        network = build()
        for parameter in network.get_parameters():
            parameter.set_data(mindspore.Tensor(random_value(rng, parameter.name, parameter.shape)))
        network.set_train(True)
        for _ in range(PASSES):
            network(mindspore.Tensor(rng.normal(size=(8, 3, 96, 96)).astype(np.float32)))
        network.set_train(False)
        mindspore.save_checkpoint(network, str(folder / f"ghostnet_{width}.ckpt"))
        image = rng.normal(size=(2, 3, 97, 131)).astype(np.float32)
        x = network.act1(network.bn1(network.conv_stem(mindspore.Tensor(image))))
        features = []
        for stage in list(network.blocks)[:9]:
            for block in stage:
                x = block(x)
                features.append(x.asnumpy())
        logits = network(mindspore.Tensor(image)).asnumpy()
        write(folder / f"ghostnet_{width}.npz", image, logits, [features[i] for i in LAST_BLOCKS])


def write(path, image, logits, features):
    np.savez(path, image=image, logits=logits, **{f"c{i + 2}": x for i, x in enumerate(features)})
    print(path, flush=True)


if __name__ == "__main__":
    framework, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"paddle": paddle_networks, "mindspore": mindspore_networks}[framework](folder)
