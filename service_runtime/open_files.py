"""The limit of open files of this process: every connection takes one."""

from __future__ import annotations

import resource


def raise_open_files_limit() -> int:
    """Raises the soft limit of open files to the hard one, and returns it.

    Shells set the soft limit to 1,024 for programs that use select(), which this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
