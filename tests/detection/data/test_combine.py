"""Several data sets to train on: classes, ids, weights, what is mixed."""

from collections import Counter

import numpy as np
import pytest
from conftest import tiny_raw, write_coco
from small_sets import write_part

from detection import UserError
from detection.config import TrainSourceConfig
from detection.config_io import parse_config
from detection.data.annotations import ImageSets
from detection.data.combine import class_ids, combine, set_names
from detection.data.dataset import SampleKey, build_dataset
from detection.data.formats.coco import read_coco
from detection.data.load_split import check_known_classes, read_split
from detection.data.sampler import TrainBatchSampler


@pytest.fixture()
def two_sets(tmp_path):
    """Config: half of the images with their discs, the other half with their squares; ids of val differ."""
    folder = tmp_path / "set"
    write_coco(folder)
    raw = tiny_raw(folder, tmp_path / "run")
    raw["data"]["train"] = [
        {"annotations": write_part(folder, "discs", ["disc"], slice(0, None, 2), {"disc": 1})},
        {"annotations": write_part(folder, "squares", ["square"], slice(1, None, 2), {"square": 1})},
    ]
    raw["data"]["val"] = {"annotations": write_part(folder, "val", ["disc", "square"], ids={"disc": 1, "square": 9})}
    return parse_config(raw, "test")


def changed(config, **data):
    raw = config.model_dump()
    raw["data"] |= data
    return parse_config(raw, "test")


def test_one_class_list_by_name(two_sets):
    index = read_split(two_sets.data, "train")
    assert index.class_names == ("disc", "square") and len(index) == 12
    assert index.sets.names == ("discs", "squares") and index.sets.of_image.tolist() == [0] * 6 + [1] * 6
    assert index.sets.complete.tolist() == [[True, False], [False, True]]
    for i in range(12):
        assert set(index.training_boxes(i)[1].tolist()) <= {1 if i < 6 else 2}
    # Both files call their class 1: the second gets a free id, in training that of val.
    assert index.category_ids.tolist() == [1, 2]
    assert class_ids(index.class_names, [read_split(two_sets.data, "val"), index]) == (1, 9)
    assert "set squares: 6 images, complete for 1 of 2 classes (square)" in index.report()
    part = index.part([7, 2])
    assert part.sets.of_image.tolist() == [1, 0]


def test_one_set_with_complete_annotations_is_as_ever(tiny_config):
    index = read_split(tiny_config.data, "train")
    assert index.sets is None
    target = build_dataset(tiny_config, "train")[SampleKey(0, 2)][1]
    assert "complete_classes" not in target
    raw = tiny_config.model_dump()["data"]["train"]
    twice = build_dataset(changed(tiny_config, train=[raw, raw]), "train")
    assert "complete_classes" not in twice[SampleKey(0, 2)][1] and len(twice) == 24
    # The images of the first set are augmented as if it were alone.
    alone, pair = (s[SampleKey(3, 5)] for s in (build_dataset(tiny_config, "train"), twice))
    assert np.array_equal(alone[0], pair[0]) and np.array_equal(alone[1]["boxes"], pair[1]["boxes"])


def test_a_target_says_for_which_classes_it_is_complete(two_sets):
    dataset = build_dataset(two_sets, "train")
    assert dataset[SampleKey(0, 1)][1]["complete_classes"].tolist() == [True, False]
    assert dataset[SampleKey(0, 8)][1]["complete_classes"].tolist() == [False, True]
    assert "complete_classes" not in build_dataset(two_sets, "val")[SampleKey(0, 1)][1]


def test_complete_classes_of_the_config(two_sets, tiny_config):
    raw = two_sets.model_dump()["data"]["train"]
    raw[0]["complete_classes"], raw[1]["complete_classes"] = ["square", "disc"], []
    assert read_split(changed(two_sets, train=raw).data, "train").sets.complete.tolist() == [[True] * 2, [False] * 2]
    raw[0]["complete_classes"] = ["sqare"]
    with pytest.raises(UserError, match=r"complete_classes of .*discs\.json: no set has a class 'sqare'.*'square'"):
        read_split(changed(two_sets, train=raw).data, "train")
    single = {**tiny_config.model_dump()["data"]["train"], "complete_classes": ["square"]}
    target = build_dataset(changed(tiny_config, train=single), "train")[SampleKey(0, 2)][1]
    assert target["complete_classes"].tolist() == [True, False]


def test_a_merged_class_is_complete_where_all_its_members_are(two_sets):
    raw = two_sets.model_dump()["data"]["train"]
    merged = read_split(changed(two_sets, classes={"thing": ["disc", "square"]}).data, "train")
    assert merged.class_names == ("thing",) and merged.sets.complete.tolist() == [[False], [False]]
    raw[0]["complete_classes"] = ["disc", "square"]
    merged = read_split(changed(two_sets, train=raw, classes={"thing": ["disc", "square"]}).data, "train")
    assert merged.sets.complete.tolist() == [[True], [False]]
    chosen = changed(two_sets, classes=["square"])
    assert read_split(chosen.data, "train").sets.complete.tolist() == [[False], [True]]
    assert read_split(chosen.data, "val").class_names == ("square",)


def test_val_may_lack_classes_but_not_have_others(two_sets, coco_set):
    train = read_split(two_sets.data, "train")
    check_known_classes(train, read_coco(write_part(coco_set, "discs", ["disc"])))
    discs = read_split(changed(two_sets, train=two_sets.model_dump()["data"]["train"][:1]).data, "train")
    with pytest.raises(UserError, match=r"val\.json has classes that no set of data\.train has: square"):
        check_known_classes(discs, read_split(two_sets.data, "val"))


def test_names_of_sets_are_as_short_as_they_can_be():
    def names(*paths, split=None):
        return set_names([TrainSourceConfig(annotations=path, split=split) for path in paths])

    assert names("a/train.json", "b/val.json") == ["train", "val"]
    assert names("a/train.json", "b/train.json") == ["a/train", "b/train"]
    assert names("/x/VOC", split="test") == ["VOC:test"]
    assert len(set(names("a/train.json", "a/train.json"))) == 2


def test_only_images_of_one_set_are_mixed(two_sets):
    """A mosaic of both would have squares without boxes in the image whose squares are complete."""
    raw = two_sets.model_dump()
    raw["data"]["augment"] |= {"mosaic": 1.0, "mixup": 1.0, "copy_paste": 1.0}
    dataset = build_dataset(parse_config(raw, "test"), "train")
    for i in range(12):
        labels = dataset[SampleKey(0, i)][1]["labels"].tolist()
        assert set(labels) <= {1 if i < 6 else 2}


# ---- how often an image comes


def sampler_of(weights, epoch=0, **options):
    counts = (20, 10, 6)[: len(weights)]
    sets = ImageSets(
        names=tuple("abc"[: len(weights)]),
        of_image=np.repeat(np.arange(len(weights)), counts),
        complete=np.ones((len(weights), 1), bool),
        weights=tuple(weights),
    )
    sizes = np.tile([[100, 80], [80, 100]], (sum(counts) // 2, 1))
    sampler = TrainBatchSampler(sizes, 1, 7, sets=sets, **options)
    sampler.set_epoch(epoch)
    return sampler


def test_weights_say_how_often_an_epoch_has_an_image():
    seen = Counter()
    for epoch in range(4):
        keys = [key for batch in sampler_of((1.0, 2.5, 0.5), epoch) for key in batch]
        assert len(keys) == len(sampler_of((1.0, 2.5, 0.5))) == 20 + 25 + 3
        counts = Counter(key.image for key in keys)
        assert all(counts[i] == 1 for i in range(20)) and all(counts[i] in (2, 3) for i in range(20, 30))
        assert len({(key.image, key.repeat) for key in keys}) == len(keys)
        seen += counts
    # Over the epochs no image of a set comes more often than another.
    assert {seen[i] for i in range(20, 30)} == {10} and {seen[i] for i in range(30, 36)} == {2}


def test_weights_of_one_change_nothing_and_small_ones_leave_no_set_out():
    plain = TrainBatchSampler(np.tile([[100, 80], [80, 100]], (15, 1)), 1, 7)
    assert list(plain) == list(sampler_of((1.0, 1.0)))
    keys = [key.image for batch in sampler_of((1.0, 0.001), 3) for key in batch]
    assert sum(image >= 20 for image in keys) == 1


def test_ranks_share_the_batches_and_a_stopped_epoch_goes_on():
    whole = list(sampler_of((1.0, 2.5, 0.5), 2))
    parts = [list(sampler_of((1.0, 2.5, 0.5), 2, rank=rank, world_size=2)) for rank in range(2)]
    assert [one + two for one, two in zip(*parts, strict=True)] == [
        a + b for a, b in zip(whole[::2], whole[1::2], strict=True)
    ]
    stopped = sampler_of((1.0, 2.5, 0.5))
    stopped.set_epoch(2, start=30)
    assert list(stopped) == whole[30:]


def test_a_repeated_image_is_augmented_in_another_way(tiny_config):
    dataset = build_dataset(tiny_config.with_overrides(["data.augment.brightness=0.3"]), "train")
    first, again = (dataset[SampleKey(1, 4, repeat=repeat)][0] for repeat in (0, 1))
    assert not np.array_equal(first, again)
    assert np.array_equal(again, dataset[SampleKey(1, 4, repeat=1)][0])


def test_crowds_and_sizes_are_kept(coco_set):
    index = read_coco(coco_set / "annotations.json")
    source = TrainSourceConfig(annotations=index.source)
    both = combine([index, index], [source, source])
    assert both.crowd.tolist() == index.crowd.tolist() * 2 and both.sizes.tolist() == index.sizes.tolist() * 2
    assert both.boxes.tolist() == index.boxes.tolist() * 2 and both.labels.tolist() == index.labels.tolist() * 2
