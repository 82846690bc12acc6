"""Reads images from web servers. OpenCV opens URLs of videos and streams itself."""

import base64
import http.client
import urllib.request
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from detection.core.errors import UserError
from detection.data.image_headers import largest_file
from detection.data.image_io import SUFFIXES, decode_checked_image, read_image

TIMEOUT_SECONDS = 10
"""Time after which a server that does not answer is an error."""


def is_image_url(url: str) -> bool:
    """Whether a URL is an image, by the content type of the answer or, without a specific one, by the suffix."""
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https"):
        return False
    try:
        with _open(url) as answer:
            kind = answer.headers.get_content_maintype()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return kind == "image" or (kind in ("application", "text") and PurePosixPath(parts.path).suffix.lower() in SUFFIXES)


def read_source(source: str, *, bgr: bool = False) -> np.ndarray:
    """Read an image from a file or a web server: uint8 [H, W, 3]. Raises UserError, see `read_image`."""
    if "://" not in source:
        return read_image(source, bgr=bgr)
    name = without_password(source)
    try:
        with _open(source) as answer:
            content = answer.read(largest_file() + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"image {name} cannot be read: {str(error) or type(error).__name__}") from None
    if len(content) > largest_file():
        raise UserError(f"image {name} is too large: the limit is {largest_file():,} bytes")
    return decode_checked_image(content, name, bgr=bgr)


def without_password(url: str) -> str:
    """rtsp://user:secret@host/x -> rtsp://host/x; other text does not change."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def _open(url: str) -> Any:
    parts = urlsplit(url)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
