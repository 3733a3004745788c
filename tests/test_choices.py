"""Multiple-choice files: their texts against expected ones and against lm-eval's own, the pairs
that are made of them, and the choices that models take.
"""

import gzip
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from choices import templates
from choices.templates import Question, pairs_of_choices, question_of_row
from common import InputError, data, oracle
from common.fields import pair_of_row
from common.files import read_json
from common.models import load_model, load_tokenizer, load_weights
from experiments import dph_choices, study
from judging import choices
from labelled.rows import load_demonstrations, read_labelled
from report.card import front_matter
from rewards.models import load_reward
from rewards.prompts import prompt_of_row
from tests.runs import SHORT, lines_file, lines_of, train

ARC = {"text": ["gas", "dust", "rock", "ice"], "label": ["A", "B", "C", "D"]}
SAME = "Question: Do both sentences mean the same thing?\nAnswer:"
# name of a file, a row of it, the prompt, the choices, the number of the right one
ROWS = [
    (
        "arc_easy_train.jsonl",
        {"id": "1", "question": "What is {air}?", "choices": ARC, "answerKey": "A"},
        "Question: What is {air}?\nAnswer:",
        ("gas", "dust", "rock", "ice"),
        0,
    ),
    (
        "x.jsonl",
        {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        "Question: Which?\nAnswer:",
        ("a", "b", "c"),
        2,
    ),
    (
        "x.jsonl",
        {"question_stem": "The sun is", "choices": ARC, "answerKey": " D"},
        "The sun is",
        ("gas", "dust", "rock", "ice"),
        3,
    ),
    (
        "my/CoLA-val.json",
        {"sentence": "They drank.", "label": 1},
        "They drank.\nQuestion: Does this sentence make sense?\nAnswer:",
        ("no", "yes"),
        1,
    ),
    (
        "owner/glue:sst2",
        {"sentence": "a joy", "label": "0"},
        "a joy\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
        0,
    ),
    (
        "x.jsonl",
        {"task": "sst2", "sentence": "a joy", "label": 1},
        "a joy\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
        1,
    ),
    (
        "mrpc.csv",
        {"sentence1": "One.", "sentence2": "Two.", "label": "1"},
        f"Sentence 1: One.\nSentence 2: Two.\n{SAME}",
        ("no", "yes"),
        1,
    ),
    (
        "rte_val.jsonl.gz",
        {"sentence1": "One.", "sentence2": "Two.", "label": 0},
        "One.\nQuestion: Two. True or False?\nAnswer:",
        ("True", "False"),
        0,
    ),
    (
        "x.jsonl",
        {"question": "Who?", "sentence": "He.", "label": 1},
        "Who?\nHe.\nQuestion: Does this response answer the question?\nAnswer:",
        ("yes", "no"),
        1,
    ),
    (
        "x.jsonl",
        {"passage": "Air -- It is.", "question": "is it", "label": True},
        "Air -- It is.\nQuestion: is it?\nAnswer:",
        ("no", "yes"),
        1,
    ),
    (
        "x.jsonl",
        {"goal": "To boil", "sol1": "heat it", "sol2": "cool it", "label": 0},
        "Question: To boil\nAnswer:",
        ("heat it", "cool it"),
        0,
    ),
    (
        "x.jsonl",
        {
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix.",
            "ctx_b": "then SHE",
            "endings": ["bakes [step] it.", " eats  it."],
            "label": "1",
        },
        "Baking: How to bake. Mix. Then she",
        ("bakes it.", "eats it."),
        1,
    ),
    (
        "x.jsonl",
        {"subject": "us_history", "question": " When? ", "choices": ["1", "2", "3", "4"], "answer": 2},
        "The following are multiple choice questions (with answers) about us history.\n\n"
        "When?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        ("A", "B", "C", "D"),
        2,
    ),
]


@pytest.mark.parametrize(("file", "row", "prompt", "texts", "right"), ROWS, ids=lambda value: str(value)[:16])
def test_texts_of_rows_as_written(file, row, prompt, texts, right):
    question, reason = question_of_row(file, "row 1", row)
    assert reason is None
    assert question == Question((prompt,) * len(texts), texts, right)


def test_winogrande_has_two_prompts_and_one_end():
    row = {"sentence": "Ann thanked Bo as _ had helped. ", "option1": "Ann", "option2": "Bo", "answer": "2"}
    question, _ = question_of_row("x.jsonl", "row 1", row)
    assert question == Question(("Ann thanked Bo as Ann", "Ann thanked Bo as Bo"), ("had helped.",) * 2, 1)
    with pytest.raises(InputError, match="x, row 1: a question of WinoGrande has two prompts"):
        pairs_of_choices("choices:x", [("x, row 1", row)])


# -- lm-eval's own texts

HARNESS = {
    "arc_easy_test": "arc/arc_easy.yaml",
    "arc_challenge_train": "arc/arc_challenge.yaml",
    "openbookqa_train": "openbookqa/openbookqa.yaml",
    "cola_train": "glue/cola/default.yaml",
    "sst2_train": "glue/sst2/default.yaml",
    "mrpc_train": "glue/mrpc/default.yaml",
    "rte_val": "glue/rte/default.yaml",
    "qnli_val": "glue/qnli/default.yaml",
    "boolq_val": "super_glue/boolq/default.yaml",
    "piqa_val": "piqa/piqa.yaml",
    "hellaswag_val": "hellaswag/hellaswag.yaml",
    "winogrande_val": "winogrande/default.yaml",
    "mmlu_val": "mmlu/default/mmlu_anatomy.yaml",
}


@pytest.fixture(scope="module")
def harness(preference_data, tmp_path_factory):
    """lm-eval's task over 60 rows of each local file, drawn at random: {name: (file, task)}."""
    pytest.importorskip("lm_eval", reason="needs lm_eval, whose texts ours are compared with")
    from lm_eval.tasks import TaskManager

    folder, files = tmp_path_factory.mktemp("tasks"), {}
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    for name, include in HARNESS.items():
        with gzip.open(preference_data / "eval" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if name == "mmlu_val":
            rows = [row for row in rows if row["subject"] == "anatomy"]
        rows = random.Random(0).sample(rows, min(60, len(rows)))
        files[name] = lines_file(folder, rows, f"{name}.jsonl")
        settings = {"include": str(tasks / include), "task": f"ours_{name}", "dataset_path": "json"}
        settings |= {"dataset_name": None, "dataset_kwargs": {"data_files": {"test": files[name]}}}
        settings |= dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
        settings |= {"test_split": "test", "num_fewshot": 0, "tag": "ours", "fewshot_config": None}
        (folder / f"{name}.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = {name: manager.load([f"ours_{name}"])["tasks"][f"ours_{name}"] for name in HARNESS}
    return {name: (files[name], task) for name, task in loaded.items()}


@pytest.mark.parametrize("name", HARNESS)
def test_texts_are_those_that_lm_eval_scores(harness, name):
    file, task = harness[name]
    questions, dropped = choices.read_questions(file)
    assert len(questions) > 10
    assert not dropped
    task.build_all_requests(limit=None, rank=0, world_size=1)
    requests: dict[int, list] = {}
    for request in task.instances:
        requests.setdefault(request.doc_id, []).append(request.args)
    docs = list(task.eval_docs)
    for number, question in enumerate(questions):
        ours = [(prompt, " " + choice) for prompt, choice in zip(question.prompts, question.choices)]
        assert requests[number] == ours
        # In WinoGrande it is the contexts that the right one is told among.
        gold = task.doc_to_text(docs[number]) if name == "winogrande_val" else task.doc_to_target(docs[number])
        assert question.right == gold
        if name != "winogrande_val":
            assert list(question.choices) == list(task.doc_to_choice(docs[number]))


@pytest.mark.slow
def test_a_models_choices_are_those_that_lm_eval_counts(harness, preference_data):
    """Log-probabilities, acc and acc_norm of a small model on the same questions, by the harness's
    own model and counting.
    """
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = str(preference_data / "models" / "stories260K")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "cpu", tokenizer).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=16)
    for name in ("arc_easy_test", "winogrande_val", "sst2_train", "hellaswag_val"):
        file, task = harness[name]
        questions = choices.read_questions(file)[0][:20]
        scores = choices.score_questions(model, tokenizer, questions)
        right = choices.right_by(questions, scores)
        task.build_all_requests(limit=20, rank=0, world_size=1)
        logps: dict[int, list] = {}
        for request, answer in zip(task.instances, theirs.loglikelihood(task.instances, disable_tqdm=True)):
            logps.setdefault(request.doc_id, []).append(answer)
        for number, doc in enumerate(list(task.eval_docs)[:20]):
            assert scores[number]["logps"] == pytest.approx([logp for logp, _ in logps[number]], abs=1e-3)
            counted = task.process_results(doc, logps[number])
            assert {"acc"} <= counted.keys()
            for metric in {"acc", "acc_norm"} & counted.keys():
                assert right[metric][number] == counted[metric], (name, metric)


# -- rows that are refused or dropped

SCIENCE = {"question": "Which?", "choices": ARC, "answerKey": "B"}


@pytest.mark.parametrize(
    ("file", "row", "expected"),
    [
        ("pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, "of no multiple-choice task known here"),
        ("train.jsonl", {"sentence": "s", "label": 1}, "could be of cola, sst2"),
        ("chocolate.jsonl", {"sentence": "s", "label": 1}, "could be of cola, sst2"),
        ("cola/sst2.jsonl", {"sentence": "s", "label": 1}, "could be of cola, sst2"),
        ("qnli.jsonl", {"sentence1": "s", "sentence2": "t", "label": 1}, "could be of mrpc, rte"),
        (
            "x.jsonl",
            {"question": "Which?", "choices": ARC},
            "expected for instance question, choices, answerKey as of arc",
        ),
        ("x.jsonl", {"goal": "g", "sol1": "a"}, "expected for instance goal, sol1, sol2, label as of piqa"),
        ("x.jsonl", {"task": "rte", "sentence": "s", "label": 1}, "could be of cola, sst2"),
    ],
)
def test_rows_of_no_known_task_are_refused_in_a_sentence(file, row, expected):
    with pytest.raises(InputError) as refused:
        question_of_row(file, f"{file}, line 7", row)
    words = str(refused.value.code)
    assert words.startswith(f"{file}, line 7: ")
    assert "\n" not in words
    assert expected in words
    if "could be" not in expected:
        assert all(name in words for name in templates.TASKS)
        assert words.endswith(f"(found {', '.join(row)}).")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answerKey": "E"}, "the right choice is not known"),
        ({"answerKey": None}, "the right choice is not known"),
        ({"question": 3}, "a field is neither text nor a list of choices"),
        ({"choices": ["gas", "dust"]}, "a field is neither text nor a list of choices"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "a field is neither text nor a list of choices"),
        ({"choices": {"text": ["a", None], "label": ["A", "B"]}}, "a field is neither text nor a list of choices"),
        ({"choices": {"text": ["a"], "label": ["B"]}}, "fewer than two choices"),
        ({"question": "\ud83d"}, "a field is not valid Unicode text"),
    ],
)
def test_unusable_rows_are_dropped_with_a_reason(changes, reason):
    assert question_of_row("x.jsonl", "row 1", SCIENCE | changes) == (None, reason)


@pytest.mark.parametrize("label", [-1, 2, None, "", "one", 0.5])
def test_a_label_that_names_no_choice_drops_its_row(label):
    row = {"task": "cola", "sentence": "They drank.", "label": label}
    assert question_of_row("x.jsonl", "row 1", row) == (None, "the right choice is not known")
    assert question_of_row("x.jsonl", "row 1", row | {"sentence": " "})[0] is None


def test_a_question_without_words_is_dropped():
    row = {"question_stem": " ", "choices": ARC, "answerKey": "A"}
    assert question_of_row("x.jsonl", "row 1", row) == (None, "the prompt is empty")


# -- pairs


def questions_file(folder: Path, rows: int = 24, name: str = "arc.jsonl") -> str:
    """Questions with three to five choices, the right one anywhere; the last two rows cannot be
    used.
    """
    rng, made = random.Random(0), []
    for number in range(rows - 2):
        letters = "ABCDE"[: 3 + number % 3]
        found = {"text": [f"choice {letter} of {number}" for letter in letters], "label": list(letters)}
        made.append({"question": f"What of {number}?", "choices": found, "answerKey": rng.choice(letters)})
    return lines_file(folder, [*made, SCIENCE | {"answerKey": "?"}, SCIENCE | {"question": 1}], name)


def read(source: str, seed: int = 0, holdout: float = 0.25, eval_data: str | None = None):
    """`read_splits` of pairs."""
    return data.read_splits(source, eval_data, holdout, seed, None, pair_of_row)


def test_the_right_choice_stands_against_one_or_all_wrong_ones(tmp_path):
    path = questions_file(tmp_path)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()][:-2]
    expected = {}
    for row in rows:
        texts = dict(zip(row["choices"]["label"], row["choices"]["text"]))
        right = texts.pop(row["answerKey"])
        expected[f"Question: {row['question']}\nAnswer:"] = (f" {right}", {f" {text}" for text in texts.values()})
    (one, dropped), (every, _) = (read(f"{form}:{path}", holdout=0)[0]["train"] for form in ("choices", "choices-all"))
    assert dropped == {"the right choice is not known": 1, "a field is neither text nor a list of choices": 1}
    assert [prompt for prompt, _, _ in one] == list(expected)
    for prompt, chosen, rejected in one:
        assert chosen == expected[prompt][0]
        assert rejected in expected[prompt][1]
    assert len(every) == sum(len(wrong) for _, wrong in expected.values()) == sum(2 + i % 3 for i in range(22))
    found: dict[str, set] = {}
    for prompt, chosen, rejected in every:
        assert chosen == expected[prompt][0]
        found.setdefault(prompt, set()).add(rejected)
    assert found == {prompt: wrong for prompt, (_, wrong) in expected.items()}
    # Which wrong one it is varies: neither always the first nor always the last.
    places = Counter(sorted(expected[prompt][1]).index(rejected) for prompt, _, rejected in one)
    assert len(places) > 2


def test_the_wrong_choice_depends_on_the_question_alone(tmp_path):
    """Not on the run's seed, the order of the rows, or which rows stand beside it."""
    path = questions_file(tmp_path)
    lines = Path(path).read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(reversed(lines[:9])))
    splits, digest = read(f"choices:{path}", seed=0)
    others, other_digest = read(f"choices:{path}", seed=1)
    everything = {split[0] for split in splits["train"][0] + splits["held_out"][0]}
    pairs = set(splits["train"][0] + splits["held_out"][0])
    assert splits["train"][0] != others["train"][0]  # the seed decides what is held out
    assert pairs == set(others["train"][0] + others["held_out"][0])
    assert digest == other_digest
    few = read(f"choices:{tmp_path / 'some.jsonl'}", holdout=0)[0]["train"][0]
    assert len(few) == 9
    assert set(few) <= pairs
    assert len(everything) == 22


@pytest.mark.parametrize("seed", [0, 1])
def test_all_pairs_of_a_question_stay_in_one_split(tmp_path, seed):
    splits, _ = read(f"choices-all:{questions_file(tmp_path)}", seed=seed)
    train_prompts, held_out = ({row[0] for row in splits[name][0]} for name in ("train", "held_out"))
    assert len(held_out) == round(0.25 * 22)
    assert not train_prompts & held_out


def test_held_out_questions_may_have_a_file_of_their_own(tmp_path):
    path, other = questions_file(tmp_path), questions_file(tmp_path, 7, "other.jsonl")
    pairs = lines_file(tmp_path, [{"prompt": "p", "chosen": " a", "rejected": " b"}], "pairs.jsonl")
    splits, digest = read(f"choices:{path}", eval_data=f"choices-all:{other}")
    assert [len(splits[name][0]) for name in ("train", "held_out")] == [22, 2 + 3 + 4 + 2 + 3]
    splits, other_digest = read(pairs, eval_data=f"choices:{other}")  # either may be a file of pairs
    assert splits["train"][0] == [("p", " a", " b")]
    assert len(splits["held_out"][0]) == 5
    assert digest != other_digest
    splits, _ = read(f"choices:{path}", eval_data=pairs)
    assert splits["held_out"][0] == [("p", " a", " b")]


def test_a_missing_file_is_named_without_the_prefix(tmp_path):
    with pytest.raises(InputError, match=r"^nowhere\.jsonl: no such file"):
        read("choices:nowhere.jsonl")
    with pytest.raises(InputError, match=r"no such file"):
        read(f"choices:{questions_file(tmp_path)}", eval_data="choices-all:nowhere.jsonl")


def test_splits_of_the_hub_become_pairs(monkeypatch):
    rows = [("glue, train row 1", {"sentence": "They drank.", "label": 1, "idx": 0})]
    test = [("glue, test row 1", {"sentence": "They drank it.", "label": -1, "idx": 0})]
    asked = []
    monkeypatch.setattr(data, "read_hub", lambda name: asked.append(name) or {"train": rows, "test": test})
    splits, _ = read("choices:nyu-mll/glue:cola")
    assert asked == ["nyu-mll/glue:cola"]
    prompt = "They drank.\nQuestion: Does this sentence make sense?\nAnswer:"
    assert splits["train"] == ([(prompt, " yes", " no")], {})
    assert splits["held_out"] == ([], {"the right choice is not known": 1})
    card = {"script": "dpo.py", "args": {"data": "choices:nyu-mll/glue:cola"}}
    assert '- "nyu-mll/glue"' in front_matter(card, False)


def test_other_readers_of_rows_read_them_too(tmp_path, toy_tokenizer):
    source = f"choices:{questions_file(tmp_path)}"
    splits, _ = load_demonstrations(source, None, 0.25, 0, toy_tokenizer, 128)
    pairs = {pair[:2] for split in read(source)[0].values() for pair in split[0]}
    assert {tuple(row["texts"]) for split in splits.values() for row in split} == pairs
    labelled, _ = read_labelled(source, None, 0.0, 0, "auto", True, False)
    assert [label for _, _, label in labelled["train"][0][:4]] == [1.0, 0.0, 1.0, 0.0]
    prompts, _ = data.read_splits(source, None, 0.0, 0, None, prompt_of_row)
    assert {prompt for (prompt,) in prompts["train"][0]} == {prompt for prompt, _ in pairs}


def test_kept_token_ids_are_of_one_kind_of_pairs(tmp_path, toy_tokenizer, monkeypatch):
    """Large files are kept on disk: by which wrong choices, and by the file's name, which may tell
    the task.
    """
    from tokens import store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    rows = [{"sentence": f"number {i} drank .", "label": i % 2} for i in range(12)]
    cola, sst2 = (lines_file(tmp_path, rows, f"{name}.jsonl") for name in ("cola", "sst2"))
    science = questions_file(tmp_path)
    texts, counts = {}, {}
    for source in (f"choices:{cola}", f"choices:{sst2}", f"choices:{science}", f"choices-all:{science}"):
        for _ in range(2):  # made, then read
            splits, _ = data.load_pairs(source, None, 0.0, 0, toy_tokenizer, 128)
            counts.setdefault(source, set()).add(len(splits["train"]))
            texts[source] = splits["train"][0]["texts"]
    assert len(list((tmp_path / "cache" / "preference-rows").iterdir())) == 4
    assert list(counts.values()) == [{12}, {12}, {22}, {sum(2 + i % 3 for i in range(22))}]
    assert texts[f"choices:{cola}"][1:] == (" no", " yes")
    assert texts[f"choices:{sst2}"][1:] == (" negative", " positive")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dpo", "cdpo", "typo", "dph", "sft", "reward_model"])
def test_every_script_for_pairs_trains_on_choices(script, tmp_path, llama, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = questions_file(tmp_path)
    changes = {"model": llama, "data": f"choices:{source}", "eval_data": f"choices:{source}", "max_steps": 2}
    if script == "reward_model":
        monkeypatch.delitem(SHORT, "kl_samples")
    folder = train(script, tmp_path / "run", **changes)
    assert len(lines_of(folder)) == 2
    assert read_json(folder / "args.json")["data"] == f"choices:{source}"


# -- scores


def random_questions(count: int = 9, seed: int = 0) -> list[Question]:
    """Questions in the toy's words with two to five choices, some of them with two prompts."""
    rng, made = random.Random(seed), []
    words = "the capital of france is paris a colour sun blue it not what two and".split()

    def some(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    for number in range(count):
        n = 2 + number % 4
        prompt, texts = some(2, 9), tuple(some(1, 6) for _ in range(n))
        prompts = (some(2, 6), some(2, 6)) if number % 5 == 3 else (prompt,) * n
        made.append(Question(prompts, texts[:1] * 2 if number % 5 == 3 else texts, rng.randrange(len(prompts))))
    return made


def expected_scores(model, tokenizer, head, question: Question) -> dict:
    """One choice at a time, in the plainest way."""
    found: dict[str, list] = {"logps": [], "eos": [], "tokens": [], "rewards": []}
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for prompt, choice in zip(question.prompts, question.choices):
        begin, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {choice}").input_ids
        without, alone = [(begin, whole[len(begin) :])], [(whole, [eos])]
        found["logps"].append(oracle.plain_logps(model, without, pad).item())
        found["eos"].append(oracle.plain_logps(model, alone, pad).item())
        found["tokens"].append(len(whole) - len(begin))
        found["rewards"] += oracle.plain_rewards(model, head, alone)
    return found


@pytest.mark.parametrize("layout", ["shared", "rows", "model_head"])
def test_scores_are_those_of_the_plain_oracle(layout, folder, monkeypatch):
    """Prompts shared or not, choices of any number, padded or not; EOS apart."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "cpu", tokenizer).eval()
    head = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    questions = random_questions()
    monkeypatch.setattr(choices, "choose_layout", lambda *args, **options: layout)
    monkeypatch.setattr(choices, "TOKENS", 60)  # several batches
    scores = choices.score_questions(model, tokenizer, questions, head)
    for question, found in zip(questions, scores, strict=True):
        for name, values in expected_scores(model, tokenizer, head, question).items():
            assert found[name] == pytest.approx(values, abs=1e-4), name
    assert len({round(reward, 3) for found in scores for reward in found["rewards"]}) > 20
    monkeypatch.setattr(choices, "TOKENS", 2048)
    again = choices.score_questions(model, tokenizer, questions[::-1], head)[::-1]
    for found, other in zip(scores, again, strict=True):
        assert found["logps"] == pytest.approx(other["logps"], abs=1e-4)


@pytest.mark.parametrize(("scaling", "layout"), [(1.0, "shared"), (4.0, "model_head")])
def test_a_model_that_scales_its_logits_is_scored_by_its_own_output_layer(scaling, layout, toy_tokenizer, monkeypatch):
    from transformers import GraniteConfig, GraniteForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "initializer_range": 0.3, "logits_scaling": scaling}
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=len(toy_tokenizer), **shape)).eval()
    choose, layouts = choices.choose_layout, []
    monkeypatch.setattr(choices, "choose_layout", lambda *args: layouts.append(choose(*args)) or layouts[-1])
    questions, head = random_questions(), torch.ones(1, 16)
    scores = choices.score_questions(model, toy_tokenizer, questions, head)
    assert layouts == [layout]
    for question, found in zip(questions, scores, strict=True):
        for name, values in expected_scores(model, toy_tokenizer, head, question).items():
            assert found[name] == pytest.approx(values, abs=1e-4), name


@pytest.mark.slow
def test_rewards_are_those_that_the_run_gives_as_a_reward_model(tmp_path, llama):
    """Read at the EOS, where dph.py trains them, by transformers' own sequence classifier."""
    rows = [
        {"question_stem": q.prompts[0], "choices": {"text": q.choices, "label": q.choices}, "answerKey": q.choices[0]}
        for q in random_questions(20)
        if len(set(q.prompts)) == 1
    ]
    source = f"choices-all:{lines_file(tmp_path, rows)}"
    run = train("dph", tmp_path / "run", model=llama, data=source, max_steps=3, lr=1e-2)
    questions, _ = choices.read_questions(source.partition(":")[2])
    tokenizer = load_tokenizer(str(run))
    model, head = load_model(str(run), "cpu", tokenizer), load_weights(run, "score.weight")["score.weight"]
    rewards = [
        value for found in choices.score_questions(model, tokenizer, questions, head) for value in found["rewards"]
    ]
    texts = [(prompt, " " + text) for q in questions for prompt, text in zip(q.prompts, q.choices)]
    judge = load_reward(str(run), source, torch.device("cpu"), torch.no_grad)
    assert rewards == pytest.approx(judge(*map(list, zip(*texts))).tolist(), abs=1e-5)
    assert max(rewards) - min(rewards) > 0.01


def test_a_prompt_that_ends_in_white_space_gives_it_to_the_choice(toy_tokenizer):
    class Characters:
        """A token a character."""

        eos_token_id, bos_token_id, bos_token = 0, None, None

        def __call__(self, text: str):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    question = Question(("so  ", "so  "), ("a", "bc"), 0)
    (prompt, first), (_, second) = choices.encode_question(Characters(), question, 99)
    assert bytes(prompt) == b"so"
    assert bytes(first) == b"   a\0"
    assert bytes(second) == b"   bc\0"
    cut = choices.encode_question(Characters(), Question(("abcdef",) * 2, ("x", "long"), 0), 8)
    assert [bytes(part) for part, _ in cut] == [b"ef", b"ef"]  # as much for every choice
    assert [len(ids) for _, ids in cut] == [3, 6]


def test_who_chooses_what():
    """Each scorer's choice by hand; of equal ones the first."""
    question = Question(("p",) * 3, ("aaaa", "b", "cc"), 1)
    scores = {"logps": [-4.0, -2.0, -3.0], "eos": [-9.0, 0.0, 0.0], "tokens": [4, 1, 2], "rewards": [0.5, 0.5, 0.1]}
    base = {"logps": [-4.0, -2.0, -3.0], "eos": [-19.0, -1.0, 0.0], "tokens": [4, 1, 2], "rewards": [0.0] * 3}
    # acc_norm: -1, -2, -1.5; acc_token: -1, -2, -1.5; implicit: 10, 1, 0
    expected = {"acc": True, "acc_norm": False, "acc_token": False, "acc_head": False, "acc_implicit": False}
    assert choices.right_by([question], [scores], [base]) == {name: [hit] for name, hit in expected.items()}
    other = scores | {"tokens": [1, 1, 2], "rewards": [0.1, 0.7, 0.7]}
    found = choices.right_by([question], [other])
    assert found == {"acc": [True], "acc_norm": [False], "acc_token": [False], "acc_head": [True]}
    found = choices.right_by([question], [other | {"rewards": [0.0] * 3}], [other])
    assert set(found) == {"acc", "acc_norm", "acc_token"}  # no head, and no change from the base model


def test_batches_hold_rows_of_one_form_and_a_limited_size(monkeypatch):
    monkeypatch.setattr(choices, "TOKENS", 50)
    rng = random.Random(0)
    rows = [
        {"prompt": [1] * rng.randint(1, 20), "completions": [[2] * rng.randint(1, 5)] * rng.randint(1, 4)}
        for _ in range(60)
    ]
    cut = choices.batches_of(rows)
    assert sorted(i for numbers in cut for i in numbers) == list(range(60))
    for numbers in cut:
        assert len({len(rows[i]["completions"]) for i in numbers}) == 1
        assert len(numbers) * max(choices.row_length(rows[i]) for i in numbers) <= 50
    assert len(cut) < 40


# -- the study


def test_hits_are_packed_and_unpacked():
    for hits in ([False, False, True], [True] * 9, [False]):
        assert dph_choices.unpack(dph_choices.pack(hits)).tolist() == [float(hit) for hit in hits]


def test_the_interval_is_of_paired_differences():
    """Against plain arithmetic over questions; seeds are averaged first."""
    hits = {"a": [[1, 1, 0, 1], [1, 0, 0, 1]], "b": [[0, 1, 0, 1], [0, 0, 0, 1]]}
    lines = {
        name: [{"right": {task: {"acc": dph_choices.pack([bool(h) for h in run])} for task in "xy"}} for run in runs]
        for name, runs in hits.items()
    }
    mean, half = dph_choices.difference(lines["a"], "acc", lines["b"], "acc", ("x", "y"))
    assert mean == pytest.approx(0.25)  # gaps 1, 0, 0, 0 in both tasks: variance .25
    assert half == pytest.approx(1.96 * (2 * 0.25 / 4) ** 0.5 / 2)
    assert dph_choices.difference(lines["a"], "acc_head", lines["b"], "acc", ("x",)) is None
    assert dph_choices.difference(lines["a"], "acc", [], "acc", ("x",)) is None


def test_the_best_learning_rate_is_the_smallest_of_the_best():
    def line(lr, share, stage="tuning", method="dpo"):
        return {"stage": stage, "method": method, "lr": lr, "share": share}

    lines = [
        line(3e-5, 0.7),
        line(1e-5, 0.7),
        line(3e-6, 0.6),
        line(1e-4, 0.9, stage="answers"),
        line(1, 1, method="sft"),
    ]
    assert dph_choices.best_lr(lines, "dpo") == 1e-5


def test_no_test_question_is_trained_on(preference_data, tmp_path):
    args = dph_choices.Args(model="m", rows=40, held_out=10, limit=15, others=("piqa",))
    files, tests = dph_choices.write_files(args, tmp_path)
    splits = {name: choices.read_questions(str(path))[0] for name, path in files.items()}
    assert {name: len(each) for name, each in splits.items()} == {"train": 6 * 40, "held_out": 6 * 10}
    prompts = {name: {question.prompts[0] for question in each} for name, each in splits.items()}
    assert not prompts["train"] & prompts["held_out"]
    for name, path in tests.items():
        stem = (dph_choices.TESTS | dph_choices.OTHERS)[name]
        assert path.name == f"{stem}.jsonl"
        assert len(choices.read_questions(str(path))[0]) == 15
        whole, _ = choices.read_questions(str(preference_data / "eval" / f"{stem}.jsonl.gz"))
        assert not {question.prompts[0] for question in whole} & (prompts["train"] | prompts["held_out"])
    again = dph_choices.write_files(args, tmp_path / "again")[0]
    assert again["train"].read_text() == files["train"].read_text()
    kinds = Counter(json.loads(line)["task"] for line in files["train"].read_text().splitlines())
    assert kinds == {"arc": 80, "openbookqa": 40, "sst2": 40, "mrpc": 40, "cola": 40}


def test_the_study_refuses_names_that_it_does_not_know(tmp_path):
    for changes in ({"methods": ("ppo",)}, {"tasks": ("hellaswag",)}, {"tasks": ()}, {"others": ("cola",)}):
        with pytest.raises(InputError, match=rf"--{next(iter(changes))} .*: expected some of"):
            dph_choices.main(dph_choices.Args(model="m", output=str(tmp_path / "x.jsonl"), **changes))


def canned_rows(name: str) -> list[tuple[dict, Question]]:
    """Forty questions of SST-2 in place of any file, the same ones under every name."""
    rows = [{"task": "sst2", "sentence": f"{name} number {i}", "label": i % 2} for i in range(40)]
    return [(row, question_of_row(name, "row", row)[0]) for row in rows]


def test_a_question_of_a_test_file_is_left_out_of_training(tmp_path, monkeypatch):
    """Also one that is not among those drawn for the test."""
    monkeypatch.setattr(dph_choices, "rows_of", lambda name: canned_rows("x")[: 10 if name == "sst2_dev" else 40])
    args = dph_choices.Args(model="m", tasks=("sst2",), others=(), rows=100, held_out=5, limit=4)
    files, tests = dph_choices.write_files(args, tmp_path)
    numbers = {
        name: [int(row["sentence"].split()[-1]) for row in study.read_lines(path)]
        for name, path in {**files, **tests}.items()
    }
    assert numbers == {"held_out": [*range(10, 15)], "train": [*range(15, 40)], "sst2": [*range(4)]}


def canned_scores(loaded: str, questions: dict) -> dict:
    """The LM is right of every second question, the head of a trained model of all where its
    learning rate is 3e-5, else of every fourth.
    """

    def line(number: int, right: int) -> dict:
        sure, head = number % 2 == 0, number % 4 == 0 or "3e-05" in loaded
        logps, rewards = ([-1.0 - (side != (right if hit else 1 - right)) for side in (0, 1)] for hit in (sure, head))
        scores = {"logps": logps, "eos": [0.0, 0.0], "tokens": [1, 1], "rewards": rewards}
        return scores if "dph" in loaded else scores | {"rewards": [0.0, 0.0]}

    return {task: [line(i, each[i].right) for i in range(len(each))] for task, each in questions.items()}


def test_the_study_chooses_answers_and_goes_on(tmp_path, monkeypatch, capsys):
    """Without a model: which runs are made, with which flags, what is said of them, and that
    nothing is made twice.
    """
    made = []

    def finish(script: str, folder: Path, flags: dict, more: str) -> dict:
        made.append((script, flags))
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
        return {"steps": 3, "seconds": 1.0, "peak_memory_bytes": 1}

    def train_or_find(script: str, folder: Path, flags: dict, more: str) -> dict:
        exists = (folder / "summary.json").exists()
        return {"steps": 3, "seconds": 1.0, "peak_memory_bytes": 1} if exists else finish(script, folder, flags, more)

    monkeypatch.setattr(dph_choices, "rows_of", canned_rows)
    monkeypatch.setattr(dph_choices, "load", str)
    monkeypatch.setattr(dph_choices, "scores_of", canned_scores)
    monkeypatch.setattr(dph_choices, "perplexity", lambda loaded, tokens: 7.0)
    monkeypatch.setattr(study, "train", train_or_find)
    given = {"model": "m", "tasks": ("sst2",), "others": ("piqa",), "rows": 20, "held_out": 8, "limit": 40}
    given |= {"runs": str(tmp_path / "runs"), "output": str(tmp_path / "results" / "lines.jsonl")}
    args = dph_choices.Args(**given, methods=("dpo", "dph separable", "dph separable, frozen"))
    dph_choices.main(args)
    lines = study.read_lines(Path(args.output))
    answers = [(line["method"], line["lr"], line["seed"]) for line in lines if line["stage"] == "answers"]
    # DPO's rates are equal, so the smallest counts; the head is best at 3e-5.
    expected = [("dpo", 1e-5), ("dph separable", 3e-5), ("dph separable, frozen", 1e-3)]
    assert answers == [("base", 0.0, 0), *((*run, seed) for run in expected for seed in (0, 1, 2))]
    assert Counter(script for script, _ in made) == {"dpo.py": 5, "dph.py": 10}
    assert {flags["data"].partition(":")[0] for _, flags in made} == {"choices"}
    frozen = [flags for _, flags in made if flags.get("freeze_backbone")]
    assert sorted({flags["lr"] for flags in frozen}) == [1e-3, 3e-3, 1e-2]
    assert all("head_lr" not in flags for flags in frozen)
    joint = {(flags["lr"], flags["head_lr"]) for script, flags in made if script == "dph.py" and flags not in frozen}
    assert joint == {(1e-5, 1e-3), (3e-5, 3e-3), (1e-4, 1e-2)}
    assert not list(tmp_path.glob("runs/*/*/*.safetensors"))
    output = capsys.readouterr().out.splitlines()
    found = {line.partition("  ")[0]: line.split("  ")[-1].strip() for line in output if "its head" in line}
    assert found["dph separable: its head - its own LM"] == "+0.500 +- 0.157"  # 1.96 * sqrt(.25 * 40/39 / 40)
    assert found["dph separable: its head - LM of dpo"] == "+0.500 +- 0.157"
    assert found["dph separable, frozen: its head - its own LM"] == "-0.250 +- 0.136"
    table = [line for line in output if line.startswith("dph separable ") and "acc_head" in line]
    assert table[0].split()[3:] == ["3e-05", *["1.00", "+-", "0.00"] * 2, *["1.000", "+-", "0.000"] * 2]
    made.clear()
    dph_choices.main(args)
    assert not made
    assert study.read_lines(Path(args.output)) == lines
    study.write_lines(Path(args.output), [line for line in lines if line["method"] != "dpo" or line["seed"] != 0])
    dph_choices.main(args)  # weights that were dropped are made again
    assert [flags["lr"] for _, flags in made] == [1e-5, 3e-5, 1e-4]
    assert sorted(map(json.dumps, study.read_lines(Path(args.output)))) == sorted(map(json.dumps, lines))
    dph_choices.main(dph_choices.Args(**given | {"limit": 10}, methods=("dpo",)))  # another bed, in the same file
    assert len(study.read_lines(Path(args.output))) == len(lines) + 1 + 3 + 3


@pytest.mark.study
def test_the_study_in_small(preference_data, tmp_path, capsys):
    """Tuning and answers of two methods with a real model; a run whose weights were dropped is made
    again, the same, where its line is missing.
    """
    args = dph_choices.Args(
        model=str(preference_data / "models" / "stories260K"),
        methods=("sft", "dph separable, frozen"),
        tasks=("arc_easy", "sst2"),
        others=("winogrande",),
        rows=20,
        held_out=5,
        limit=20,
        text_tokens=600,
        lrs=(1e-2,),
        head_factor=1.0,
        seeds=(0,),
        batch_size=8,
        max_length=256,
        runs=str(tmp_path / "runs"),
        output=str(tmp_path / "results" / "lines.jsonl"),
        extra="--max-steps 2",
    )
    dph_choices.main(args)
    lines = study.read_lines(Path(args.output))
    assert [(line["stage"], line["method"]) for line in lines] == [
        ("answers", "base"),
        *((stage, method) for method in args.methods for stage in ("tuning", "answers")),
    ]
    base, sft, frozen = (line for line in lines if line["stage"] == "answers")
    assert set(base["accuracy"]) == {"arc_easy", "sst2", "winogrande"}
    # A frozen backbone: the LM is the base model to the last digit, and there is a head.
    for task, right in base["right"].items():
        assert {name: frozen["right"][task][name] for name in right} == right
        assert "acc_head" in frozen["right"][task]
        assert "acc_implicit" not in frozen["right"][task]
    assert frozen["perplexity"] == base["perplexity"] != sft["perplexity"]
    assert "acc_implicit" in sft["right"]["sst2"]
    assert "dph separable, frozen: its head - its own LM" in capsys.readouterr().out
    study.write_lines(Path(args.output), [line for line in lines if line != sft])
    dph_choices.main(args)
    assert study.read_lines(Path(args.output))[-1]["right"] == sft["right"]
