"""The generator of recall dialogues keeps its promises, and the bundled tokenizer reads and writes its words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import loopserve
from loopserve.bench.recall import HELD_OUT_SEED, Dialogue, RecallTask, lay_out, make_dialogue, make_dialogues
from loopserve.bench.vocabulary import CODE_WORDS, PLACES, SMALL_TALK, vocabulary

WEIGHTS = Path(loopserve.__path__[0]) / "models" / "weights"
CHECKPOINTS = ("recall", "recall_no_lookahead")

TASKS = [
    RecallTask(tokens=64, turns=1, keys=1),
    RecallTask(tokens=300, turns=3, keys=2, position="begin"),
    RecallTask(tokens=1024, turns=5, keys=3, position="middle", fact_share=0.2),
    RecallTask(tokens=2048, turns=3, keys=(1, 5), position="end"),
    RecallTask(tokens=4096, turns=6, keys=(1, 5), fact_share=0.5),
    RecallTask(tokens=400, turns=3, keys=2, chain=3),
    RecallTask(tokens=600, turns=3, keys=4, list_all="named"),
    RecallTask(tokens=600, turns=3, keys=2, distance=1),
    RecallTask(tokens=500, turns=6, keys=(1, 3), uneven=True, silent_share=0.3, chain=2, chain_share=0.2),
]


def stated(dialogue: Dialogue) -> dict[str, list[tuple[int, str]]]:
    """Every fact a reader finds in the users' texts: place -> (turn, what is said of it)."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number, turn in enumerate(dialogue.turns):
        text = turn.text.replace(turn.question, "", 1) if turn.question else turn.text
        for part in text.split("the code of ")[1:]:
            place, value = part.split(" . ")[0].removesuffix(" .").split(" is ", 1)
            found.setdefault(place, []).append((number, value))
    return found


def length(dialogue: Dialogue) -> int:
    return 1 + sum(3 + len(turn.text.split()) + len(turn.answer.split()) for turn in dialogue.turns)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_say_what_the_text_says(task: RecallTask) -> None:
    for dialogue in make_dialogues(task, 20, seed=3):
        facts = stated(dialogue)
        for number, turn in enumerate(dialogue.turns):
            if not turn.question:
                assert turn.answer == "ok ." and turn.keys == ()
                continue
            expected = []
            for key, distance in zip(turn.keys, turn.distances, strict=True):
                place, follows = key, True
                while follows:
                    [(where, value)] = facts[place]  # stated exactly once, and not after this turn
                    assert where <= number
                    expected.append(f"{place} is {value} .")
                    follows = value.startswith("kept in ")
                    place = value.removeprefix("kept in ")
                assert distance == number - where
            assert turn.answer == " ".join(expected)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_question_stands_at_its_position_and_names_its_keys_in_order(task: RecallTask) -> None:
    for dialogue in make_dialogues(task, 20, seed=8):
        for turn in dialogue.turns:
            if not turn.question:
                continue
            assert turn.text.count(turn.question) == 1
            before, after = (part.strip() for part in turn.text.split(turn.question))
            if turn.position == "begin":
                assert not before
            elif turn.position == "end":
                assert not after
            elif task.tokens >= 1024:
                share = len(before.split()) / len((before + " " + after).split())
                assert 0.4 < share < 0.6
            assert not before or before.endswith((".", "?"))
            assert tuple(word for word in turn.question.split() if word in PLACES) == turn.keys
            assert task.position in (turn.position, "mixed")


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_dialogue_has_the_asked_length_and_turns(task: RecallTask) -> None:
    for dialogue in make_dialogues(task, 20, seed=11):
        assert len(dialogue.turns) == task.turns
        slack = 0.25 if task.uneven else 0.1 if task.tokens < 1000 else 0.02
        assert abs(length(dialogue) - task.tokens) <= slack * task.tokens


def test_no_place_is_asked_for_twice_and_the_number_of_keys_holds() -> None:
    task = RecallTask(tokens=2048, turns=4, keys=3)
    for dialogue in make_dialogues(task, 30, seed=5):
        asked = [key for turn in dialogue.turns for key in turn.keys]
        assert len(asked) == len(set(asked)) == 12


def test_asked_facts_come_from_this_turn_and_from_every_earlier_one() -> None:
    dialogues = make_dialogues(RecallTask(tokens=1024, turns=4, keys=2), 60, seed=0)
    assert {d for dialogue in dialogues for d in dialogue.turns[-1].distances} == {0, 1, 2, 3}


def test_the_seed_decides_everything() -> None:
    task = RecallTask(tokens=512)
    assert make_dialogue(task, 4) == make_dialogue(task, 4)
    assert make_dialogue(task, 4) != make_dialogue(task, 5)
    assert make_dialogues(task, 3, seed=4)[2] == make_dialogue(task, 6)


def test_held_out_seeds_give_codes_that_no_training_seed_gave() -> None:
    """The split is by seed; what makes it meaningful is that codes are drawn afresh for every seed."""
    task = RecallTask(tokens=512, code_words=(3, 4))
    training = {turn.answer for seed in range(200) for turn in make_dialogue(task, seed).turns}
    held_out = {turn.answer for seed in range(200) for turn in make_dialogue(task, HELD_OUT_SEED + seed).turns}
    assert not training & held_out


UNNAMED = RecallTask(tokens=600, turns=3, keys=4, list_all="unnamed")


@pytest.mark.parametrize("task", [TASKS[-1], TASKS[-3], UNNAMED], ids=str)
def test_the_layout_points_at_the_words_that_answers_repeat(task: RecallTask) -> None:
    for seed in range(20):
        layout = lay_out(task, seed)
        for turn in layout.turns:
            answer = layout.words[turn.answer_start : turn.answer_stop]
            for word, source in zip(answer, turn.sources, strict=False):
                assert source == -1 or (layout.words[source] == word and source < turn.answer_stop)


def test_the_vocabulary_keeps_its_groups_apart() -> None:
    talk = {word for sentence in SMALL_TALK for word in sentence.split()}
    assert len(set(PLACES)) == len(PLACES) and len(set(CODE_WORDS)) == len(CODE_WORDS)
    assert not set(PLACES) & set(CODE_WORDS)
    assert not (set(PLACES) | set(CODE_WORDS)) & talk
    assert len(set(vocabulary())) == len(vocabulary())


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": 0},
        {"keys": (3, 2)},
        {"turns": 0},
        {"chain": 0},
        {"code_words": (0, 2)},
        {"turns": 100, "keys": 5},
        {"distance": -1},
        {"distance": 1, "chain": 2},
        {"list_all": "named", "chain": 2},
    ],
)
def test_impossible_tasks_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least [01]|must be a range|would be asked for|no chain"):
        RecallTask(**wrong)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS / request.param, local_files_only=True)


def test_the_tokenizer_knows_every_word_and_gives_the_text_back(tokenizer: Any) -> None:
    for turn in make_dialogue(RecallTask(tokens=2048, turns=3), HELD_OUT_SEED).turns:
        ids = tokenizer(turn.text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(turn.text.split())
        assert tokenizer.decode(ids) == turn.text


def test_text_typed_by_a_person_is_read_as_the_same_words(tokenizer: Any) -> None:
    typed = tokenizer("The code of Lisbon is amber falcon. What is the code of Lisbon?", add_special_tokens=False)
    plain = tokenizer("the code of lisbon is amber falcon . what is the code of lisbon ?", add_special_tokens=False)
    assert typed.input_ids == plain.input_ids


def test_the_chat_template_is_prefix_stable_and_opens_once(tokenizer: Any) -> None:
    dialogue = make_dialogue(RecallTask(tokens=400, turns=3), HELD_OUT_SEED)
    messages = [
        {"role": role, "content": content}
        for turn in dialogue.turns
        for role, content in (("user", turn.text), ("assistant", turn.answer))
    ]
    rendered = [tokenizer.apply_chat_template(messages[:count], tokenize=False) for count in range(1, 7)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(rendered))
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered[1].startswith(asked)
    words = tokenizer.convert_ids_to_tokens(tokenizer(rendered[-1], add_special_tokens=False).input_ids)
    assert words == lay_out(RecallTask(tokens=400, turns=3), HELD_OUT_SEED).words
    assert tokenizer.eos_token == "<eot>" and words.count("<bos>") == 1


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_bundled_models_answer_held_out_questions(checkpoint: str) -> None:
    """The floor is far below what docs/demo_model.md reports: this guards against a broken export, not a weak one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(WEIGHTS / checkpoint, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(WEIGHTS / checkpoint, dtype=torch.float32)
    right = 0
    for dialogue in make_dialogues(RecallTask(tokens=120, turns=1, keys=1), 8, HELD_OUT_SEED):
        [turn] = dialogue.turns
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=10)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(output, skip_special_tokens=True).strip() == turn.answer
    assert right >= 6


def test_the_bundled_models_are_small() -> None:
    assert sum(path.stat().st_size for name in CHECKPOINTS for path in (WEIGHTS / name).iterdir()) <= 8_000_000
