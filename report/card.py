"""README.md of a run: the model card, with the front matter that the hub reads."""

import ast
import contextlib
import json
import re
import shlex
from pathlib import Path

from choices.templates import file_of
from common.files import is_row_file
from report.table import HELD_OUT, METRICS, TRAINED, UNSEEN, cell

LEFT_OUT = {"name", "output_dir", "resume"}  # of the command: they say where a run is, not what it is


def model_card(folder: Path, values: dict, columns: dict[str, dict]) -> str:
    """The text of a run's README.md.

    Args:
        folder: the run's, with script.py, and curves.png where it could be drawn.
        values: what summary.json holds.
        columns: "before", "after", ... -> split -> metrics and samples.
    """
    script, source = values["script"], (folder / "script.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or script
    method, _, rest = docstring.partition("\n")
    papers = list(dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", rest)))
    parts = [front_matter(values, is_classifier(folder)), f"# {folder.name}", method, about_method(script, papers)]
    parts += ["## Command", f"```bash\n{command(values, defaults_of(source))}\n```", facts_section(values)]
    parts += ["## Results", *tables(columns)]
    if (folder / "curves.png").exists():
        parts += ["![Metrics while training](curves.png)"]
    parts += samples_section(columns)
    return "\n\n".join(parts) + "\n"


def is_classifier(folder: Path) -> bool:
    """Whether the folder's model gives rewards and no text."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return any("ForSequenceClassification" in name for name in config.get("architectures") or [])


def front_matter(values: dict, gives_rewards: bool) -> str:
    """The YAML that the hub reads. A licence is the user's to name: none is made up."""
    args, stem = values["args"], Path(values["script"]).stem
    lines = ["library_name: transformers"]
    lines += [f"pipeline_tag: {'text-classification' if gives_rewards else 'text-generation'}"]
    if values.get("model_revision"):  # only a model of the hub has one
        lines += [f"base_model: {json.dumps(args['model'])}", "base_model_relation: finetune"]
    data = file_of(args.get("data") or "toy")
    if data.partition(":")[0] != "toy" and not is_row_file(data):  # a data set of the hub
        lines += ["datasets:", f"- {json.dumps(data.partition(':')[0])}"]
    tags = [stem.replace("_", "-"), "pretraining" if stem.endswith("pretrain") else "preference-learning"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def about_method(script: str, papers: list[str]) -> str:
    """Where the method is explained, and what to cite."""
    page = f"Method and metrics: `docs/{Path(script).stem}.md` and `docs/metrics.md` beside `{script}`, "
    page += "of which [script.py](script.py) is a copy as it ran."
    links = ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    return page + (f" To cite: {links}." if links else "")


def defaults_of(source: str) -> dict:
    """The defaults of a script's arguments, those that are plain values."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign) and field.value]
            for field in fields:
                with contextlib.suppress(ValueError):
                    found[field.target.id] = ast.literal_eval(field.value)
    return found


def command(values: dict, defaults: dict) -> str:
    """The command that repeats the run: every argument that was not its default."""
    words = ["python", values["script"]]
    if values.get("processes", 1) > 1:
        words = ["torchrun", "--nproc-per-node", str(values["processes"]), values["script"]]
    for name, value in values["args"].items():
        flag = name.replace("_", "-")
        if name in LEFT_OUT or value is None or (name in defaults and defaults[name] == value):
            continue
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def facts_section(values: dict) -> str:
    """What the run read, and what it was made with."""
    args, versions = values["args"], values["versions"]
    weights = values.get("model_sha256")
    rows = {
        "data": f"`{args.get('data') or args.get('task')}`, sha256 of the rows `{values.get('data_sha256')}`",
        "started from": f"`{args['model']}`" + (f", sha256 of the weights `{weights}`" if weights else ", new weights"),
        "revision": values.get("model_revision"),
        "steps": f"{values['steps']:,} in {values['seconds']:,.0f} s of training",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": values.get("git_commit"),
        "machine": f"{values['device']}; {values['processes']} process{'es' * (values['processes'] > 1)}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["## Data and versions", "", "| | |", "| --- | --- |", *lines])


def tables(columns: dict[str, dict]) -> list[str]:
    """The end table in Markdown, one for each split; also what trackers show."""
    found = []
    splits = next(iter(columns.values())).keys()
    titles = {"held_out": TRAINED if "unseen" in splits else HELD_OUT, "unseen": UNSEEN}
    for split in splits:
        states = [column[split] for column in columns.values()]
        names = [name for name in METRICS if any(metrics.get(name) is not None for metrics in states)]
        if names:
            head = [titles.get(split, split), *(name.replace("_", " ") for name in columns)]
            lines = [head, ["---"] * len(head)]
            lines += [[f"{METRICS[name]} (`{name}`)", *(cell(m, name) for m in states)] for name in names]
            found += ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return found


def samples_section(columns: dict[str, dict]) -> list[str]:
    """Sampled answers of each state of the model, as quoted text."""
    parts = []
    for name, prompt, text in samples_of(columns):
        asked = f"to {json.dumps(prompt[-300:], ensure_ascii=False)}: " if prompt else ""
        parts += [f"- {name.replace('_', ' ')}, {asked}{json.dumps(text[:400], ensure_ascii=False)}"]
    return ["## Samples", "\n".join(parts)] if parts else []


def samples_of(columns: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(state of the model, end of the prompt, answer) of the samples in the end table."""
    found = []
    for name, splits in columns.items():
        for item in splits.get("held_out", {}).get("samples", []):
            prompt, text = ("", item) if isinstance(item, str) else item
            found.append((name, prompt if isinstance(prompt, str) else prompt[-1]["content"], text))
    return found
