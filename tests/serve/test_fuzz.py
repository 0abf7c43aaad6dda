"""Requests drawn from the OpenAPI document; ``make soak`` sends 10,000."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis")

from tests.soak import fuzz


def test_no_input_is_an_error_of_the_server() -> None:
    found = fuzz.run(300)
    assert found.count > 200 and not found.failures, "\n".join(found.failures[:3])
