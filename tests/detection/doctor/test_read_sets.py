"""Checks of Pascal VOC and YOLO datasets."""

from faulty_datasets import errors_and_warnings
from voc_yolo_sets import write_voc, write_yolo

from detection.doctor.read_sets import read_sets
from detection.doctor.run_checks import run_checks
from detection.doctor.text_report import format_report


def test_voc(tmp_path):
    folder = write_voc(tmp_path / "voc")
    sets, _ = read_sets(str(folder))
    assert [entries.split for entries in sets] == ["train", "val"] and sets[0].format == "voc"
    assert errors_and_warnings(run_checks(sets)) <= {"class-few"}
    (folder / "Annotations" / "7.xml").write_text("<annotation>")
    text = (folder / "Annotations" / "8.xml").read_text()
    (folder / "Annotations" / "8.xml").write_text(text.replace("<xmax>25</xmax>", "<xmax>900</xmax>"))
    (folder / "JPEGImages" / "9.jpg").write_bytes(b"")
    report = run_checks(read_sets(str(folder))[0])
    assert errors_and_warnings(report) - {"class-few"} == {"file-broken", "box-beyond", "image-unreadable"}
    assert "7.xml" in format_report(report)


def test_yolo(tmp_path):
    folder = write_yolo(tmp_path / "yolo")
    for target in (folder, folder / "data.yaml"):
        sets, config = read_sets(str(target))
        assert config is None and sets[0].format == "yolo"
        assert run_checks(sets).findings == []
    (folder / "labels" / "3.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.9 0.5 0.4 0.1")
    (folder / "labels" / "4.txt").write_text("0 0.5 0.5 0.1\n1 0.5 0.5 0 0.1")
    report = run_checks(read_sets(str(folder))[0])
    assert errors_and_warnings(report) == {"category-unknown", "entry-broken", "box-beyond", "box-degenerate"}
    assert "3.txt, line 1" in format_report(report)
