"""Everything dibit raises on purpose.

    DibitError
    ├── UserError            the caller can mend it: a bad request, a bad model, a bad setting (HTTP 4xx, exit 2)
    │   ├── RequestError     a request that cannot be served as written; `param` names the field
    │   │   └── ContextLengthError
    │   ├── CheckpointError  model files that are missing, broken or of a kind that is not supported
    │   └── ConfigError      an engine setting that cannot hold here
    ├── CapacityError        nothing wrong, no room now; try again after `retry_after_s` (HTTP 503)
    ├── EngineFault          one request failed inside the engine; others go on (HTTP 500)
    └── EngineDead           the engine has stopped; the message carries the root cause (HTTP 503)

A message says what was found, what is supported, and what to do.
"""

from __future__ import annotations


class DibitError(Exception):
    """Base of the tree; catch it to catch all of ours and none of anybody else's."""


class UserError(DibitError, ValueError):
    """The caller can mend it."""


class RequestError(UserError):
    """A request that cannot be served as written."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt (and output) longer than the context, or than the whole KV cache."""

    def __init__(self, message: str, *, param: str = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class CheckpointError(UserError):
    """Model files that are missing, broken or not supported."""


class ConfigError(UserError):
    """An engine setting that cannot hold here."""


class CapacityError(DibitError):
    """No room now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFault(DibitError):
    """One request failed inside the engine; the others go on."""


class EngineDead(DibitError):
    """The engine has stopped; the message carries the root cause."""
