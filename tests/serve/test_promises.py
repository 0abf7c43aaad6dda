"""The promises of docs/reliability.md in their short forms; ``make soak`` runs the full ones."""

from __future__ import annotations

import pytest

from tests.soak import (
    damage,
    disconnects,
    fairness,
    kills,
    leaks,
    ledger,
    overload,
    restarts,
    restore,
    streams,
    tenants,
)
from tests.soak.cases import Cases

SHORT = {
    "R3 disconnects": (disconnects.run, 42),
    "R4 overload": (overload.run, 40),
    "R5 ledger": (ledger.run, 1000),
    "R6 tenants": (tenants.run, 50),
    "R7 kills": (kills.run, 10),
    "R8 damaged files": (damage.run, 70),
    "R9 restore": (restore.run, 8),
    "R12 restarts": (restarts.run, 3),
    "R14 leaks": (leaks.run, 60),
    "R15 fairness": (fairness.run, 1),
    "R17 streams": (streams.run, 60),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_promise_is_kept(name: str) -> None:
    run, cases = SHORT[name]
    found: Cases = run(cases)
    assert found.count >= cases and not found.failures, "\n".join(found.failures[:3])
