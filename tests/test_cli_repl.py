from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopserve.cli.repl import Repl
from loopserve.core.errors import InputError

FIGURES = {
    "prompt_tokens": 5,
    "reused_tokens": 0,
    "output_tokens": 2,
    "ttft_ms": 12.0,
    "tpot_ms": None,
    "prefill_cell_density": 0.25,
    "coverage_estimated": None,
    "attended_fraction": 0.1,
    "kv_bytes_per_token": 2048.0,
    "store_bytes": 4096,
    "active_bytes": 0,
}


class Conversation:
    """Echoes; 'interrupt' stops it after its first piece, 'fail' is refused. A turn that breaks off leaves nothing."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.closed_early = 0
        self.sampling: dict[str, Any] = {}
        self.saved: Path | None = None

    @property
    def turns(self) -> list[Any]:
        return [SimpleNamespace(as_dict=lambda n=n: {"turn": n, **FIGURES}) for n in range(len(self.said))]

    def stream(self, text: str, **sampling: Any) -> Iterator[str]:
        self.sampling = sampling
        if text == "fail":
            raise InputError("too long: shorten it\nor undo a turn")
        complete = False
        try:
            yield "you said "
            if text == "interrupt":
                raise KeyboardInterrupt
            yield text
            complete = True
            self.said.append(text)
        finally:
            self.closed_early += not complete

    def undo(self) -> dict[str, str]:
        if not self.said:
            raise InputError("nothing to undo")
        return {"role": "user", "content": self.said.pop()}

    def retry(self, **sampling: Any) -> Any:
        if not self.said:
            raise InputError("nothing to undo")
        return SimpleNamespace(text=f"again {self.said[-1]}")

    def save(self, path: str | Path) -> None:
        self.saved = Path(path)


def talk(*lines: str | type[BaseException], verbose: bool = False, **options: Any) -> tuple[int, str, Conversation]:
    """Type the lines (or let an exception come in their place); the exit code, all that was printed, the talk."""
    conversation, printed, waiting = Conversation(), [], iter(lines)

    def read() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    repl = Repl(conversation, "prefill:\n  policy: dense\n", read, printed.append, verbose=verbose, **options)
    return repl.run(), "".join(printed), conversation


def test_lines_in_answers_out_until_the_input_ends():
    code, printed, conversation = talk("hello", "", "   ", "  and then?  ")
    assert code == 0
    assert printed == "you said hello\nyou said and then?\n"
    assert conversation.said == ["hello", "and then?"]


def test_sampling_options_reach_the_model():
    assert talk("x", sampling={"max_new_tokens": 7, "seed": 3})[2].sampling == {"max_new_tokens": 7, "seed": 3}


def test_exit_leaves_and_reads_no_further():
    code, printed, conversation = talk("/exit", "hello")
    assert (code, printed, conversation.said) == (0, "", [])


def test_ctrl_c_in_mid_answer_keeps_the_last_complete_turn():
    code, printed, conversation = talk("one", "interrupt", "two")
    assert code == 0
    assert conversation.said == ["one", "two"] and conversation.closed_early == 1
    assert "\nstopped; the conversation stands at its last complete turn. Ctrl-C again leaves\n" in printed
    assert talk(KeyboardInterrupt)[1] == "\nCtrl-C again leaves\n"


def test_ctrl_c_while_printing_closes_the_answer_at_once():
    """The unfinished turn must be taken back before the next line is read, not when the garbage is collected."""
    conversation, closed = Conversation(), []
    lines: Iterable[Any] = iter(["hello", "next"])

    def read() -> str:
        closed.append(conversation.closed_early)
        return next(lines, None) or (_ for _ in ()).throw(EOFError)

    def write(piece: str) -> None:
        if piece == "hello":
            raise KeyboardInterrupt

    assert Repl(conversation, "", read, write).run() == 0
    assert closed == [0, 1, 1]
    assert conversation.said == ["next"]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ((KeyboardInterrupt, KeyboardInterrupt), 130),
        (("interrupt", KeyboardInterrupt), 130),
        (("hello", KeyboardInterrupt, KeyboardInterrupt), 130),
        ((KeyboardInterrupt, "hello", KeyboardInterrupt), 0),
        ((KeyboardInterrupt, "", KeyboardInterrupt), 0),
        ((KeyboardInterrupt,), 0),
        ((), 0),
    ],
)
def test_the_second_ctrl_c_in_a_row_leaves(lines: tuple[Any, ...], code: int):
    assert talk(*lines)[0] == code


def test_an_error_is_printed_and_the_conversation_goes_on():
    code, printed, conversation = talk("one", "fail", "two")
    assert code == 0 and conversation.said == ["one", "two"]
    assert "error: too long: shorten it\nerror: or undo a turn\n" in printed


def test_unknown_commands_get_a_hint():
    printed = talk("/sats", "/quux", "/")[1]
    assert "no command '/sats'; did you mean '/stats'? (known: /exit, /help, " in printed
    assert "no command '/quux' (known: " in printed
    assert "no command '/' (known: " in printed


def test_help_names_every_command():
    printed = talk("/help")[1]
    for command in ("/help", "/stats", "/stack", "/undo", "/retry", "/save FILE", "/exit"):
        assert command in printed


def test_undo_and_retry():
    code, printed, conversation = talk("one", "two", "/undo", "/retry", "/undo", "/undo", "/retry")
    assert code == 0 and conversation.said == []
    assert "took back: two\nagain one\n\ntook back: one\nerror: nothing to undo\nerror: nothing to undo\n" in (
        printed.replace("again one\n", "again one\n\n", 1)
    )


def test_save_wants_a_file(tmp_path: Path):
    printed = talk("/save")[1]
    assert "say where" in printed
    _, printed, conversation = talk(f"/save {tmp_path}/my chat.json")
    assert conversation.saved == tmp_path / "my chat.json"
    assert f"saved to {tmp_path}/my chat.json" in printed


def test_save_knows_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert talk("/save ~/chat.json")[2].saved == tmp_path / "chat.json"


def test_stats_and_stack():
    printed = talk("/stats", "one", "two", "/stats", "/stack")[1]
    assert printed.startswith("no turn yet\n")
    assert "turn 2: 5 new + 0 reused tokens, 2 out · TTFT 12.0 ms · TPOT - · prefill density 25.0 %" in printed
    assert "attended 10.0 % · KV read 2.0 KiB/token · held 4.0 KiB" in printed
    assert printed.endswith("prefill:\n  policy: dense\n")


def test_verbose_prints_figures_after_each_answer():
    assert talk("one", "two", "/retry", verbose=True)[1].count("TTFT") == 3
