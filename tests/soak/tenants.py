"""R6: no tenant's conversation reaches another: same prompts, forks, undos, deletions, restarts, and other people's ids.

Memory that is let go holds NaN, so that an answer which reads a pair of somebody else's is an error.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from tests.serve.conftest import Running
from tests.soak.cases import Cases, running
from tests.soak.unwritten import filled_with_nan

KEYS = ("one", "two", "three")
CITIES = ("lisbon", "oslo", "paris")
WORDS = ("amber", "falcon", "river", "ember", "silver", "anchor", "cedar", "copper", "harbor")
QUESTION = "what is the code of {} ?"


def run(cases: int, seed: int = 0) -> Cases:
    found, draw = Cases(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, filled_with_nan():
        people = [_Person(key, draw) for key in KEYS]
        done = 0
        while done < cases:
            with running(api_keys=KEYS, session_dir=Path(folder), kv_cache_memory=16 << 20) as server:
                for _ in range(min(cases - done, 40)):  # a restart after so many
                    person = draw.choice(people)
                    with found.case(f"{done} {person.key}"):
                        person.act(server, people)
                    done += 1
    return found


class _Person:
    """A client of one tenant, with facts of its own about the same cities. ``talks`` are its conversations so far."""

    def __init__(self, key: str, draw: random.Random) -> None:
        self.key, self.draw = key, draw
        self.codes = {city: draw.sample(WORDS, 3) for city in CITIES}
        self.talks: list[list[dict[str, str]]] = []
        self.responses: list[str] = []

    def act(self, server: Running, people: list[_Person]) -> None:
        others = [each for each in people if each is not self]
        self.draw.choice((self._begin, self._go_on, self._go_on, self._respond, self._manage))(server)
        if self.draw.random() < 0.5:
            self.draw.choice((self._intrude, self._same_history))(server, self.draw.choice(others))

    def _ask(self, server: Running, messages: list[Any], **options: Any) -> Any:
        client = server.client(self.key)
        reply = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=24, **options)
        text = reply.choices[0].message.content
        own = {word for words in self.codes.values() for word in words}
        asked = {word for message in messages for word in message["content"].split()}
        assert not (set(text.split()) & set(WORDS)) - asked - own, f"{text!r} holds what this tenant never said"
        return reply

    def _begin(self, server: Running) -> None:
        city = self.draw.choice(CITIES)
        first = {"role": "user", "content": f"the code of {city} is {' '.join(self.codes[city])} ."}
        reply = self._ask(server, [first])
        self.talks.append([first, {"role": "assistant", "content": reply.choices[0].message.content}])
        del self.talks[:-4]

    def _go_on(self, server: Running) -> None:
        if not self.talks:
            return
        talk = self.draw.choice(self.talks)
        city = next(word for word in talk[0]["content"].split() if word in CITIES)
        messages = [*talk, {"role": "user", "content": QUESTION.format(city)}]
        reply = self._ask(server, messages)
        text = reply.choices[0].message.content
        if len(talk) == 2:  # the model answers one question after one fact
            assert set(self.codes[city]) & set(text.split()), f"{text!r} instead of {self.codes[city]}"
        if len(talk) < 8:
            talk += [messages[-1], {"role": "assistant", "content": text}]

    def _same_history(self, server: Running, other: _Person) -> None:
        """Send the history of another tenant: nothing of it is cached for this one, and all of it is for the other."""
        first = {"role": "user", "content": f"the code of rome is {self.draw.randrange(10**9)} ."}
        text = other._ask(server, [first]).choices[0].message.content
        history = [first, {"role": "assistant", "content": text}, {"role": "user", "content": "and ?"}]
        assert self._ask(server, history).usage.prompt_tokens_details.cached_tokens == 0
        assert other._ask(server, history).usage.prompt_tokens_details.cached_tokens > 0

    def _respond(self, server: Running) -> None:
        previous = self.draw.choice([None, *self.responses[-3:]])
        options = {} if previous is None else {"previous_response_id": previous}
        reply = server.client(self.key).responses.create(
            model="demo", input="the code of rome is x .", max_output_tokens=8, **options
        )
        self.responses.append(reply.id)

    def _manage(self, server: Running) -> None:
        http, base = server.client(self.key)._client, f"{server.url}/v1/sessions"
        headers = {"Authorization": f"Bearer {self.key}"}
        listed = http.get(base, headers=headers).json()["data"]
        if not listed:
            return
        at = f"{base}/{self.draw.choice(listed)['id']}"
        act = self.draw.choice(("fork", "undo", "delete"))
        if act == "delete":
            assert http.delete(at, headers=headers).json()["deleted"]
            self.responses.clear()
        else:
            assert http.post(f"{at}/{act}", headers=headers).status_code in (200, 400)

    def _intrude(self, server: Running, other: _Person) -> None:
        """Name what belongs to another tenant: it is not there for this one."""
        http = server.client(self.key)._client
        mine, theirs = ({"Authorization": f"Bearer {each.key}"} for each in (self, other))
        sessions = http.get(f"{server.url}/v1/sessions", headers=theirs).json()["data"]
        own = {each["id"] for each in http.get(f"{server.url}/v1/sessions", headers=mine).json()["data"]}
        assert not own & {each["id"] for each in sessions}
        for each in sessions[:2]:
            for method, path in (("GET", ""), ("POST", "/fork"), ("POST", "/undo"), ("DELETE", "")):
                found = http.request(method, f"{server.url}/v1/sessions/{each['id']}{path}", headers=mine)
                assert found.status_code == 404
        for name in other.responses[-2:]:
            for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
                found = http.request(method, f"{server.url}/v1/responses/{name}{path}", headers=mine)
                assert found.status_code == 404
            body = {"model": "demo", "input": "x", "previous_response_id": name}
            assert http.post(f"{server.url}/v1/responses", json=body, headers=mine).status_code == 404
