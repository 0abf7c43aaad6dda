"""The composition root: a model, a tokenizer and a stack become an engine that chats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from loopserve.batch import Runner, answer_all
from loopserve.chat_session import ChatSession, Reply
from loopserve.core.engine.break_even import BreakEven
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig, read_sampling
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.errors import (
    POLICY_TIMEOUT_S,
    ConfigError,
    InputError,
    OnPolicyFault,
    PolicyChecks,
    did_you_mean,
)
from loopserve.core.stack.stack import PolicyStack, resolve_stack
from loopserve.kernels import backend as kernels
from loopserve.models.apply import Applied, applied
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.calibration import calibrated
from loopserve.models.chat import ChatTokenizer
from loopserve.models.generation_config import model_sampling, stop_ids
from loopserve.models.layers import set_implementation, unwrapped
from loopserve.models.loading import load
from loopserve.models.messages import Message, as_messages
from loopserve.plugins import load_registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

StackLike = str | Path | Mapping[str, Any] | PolicyStack


def load_stack(stack: StackLike) -> PolicyStack:
    """A stack by preset name, YAML file, dictionary, or as it is."""
    if isinstance(stack, PolicyStack):
        return stack
    loaded = load_registry()
    try:
        return resolve_stack(stack, loaded.registry)
    except ConfigError as error:  # a policy that is missing may be one whose plugin could not be loaded
        if not loaded.problems:
            raise
        raise ConfigError("\n".join([str(error), *map(str, loaded.problems)])) from error


@contextmanager
def apply(
    model: PreTrainedModel,
    stack: StackLike = "loopserve",
    *,
    measure_coverage: bool = False,
    policy_checks: PolicyChecks | str = PolicyChecks.CHEAP,
    on_policy_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
    policy_timeout_s: float | None = POLICY_TIMEOUT_S,
) -> Iterator[Applied]:
    """Serve a plain transformers model under a stack: ``with apply(model, "loopserve"): model.generate(**batch)``.

    Undone fully at exit. Batches may be padded: each row gets what it gets alone. A forward pass of several tokens is a new
    turn, one of a single token a decode step; what ``generate`` computes of its prompt is one turn, in chunks or not.
    measure_coverage: realised coverage of the prefill patterns over all rows, as costly as dense attention; ``stats`` of
    what the block yields holds the figures. Faults of policies are dealt with as in ``Engine``; but a write into the stored pairs
    always raises, since the forward pass is the caller's and cannot be run again from here.
    """
    with applied(
        model,
        load_stack(stack),
        measure_coverage=measure_coverage,
        policy_checks=policy_checks,
        on_policy_fault=on_policy_fault,
        policy_timeout_s=policy_timeout_s,
    ) as state:
        yield state


class Engine:
    """A model under a stack, with its tokenizer; opens chat sessions."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        stack: StackLike = "loopserve",
        *,
        chunk_tokens: int = 4096,
        measure_coverage: bool = False,
        policy_checks: PolicyChecks | str = PolicyChecks.CHEAP,
        on_policy_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
        policy_timeout_s: float | None = POLICY_TIMEOUT_S,
        sampling: Literal["default", "model"] = "default",
        break_even: BreakEven | None = None,
    ) -> None:
        """Take the model over: its attention is loopserve's from here on (``apply`` is what undoes itself).

        chunk_tokens: longest piece of a prefill. measure_coverage: realised coverage over all rows, for reports.
        policy_checks: ``cheap``, or ``strict`` to try a policy out. on_policy_fault: ``raise`` a PolicyFault, or finish the turn
        ``dense``. policy_timeout_s: the longest call of a policy that is no fault; None = any. sampling: where options that a
        call does not name come from: ``default``, those of ``SamplingConfig`` (greedy), or ``model``, the model's own
        ``generation_config`` where it sets them. break_even: below which lengths the stack stays dense; None = the policies decide.
        """
        try:
            kernels.chosen()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model = unwrapped(model)
        self.stack = load_stack(stack)
        self.tokenizer = ChatTokenizer(tokenizer, stop_ids(model))
        self.token_engine = TokenEngine(
            TransformersModel(model),
            self.stack,
            chunk_tokens=chunk_tokens,
            measure_coverage=measure_coverage,
            policy_checks=policy_checks,
            on_policy_fault=on_policy_fault,
            policy_timeout_s=policy_timeout_s,
            break_even=break_even,
        )
        set_implementation(model, IMPLEMENTATION)
        self.model = model
        self.stop_ids = self.tokenizer.stop_ids
        self._sampling = sampling
        self.sampling_config({})  # a wrong value is refused at once

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        stack: StackLike = "loopserve",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        weights: Literal["auto", "int8", "int4"] = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        chunk_tokens: int = 4096,
        measure_coverage: bool = False,
        policy_checks: PolicyChecks | str = PolicyChecks.CHEAP,
        on_policy_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
        policy_timeout_s: float | None = POLICY_TIMEOUT_S,
        sampling: Literal["default", "model"] = "default",
        break_even: Literal["off", "auto"] = "off",
    ) -> Engine:
        """Load a hub id, directory, GGUF file, or name of ``loopserve models ls``. The stack is checked before the weights are read.

        weights: ``int8`` or ``int4`` quantise the linear layers of a model on a CPU; ``auto`` leaves them as they are. break_even:
        ``auto`` stays dense below the lengths that ``loopserve calibrate`` found on this machine, and says on stderr which they are.
        """
        resolved = load_stack(stack)
        loaded, tokenizer = load(
            model,
            dtype=dtype,
            device=device,
            weights=weights,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(
            loaded,
            tokenizer,
            resolved,
            chunk_tokens=chunk_tokens,
            measure_coverage=measure_coverage,
            policy_checks=policy_checks,
            on_policy_fault=on_policy_fault,
            policy_timeout_s=policy_timeout_s,
            sampling=sampling,
            break_even=calibrated(loaded, resolved, break_even),
        )

    def sampling_config(self, options: Mapping[str, Any]) -> SamplingConfig:
        """Return the sampling options of a call: those it names, and the defaults that it or the engine chose for all others.

        Raises ConfigError for an option that is unknown or out of bounds.
        """
        given = dict(options)
        source = given.pop("sampling", self._sampling)
        if source not in ("default", "model"):
            raise ConfigError(f"sampling: unknown {source!r}{did_you_mean(str(source), ('default', 'model'))}")
        if source == "default":
            return read_sampling(given, also=("sampling",))
        defaults = model_sampling(self.model)
        read_sampling(defaults, "the model's generation_config")
        return read_sampling(defaults | given, also=("sampling",))

    def batch(
        self,
        messages: Iterable[tuple[ChatSession, str]],
        *,
        max_sessions: int = 16,
        max_num_batched_tokens: int = 2048,
        kv_memory: int | None = None,
        return_errors: bool = False,
        **options: Any,
    ) -> list[Reply]:
        """Answer one message of each of many sessions in shared passes; return the replies in their order.

        max_sessions: turns under way at once. max_num_batched_tokens: tokens of a pass. kv_memory: bytes that all sessions may hold;
        None = no limit. options: those of ``ChatSession.stream``. An error of one session leaves the others as they are: with
        ``return_errors`` it stands in the place of its reply, else the first one is raised once all others are answered.
        """
        scheduler = Scheduler(
            self.token_engine,
            max_sessions=max_sessions,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_memory=kv_memory,
        )
        outcomes = answer_all(scheduler, messages, options)
        failed = [each for each in outcomes if isinstance(each, BaseException)]
        if failed and not return_errors:
            raise failed[0]
        return cast("list[Reply]", outcomes)

    @cached_property
    def runner(self) -> Runner:
        """The thread that answers ``ChatSession.asend`` and ``astream``; it runs while there is work."""
        return Runner(Scheduler(self.token_engine))

    def session(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        stack: StackLike | None = None,
    ) -> ChatSession:
        """Open a conversation.

        stack: another one than the engine's; sessions under different stacks share forward passes.
        messages: complete turns held elsewhere, dictionaries of role and content, to go on with; they are computed with the next
        message. ``token_ids`` beside an answer are taken for its tokens if they say what its content says. Raises InputError for
        messages that are no turns, or that bring a system message beside ``system``.
        """
        chosen = None if stack is None else load_stack(stack)
        if messages is None:
            return ChatSession(self, system, stack=chosen)
        begun = as_messages(messages)
        if problem := _no_turns(begun):
            raise InputError(f"messages: {problem}")
        if system is not None and begun and begun[0]["role"] in ("system", "developer"):
            raise InputError("messages: they begin with a system message already; leave system out")
        return ChatSession(self, system, begun, _token_ids(messages, first=0 if system is None else 1), chosen)

    def load_session(self, path: str | Path) -> ChatSession:
        """A conversation saved by ``ChatSession.save``, under this engine's stack; its cache is computed anew with the next message."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["version"] != 1:
                raise ValueError(f"version {saved['version']}, known is 1")
            messages = as_messages(saved["messages"])
            if problem := _no_turns(messages):
                raise ValueError(f"its {problem}")
            tokens = _token_ids(saved["messages"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError) as error:
            raise ConfigError(f"{path}: not a saved conversation ({error})") from error
        return ChatSession(self, messages=messages, token_ids=tokens)


def _no_turns(messages: Sequence[Message]) -> str | None:
    """Return what is wrong with a conversation that is to go on; None for complete turns."""
    roles = [each["role"] for each in messages if each["role"] not in ("system", "developer")]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return "messages are not turns of user and assistant"
    return None


def _token_ids(messages: Sequence[Mapping[str, Any]], first: int = 0) -> dict[int, list[int]]:
    """Return the tokens that stand beside answers, by number of the message; the first message has the number ``first``."""
    tokens = {number: each["token_ids"] for number, each in enumerate(messages, first) if each.get("token_ids")}
    if not all(isinstance(each, list) and all(map(_is_token, each)) for each in tokens.values()):
        raise InputError("token_ids of messages are lists of token numbers")
    return tokens


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


__all__ = ["Engine", "apply", "load_stack"]
