"""What a server allows, and whose KV a caller reads."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import urlsplit

from semsharekv_integrations.errors import check_fields, is_name, is_whole, require

OPEN = "served"  # the tenant of all callers where no key is asked for
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def strip_port(host: str) -> str:
    """Return ``host`` in small letters, without its port, or brackets of an IPv6 address; "" if it is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_host(name: str) -> bool:
    return "*" not in name and name.lower() in (strip_port(name), strip_port(f"[{name}]"))


def _is_origin(name: str) -> bool:
    """Return whether browsers may send ``name`` as a page's origin."""
    scheme, found, host = name.partition("://")
    is_written_so = name == name.lower() and bool(scheme and found and strip_port(host))
    return name == "null" or (is_written_so and not set(host) & set("/?#@*"))


_LISTS = (  # what cannot match any request is a mistake
    ("hosts", _is_host, "names without scheme and port, such as chat.example.org"),
    (
        "cors_origins",
        _is_origin,
        "origins as browsers send them, such as https://chat.example.org: no path, no wildcard",
    ),
)


@dataclass(frozen=True)
class ServerConfig:
    """Who may call a server, and how much it takes on.

    Attributes:
        model: the name that the model goes by, or None for the engine's.
        api_keys: each lets a caller in, and is a tenant of its own; without any, everyone may call, as one tenant.
        hosts: names that the server is called by, beside those of this machine alone; a page that was sent under
            another name could otherwise reach a server without keys through a reader's browser.
        cors_origins: origins whose pages may call, such as ``https://chat.example.org``.
        max_body_bytes: most bytes of a request.
        max_requests: most requests that are answered or wait for their turn; beyond it they are refused.
        max_tokens: most tokens of an answer, also where a request names none; None for what the context window leaves.
        page: whether the chat page is served at ``/``, if the extra ``web`` is installed.
    """

    model: str | None = None
    api_keys: Sequence[str] = field(default=(), repr=False)
    hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 16 * 1024**2
    max_requests: int = 32
    max_tokens: int | None = None
    page: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "", "1 or more", lambda value: is_whole(value, 1), "max_body_bytes", "max_requests")
        check_fields(self, "", "None or 1 or more", lambda value: value is None or is_whole(value, 1), "max_tokens")
        check_fields(self, "", "None or a name", lambda value: value is None or is_name(value), "model")
        check_fields(self, "", "True or False", lambda value: isinstance(value, bool), "page")
        for name, fits, accepted in _LISTS:
            values = getattr(self, name)
            require(not isinstance(values, str) and all(map(is_name, values)), name, values, "a list of names")
            for value in values:
                require(fits(value), name, value, accepted)
        proper = all(is_name(key) and key.isascii() and key == key.strip() for key in self.api_keys)
        several = not isinstance(self.api_keys, str)
        require(several and proper, "api_keys", f"{len(self.api_keys)} keys", "a list of keys in ASCII, without spaces")

    def find_tenant(self, key: str | None) -> str | None:
        """Return the namespace of a caller with this key, or None if it may not call. Takes as long for any key."""
        if not self.api_keys:
            return OPEN
        given = _digest(key or "")
        found = [tenant for known, tenant in self._tenants if hmac.compare_digest(known, given)]
        return found[0] if found else None

    @cached_property
    def _tenants(self) -> list[tuple[bytes, str]]:
        """Digest and namespace of each key. The namespace tells nothing of the key, and is the same in every run."""
        digests = [_digest(key) for key in self.api_keys]
        return [(digest, f"key-{hashlib.sha256(b'tenant' + digest).hexdigest()[:16]}") for digest in digests]

    def is_called_by(self, host: str) -> bool:
        """Return whether a request may name ``host``, without its port, as where it goes to."""
        return bool(self.api_keys) or host in map(str.lower, self.hosts) or is_local(host)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def is_local(host: str) -> bool:
    """Return whether ``host`` is a name or address that this machine alone reaches."""
    if host in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
