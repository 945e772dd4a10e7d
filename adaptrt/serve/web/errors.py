"""Errors of HTTP requests: a status, and a sentence that says what to change. Nothing of the server's inside is in it."""

from __future__ import annotations

from collections.abc import Mapping

from adaptrt import errors

RETRY_AFTER_S = 1
"""After how many seconds a request that was refused for want of room may be sent again."""


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


# Kinds of errors whose own messages speak of the request alone.
_OF_REQUESTS: tuple[tuple[type[errors.AdaptrtError], int], ...] = (
    (errors.UnknownTenant, 404),
    (errors.TooManyTenants, 403),
    (errors.DeadlineExceeded, 504),
    (errors.CommitConflict, 409),
    (errors.InvalidBatch, 400),
    (errors.NonFiniteInput, 400),
    (errors.LabelOutOfRange, 400),
)


def of_engine(error: errors.AdaptrtError) -> HTTPError:
    """Returns what a caller is told of an error that the engine raised."""
    if isinstance(error, errors.Overloaded):
        return HTTPError(429, str(error), {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, errors.NotServing):
        return unavailable("the server is starting or draining; try again, or ask another replica")
    if isinstance(error, errors.StoreUnavailable):
        return unavailable("the store of states does not answer; nothing was changed. Try again")
    if isinstance(error, errors.InvalidState):
        return HTTPError(409, "your state is damaged, or was adapted from another base; DELETE it, and adapt again")
    for kind, status in _OF_REQUESTS:
        if isinstance(error, kind):
            return HTTPError(status, str(error))
    return Invalid("the model cannot compute with these tensors; GET the model's metadata, which says what it takes")
