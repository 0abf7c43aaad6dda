"""Stop strings end a text at the same place however it is split, and no part of one is given out."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from loopserve.core.engine.answer import StopStrings

LETTERS = st.text("ab ", max_size=24)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character: the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def held(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of a text that may become a stop string."""
    starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
    return max((n for n in range(1, len(text) + 1) if text[len(text) - n :] in starts), default=0)


@given(LETTERS, STOPS, st.lists(st.integers(0, 24), max_size=12))
@example("abcd", ["abcd", "bc"], [1, 2, 3])
@example("aab", ["ab"], [1, 2])
def test_the_answer_does_not_depend_on_how_its_text_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    wanted, stop = first_stop(text, stops)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    found, given, start = StopStrings(stops), "", 0
    for end in ends:
        given += found.push(text[start:end])
        start = end
        assert wanted.startswith(given)
        if first_stop(text[:end], stops)[1] is None:
            assert found.matched is None and len(given) == end - held(text[:end], stops)
        else:
            assert found.matched == stop and given == wanted
    given += found.flush()
    assert (given, found.matched) == (wanted, stop)


def test_without_stop_strings_all_text_is_given_at_once() -> None:
    found = StopStrings([])
    assert [found.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"] and found.flush() == ""
