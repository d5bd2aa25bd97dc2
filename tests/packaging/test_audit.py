"""An audit that looked nothing up does not say that all is well."""

from __future__ import annotations

from typing import Any

import pytest

from tests.packaging.audit import judge

FINE: dict[str, Any] = {"name": "fine", "version": "1", "vulns": []}
BAD: dict[str, Any] = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
SKIPPED: dict[str, Any] = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("report", "status", "says"),
    [
        ([FINE], 0, "1 versions, 0 vulnerabilities"),
        ([FINE, BAD], 1, "bad 2: PYSEC-1, mended in ['3']"),
        ([FINE, SKIPPED], 1, "could not be looked up: unknown"),
        ([SKIPPED, SKIPPED], 2, "cannot be reached from here (why)"),
        ([], 2, "cannot be reached from here (why)"),
    ],
)
def test_what_an_audit_says(report: list[dict[str, Any]], status: int, says: str) -> None:
    found, lines = judge(report, "why")
    assert found == status and says in "\n".join(lines)
