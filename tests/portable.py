"""Run the numeric tests as other processors and other seeds would: `make test-portable`.

    python tests/portable.py -k learns               (the tests whose names have "learns")
    python tests/portable.py --all                   (every seed with every set of kernels: hours)

PyTorch and oneDNN choose their kernels by the processor; sums then have another order and other last digits. Six runs
meet five seeds, three sets of kernels, and each of these with one thread and with two.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "the machine's own": {},
}
SETTINGS = [
    (0, "SSE4.1", 1),
    (1, "AVX2", 2),
    (2, "the machine's own", 1),
    (3, "SSE4.1", 2),
    (4, "AVX2", 1),
    (0, "the machine's own", 2),
]
"""Seed, kernels, threads."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every seed with every set of kernels")
    options, arguments = parser.parse_known_args()
    rows, failed = [f"{'seed':>4}  {'kernels':<18}{'threads':>7}  result"], []
    print(rows[0], flush=True)
    everything = [(seed, name, 1 + (seed + i) % 2) for seed in range(5) for i, name in enumerate(KERNELS)]
    for seed, name, threads in everything if options.all else SETTINGS:
        setting = f"{seed:>4}  {name:<18}{threads:>7}  "
        status, output = run(seed, threads, KERNELS[name], arguments)
        # After a crash, as by a segmentation fault, there is no summary.
        rows.append(setting + (output.splitlines()[-1].strip("= ") if status in (0, 1) else f"exit status {status}"))
        if status:
            failed.append(setting + "\n".join(re.findall("^(?:FAILED|ERROR) .*", output, re.MULTILINE)))
            print(output)
        print(rows[-1], flush=True)
    print("\n".join(["", *rows, "", *failed]))
    return int(bool(failed))


def run(seed: int, threads: int, variables: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    """The exit status and the output of one run of pytest."""
    environment = {**os.environ, **variables, "TEST_SEED": str(seed), "OMP_NUM_THREADS": str(threads)}
    processes = ["-n", "2", "--dist", "worksteal"] if threads == 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric and not slow", *processes, *arguments]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
