"""``loopserve chat --url``: the chat loop over a server."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loopserve.cli import main
from loopserve.cli.remote import RemoteConversation, ServerError
from loopserve.core.errors import ConfigError, InputError
from tests.serve.conftest import FACT, QUESTION, Running, until

ANSWER = "lisbon is amber falcon river ."


def chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", *options])
    return int(ended.value.code or 0)


def test_a_conversation_with_a_server(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "saved.json"
    lines = [FACT["content"], QUESTION["content"], "/undo", QUESTION["content"], "/stats", f"/save {file}", "/exit"]
    assert chat(monkeypatch, lines, "--url", server.url, "-v") == 0
    said = capsys.readouterr().out
    assert said.count(ANSWER) == 2 and f"took back: {QUESTION['content']}" in said
    assert "turn 2:" in said and "reused tokens" in said
    saved = json.loads(file.read_text())["messages"]
    assert [each["role"] for each in saved] == ["user", "assistant", "user", "assistant"]
    assert saved[-1]["content"].strip() == ANSWER


def test_later_turns_are_reused_and_sampling_is_passed_on(server: Running) -> None:
    conversation = RemoteConversation(f"{server.url}/v1", "demo")
    list(conversation.stream(FACT["content"]))
    assert "".join(conversation.stream(QUESTION["content"], max_new_tokens=3)).split() == ANSWER.split()[:3]
    last = conversation.turns[-1].as_dict()
    assert last["reused_tokens"] > 0 and last["output_tokens"] == 3
    "".join(conversation.stream_retry(temperature=0.0))
    assert conversation.last_reply is not None and conversation.last_reply.text.strip() == ANSWER
    assert len(conversation.turns) == 2


def test_an_answer_that_is_stopped_is_taken_back_on_both_sides(server: Running) -> None:
    conversation = RemoteConversation(server.url)
    list(conversation.stream(FACT["content"]))
    answer = conversation.stream(QUESTION["content"], max_new_tokens=4000, ignore_eos=True)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    until(lambda: not server.conversations.worker.admitted)
    assert len(conversation.messages) == 2
    assert "".join(conversation.stream(QUESTION["content"])).strip() == ANSWER


@pytest.mark.parametrize(
    "options",
    [
        ["--stack", "dense"],
        ["--dtype", "float32"],
        ["--device", "cpu"],
        ["--weights", "int8"],
        ["--revision", "main"],
        ["--trust-remote-code"],
        ["--policy-checks", "strict"],
        ["--on-policy-fault", "raise"],
        ["--policy-timeout", "1"],
        ["--log"],
    ],
    ids=lambda each: each[0],
)
def test_what_only_an_engine_could_follow_is_refused(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, [], "--url", "http://127.0.0.1:9", *options) == 2
    assert options[0] in capsys.readouterr().err


def test_a_key_is_not_sent_on_to_where_a_server_points() -> None:
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(200 if self.path == "/elsewhere" else 302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            if self.path == "/elsewhere":
                self.wfile.write(b'{"data": [{"id": "x"}]}')

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        assert RemoteConversation(f"http://127.0.0.1:{listening.server_port}", api_key="secret").model == "x"
        listening.shutdown()
        thread.join()
    assert seen == ["Bearer secret", None]


def test_what_is_wrong_is_said(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(api_keys=("one",))
    assert chat(monkeypatch, [], "--url", server.url) == 2
    assert "a valid API key is needed" in capsys.readouterr().err
    assert chat(monkeypatch, ["hello"], "gpt", "--url", server.url, "--api-key", "one") == 1
    assert "'gpt' is not served here" in capsys.readouterr().err
    assert chat(monkeypatch, [], "--url", "127.0.0.1:8000") == 2
    with pytest.raises(ConfigError, match="no server answers"):
        RemoteConversation("http://127.0.0.1:9")
    conversation = RemoteConversation(server.url, api_key="one")
    with pytest.raises(InputError, match="nothing to undo"):
        conversation.undo()
    with pytest.raises(ServerError, match="400"):
        list(conversation.stream("is " * 20_000))
    assert conversation.messages == []
