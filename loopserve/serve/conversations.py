"""Find the turn that a request goes on from, have it answered, and commit the new turn."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from loopserve.api import Engine
from loopserve.core.errors import ModelError
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.chat import Prompt
from loopserve.models.digest import model_digest
from loopserve.models.messages import Message
from loopserve.models.tool_calls import calls_text
from loopserve.serve.answer import Answer, Choice, Reply
from loopserve.serve.ask import Ask, Match
from loopserve.serve.directory import SharedDirectory
from loopserve.serve.errors import EngineFailure, not_found
from loopserve.serve.finding import find, nothing
from loopserve.serve.kv_files import KVFiles, remove_orphans
from loopserve.serve.live import LiveSessions
from loopserve.serve.matching import ROOT, extend
from loopserve.serve.records import Path, StoredTurn, new_id
from loopserve.serve.schema import refused
from loopserve.serve.sealing import Sealer
from loopserve.serve.settings import ServerSettings
from loopserve.serve.store import Store
from loopserve.serve.submission import Submissions
from loopserve.serve.worker import Worker

_log = logging.getLogger("loopserve.serve")
T = TypeVar("T")


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
        self.live = LiveSessions(engine.token_engine, lambda: self.worker.scheduler.ledger)
        self.worker.on_restart = self._restarted
        self._answers: set[Answer] = set()  # under way; touched in the event loop only
        self._loop: asyncio.AbstractEventLoop | None = None
        self.submissions = Submissions(engine, self.worker, self.live, settings)
        self.store = Store(settings.session_dir, Sealer(settings.session_key))
        self.directory = SharedDirectory(settings.session_dir)
        if self.directory.alone:
            remove_orphans(self.store)
            self.directory.share()
        self.files = KVFiles(
            self.store, self.model, engine.token_engine, settings.session_disk, settings.session_disk_per_key
        )
        self._disk = ThreadPoolExecutor(1, "loopserve store")
        self._text = ThreadPoolExecutor(1, "loopserve text")
        self._writing: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Start the model's thread. Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    @property
    def busy_sessions(self) -> set[str]:
        """Return the ids of the sessions that an answer is under way for, or that it goes on from."""
        matches = [answer.match for answer in self._answers]
        return {match.session.id for match in matches} | {
            turn.session for match in matches for turn in match.path.turns
        }

    def _restarted(self) -> None:
        """Drop what the engine held before a failure. Its scheduler may have lost requests, so every answer under way is ended here."""
        self.live.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_answers, self.worker.restarts)

    def _end_answers(self, restarts: int) -> None:
        """End the answers that the engine had before a restart. One that was not taken in yet goes to the new scheduler."""
        for answer in self._answers:
            if answer.restarts is not None and answer.restarts < restarts:
                answer.abort(EngineFailure())

    async def close(self) -> None:
        """Stop answering; write what is still to be written. May be called twice."""
        await asyncio.to_thread(self.worker.stop)
        if self._writing:
            await asyncio.wait(self._writing)
        self._text.shutdown()
        self._disk.shutdown()
        self.store.close()
        self.directory.close()
        self.live.close()

    # Answering.

    @asynccontextmanager
    async def begin(self, ask: Ask) -> AsyncIterator[Answer]:
        """Have a request answered. What is not complete when the block ends is cancelled and taken back.

        Raises CapacityError at once if too many are waiting, InputError for what can never be answered, ApiError for ids that are
        not known.
        """
        self.worker.admit(ask.n, ask.tenant)
        answer: Answer | None = None
        try:
            stack = self._stack(ask.stack)
            match = await self.on_disk(lambda: self._find(ask))
            match, prompt = await self._prompt(ask, match)
            answer = Answer(new_id(), ask, match, prompt, stack, self._commit)
            self._answers.add(answer)
            await self._submit(answer)
            await answer.wait_for_first()
            yield answer
        finally:
            self.worker.leave(ask.n, ask.tenant)
            if answer is not None:
                closing = answer
                closing.closed = True
                self._answers.discard(closing)
                self.worker.call(lambda: self.submissions.cancel(closing))

    def _find(self, ask: Ask) -> Match:
        """Return what a request goes on from. Where the disk cannot be read, a conversation is computed from its messages."""
        try:
            return find(self.store, self.model, ask)
        except sqlite3.DatabaseError as error:
            if not refused(error) or ask.previous is not None or ask.session is not None:
                raise
            _log.error("the session directory cannot be read (%s): a conversation is computed anew", error)
            return nothing(ask, "the session directory cannot be read")

    def _stack(self, name: str | None) -> PolicyStack:
        if name is None or name == self.engine.stack.name:
            return self.engine.stack
        if name not in self.stacks:
            raise not_found("stack", name, "stack_not_found")
        return self.stacks[name]

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

        def begin() -> int | None:  # in one call, since between two there may be a pass
            in_memory = self.live.best(path, answer.stack)
            if in_memory < len(path.tokens) - 1:
                return in_memory
            self.submissions.begin(answer, None, loop)
            return None

        missing = await self.worker.acall(begin)
        if missing is not None:
            loaded = await self.on_disk(lambda: self.files.load(path, answer.stack, more_than=missing))
            await self.worker.acall(lambda: self.submissions.begin(answer, loaded, loop))

    # Committing.

    async def _commit(self, answer: Answer, choice: Choice, reply: Reply) -> None:
        """Commit an answer before its last delta is given on."""
        if answer.ask.tokens is not None:
            return
        turn = self._new_turn(answer, choice, reply)
        path = Path((*answer.match.path.turns, turn))
        session = answer.match.session
        if choice.index == 0:
            session = replace(session, head=turn.id, updated=turn.created)
        keep = answer.ask.store
        await self.on_disk(lambda: self.store.commit(path, session, keep=keep))
        choice.committed = True
        answer.turns[choice.index] = turn

        def complete() -> Callable[[], None]:
            write = self.files.prepare(choice.session, path, answer.stack)
            self.submissions.complete(answer, choice, path)
            return write

        write = await self.worker.acall(complete)
        if keep:
            self._later(write)

    def _new_turn(self, answer: Answer, choice: Choice, reply: Reply) -> StoredTurn:
        output, end = reply.tokens, self.engine.tokenizer.answer_end(self.engine.stop_ids)
        if output[-1] in self.engine.stop_ids and output[-1] != end:
            output = output[:-1]  # not computed, and the template writes another one there
        message = {"role": "assistant", "content": reply.text.strip()}
        if reply.reasoning is not None:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = calls_text(reply.calls)
        path, messages = answer.match.path, answer.match.messages
        figures: dict[str, Any] = {
            key: value for key, value in reply.stats.as_dict().items() if isinstance(value, int | float)
        }
        figures["stack"] = answer.stack.name
        if reply.attention is not None:
            figures["attention_map"] = reply.attention
        return StoredTurn(
            id=answer.id if choice.index == 0 else new_id(),
            session=answer.match.session.id,
            parent=path.head.id if path.head else None,
            tenant=answer.ask.tenant,
            model=self.model,
            stack=answer.stack.digest,
            digest=extend(ROOT, [*path.messages, *messages, message]),
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
