"""Whose cancellation it is."""

from __future__ import annotations

import asyncio


def is_own_cancellation() -> bool:
    """Whether a CancelledError is meant for this task, and not only for what it waited for.

    A future that was cancelled raises one, too, and so does grpc where a call or its channel was ended.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
