from __future__ import annotations

from collections.abc import Iterator

import pytest
from thread_pools import threads_put_back


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A runner sizes the thread pools of the process."""
    with threads_put_back():
        yield
