"""Errors of HTTP requests: a status, and a sentence that says what to change. Nothing of the server's inside is in it."""

from __future__ import annotations

from collections.abc import Mapping

from adaptrt import errors

RETRY_AFTER_S = 1
"""After how many seconds a request that was refused for want of room may be sent again."""

CANNOT_COMPUTE = "the model cannot compute with these tensors; GET the model's metadata, which says what it takes"
"""What is told of an error that is not foreseen here. It may be the server's, whose log says where it was raised."""


class HTTPError(Exception):
    """An answer with an error.

    Args:
      status: of the answer.
      message: what to change.
      headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


class Invalid(HTTPError):
    """Something in a request is not as it must be: status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


def unavailable(message: str) -> HTTPError:
    """Returns the answer of a server that cannot serve now: status 503."""
    return HTTPError(503, message, {"Retry-After": str(RETRY_AFTER_S)})


# What callers are told. The engine's own messages speak to the one who wrote the server: of settings, methods and values.
_OF_REQUESTS: tuple[tuple[type[errors.AdaptrtError], int, str], ...] = (
    (errors.UnknownTenant, 404, "you have no state; adapt first"),
    (errors.TooManyTenants, 403, "no more tenants can have a state here; infer with support and query tensors, which keeps nothing"),
    (errors.DeadlineExceeded, 504, "the time for the answer has passed, and nothing was done; try again, or allow a longer timeout"),
    (errors.CommitConflict, 409, "your state was changed at the same time, again and again, and nothing was done; try again"),
    (errors.NonFiniteInput, 400, "the tensors hold NaN or infinity; leave these examples out"),
    (errors.LabelOutOfRange, 400, "a label, or an index into a table, is negative or too large for this model; leave that example out"),
)


def of_engine(error: errors.AdaptrtError) -> HTTPError:
    """Returns what a caller is told of an error that the engine raised."""
    if isinstance(error, errors.Overloaded):
        return HTTPError(429, "too many requests wait here; try again later", {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, errors.NotServing):
        return unavailable("the server is starting or draining; try again, or ask another replica")
    if isinstance(error, errors.StoreUnavailable):
        return unavailable("the store of states does not answer; nothing was changed. Try again")
    if isinstance(error, errors.InvalidState):
        return HTTPError(409, "your state is damaged, or was adapted from another base; DELETE it, and adapt again")
    for kind, status, message in _OF_REQUESTS:
        if isinstance(error, kind):
            return HTTPError(status, message)
    return Invalid(CANNOT_COMPUTE)
