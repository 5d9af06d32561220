"""Who may call what: API keys, the right that each path needs, and the middleware that asks for it."""

import hashlib
import hmac
import re
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepstack_jax.serving.errors import RequestError, error_response
from deepstack_jax.serving.limits import Limits, Tenant

Right = Literal["open", "key", "admin"]

# Every path, with what it needs: "open" nothing; "key" an API key if the server has any; "admin" the admin key, without
# which it is refused. A path that is not listed needs a key.
RIGHTS: Mapping[str, Right] = MappingProxyType(
    {
        "/health": "open",
        "/ready": "open",
        "/version": "open",
        "/openapi.json": "open",
        "/": "open",
        "/page/info": "open",
        "/page/samples/{name}": "open",
        "/page/{name:path}": "open",
        "/page/draw": "key",
        "/generate": "key",
        "/health_generate": "key",
        "/metrics": "key",
        "/cluster": "key",
        "/research/rows": "key",
        "/research/tokens": "key",
        "/tokenize": "key",
        "/detokenize": "key",
        "/v1/models": "key",
        "/v1/models/{id:path}": "key",
        "/v1/chat/completions": "key",
        "/v1/completions": "key",
        "/v1/responses": "key",
        "/server_info": "admin",
        "/drain": "admin",
    }
)
_PAGE = "/page/"  # its files, which hold no data


def right_of(path: str) -> Right:
    """What a path needs."""
    return RIGHTS.get(path, "open" if path.startswith(_PAGE) else "key")


ADMIN = "admin"  # the name of the admin key, whose requests have no limits
_NAME = r"[A-Za-z0-9._@-]{1,64}"
_LINE = re.compile(rf"({_NAME})\s+sha256:([0-9a-fA-F]{{64}})")


class Keys:
    """The keys of a server, of which it keeps only the SHA-256."""

    def __init__(self, keys: Sequence[str] = (), file: Path | None = None, admin: str | None = None):
        """
        Args:
            keys: API keys. Each is named by the beginning of its hash.
            file: a file with more of them, `name sha256:HEX` in each line.
            admin: the admin key.

        Raises:
            ValueError: a key that no header can carry, or a file that can't be used; no key is in the message.
        """
        self._file, self._own = file, {}
        for key in keys:
            digest = _digest_of(key, "an API key")
            self._own[f"key-{digest.hex()[:8]}"] = digest
        self._admin = {} if admin is None else {ADMIN: _digest_of(admin, "the admin key")}
        self.reload()

    def __bool__(self) -> bool:
        """Whether there are API keys. The admin key is not one of them."""
        return bool(self._own) or self._file is not None

    @property
    def has_file(self) -> bool:
        """Whether there is a file to reload."""
        return self._file is not None

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin key."""
        return bool(self._admin)

    def reload(self) -> None:
        """Reads the file again.

        Raises:
            ValueError: it can't be used, and the keys are those from before.
        """
        in_file = {} if self._file is None else _read(self._file)
        self._digests = {**self._own, **in_file, **self._admin}

    def name_of(self, key: str) -> str | None:
        """The name of a key, None if the server doesn't have it. It takes the same time for any key."""
        presented, found = hashlib.sha256(key.encode()).digest(), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(digest, presented):
                found = name
        return found


def make_key(name: str, file: Path) -> str:
    """Draws an API key, adds the line of its hash to a file, and returns it.

    Raises:
        ValueError: the name can't be used, or the file has it already.
    """
    if not re.fullmatch(_NAME, name) or name == ADMIN:
        raise ValueError(f"{name!r} can't name a key: use 1 to 64 letters, digits or ._@-, and not {ADMIN!r}")
    if file.exists() and name in _read(file):
        raise ValueError(f"{file} has a key of {name} already: remove its line, or choose another name")
    key = f"dsj-{secrets.token_urlsafe(32)}"
    with file.open("a") as lines:
        print(f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}", file=lines)
    return key


def _digest_of(key: str, what: str) -> bytes:
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{what} is empty or has other characters than printable ASCII without spaces: draw another")
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> dict[str, bytes]:
    """The hashes of a key file by name."""
    digests = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the key file {file} can't be read ({type(error).__name__}): check the path") from None
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        entry = _LINE.fullmatch(text)  # the line itself is not shown: somebody may have written a key into it
        if entry is None or entry[1] == ADMIN or entry[1] in digests:
            raise ValueError(
                f"{file} line {number} is not 'name sha256:HEX' with a new name: "
                f"add lines with deepstack-jax keygen {file} --api-key NAME"
            )
        digests[entry[1]] = bytes.fromhex(entry[2])
    return digests


@dataclass
class Access:
    """The keys of a server, and the limits of each.

    Attributes:
        keys: without any, every path but those of the admin is open.
        limits: of each key; without keys, of all clients together.
    """

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._tenants: defaultdict[str, Tenant] = defaultdict(lambda: Tenant(self.limits))

    def tenant_of(self, path: str, headers: Headers) -> str:
        """The name of the caller's key, "" where none is needed.

        Raises:
            RequestError: 401 without a valid key, 403 where it has to be another one.
        """
        right = right_of(path)
        if right == "admin" and not self.keys.has_admin:
            raise RequestError(f"{path} needs an admin key, and this server has none: serve with --admin-key", 403)
        if right == "open" or (right == "key" and not self.keys):
            return ""
        name = self.keys.name_of(presented_key(headers))
        if name is None:
            raise RequestError(
                "no valid API key: send one as 'Authorization: Bearer KEY'",
                401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if right == "admin" and name != ADMIN:
            raise RequestError(f"{path} needs the admin key", 403, code="insufficient_permissions")
        return name

    def limited(self, scope: Scope, tenant: str) -> Tenant | None:
        """Whose limits apply to a call: those of work, which is what a POST asks for."""
        if scope["method"] != "POST" or tenant == ADMIN or right_of(scope["path"]) != "key":
            return None
        return self._tenants[tenant]


def presented_key(headers: Headers) -> str:
    """The API key that a request has, "" for none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class AccessMiddleware:
    """Lets in who may call, and says who it is: `state["tenant"]` of the scope."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            state["tenant"] = self._access.tenant_of(scope["path"], Headers(scope=scope))
            tenant = self._access.limited(scope, state["tenant"])
            if tenant:
                tenant.begin()
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if tenant is None:
            await self._app(scope, receive, send)
            return

        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(tenant.headers())
            await send(message)

        if tokens := state.get("tokens"):
            tokens.charge = tenant.charge
        try:
            await self._app(scope, receive, with_limits)
        finally:
            tenant.end()
