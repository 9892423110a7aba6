"""Which other servers a model may be explained on."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from mlserver_hftasks.errors import InvalidSettings

ALLOWED_URIS = "HFTASKS_INFER_URIS"
"""Environment variable: the URLs that `infer_uri` may begin with, separated by commas."""


def check_uri(uri: str, environment: Mapping[str, str]) -> str:
    """The URL, if the environment allows it; without a list that is a server on this machine only.

    Raises `InvalidSettings`.
    """
    parts, where = _parts(uri), "@ parameters.extra.infer_uri"
    if parts is None or parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidSettings(f"got {uri!r:.80}, expected http://HOST:PORT/v2/models/NAME/infer {where}")
    allowed = [entry.strip() for entry in environment.get(ALLOWED_URIS, "").split(",") if entry.strip()]
    if allowed:
        fits = any(_is_under(parts, _parts(entry)) for entry in allowed)
    else:
        fits = _is_loopback(parts.hostname or "")
    if not fits:
        known = ", ".join(allowed) or "a server on this machine"
        raise InvalidSettings(f"got {uri!r:.80}, expected {known}, as {ALLOWED_URIS} says {where}")
    return uri


def metadata_uri(uri: str, environment: Mapping[str, str]) -> str | None:
    """Where the model behind an `infer_uri` says what it takes, if the environment allows that too."""
    model, ends, _ = uri.rpartition("/infer")
    if not ends:
        return None
    try:
        return check_uri(model, environment)
    except InvalidSettings:
        return None


def _parts(uri: str) -> SplitResult | None:
    try:
        parts = urlsplit(uri)
        known = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if known else None


def _is_under(uri: SplitResult, allowed: SplitResult | None) -> bool:
    if allowed is None or _origin(uri) != _origin(allowed):
        return False
    segments, wanted = uri.path.split("/"), allowed.path.rstrip("/").split("/")
    return segments[: len(wanted)] == wanted and ".." not in segments


def _origin(uri: SplitResult) -> tuple[str, str | None, int]:
    return uri.scheme, uri.hostname, uri.port or {"http": 80, "https": 443}[uri.scheme]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
