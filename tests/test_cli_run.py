"""``run``, ``chat``, ``demo`` and ``bench`` with engines and benchmarks that only note what they are asked."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopserve.cli import demo as demo_command
from loopserve.cli import main
from loopserve.core.errors import InputError, ModelError

FIGURES = {
    "turn": 0,
    "prompt_tokens": 5,
    "reused_tokens": 0,
    "output_tokens": 2,
    "ttft_ms": 12.0,
    "tpot_ms": 3.0,
    "prefill_cell_density": 0.25,
    "coverage_estimated": 0.95,
    "attended_fraction": 0.1,
    "kv_bytes_per_token": 2048.0,
    "store_bytes": 4096,
    "active_bytes": 512,
}

Cli = Callable[..., tuple[int, str, str]]


@dataclass
class Usage:
    prompt_tokens: int = 5


class Chat:
    """A conversation that answers in capitals."""

    def __init__(self, notes: dict[str, Any]) -> None:
        self.notes = notes
        self.last_reply: Any = None
        self.turns: list[Any] = []

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *raised: object) -> None:
        self.notes["closed"] = True

    def stream(self, text: str, **sampling: Any) -> Iterator[str]:
        self.notes |= {"text": text, "sampling": sampling}
        if text == "fail":
            raise InputError("too long")
        stats = SimpleNamespace(as_dict=lambda: FIGURES)
        self.turns.append(stats)
        self.last_reply = SimpleNamespace(
            text=text.upper(), reasoning=None, token_ids=(1, 2), usage=Usage(), timings=Usage(), stats=stats
        )
        yield from text.upper().split(" ")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine was asked."""
    notes: dict[str, Any] = {}

    class Engine:
        @classmethod
        def from_pretrained(cls, model: str, stack: Any, **options: Any) -> "Engine":
            notes.update(model=model, stack=stack, **options)
            return cls()

        def session(self, system: str | None = None) -> Chat:
            notes["system"] = system
            return Chat(notes)

    monkeypatch.setitem(sys.modules, "loopserve.api", SimpleNamespace(Engine=Engine))
    return notes


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: str, stdin: str = "", terminal: bool = False) -> tuple[int, str, str]:
        typed = io.StringIO(stdin)
        typed.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", typed)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_run_streams_the_answer(cli: Cli, notes: dict[str, Any]):
    assert cli("run", "demo", "ab cd", "--stack", "dense") == (0, "ABCD\n", "")
    assert (notes["model"], notes["stack"].name, notes["text"]) == ("demo", "dense", "ab cd")
    assert notes["closed"] and notes["trust_remote_code"] is False


def test_options_reach_model_and_sampling(cli: Cli, notes: dict[str, Any]):
    options = "--dtype float32 --device cpu --revision main --system be-kind --max-new-tokens 7 --temperature 0.5"
    cli("run", "m", "x", "--stack", "dense", *options.split(), "--top-p", "0.9", "--top-k", "5", "--seed", "3")
    assert (notes["dtype"], notes["device"], notes["revision"], notes["system"]) == (
        "float32",
        "cpu",
        "main",
        "be-kind",
    )
    assert notes["sampling"] == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3}


@pytest.mark.parametrize("command", [["run", "m", "x"], ["chat", "m"]])
def test_what_becomes_of_a_policys_fault_can_be_chosen(cli: Cli, notes: dict[str, Any], command: list[str]):
    assert cli(*command, "--stack", "dense")[0] == 0
    chosen = (notes["policy_checks"], notes["on_policy_fault"], notes["policy_timeout_s"])
    assert chosen == ("cheap", "dense", 5.0)
    cli(
        *command,
        "--stack",
        "dense",
        *["--policy-checks", "strict", "--on-policy-fault", "raise", "--policy-timeout", "0"],
    )
    chosen = (notes["policy_checks"], notes["on_policy_fault"], notes["policy_timeout_s"])
    assert chosen == ("strict", "raise", None)


def test_faults_are_shown_with_the_figures(cli: Cli, notes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    assert "faults" not in cli("run", "m", "x", "--stack", "dense", "-v")[2]
    monkeypatch.setitem(FIGURES, "faults", 2.0)
    assert "2 faults of policies" in cli("run", "m", "x", "--stack", "dense", "-v")[2]


@pytest.mark.parametrize("arguments", [["-"], []])
def test_run_reads_a_pipe(cli: Cli, notes: dict[str, Any], arguments: list[str]):
    assert cli("run", "demo", *arguments, "--stack", "dense", stdin="from a pipe")[0] == 0
    assert notes["text"] == "from a pipe"


def test_run_without_a_prompt_is_wrong_usage(cli: Cli, notes: dict[str, Any]):
    code, out, err = cli("run", "demo", terminal=True)
    assert (code, out) == (2, "") and err.startswith("error: no prompt: ")
    for empty in ([""], ["  "], ["-"], []):
        code, out, err = cli("run", "demo", *empty, stdin=" \n")
        assert (code, out) == (2, "") and err.startswith("error: the prompt is empty: ")
    assert not notes, "nothing is loaded for a prompt that is not there"


def test_run_gives_json(cli: Cli, notes: dict[str, Any]):
    reply = json.loads(cli("run", "demo", "ab cd", "--stack", "dense", "--format", "json")[1])
    assert reply["text"] == "AB CD" and reply["token_ids"] == [1, 2]
    assert reply["usage"] == {"prompt_tokens": 5} and reply["stats"]["ttft_ms"] == 12.0


@pytest.mark.parametrize("arguments", [["--verbose", "run", "demo", "x"], ["run", "demo", "x", "-v"]])
def test_verbose_prints_figures_beside_the_answer(cli: Cli, notes: dict[str, Any], arguments: list[str]):
    code, out, err = cli(*arguments, "--stack", "dense")
    assert (code, out) == (0, "X\n") and "TTFT 12.0 ms · TPOT 3.0 ms" in err


def test_a_bad_stack_is_refused_before_the_model_is_loaded(cli: Cli, notes: dict[str, Any]):
    code, out, err = cli("run", "demo", "x", "--stack", "snapk")
    assert (code, out) == (2, "") and "did you mean 'snapkv'" in err
    assert "model" not in notes


def test_chat_from_a_pipe_prints_plain_answers(cli: Cli, notes: dict[str, Any]):
    code, out, err = cli("chat", "demo", "--stack", "dense", stdin="ab\n\n/stack\n/exit\nnever\n")
    assert (code, err) == (0, "")
    assert out.startswith("AB\nversion: 1\nname: dense\n") and "NEVER" not in out and "> " not in out


# demo and bench

ROW = {
    "asked": 4,
    "right": 3,
    "prefill_cell_density": 0.31,
    "prefill_tile_density": 0.42,
    "coverage_estimated": 0.951,
    "coverage_realised": None,
    "attended_fraction": 0.098,
    "attended_pairs": 1234.5,
    "ttft_ms": 41.2,
    "tpot_ms": 5.5,
    "kv_bytes_per_token": 123456.0,
    "store_bytes": 5 << 20,
    "active_bytes": 512 << 10,
    "fallbacks": 0,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the demo was asked; its result has two turns."""
    asked: dict[str, Any] = {}

    def run_demo(*, stacks: list[str], progress: Callable[[str, int, int], None], **options: int) -> dict[str, Any]:
        asked.update(stacks=list(stacks), **options)
        for name in stacks:
            progress(name, 1, 2)
            progress(name, 2, 2)
        rows = {name: ROW | {"turns": [ROW, ROW | {"right": 4}]} for name in stacks}
        return {"stacks": rows, "summary": "dense was right in 3 of 4, and so was the rest."}

    monkeypatch.setitem(sys.modules, "loopserve.bench.demo", SimpleNamespace(run_demo=run_demo))
    plots = SimpleNamespace(plot_demo=lambda result, path: asked.update(plot=path, drawn=result))
    monkeypatch.setitem(sys.modules, "loopserve.bench.figures", plots)
    return asked


def test_demo_prints_a_table_per_turn_and_ends_with_the_sentence(cli: Cli, asked: dict[str, Any]):
    code, out, err = cli(
        "demo", "--model", "demo", "--stack", "dense", "--stack", "snapkv", "--seed", "7", "--tokens", "900"
    )
    assert (code, err) == (0, "")
    assert asked == {
        "stacks": ["dense", "snapkv"],
        "seed": 7,
        "tokens": 900,
        "turns": 3,
        "dialogues": asked["dialogues"],
    }
    titles = [line.strip() for line in out.splitlines() if line.strip() in ("turn 1", "turn 2", "turn 3", "all turns")]
    assert titles == ["turn 1", "turn 2", "all turns"]
    row = next(line for line in out.splitlines() if line.strip().startswith("snapkv"))
    for figure in (
        "3/4",
        "31.0 %",
        "42.0 %",
        "95.1 %",
        " - ",
        "9.8 %",
        "1,234",
        "41.2 ms",
        "5.5 ms",
        "120.6 KiB",
        "5.0 MiB",
    ):
        assert figure in row
    assert out.rstrip().endswith("dense was right in 3 of 4, and so was the rest.")


def test_demo_fits_a_narrow_terminal(cli: Cli, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = cli("demo", "--model", "demo", "--stack", "dense", "--stack", "loopserve-paper", "--stack", "snapkv")
    assert max(len(line) for line in out.splitlines()) <= 80 and "…" not in out
    row = next(line for line in out.splitlines() if line.strip().startswith("KV read/token"))
    assert row.split() == ["KV", "read/token"] + ["120.6", "KiB"] * 3


def test_demo_gives_json(cli: Cli, asked: dict[str, Any]):
    result = json.loads(cli("demo", "--model", "demo", "--stack", "dense", "--format", "json")[1])
    assert result["stacks"]["dense"]["turns"][1]["right"] == 4


def test_demo_compares_the_stacks_of_the_issue_by_default(cli: Cli, asked: dict[str, Any]):
    cli("demo", "--model", "demo")
    assert asked["stacks"] == ["dense", "loopserve", "loopserve-paper", "snapkv", "streaming_llm"]
    assert tuple(asked["stacks"]) == demo_command.STACKS


def test_demo_refuses_a_misspelt_stack_and_a_lost_plot_before_any_work(cli: Cli, asked: dict[str, Any], tmp_path: Path):
    code, _, err = cli("demo", "--model", "demo", "--stack", "dens")
    assert code == 2 and "did you mean 'dense'" in err
    code, _, err = cli("demo", "--model", "demo", "--stack", "dense", "--plot", str(tmp_path / "no" / "plot.png"))
    assert code == 2 and "there is no directory" in err
    code, _, err = cli("demo", "--model", "demo", "--stack", "dense", "--plot", str(tmp_path / "plot.foo"))
    assert code == 2 and "must end in .png, .svg or .pdf" in err
    assert not asked


def test_demo_draws(cli: Cli, asked: dict[str, Any], tmp_path: Path):
    assert cli("demo", "--model", "demo", "--stack", "dense", "--plot", str(tmp_path / "plot.png"))[0] == 0
    assert asked["plot"] == tmp_path / "plot.png" and "dense" in asked["drawn"]["stacks"]


BOOK = {
    "settings": {
        "conversation": "moby_dick",
        "questions": [
            {"question": "What is the number?", "expected": "48213", "stated_in": 1},
            {"question": "What is it again?", "expected": "48213", "stated_in": 1},
        ],
    },
    "summary": "snapkv gave 1 of 2 answers as dense did.",
}


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> dict[str, Any]:
    """What the conversation about the novel was asked for."""
    noted: dict[str, Any] = {}

    def run_book_demo(
        *, stacks: list[str], model: str, dtype: str, progress: Callable[[str, int, int], None]
    ) -> dict[str, Any]:
        noted.update(stacks=list(stacks), model=model, dtype=dtype)
        if "error" in noted:
            raise noted["error"]
        turn = {"answer": "The number is 48213.", "right": 1, "prompt_tokens": 1300, "reused_tokens": 10}
        wrong = turn | {"answer": "The number is " + "4821 " * 30, "right": 0}
        row = {"asked": 2, "same": 1, "attended_fraction": 0.0512, "seconds": 31.4, "turns": [turn, wrong]}
        return BOOK | {"stacks": dict.fromkeys(stacks, row)}

    monkeypatch.setitem(sys.modules, "loopserve.bench.book_demo", SimpleNamespace(run_book_demo=run_book_demo))
    return noted


def test_demo_prints_all_answers_and_a_table_of_three_columns(
    cli: Cli, book: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("demo")
    assert (code, err) == (0, "")
    assert book == {"stacks": list(demo_command.BOOK_STACKS), "model": "smollm2", "dtype": "auto"}
    assert cli("demo", "--dtype", "float32")[0] == 0 and book["dtype"] == "float32"
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("The number is 48213.") == len(demo_command.BOOK_STACKS) and "(stated in turn 1)" in out
    assert out.count("4821 ") >= 30
    row = [line for line in out.splitlines() if line.strip().startswith("streaming_llm")][-1]
    assert row.split() == ["streaming_llm", "1", "of", "2", "5.1%", "31", "s"]
    assert "snapkv gave 1 of 2 answers as dense did." in out


def test_demo_goes_on_with_the_bundled_model_where_the_default_cannot_be_had(
    cli: Cli, book: dict[str, Any], asked: dict[str, Any]
):
    book["error"] = ModelError("cannot get model 'smollm2': no network")
    code, out, err = cli("demo")
    assert code == 0 and "all turns" in out
    assert err == "cannot get model 'smollm2': no network; going on with the tiny bundled model (--model demo)\n"
    assert tuple(asked["stacks"]) == demo_command.STACKS
    asked.clear()
    code, _, err = cli("demo", "--model", "smollm2")
    assert code == 1 and "no network" in err and not asked


def test_demo_options_of_generated_dialogues_mean_the_bundled_model(
    cli: Cli, book: dict[str, Any], asked: dict[str, Any]
):
    assert cli("demo", "--tokens", "800")[0] == 0 and asked["tokens"] == 800 and not book
    code, _, err = cli("demo", "--model", "smollm2", "--tokens", "800")
    assert code == 2 and "--tokens is of the bundled model's dialogues" in err


def test_bench_engine_passes_its_options_on(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def run_engine_bench(**options: Any) -> dict[str, Any]:
        return {"rows": [options | {"ratio": 0.987654}], "machine": {}}

    monkeypatch.setitem(sys.modules, "loopserve.bench.speed.engine", SimpleNamespace(run_engine_bench=run_engine_bench))
    row = json.loads(cli("bench", "engine", "--runs", "2", "--format", "json")[1])["rows"][0]
    assert row["model"] == "demo" and row["runs"] == 2 and row["stack"] == "dense"
    assert "0.9877" in cli("bench", "engine")[1]


def test_a_saved_conversation_goes_on_at_the_command_line(cli: Cli, tmp_path: Path):
    file = tmp_path / "talk.json"
    message = "the code of lisbon is amber falcon river . what is the code of lisbon ?"
    assert cli("chat", "demo", "--stack", "dense", stdin=f"{message}\n/save {file}\n")[0] == 0
    code, out, _ = cli("chat", "demo", "--stack", "dense", "--load", str(file), stdin="what is the code of lisbon ?\n")
    assert (code, out.strip()) == (0, "lisbon is amber falcon river .")
    code, _, err = cli("chat", "demo", "--stack", "dense", "--load", str(tmp_path / "nowhere.json"), stdin="hello\n")
    assert code == 2 and "not a saved conversation" in err
    code, _, err = cli("chat", "demo", "--load", str(file), "--system", "be kind", stdin="hello\n")
    assert code == 2 and "keeps its own system message" in err
    file.write_text(file.read_text().replace('"version": 1', '"version": 9', 1))
    code, _, err = cli("chat", "demo", "--stack", "dense", "--load", str(file), stdin="hello\n")
    assert code == 2 and "not a saved conversation (version 9, known is 1)" in err


def test_a_wrong_dtype_is_not_taken_for_a_damaged_model(cli: Cli):
    code, _, err = cli("run", "demo", "hello", "--dtype", "int7")
    assert code == 2 and "unknown dtype 'int7'" in err and "damaged" not in err


@pytest.mark.parametrize("lines", ["fail\n", "one\nfail\n", "/sats\n", "/file /nowhere/at/all\n", "/set top_q 1\n"])
def test_a_line_of_a_pipe_that_fails_makes_the_exit_code_1(cli: Cli, notes: dict[str, Any], lines: str):
    code, out, err = cli("chat", "demo", "--stack", "dense", stdin=lines)
    assert code == 1 and err.startswith("error: ") and "error" not in out
    assert ("ONE" in out) == ("one" in lines)


def test_a_failed_message_from_a_pipe_with_the_real_engine(cli: Cli):
    code, out, err = cli("chat", "demo", "--stack", "dense", stdin="word " * 20_000)
    assert (code, out) == (1, "") and "the model takes" in err


@pytest.mark.parametrize(
    ("arguments", "says", "kind", "code"),
    [
        (["run", "demo", ""], "the prompt is empty", "InputError", 2),
        (["run", "demo", "x", "--stack", "snapk"], "did you mean 'snapkv'", "ConfigError", 2),
        (["run", "/nowhere/at/all", "x", "--stack", "dense"], "cannot load model", "ModelError", 1),
        (["run", "demo", "x", "--stack", "dense", "--max-new-tokens", "1000000"], "max_new_tokens", "InputError", 2),
        (["policies", "show", "snapk"], "did you mean 'snapkv'", "ConfigError", 2),
        (["stack", "show", "snapk"], "did you mean 'snapkv'", "ConfigError", 2),
        (["bench", "report", "/nowhere/at/all.jsonl"], "/nowhere", "ConfigError", 2),
    ],
)
def test_an_error_is_json_where_json_is_asked_for(cli: Cli, arguments: list[str], says: str, kind: str, code: int):
    ended, out, err = cli(*arguments, "--format", "json")
    found = json.loads(out)
    assert ended == code and says in found["error"] and found["type"] == kind
    assert err.startswith("error: ") and says in err
    assert cli(*arguments)[1] == "", "no JSON where none is asked for"


def test_an_unexpected_error_is_json_as_well(cli: Cli, notes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: Any, **options: Any) -> Iterator[str]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Chat, "stream", broken)
    code, out, _ = cli("run", "demo", "x", "--stack", "dense", "--format", "json")
    assert code == 1 and json.loads(out)["type"] == "RuntimeError"


@pytest.mark.parametrize("command", [["run", "m", "x"], ["chat", "m"]])
def test_options_that_are_not_given_are_the_engines_to_choose(cli: Cli, notes: dict[str, Any], command: list[str]):
    assert cli(*command, "--stack", "dense", stdin="hello\n")[0] == 0
    assert notes["sampling"] == {}
    assert cli(*command, "--stack", "dense", "--temperature", "0", "--top-k", "4", stdin="hello\n")[0] == 0
    assert notes["sampling"] == {"temperature": 0.0, "top_k": 4}


def test_libraries_show_no_warnings_and_no_progress_bars(
    cli: Cli, notes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers.models.llama")

    def noisy(self: Chat, text: str, **sampling: Any) -> Iterator[str]:
        warnings.warn("use something else", FutureWarning, stacklevel=1)
        logger.warning("past_key_values gives way to cache")
        logging.getLogger("huggingface_hub.file_download").warning("no token")
        list(transformers_logging.tqdm(range(3)))
        yield "quiet"

    monkeypatch.setattr(Chat, "stream", noisy)
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert cli("chat", "demo", "--stack", "dense", stdin="hello\n") == (0, "quiet\n", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
