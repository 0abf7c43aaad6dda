"""The promises of docs/reliability.md in their short forms; ``make soak`` runs the full ones."""

from __future__ import annotations

from typing import Any

import pytest

from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.kv.buffers import PairBuffer
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
from tests.soak.cases import Cases, demo_engine
from tests.soak.unwritten import filled_with_nan

GREEDY = SamplingConfig(max_new_tokens=4, ignore_eos=True)
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


def _shallow(self: PairBuffer) -> PairBuffer:
    other = PairBuffer(self.keys[:, :0], self.values[:, :0], slack=0)
    other._keys, other._values, other.length, other._versions = self._keys, self._values, self.length, self._versions
    return other


def _short(self: PairBuffer, keys: Any, values: Any) -> None:
    length = self.length + keys.shape[1]
    self.reserve(length)
    self._keys[:, self.length : length - 1] = keys[:, :-1]
    self._values[:, self.length : length - 1] = values[:, :-1]
    self.length = length


def test_a_pair_that_was_never_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be what somebody left there."""
    monkeypatch.setattr(PairBuffer, "append", _short)
    assert tenants.run(20).failures


def test_pairs_of_a_conversation_that_is_gone_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = demo_engine().token_engine
    with filled_with_nan():
        session, tokens = engine.session(), list(range(10, 40))
        answer = list(engine.generate(session, tokens, GREEDY))
        monkeypatch.setattr(PairBuffer, "copy", _shallow)
        other = session.fork()
        assert session.turns and len(answer) == 4
        session.close()
        list(engine.generate(other, [10], GREEDY))
        assert other.stats.counters["computed_anew"] == 1  # the write is noticed, so that no NaN is ever read
        other.close()
