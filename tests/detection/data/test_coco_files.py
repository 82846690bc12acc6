"""COCO files read in windows, and kept in a cache."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from annotation_speed import compare_reading
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import UserError
from detection.data.columns import map_columns, write_columns
from detection.data.formats import index_cache, json_stream
from detection.data.formats.coco import read_coco
from detection.data.formats.detect_format import read_annotations
from detection.data.formats.json_stream import JsonError, line_of, top_level_lists
from detection.data.image_io import read_image
from detection.data.synthetic.coco_like import make_coco_like

# Texts full of what ends strings and lists, to be found out of.
TEXTS = st.text(st.sampled_from('a"\\{}[],:é\n '), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TOPS = st.fixed_dictionaries(
    {"images": st.lists(VALUES, max_size=5), "annotations": st.lists(VALUES, max_size=5)},
    optional={"info": VALUES, "x{[": VALUES, 'im"ages': VALUES},
)


@given(TOPS, st.integers(1, 60), st.sampled_from([None, 1]), st.booleans(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_lists_come_out_of_any_json_whatever_the_window(content, window, indent, ascii_only, random):
    items = list(content.items())
    random.shuffle(items)
    text = json.dumps(dict(items), indent=indent, ensure_ascii=ascii_only).encode()
    found = {"images": [], "annotations": []}
    for chunk in top_level_lists(io.BytesIO(text), found, window):
        found[chunk.key] += json.loads(chunk.text)
        assert text[chunk.offset :].startswith(chunk.text[1:-1])
    assert found == {key: content[key] for key in found}
    cut = text[: random.randrange(len(text))]
    with pytest.raises(JsonError):
        list(top_level_lists(io.BytesIO(cut), found, window))


@pytest.mark.parametrize("window", [4, 1000])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("nothing", "begins with 'noth"),
        ('{"images": [{}}', "closed by a brace|between its lists"),
        ('{"images": [{}, {},]}', "ends with a comma|Illegal|Expecting"),
        ('{"images": [{} {}]}', "without a comma|Expecting"),
        ('{"images": [{}], "images": []}', "'images' is there twice"),
        ('{"images": []} {}', "something follows"),
        ('{"images": [] "annotations": []}', "between its lists"),
        ('{"images": [{"a": "b]}', "ends in the middle"),
    ],
)
def test_what_is_not_json_is_seen(text, message, window):
    with pytest.raises((JsonError, ValueError), match=message):
        for chunk in top_level_lists(io.BytesIO(text.encode()), ("images", "annotations"), window):
            json.loads(chunk.text)


def test_a_mark_at_the_beginning_and_zeros_at_the_end_are_passed_over(coco_set):
    path = coco_set / "annotations.json"
    expected = read_coco(path).fingerprint()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\0\0")
    assert read_coco(path).fingerprint() == expected


def test_half_a_character_in_a_name_is_a_question_mark(coco_set):
    """It could be neither printed nor drawn, and a report would end at it."""
    path = coco_set / "annotations.json"
    path.write_text(path.read_text().replace('"disc"', r'"di\ud800sc"', 1))
    names = read_coco(path).class_names
    assert "di?sc" in names and "".join(names).isprintable()


def test_errors_tell_line_and_column(coco_set):
    path = coco_set / "annotations.json"
    text = json.dumps(json.loads(path.read_text()), indent=1)
    for old, new, message in (
        ('"bbox"', "bbox", "Expecting property name"),
        ("disc", "di\udcffsc", "is not UTF-8 text"),
    ):
        broken = text.replace(old, new, 1)
        path.write_bytes(broken.encode("utf-8", "surrogateescape"))
        line = next(i for i, (a, b) in enumerate(zip(text.split("\n"), broken.split("\n"), strict=True), 1) if a != b)
        with pytest.raises(UserError, match=rf"is not JSON: .*{message}.*\(line {line}, column \d+\)"):
            read_coco(path)
    (coco_set / "x").write_bytes(b"ab\ncdef\ng")
    with (coco_set / "x").open("rb") as file:
        assert line_of(file, 5) == (2, 3)


@pytest.mark.parametrize(
    "text", ['{"a": "' + "x" * 5000, '{"images": [' + "7" * 5000, "x" * 5000, '{"images": [[' + "[" * 5000]
)
def test_a_line_without_end_is_given_up(tmp_path, monkeypatch, text):
    """In small: the limit is 256 MB, what comes after that is not read (a file of gigabytes without a line break)."""
    monkeypatch.setattr(json_stream, "LARGEST_ENTRY", 1000)
    monkeypatch.setattr(json_stream, "WINDOW", 100)
    (tmp_path / "a.json").write_text(text)
    read = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    with Watched(tmp_path / "a.json") as file, pytest.raises(JsonError, match=r"takes more than|begins with"):
        list(top_level_lists(file, ("images",), 100))  # type: ignore[arg-type]
    assert sum(read) < 4000


@pytest.mark.slow
def test_two_gigabytes_in_a_line(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b'{"images": [{"file_name": "')
        for _ in range(2048):
            file.write(b"x" * (1 << 20))
    code = (
        "import sys\nfrom detection.data.formats.coco import read_coco\nfrom detection import UserError\n"
        "try: read_coco(sys.argv[1])\nexcept UserError as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, peak = done.stdout.splitlines()
    assert "an entry takes more than 256 MB" in message and int(peak) < 2_000_000


def test_windows_change_nothing(coco_set, monkeypatch):
    path = coco_set / "annotations.json"
    expected = read_coco(path).fingerprint()
    monkeypatch.setattr(json_stream.top_level_lists, "__defaults__", (64,))
    assert read_coco(path).fingerprint() == expected


def test_entries_that_the_fast_way_refuses_are_read_the_slow_way(coco_set):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    expected = read_coco(path).fingerprint()
    content["images"][3]["width"] = float(content["images"][3]["width"])
    content["annotations"][0] |= {
        "id": "a text",
        "image_id": float(content["annotations"][0]["image_id"]),
        "score": float("nan"),
    }
    content["annotations"][2]["iscrowd"] = False
    path.write_text(json.dumps(content))
    assert read_coco(path).fingerprint() == expected
    content["images"][3]["file_name"] = "half a letter \ud800"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected is the name of an image"):
        read_coco(path)


# ---- the cache


@pytest.fixture()
def cached(coco_set, monkeypatch, tmp_path) -> Path:
    """An annotation file that is large enough for a cache."""
    monkeypatch.setattr(index_cache, "FROM_BYTES", 1)
    monkeypatch.setattr(index_cache, "CACHE_FOLDER", tmp_path / "home")
    return coco_set / "annotations.json"


def test_the_second_time_it_comes_out_of_the_cache(cached, monkeypatch):
    plain = read_coco(cached)
    first = read_annotations(cached)
    place = cached.with_name(".annotations.json.index")
    assert place.is_file() and first.mapped is not None
    monkeypatch.setattr("detection.data.formats.coco.parse_coco", None)  # would fail
    second = read_annotations(cached)
    for index in (first, second):
        assert index.fingerprint() == plain.fingerprint() and index.report() == plain.report()
        assert index.images == plain.images and index.class_names == plain.class_names
        assert not index.boxes.flags.writeable and index.boxes.base is not None
    assert read_annotations(cached, images="elsewhere").images == "elsewhere"


def test_a_changed_file_is_read_anew(cached):
    before = read_annotations(cached)
    content = json.loads(cached.read_text())
    content["annotations"][0]["bbox"][0] += 1
    status = cached.stat()
    cached.write_text(json.dumps(content))
    # The same length and the same time: the samples of the content tell.
    assert cached.stat().st_size == status.st_size
    os.utime(cached, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = read_annotations(cached)
    assert after.boxes[0, 0] != before.boxes[0, 0] and after.fingerprint() == read_coco(cached).fingerprint()


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "text", "version", "header"])
def test_a_cache_that_is_damaged_or_old_is_made_anew(cached, harm, monkeypatch):
    expected = read_annotations(cached).fingerprint()
    place = cached.with_name(".annotations.json.index")
    data = bytearray(place.read_bytes())
    if harm == "version":
        monkeypatch.setattr(index_cache, "VERSION", index_cache.VERSION + 1)
    elif harm == "cut":
        place.write_bytes(data[:-100])
    elif harm == "empty":
        place.write_bytes(b"")
    elif harm == "text":
        place.write_text("hello")
    elif harm == "header":
        data[24:32] = b"\xff" * 8
        place.write_bytes(data)
    else:
        data[len(data) // 2] ^= 1
        place.write_bytes(data)
    harmed = place.read_bytes()
    assert read_annotations(cached).fingerprint() == expected
    assert place.read_bytes() != harmed


def test_where_the_cache_is_when_the_folder_cannot_be_written(cached, monkeypatch, tmp_path, caplog):
    write = index_cache.write_columns

    def refuse(path, *more):
        if path.parent == cached.parent or not (tmp_path / "home").is_dir():
            raise UserError("read-only")
        write(path, *more)

    monkeypatch.setattr(index_cache, "write_columns", refuse)
    index = read_annotations(cached)
    assert index.mapped is not None and index.mapped.path.parent == tmp_path / "home"
    assert [path.name for path in cached.parent.iterdir() if path.suffix == ".index"] == []
    # Neither there: it is said, and goes on without.
    monkeypatch.setattr(index_cache, "CACHE_FOLDER", cached / "no folder")
    with caplog.at_level(logging.WARNING):
        assert read_annotations(cached).mapped is None
    assert "it is read again each time" in caplog.text


def test_a_small_file_has_no_cache(coco_set):
    assert read_annotations(coco_set / "annotations.json").mapped is None
    assert not list(coco_set.glob(".*"))


def test_another_process_opens_the_cache_in_place_of_a_copy(cached):
    index = read_annotations(cached)
    data = pickle.dumps(index)
    assert len(data) < 2000 < index.boxes.nbytes + 2000
    again = pickle.loads(data)
    assert again.fingerprint() == index.fingerprint() and again.mapped is not None
    # What is made of it goes along: only arrays that are the file's are left out.
    part = index.part([3, 1])
    assert pickle.loads(pickle.dumps(part)).fingerprint() == part.fingerprint()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_fingerprint, (index,)) == index.fingerprint()
    os.utime(cached, (0, 0))
    read_annotations(cached)  # written anew, with another stamp
    with pytest.raises(UserError, match="was written anew meanwhile"):
        pickle.loads(data)


def _fingerprint(index) -> str:
    return index.fingerprint()


def test_columns_of_all_kinds(tmp_path):
    columns = {
        "text": np.array(["a", "éß"]),
        "nothing": np.zeros((0, 4)),
        "flags": np.array([True, False]),
        "table": np.arange(6.0).reshape(2, 3)[:, ::-1],
    }
    write_columns(tmp_path / "x", {"a": 1}, columns)
    file = map_columns(tmp_path / "x")
    assert file.header == {"a": 1}
    for name, array in columns.items():
        assert np.array_equal(file.columns[name], array) and file.columns[name].dtype == array.dtype


def test_a_file_like_cocos(tmp_path):
    size = make_coco_like(tmp_path / "a.json", images=50, boxes=400)
    index = read_annotations(tmp_path / "a.json")
    assert len(index) == 50 and len(index.boxes) == 400 and len(index.class_names) == 80
    # As long for each box as COCO's, which has 470 MB, within a fifth.
    assert 0.8 < size / (470e6 / 860_001 * 400) < 1.3
    with pytest.raises(UserError, match="has less than 16 MB"):
        compare_reading(tmp_path / "a.json")


def test_images_like_cocos(tmp_path, coco_set):
    folder = tmp_path / "like"
    folder.mkdir()
    make_coco_like(folder / "a.json", images=9, boxes=30, photographs=coco_set / "images")
    index = read_annotations(folder / "a.json")
    images = [read_image(folder / "images" / str(name)) for name in index.file_names]
    assert [p.shape[1::-1] for p in images] == [tuple(size) for size in index.sizes.tolist()]
    assert len({p.tobytes() for p in images}) == 9
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images"):
        make_coco_like(folder / "a.json", images=9, boxes=30, photographs=tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        make_coco_like(folder / "a.json", images=9, boxes=30, photographs=tmp_path / "nowhere")


@pytest.mark.slow
def test_less_time_and_a_quarter_of_the_memory(tmp_path):
    make_coco_like(tmp_path / "a.json", images=20_000, boxes=145_000)
    rows = [line.split() for line in compare_reading(tmp_path / "a.json").splitlines()[2:]]
    times, memories = ([float(row[i]) for row in rows] for i in (-3, -1))
    assert times[1] < 0.7 and memories[1] < 0.35 and times[3] < 0.05


@pytest.mark.slow
def test_memory_of_workers_stays_where_it_is(tmp_path):
    """Lists of dicts would be copied page by page as their reference counts are touched (pytorch#13246)."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    make_coco_like(tmp_path / "a.json", images=20_000, boxes=145_000)
    index = read_annotations(tmp_path / "a.json")
    assert index.mapped is not None

    class Boxes(Dataset):
        def __len__(self) -> int:
            return len(index)

        def __getitem__(self, i: int) -> tuple[int, int, int]:
            count = len(index.training_boxes(i)[0])
            # Asking takes milliseconds.
            return count, os.getpid(), _private_kilobytes() if i % 100 == 0 else 0

    loader = DataLoader(Boxes(), batch_size=100, shuffle=True, num_workers=2, persistent_workers=True)
    first: dict[int, int] = {}
    highest: list[dict[int, int]] = []
    for _ in range(5):
        highest.append({})
        for _, pids, memory in loader:
            for pid, kilobytes in zip(pids.tolist(), memory.tolist(), strict=True):
                if kilobytes:
                    first.setdefault(pid, kilobytes)
                highest[-1][pid] = max(kilobytes, highest[-1].get(pid, 0))
    assert torch.tensor([len(h) for h in highest]).eq(2).all()
    for pid, kilobytes in highest[-1].items():
        # As dicts, 145 000 annotations would be 60 MB that each worker copies, most of it in the first epoch. A worker
        # copies some of the objects of the process that it is a fork of, too: after many tests, these are 9 MB.
        assert kilobytes < first[pid] + 20_000, (first, highest)
        # … and less from epoch to epoch: 2.9 MB in four epochs.
        assert kilobytes < highest[0][pid] + 6000, (first, highest)


def _private_kilobytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
