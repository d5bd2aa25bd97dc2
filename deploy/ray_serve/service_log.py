"""The lines of a service in the log of its replica, where `ray logs` and Ray's dashboard show them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from vitrine_vlm.service_runtime.logs import LogFormat

# Ray Serve writes it to logs/serve/replica_APPLICATION_DEPLOYMENT_ID.log of the session, and rotates that.
_log = logging.getLogger("ray.serve")
# Of the service's settings: its lines are read here, and Ray Serve gives them the form that was asked for.
LOG_FORMAT: LogFormat = "json"


def logging_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Ray Serve's configuration of a replica's log.

    Args:
        settings: of the service, as they were given; what is not among them is left to Ray Serve's own defaults.
    """
    config: dict[str, Any] = {"enable_access_log": False}  # LLM workers request addresses every second
    if "log_level" in settings:
        config["log_level"] = settings["log_level"].upper()
    if "log_format" in settings:
        config["encoding"] = {"json": "JSON", "text": "TEXT"}[settings["log_format"]]
    return config


def write(line: str) -> None:
    """Writes a line of the service's output at its own level and time, its other values as keys.

    A line that is no object, such as one of a library in C, is a message of level info.
    """
    values = _values(line)
    if values is None:
        _log.info("%s", line)
        return
    level = logging.getLevelNamesMapping().get(str(values.pop("level")).upper(), logging.INFO)
    if not _log.isEnabledFor(level):
        return
    message = "\n".join(str(values.pop(key)) for key in ("message", "exception") if key in values)
    record = _log.makeRecord(_log.name, level, str(values.pop("logger")), 0, "%s", (message,), None)
    record.created = datetime.fromisoformat(str(values.pop("time"))).timestamp()
    record.msecs = record.created % 1 * 1000
    record.__dict__.update({key: value for key, value in values.items() if key not in record.__dict__})
    _log.handle(record)


def _values(line: str) -> dict[str, Any] | None:
    """The values of a line of `logs.start_logging`; None for other lines."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, Mapping) or not {"time", "level", "logger", "message"} <= values.keys():
        return None
    return dict(values)
