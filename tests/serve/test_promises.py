"""The promises of docs/reliability.md in their short forms; ``make soak`` runs the full ones."""

from __future__ import annotations

import pytest

from tests.soak import damage, disconnects, kills, streams
from tests.soak.cases import Cases

SHORT = {
    "R3 disconnects": (disconnects.run, 42),
    "R7 kills": (kills.run, 10),
    "R8 damaged files": (damage.run, 70),
    "R17 streams": (streams.run, 60),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_promise_is_kept(name: str) -> None:
    run, cases = SHORT[name]
    found: Cases = run(cases)
    assert found.count >= cases and not found.failures, "\n".join(found.failures[:3])
