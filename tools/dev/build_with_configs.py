"""Builds a wheel that holds configs/ as detection/configs/ (setup.cfg names this class)."""

from pathlib import Path

from setuptools.command.build_py import build_py

CONFIGS = sorted(map(str, Path("configs").rglob("*.yaml")))


class BuildWithConfigs(build_py):
    """Copies configs/, which stands beside the packages, into the package detection."""

    def run(self) -> None:
        super().run()
        # An editable installation uses the folder itself.
        for config in () if self.editable_mode else CONFIGS:
            target = Path(self.build_lib, "detection", config)
            self.mkpath(str(target.parent))
            self.copy_file(config, str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution needs, this file included."""
        return [*super().get_source_files(), *CONFIGS, "tools/dev/build_with_configs.py"]
