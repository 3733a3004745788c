"""Rows of multiple-choice files to the texts that are scored, and to pairs of them.

The texts are those of lm-eval (EleutherAI/lm-evaluation-harness 0.4.13), zero-shot and without a
chat template: what stands before a choice is the task's `doc_to_text`, and " " + choice follows it.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass

from common import InputError
from common.fields import is_unicode, names_of

ONE_WRONG, ALL_WRONG = "choices:", "choices-all:"  # what stands before the name of a file
DELIMITER = " "  # between prompt and choice


@dataclass(frozen=True)
class Question:
    """A question as it is scored: the texts `prompts[i] + DELIMITER + choices[i]`.

    prompts: what stands before each choice: one and the same text, but for WinoGrande, which puts
        each of two names into the sentence and scores the sentence's end.
    choices: without the delimiter; their lengths in characters are what acc_norm divides by.
    right: the number of the right one.
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    right: int


# -- the tasks: from a row to (prompt or prompts, choices, number of the right choice or None)


def number_of(value: object) -> int | None:
    """The label as a number: an integer, or digits as text; None for all others."""
    if isinstance(value, str) and re.fullmatch(r"\d+", value.strip()):
        return int(value)
    return int(value) if isinstance(value, int) else None


def fixed(template: str, *choices: str):
    """A task whose choices are the same for every row, numbered by `label`."""
    return lambda row: (template.format_map(row), choices, number_of(row["label"]))


def lettered(template: str):
    """A task with texts and letters of its choices in `choices`, the right one in `answerKey`."""

    def read(row: dict) -> tuple:
        letters, key = list(row["choices"]["label"]), str(row["answerKey"]).strip()
        return template.format_map(row), row["choices"]["text"], letters.index(key) if key in letters else None

    return read


def piqa(row: dict) -> tuple:
    """Two ways to reach a goal."""
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], number_of(row["label"])


def hellaswag(row: dict) -> tuple:
    """Marks of the WikiHow part are taken out, in the harness's order."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(f"{row['activity_label']}: {context}"), [clean(end) for end in row["endings"]], number_of(row["label"])


def winogrande(row: dict) -> tuple:
    """The gap is filled with either name, and what follows it is scored: two prompts, one end."""
    before, gap, after = row["sentence"].partition("_")
    answer = number_of(row["answer"])
    prompts = [before + row["option1"], before + row["option2"]]
    return prompts, [after.strip()] * 2, answer - 1 if gap and answer else None


def mmlu(row: dict) -> tuple:
    """The choices stand in the prompt, and their letters are scored."""
    subject, letters = row["subject"].replace("_", " "), "ABCD"[: len(row["choices"])]
    lines = [f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"])]
    intro = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return f"{intro}{row['question'].strip()}\n{''.join(lines)}Answer:", letters, number_of(row["answer"])


SAME = "Question: Do both sentences mean the same thing?\nAnswer:"
LETTERED = {"choices": dict, "answerKey": object}
PAIR = {"sentence1": str, "sentence2": str, "label": object}
TASKS = {  # name -> (the fields that a row must have and what is in them, what reads it)
    "arc": ({"question": str, **LETTERED}, lettered("Question: {question}\nAnswer:")),
    "openbookqa": ({"question_stem": str, **LETTERED}, lettered("{question_stem}")),
    "cola": (
        {"sentence": str, "label": object},
        fixed("{sentence}\nQuestion: Does this sentence make sense?\nAnswer:", "no", "yes"),
    ),
    "sst2": (
        {"sentence": str, "label": object},
        fixed("{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:", "negative", "positive"),
    ),
    "mrpc": (PAIR, fixed(f"Sentence 1: {{sentence1}}\nSentence 2: {{sentence2}}\n{SAME}", "no", "yes")),
    "rte": (PAIR, fixed("{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", "True", "False")),
    "qnli": (
        {"question": str, "sentence": str, "label": object},
        fixed("{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:", "yes", "no"),
    ),
    "boolq": (
        {"passage": str, "question": str, "label": object},
        fixed("{passage}\nQuestion: {question}?\nAnswer:", "no", "yes"),
    ),
    "piqa": ({"goal": str, "sol1": str, "sol2": str, "label": object}, piqa),
    "hellaswag": ({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": object}, hellaswag),
    "mmlu": ({"subject": str, "question": str, "choices": list, "answer": object}, mmlu),
    "winogrande": ({"sentence": str, "option1": str, "option2": str, "answer": object}, winogrande),
}


def task_of(source: str, where: str, row: dict) -> str:
    """The name of the task that a row is of, told by its fields and, where these fit several tasks,
    by the row's field `task` or the name of the file; InputError where that leaves none or several.
    """
    fields = {name: set(of_task) for name, (of_task, _) in TASKS.items()}
    fitting = [name for name in fields if fields[name] <= row.keys()]
    fitting = [name for name in fitting if not any(fields[name] < fields[other] for other in fitting)]
    if row.get("task") in fitting:
        return row["task"]
    could_be = ", ".join(fitting) if len(fitting) > 1 else ""
    if could_be:
        words = re.split(r"[^a-z0-9]+", source.lower().replace("sst-2", "sst2"))
        fitting = [name for name in fitting if name in words]
    if len(fitting) == 1:
        return fitting[0]
    if could_be:
        raise InputError(f"{where}: could be of {could_be}; a field `task`, or the file's name, must tell which.")
    near = max(TASKS, key=lambda name: len(fields[name] & row.keys()) / len(fields[name]))
    raise InputError(
        f"{where}: of no multiple-choice task known here ({', '.join(TASKS)}): expected for instance "
        f"{', '.join(TASKS[near][0])} as of {near} (found {names_of(row)})."
    )


def question_of_row(source: str, where: str, row: dict) -> tuple[Question | None, str | None]:
    """(Question, None) of a row of a multiple-choice file, or (None, reason) for one to drop.

    Raises InputError where the row is of no known task."""
    fields, read = TASKS[task_of(source, where, row)]
    if not all(isinstance(row[name], kind) for name, kind in fields.items()):
        return None, "a field is neither text nor a list of choices"
    texts = [text for name, kind in fields.items() if kind is not object for text in texts_of(row[name])]
    if not all(isinstance(text, str) for text in texts):
        return None, "a field is neither text nor a list of choices"
    if not is_unicode(texts):
        return None, "a field is not valid Unicode text"
    prompts, choices, right = read(row)
    if len(choices) < 2:
        return None, "fewer than two choices"
    if right is None or not 0 <= right < len(choices):
        return None, "the right choice is not known"
    prompts = (prompts,) * len(choices) if isinstance(prompts, str) else tuple(prompts)
    if not all(prompt.strip() for prompt in prompts):
        return None, "the prompt is empty"
    return Question(prompts, tuple(choices), right), None


def texts_of(value: object) -> list:
    """The parts of a field that must be text: of a list its items, of lettered choices both lists,
    which are of one length."""
    if isinstance(value, dict):
        text, label = value.get("text"), value.get("label")
        is_pair = isinstance(text, list) and isinstance(label, list) and len(text) == len(label)
        return [*text, *label] if is_pair else [None]
    return value if isinstance(value, list) else [value]


# -- pairs


def is_choices(source: str) -> bool:
    """Whether a name asks for the rows of a multiple-choice file."""
    return source.startswith((ONE_WRONG, ALL_WRONG))


def file_of(source: str) -> str:
    """The file, or data set of the hub, that a name means, whatever its rows are read as."""
    return source.partition(":")[2] if is_choices(source) else source


def pairs_of_choices(source: str, rows: list[tuple[str, dict]]) -> tuple[list[tuple[str, dict]], Counter]:
    """Multiple-choice rows as rows of pairs (where, {"prompt", "chosen", "rejected"}), and how many
    were dropped for which reason.

    `choices:FILE` puts the right choice against one wrong one, drawn by a hash of the question: the
    same one for every run, seed and order of the rows, so that runs with different seeds are
    trained on the same pairs. (The first wrong one would be what the authors of a file thought of
    first.) `choices-all:FILE` makes a pair with each wrong one. Raises InputError where the rows
    are of no known task, or of one whose choices do not share a prompt."""
    pairs, dropped = [], Counter()
    for where, row in rows:
        question, reason = question_of_row(file_of(source), where, row)
        if reason:
            dropped[reason] += 1
            continue
        if len(set(question.prompts)) > 1:
            raise InputError(
                f"{where}: a question of WinoGrande has two prompts with the same end, so it makes no pair of answers "
                "to one prompt; expected another task."
            )
        wrong = [i for i in range(len(question.choices)) if i != question.right]
        if source.startswith(ONE_WRONG):
            wrong = [wrong[hash_of(question) % len(wrong)]]
        right = DELIMITER + question.choices[question.right]
        for i in wrong:
            answers = {"chosen": right, "rejected": DELIMITER + question.choices[i]}
            pairs.append((where, {"prompt": question.prompts[0], **answers}))
    return pairs, dropped


def hash_of(question: Question) -> int:
    """A number that depends on the texts of a question alone."""
    texts = json.dumps([question.prompts[0], question.choices])
    return int(hashlib.sha256(texts.encode()).hexdigest(), 16)
