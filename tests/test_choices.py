"""Multiple-choice files: their texts against expected ones and against lm-eval's own, the pairs that
are made of them, and the choices that models take.
"""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch

from choices import templates
from choices.templates import Question, pairs_of_choices, question_of_row
from common import InputError, data
from common.fields import pair_of_row
from common.models import load_model, load_tokenizer
from judging import choices
from labelled.rows import load_demonstrations
from rewards.prompts import load_prompts
from tests.runs import lines_file, train

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
ANATOMY = "anatomy"


@pytest.fixture(scope="module")
def harness(preference_data, tmp_path_factory):
    """lm-eval's task over 60 rows of each local file, drawn at random: {name: (its file, the task)}."""
    pytest.importorskip("lm_eval", reason="needs lm_eval, whose texts ours are compared with")
    from lm_eval.tasks import TaskManager

    folder, files = tmp_path_factory.mktemp("tasks"), {}
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    for name, include in HARNESS.items():
        with gzip.open(preference_data / "eval" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if name == "mmlu_val":
            rows = [row for row in rows if row["subject"] == ANATOMY]
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
