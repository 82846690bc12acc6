"""From the name of a detector or backbone to its file: what comes with the toolkit, and the Hugging Face hub."""

import os
from pathlib import Path

from detection.core.errors import UserError
from detection.core.extras import require
from detection.core.files import shown
from detection.core.text import did_you_mean

FOLDER = Path(__file__).parent / "weights"
HUB = "hf:"
HUB_FILE = "model.safetensors"
SUFFIX = ".safetensors"


def detector_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"ghostdet_*{SUFFIX}"))


def find_detector(text: str | os.PathLike[str]) -> str:
    """The file of a detector.

    Args:
        text: a path, which is returned as it is; the name of a detector that comes with the toolkit, unless there is a
            file of that name; or hf:OWNER/NAME, whose model.safetensors is fetched from the hub, or taken from the
            hub's cache.

    Raises:
        UserError: hf:OWNER/NAME cannot be had; no file and no detector has this name.
    """
    name = os.fspath(text)
    if name.startswith(HUB):
        return _from_hub(name)
    if os.path.lexists(name):
        return name
    if name in detector_names():
        return str(FOLDER / f"{name}{SUFFIX}")
    if name and not os.path.dirname(name) and not os.path.splitext(name)[1]:
        known = detector_names()
        hint = did_you_mean(name, known) or f" (known: {', '.join(known) or 'none'})"
        raise UserError(f"{shown(name)} is neither a file nor a detector that comes with the toolkit{hint}")
    return name


def find_backbone(weights: str | None, name: str, width: float) -> str | None:
    """Turn the value "zoo" of model.backbone.weights into the file for this backbone; return other values as they are.

    Raises:
        UserError: no weights of this backbone and width come with the toolkit.
    """
    if weights != "zoo":
        return weights
    path = FOLDER / f"{name}_{round(100 * width):03d}{SUFFIX}"
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}") if not file.stem.startswith("ghostdet_"))
        raise UserError(
            f"model.backbone.weights=zoo: no weights of {name} at width {width:g} come with the toolkit "
            f"(known: {', '.join(known) or 'none'})"
        )
    return str(path)


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Where a command writes what it makes of a detector: beside its file, or into the current folder if the file comes
    with the toolkit or from the hub's cache."""
    folder = Path(path).parent
    resolved = folder.resolve()
    return Path() if resolved == FOLDER.resolve() or "snapshots" in resolved.parts else folder


def _from_hub(text: str) -> str:
    repository = text.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{text} is not of the form hf:OWNER/NAME")
    require(text, "huggingface_hub")
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repository, HUB_FILE)
    except Exception as error:  # the hub's client raises errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{text}: {HUB_FILE} could not be fetched from the Hugging Face hub: {reason}") from error
