"""Distinguishes the cancellation of a task and of what the task awaits."""

from __future__ import annotations

import asyncio


def is_own_cancellation() -> bool:
    """Whether a CancelledError is meant for this task, and not only for what the task awaited.

    A cancelled future raises one, too, and so does grpc when a call or its channel was closed.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
