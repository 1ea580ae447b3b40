"""HTTP and the command line around an engine. Knows nothing of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dibit.server.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    # The command line imports this package, and must not pay for the web framework.
    if name == "create_app":
        from dibit.server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
