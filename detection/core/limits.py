"""Limits on the size of a network and of its input, so that a mistyped number is an error instead of a full memory."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from detection.core.errors import UserError
from detection.core.memory import is_out_of_memory

PARAMETERS = "GHOSTNET_MAX_PARAMETERS", 200_000_000
"""Environment variable and default limit: 0.8 GB of weights, and four times that during training."""
INPUT_PIXELS = "GHOSTNET_MAX_INPUT_PIXELS", 36_000_000
"""As `PARAMETERS`, for the pixels of one image at the input of the network: 0.4 GB in float32."""
MAX_TENSORS = 5_000
"""Limit on the number of parameter tensors: a deeper network takes minutes to build."""


class _TooLarge(Exception):
    pass


def limit_of(variable: str, default: int) -> int:
    """Value of the environment variable, or `default`. Raises UserError unless it is a whole number above 0."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < 1:
        raise UserError(f"the environment variable {variable} must be a whole number above 0, not {text!r}")
    return int(text)


def input_too_large(width: int, height: int) -> str | None:
    """Why images of this size are too large for a network, for a message; None if they are not."""
    limit = limit_of(*INPUT_PIXELS)
    if width * height <= limit:
        return None
    return (
        f"{width}x{height} are {width * height:,} pixels an image, and the limit is {limit:,}: choose less, or set the "
        f"environment variable {INPUT_PIXELS[0]} to a larger number"
    )


@contextlib.contextmanager
def parameter_limit(keys: Mapping[str, Any]) -> Iterator[None]:
    """Refuse a network above the limit while it is built: each tensor is counted before it is initialized, and memory
    takes no room until it is written to.

    Args:
        keys: keys of the config that set the size of the network, with their values, for the message.

    Raises:
        UserError: the network has too many parameters.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    limit = limit_of(*PARAMETERS)
    numbers = tensors = 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal numbers, tensors
        numbers, tensors = numbers + parameter.numel(), tensors + 1
        if numbers > limit or tensors > MAX_TENSORS:
            raise _TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except (_TooLarge, MemoryError, OverflowError, RuntimeError, TypeError) as error:
        too_large = isinstance(error, _TooLarge | OverflowError) or is_out_of_memory(error)
        # torch's errors for sizes beyond 64 bits.
        if not too_large and "overflow" not in str(error).lower() and "tuple of ints" not in str(error):
            raise
        text = ", ".join(f"{key}={value}" for key, value in keys.items())
        if tensors > MAX_TENSORS:
            raise UserError(f"{text}: the network has more than {MAX_TENSORS:,} layers; choose less") from None
        raise UserError(
            f"{text}: the network has more than {limit:,} parameters; choose less, or set the environment variable "
            f"{PARAMETERS[0]} to a larger number"
        ) from None
    finally:
        hook.remove()
