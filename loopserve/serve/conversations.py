"""Find the turn that a request goes on from, have it answered, and commit the new turn."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from loopserve.api import Engine
from loopserve.core.engine.sampling import LogitsProcessor, SamplingConfig
from loopserve.core.engine.scheduler import Request
from loopserve.core.errors import InputError, ModelError
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.chat import Message, Prompt
from loopserve.models.digest import model_digest
from loopserve.serve.answer import Choice, Delta, Reply
from loopserve.serve.errors import not_found
from loopserve.serve.kv_files import KVFiles
from loopserve.serve.live import LiveSessions
from loopserve.serve.matching import ROOT, common, extend, prefixes
from loopserve.serve.records import Path, StoredSession, StoredTurn, new_id
from loopserve.serve.settings import ServerSettings
from loopserve.serve.store import Store
from loopserve.serve.worker import Worker

_log = logging.getLogger("loopserve.serve")
_FIRST_S = 10.0  # headers of a stream wait so long for the first token, to say what was reused
T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """Hold what a request asks for.

    messages: the whole conversation, or with ``previous`` what follows that turn. previous: id of a turn. session: id of a session.
    key: the client's own name for the conversation. Without messages, ``tokens`` are the prompt, and nothing is committed.
    """

    tenant: str
    messages: Sequence[Message]
    sampling: SamplingConfig
    previous: str | None = None
    session: str | None = None
    key: str | None = None
    stack: str | None = None  # name of an allowed stack; None: the server's
    n: int = 1
    tokens: Sequence[int] | None = None
    store: bool = True  # False: the turn is answered and forgotten
    logits_processors: Sequence[LogitsProcessor] = ()


@dataclass
class Match:
    """Hold the path that a request goes on from, the messages that it adds, and why no more of it is known."""

    path: Path
    messages: list[Message]
    session: StoredSession
    reason: str = ""


@dataclass(eq=False)
class Answer:
    """Hold the answers to one request while they are written. Iterate over it for their deltas."""

    id: str
    ask: Ask
    match: Match
    prompt: Prompt
    stack: PolicyStack
    commit: Callable[[Answer, Choice, Reply], Any] = field(repr=False)
    created: float = field(default_factory=time.time)
    choices: list[Choice] = field(default_factory=list)
    events: asyncio.Queue[tuple[Choice, Delta | BaseException]] = field(default_factory=asyncio.Queue)
    turns: dict[int, StoredTurn] = field(default_factory=dict)  # committed, by index of the answer
    cached_tokens: int = 0  # of the prompt, that were not computed for this request
    closed: bool = False
    _first: asyncio.Task[tuple[Choice, Delta | BaseException]] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the whole conversation before the answer."""
        return len(self.match.path.tokens) + len(self.prompt.tokens)

    @property
    def cache_note(self) -> str:
        """Return what was reused, or why nothing was, as the header says it."""
        if self.cached_tokens:
            return f"hit {self.cached_tokens}"
        return f"miss: {self.match.reason or 'the cache of this conversation was released'}"

    async def wait_for_first(self) -> None:
        """Wait for the first delta, at most some seconds; raise the error if the request failed before it."""
        self._first = asyncio.create_task(self.events.get())
        done, _ = await asyncio.wait({self._first}, timeout=_FIRST_S)
        if done and isinstance(error := self._first.result()[1], BaseException):
            raise error

    async def _next(self) -> tuple[Choice, Delta | BaseException]:
        first, self._first = self._first, None
        return await (first if first is not None else self.events.get())

    async def __aiter__(self) -> AsyncIterator[Delta]:
        left = self.ask.n
        while left:
            choice, event = await self._next()
            if isinstance(event, BaseException):
                raise event
            if event.reply is not None:
                left -= 1
                await self.commit(self, choice, event.reply)
            yield event

    async def replies(self) -> list[Reply]:
        """Read every delta; return the answers in their order."""
        found = {delta.index: delta.reply async for delta in self if delta.reply is not None}
        return [found[index] for index in sorted(found)]


class Conversations:
    """Answer requests of many conversations. Used from one event loop."""

    def __init__(
        self, engine: Engine, settings: ServerSettings, stacks: Mapping[str, PolicyStack] | None = None
    ) -> None:
        """stacks: those that a request may name, beside the engine's own. Raises ConfigError for what cannot be served."""
        self.engine, self.settings = engine, settings
        self.stacks = dict(stacks or {})
        for stack in self.stacks.values():
            engine.token_engine.session(stack).close()  # refused at start, not at the first request
        self.model = model_digest(engine.model, engine.tokenizer.tokenizer)
        self.worker = Worker(engine, settings)
        self.live = LiveSessions(engine.token_engine, self.worker.scheduler.ledger)
        self.store = Store(settings.session_dir)
        self.files = KVFiles(self.store, self.model, engine.token_engine)
        self._disk = ThreadPoolExecutor(1, "loopserve store")
        self._text = ThreadPoolExecutor(1, "loopserve text")
        self._writing: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Start the model's thread."""
        self.worker.start()

    async def close(self) -> None:
        """Stop answering; write what is still to be written. May be called twice."""
        await asyncio.to_thread(self.worker.stop)
        if self._writing:
            await asyncio.wait(self._writing)
        self._text.shutdown()
        self._disk.shutdown()
        self.store.close()
        self.live.close()

    # Answering.

    @asynccontextmanager
    async def begin(self, ask: Ask) -> AsyncIterator[Answer]:
        """Have a request answered. What is not complete when the block ends is cancelled and taken back.

        Raises CapacityError at once if too many are waiting, InputError for what can never be answered, ApiError for ids that are
        not known.
        """
        self.worker.admit(ask.n)
        answer: Answer | None = None
        try:
            stack = self._stack(ask.stack)
            match = await self._match(ask)
            match, prompt = await self._prompt(ask, match)
            answer = Answer(new_id(), ask, match, prompt, stack, self._commit)
            await self._submit(answer)
            await answer.wait_for_first()
            yield answer
        finally:
            self.worker.leave(ask.n)
            if answer is not None:
                closing = answer
                closing.closed = True
                self.worker.call(lambda: self._close(closing))

    def _stack(self, name: str | None) -> PolicyStack:
        if name is None or name == self.engine.stack.name:
            return self.engine.stack
        if name not in self.stacks:
            raise not_found("stack", name, "stack_not_found")
        return self.stacks[name]

    async def _match(self, ask: Ask) -> Match:
        now = time.time()
        messages = list(ask.messages)
        if ask.tokens is not None:
            return Match(Path(), [], StoredSession(new_id(), ask.tenant, None, None, now, now), "a prompt of its own")
        return await self.on_disk(lambda: self._find(ask, messages, now))

    def _find(self, ask: Ask, messages: list[Message], now: float) -> Match:
        store, tenant = self.store, ask.tenant
        if ask.previous is not None:
            path = store.path(tenant, ask.previous)
            if path is None or path.head is None or path.head.model != self.model:
                raise not_found("previous response", ask.previous, "previous_response_not_found")
            session = store.session(tenant, path.head.session)
            fallback = StoredSession(path.head.session, tenant, None, None, now, now)
            return Match(path, messages, session or fallback)
        named = self._named(ask, now)
        digests = prefixes(messages)
        for turn in store.find(tenant, self.model, list(digests), named.id if named else None):
            path = store.path(tenant, turn.id)
            size = digests[turn.digest]
            if path is None or common(path.messages, messages[:size]) < size or len(path.messages) != size:
                continue  # digests only index
            session = named or store.session(tenant, turn.session)
            if named is None and (session is None or session.head != turn.id):
                session = None  # the conversation went on otherwise: a branch is a session of its own
            reason = "" if size else "new conversation"
            return Match(
                path, messages[size:], session or StoredSession(new_id(), tenant, None, None, now, now), reason
            )
        reason = "new conversation"
        if named is not None and named.head is not None and (held := store.path(tenant, named.head)) is not None:
            reason = f"message {common(held.messages, messages)} differs"
        return Match(Path(), messages, named or StoredSession(new_id(), tenant, None, None, now, now), reason)

    def _named(self, ask: Ask, now: float) -> StoredSession | None:
        """Return the session that a request names, a new one for a name that is not known yet; None if it names none."""
        if ask.session is not None:
            found = self.store.session(ask.tenant, ask.session)
            if found is None:
                raise not_found("conversation", ask.session, "conversation_not_found")
            return found
        if ask.key is None:
            return None
        name = hashlib.sha256(f"{ask.tenant}\n{ask.key}".encode()).hexdigest()[
            :32
        ]  # the same for simultaneous requests
        found = self.store.session(ask.tenant, ask.key) or self.store.session(ask.tenant, name)
        return found or StoredSession(name, ask.tenant, ask.key, None, now, now)

    async def _prompt(self, ask: Ask, match: Match) -> tuple[Match, Prompt]:
        """Return the tokens that a request adds to its path. They must be at least one."""
        tokenizer = self.engine.tokenizer
        if ask.tokens is not None:
            return match, Prompt("", tuple(ask.tokens))
        if match.path.turns:
            whole, last = match.path.messages + match.messages, match.path.tokens[-1]
            try:
                prompt = await self.on_text(lambda: tokenizer.turn_prompt(whole, last))
                if prompt.tokens:
                    return match, prompt
            except ModelError:
                _log.debug("the template refuses to go on from a turn", exc_info=True)
            match = Match(Path(), whole, match.session, "the chat template changes earlier answers")
        return match, await self.on_text(lambda: tokenizer.prompt(match.messages))

    async def _submit(self, answer: Answer) -> None:
        path, loop = answer.match.path, asyncio.get_running_loop()
        loaded = None
        in_memory = await self.worker.acall(lambda: self.live.best(path, answer.stack))
        if in_memory < len(path.tokens) - 1:
            loaded = await self.on_disk(lambda: self.files.load(path, answer.stack, more_than=in_memory))

        def submit() -> None:
            ask = answer.ask
            if answer.closed:
                return
            session = self.live.take(path, answer.stack, loaded)
            answer.cached_tokens = session.cache.seen
            choice = Choice(0, self.engine, session, answer.prompt, ask.sampling.stop, loop, answer.events)
            answer.choices.append(choice)

            def progressed(request: Request) -> None:
                if request.error is not None:
                    self._rest(answer, choice)
                elif not choice.started:
                    choice.started = True
                    answer.cached_tokens = session.turn_start
                choice.progressed(request)

            try:
                choice.request = self.worker.scheduler.submit(
                    session,
                    answer.prompt.tokens,
                    ask.sampling,
                    listener=progressed,
                    max_new_tokens=self._most_tokens(answer),
                    logits_processors=ask.logits_processors,
                    **choice.options,
                )
            except BaseException:
                self._rest(answer, choice)
                raise

        await self.worker.acall(submit)

    def _most_tokens(self, answer: Answer) -> int | None:
        """Return the longest answer where the request gives none: the server's default, or what is left of the window."""
        if "max_new_tokens" in answer.ask.sampling.model_fields_set:
            return None
        window = self.engine.token_engine.model.max_positions
        most = self.settings.default_max_tokens
        return most if window is None else max(1, min(most, window - answer.prompt_tokens))

    # In the model's thread.

    def _rest(self, answer: Answer, choice: Choice) -> None:
        """Put the session of an answer that was not committed back to where it was."""
        if choice.session.busy:
            return
        choice.session.go_back(len(answer.match.path.tokens))
        self.live.put(choice.session, answer.match.path, answer.stack)

    def _close(self, answer: Answer) -> None:
        """Cancel the answers that are not committed."""
        answer.closed = True
        for choice in answer.choices:
            request = choice.request
            if request is None or choice.committed or request.error is not None:
                continue
            if not request.done.is_set():
                self.worker.scheduler.cancel(request)  # its listener puts the session back
            elif request.turn is not None:
                request.turn.take_back()
                self._rest(answer, choice)

    # Committing.

    async def _commit(self, answer: Answer, choice: Choice, reply: Reply) -> None:
        """Commit an answer before its last delta is given on."""
        if not answer.ask.store or answer.ask.tokens is not None:
            return
        turn = self._new_turn(answer, choice, reply)
        path = Path((*answer.match.path.turns, turn))
        session = replace(answer.match.session, head=turn.id, updated=turn.created)
        await self.on_disk(lambda: self.store.commit(turn, session))
        choice.committed = True
        answer.turns[choice.index] = turn

        def put() -> Callable[[], None]:
            del choice.session.tokens[len(path.tokens) :]
            if choice.session.tokens != path.tokens:
                raise InputError("an answer's tokens are not those of its session: it is computed anew")
            write = self.files.prepare(choice.session, path, answer.stack)
            self.live.put(choice.session, path, answer.stack)
            return write

        write = await self.worker.acall(put)
        self._later(write)

    def _new_turn(self, answer: Answer, choice: Choice, reply: Reply) -> StoredTurn:
        output, end = reply.tokens, self.engine.tokenizer.answer_end(self.engine.stop_ids)
        if output[-1] in self.engine.stop_ids and output[-1] != end:
            output = output[:-1]  # not computed, and the template writes another one there
        message = {"role": "assistant", "content": reply.text.strip()}
        if reply.reasoning is not None:
            message["reasoning_content"] = reply.reasoning
        path, messages = answer.match.path, answer.match.messages
        figures = {key: value for key, value in reply.stats.as_dict().items() if isinstance(value, int | float)}
        return StoredTurn(
            id=answer.id if choice.index == 0 else new_id(),
            session=answer.match.session.id,
            parent=path.head.id if path.head else None,
            tenant=answer.ask.tenant,
            model=self.model,
            stack=answer.stack.digest,
            digest=extend(path.head.digest if path.head else ROOT, [*messages, message]),
            messages=tuple(messages),
            answer=message,
            prompt_tokens=answer.prompt.tokens,
            output_tokens=output,
            created=time.time(),
            finish_reason=str(reply.finish_reason),
            figures=figures,
        )

    async def tokens(self, given: str | Sequence[Message], *, special: bool = True) -> tuple[int, ...]:
        """Return the tokens of a text, or of messages with the generation prompt. special: begin a text as the model expects."""
        tokenizer = self.engine.tokenizer
        if not isinstance(given, str):
            return await self.on_text(lambda: tokenizer.prompt(given).tokens)
        return await self.on_text(lambda: tuple(tokenizer.text_tokens(given, special=special)))

    # Threads.

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Run work on the store in its own thread. It is done even if the waiting task is cancelled."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._disk, work))

    async def on_text(self, work: Callable[[], T]) -> T:
        """Run work on the tokenizer in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._text, work)

    def _later(self, work: Callable[[], None]) -> None:
        future = asyncio.get_running_loop().run_in_executor(self._disk, work)
        self._writing.add(future)
        future.add_done_callback(self._writing.discard)
