"""Time requests to the bundled model through Ray Serve beside `loopserve serve`, in turn, and what a cluster takes.

    make bench-ray

Prints one line of JSON: seconds until the application answered, until a killed replica was replaced, memory of all processes of Ray
(proportional set size), and for short answers the times of both servers and their ratio, request by request.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import ray
from ray import serve

from loopserve.serve.ray_app import build

REQUESTS = 60
TEXT = "the code of {} is amber falcon river ."
PLACES = ("lisbon", "oslo", "paris", "rome", "cairo", "delhi", "lima", "kyoto", "perth", "quebec")


def cluster_mib() -> float:
    """Return the memory of all processes of Ray but this one; pages that several share count once."""
    total = 0
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_text()
            if (
                "ray::" in command
                or "/ray/core/" in command
                or "/ray/_private/" in command
                or "/ray/dashboard/" in command
            ):
                rollup = (each / "smaps_rollup").read_text().split("Pss:")[1]
                total += int(rollup.split()[0])
        except (OSError, IndexError):
            continue
    return total / 1024


def seconds(client: openai.OpenAI, text: str) -> float:
    begun = time.perf_counter()
    client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16
    )
    return time.perf_counter() - begun


def replicas() -> set[str]:
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return {name for name in names if name.startswith("SERVE_REPLICA::default#Replica#")}


def main() -> None:
    directory = tempfile.mkdtemp()
    main_of_cli = "import sys; from loopserve.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", main_of_cli, "serve", "demo", "--port", "0"]
    direct = subprocess.Popen(
        [*command, "--session-dir", f"{directory}/direct"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        assert direct.stdout is not None
        url = next(word for word in direct.stdout.readline().split() if word.startswith("http://"))
        found: dict[str, float] = {"requests": REQUESTS}
        begun = time.perf_counter()
        options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20, "log_to_driver": False}
        ray.init(**options, logging_level="ERROR")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": "demo", "session_dir": f"{directory}/ray", "insecure": True}))
        clients = [openai.OpenAI(base_url=f"{each}/v1", api_key="none") for each in (url, f"http://127.0.0.1:{port}")]
        seconds(clients[1], TEXT.format("lisbon"))
        found["up_s"] = time.perf_counter() - begun
        times: list[tuple[float, float]] = []
        for number in range(REQUESTS + 6):
            text = TEXT.format(PLACES[number % len(PLACES)])
            direct_s, ray_s = (seconds(client, text) for client in clients)
            times += [(direct_s, ray_s)] if number >= 6 else []
        found["direct_p50_s"], found["ray_p50_s"] = (statistics.median(each) for each in zip(*times, strict=True))
        found["added_p50_s"] = statistics.median(with_ray - without for without, with_ray in times)
        found["ratio_p50"] = statistics.median(with_ray / without for without, with_ray in times)
        found["ray_pss_mib"] = cluster_mib()
        before = replicas()
        killed = next(iter(before))
        ray.kill(ray.get_actor(killed, namespace="serve"), no_restart=True)
        begun = time.perf_counter()
        while killed in replicas() or len(replicas()) < 2:
            time.sleep(0.05)
        deployment = serve.status().applications["default"].deployments["Replica"]
        while deployment.replica_states.get("RUNNING", 0) < 2:
            time.sleep(0.05)
            deployment = serve.status().applications["default"].deployments["Replica"]
        found["replaced_s"] = time.perf_counter() - begun
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        serve.shutdown()
    finally:
        direct.kill()
        direct.wait()
        ray.shutdown()


if __name__ == "__main__":
    main()
