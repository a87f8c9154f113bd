"""Who may talk to the server: hosts and origins against DNS rebinding, keys, and what browsers ask before they send."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from mlx_gemma4.errors import shown
from mlx_gemma4.serve.ask import Refused

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::", "")  # what a server listens on for all of a machine's names


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def same(key: str, given: str) -> bool:
    """However long it takes to tell says nothing of the key."""
    return hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Guard:
    """keys: those of which a request needs one; none: it needs none. hosts: names the server is known by, besides this
    machine's own; any, where it listens on every name and asks for a key. origins: pages elsewhere that may ask, "*":
    all."""

    listens_on: str = "127.0.0.1"
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not is_loopback(self.listens_on) and not self.keys:
            raise ValueError(
                f"host is {shown(self.listens_on)}, which others reach; expected --api-key or --api-key-file with it"
            )

    def check_host(self, host: str) -> None:
        """Refused for a name that is not ours: a page whose name was made to point here."""
        if self.listens_on in EVERYWHERE and not self.hosts:
            return
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        bracketed = f"[{self.listens_on}]" if ":" in self.listens_on else self.listens_on
        known = {own.lower() for own in (*LOCAL_NAMES, bracketed, *self.hosts)}
        if name.lower().rstrip(".") not in known and host.lower() not in known:
            raise Refused(f"the host {shown(host)} is not known; expected localhost, or --allow-host", status=403)

    def check_origin(self, origin: str | None, host: str) -> None:
        """Refused for a page of another origin that is not allowed."""
        if origin is None or self.allows(origin) or urlsplit(origin).netloc.lower() == host.lower():
            return
        raise Refused(f"pages of {shown(origin)} may not ask; expected --allow-origin {origin}"[:500], status=403)

    def allows(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def scope(self, headers: dict[str, str]) -> str:
        """Whose request it is, by its key; Refused without a right one."""
        if not self.keys:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        # Clients that have a key and a token send both, of which one is for somebody else.
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        found = [key for key in self.keys if any([same(key, one) for one in given])]
        if not found:
            got = "a wrong API key" if any(given) else "no API key"
            raise Refused(f"{got}; expected Authorization: Bearer KEY, or x-api-key: KEY", status=401)
        return hashlib.sha256(found[0].encode()).hexdigest()

    def cors(self, headers: dict[str, str]) -> dict[str, str]:
        """The headers that let an allowed page read the answer."""
        origin = headers.get("origin")
        if origin is None or not self.allows(origin):
            return {}
        return {"access-control-allow-origin": origin, "access-control-expose-headers": "*", "vary": "Origin"}

    def preflight(self, headers: dict[str, str]) -> dict[str, str]:
        """The answer to what a browser asks before it sends."""
        return self.cors(headers) | {
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-allow-private-network": "true",
            "access-control-max-age": "600",
        }
