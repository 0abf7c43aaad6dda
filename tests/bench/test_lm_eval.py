"""The adapter for lm-evaluation-harness: a generation task made here, under several stacks. Skipped where it is not installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loopserve.api import Engine
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, make_dialogue
from loopserve.core.errors import ConfigError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: loopserve[lm-eval]")
pytestmark = pytest.mark.filterwarnings("default")  # warnings of the harness and of what it imports are not ours

SNAPKV = {"name": "small", "prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 24, "window": 16}}


def documents(**_: Any) -> dict[str, list[dict[str, str]]]:
    task = RecallTask(tokens=500, turns=1, keys=2, position="begin")
    made = [make_dialogue(task, HELD_OUT_SEED + number).turns[0] for number in range(4)]
    return {"test": [{"text": turn.text, "answer": turn.answer} for turn in made]}


def evaluate(stack: Any, **options: Any) -> dict[str, Any]:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run

    from loopserve.bench.lm_eval import StackLM

    config = {
        "task": "recall",
        "custom_dataset": lambda **_: {name: Dataset.from_list(rows) for name, rows in documents().items()},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<eot>"], "max_gen_toks": 40, "do_sample": False, **options},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found: dict[str, Any] = run(
        StackLM("demo", stack), {"recall": ConfigurableTask(config=config)}, apply_chat_template=True, bootstrap_iters=0
    )
    return found


def test_a_generation_task_is_scored_under_each_stack() -> None:
    scores = {
        name: evaluate(stack)["results"]["recall"]["exact_match,none"]
        for name, stack in (("dense", "dense"), ("loopserve", "loopserve"), ("small", SNAPKV))
    }
    assert scores["dense"] == scores["loopserve"] == 1.0 and scores["small"] < 0.5


@pytest.fixture
def model() -> Any:
    from loopserve.bench.lm_eval import StackLM

    return StackLM("demo", "dense", batch_size=1)


def answer(model: Any, text: str, **options: Any) -> str:
    prompt = model.apply_chat_template([{"role": "user", "content": text}])
    (said,) = model.generate_until([SimpleNamespace(args=(prompt, {"max_gen_toks": 40, **options}))], disable_tqdm=True)
    return str(said)


def test_an_answer_is_the_engines_own_and_ends_at_a_stopping_string(model: Any) -> None:
    text = documents()["test"][0]["text"]
    with Engine.from_pretrained("demo", "dense").session() as chat:
        own = chat.send(text, max_new_tokens=40).text
    assert answer(model, text).strip() == own
    stop = own.split()[3]
    assert answer(model, text, until=[stop]).strip() == own.partition(stop)[0].strip()
    assert answer(model, text, until=stop, max_gen_toks=2).split() == own.split()[:2]
    drawn = [answer(model, text, do_sample=True, temperature=3.0) for _ in range(2)]
    assert drawn[0] == drawn[1] != own


def test_a_context_too_long_loses_its_beginning(model: Any) -> None:
    model.engine.model.config.max_position_embeddings = limit = 700
    prompt = model.apply_chat_template([{"role": "user", "content": documents()["test"][0]["text"]}])
    room = limit - 40 - len(model.engine.tokenizer.tokenizer(prompt)["input_ids"])
    fitting, too_long = (
        model.generate_until(
            [SimpleNamespace(args=("lisbon " * count + prompt, {"max_gen_toks": 40}))], disable_tqdm=True
        )
        for count in (room, 4 * room)
    )
    assert fitting == too_long and fitting[0].strip()


def test_what_cannot_be_done_is_said(model: Any) -> None:
    from loopserve.bench.lm_eval import StackLM

    with pytest.raises(ConfigError, match="only tasks that generate"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="unknown 'num_beams'"):
        answer(model, "hello", num_beams=4)
    with pytest.raises(ConfigError, match="unknown 'stak'; did you mean 'stack'"):
        StackLM("demo", stak="dense")
