"""Run generation tasks of lm-evaluation-harness under a stack. An extra: ``pip install 'loopserve[lm-eval]'``.

    python -m loopserve.bench.lm_eval run --model loopserve --model_args pretrained=demo,stack=snapkv --tasks gsm8k

It takes the arguments of the harness's own command. From Python: ``lm_eval.simple_evaluate(StackLM("demo", "snapkv"),
tasks=[...])``. A request is a conversation of one turn. Requests are answered one after another. Tasks that compare
likelihoods are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from loopserve.api import Engine, StackLike
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.errors import ConfigError, LoopServeError, did_you_mean
from loopserve.models.answer_text import AnswerText

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    absent = "lm-evaluation-harness is not installed: pip install 'loopserve[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {absent}")
    raise ConfigError(absent) from error

_MAX_GEN_TOKS = 256  # the harness's default
_UNASKED = "cuda:0"  # the harness passes this device by default, with or without a GPU
_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


@register_model("loopserve")
class StackLM(LM):
    """Serve a model under a stack through the interface of the harness."""

    def __init__(
        self,
        pretrained: str = "demo",
        stack: StackLike = "loopserve",
        *,
        dtype: str = "auto",
        device: str | None = None,
        seed: int = 0,
        **ignored: Any,
    ) -> None:
        """Load the model. pretrained: a hub id, a directory or ``demo``. seed: for tasks that sample answers.

        The harness passes ``batch_size`` and ``max_batch_size`` to every model; they have no effect here. Raises
        ConfigError for any other argument.
        """
        super().__init__()
        for name in ignored.keys() - {"batch_size", "max_batch_size"}:
            known = ("pretrained", "stack", "dtype", "device", "seed")
            raise ConfigError(f"--model_args: unknown {name!r}{did_you_mean(name, known)}")
        if device in (None, _UNASKED):
            device = "auto"
        self.engine = Engine.from_pretrained(pretrained, stack, dtype=dtype, device=device)
        self.seed = int(seed)
        self._name = pretrained

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, each cut at the first of its stopping strings."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc=f"stack {self.engine.stack.name}"):
            context, options = request.args
            answers.append(self._answer(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _answer(self, context: str, options: Mapping[str, Any]) -> str:
        sampling, until = self._read(options)
        tokens = self.engine.token_engine
        ids = self._ids(context)
        if (
            tokens.model.max_positions is not None
        ):  # like the harness: the beginning of a context that is too long is cut off
            ids = ids[-max(1, tokens.model.max_positions - sampling.max_new_tokens) :]
        session = tokens.session()
        text = AnswerText(self.engine.tokenizer, until)
        for _ in tokens.generate(session, ids, sampling, self.engine.stop_ids, stop_check=text.push):
            pass
        text.close()
        return text.text

    def _read(self, options: Mapping[str, Any]) -> tuple[SamplingConfig, list[str]]:
        """Return sampling options and stopping strings of a task. Raises ConfigError for an option without effect."""
        for name in options:
            if name not in _OPTIONS:
                raise ConfigError(f"generation_kwargs: unknown {name!r}{did_you_mean(name, _OPTIONS)}")
        until = options.get("until") or []
        drawn = bool(options.get("do_sample", float(options.get("temperature") or 0.0) > 0))
        drawing: dict[str, Any] = (
            {"temperature": float(options.get("temperature") or 1.0), "seed": self.seed} if drawn else {}
        )
        if drawn:
            drawing |= {"top_p": float(options.get("top_p", 1.0)), "top_k": int(options.get("top_k", 0))}
        sampling = SamplingConfig(max_new_tokens=int(options.get("max_gen_toks", _MAX_GEN_TOKS)), **drawing)
        return sampling, [stop for stop in ([until] if isinstance(until, str) else until) if stop]

    def _ids(self, context: str) -> list[int]:
        tokenizer = self.engine.tokenizer.tokenizer
        begun = tokenizer.bos_token is not None and context.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(context, add_special_tokens=not begun)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as text in the model's own template."""
        rendered: str = self.engine.tokenizer.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return rendered

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the template for the record of results."""
        template: str | None = self.engine.tokenizer.tokenizer.chat_template
        return template or ""

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise ConfigError("this task compares likelihoods; under a stack only tasks that generate can be run")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return [likelihood for likelihood, _ in self.loglikelihood(requests)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LoopServeError as error:
        sys.exit(f"error: {error}")
