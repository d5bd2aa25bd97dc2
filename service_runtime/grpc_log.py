"""Imported before grpc, which reads this when it is loaded: gRPC's C core logs errors only.

At its default each failed TLS handshake is a line on stderr, which no log of Python limits.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
