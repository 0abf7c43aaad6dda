"""Tables and the page: they hold what was recorded, and need nothing from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loopserve.bench.figures import save, svg
from loopserve.bench.quality import page
from loopserve.bench.quality.records import Run
from loopserve.bench.quality.summary import summarise
from loopserve.bench.quality.tables import tables
from tests.bench.quality.small import SNAPKV, Words, ask

SESSION = {"device": "a <fast> one", "threads": 1, "versions": {"torch": "2"}, "commit": "c"}


@pytest.fixture(scope="module")
def run() -> Run:
    records = ask(Words(dialogues=6, labels={"kind": "a|b"}), stacks=(SNAPKV,), shares=[0.2, 0.4])
    names = list(dict.fromkeys(record["stack"] for record in records))
    identity = {
        "suite": {"name": "test & co", "tasks": ["words"], "found": {"words": ["config: x"]}},
        "model": {"name": "tiny", "digest": "0", "dtype": "float32"},
        "lineup": names,
        "stacks": {
            name: {"described": {"prefill": {"policy": "loopserve", "alpha": 0.9 + 0.01 * number}}}
            for number, name in enumerate(names)
        },
        "settings": {"limit": None, "seed": 0, "history": "gold"},
        "metrics": {"rouge": None},
    }
    return Run(identity, [SESSION], records)


def test_tables_hold_the_means_of_the_records(run: Run) -> None:
    found = {table.title: table for table in tables(run, ["kind"])}
    scores = [record["score"] for record in run.records if record["stack"] == "dense"]
    cells = dict(zip(found["Answers"].columns, found["Answers"].rows[0], strict=True))
    assert cells["stack"] == "dense" and cells["turns"] == "12" and cells["dialogues"] == "6"
    assert float(cells["score"].partition(" ± ")[0]) == pytest.approx(100 * sum(scores) / 12, abs=0.05)
    assert found["Score by position"].columns == ("stack", "begin", "middle", "end")
    assert found["Score by turn"].columns == ("stack", "turn 1", "turn 2")
    assert found["Score by kind"].columns == ("stack", "kind a|b") and "kind a\\|b" not in found["Answers"].markdown()
    assert [row[0] for row in found["Decoding"].rows] == ["dense", "snapkv@0.2", "snapkv@0.4"]
    assert found["Problems"].note == "None."
    assert not any("Time" in table.title for table in tables(run, times=False))


def test_figures_of_decoding_weigh_by_steps(run: Run) -> None:
    rows = {row["stack"]: row for row in summarise(run.records, "stack")}
    own = [record for record in run.records if record["stack"] == "snapkv@0.2"]
    steps = sum(record["output_tokens"] - 1 for record in own)
    read = sum(record["kv_bytes_per_token"] * (record["output_tokens"] - 1) for record in own)
    assert rows["snapkv@0.2"]["kv_bytes_per_token"] == pytest.approx(read / steps)
    assert rows["dense"]["kv_share"] == rows["dense"]["prefill_cell_density"] == 1.0
    assert rows["snapkv@0.2"]["kv_share"] < rows["snapkv@0.4"]["kv_share"] < 1.0


class Page(HTMLParser):
    """Elements, ids, references inside and addresses outside of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.refers: set[str] = set()
        self.outside: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if value is None or name.startswith("xmlns"):
                continue
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src") and value.startswith("#"):
                self.refers.add(value[1:])
            elif name in ("href", "xlink:href", "src") or "//" in value:
                self.outside.add(value)
            self.refers |= set(re.findall(r"url\(#([^)]+)\)", value))


def test_the_page_is_whole_and_needs_no_network(run: Run) -> None:
    text = page.page(run)
    parsed = Page()
    parsed.feed(text)
    assert (
        parsed.tags["svg"] == 5 and parsed.tags["table"] >= 5 and not parsed.tags["script"] and not parsed.tags["link"]
    )
    assert not parsed.outside and "@import" not in text
    assert parsed.refers <= set(parsed.ids) and max(Counter(parsed.ids).values()) == 1
    assert "a &lt;fast&gt; one" in text and "test &amp; co" in text and "<fast>" not in text
    assert text == page.page(run)


def test_a_run_without_answers_still_has_a_page(run: Run) -> None:
    empty = Run(run.identity, run.sessions, ask(Words(dialogues=2, broken=[0, 1])))
    assert "the row has no &#x27;question&#x27;" in page.page(empty)
    assert "| broken | all | 2 | the row has no 'question' |" in page.markdown(empty)


def test_heads_and_settings_are_drawn_where_they_differ(run: Run) -> None:
    """A map of heads for each sparse prefill; a sweep only where stacks differ in alpha."""
    sparse = {"name": "sparse", "prefill": {"policy": "a_shape", "sink_tokens": 2, "local_window": 8}}
    records = ask(Words(dialogues=1), stacks=(SNAPKV, sparse | {"decode": {"policy": "full"}}))
    names = list(dict.fromkeys(record["stack"] for record in records))
    described = {name: {"described": {"prefill": {"policy": "dense"}}} for name in names}
    drawn = Page()
    drawn.feed(page.page(Run(run.identity | {"lineup": names, "stacks": described}, run.sessions, records)))
    assert drawn.tags["svg"] == 5
    for number, name in enumerate(names):  # another alpha, but another budget too
        prefill = {"policy": "loopserve", "alpha": 0.9 + 0.01 * number}
        described[name] = {"described": {"prefill": prefill, "decode": {"budget": number}}}
    unlike = Page()
    unlike.feed(page.page(Run(run.identity | {"lineup": names, "stacks": described}, run.sessions, records)))
    assert unlike.tags["svg"] == 5
    cells = next(record["cells_by_head"] for record in records if record["stack"] == "sparse")
    assert list(cells) == ["0", "1"] and all(len(row) == 2 and 0 < min(row) <= max(row) < 1 for row in cells.values())


def test_pictures_can_be_saved(tmp_path: Path) -> None:
    drawn = page.head_map([[0.1, 0.9], [None, 0.4]], "lines", "share")
    assert save(drawn, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and svg(drawn, "x").startswith("<svg")
