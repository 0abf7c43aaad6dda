"""Two replicas of the bundled model on Ray Serve on this machine: affinity, and right answers without it.

Each conversation says a code and asks for it in later turns; what is right is what the model says in this process. It runs on a
cluster of its own (``make test-ray``); the tests of a file follow each other.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import openai
import ray
import requests
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from loopserve import Engine
from loopserve.core.errors import ConfigError
from loopserve.serve.ray_app import RaySettings, build

SETTINGS = {"model": "demo", "dtype": "float32", "insecure": True, "num_replicas": 2, "shutdown_timeout_s": 20}
PLACES = ("lisbon", "oslo", "paris", "rome", "cairo", "delhi", "lima", "kyoto", "perth", "quebec")
KINDS = ("messages", "header", "prompt_cache_key", "previous_response_id", "conversation")
REPLICA = "x-loopserve-replica"


@dataclass
class Cluster:
    """An application and its address."""

    port: int
    directory: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=6)

    def deploy(self, **settings: Any) -> None:
        serve.run(build({**SETTINGS, "session_dir": str(self.directory), **settings}))

    def replicas(self) -> dict[str, Any]:
        """Ray's actors of the replicas, by the name that responses show."""
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        found = [name for name in names if name.startswith("SERVE_REPLICA::default#Replica#")]
        return {name.rsplit("#", 1)[1]: ray.get_actor(name, namespace="serve") for name in found}

    def is_whole(self) -> bool:
        """Whether both replicas take requests."""
        states = serve.status().applications["default"].deployments["Replica"].replica_states
        return len(self.replicas()) == 2 and states == {"RUNNING": 2}

    def kill(self, replica: str) -> None:
        ray.kill(self.replicas()[replica], no_restart=True)


@dataclass
class Conversation:
    """One conversation, held in one of the ways that clients have."""

    client: openai.OpenAI
    kind: str
    name: str
    place: str
    messages: list[dict[str, str]] = field(default_factory=list)
    replicas: list[str] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    last: str | None = None  # id of the response, or of the conversation

    def say(self, text: str) -> str:
        """Say something and return the answer."""
        told = {"role": "user", "content": text}
        if self.kind in ("previous_response_id", "conversation"):
            answer = self._respond(text)
        else:
            options: dict[str, Any] = {}
            if self.kind == "header":
                options["extra_headers"] = {"x-session-id": self.name}
            elif self.kind == "prompt_cache_key":
                options["prompt_cache_key"] = self.name
            raw = self.client.chat.completions.with_raw_response.create(
                model="demo", messages=[*self.messages, told], temperature=0, **options
            )
            self.replicas.append(raw.headers[REPLICA])
            completion = raw.parse()
            self.cached.append(completion.usage.prompt_tokens_details.cached_tokens)
            answer = completion.choices[0].message.content
        self.messages += [told, {"role": "assistant", "content": answer}]
        return answer

    def _respond(self, text: str) -> str:
        options = {}
        if self.kind == "conversation":
            self.last = self.last or self.client.conversations.create().id
            options["conversation"] = self.last
        elif self.last is not None:
            options["previous_response_id"] = self.last
        raw = self.client.responses.with_raw_response.create(model="demo", input=text, temperature=0, **options)
        self.replicas.append(raw.headers[REPLICA])
        response = raw.parse()
        self.cached.append(response.usage.input_tokens_details.cached_tokens)
        if self.kind == "previous_response_id":
            self.last = response.id
        return response.output_text


def said(place: str, turn: int) -> str:
    return f"the code of {place} is amber falcon river ." if turn == 0 else f"what is the code of {place} ?"


@pytest.fixture(scope="module")
def right() -> Callable[[str, int], str]:
    """What the model says in a turn of the conversation about a place, in this process."""
    engine = Engine.from_pretrained("demo", on_policy_fault="dense", dtype="float32")
    known: dict[str, list[str]] = {}

    def answer(place: str, turn: int) -> str:
        if turn >= len(known.get(place, ())):
            with engine.session() as session:
                known[place] = [session.send(said(place, each)).text.strip() for each in range(turn + 4)]
        return known[place][turn]

    return answer


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR", log_to_driver=False
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        found = Cluster(port, tmp_path_factory.mktemp("sessions"))
        found.deploy()
        yield found
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def conversations(cluster: Cluster) -> list[Conversation]:
    """Twenty conversations, four of each kind."""
    client = cluster.client
    return [
        Conversation(client, kind, f"{kind} {number}", PLACES[(2 * number + index) % len(PLACES)])
        for index, kind in enumerate(KINDS)
        for number in range(4)
    ]


def until(condition: Callable[[], object], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "a condition did not come true"
        time.sleep(0.1)


def turn(conversations: list[Conversation], right: Callable[[str, int], str], number: int) -> None:
    wrong = [each for each in conversations if each.say(said(each.place, number)).strip() != right(each.place, number)]
    assert not wrong


def test_every_conversation_keeps_its_replica(
    cluster: Cluster, conversations: list[Conversation], right: Callable[[str, int], str]
) -> None:
    for number in range(3):
        turn(conversations, right, number)
    moved = [each.name for each in conversations if len(set(each.replicas)) > 1]
    assert not moved and len({each.replicas[0] for each in conversations}) == 2
    assert all(cached > 0 for each in conversations for cached in each.cached[1:])


def test_after_a_replica_is_killed_every_next_turn_is_right(
    cluster: Cluster, conversations: list[Conversation], right: Callable[[str, int], str]
) -> None:
    killed = conversations[0].replicas[-1]
    affected = [each for each in conversations if each.replicas[-1] == killed]
    cluster.kill(killed)
    turn(conversations, right, 3)
    assert all(each.replicas[-1] != killed for each in affected)
    assert all(each.cached[-1] > 0 for each in affected)  # read from the files of the session directory
    until(lambda: killed not in cluster.replicas() and cluster.is_whole())
    turn(conversations, right, 4)


def test_a_replica_killed_in_mid_answer_ends_the_stream_with_an_error(
    cluster: Cluster, right: Callable[[str, int], str]
) -> None:
    one = Conversation(cluster.client, "header", "in the middle", "oslo")
    assert one.say(said("oslo", 0)).strip() == right("oslo", 0)
    stream = cluster.client.chat.completions.create(
        model="demo",
        messages=[*one.messages, {"role": "user", "content": said("oslo", 1)}],
        stream=True,
        max_tokens=2000,
        extra_headers={"x-session-id": one.name},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    cluster.kill(one.replicas[-1])
    with pytest.raises(openai.APIError, match="send the request again"):
        list(stream)
    until(lambda: one.replicas[-1] not in cluster.replicas())
    assert one.say(said("oslo", 1)).strip() == right("oslo", 1)


def test_a_client_that_leaves_frees_the_replica(cluster: Cluster) -> None:
    until(cluster.is_whole)
    metrics = f"http://127.0.0.1:{cluster.port}/metrics"

    def running() -> bool:
        texts = [requests.get(metrics, timeout=60).text for _ in range(8)]  # any replica answers each
        return any("num_requests_running 1.0" in text for text in texts)

    stream = cluster.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": said("rome", 0)}],
        stream=True,
        max_tokens=3000,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    until(running)
    stream.close()
    until(lambda: not running())


def test_a_response_under_way_is_cancelled_by_its_id(cluster: Cluster) -> None:
    """Whichever replica answers it: one of each."""
    until(cluster.is_whole)
    client, seen = cluster.client, set()
    for number in range(32):
        text = said(PLACES[number % len(PLACES)], 0) + f" {number}"
        raw = client.responses.with_raw_response.create(
            model="demo", input=text, stream=True, max_output_tokens=3000, extra_body={"ignore_eos": True}
        )
        stream = raw.parse()
        events = iter(stream)
        begun = next(events).response.id
        client.responses.cancel(begun)
        assert all(each.type != "response.completed" for each in events)
        seen.add(raw.headers[REPLICA])
        if len(seen) == 2:
            return
    raise AssertionError("every request went to the same replica")


def test_a_rolling_restart_loses_nothing(cluster: Cluster, right: Callable[[str, int], str]) -> None:
    """Conversations go on while every replica is replaced; the clients retry what is answered 503."""
    before, found, ending = set(cluster.replicas()), [], threading.Event()

    def talk(number: int) -> None:
        one = Conversation(cluster.client, KINDS[number], f"rolling {number}", PLACES[number])
        count = 0
        while not ending.is_set() or count < 3:
            try:
                found.append(one.say(said(one.place, count)).strip() == right(one.place, count))
            except Exception as error:
                found.append(error)
                return
            count += 1
            time.sleep(0.5)

    for number in range(len(KINDS)):
        right(PLACES[number], 60)
    talking = [threading.Thread(target=talk, args=(number,)) for number in range(len(KINDS))]
    for each in talking:
        each.start()
    cluster.deploy(max_num_seqs=2, max_queued=1, max_queued_at_gateway=1)
    until(lambda: not before & set(cluster.replicas()))
    ending.set()
    for each in talking:
        each.join()
    assert len(found) >= 3 * len(KINDS) and all(each is True for each in found), found


def test_overload_is_shed(cluster: Cluster) -> None:
    """After the test before, two replicas take three requests each."""
    url, found = f"http://127.0.0.1:{cluster.port}/v1/chat/completions", []

    def ask(number: int) -> None:
        text = said(PLACES[number % len(PLACES)], 0)
        body = {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 300, "ignore_eos": True}
        found.append(requests.post(url, json=body, timeout=120))

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    codes = [each.status_code for each in found]
    assert set(codes) == {200, 503}, codes
    shed = [each for each in found if each.status_code == 503]
    assert all(each.headers["retry-after"] and each.json()["error"]["code"] == "server_overloaded" for each in shed)


def test_keys_divide_the_tenants(cluster: Cluster, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    cluster.deploy(api_key_file=str(keys), insecure=False)
    one, two = (cluster.client.with_options(api_key=key) for key in ("one", "two"))
    with pytest.raises(openai.AuthenticationError):
        cluster.client.responses.create(model="demo", input=said("lima", 0))
    first = one.responses.create(model="demo", input=said("lima", 0), temperature=0)
    options = {"model": "demo", "input": said("lima", 1), "previous_response_id": first.id, "temperature": 0}
    assert one.responses.create(**options).output_text
    with pytest.raises(openai.NotFoundError):
        two.responses.create(**options)
    assert two.responses.create(model="demo", input=said("lima", 0)).usage.input_tokens_details.cached_tokens == 0


def test_without_keys_or_with_relative_paths_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key_file"):
        build({"model": "demo", "session_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="absolute path"):
        build({"model": "demo", "session_dir": "sessions", "insecure": True})


def test_the_sample_configuration_is_valid() -> None:
    found = ServeDeploySchema.model_validate(yaml.safe_load((Path(__file__).parents[2] / "docs/ray.yaml").read_text()))
    (application,) = found.applications
    assert application.import_path == "loopserve.serve.ray_app:build"
    assert RaySettings.model_validate(application.args).num_replicas == 2
