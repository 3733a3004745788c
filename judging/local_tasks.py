"""Task files of the evaluation harness for data files at hand, so that nothing is downloaded: what
`python -m common.evaluate --write-tasks` writes.

Each file takes the harness's own task (its prompt, choices and metrics) and names a local file in
place of the hub's data set.
"""

import importlib.util
import json
from pathlib import Path

from common import InputError
from common.files import write_text

PREFIX = "local_"  # before the names of the harness's own tasks
MMLU = "mmlu/default/_default_template_yaml"
SUBJECT = "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"

# task: (the harness's file, the split that it scores, names of data files, the first that exists)
TASKS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", ("hellaswag_val",)),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test", ("openbookqa_test",)),
    "winogrande": ("winogrande/default.yaml", "validation", ("winogrande_val",)),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", ("arc_challenge_test",)),
    "arc_easy": ("arc/arc_easy.yaml", "test", ("arc_easy_test",)),
    "boolq": ("super_glue/boolq/default.yaml", "validation", ("boolq_val",)),
    "piqa": ("piqa/piqa.yaml", "validation", ("piqa_val",)),
    "cola": ("glue/cola/default.yaml", "validation", ("cola_val",)),
    "sst2": ("glue/sst2/default.yaml", "validation", ("sst2_val", "sst2_dev")),
    "mrpc": ("glue/mrpc/default.yaml", "validation", ("mrpc_val",)),
    "qqp": ("glue/qqp/default.yaml", "validation", ("qqp_val",)),
    "mnli": ("glue/mnli/default.yaml", "validation", ("mnli_val", "mnli_matched_val")),
    "mnli_mismatch": ("glue/mnli/default.yaml", "validation", ("mnli_mismatched_val",)),
    "qnli": ("glue/qnli/default.yaml", "validation", ("qnli_val",)),
    "rte": ("glue/rte/default.yaml", "validation", ("rte_val",)),
    "wnli": ("glue/wnli/default.yaml", "validation", ("wnli_val",)),
    "race": ("race/race.yaml", "test", ("race_test",)),
    "mmlu": (MMLU, "test", ("mmlu_test", "mmlu_val")),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "validation", ("truthfulqa",)),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation", ("truthfulqa",)),
}


def harness_tasks() -> Path:
    """The folder of the harness's own task files; InputError where it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        how = "pip install lm_eval accelerate (see requirements-optional.txt)"
        raise InputError(f"Tasks need packages that are not installed: {how}")
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


def find_data(files: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files of rows that a folder has."""
    candidates = (files / f"{name}.jsonl{ending}" for name in names for ending in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def settings_of(task: str, data: Path, tasks: Path) -> dict:
    """The content of a task file."""
    include, split, _ = TASKS[task]
    settings = {
        "include": str(tasks / include),
        "task": PREFIX + task,
        "tag": PREFIX + "tasks",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data.resolve())}},
        **dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split")),
        f"{split}_split": split,
        "num_fewshot": 0,
    }
    if task == "mmlu":  # one task of all subjects, which the harness keeps apart
        settings |= {"description": SUBJECT, "fewshot_config": None}
    return settings


def write_tasks(folder: str, files: str) -> list[str]:
    """Writes a task file for each data file that is there; their names.

    Args:
        folder: where the task files go, made if missing; earlier ones of the same name are
            replaced. files: a folder of data files, named and with fields as in TASKS.
    """
    tasks, source, target = harness_tasks(), Path(files), Path(folder)
    if not files or not source.is_dir():
        raise InputError(f"--files {files or '(none)'}: expected a folder with data files of the tasks.")
    found = {task: find_data(source, names) for task, (_, _, names) in TASKS.items()}
    found = {task: path for task, path in found.items() if path}
    if not found:
        names = ", ".join(f"{stems[0]}.jsonl" for _, _, stems in list(TASKS.values())[:3])
        raise InputError(f"--files {files}: no data file of a known task there; expected {names} and the like.")
    target.mkdir(parents=True, exist_ok=True)
    for task, path in found.items():
        settings = settings_of(task, path, tasks)
        # JSON values are YAML, too.
        lines = [f"{name}: {json.dumps(value)}\n" for name, value in settings.items()]
        write_text(target / f"{PREFIX}{task}.yaml", "".join(lines))
    return [PREFIX + task for task in found]
