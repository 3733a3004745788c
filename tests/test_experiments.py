"""What the experiments share: processes that are not started twice, lines, tables, figures, and the
collecting of runs into a result file.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

import dpo
from common import InputError
from experiments import chat_model, chat_pages, collect, frontier, pareto, partition, policies, reward_hacking, study
from tests.runs import CHAT, ROOT, start_process, write_pairs

# -- runs as processes


def short_flags(tmp_path: Path, model: Path) -> dict:
    """A run of two steps on eight pairs."""
    rows = write_pairs(tmp_path / "rows.jsonl", 8)
    return {"model": model, "data": rows, "holdout": 0, "max_steps": 2, "kl_samples": 0, "share_prompt": False}


def test_flags_become_words():
    flags = {"max_steps": 2, "lr": 1e-3, "share_prompt": False, "compile": True}
    assert study.words_of(flags) == ["--max-steps", "2", "--lr", "0.001", "--no-share-prompt", "--compile"]


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tmp_path, tiny_gpt2, monkeypatch):
    flags = short_flags(tmp_path, tiny_gpt2)
    summary = study.train("dpo.py", tmp_path / "run", flags, "--seed 3")
    assert summary["steps"] == 1  # eight pairs fill one step
    assert (summary["args"]["seed"], summary["args"]["share_prompt"]) == (3, False)

    def refuse(*_args):
        raise AssertionError("started again")

    monkeypatch.setattr(study, "run_program", refuse)
    assert study.train("dpo.py", tmp_path / "run", flags) == summary


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text("{}")
    commands = []

    def finish(script: str, words: list[str]) -> str:
        commands.append((script, words))
        (folder / "summary.json").write_text('{"steps": 2}')
        return ""

    monkeypatch.setattr(study, "run_program", finish)
    assert study.train("dpo.py", folder, {"seed": 1}, "--beta 1") == {"steps": 2}
    assert commands == [("dpo.py", ["--resume", str(folder)])]


def test_a_failing_script_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"(?s)dpo.py .*--data nowhere.jsonl.* failed: .*nowhere.jsonl"):
        study.train("dpo.py", tmp_path / "run", {"data": "nowhere.jsonl"})


PROGRAM = """
import json, sys
number = json.loads(sys.argv[2])[0]
if number == 13:
    sys.exit("no such luck")
print("on the way")
print(json.dumps({"number": number, "flag": sys.argv[3], "kept": False}))
"""


def test_a_grid_is_completed(tmp_path, capsys):
    program, path = tmp_path / "program.py", tmp_path / "new" / "lines.jsonl"
    program.write_text(PROGRAM)
    study.write_lines(path, [{"number": 1, "kept": True}, {"number": 9, "kept": True}])

    def key_of(line: dict) -> tuple:
        return (line["number"],)

    def describe(line: dict) -> str:
        return f"made {line['number']}"

    grid = [(1,), (2,), (13,), (3,)]
    lines = study.complete(path, grid, key_of, str(program), ["--x"], 2, describe)
    made = [{"number": 2, "flag": "--x", "kept": False}, {"number": 3, "flag": "--x", "kept": False}]
    assert lines[0] == {"number": 1, "kept": True}  # not made again; 9 is of no run of this grid
    assert sorted(lines[1:], key=key_of) == made
    output = capsys.readouterr().out
    assert "(13,): program.py" in output
    assert "no such luck" in output
    assert sorted(line for line in output.splitlines() if line.startswith("made")) == ["made 2", "made 3"]
    assert sorted(study.read_lines(path), key=key_of) == [lines[0], *made, {"number": 9, "kept": True}]
    assert study.complete(path, grid[:2], key_of, "not there.py", [], 1, describe) == [
        line for line in lines if line["number"] < 3
    ]


# -- tables


def test_cells_of_a_table():
    assert study.plus_minus([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert study.plus_minus([1.0, None], 1) == "1.0"
    assert study.plus_minus([None]) == "-"
    assert study.mean_and_std([]) == (None, None)
    assert study.mean_and_std([1, None, 4]) == (2.5, pytest.approx(4.5**0.5))


def test_a_table_is_as_wide_as_its_cells(capsys):
    study.print_table(["name", "kl"], [["a long name", 1], ["b", "12.25"]], "Title")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "name             kl",
        "a long name       1",
        "b             12.25",
    ]


# -- figures


def luminance(colour: str) -> float:
    """How light a colour is in grey, 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_methods_can_be_told_apart_in_grey():
    for name in ("color", "marker", "linestyle"):
        assert len({str(look[name]) for look in study.LOOKS}) == len(study.LOOKS)
    # On white paper.
    assert max(luminance(look["color"]) for look in study.LOOKS) < 0.75
    families = [(*frontier.METHODS, "IPO", "f-DPO"), tuple(pareto.DEFAULTS)]
    for names in families:
        assert len({study.METHODS[name] for name in names}) == len(names)
    for name in pareto.OBJECTIVES["toy"]:  # settings of one method look alike
        assert study.METHODS[name] == study.METHODS[name.split(", ")[0]]


def test_a_figure_names_its_axes(tmp_path):
    pytest.importorskip("matplotlib")

    def draw(axes: list, label: str = "KL, nats") -> None:
        for axis in axes:
            axis.plot([0, 1], [0, 1], **study.look_of("DPO"))
            axis.set_xlabel("step")
        axes[0].set_ylabel(label)

    study.draw_figure(tmp_path / "new" / "figure.png", draw, 2, (4, 2), share_y=True)
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"bare\.png: a panel does not say what its axes show"):
        study.draw_figure(tmp_path / "bare.png", draw, 2, (4, 2))
    with pytest.raises(ValueError, match=r"bare\.png"):
        study.draw_figure(tmp_path / "bare.png", lambda axes: draw(axes, ""), 1, (4, 2))
    assert not (tmp_path / "bare.png").exists()


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study.draw_figure(tmp_path / "figure.png", lambda axes: pytest.fail("drawn"))
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("name", ["pareto_toy", "pareto_pep8", "reward_hacking"])
def test_committed_lines_are_drawn(tmp_path, name, capsys):
    pytest.importorskip("matplotlib")
    lines = study.read_lines(ROOT / "results" / f"{name}.jsonl")
    module, panels = (pareto, 2) if name.startswith("pareto") else (reward_hacking, 3)
    module.report(lines)
    assert len(capsys.readouterr().out.splitlines()) > 10
    study.draw_figure(tmp_path / "figure.png", lambda axes: module.draw(lines, axes), panels, share_y=panels == 2)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# -- collect.py


def fake_run(folder: Path, seed: int, accuracy: float | None, **changes) -> str:
    """A run folder of dpo.py with beta .1 whose summary says these numbers."""
    args = vars(dpo.Args(beta=0.1, share_prompt=False, seed=seed, name=folder.name, output_dir=str(folder.parent)))
    facts = {"git_commit": "abc", "device": "cpu", "threads": 1, "versions": {"torch": "2"}, "steps": 90 + seed}
    reports = {"before": {"kl": 0.0}, "after": {"preference_accuracy": accuracy, "kl": 0.123456}}
    summary = {"script": "dpo.py", "args": args, **facts, "seconds": 1.5, **reports, **changes}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_collect_keeps_the_value_of_every_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PREFERENCE_DATA", raising=False)
    # The seed that comes first is not the lower one.
    runs = [fake_run(tmp_path / "b", 2, 0.75, after_unseen={"kl": 2.0}), fake_run(tmp_path / "a", 1, 0.5)]
    collect.main(collect.Args(runs, str(tmp_path / "out.json")))
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    assert entry == {
        "command": "python dpo.py --beta 0.1 --no-share-prompt",
        "seeds": [1, 2],
        "git_commit": "abc",
        "device": "cpu",
        "threads": 1,
        "versions": {"torch": "2"},
        "steps": [91, 92],
        "seconds": 1.5,
        "before": {"kl": [0.0, 0.0, [0.0, 0.0]]},
        "after": {"preference_accuracy": [0.625, 0.1768, [0.5, 0.75]], "kl": [0.1235, 0.0, [0.1235, 0.1235]]},
        "after_unseen": {"kl": [2.0, None, [None, 2.0]]},
    }
    output = capsys.readouterr().out
    assert "python dpo.py --beta 0.1 --no-share-prompt   seeds 1 2" in output
    assert "0.625 +- 0.177   (0.500 0.750)" in output
    assert "2.000   (- 2.000)" in output


def test_collect_tells_commands_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFERENCE_DATA", "/some/where/")
    first = fake_run(tmp_path / "a", 0, 0.5)
    other = vars(dpo.Args(data="/some/where/pairs/x.jsonl", epochs=2.0))
    second = fake_run(tmp_path / "b", 0, None, args=other)
    collect.main(collect.Args([first, second], str(tmp_path / "out.json")))
    one, two = json.loads((tmp_path / "out.json").read_text())
    assert one["after"]["preference_accuracy"] == [0.5, None, [0.5]]
    assert two["command"] == "python dpo.py --data $PREFERENCE_DATA/pairs/x.jsonl --epochs 2.0"
    assert two["after"] == {"kl": [0.1235, None, [0.1235]]}  # no seed has an accuracy


def test_collect_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(InputError, match=r"no summary\.json"):
        collect.main(collect.Args([str(tmp_path)], str(tmp_path / "out.json")))


@pytest.mark.parametrize("name", ["toy_pairs", "toy_labelled", "toy_superhf", "real_pairs", "real_labelled"])
def test_committed_collections_have_the_documented_form(name):
    """[mean, deviation], and since the values of seeds are kept these as a third."""
    for entry in json.loads((ROOT / "results" / f"{name}.json").read_text()):
        assert {"command", "seeds", "versions", "git_commit"} <= entry.keys()
        for report in (name for name in entry if name.startswith(collect.REPORTS)):
            for mean, deviation, *values in entry[report].values():
                assert isinstance(mean, (int, float))
                assert deviation is None or deviation >= 0
                assert all(len(each) == len(entry["seeds"]) for each in values)


# -- the experiments themselves


# What experiments and pages share: no programs.
PARTS = {"__init__", "study", "tabular", "policies", "effects", "claim_table", "beds", "beds_pairs", "beds_toy"}
PARTS |= {"beds_frontier", "chat_pages", "frontier_pages", "toy_pages", "sentiment_rows", "sentiment_pages"}
PRINT_ONLY = {"reading", "claims"}  # what a page says


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_both_ways_to_start_an_experiment(path, tmp_path):
    if "def main(" not in path.read_text():
        assert path.stem in PARTS
        return
    by_module = start_process(["-m", f"experiments.{path.stem}", "--help"])
    by_path = start_process([str(path), "--help"], cwd=tmp_path)
    assert (by_module.returncode, by_path.returncode) == (0, 0), by_module.stderr + by_path.stderr
    assert path.stem in PRINT_ONLY or "--output" in by_path.stdout


def test_runs_of_the_pareto_experiment_build_on_each_other(tmp_path):
    args = pareto.Args(task="pep8", tokens=1000, seeds=(0, 1), red_team=3)
    teachers, halves, judged = pareto.rounds_of(args)
    folders = [item.folder(tmp_path) for item in (*teachers, *halves, *judged)]
    assert len(set(folders)) == len(folders) == 2 * (1 + 1 + 6 + 6)
    for item in judged:
        flags = pareto.flags_of(item, args, tmp_path)
        teacher, half = (x.folder(tmp_path) for x in (teachers[item.seed], halves[item.seed]))
        assert (flags["teacher"], flags["tokenizer"]) == (teacher, teacher)
        assert flags["tokens"] == (1000 if item.kind == "pretraining" else 500)
        assert flags.get("init") == (half if item.kind == "finetuning" else None)
        assert flags["model"] == tmp_path / "model"
        assert flags["red_team"] == (3 if item.method in ("MLE", "conditional") and item.kind == "pretraining" else 0)
    assert pareto.flags_of(teachers[0], args, tmp_path)["model"] == tmp_path / "teacher"
    assert pareto.flags_of(halves[0], args, tmp_path)["tokens"] == 500


def test_methods_of_the_pareto_experiment_are_swept_alike():
    """Three settings of each that has one from the start, its default alone after half of MLE."""
    *_, judged = pareto.rounds_of(pareto.Args())
    assert sorted({item.seed for item in judged}) == [0, 1, 2, 3, 4]
    first = [item for item in judged if item.seed == 0]
    counts = {
        kind: Counter(x.method.split(", ")[0] for x in first if x.kind == kind)
        for kind in ("pretraining", "finetuning")
    }
    assert counts["pretraining"] == {"MLE": 1, "filtering": 1, "unlikelihood": 1, "conditional": 3, "RWR": 3, "AWR": 3}
    assert counts["finetuning"] == dict.fromkeys(counts["pretraining"], 1)


def test_the_table_of_the_pareto_experiment(tmp_path):
    """KL is over that of the same seed's MLE model, and settings have names as on the page."""
    lines = [
        {
            "method": method,
            "kind": "pretraining",
            "seed": seed,
            "kl_to_teacher": kl,
            "misalignment": bad,
            "versions": None,
        }
        for method, bad, kls in (
            ("MLE", 0.25, (10.0, 20.0)),
            ("conditional", 0.0, (12.0, 24.0)),
            ("conditional, asked for bad", 0.5, (13.0, 23.0)),
            ("AWR, beta 1", 0.0, (9.0, 19.0)),
        )
        for seed, kl in enumerate(kls)
    ]
    study.write_lines(tmp_path / "pareto_toy.jsonl", lines)
    source, _, heads, _, *rows = pareto.block(tmp_path, "pretraining").splitlines()
    assert source.startswith("Seeds 0, 1; `results/pareto_toy.jsonl`")
    place = heads.split(" | ").index("KL to the teacher, over MLE's")
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [(row[0], row[1], row[place]) for row in cells] == [
        ("MLE", "0.2500 ± 0.0000", "0"),
        ("conditional, d .01", "0", "3.0 ± 1.4"),
        ("conditional, d .01, asked for bad", "0.5000 ± 0.0000", "3.0 ± 0.0"),
        ("AWR, beta 1", "0", "-1.0 ± 0.0"),
    ]


def test_answers_are_grouped_by_question():
    assert policies.by_question([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    rewards = policies.question_rewards([["it is nothing ."] * 3] * len(policies.trained_questions()))
    assert rewards.shape == (len(policies.trained_questions()), 3)


@pytest.mark.study
def test_a_small_grid_goes_on_where_it_stopped(tmp_path, toy_base):
    words = ["experiments/partition.py", "--seeds", "0", "--betas", "0.3", "--answers", "2", "--jobs", "2"]
    words += ["--constants", "0.0", "--extra=--max-steps 2", "--output-dir", str(tmp_path)]
    process = start_process(words, timeout=200)
    assert process.returncode == 0, process.stderr
    path = tmp_path / "partition.jsonl"
    lines = study.read_lines(path)
    assert {line["handling"] for line in lines} == {"0.0", "learned"}, process.stdout
    assert all(set(partition.COLUMNS) <= line.keys() for line in lines)
    assert all(0 < line["kl"] < 5 for line in lines)
    study.write_lines(path, lines[:-1])
    process = start_process(words, timeout=200)
    assert process.returncode == 0, process.stderr
    assert study.read_lines(path) == lines


# -- the chat model's study


def test_dialogues_become_turns_and_other_prompts_a_users_message():
    def turn(role, content):
        return {"role": role, "content": content}

    dialogue = "\n\nHuman: Hi.\n\nIs it?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    turns = [turn("user", "Hi.\n\nIs it?"), turn("assistant", "Yes."), turn("user", "Why?")]
    assert chat_model.messages_of(dialogue) == turns
    for prompt in (" Why? ", "Say:\n\nHuman: Hi.\n\nAssistant:", "\n\nHuman: Hi.", "\n\nHuman: Hi.\n\nAssistant: No."):
        assert chat_model.messages_of(prompt) == [turn("user", prompt.strip())]


def test_the_judges_prompts_are_never_the_policies(preference_data, tmp_path):
    args = chat_model.Args(model="m", part="pairs", rows=100, judge_rows=150, runs=str(tmp_path))
    for name in chat_model.PAIRS:
        file, judge_file = chat_model.split_file(args, name)
        rows, judged = ([json.loads(line) for line in path.read_text().splitlines()] for path in (file, judge_file))
        assert len(judged) == 150
        assert 100 <= len(rows) < 130  # the last prompt's rows stay together
        prompts = {json.dumps(row["prompt"]) for row in rows}
        assert not prompts & {json.dumps(row["prompt"]) for row in judged}
    with pytest.raises(InputError, match="leaves none to the judge"):
        chat_model.split_file(chat_model.Args(model="m", part="pairs", rows=5000, runs=str(tmp_path)), "pandalm_votes")


def test_of_equal_learning_rates_the_smaller_one_counts():
    def line(lr, value, seed=0, method="dpo"):
        return {"data": "d", "method": method, "seed": seed, "lr": lr, "after": {"reward_accuracy": value}}

    lines = [line(3e-5, 0.7), line(1e-5, 0.7), line(3e-6, 0.6), line(1e-4, 0.9, seed=1), line(1e-4, 0.9, method="dph")]
    assert chat_model.best_lr(lines, "d", "dpo", 0) == 1e-5
    # Of SFT's perplexities the smallest counts, and a run without one decides nothing.
    lines = [line | {"method": "sft", "after": {"perplexity": 5 - 1e5 * line["lr"]}} for line in lines]
    assert chat_model.best_lr(lines, "d", "sft", 0) == max(line["lr"] for line in lines if line["seed"] == 0)
    lines[0]["after"] = {"preference_accuracy": 0.5}
    with pytest.raises(InputError, match="no held-out perplexity"):
        chat_model.best_lr(lines, "d", "sft", 0)


def made_line(method: str, lr: float, seed: int, value: float, kl: float) -> dict:
    """A line as the chat model's study writes it."""
    line = {"data": "d", "rows": 300, "method": method, "lr": lr, "seed": seed, "seconds": 60.0}
    line |= {"peak_memory_bytes": 2**31, "git_commit": "abcdef0123", "device": "cpu, X", "win_rate": 0.5 + seed / 10}
    line |= {"before": {"preference_accuracy": 0.45}, "after": {chat_model.CHOICE[method]: value, "kl": kl}}
    line |= {"versions": {"torch": "2", "transformers": "5"}, "samples": [["a | b", "*yes*", f"{method} {lr}"]]}
    return line


def test_pages_show_the_chosen_rate_over_seeds_and_all_that_were_tried(tmp_path, monkeypatch):
    lines = [made_line("dpo", 1e-5, 0, 0.6, 0.1), made_line("dpo", 1e-4, 0, 0.8, 3.0)]
    lines += [
        made_line("dpo", 1e-4, 1, 0.7, 2.0),
        made_line("sft", 1e-5, 0, 9.0, 0.5),
        made_line("sft", 1e-4, 0, 7.0, 1),
    ]
    study.write_lines(tmp_path / "lines.jsonl", lines)
    monkeypatch.setattr(chat_pages, "RESULTS", tmp_path / "lines.jsonl")
    head, _, untrained, dpo_row, sft_row = chat_pages.block("table", "d").splitlines()
    cells = dict(zip(head.strip("| ").split(" | ")[-7:], dpo_row.strip("| ").split(" | ")[-7:]))
    assert cells == {
        "by the method's reward": "0.750 ± 0.071",
        "perplexity": "-",
        "KL, nats": "2.50 ± 0.71",
        "win rate": "0.550 ± 0.071",
        "minutes": "1.0 ± 0.0",
        "GiB": "2.0 ± 0.0",
        "seeds": "2",
    }
    assert dpo_row.startswith("| dpo | 0.0001 | 2 |")
    assert sft_row.startswith("| sft | 0.0001 | 1 |")
    assert untrained.startswith("| (as it came")
    assert "1e-05: 0.600 (KL 0.10); 0.0001: 0.800 (KL 3.00)" in chat_pages.block("rates", "d")
    assert chat_pages.block("samples", "d", "dpo").endswith(r"| a \| b | \*yes\* | dpo 0.0001 |")
    assert chat_pages.block("facts", "d").startswith("5 runs of 300 rows, 0.1 hours of one thread; commit abcdef0;")
    with pytest.raises(KeyError):
        chat_pages.block("table", "other")


@pytest.mark.study
def test_a_chat_models_study_in_small(preference_data, tmp_path, capsys):
    """One method, two learning rates, one seed: lines with accuracies and win rates; nothing is
    made twice.
    """
    model = shutil.copytree(preference_data / "models" / "stories260K", tmp_path / "stories")
    (model / "chat_template.jinja").write_text(CHAT)
    args = chat_model.Args(
        model=str(model),
        part="pairs",
        data=("polite_instructions",),
        methods=("dpo",),
        rows=30,
        judge_rows=30,
        lrs=(1e-4, 1e-3),
        seeds=(0,),
        max_length=128,
        max_new_tokens=8,
        answers=5,
        runs=str(tmp_path / "runs"),
        output=str(tmp_path / "results" / "chat_model.jsonl"),
        extra="--max-steps 2",
    )
    chat_model.main(args)
    lines = study.read_lines(tmp_path / "results" / "chat_model.jsonl")
    assert [(line["lr"], line["seed"], line["steps"], line["answers"]) for line in lines] == [
        (1e-4, 0, 2, 5),
        (1e-3, 0, 2, 5),
    ]
    for line in lines:
        assert 0 <= line["win_rate_equal_length"] <= 1
        assert line["after"]["kl"] > 0
        held_out = {json.dumps(prompt) for prompt, *_ in line["samples"]}
        trained = (tmp_path / "runs" / "rows" / "polite_instructions.jsonl").read_text().splitlines()
        assert held_out <= {json.dumps(json.loads(row)["prompt"][-1]["content"]) for row in trained}
    assert "pairs, polite_instructions" in capsys.readouterr().out
    chat_model.main(args)
    assert study.read_lines(tmp_path / "results" / "chat_model.jsonl") == lines
