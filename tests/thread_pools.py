"""For tests of what sizes the process's thread pools, so that the tests after them find both as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dibit.kernels import native


@contextmanager
def threads_put_back() -> Iterator[None]:
    torch_threads = torch.get_num_threads()
    ours = None if native.unavailable() else native.threads()
    yield
    torch.set_num_threads(torch_threads)
    if ours is not None:
        native.set_threads(ours)
