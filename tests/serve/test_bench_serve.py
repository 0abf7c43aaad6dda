"""``loopserve bench serve`` against a server, and what it makes of servers that fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from loopserve.bench.serving.client import TurnTimes
from loopserve.bench.serving.summary import percentile, read_goodput, summary
from loopserve.cli import main
from loopserve.core.errors import ConfigError
from tests.serve.conftest import Running


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", *arguments])
    return int(ended.value.code or 0)


def test_a_load_of_conversations_is_measured(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--num-prompts",
        "3",
        "--num-turns",
        "3",
        "--random-input-len",
        "40",
        "--turn-input-len",
        "5",
        "--random-output-len",
        "6",
    ]
    options += [
        "--ignore-eos",
        "--goodput",
        "ttft:100000",
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "x.json",
    ]
    assert bench("--base-url", f"{server.url}/v1", *options, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (9, 0, 54)
    assert found["request_goodput"] == found["request_throughput"] > 0
    first, *later = found["turns"]
    assert first["cached_share"] == 0 and all(each["cached_share"] > 0.5 for each in later)
    assert [each["turn"] for each in found["turns"]] == [1, 2, 3]
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert bench("--base-url", server.url, *options) == 0
    assert "TTFT p99" in capsys.readouterr().out


def test_errors_are_counted(serve: Callable[..., Running], capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(max_requests_per_key=1)
    assert bench("--base-url", server.url, "--num-prompts", "4", "--num-turns", "1", "--format", "json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] >= 1 and found["failed"] == sum(found["errors"].values()) == 4 - found["completed"]
    assert all(each.startswith("429: ") for each in found["errors"])


@pytest.mark.parametrize(
    ("reason", "end", "completed"), [("length", "", 1), (None, "data: [DONE]\n\n", 1), (None, "", 0)]
)
def test_a_stream_is_over_when_it_says_so_in_either_way(
    reason: str | None, end: str, completed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk = json.dumps({"choices": [{"delta": {"content": "x"}, "finish_reason": reason}]})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b'{"data": [{"id": "m"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(f"data: {chunk}\n\n{end}".encode())

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *parts: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert bench("--base-url", url, "--num-prompts", "1", "--num-turns", "1", "--format", "json") == 1 - completed
        server.shutdown()
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["errors"]) == (completed, {} if completed else {"the stream ended early": 1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-url", "http://127.0.0.1:9"], "no server answers"),
        (["--base-url", "http://127.0.0.1:9", "--model", "x"], "no server answers"),
        (["--goodput", "x:1"], "is no metric"),
        (["--goodput", "ttft"], "write a metric"),
        (["--percentile-metrics", "ttft,x"], "is not known"),
        (["--metric-percentiles", "101"], "between 0 and 100"),
        (["--extra-body", "["], "no valid JSON"),
    ],
)
def test_what_cannot_be_measured_is_said(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*options) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_wants_a_key_says_so(serve: Callable[..., Running], capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(api_keys=("one",))
    for options in ([], ["--model", "demo"]):
        assert bench("--base-url", server.url, *options) == 2
        assert "the server wants a key; give --api-key" in capsys.readouterr().err


def test_another_model_is_refused(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--base-url", server.url, "--model", "gpt") == 2
    assert "'gpt' is not served" in capsys.readouterr().err


def test_figures_are_those_of_the_times() -> None:
    one = TurnTimes(0, 0, [0.1, 0.2, 0.4], 0.5, 100, 0, 3)
    two = TurnTimes(0, 1, [0.3], 0.3, 100, 50, 1)
    bad = TurnTimes(1, 0, error="500: x")
    found = summary([one, two, bad], 2.0, percentiles=[0, 50, 100], goodput={"ttft": 200.0, "e2el": 500.0})
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"500: x": 1})
    assert found["cached_share"] == 0.25 and found["output_throughput"] == 2.0 and found["request_goodput"] == 0.5
    assert [found[f"p{share}_ttft_ms"] for share in (0, 50, 100)] == pytest.approx([100, 200, 300])
    assert found["mean_itl_ms"] == pytest.approx(150) and found["mean_tpot_ms"] == pytest.approx(150)
    assert [each["cached_share"] for each in found["turns"]] == [0.0, 0.5]
    assert percentile([3.0, 1.0, 2.0], 25) == 1.5
    assert read_goodput(["ttft:1.5"]) == {"ttft": 1.5}
    with pytest.raises(ConfigError):
        read_goodput(["itl:3"])
