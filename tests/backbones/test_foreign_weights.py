"""Weights of PaddleClas and MindCV: read without the frameworks and converted, with equal outputs.

tests/foreign/check.py compares with the frameworks themselves; tests/foreign/samples holds small files they wrote.
"""

import collections
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_seed
from foreign.twins import PaddleGhostNet, mindcv_entries, unsettle, write_mindspore, write_pdparams

from backbones import GhostNet, WeightsError, build_backbone, load_weights, read_weights
from backbones.weight_layouts import convert_to_published, ghostnet_width
from backbones.weight_readers import UnreadableFile, read_mindspore, read_pdparams

SAMPLES = Path(__file__).parents[1] / "foreign" / "samples"
NUMBERS = [[1.5, -2, 3], [4, 5, 6]]


def same(tensor, expected, dtype=torch.float32):
    return tensor.dtype == dtype and torch.equal(tensor, torch.tensor(expected, dtype=dtype))


# ---- files that the frameworks wrote


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_file_of_paddle(protocol):
    found = read_pdparams(SAMPLES / f"protocol{protocol}.pdparams")
    assert list(found) == ["weight", "half", "steps"]
    assert same(found["weight"], NUMBERS) and same(found["half"], NUMBERS)
    assert same(found["steps"], [7], torch.int64)


def test_paddles_bfloat16_and_tensors_among_other_values():
    assert same(read_pdparams(SAMPLES / "bfloat16.pdparams")["bfloat16"], NUMBERS)
    found = read_pdparams(SAMPLES / "mixed.pdparams")
    assert list(found) == ["weight"] and same(found["weight"], NUMBERS)


def test_paddle_itself_can_write_files_that_call_eval():
    """A file of paddle.save with a DenseTensor calls builtins.eval when it is loaded; our reader only builds arrays."""
    with pytest.raises(UnreadableFile, match=r"asks for builtins\.eval.*nothing in it was run"):
        read_pdparams(SAMPLES / "eval.pdparams")


def test_a_file_of_mindspore():
    found = read_mindspore(SAMPLES / "types.ckpt")
    assert list(found) == ["weight", "half", "bfloat16", "double", "steps", "scalar", "epoch"]  # and no text
    for name in ("weight", "half", "bfloat16"):
        assert same(found[name], NUMBERS)
    assert same(found["double"], NUMBERS, torch.float64)
    assert same(found["steps"], [7, 8], torch.int32) and same(found["epoch"], 3, torch.int64)
    assert same(found["scalar"], 1.5)


def test_mindspores_checksum(tmp_path):
    content = (SAMPLES / "checksum.ckpt").read_bytes()
    assert same(read_mindspore(SAMPLES / "checksum.ckpt")["weight"], NUMBERS)
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(UnreadableFile, match="checksum is wrong"):
        read_mindspore(damaged)


def test_writer_matches_mindspore(tmp_path):
    """The writer of the other tests creates the same bytes as MindSpore."""
    numbers = np.array(NUMBERS)
    half = torch.tensor(NUMBERS, dtype=torch.bfloat16).view(torch.int16).numpy()
    entries = {
        "weight": ([2, 3], "Float32", [numbers.astype("<f4").tobytes()]),
        "half": ([2, 3], "Float16", [numbers.astype("<f2").tobytes()]),
        "bfloat16": ([2, 3], "BFloat16", [half.tobytes()]),
        "double": ([2, 3], "Float64", [numbers.tobytes()]),
        "steps": ([2], "Int32", [np.array([7, 8], "<i4").tobytes()]),
        "scalar": ([], "Float32", [np.float32(1.5).tobytes()]),
        "epoch": ([], "Int64", [np.int64(3).tobytes()]),
        "note": ([0], "str", ["text".encode("utf-32-le")]),
    }
    path = write_mindspore(tmp_path / "own.ckpt", entries)
    assert path.read_bytes() == (SAMPLES / "types.ckpt").read_bytes()


def test_mindspore_chunks_and_old_scalars(tmp_path):
    pieces = [np.arange(4, dtype="<f4").tobytes(), np.arange(4, 6, dtype="<f4").tobytes()]
    entries = {"large": ([2, 3], "Float32", pieces), "scalar": ([0], "Float32", [np.float32(2).tobytes()])}
    found = read_mindspore(write_mindspore(tmp_path / "w.ckpt", entries))
    assert same(found["large"], [[0, 1, 2], [3, 4, 5]]) and same(found["scalar"], 2.0)


# ---- whole networks


def assert_same_outputs(expected, width, weights):
    """expected: function of images -> {level: features, "logits": …}."""
    image = torch.randn(2, 3, 97, 131, generator=torch.Generator().manual_seed(run_seed(3)))
    classifier = GhostNet(width).eval()
    report = load_weights(classifier, *read_weights(weights, "ghostnet", width))
    assert not report.missing and not report.unexpected and not report.mismatched
    backbone = build_backbone("ghostnet", width=width, weights=str(weights)).eval()
    with torch.no_grad():
        found = {"logits": classifier(image), **backbone(image)}
        for name, value in expected(image).items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


@pytest.mark.numeric
@pytest.mark.parametrize(("width", "protocol", "old"), [(0.5, 2, True), (1.0, 4, False), (1.3, 4, False)])
def test_paddles_network(tmp_path, width, protocol, old):
    network = unsettle(PaddleGhostNet(width), seed=run_seed())
    gates = []
    gate = network._ghostbottleneck_4.se_block.excitation
    gate.register_forward_hook(lambda module, inputs, output: gates.append(output))
    path = write_pdparams(tmp_path / "net.pdparams", network.arrays(), protocol=protocol, old_numpy=old)
    assert_same_outputs(network, width, path)
    # The comparison would be worth little if all gates stood open, shut or in between.
    assert (gates[0] < 0).any() and (gates[0] > 1).any() and ((gates[0] > 0.1) & (gates[0] < 0.9)).any()


@pytest.mark.numeric
@pytest.mark.parametrize("width", [0.5, 1.0, 1.3])
def test_mindcvs_network(tmp_path, width):
    network = unsettle(timm.create_model(f"ghostnet_{round(100 * width):03d}"), seed=run_seed())
    path = write_mindspore(tmp_path / "net.ckpt", mindcv_entries(network.state_dict()))

    def expected(image):
        found = {}
        x = network.act1(network.bn1(network.conv_stem(image)))
        for index, stage in enumerate(network.blocks):
            x = stage(x)
            if index in (2, 4, 6, 8):
                found[f"c{index // 2 + 1}"] = x
        return {**found, "logits": network(image)}

    assert_same_outputs(expected, width, path)


@pytest.mark.numeric
def test_layout_is_detected_in_any_file_format(tmp_path):
    """Both frameworks also write safetensors, and files may be converted without renaming."""
    network = unsettle(PaddleGhostNet(0.5), seed=run_seed())
    torch.save({k: torch.from_numpy(v) for k, v in network.arrays().items()}, tmp_path / "paddle.pth")
    assert_same_outputs(network, 0.5, tmp_path / "paddle.pth")


def test_report_of_unexpected_tensors(tmp_path, caplog):
    entries = mindcv_entries(GhostNet(0.5).state_dict())
    entries["moments.conv_stem.weight"] = ([1], "Float32", [b"\0\0\0\0"])  # of a training's checkpoint
    state_dict, source = read_weights(write_mindspore(tmp_path / "w.ckpt", entries), "ghostnet", 0.5)
    report = load_weights(build_backbone("ghostnet", width=0.5), state_dict, source)
    assert report.unexpected == ["moments.conv_stem.weight"] and len(report.classifier) == 9
    assert "MindCV's layout, converted" in str(report)


def test_padding_stays_zero_in_training():
    """If PaddleClas squeezes to fewer channels, the added ones are zero, also after an optimizer step."""
    arrays = {k: torch.from_numpy(v) for k, v in unsettle(PaddleGhostNet(1.0)).arrays().items()}
    network = GhostNet(1.0)
    load_weights(network, convert_to_published(arrays))
    gate = network.blocks[3][0].se
    assert gate.conv_reduce.weight.shape[0] == 20  # PaddleClas: 72 // 4 = 18
    optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.01)
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not gate.conv_reduce.weight[18:].any() and not gate.conv_reduce.bias[18:].any()
    assert gate.conv_reduce.weight[:18].all()


# ---- mistakes


def test_another_width_is_reported(tmp_path):
    path = write_pdparams(tmp_path / "net.pdparams", PaddleGhostNet(0.5).arrays())
    with pytest.raises(WeightsError, match=r"the file's width is 0\.5: set model\.backbone\.width=0\.5"):
        build_backbone("ghostnet", width=1.3, weights=str(path))


@pytest.mark.parametrize("width", [0.5, 1.0, 1.1, 1.3])
def test_width_of_a_state_dict(width):
    assert ghostnet_width(GhostNet(width).state_dict()) == width
    assert ghostnet_width({}) is None


def test_unsupported_width_raises(tmp_path):
    """At 1.1 a quarter of 132 channels is 33, which the published network rounds down to 32."""
    path = write_pdparams(tmp_path / "net.pdparams", PaddleGhostNet(1.1).arrays())
    with pytest.raises(WeightsError, match=r"net\.pdparams cannot be converted: .*squeezes to 33 .* to 32"):
        read_weights(path, "ghostnet", 1.1)


def test_files_of_other_networks(tmp_path):
    paddle = write_pdparams(tmp_path / "w.pdparams", {"conv._conv.weight": np.zeros(3, "f4")})
    with pytest.raises(WeightsError, match=r"of PaddlePaddle cannot be converted.*got keys conv\._conv\.weight"):
        read_weights(paddle, "ghostnet", 1.0)
    mindspore = write_mindspore(tmp_path / "w.ckpt", {"conv.weight": ([1], "Float32", [b"\0\0\0\0"])})
    with pytest.raises(WeightsError, match=r"of MindSpore cannot be converted.*got keys conv\.weight"):
        read_weights(mindspore, "ghostnet", 1.0)


def test_a_converted_file_fits_only_ghostnet(tmp_path):
    path = write_pdparams(tmp_path / "net.pdparams", PaddleGhostNet(0.5).arrays())
    with pytest.raises(WeightsError, match=r"0 matched.*Nothing matches"):
        build_backbone("mobilenet_v2", weights=str(path))


def test_missing_tensors_are_reported(tmp_path):
    arrays = PaddleGhostNet(0.5).arrays()
    del arrays["_ghostbottleneck_15.se_block.squeeze.bias"]
    path = write_pdparams(tmp_path / "net.pdparams", arrays)
    with pytest.raises(WeightsError, match=r"lacks tensors of the network \(blocks\.8\.3\.se\.conv_reduce\.bias"):
        build_backbone("ghostnet", width=0.5, weights=str(path))


def test_pytorch_ckpt_files(tmp_path):
    network = GhostNet(0.5)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "lightning.ckpt")
    state_dict, _ = read_weights(tmp_path / "lightning.ckpt", "ghostnet", 0.5)
    assert torch.equal(state_dict["conv_stem.weight"], network.conv_stem.weight)


# ---- hostile and damaged files


class Call:
    """Its pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


MARK = "hostile-was-here"
HOSTILE = {
    "os.mkdir": pickle.dumps({"w": Call(os.mkdir, MARK)}),
    "os.system": pickle.dumps({"w": Call(os.system, f"mkdir {MARK}")}),
    "eval": pickle.dumps({"w": Call(eval, f"__import__('os').mkdir('{MARK}')")}),
    "exec, protocol 2": pickle.dumps({"w": Call(exec, f"import os; os.mkdir('{MARK}')")}, 2),
    "getattr": pickle.dumps({"w": Call(getattr, np.zeros(1), "tofile")}),
    "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.",
    "numpy.load": b"cnumpy\nload\n(S'x.npy'\nI01\ntR.",
    "in an array of objects": pickle.dumps({"w": np.array([Call(os.mkdir, MARK)], dtype=object)}),
    "an array of objects": pickle.dumps({"w": np.array([1, "a"], dtype=object)}),
    "an array of text": pickle.dumps({"w": np.array(["a"])}),
    "an array of records": pickle.dumps({"w": np.zeros(2, [("a", "f4"), ("b", "i4")])}),
    "another codec": b"c_codecs\nencode\n(S'abc'\nS'zlib_codec'\ntR.",
    "a scalar": pickle.dumps({"w": np.float32(1)}),
    "torch's own": pickle.dumps({"w": torch.zeros(2)}),
    "a list": pickle.dumps([np.zeros(2)]),
    "no pickle": b"hello",
    "empty": b"",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02K\x01Q.",
    "a memo of terabytes": b"\x80\x02K\x01r\xff\xff\xff\x7f0\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "attributes of a class": b"c_codecs\nencode\nN}S'__new__'\nc__builtin__\ntuple\ns\x86b.",
    "a state of a container": b"ccollections\nOrderedDict\n)R}S'items'\nI1\nsb.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_raises_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("w.pdparams").write_bytes(HOSTILE[name])
    with pytest.raises(WeightsError, match=r"weights file w\.pdparams cannot be read: \S"):
        read_weights("w.pdparams", "ghostnet", 1.0)
    assert not Path(MARK).exists()
    # And it has left nothing behind that would spoil the next file.
    assert same(read_pdparams(SAMPLES / "protocol2.pdparams")["weight"], NUMBERS)


def test_standard_unpickler_runs_the_hostile_call(tmp_path, monkeypatch):
    for name in ("os.mkdir", "os.system", "eval", "exec, protocol 2", "in an array of objects"):
        (tmp_path / name.replace(" ", "")).mkdir()
        monkeypatch.chdir(tmp_path / name.replace(" ", ""))
        pickle.loads(HOSTILE[name])
        assert Path(MARK).exists()


def test_a_state_of_numpys_types_never_reaches_numpy(tmp_path):
    """A float32 dtype that claims, by its pickled flags, to hold objects would make NumPy take bytes for pointers."""
    content = pickle.dumps({"w": np.arange(4, dtype="<f8")}, 2)
    plain = b"NNNJ" + 4 * b"\xff" + b"J" + 4 * b"\xff" + b"K"
    flagged = content.replace(plain + b"\x00t", plain + b"\x3ft")
    assert flagged != content
    (tmp_path / "w.pdparams").write_bytes(flagged)
    assert same(read_pdparams(tmp_path / "w.pdparams")["w"], [0, 1, 2, 3], torch.float64)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 2), "4 bytes do not make"), ((-1,), "not a shape"), ((2**40, 2**40), "do not make"), (("a",), "not a shape")],
)
def test_shapes_that_do_not_fit_their_bytes(tmp_path, shape, message):
    array = pickle.dumps({"w": np.zeros(1, "f4")}, 2)
    head, tail = array.split(b"(K\x01K\x01\x85", 1)
    wrong = pickle.dumps(shape, 2)[2:-1]
    (tmp_path / "w.pdparams").write_bytes(head + b"(K\x01" + wrong + tail)
    with pytest.raises(UnreadableFile, match=message):
        read_pdparams(tmp_path / "w.pdparams")


@pytest.mark.parametrize("name", ["protocol2.pdparams", "protocol4.pdparams"])
def test_a_truncated_file_of_paddle(tmp_path, name):
    content = (SAMPLES / name).read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(UnreadableFile):
            read_pdparams(tmp_path / "cut")


def test_a_truncated_file_of_mindspore(tmp_path):
    content = (SAMPLES / "types.ckpt").read_bytes()
    whole = read_mindspore(SAMPLES / "types.ckpt")
    ends = 0
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        try:
            # The format has no end mark: a cut between two tensors leaves a shorter, whole file. The loader then
            # finds that parts of the network are missing.
            found = read_mindspore(tmp_path / "cut")
            ends += 1
        except UnreadableFile:
            continue
        assert list(found) == list(whole)[: len(found)]
    # And an empty file is none.
    assert ends == len(whole)


@pytest.mark.parametrize(
    ("name", "read"),
    [("protocol2.pdparams", read_pdparams), ("protocol4.pdparams", read_pdparams), ("types.ckpt", read_mindspore)],
)
def test_damaged_files_raise_one_error_class(tmp_path, name, read):
    content = (SAMPLES / name).read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            found = read(tmp_path / "damaged")
            assert all(isinstance(value, torch.Tensor) for value in found.values())
        except UnreadableFile:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x05hello", "not a MindSpore checkpoint"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "truncated"),
        (b"\x0a" + b"\xff" * 12, "not a MindSpore checkpoint"),
        (b"\x12\x00", "field 2 does not belong"),
        (b"\x0a\x0c\x0a\x01a\x12\x07\x12\x05Int12", "a has the unknown type 'Int12'"),
        (b"\x0a\x10\x0a\x01a\x12\x0b\x08\x03\x12\x07Float32", "a: 0 bytes do not make an array"),
    ],
)
def test_files_that_are_not_mindspore_checkpoints(tmp_path, content, message):
    (tmp_path / "w.ckpt").write_bytes(content)
    with pytest.raises(UnreadableFile, match=message):
        read_mindspore(tmp_path / "w.ckpt")


def test_reading_needs_no_framework():
    assert "paddle" not in sys.modules and "mindspore" not in sys.modules
    assert not isinstance(read_pdparams(SAMPLES / "protocol4.pdparams"), collections.OrderedDict)
