"""Multiple-choice tasks by the field's harness, lm-eval: by the log-probability of each choice, and
by a reward of prompt + choice, as in Direct Preference Heads (arXiv 2405.20053).

Prompts, choices, log-probabilities and metrics are the harness's own. Ours are the model that
answers with rewards, the suites' averages, the standard errors, and the calibration.
"""

import contextlib
import importlib.metadata
import logging
import math
from pathlib import Path

import torch
from packaging.version import Version

from chat import templates
from common import InputError, first_line
from common.metrics import standard_error
from common.models import load_model, load_tokenizer
from judging.heads import refuse_classifier, refuse_without_reward
from judging.local_tasks import PREFIX, harness_tasks
from rewards.metrics import calibration_error, expected_calibration_error
from rewards.models import load_reward

# suite: its tasks, as in arXiv 2405.20053, each with the harness's tasks that make it up
SUITES = {
    "gpt4all": {name: (name,) for name in "hellaswag openbookqa winogrande arc_challenge arc_easy boolq piqa".split()},
    "glue": {
        "mnli": ("mnli", "mnli_mismatch"),
        **{name: (name,) for name in "qqp qnli sst2 cola mrpc rte wnli".split()},
    },
}
NOT_AVERAGED = {"wnli"}  # as in the paper's table, "GLUE (-WNLI)"
METRICS = ("acc", "acc_norm", "f1", "mcc")  # shown, in this order
OF_REWARDS = ("acc", "f1", "mcc")  # acc_norm would divide a reward by characters
CALIBRATION = ("expected_calibration_error", "calibration_error")
OLDEST = (0, 4, 13)  # of lm_eval, whose tasks load otherwise before
DRAWS = 1000  # resamples for the error of a metric that is no mean


# -- which tasks


def expand(names: str, known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(the harness's tasks to run, missing tasks of each suite) of `--tasks`.

    A local task takes the place of the harness's own; a suite of which there is any local task has
    these alone. known: names of all local tasks.
    """
    asked, missing = [name.strip() for name in names.split(",") if name.strip()], {}
    if not asked:
        raise InputError(f"--tasks {names}: expected gpt4all, glue, or names of lm-eval's tasks, with commas between.")
    tasks: list[str] = []
    for name in asked:
        members = [part for parts in SUITES.get(name, {}).values() for part in parts] or [name]
        local = [PREFIX + member for member in members if PREFIX + member in known]
        if local and name in SUITES:
            missing[name] = [member for member in members if PREFIX + member not in known]
        tasks += local or members
    return list(dict.fromkeys(tasks)), missing


def load_tasks(names: str, tasks_dir: str) -> tuple[dict, dict, dict[str, list[str]]]:
    """({"tasks": what the harness evaluates, "task_manager": of whom}, its tasks by name, missing
    tasks of each suite).

    Raises InputError for a task that is not known, cannot be loaded or is no multiple choice.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    local, manager = set(), None
    if tasks_dir:
        if not Path(tasks_dir).is_dir():
            raise InputError(f"--tasks-dir {tasks_dir}: there is no such folder.")
        manager = TaskManager(include_path=tasks_dir, include_defaults=False)
        local = set(manager.all_tasks)
    asked, missing = expand(names, local)
    if manager is None or not local.issuperset(asked):  # the harness's own thousands take seconds to list
        manager = TaskManager(include_path=tasks_dir or None)
    for name in asked:
        if name not in manager.task_index:
            where = f" or {tasks_dir}" if tasks_dir else ""
            raise InputError(f"--tasks {name}: no suite here, and no task of lm-eval{where} has that name.")
    specs, tasks = [], {}
    for name in asked:
        try:
            loaded = manager.load([name])
        except Exception as error:
            hint = "" if name in local else "; without the hub, --tasks-dir names local task files"
            raise InputError(f"--tasks {name}: its data cannot be loaded ({first_line(error)}){hint}.") from None
        if group := loaded.get("groups", {}).get(name):
            if twice := sorted(tasks.keys() & loaded["tasks"].keys()):
                raise InputError(f"--tasks {name}: its task {twice[0]} is asked for twice.")
            specs.append(group)
        else:
            specs += [task for key, task in loaded["tasks"].items() if key not in tasks]
        tasks |= {key: task for key, task in loaded["tasks"].items() if key not in tasks}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise InputError(f"--tasks {name}: a task of the kind {task.OUTPUT_TYPE}; expected multiple choice.")
    return {"tasks": specs, "task_manager": manager}, tasks, missing


# -- models


def check_harness() -> None:
    """Raises InputError where lm-eval is missing, too old, or lacks a package that it needs."""
    harness_tasks()
    version = importlib.metadata.version("lm_eval")
    if Version(version).release < OLDEST:
        raise InputError(f"--tasks: lm_eval {version} is too old; expected 0.4.13 or later.")
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        how = "pip install accelerate (see requirements-optional.txt)"
        raise InputError(f"--tasks: lm_eval lacks a package ({first_line(error)}); {how}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def language_model(folder: str, device, batch_size: int, chat: bool, chat_template: str | None):
    """The harness's own Hugging Face model, its weights float32."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(folder, chat_template)
    if chat:
        templates.check_chat(tokenizer, is_toy=False)
    model = load_model(folder, device, tokenizer).eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def reward_model(folder: str, device, chat: bool):
    """The harness's model whose log-likelihoods are rewards of prompt + choice."""
    from judging.reward_lm import RewardLM

    return RewardLM(load_reward(folder, "", device, contextlib.nullcontext, chat, "--model"))


# -- what came out


def gold_of(task, doc: dict) -> int | None:
    """The number of a row's right choice; None where there are several or none."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def choice_probabilities(task, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax over the choices of each row, [rows, most choices], nan where a row has fewer; the
    numbers of the right choices, [rows]), of rows with one right choice."""
    scores, answers = [], []
    for sample in samples:
        gold = gold_of(task, sample["doc"])
        if gold is not None:
            n = len(task.doc_to_choice(sample["doc"]))
            scores.append(torch.tensor([float(score) for score, _ in sample["filtered_resps"][:n]]).double().softmax(0))
            answers.append(gold)
    if not scores:
        return torch.zeros(0, 1, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    widest = max(map(len, scores))
    rows = [torch.nn.functional.pad(row, (0, widest - len(row)), value=math.nan) for row in scores]
    return torch.stack(rows), torch.tensor(answers)


def binary_scores(cells: torch.Tensor) -> dict[str, torch.Tensor]:
    """acc, f1 of class 1, and Matthews' correlation of tables of counts [..., 4]: right and wrong
    predictions of class 0, wrong and right ones of class 1. Where a margin is empty, 0."""
    zeros, misses_of_0, misses_of_1, ones = cells.double().unbind(-1)
    margins = (ones + misses_of_0) * (ones + misses_of_1) * (zeros + misses_of_0) * (zeros + misses_of_1)
    covariance = ones * zeros - misses_of_0 * misses_of_1
    f1 = 2 * ones / (2 * ones + misses_of_0 + misses_of_1).clamp(min=1)
    return {
        "acc": (zeros + ones) / cells.sum(-1),
        "f1": f1,
        "mcc": torch.where(margins > 0, covariance / margins.clamp(min=1).sqrt(), 0.0),
    }


def bootstrap_errors(pairs: list[tuple[int, int]], names: tuple[str, ...]) -> dict:
    """Standard errors of metrics of (right class, predicted class) pairs, and "score", that of
    their mean: the deviation over resamples of the rows, which are draws of the four counts. None
    where there are more than two classes."""
    if len(pairs) < 2 or not {value for pair in pairs for value in pair} <= {0, 1}:
        return dict.fromkeys((*names, "score"))
    cells = torch.bincount(torch.tensor([2 * right + predicted for right, predicted in pairs]), minlength=4)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(cells.double().expand(DRAWS, 4), len(pairs), replacement=True, generator=generator)
    counts = torch.nn.functional.one_hot(draws, 4).sum(1)  # [draws, 4]
    scores = binary_scores(counts)
    values = {name: scores[name] for name in names} | {"score": torch.stack([scores[name] for name in names]).mean(0)}
    return {name: value.std(correction=1).item() for name, value in values.items()}


def numbers_of(task, metrics: dict, samples: list[dict], shown: tuple[str, ...]) -> dict:
    """The metrics of a task with their standard errors, its score, which is their mean (acc_norm
    left out), and its calibration.

    metrics: the harness's, {"acc,none": value, ...}. A mean's error is from its rows, that of f1
    and mcc from resampling.
    """
    values = {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, float)}
    names = [name for name in METRICS if name in shown and name in values]
    numbers = {}
    for name in names:
        per_row = [sample[name] for sample in samples]
        error = None if isinstance(per_row[0], tuple) else standard_error(per_row)
        numbers |= {name: values[name], f"{name}_se": error}
    scored = tuple(name for name in names if name != "acc_norm")
    numbers["score"] = sum(values[name] for name in scored) / len(scored) if scored else None
    numbers["score_se"] = numbers.get("acc_se")
    if {"f1", "mcc"} & set(scored):
        pairs = next(sample_pairs(samples, name) for name in scored if name != "acc")
        errors = bootstrap_errors(pairs, scored)
        numbers |= {f"{name}_se": errors[name] for name in scored if name != "acc"} | {"score_se": errors["score"]}
    return numbers | calibration_of(*choice_probabilities(task, samples))


def sample_pairs(samples: list[dict], name: str) -> list[tuple[int, int]]:
    """(right class, predicted class) of each row of a metric that is no mean."""
    return [(int(sample[name][0]), int(sample[name][1])) for sample in samples]


def calibration_of(probabilities: torch.Tensor, answers: torch.Tensor) -> dict:
    """Both calibration errors of choices."""
    functions = (expected_calibration_error, calibration_error)
    return {name: function(probabilities, answers) for name, function in zip(CALIBRATION, functions)}


def average_of(suite: str, numbers: dict[str, dict]) -> dict:
    """The plain mean of the tasks of a suite that were run, each by its score: {"score",
    "score_se", "acc_norm": the mean with acc_norm where a task has it, "tasks": how many}.

    A task of several parts (MNLI's two test sets) counts as one, by its parts' mean. Errors are
    those of independent tasks: the root of the sum of squares, over how many there are.
    """
    scores, norms, variances = [], [], []
    for name, parts in SUITES[suite].items():
        found = [numbers[part] for part in parts if part in numbers]
        if found and name not in NOT_AVERAGED:
            scores.append(sum(part["score"] for part in found) / len(found))
            norms.append(sum(part.get("acc_norm", part["score"]) for part in found) / len(found))
            errors = [math.nan if part["score_se"] is None else part["score_se"] for part in found]
            variances.append(sum(error**2 for error in errors) / len(found) ** 2)
    if not scores:
        return {}
    average = {"score": sum(scores) / len(scores), "score_se": math.sqrt(sum(variances)) / len(scores)}
    has_norm = any("acc_norm" in part for part in numbers.values())
    return average | ({"acc_norm": sum(norms) / len(norms)} if has_norm else {}) | {"tasks": len(scores)}


# -- all


def run_tasks(
    folder: str,
    name: str,
    tasks: str,
    score: str,
    tasks_dir: str = "",
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    chat_template: str | None = None,
) -> dict:
    """Evaluates a model on tasks and returns {"tasks": ..., "averages": ..., "lm_eval": version}.

    Args:
        folder, name: of the model, and what the user called it. tasks: names of suites and tasks.
        score: "logprob", "reward" or "both". tasks_dir: a folder of task files that come first.
        limit: rows of each task; None: all. chat: whether prompts go through the chat template.
    """
    check_harness()
    if score != "reward":
        refuse_classifier(name, folder, f"--score {score}")
    if score != "logprob":
        refuse_without_reward(name, folder, f"--score {score}")
    specs, loaded, missing = load_tasks(tasks, tasks_dir)
    device, results = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    if score != "reward":
        print(f"{len(loaded)} tasks by log-probability.", flush=True)
        model = language_model(folder, device, batch_size, chat, chat_template)
        results["logprob"] = evaluate(model, specs, limit, chat)
        del model
    if score != "logprob":
        print(f"{len(loaded)} tasks by reward.", flush=True)
        # Strings that go through a template do so in the reward, which knows its own.
        results["reward"] = evaluate(reward_model(folder, device, chat), specs, limit, chat=False)
    return summary_of(results, loaded, missing, tasks) | {"lm_eval": importlib.metadata.version("lm_eval")}


def evaluate(model, specs: dict, limit: int | None, chat: bool) -> dict:
    """What the harness says of a model, every row's answers included."""
    from lm_eval import simple_evaluate

    return simple_evaluate(model, **specs, limit=limit, bootstrap_iters=0, apply_chat_template=chat)


def summary_of(results: dict[str, dict], loaded: dict, missing: dict, asked: str) -> dict:
    """{"tasks": {name: {"rows", KIND: numbers}}, "averages": {suite: {"missing", KIND: numbers}}}
    of what the harness said, for each kind of score; a group's rows count together."""
    tasks, averages = {}, {}
    for kind, said in results.items():
        shown = OF_REWARDS if kind == "reward" else METRICS
        numbers = {}
        for name, task in loaded.items():
            samples = said["samples"][name]
            numbers[name] = numbers_of(task, said["results"][name], samples, shown)
            tasks.setdefault(name, {"rows": len(samples)})[kind] = numbers[name]
        for group, children in said.get("group_subtasks", {}).items():
            if group not in loaded and (rows := group_numbers(said, leaves(said, children), loaded)):
                tasks.setdefault(group, {"rows": rows.pop("rows")})[kind] = rows
        own = {name.removeprefix(PREFIX): value for name, value in numbers.items()}
        for suite in SUITES:
            if suite in [name.strip() for name in asked.split(",")]:
                averages.setdefault(suite, {"missing": missing.get(suite, [])})[kind] = average_of(suite, own)
    return {"tasks": tasks, "averages": averages}


def leaves(said: dict, names: list[str]) -> list[str]:
    """The tasks below groups, groups of groups included."""
    below = said["group_subtasks"]
    return [leaf for name in names for leaf in (leaves(said, below[name]) if below.get(name) else [name])]


def group_numbers(said: dict, names: list[str], loaded: dict) -> dict:
    """acc of all rows of a group's tasks, each weighing the same, and their calibration; nothing
    where a task has no acc."""
    samples = [(loaded[name], sample) for name in names for sample in said["samples"].get(name, [])]
    if not samples or not all("acc" in sample for _, sample in samples):
        return {}
    accuracies = [sample["acc"] for _, sample in samples]
    numbers = {"rows": len(samples), "acc": sum(accuracies) / len(samples), "acc_se": standard_error(accuracies)}
    parts = [choice_probabilities(loaded[name], said["samples"][name]) for name in names if said["samples"].get(name)]
    widest = max(probabilities.shape[1] for probabilities, _ in parts)
    padded = [torch.nn.functional.pad(p, (0, widest - p.shape[1]), value=math.nan) for p, _ in parts]
    return numbers | calibration_of(torch.cat(padded), torch.cat([answers for _, answers in parts]))


def print_table(summary: dict) -> None:
    """A line for each metric of each task, a column for each kind of score."""
    kinds = [kind for kind in ("logprob", "reward") if any(kind in line for line in summary["tasks"].values())]
    lines = [["task", "rows", "metric", *kinds]]
    for name, task in summary["tasks"].items():
        shown = [m for m in (*METRICS, *CALIBRATION) if any(m in task.get(kind, {}) for kind in kinds)]
        for i, metric in enumerate(shown):
            where = [name, f"{task['rows']:,}"] if i == 0 else ["", ""]
            lines.append([*where, metric, *(cell(task.get(kind, {}), metric) for kind in kinds)])
    for suite, average in summary["averages"].items():
        count = next((average[kind]["tasks"] for kind in kinds if average.get(kind)), 0)
        for i, metric in enumerate(("score", "acc_norm")):
            if any(metric in average.get(kind, {}) for kind in kinds):
                where = [f"average of {suite}", f"{count} tasks"] if i == 0 else ["", ""]
                label = "score" if i == 0 else "with acc_norm"
                lines.append([*where, label, *(cell(average.get(kind, {}), metric) for kind in kinds)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for suite, average in summary["averages"].items():
        if average["missing"]:
            names = ", ".join(average["missing"])
            print(
                f"The average of {suite} is of the tasks at hand; missing: {names}. It compares with no published one."
            )


def cell(numbers: dict, name: str) -> str:
    """A number of the table, with its standard error where there is one."""
    value, error = numbers.get(name), numbers.get(f"{name}_se")
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"
