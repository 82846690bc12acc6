"""Run the numeric tests as other processors and other seeds would: `make test-portable`.

    python tests/portable.py --seeds 3 -k learns

runs those of one seed whose names have "learns". PyTorch and oneDNN choose their kernels by the processor; sums then
have another order and other last digits. Each seed meets each set of kernels, and one thread as well as two.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    options, arguments = parser.parse_known_args()
    rows, failed = [f"{'seed':>4}  {'kernels':<18}{'threads':>7}  result"], []
    print(rows[0], flush=True)
    for seed in options.seeds:
        for number, (name, variables) in enumerate(KERNELS.items()):
            threads = 1 + (seed + number) % 2
            setting = f"{seed:>4}  {name:<18}{threads:>7}  "
            status, output = run(seed, threads, variables, arguments)
            rows.append(setting + output.splitlines()[-1].strip("= "))
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
