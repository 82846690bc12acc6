"""`python -m detection train …`: the same as `ghostdet train …`."""

from detection.cli.main import run

if __name__ == "__main__":
    run()
