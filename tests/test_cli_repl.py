import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopserve.cli.repl import ReadingProgress, Repl
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

    last_reply = None

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

    def stream_retry(self, **sampling: Any) -> Iterator[str]:
        self.sampling = sampling
        if not self.said:
            raise InputError("nothing to undo")
        yield "again "
        if self.said[-1] == "interrupt the second":
            raise KeyboardInterrupt
        yield self.said[-1]

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
    assert "no command '/sats'; did you mean '/stats'? (known: /exit, /file, /help, " in printed
    assert "no command '/quux' (known: " in printed
    assert "no command '/' (known: " in printed


def test_help_names_every_command():
    printed = talk("/help")[1]
    for command in ("/help", "/stats", "/stack", "/undo", "/retry", "/save FILE", "/exit", "/file PATH", "/set", '"""'):
        assert command in printed


def test_undo_and_retry():
    code, printed, conversation = talk("one", "two", "/undo", "/retry", "/undo", "/undo", "/retry")
    assert code == 0 and conversation.said == []
    note = "(temperature 0.7 for this answer: else it would be the same)\n"
    assert printed.endswith(
        f"took back: two\n{note}again one\ntook back: one\nerror: nothing to undo\nerror: nothing to undo\n"
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


def test_a_message_that_got_no_answer_is_what_retry_sends():
    code, printed, conversation = talk("one", "interrupt", "/retry", "two")
    assert code == 0 and conversation.said == ["one", "two"]
    assert printed.count("you said ") == 4 and "again one" not in printed
    _, printed, conversation = talk("one", "fail", "/retry")
    assert conversation.said == ["one"] and printed.count("error: too long") == 2


def test_after_an_answer_retry_is_about_that_answer():
    _, printed, conversation = talk("one", "interrupt", "two", "/retry")
    assert "again two" in printed and conversation.said == ["one", "two"]


@pytest.mark.parametrize(
    ("given", "used", "says"),
    [
        ({}, {"temperature": 0.7}, "(temperature 0.7 for this answer"),
        ({"temperature": 0.0, "seed": 3}, {"temperature": 0.7}, "(temperature 0.7, no seed for this answer"),
        ({"temperature": 1.2, "seed": 3}, {"temperature": 1.2}, "(no seed for this answer"),
        ({"temperature": 1.2, "top_k": 1}, {"temperature": 1.2}, "(no top_k for this answer"),
        ({"temperature": 1.2, "top_k": 5}, {"temperature": 1.2, "top_k": 5}, ""),
    ],
)
def test_another_answer_is_not_the_same_one(given: dict[str, Any], used: dict[str, Any], says: str):
    _, printed, conversation = talk("one", "/retry", sampling=given)
    assert conversation.sampling == used and says in printed and bool(says) == ("for this answer" in printed)
    assert talk("one", "/retry", "two", sampling=given)[2].sampling == given, "for that one answer only"


def test_sampling_options_are_listed_and_set():
    printed = talk("/set")[1]
    assert "max_new_tokens = 256" in printed and "temperature = 0.0" in printed and "seed = none" in printed
    _, printed, conversation = talk("/set max_new_tokens 60", "/set top-k 5", "one", sampling={"seed": 3})
    assert conversation.sampling == {"max_new_tokens": 60, "top_k": 5, "seed": 3}
    assert printed.startswith("max_new_tokens = 60")
    conversation = talk(
        "/set seed none", "/set max_new_tokens default", "one", sampling={"seed": 3, "max_new_tokens": 7}
    )[2]
    assert conversation.sampling == {"seed": None}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set max_new_token 60", "no option 'max_new_token'; did you mean 'max_new_tokens'?"),
        ("/set top_q", "no option 'top_q'"),
        ("/set max_new_tokens many", "error: max_new_tokens: "),
        ("/set max_new_tokens 0", "error: max_new_tokens: Input should be greater than 0 (got 0)"),
        ("/set temperature NaN", "error: temperature: "),
        ("/set seed []", "error: seed: "),
    ],
)
def test_a_wrong_option_changes_nothing(line: str, says: str):
    code, printed, conversation = talk(line, "one", sampling={"seed": 3})
    assert code == 0 and says in printed and conversation.sampling == {"seed": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (('"""one', "", "  two", 'three"""'), "one\n\n  two\nthree"),
        (('"""', "/help", '"""'), "/help"),
        (('"""/usr/bin is a folder"""',), "/usr/bin is a folder"),
        (('"""one', "two"), "one\ntwo"),  # the end of the input closes it
        (("one\ntwo\n",), "one\ntwo"),  # pasted
        (("/usr/bin\n/usr/lib",), "/usr/bin\n/usr/lib"),
        (('"""pasted\nwhole"""',), "pasted\nwhole"),
    ],
)
def test_several_lines_are_one_message(lines: tuple[str, ...], message: str):
    code, _, conversation = talk(*lines)
    assert code == 0 and conversation.said == [message]


def test_ctrl_c_drops_a_block_that_is_being_typed():
    code, printed, conversation = talk('"""one', KeyboardInterrupt, "two")
    assert code == 0 and conversation.said == ["two"] and "stopped" not in printed


def test_a_file_is_a_message(tmp_path: Path):
    file = tmp_path / "my text.txt"
    file.write_bytes("\ufeffone\nzwölf\n".encode())
    assert talk(f"/file {file}")[2].said == ["one\nzwölf\n"]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, says in (
        (tmp_path / "bytes", "is no UTF-8 text (byte 0)"),
        (tmp_path, "is no file"),
        (tmp_path / "nowhere", "cannot be read (No such file or directory)"),
        ("/dev/null", "is no file"),
    ):
        code, printed, conversation = talk(f"/file {path}")
        assert code == 0 and says in printed and conversation.said == []
    assert "say which: /file PATH" in talk("/file")[1]


def test_a_pipe_that_failed_ends_with_1_and_its_errors_are_apart():
    errors: list[str] = []
    code, printed, conversation = talk("one", "fail", "two", interactive=False, warn=errors.append)
    assert (code, conversation.said) == (1, ["one", "two"])
    assert errors == ["error: too long: shorten it\n", "error: or undo a turn\n"] and "error" not in printed
    assert talk("one", interactive=False)[0] == 0


def test_the_line_that_shows_the_reading_is_removed_before_the_answer():
    events: list[str] = []
    options: dict[str, Any] = {"progress": lambda done, total: None, "answering": lambda: events.append("removed")}
    _, _, conversation = talk("one", "fail", "interrupt", "/retry", **options)
    assert "progress" in conversation.sampling and events == ["removed"] * 4
    shown = io.StringIO()
    progress = ReadingProgress(shown)
    progress(0, 20)
    assert shown.getvalue() == ""
    progress(4096, 32768)
    assert shown.getvalue() == "\rreading: 4,096 of 32,768 tokens"
    progress.clear()
    progress.clear()
    assert shown.getvalue().endswith("\r" + " " * 31 + "\r") and shown.getvalue().count("\r") == 3
