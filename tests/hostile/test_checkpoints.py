"""Checkpoints and files of weights that are damaged, foreign, hostile or huge: one line, and nothing in them is run."""

import collections
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from run_tool import run
from torch import nn

from backbones import WeightsError, build_backbone, load_weights, read_weights, torch_files
from backbones.file_limits import MAX_FILE_SIZE_VARIABLE, UnreadableFile
from backbones.torch_files import read_torch_file
from backbones.weight_readers import read_pdparams
from detection import Predictor, UserError
from detection.checkpoint import read_checkpoint, save_checkpoint

MARK = "it-ran"
MiB = 1 << 20
LONG_TEXT = b"\x80\x02X" + struct.pack("<I", MiB) + b"x" * MiB


def archive(path: Path, values: bytes, records: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED) -> Path:
    """As torch.save lays out its files."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x/data.pkl", values)
        file.writestr("x/version", "3\n")
        for key, numbers in (records or {}).items():
            file.writestr(f"x/data/{key}", numbers)
    return path


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def tensor(key: str, elements: int, size: bytes, stride: bytes) -> bytes:
    text = b"X" + struct.pack("<I", len(key)) + key.encode()
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + text + b"X\x03\0\0\0cpu" + number(elements) + b"tQ"
    rest = b"K\0" + size + stride + b"\x89" + call("collections", "OrderedDict", b")")
    return call("torch._utils", "_rebuild_tensor_v2", b"(" + storage + rest + b"t")


class Runs:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def doubled(inner: bytes, times: int = 40) -> bytes:
    """[[…], […]] of one list, which is [[…], […]] of one list, and so on: small here, endless to who reads it."""
    made = b"\x80\x02" + inner + b"q\0"
    for _ in range(times):
        made += b"]q\1(h\0h\0eq\0"
    return made


def saved(value) -> object:
    return lambda path: torch.save(value, path)


def bytes_of(content: bytes) -> object:
    return lambda path: path.write_bytes(content)


FILES = {
    # what runs code, or would
    "os.mkdir": (saved({"format": Runs(os.mkdir, MARK)}), "asks for posix.mkdir.* nothing in it was run"),
    "os.mkdir, older format": (
        lambda path: torch.save({"a": Runs(os.mkdir, MARK)}, path, _use_new_zipfile_serialization=False),
        "asks for posix.mkdir.* nothing in it was run",
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Runs(os.mkdir, MARK))), "not a file of torch.save"),
    "a whole module": (saved(nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear"),
    "a class that is not allowed": (saved({"a": collections.ChainMap()}), "asks for collections.ChainMap"),
    "another's attribute": (lambda path: archive(path, b"\x80\x02c_codecs\nencode\n}b."), "not a file of torch.save"),
    # what is no such file
    "empty": (bytes_of(b""), "is empty"),
    "text": (bytes_of(b"root:x:0:0:root:/root:/bin/bash\n" * 30), "not a file of torch.save"),
    "a zip file": (lambda path: zipfile.ZipFile(path, "w").close(), "zip file, but not one of torch.save"),
    "TorchScript": (lambda path: torch.jit.script(nn.ReLU()).save(path), "is a program|is compressed"),
    "cut": (lambda path: path.write_bytes(whole(path)[:-30]), "truncated or damaged"),
    "a bit": (lambda path: path.write_bytes(flipped(whole(path), b"model", 2)), "wrong checksum"),
    "directories that differ": (lambda path: path.write_bytes(b"PK" + b"x" * 30 + whole(path)), "directory is damaged"),
    # what takes memory or time
    "a zip bomb": (
        lambda path: archive(path, b"\x80\x02}.", {"0": bytes(600 * MiB)}, zipfile.ZIP_DEFLATED),
        "compressed and expands to",
    ),
    "an overlapping bomb": (lambda path: overlapping(path), "claim to be larger than the file"),
    "bytearray": (
        lambda path: archive(path, b"\x80\x02" + call("__builtin__", "bytearray", number(1 << 40) + b"\x85") + b"."),
        "asks for __builtin__.bytearray",
    ),
    "a huge tensor": (
        lambda path: archive(path, b"\x80\x02" + call("torch", "FloatTensor", number(1 << 40) + b"\x85") + b"."),
        "asks for torch.FloatTensor",
    ),
    "a storage larger than its record": (
        lambda path: archive(path, b"\x80\x02" + tensor("0", 1 << 40, b"K\1\x85", b"K\1\x85") + b".", {"0": bytes(4)}),
        "does not match expected size",
    ),
    "strides beyond the storage": (
        lambda path: archive(path, b"\x80\x02" + tensor("0", 1, b"K\1\x85", b"K\1\x85").replace(b"K\0K\1", b"K\1K\1")
                             + b".", {"0": bytes(4)}),
        "not a file of torch.save",
    ),
    "strides of zero": (
        lambda path: archive(
            path, b"\x80\x02" + tensor("0", 1, number(1 << 20) * 2 + b"\x86", b"K\0K\0\x86") + b".", {"0": bytes(4)}
        ),
        "larger than its numbers in the file",
    ),
    "an older file's storage": (lambda path: claims_more(path), "allocate memory"),
    "lists of lists": (lambda path: archive(path, doubled(b"]") + b"."), "more values than"),
    "a key that hashes for ever": (
        lambda path: archive(path, doubled(b")").replace(b"]q\1(h\0h\0e", b"h\0h\0\x86") + b"}h\0K\1s."),
        "tuples in tuples",
    ),
    "text a million times": (
        lambda path: archive(path, LONG_TEXT + b"q\0](" + b"h\0" * 1000 + b"e."),
        "more values than",
    ),
    "bytes made a million times": (
        lambda path: archive(
            path,
            LONG_TEXT + b"q\0]("
            + call("_codecs", "encode", b"h\0X\x06\0\0\0latin1\x86") * 1000 + b"e.",
        ),
        "copies its text more often than",
    ),
    "many lists": (lambda path: archive(path, b"\x80\x02](" + b"]" * 200_000 + b"e."), "more values than"),
    "3000 levels": (lambda path: archive(path, b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b"."), "lists in lists"),
    "a list of itself": (lambda path: archive(path, b"\x80\x02]q\0h\0a."), "lists in lists|more values"),
}  # fmt: skip


def whole(path: Path) -> bytes:
    torch.save({"model": torch.arange(100.0)}, path)
    return path.read_bytes()


def flipped(content: bytes, after: bytes, by: int) -> bytes:
    place = content.index(after) + by
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def overlapping(path: Path) -> None:
    """A hundred records which are all the same megabyte."""
    archive(path, b"\x80\x02}.", {f"{i:03}": bytes(MiB if i == 0 else 0) for i in range(100)})
    content = bytearray(path.read_bytes())
    # The directory's entry of the first of them; the name in the record itself comes before.
    place = content.index(b"x/data/000", content.index(b"PK\1\2")) - 46
    entry = bytes(content[place : place + 46 + len("x/data/000")])
    for i in range(100):
        content[place : place + len(entry)] = entry.replace(b"000", b"%03d" % i)
        place += len(entry)
    path.write_bytes(content)


def claims_more(path: Path) -> None:
    torch.save({"model": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x4dNtq", number(1 << 40) + b"Ntq"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(60)
def test_a_bad_file_is_refused_at_once_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # With the true limit it takes a few seconds.
    monkeypatch.setattr(torch_files, "MAX_VALUES", 100_000)
    make, words = FILES[name]
    make(tmp_path / "best.pt")
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(UserError, match=f"(?s)best.pt is not a readable checkpoint: .*({words})") as error:
            read_checkpoint(tmp_path / "best.pt")
        assert tracemalloc.get_traced_memory()[1] < 700 * MiB and time.perf_counter() - begin < 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    with pytest.raises(WeightsError, match=f"weights file best.pt cannot be read: .*({words})"):
        read_weights("best.pt", "ghostnet", 1.0)
    assert not Path(MARK).exists()


def test_the_mark_would_be_made_by_an_ordinary_unpickler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FILES["os.mkdir"][0](tmp_path / "best.pt")
    torch.load("best.pt", weights_only=False)
    assert Path(MARK).exists()


ODD = {
    "parameter": nn.Parameter(torch.randn(3, 4)),
    "part": torch.randn(3, 4)[:, ::2],
    "turned": torch.randn(3, 4).t(),
    "counter": collections.Counter("ab"),  # of a scheduler's milestones
    "half": torch.randn(5).half(),
    "bfloat16": torch.randn(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "none": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "plain": [None, True, 3, -(2**40), 0.1, float("nan"), "a\u00e4\U0001f600", b"\xff\0", (1, (2,)), {1: {}}],
    "state": nn.BatchNorm2d(3).state_dict(),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(zipped, tmp_path, trained):
    # The older format has no such numbers.
    odd = {**ODD, "float8": torch.zeros(5, dtype=torch.float8_e4m3fn)} if zipped else ODD
    torch.save(odd, tmp_path / "odd.pt", _use_new_zipfile_serialization=zipped)
    for path in (tmp_path / "odd.pt", trained / "last.pt"):
        assert_same(read_torch_file(path), torch.load(path, weights_only=True))


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_same(one, two)
    else:
        assert type(found) is type(expected) and (found == expected or expected != expected)


def test_tensors_that_share_their_numbers_still_do(tmp_path):
    base = torch.arange(6.0)
    torch.save({"a": base, "b": base[2:]}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    found["a"][2] = 9
    assert found["b"][0] == 9


def test_the_limit_of_sizes_can_be_raised(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(MiB)}, tmp_path / "x.pt")
    monkeypatch.setenv(MAX_FILE_SIZE_VARIABLE, "0.001")
    with pytest.raises(UnreadableFile, match=rf"the limit is 0\.001; {MAX_FILE_SIZE_VARIABLE}=… in the environment"):
        read_torch_file(tmp_path / "x.pt")
    monkeypatch.setenv(MAX_FILE_SIZE_VARIABLE, "much")
    with pytest.raises(UnreadableFile, match="is not a number"):
        read_torch_file(tmp_path / "x.pt")
    monkeypatch.setenv(MAX_FILE_SIZE_VARIABLE, "0.01")
    assert read_torch_file(tmp_path / "x.pt")["a"].numel() == MiB


@pytest.mark.parametrize("header", [b"\xff" * 8, (1 << 23).to_bytes(8, "little"), b"\2\0\0\0\0\0\0\0{]", b""])
def test_bad_safetensors(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(header)
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read: it is"):
        read_weights(tmp_path / "x.safetensors", "ghostnet", 1.0)


def test_copies_of_one_array_take_its_memory_once(tmp_path):
    """Ten thousand names of one megabyte; and a hundred arrays of the same bytes."""
    array = np.zeros(MiB // 4, np.float32)
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({f"w{i}": array for i in range(10_000)}, 4))
    state = read_pdparams(path)
    assert len(state) == 10_000 and len({value.data_ptr() for value in state.values()}) == 1
    # Memo 2 is the function that makes an array, 10 its arguments, 22 the state that holds the bytes.
    more = b"".join(b"X\x03\0\0\0n%02dh\x02h\x0aRh\x16bs" % i for i in range(100))
    path.write_bytes(pickle.dumps({"w": array}, 2)[:-1] + more + b".")
    with pytest.raises(UnreadableFile, match="arrays claim to be larger than the file"):
        read_pdparams(path)


# ---- sections


def without(name):
    return lambda content: content.pop(name)


def with_(name, value):
    return lambda content: content.update({name: value})


def not_finite(content):
    content["model"]["backbone.body.conv_stem.weight"][0, 0, 0, 0] = float("nan")


def infinite(content):
    content["model"]["backbone.body.bn1.running_var"][0] = float("inf")


SECTIONS = {
    "no config": (without("config"), "section 'config' is missing"),
    "no classes": (without("classes"), "section 'classes' is missing"),
    "no weights": (without("model"), "section 'model' is missing"),
    "config is a list": (with_("config", [1, 2]), "section 'config' must be a dict"),
    "config is a tensor": (with_("config", torch.zeros(3)), "section 'config' must be a dict"),
    "config of tensors": (with_("config", {"model": torch.zeros(3)}), "section 'config' must be a dict of plain"),
    "config of another kind": (with_("config", {"a": {"b": 1}}), "unknown key 'a'"),
    "weights are a tensor": (with_("model", torch.zeros(3)), "section 'model' must be a dict of tensors"),
    "weights are numbers": (with_("model", {"a": 1}), "section 'model' must be a dict of tensors"),
    "no weights at all": (with_("model", {}), "is of another model"),
    "average is text": (with_("ema", "text"), "section 'ema' must be"),
    "classes are a list": (with_("classes", ["a", "b"]), "section 'classes' must be names"),
    "classes are numbers": (with_("classes", {"names": [1, 2], "ids": [1, 2]}), "section 'classes' must be names"),
    "classes without ids": (with_("classes", {"names": ["a", "b"]}), "section 'classes' must be names"),
    "fewer ids": (with_("classes", {"names": ["a", "b"], "ids": [1]}), "section 'classes' must be names"),
    "one name twice": (with_("classes", {"names": ["a", "a"], "ids": [1, 2]}), "section 'classes' must be names"),
    "one class more": (with_("classes", {"names": ["a", "b", "c"], "ids": [1, 2, 3]}), "is of another model"),
    "no class": (with_("classes", {"names": [], "ids": []}), "section 'classes' must be names"),
    "numbers are text": (with_("numbers", "good"), "section 'numbers' must be"),
    "AP is text": (with_("numbers", {"AP": "good"}), "section 'numbers' must be"),
    "another format": (with_("format", "x\n" * 300), "expected format 'ghostnet-detection/1'"),
    "the format is a tensor": (with_("format", torch.zeros(3)), "expected format 'ghostnet-detection/1'"),
    "NaN": (not_finite, "tensor backbone.body.conv_stem.weight has numbers that are not finite"),
    "infinite": (infinite, "tensor backbone.body.bn1.running_var has numbers that are not finite"),
}


@pytest.fixture(scope="session")
def content_of(trained):
    return lambda: read_checkpoint(trained / "best.pt")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_checkpoint_with_a_wrong_section(name, content_of, tmp_path):
    change, words = SECTIONS[name]
    content = content_of()
    change(content)
    save_checkpoint(tmp_path / "best.pt", content)
    with pytest.raises(UserError, match=r"best\.pt") as error:
        Predictor(tmp_path / "best.pt", "cpu")
    # A config's faults are a line each.
    assert words in str(error.value) and ("\n" not in str(error.value) or "unknown key" in words)


@pytest.mark.parametrize("tool", ["detect", "evaluate", "export", "report", "benchmark", "ghostify"])
@pytest.mark.parametrize("name", ["/etc/passwd", "no classes", "config is a list", "NaN", "hostile"])
def test_every_tool_refuses_bad_checkpoints(tool, name, content_of, tmp_path, monkeypatch):
    """Exit status 2 and one line, before any output is made."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    words = "not a readable checkpoint"
    if name in SECTIONS:
        content = content_of()
        SECTIONS[name][0](content)
        words = SECTIONS[name][1]
        save_checkpoint(path, content)
    elif name == "hostile":
        FILES["os.mkdir"][0](path)
    else:
        path.write_bytes(Path(name).read_bytes())
    arguments = {"detect": ["x.jpg"], "benchmark": ["--size", "64"], "export": ["--format", "onnx"]}.get(tool, [])
    (tmp_path / "x.jpg").write_bytes(Path(__file__).read_bytes())
    target = tmp_path if tool == "report" else path
    if tool == "report":
        (tmp_path / "metrics.jsonl").write_text("")
    run(tool, target, *arguments).assert_error(words)
    assert {left.name for left in tmp_path.iterdir()} <= {"best.pt", "x.jpg", "metrics.jsonl"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pretrained_weights_that_are_not_finite(suffix, tmp_path):
    from safetensors.torch import save_file

    network = build_backbone("ghostnet", width=0.5)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state["bn1.running_var"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"w\{suffix}.*bn1\.running_var has numbers that are not finite"):
        load_weights(network, *read_weights(tmp_path / f"w{suffix}", "ghostnet", 0.5))
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


def test_etc_passwd_as_pretrained_weights(tmp_path):
    from detection.config_io import load_config
    from detection.models.build import build_model

    config = load_config("configs/retina_ghost_320.yaml", ["model.backbone.weights=/etc/passwd"])
    with pytest.raises(UserError, match=r"model\.backbone\.weights: weights file /etc/passwd cannot be read: it is no"):
        build_model(config, 2)
