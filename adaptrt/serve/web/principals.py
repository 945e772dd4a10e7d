"""Who sends a request: API keys in a file, as hashes, and JSON Web Tokens. The name of the principal is the name of the tenant."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adaptrt.errors import InvalidArgument
from adaptrt.serve.records import MAX_NAME, checked_tenant
from adaptrt.serve.web.errors import HTTPError

TENANT, OPERATOR, ANYONE = "tenant", "operator", "anyone"
ROLES = (TENANT, OPERATOR)
ALGORITHMS = ("HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA")
_KEY_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}")
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="adaptrt"'}
_CHALLENGE_PAGE = {"WWW-Authenticate": 'Basic realm="adaptrt", charset="UTF-8"'}
_MAX_CREDENTIALS = 8192
_LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")


class Principal(NamedTuple):
    """Who sends a request.

    Attributes:
      name: of the tenant.
      role: "tenant" adapts and predicts; "operator" reads metrics and the page, and loads models; "anyone" does both, where no keys are
        asked for.
    """

    name: str
    role: str


class Tokens(NamedTuple):
    """How JSON Web Tokens are checked. Their subject is the tenant; they must have an expiry.

    Attributes:
      key: the shared secret, or the issuer's public key in PEM.
      algorithm: that they must be signed with, such as "HS256" or "RS256".
      audience, issuer: what their claims of that name must be; None for no such claim.
    """

    key: str
    algorithm: str
    audience: str | None = None
    issuer: str | None = None


class Principals:
    """Finds out who sends a request.

    Args:
      keys: by the SHA-256 of the key, as hexadecimal digits, whose it is.
      tokens: how tokens are checked, None to accept none.
      asks: whether a key or token is asked for. If not, all who send requests to this machine are one tenant, and pages of other
        origins are refused.
    Raises:
      InvalidArgument: tokens cannot be checked.
    """

    def __init__(self, keys: dict[str, Principal], tokens: Tokens | None = None, *, asks: bool = True) -> None:
        self._secret = secrets.token_bytes(32)
        self._keys = {self._place(digest): (digest, principal) for digest, principal in keys.items()}
        self._asks = asks
        self._tokens = tokens
        self._decode = None if tokens is None else _decoder(tokens)

    def of(self, headers: Mapping[str, str], *, basic: bool = False) -> Principal:
        """Returns who sends a request.

        Args:
          headers: of the request, names in lower case.
          basic: whether the key may also come as the password of Basic authentication, as browsers send it.
        Raises:
          HTTPError: 401 without a valid key or token; 403 if none is asked for, and a page of another origin asks.
        """
        if not self._asks:
            _require_this_machine(headers)
            return Principal("anyone", ANYONE)
        authorization = headers.get("authorization")
        if authorization is None:
            raise HTTPError(401, "send a key: 'Authorization: Bearer KEY'", _CHALLENGE_PAGE if basic else _CHALLENGE)
        scheme, _, value = authorization.partition(" ")
        value = value.strip()
        credentials = None
        if len(value) <= _MAX_CREDENTIALS:
            credentials = value if scheme.lower() == "bearer" else _password(value) if basic and scheme.lower() == "basic" else None
        found = None if credentials is None else self._find(credentials)
        if found is None:
            raise HTTPError(401, "this key or token is not valid here", _CHALLENGE_PAGE if basic else _CHALLENGE)
        return found

    def _find(self, credentials: str) -> Principal | None:
        if self._decode is not None and credentials.count(".") == 2:
            return self._decode(credentials)
        digest = hashlib.sha256(credentials.encode()).hexdigest()
        # The place is keyed by a secret of this process, so how long it takes to find it tells nothing of the keys that exist.
        known, principal = self._keys.get(self._place(digest), ("0" * 64, None))
        return principal if hmac.compare_digest(known, digest) else None

    def _place(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def read_keys(path: str | os.PathLike[str]) -> dict[str, Principal]:
    """Reads a file of keys: a line for each with the name of the tenant, the role and the SHA-256 of the key. `#` begins a comment.

    Raises:
      InvalidArgument: a line is not of this form, a key is there twice, or the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the keys in {path} cannot be read: {error}") from error
    found: dict[str, Principal] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 3 or parts[1] not in ROLES or not _HEX.fullmatch(parts[2]):
            raise InvalidArgument(
                f"{path}, line {number}: write 'NAME tenant SHA256' or 'NAME operator SHA256'; 'adaptrt key' makes such lines"
            )
        if parts[2] in found:
            raise InvalidArgument(f"{path}, line {number}: this key is there already, for {found[parts[2]].name!r}")
        found[parts[2]] = Principal(checked_tenant(parts[0]), parts[1])
    return found


def add_key(path: str | os.PathLike[str], name: str, role: str = TENANT) -> str:
    """Makes a key, adds its hash to a file, which only the owner can read, and returns the key. It is in no file.

    Raises:
      InvalidArgument, InvalidType: the name has spaces or is none of a tenant, or there is no such role.
    """
    checked_tenant(name)
    if len(name.split()) != 1 or name.startswith("#"):
        raise InvalidArgument(f"the name {name!r} must have no spaces, and not begin with '#'")
    if role not in ROLES:
        raise InvalidArgument(f"there is no role {role!r}; pass one of {', '.join(ROLES)}")
    key = secrets.token_urlsafe(_KEY_BYTES)
    line = f"{name} {role} {hashlib.sha256(key.encode()).hexdigest()}\n".encode()
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, stat.S_IRUSR | stat.S_IWUSR), "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line  # somebody wrote the last line by hand
        file.write(line)
    return key


def _require_this_machine(headers: Mapping[str, str]) -> None:
    """Refuses what a page of another origin makes a browser send, also if its name leads to this machine."""
    host = headers.get("host", "")
    origin = headers.get("origin")
    if not _LOCAL.fullmatch(host) or (origin is not None and origin != f"http://{host}"):
        raise HTTPError(403, "without keys only this machine may ask, and no page of another origin; start the server with keys")


def _password(value: str) -> str | None:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:  # which binascii's and Unicode's are
        return None


def _decoder(tokens: Tokens) -> Any:
    """Returns what checks a token and returns its principal, None if it is not valid."""
    try:
        import jwt
        from jwt import algorithms
    except ImportError as error:
        raise InvalidArgument("tokens need the package pyjwt; pip install 'adaptrt[serve]'") from error
    if tokens.algorithm not in ALGORITHMS:
        raise InvalidArgument(f"there is no algorithm {tokens.algorithm!r}; pass one of {', '.join(ALGORITHMS)}")
    known = algorithms.get_default_algorithms()
    if tokens.algorithm not in known:
        raise InvalidArgument(f"{tokens.algorithm} needs the package cryptography; pip install cryptography")
    if tokens.algorithm.startswith("HS") and len(tokens.key.encode()) < _KEY_BYTES:
        raise InvalidArgument(f"the secret for {tokens.algorithm} must have at least {_KEY_BYTES} bytes, got {len(tokens.key.encode())}")
    try:
        known[tokens.algorithm].prepare_key(tokens.key)
    except (ValueError, TypeError, jwt.InvalidKeyError) as error:
        what = "a secret, and no key in PEM" if tokens.algorithm.startswith("HS") else "a public key in PEM"
        raise InvalidArgument(f"the key for {tokens.algorithm} must be {what}: {error}") from error
    required = ["exp", "sub", *(["aud"] if tokens.audience else []), *(["iss"] if tokens.issuer else [])]

    def decode(token: str) -> Principal | None:
        try:
            claims = jwt.decode(
                token,
                tokens.key,
                algorithms=[tokens.algorithm],
                audience=tokens.audience,
                issuer=tokens.issuer,
                options={"require": required, "verify_aud": tokens.audience is not None},
            )
        except Exception:  # also what deep nesting or an endless number in a token raises, before or behind its signature
            return None
        subject = claims["sub"]
        is_name = isinstance(subject, str) and 0 < len(subject) <= MAX_NAME and subject.isprintable()
        return Principal(subject, TENANT) if is_name else None

    return decode
