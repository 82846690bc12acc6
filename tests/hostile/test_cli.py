"""How a command ends, whatever happens inside of it; and the checks of files that all commands share."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from odd_files import dangling, fifo, loop, unix_socket
from processes import ROOT

from detection.cli import run_tool as cli
from detection.core import crash_report
from detection.core.errors import UserError
from detection.core.files import open_regular_file, read_file
from detection.core.outputs import check_outputs, is_own, write_output
from detection.core.progress import LINE_EVERY

ODD_FILES = {
    "fifo": (fifo, "a named pipe"),
    "socket": (unix_socket, "a socket"),
    "device": (lambda folder: Path("/dev/zero"), "a device"),
    "folder": (lambda folder: folder, "a folder"),
    "loop of links": (loop, "leads back to itself"),
    "dangling link": (dangling, "nowhere.jpg, which does not exist"),
    "absent": (lambda folder: folder / "absent.jpg", "does not exist"),
    "NUL": (lambda folder: folder / "a\0b.jpg", "NUL"),
    "long name": (lambda folder: folder / ("x" * 300), "too long"),
}


@pytest.mark.parametrize("name", ODD_FILES)
@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(name, tmp_path):
    make, words = ODD_FILES[name]
    path = make(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        open_regular_file(path, "image")
    assert str(error.value).startswith("image ") and "\0" not in str(error.value)


def test_a_size_limit_holds_for_files_without_a_size(tmp_path):
    (tmp_path / "large").write_bytes(bytes(1001))
    with pytest.raises(UserError, match="1,001 bytes, the limit is 1,000"):
        read_file(tmp_path / "large", largest=1000)
    assert len(read_file(tmp_path / "large", largest=1001)) == 1001
    if Path("/proc/kallsyms").exists():  # its size is 0
        with pytest.raises(UserError, match="too large"):
            read_file("/proc/kallsyms", largest=10)


def end_of(main, capsys, monkeypatch, tmp_path) -> tuple[int, str]:
    monkeypatch.setattr(crash_report, "CACHE_FOLDER", tmp_path / "cache")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.run_tool(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return end.value.code, err


def test_an_unforeseen_exception_is_one_line_and_its_trace_a_file(capsys, monkeypatch, tmp_path):
    def main():
        raise ZeroDivisionError("one\ntwo")

    code, err = end_of(main, capsys, monkeypatch, tmp_path)
    assert code == cli.UNEXPECTED and "unexpected ZeroDivisionError: one." in err and "report" in err
    (trace,) = (tmp_path / "cache" / "traces").iterdir()
    assert str(trace) in err
    assert "in main" in trace.read_text() and "ZeroDivisionError: one\ntwo" in trace.read_text()


def test_a_trace_that_cannot_be_kept_is_no_second_fault(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(crash_report.tempfile, "gettempdir", lambda: str(tmp_path / "cache" / "file"))
    (tmp_path / "cache").write_text("in the way of the folder")
    code, err = end_of(lambda: [][1], capsys, monkeypatch, tmp_path)
    assert code == cli.UNEXPECTED and "no file" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.json"), "x.json: No space left"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), b"y"), "y: Permission denied"),
        (MemoryError(), "out of memory"),
    ],
)
def test_faults_of_the_system_are_told_as_such(error, words, capsys, monkeypatch, tmp_path):
    def main():
        raise error

    code, err = end_of(main, capsys, monkeypatch, tmp_path)
    assert code == 2 and words in err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("numbers", [("SIGTERM",), ("SIGHUP",), ("SIGINT",), ("SIGINT", "SIGTERM", "SIGHUP") * 5])
def test_signals_end_a_command_in_order(numbers):
    """One, or several together: the second does not cut the closing in the middle."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from detection.cli.run_tool import run_tool\n"
        "def main():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(0.2)\n"
        "        print('closed', flush=True)\n"
        "run_tool(main)"
    )
    with subprocess.Popen([sys.executable, "-c", script], text=True, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(getattr(signal, number))
            time.sleep(0.01)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "closed\n", "stopped\n")


def test_nohup_stays_in_force():
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from detection.cli.run_tool import run_tool\n"
        "run_tool(lambda: os.kill(os.getpid(), signal.SIGHUP))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0


# What must not be overwritten.


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_output_is_never_an_input(tmp_path):
    val = write(tmp_path / "val.json", "{}")
    (tmp_path / "link.json").symlink_to(val)
    os.link(val, tmp_path / "hard.json")
    for name in ("val.json", "link.json", "hard.json", "../" + tmp_path.name + "/val.json"):
        with pytest.raises(UserError, match="is an input of the same command"):
            check_outputs([tmp_path / name], [val], force=True)


def test_files_of_the_user_are_kept(tmp_path):
    check_outputs([tmp_path / "new" / "out.json"], [tmp_path / "absent", None])
    assert (tmp_path / "new").is_dir()
    notes = [write(tmp_path / f"notes{i}.json", "mine") for i in range(4)]
    with pytest.raises(UserError, match=r"notes0.json: this toolkit did not write it .*--force"):
        check_outputs(notes[:1])
    with pytest.raises(UserError, match=r"4 files would be overwritten: .*notes0.json, .*…: this toolkit did not"):
        check_outputs(notes)
    check_outputs(notes, force=True)


def test_own_files_are_overwritten_until_they_are_edited(tmp_path):
    path = tmp_path / "numbers.json"
    assert not is_own(path)
    for text in (b"one", b"two"):
        check_outputs([path])
        write_output(path, lambda file, text=text: file.write(text))
        assert is_own(path)
    # A copy elsewhere, without what is noted, is the user's; half a line that a kill left is passed over.
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "numbers.json").write_bytes(path.read_bytes())
    assert not is_own(tmp_path / "copy" / "numbers.json")
    with (tmp_path / ".ghostnet-outputs").open("a") as file:
        file.write('["numbers.json", "12')
    assert is_own(path)
    path.write_text("tw0")
    os.utime(path, ns=(0, 0))  # the clock of files may stand still for some milliseconds
    assert not is_own(path)
    with pytest.raises(UserError, match="something changed it since"):
        check_outputs([path])


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "."])
def test_what_is_no_file_is_no_output(path, tmp_path):
    device = Path("/dev/null").stat()
    with pytest.raises(UserError, match="choose the name of a file"):
        check_outputs([path], force=True)
    assert stat.S_ISCHR(device.st_mode) and Path("/dev/null").stat().st_ino == device.st_ino


def test_a_folder_that_cannot_be_is_told_before_any_work(tmp_path):
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="cannot be written"):
        check_outputs([tmp_path / "file" / "numbers.json"])


def test_a_log_file_gets_lines_without_cursor_codes(tmp_path):
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import detection.core.progress as progress\n"
        "for _ in progress.progress_bar(range(3), 'short'): pass\n"
        "progress.LINE_EVERY = 0.05\n"
        "for _ in progress.progress_bar(range(8), 'long'): time.sleep(0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60)
    lines = done.stderr.splitlines()
    assert 3 <= len(lines) <= 8 and all(line.startswith("long: ") and " left" in line for line in lines), done.stderr
    assert "\r" not in done.stderr and "\x1b" not in done.stderr and LINE_EVERY == 10
