"""Multiple-choice tasks by lm-eval and by rewards, and perplexity of a text; nothing here needs the
network. What runs the harness skips where lm_eval is not installed.
"""

import importlib.util
import json
import logging
import math
import random

import pytest
import torch

import reward_model
from common import InputError
from common import models as model_loading
from experiments.study import read_lines
from judging import command, local_tasks, perplexity, tasks
from rewards.metrics import expected_calibration_error
from tests import models
from tests.runs import CHAT, lines_file, model_of, train, write_pairs

HARNESS = importlib.util.find_spec("lm_eval")
needs_harness = pytest.mark.skipif(not HARNESS, reason="needs lm_eval: pip install lm_eval")
WORDS = "snow is white , mud brown and the capital of france paris one plus two three what colour has it".split()


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 7)))


def choices(rng: random.Random, count: int) -> dict:
    return {"text": [sentence(rng) for _ in range(count)], "label": list("ABCDE"[:count])}


def rows_of(kind: str, count: int = 14) -> list[dict]:
    """Rows with the fields of a task's data, of words in the toy's language."""
    rng = random.Random(kind)
    made = {
        "piqa_val": lambda i: {"goal": sentence(rng), "sol1": sentence(rng), "sol2": sentence(rng), "label": i % 2},
        "arc_easy_test": lambda i: {"question": sentence(rng), "choices": choices(rng, 3 + i % 3), "answerKey": "B"},
        "winogrande_val": lambda i: {
            **{"sentence": f"{sentence(rng)} _ {sentence(rng)}", "option1": "snow", "option2": "mud"},
            "answer": str(1 + i % 2),
        },
        "mrpc_val": lambda i: {"sentence1": sentence(rng), "sentence2": sentence(rng), "label": i % 2},
        "cola_val": lambda i: {"sentence": sentence(rng), "label": int(i % 3 > 0)},
        "boolq_val": lambda i: {"passage": sentence(rng), "question": sentence(rng), "label": i % 2},
        "mmlu_val": lambda i: {
            **{"subject": "a_b", "question": sentence(rng), "choices": ["one", "two", "three", "mud"]},
            "answer": i % 4,
        },
    }
    return [made[kind](i) for i in range(count)]


KINDS = ("piqa_val", "arc_easy_test", "winogrande_val", "mrpc_val", "cola_val", "boolq_val", "mmlu_val")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """Task files of small data files, and the cache of data sets beside them."""
    pytest.importorskip("lm_eval")
    import datasets
    import huggingface_hub

    folder = tmp_path_factory.mktemp("tasks")
    for kind in KINDS:
        lines_file(folder, rows_of(kind), f"{kind}.jsonl")
    command.main(command.Args(write_tasks=str(folder / "yaml"), files=str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield folder / "yaml"


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    """A run of dph.py and one of reward_model.py whose rewards have begun to differ."""
    folder = tmp_path_factory.mktemp("runs")
    change = {"model": str(toy_base), "data": write_pairs(folder / "pairs.jsonl", 24), "lr": 1e-2}
    shape = {"output_dir": str(folder), "name": "reward_model", "holdout": 0.0}
    reward_model.main(reward_model.Args(**change, **shape))
    return {"dph": train("dph", folder / "dph", **change), "reward_model": folder / "reward_model"}


def own_numbers(folder, names: list[str], tasks_dir, **more) -> dict:
    """What lm-eval says of a folder that it loads itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    shape = {"batch_size": 8, "task_manager": manager, "bootstrap_iters": 300}
    return lm_eval.simple_evaluate("hf", model_args=arguments, tasks=names, **shape, **more)


# -- the harness


@needs_harness
def test_log_probabilities_are_the_harness_s_own(toy_base, tasks_dir, monkeypatch):
    """Every log-probability, metric and standard error that lm-eval gives for the folder."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    evaluate, said = tasks.evaluate, []
    monkeypatch.setattr(tasks, "evaluate", lambda *words, **more: said.append(evaluate(*words, **more)) or said[0])
    names = [local_tasks.PREFIX + kind.rsplit("_", 1)[0] for kind in KINDS]
    ours = tasks.run_tasks(str(toy_base), "toy", ",".join(names), "logprob", str(tasks_dir))["tasks"]
    theirs = own_numbers(toy_base, names, tasks_dir)
    assert set(ours) == set(names) == set(theirs["results"])
    for name in names:
        for a, b in zip(said[0]["samples"][name], theirs["samples"][name]):
            assert a["arguments"] == b["arguments"]
            assert [x for x, _ in a["filtered_resps"]] == [x for x, _ in b["filtered_resps"]]
        metrics = {key.removesuffix(",none"): v for key, v in theirs["results"][name].items() if "," in key}
        for metric in [m for m in metrics if not m.endswith("_stderr")]:
            assert ours[name]["logprob"][metric] == metrics[metric], (name, metric)
            # Means have the harness's errors; f1 and mcc are resampled, there and here.
            error, resampled = metrics[f"{metric}_stderr"], metric in {"f1", "mcc"}
            close = {"rel": 0.2} if resampled else {"rel": 1e-9}
            assert ours[name]["logprob"][f"{metric}_se"] == pytest.approx(error, **close)
    mrpc, cola = ours["local_mrpc"]["logprob"], ours["local_cola"]["logprob"]
    assert mrpc["score"] == pytest.approx((mrpc["acc"] + mrpc["f1"]) / 2)
    assert (cola["score"], cola["score_se"]) == pytest.approx((cola["mcc"], cola["mcc_se"]))
    assert {"acc", "acc_norm", "f1", "mcc"} < {key for name in names for key in ours[name]["logprob"]}
    assert len({round(ours[name]["logprob"]["score"], 6) for name in names}) > 3


@needs_harness
@pytest.mark.parametrize("script", ["dph", "reward_model"])
def test_rewards_are_those_of_the_same_texts_as_pairs(script, runs, tasks_dir, tmp_path, monkeypatch):
    said = []
    evaluate = tasks.evaluate
    monkeypatch.setattr(tasks, "evaluate", lambda *words, **more: said.append(evaluate(*words, **more)) or said[0])
    flags = {"model": str(runs[script]), "tasks": "piqa, winogrande", "score": "reward", "tasks_dir": str(tasks_dir)}
    command.main(command.Args(**flags, output=str(tmp_path / "results.json")))
    pairs, answers = [], []
    for name in ("local_piqa", "local_winogrande"):
        for sample in said[0]["samples"][name]:
            (context, first), (other_context, second) = sample["arguments"]
            assert (context == other_context) == (name == "local_piqa")  # else one ending behind two beginnings
            texts = (context + first, other_context + second)
            shared = next(i for i, (a, b) in enumerate(zip(*texts)) if a != b)
            prompt = texts[0][:shared].rpartition(" ")[0]
            sides = [text.removeprefix(prompt) for text in texts]
            pairs.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
            answers.append([value for value, _ in sample["filtered_resps"]])
    data, output = lines_file(tmp_path, pairs), tmp_path / "scores.jsonl"
    command.main(command.Args(model=str(runs[script]), data=data, output=str(output)))
    lines = read_lines(output)
    assert len(lines) == 28
    for line, rewards in zip(lines, answers):
        assert [line["chosen_reward"], line["rejected_reward"]] == pytest.approx(rewards, abs=1e-4)
    assert max(abs(a - b) for a, b in answers) > 1e-2
    results = json.loads((tmp_path / "results.json").read_text())
    wins = sum(int(a < b) == row["label"] for (a, b), row in zip(answers, rows_of("piqa_val")))
    assert results["tasks"]["local_piqa"]["reward"]["acc"] == pytest.approx(wins / 14)
    assert "acc_norm" not in results["tasks"]["local_piqa"]["reward"]  # a reward by characters says nothing


@needs_harness
def test_prompts_go_through_a_chat_template_once(tasks_dir, tmp_path, monkeypatch):
    """By log-probability as in lm-eval's own --apply_chat_template; by reward as a message and its
    answer."""
    from transformers import LlamaForSequenceClassification

    tokenizer = models.byte_tokenizer(chat_template=CHAT)
    language_model = models.tiny_llama(len(tokenizer), max_position_embeddings=512)
    folder = models.save(language_model, tokenizer, tmp_path / "lm")
    evaluate, said = tasks.evaluate, []
    monkeypatch.setattr(tasks, "evaluate", lambda *words, **more: said.append(evaluate(*words, **more)) or said[-1])
    ours = tasks.run_tasks(str(folder), "lm", "piqa", "logprob", str(tasks_dir), limit=4, chat=True)
    theirs = own_numbers(folder, ["local_piqa"], tasks_dir, limit=4, apply_chat_template=True)
    for a, b in zip(said[0]["samples"]["local_piqa"], theirs["samples"]["local_piqa"]):
        assert a["arguments"] == b["arguments"]
        assert [x for x, _ in a["filtered_resps"]] == [x for x, _ in b["filtered_resps"]]
        assert a["arguments"][0][0].endswith("\nAnswer:</s>\n[assistant]")
    assert ours["tasks"]["local_piqa"]["logprob"]["acc"] == theirs["results"]["local_piqa"]["acc,none"]

    torch.manual_seed(1)
    language_model.config.num_labels = 1
    judge = LlamaForSequenceClassification(language_model.config).eval()
    folder = models.save(judge, tokenizer, tmp_path / "judge")
    tasks.run_tasks(str(folder), "judge", "piqa", "reward", str(tasks_dir), limit=4, chat=True)
    for sample in said[1]["samples"]["local_piqa"]:
        for (context, choice), (reward, _) in zip(sample["arguments"], sample["filtered_resps"]):
            turns = [{"role": "user", "content": context}, {"role": "assistant", "content": choice.strip()}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            with torch.no_grad():
                expected = judge.score(judge.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
            assert reward == pytest.approx(expected, abs=1e-4)


@needs_harness
def test_a_table_of_both_scores_and_a_file(runs, tasks_dir, tmp_path, capsys):
    flags = {"model": str(runs["dph"]), "tasks": "gpt4all,cola,mmlu", "score": "both", "tasks_dir": str(tasks_dir)}
    (tmp_path / "text.txt").write_text("snow is white , mud is brown .")
    flags |= {"limit": 5, "perplexity": str(tmp_path / "text.txt"), "output": str(tmp_path / "results.json")}
    command.main(command.Args(**flags))
    results, printed = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    rows = results["tasks"]
    assert list(rows) == [f"local_{n}" for n in ("winogrande", "arc_easy", "boolq", "piqa", "cola", "mmlu")]
    assert {row["rows"] for row in rows.values()} == {5}
    average = results["averages"]["gpt4all"]
    assert average["missing"] == ["hellaswag", "openbookqa", "arc_challenge"]
    for kind in ("logprob", "reward"):
        accuracies = [rows[f"local_{name}"][kind]["acc"] for name in ("winogrande", "arc_easy", "boolq", "piqa")]
        assert average[kind]["score"] == pytest.approx(sum(accuracies) / 4)
        errors = [rows[f"local_{name}"][kind]["acc_se"] for name in ("winogrande", "arc_easy", "boolq", "piqa")]
        assert average[kind]["score_se"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 4)
    mixed = [rows[f"local_{name}"]["logprob"] for name in ("winogrande", "arc_easy", "boolq", "piqa")]
    assert average["logprob"]["acc_norm"] == pytest.approx(sum(row.get("acc_norm", row["acc"]) for row in mixed) / 4)
    assert "acc_norm" not in average["reward"]
    assert (results["limit"], results["lm_eval"][:4]) == (5, "0.4.")
    assert results["perplexity"]["words"] == 8
    lines = printed.splitlines()
    header = next(line for line in lines if line.startswith("task"))
    assert header.split() == ["task", "rows", "metric", "logprob", "reward"]
    assert any(line.startswith("average of gpt4all") and "4 tasks" in line for line in lines)
    assert "missing: hellaswag, openbookqa, arc_challenge. It compares with no published one." in printed
    value = rows["local_cola"]["reward"]
    assert f"{value['mcc']:.4f} ± {value['mcc_se']:.4f}" in printed


@needs_harness
def test_the_choices_softmax_is_calibrated_by_hand(toy_base, tasks_dir, monkeypatch):
    """From the answers of the harness: three to five choices, and the letters of MMLU."""
    evaluate, said = tasks.evaluate, []
    monkeypatch.setattr(tasks, "evaluate", lambda *words, **more: said.append(evaluate(*words, **more)) or said[0])
    ours = tasks.run_tasks(str(toy_base), "toy", "arc_easy,winogrande,mmlu", "logprob", str(tasks_dir))["tasks"]
    right_of = {
        "arc_easy_test": lambda row: 1,  # B
        "winogrande_val": lambda row: int(row["answer"]) - 1,
        "mmlu_val": lambda row: row["answer"],
    }
    for kind, right in right_of.items():
        name, bins = "local_" + kind.rsplit("_", 1)[0], {}
        for sample, row in zip(said[0]["samples"][name], rows_of(kind)):
            values = [value for value, _ in sample["filtered_resps"]]
            p = [math.exp(value - max(values)) for value in values]
            p = [value / sum(p) for value in p]
            assert len(p) == (len(row["choices"]["text"]) if kind == "arc_easy_test" else 2 if "option1" in row else 4)
            bins.setdefault(min(9, int(max(p) * 10)), []).append((p.index(max(p)) == right(row), max(p)))
        expected = sum(abs(sum(r for r, _ in b) - sum(c for _, c in b)) for b in bins.values()) / 14
        assert ours[name]["logprob"]["expected_calibration_error"] == pytest.approx(expected, abs=1e-9)
        assert len(bins) > (kind != "mmlu_val")  # the toy knows no letters
    assert said[0]["samples"]["local_mmlu"][0]["arguments"][0][0].startswith(
        "The following are multiple choice questions (with answers) about a b.\n\n"
    )


@needs_harness
def test_a_group_counts_the_rows_of_its_tasks_together(toy_base, tasks_dir, tmp_path):
    for path in tasks_dir.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    aggregate = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    inner = f"group: inner\ntask: [local_piqa, local_boolq]\n{aggregate}"
    (tmp_path / "inner.yaml").write_text(inner)
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner, local_arc_easy]\n{aggregate}")
    ours = tasks.run_tasks(str(toy_base), "toy", "outer", "logprob", str(tmp_path))["tasks"]
    parts = [ours[f"local_{name}"]["logprob"] for name in ("piqa", "boolq", "arc_easy")]
    assert (ours["outer"]["rows"], ours["inner"]["rows"]) == (42, 28)
    assert ours["outer"]["logprob"]["acc"] == pytest.approx(sum(part["acc"] for part in parts) / 3)
    assert ours["inner"]["logprob"]["acc"] == pytest.approx(sum(part["acc"] for part in parts[:2]) / 2)
    assert 0 < ours["outer"]["logprob"]["expected_calibration_error"] < 1


@needs_harness
def test_refusals(runs, toy_base, tasks_dir, tmp_path):
    def refused(model, names="piqa", **changes):
        flags = {"model": str(model), "tasks": names, "tasks_dir": str(tasks_dir)} | changes
        with pytest.raises(InputError) as caught:
            command.main(command.Args(output=str(tmp_path / "results.json"), **flags))
        assert "\n" not in caught.value.code
        return caught.value.code

    for score in ("reward", "both"):
        expected = f"--score {score}: {toy_base} has no reward head; dph.py and reward_model.py train one."
        assert refused(toy_base, score=score) == expected
    for score in ("logprob", "both"):
        expected = "is a sequence-classification model, which has no log-probabilities."
        assert refused(runs["reward_model"], score=score) == f"--score {score}: {runs['reward_model']} {expected}"
    text = tmp_path / "text.txt"
    text.write_text("snow is white")
    assert refused(runs["reward_model"], "", perplexity=str(text)).startswith("--perplexity: ")
    assert "no task of lm-eval or" in refused(toy_base, "no_such_task")
    assert refused(toy_base, " , ").startswith("--tasks  , : expected gpt4all, glue, or names")
    assert refused(toy_base, tasks_dir=str(tmp_path / "no")) == f"--tasks-dir {tmp_path}/no: there is no such folder."
    assert refused(toy_base, limit=0) == "--limit 0: out of range."
    free = "task: free\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: goal\ndoc_to_target: sol1\n"
    free += (tasks_dir / "local_piqa.yaml").read_text().split("\n")[5] + "\nvalidation_split: validation\n"
    (tmp_path / "free.yaml").write_text(free)
    kind = "--tasks free: a task of the kind generate_until; expected multiple choice."
    assert refused(toy_base, "free", tasks_dir=str(tmp_path)) == kind
    assert not (tmp_path / "results.json").exists()


def test_a_missing_harness_says_what_to_install(monkeypatch, toy_base, tmp_path):
    monkeypatch.setattr(local_tasks.importlib.util, "find_spec", lambda name: None)
    expected = "Tasks need packages that are not installed: pip install lm_eval accelerate"
    with pytest.raises(InputError, match=expected):
        command.main(command.Args(model=str(toy_base), tasks="glue", output=str(tmp_path / "results.json")))
    with pytest.raises(InputError, match=expected):
        command.main(command.Args(write_tasks=str(tmp_path), files=str(tmp_path)))


@needs_harness
def test_an_old_harness_is_refused(monkeypatch, toy_base, tmp_path):
    monkeypatch.setattr(tasks.importlib.metadata, "version", lambda name: "0.4.9.1")
    with pytest.raises(InputError, match=r"--tasks: lm_eval 0\.4\.9\.1 is too old; expected 0\.4\.13 or later\."):
        command.main(command.Args(model=str(toy_base), tasks="glue", output=str(tmp_path / "results.json")))


@needs_harness
def test_task_files_of_a_folder_without_data(tmp_path):
    with pytest.raises(InputError, match=r"no data file of a known task there; expected hellaswag_val\.jsonl"):
        local_tasks.write_tasks(str(tmp_path / "yaml"), str(tmp_path))
    with pytest.raises(InputError, match=r"--files \(none\): expected a folder"):
        local_tasks.write_tasks(str(tmp_path / "yaml"), "")
    assert not (tmp_path / "yaml").exists()


@needs_harness
def test_every_local_task_includes_a_file_that_the_harness_has():
    folder = local_tasks.harness_tasks()
    assert [name for name, (include, _, _) in local_tasks.TASKS.items() if not (folder / include).is_file()] == []
    for suite in tasks.SUITES.values():
        assert {part for parts in suite.values() for part in parts} <= set(local_tasks.TASKS)


@needs_harness
def test_published_tasks_and_a_real_model(preference_data, tmp_path, monkeypatch):
    """All files at hand: contexts of whole articles among them, which lose their beginning."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("openbookqa_test", "rte_val", "truthfulqa"):
        (tmp_path / f"{name}.jsonl.gz").symlink_to(preference_data / "eval" / f"{name}.jsonl.gz")
    names = local_tasks.write_tasks(str(tmp_path), str(tmp_path))
    assert names == ["local_openbookqa", "local_rte", "local_truthfulqa_mc1", "local_truthfulqa_mc2"]
    folder = str(preference_data / "models" / "stories260K")
    ours = tasks.run_tasks(folder, folder, ",".join(names), "logprob", str(tmp_path), limit=6)["tasks"]
    theirs = own_numbers(folder, names, tmp_path, limit=6)
    assert [ours[name]["logprob"]["acc"] for name in names] == [theirs["results"][name]["acc,none"] for name in names]


# -- suites


def test_which_tasks_a_suite_has():
    own = "hellaswag openbookqa winogrande arc_challenge arc_easy boolq piqa".split()
    assert tasks.expand("gpt4all", set()) == (own, {})
    glue = "mnli mnli_mismatch qqp qnli sst2 cola mrpc rte wnli".split()
    assert tasks.expand("glue, piqa", set()) == ([*glue, "piqa"], {})
    names, missing = tasks.expand("glue,piqa,mine", {"local_cola", "local_rte", "mine"})
    assert names == ["local_cola", "local_rte", "piqa", "mine"]
    assert missing == {"glue": ["mnli", "mnli_mismatch", "qqp", "qnli", "sst2", "mrpc", "wnli"]}
    assert tasks.expand("piqa,gpt4all", {"local_piqa"})[0] == ["local_piqa"]  # once


def test_averages_by_hand():
    """GLUE: two test sets of MNLI count once, QQP and MRPC by the mean of F1 and accuracy, CoLA by
    Matthews' correlation, WNLI not at all."""

    def one(score, error):
        return {"score": score, "score_se": error}

    numbers = {"mnli": one(0.5, 0.01), "mnli_mismatch": one(0.7, 0.03), "cola": one(-0.2, 0.02), "wnli": one(0.9, 0.5)}
    average = tasks.average_of("glue", numbers)
    assert average["score"] == pytest.approx((0.6 - 0.2) / 2)
    assert average["score_se"] == pytest.approx(math.sqrt((0.01**2 + 0.03**2) / 4 + 0.02**2) / 2)
    assert average["tasks"] == 2
    assert tasks.average_of("gpt4all", numbers) == {}
    accuracies = {"piqa": one(0.6, 0.1) | {"acc_norm": 0.8}, "boolq": one(0.5, 0.1)}
    assert tasks.average_of("gpt4all", accuracies)["acc_norm"] == pytest.approx((0.8 + 0.5) / 2)


def test_scores_of_two_classes():
    """Against the definitions, and against sklearn, which the harness uses."""
    cells = torch.tensor([[3, 1, 2, 4], [5, 0, 0, 5], [6, 0, 4, 0]])  # 00, 01, 10, 11: right, then predicted
    scores = tasks.binary_scores(cells)
    assert scores["acc"].tolist() == pytest.approx([0.7, 1.0, 0.6])
    assert scores["f1"].tolist() == pytest.approx([8 / 11, 1.0, 0.0])
    assert scores["mcc"].tolist() == pytest.approx([(4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5), 1.0, 0.0])
    sklearn = pytest.importorskip("sklearn.metrics")
    for i, row in enumerate(cells.tolist()):
        right = [0] * (row[0] + row[1]) + [1] * (row[2] + row[3])
        said = [0] * row[0] + [1] * row[1] + [0] * row[2] + [1] * row[3]
        assert scores["mcc"][i].item() == pytest.approx(sklearn.matthews_corrcoef(right, said))
        assert scores["f1"][i].item() == pytest.approx(sklearn.f1_score(right, said))


def test_errors_by_resampling():
    """That of a mean is known; that of the mean of two metrics lies between them."""
    pairs = [(1, 1)] * 40 + [(0, 0)] * 30 + [(0, 1)] * 20 + [(1, 0)] * 10
    errors = tasks.bootstrap_errors(pairs, ("acc", "f1"))
    assert errors["acc"] == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.08)
    assert min(errors["acc"], errors["f1"]) * 0.9 < errors["score"] < max(errors["acc"], errors["f1"])
    assert tasks.bootstrap_errors([(0, 1), (2, 2)], ("f1",)) == {"f1": None, "score": None}


def test_expected_calibration_error_by_hand():
    # Bins of the largest probability: .95 right, .95 wrong; .62 right; .7 wrong (a lower edge).
    p = torch.tensor([[0.95, 0.05, math.nan], [0.95, 0.05, 0.0], [0.2, 0.62, 0.18], [0.7, 0.3, math.nan]])
    answers = torch.tensor([0, 1, 1, 1])
    expected = 2 / 4 * abs(0.5 - 0.95) + 1 / 4 * (1 - 0.62) + 1 / 4 * 0.7
    assert expected_calibration_error(p, answers) == pytest.approx(expected, abs=1e-7)
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert expected_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1
    assert math.isnan(expected_calibration_error(torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(ValueError, match="choices"):
        expected_calibration_error(torch.zeros(3), torch.zeros(3))


# -- perplexity


def test_perplexity_of_a_model_that_is_known(tmp_path):
    """A bigram model needs one token before, so windows change nothing, and all is in the table."""
    tokenizer = models.byte_tokenizer(bos=True)
    table = models.random_table(len(tokenizer), seed=3)
    text = "abc the  tab\n\nab é" * 7
    ids = tokenizer(text, add_special_tokens=False).input_ids
    nats = -models.bigram_logps(table, [tokenizer.bos_token_id], ids)
    for context, stride in ((256, None), (16, None), (16, 5), (16, 1), (len(ids) + 1, None), (1, None)):
        numbers = perplexity.perplexity_of_text(models.bigram_model(table), tokenizer, text, context, stride)
        assert numbers["nats_per_token"] == pytest.approx(nats / len(ids), rel=1e-5)
        assert numbers["token_perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
        assert math.log(numbers["word_perplexity"]) == pytest.approx(nats / (5 * 7 - 6), rel=1e-5)
        assert numbers["bits_per_byte"] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-5)
        assert (numbers["tokens"], numbers["words"], numbers["bytes"]) == (len(ids), 29, len(text.encode()))
        assert (numbers["context"], numbers["stride"]) == (context, stride or context)


def test_documents_of_a_text_stand_each_for_itself():
    """Behind BOS each, whatever stands before; the marks between them are no text."""
    assert perplexity.documents_of(" a <|endoftext|>\n\nb ") == [" a <|endoftext|>\n\nb "]  # no line of its own
    marked = "ab a\nb\n<|endoftext|>\n\n tab é \n<|endoftext|>\n<|endoftext|>\n"
    assert perplexity.documents_of(marked) == ["ab a\nb", "tab é"]
    tokenizer, table = models.byte_tokenizer(bos=True), models.random_table(262, seed=3)
    assert len(tokenizer) == 262
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("ab a\nb", "tab é")]
    nats = -sum(models.bigram_logps(table, [tokenizer.bos_token_id], part) for part in ids)
    numbers = perplexity.perplexity_of_text(models.bigram_model(table), tokenizer, marked, 4, 3)
    assert (numbers["documents"], numbers["tokens"]) == (2, sum(map(len, ids)))
    assert (numbers["words"], numbers["bytes"]) == (5, 6 + 6)
    assert numbers["nats_per_token"] == pytest.approx(nats / numbers["tokens"], rel=1e-5)


@pytest.mark.parametrize("stride", [32, 8, 5])
def test_each_token_of_a_text_is_predicted_once_from_enough_of_it(stride):
    """Token by token: after the last `context` tokens of its window, at least context - stride."""
    model, context, ids = models.tiny_gpt2(60), 32, [3 + i * i % 50 for i in range(101)]
    logps = perplexity.token_logps(model, [ids], 1, context, stride)
    sequence, end = [1, *ids], context
    for i, token in enumerate(ids):
        end += stride * (i >= end)
        window = sequence[max(0, min(end, len(ids)) - context) : i + 1]
        assert len(window) > context - stride or i < context
        with torch.no_grad():
            expected = model(torch.tensor([window])).logits[0, -1].double().log_softmax(-1)[token].item()
        assert logps[i].item() == pytest.approx(expected, abs=1e-4)
    assert len(logps) == len(ids)


@needs_harness
def test_without_a_stride_it_is_the_harness_s_rolling_likelihood(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = models.byte_tokenizer()
    model = models.tiny_gpt2(len(tokenizer), n_positions=32)
    text = "the tab of a bat , and the hat of a cat " * 4
    ours = perplexity.perplexity_of_text(model, tokenizer, text, 32, None)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (theirs,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert -ours["nats_per_token"] * ours["tokens"] == pytest.approx(theirs, rel=1e-6)
    assert ours["tokens"] % 32


def test_texts_that_cannot_be_read(toy_base, tmp_path):
    def refused(name, **changes):
        flags = {"model": str(toy_base), "perplexity": str(tmp_path / name), "output": str(tmp_path / "out.json")}
        with pytest.raises(InputError) as caught:
            command.main(command.Args(**flags | changes))
        return caught.value.code.replace(f"{tmp_path}/", "")

    (tmp_path / "a.txt").write_text("snow is white")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.md").write_text("snow")
    (tmp_path / "d.txt").write_bytes(b"snow\n\xff")
    assert refused("none.txt") == "--perplexity none.txt: no such file."
    assert refused("b.txt") == "--perplexity b.txt: the file is empty."
    assert refused("c.md") == "--perplexity c.md: expected a .txt file, also with .gz."
    assert refused("d.txt").startswith("d.txt, line 2: not UTF-8 text")
    assert refused("a.txt", stride=0).startswith("--stride 0: expected 1 to ")
    assert refused("a.txt", stride=9, max_length=8).startswith("--stride 9: expected 1 to 8, the tokens")
    (tmp_path / "out.json").write_text("mine")
    assert refused("a.txt") == "--output out.json: the file exists already; choose another name."


def test_a_run_s_language_model_reads_a_text(toy_base, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("snow is white .")
    flags = {"perplexity": str(tmp_path / "a.txt"), "output": str(tmp_path / "out.json"), "max_length": 4}
    command.main(command.Args(model=str(toy_base), **flags))
    numbers = json.loads((tmp_path / "out.json").read_text())["perplexity"]
    tokenizer, model = model_loading.load_tokenizer(str(toy_base)), model_of(toy_base)
    ids = tokenizer("snow is white .").input_ids
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(logps[i - 1, ids[i]].item() for i in range(1, len(ids)))
    assert numbers["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert numbers["context"] == 4
    assert f"word perplexity {numbers['word_perplexity']:.4f}" in capsys.readouterr().out
