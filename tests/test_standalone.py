"""Each script, copied alone into an empty folder, is a module: it imports without common/
and the other packages, and its loss runs on a batch that is built here by hand from the description
in its docstring, as somebody who copies the file would build one.
"""

import ast
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house
from tests.house import FAMILIES
from tests.runs import start_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# Loss of each pair where the policy is the reference and a reward head is zero. None: known from
# log-probabilities alone, see `plain`.
START = {script: start_of(script) for script in FAMILIES["pairs"]}

# What every program below begins with, inside the empty folder, in a process of its own: what is
# blocked here must not be blocked for the other tests.
BEGIN = '''
import importlib, inspect, json, sys


class Blocked:
    """Finds nothing of what the script could have beside it, loudly."""

    def find_spec(self, name, path=None, target=None):
        ours = "adapters chat common judging labelled pretraining report rewards tokens toy".split()
        if name.split(".")[0] in (*ours, "datasets"):
            raise ImportError(f"{name} is blocked in this test")


sys.meta_path.insert(0, Blocked())
'''

# And what follows in those that compute a loss.
SETUP = """
script = importlib.import_module(sys.argv[1])
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

torch.manual_seed(0)
torch.set_num_threads(1)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20, "initializer_range": 0.3}


def compute_loss(model, batch, **chosen):
    '''The script's own, with the numbers that it takes: chosen ones, or the command line's defaults.'''
    known = vars(script.Args()) | chosen
    names = list(inspect.signature(script.compute_loss).parameters)[2:]  # behind model and batch
    return script.compute_loss(model, batch, **{name: known[name] for name in names if name in known})


"""

PROGRAM = '''
model = LlamaForCausalLM(LlamaConfig(**shape))
head = hasattr(script, "add_head")
model = script.add_head(model, {}) if head else model

# Two rows, (prompt, chosen, rejected), with prompts and answers of different length. Sequences:
# chosen of both rows, then rejected of both.
rows = [([3, 4, 5], [6, 7], [8, 9, 10]), ([11, 12], [13, 14, 15, 1], [16])]
texts = [(prompt, chosen) for prompt, chosen, _ in rows] + [(prompt, rejected) for prompt, _, rejected in rows]


def by_line(length=7):
    """One line for each answer, padded on the right."""
    batch = {name: [] for name in ("input_ids", "position_ids", "attention_mask", "logit_index", "last")}
    for line, (prompt, answer) in enumerate(texts):
        ids = prompt + answer
        padding = [0] * (length - len(ids))
        batch["input_ids"].append(ids + padding)
        batch["position_ids"].append(list(range(len(ids))) + padding)
        batch["attention_mask"].append([1] * len(ids) + padding)
        begin = line * length + len(prompt)  # flat position of the answer's first token, predicted one before
        batch["logit_index"] += range(begin - 1, begin - 1 + len(answer))
        batch["last"].append(begin + len(answer) - 1)
    return finished(batch)


def shared(length=9):
    """One line for each row, the prompt once; a float mask keeps the answers from seeing each other."""
    batch = {name: [] for name in ("input_ids", "position_ids", "attention_mask", "logit_index", "last")}
    ends, sources = {}, {}
    for line, (prompt, *answers) in enumerate(rows):
        ids, positions, owner = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for which, answer in enumerate(answers):
            begin = line * length + len(ids)
            sources[2 * which + line] = [line * length + len(prompt) - 1, *range(begin, begin + len(answer) - 1)]
            ends[2 * which + line] = begin + len(answer) - 1
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
            owner += [1 + which] * len(answer)
        padding = length - len(ids)
        batch["input_ids"].append(ids + [0] * padding)
        batch["position_ids"].append(positions + [0] * padding)
        owner += [-1] * padding
        sees = [[k <= q and owner[k] in (0, owner[q]) for k in range(length)] for q in range(length)]
        batch["attention_mask"].append([[[0.0 if yes else -1e9 for yes in line] for line in sees]])
    batch["logit_index"] = [position for s in range(4) for position in sources[s]]
    batch["last"] = [ends[s] for s in range(4)]
    return finished(batch)


def finished(batch):
    """The rest of the batch, the same in both layouts."""
    batch["targets"] = [token for _, answer in texts for token in answer]
    batch["sequence_ids"] = [s for s, (_, answer) in enumerate(texts) for _ in answer]
    batch["completion_tokens"] = [len(answer) for _, answer in texts]
    return {name: torch.tensor(value) for name, value in batch.items()}


def loss(batch, ref, ref_logits):
    if "ref_sample" in script.__doc__:  # two samples of the reference for each row: the four answers serve as such
        batch["ref_sample"] = batch | {"ref_logits": ref_logits}
    else:
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref
    value, metrics = compute_loss(model, batch)
    model.zero_grad()
    value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.stack([g.norm() for g in gradients]).norm() > 0 and all(g.isfinite().all() for g in gradients)
    assert abs(metrics["loss"].item() - value.item()) < 1e-6
    return value.item()


# Log-probabilities by the longest way round: each sequence alone, full logits, every token looked
# up.
logps, logits = [], []
with torch.no_grad():
    for prompt, answer in texts:
        # What predicts the answer's tokens.
        table = model(torch.tensor([prompt + answer])).logits[0][len(prompt) - 1 : -1]
        logits.append(table)
        logps.append(sum(table.log_softmax(-1)[i, token] for i, token in enumerate(answer)))
chosen, rejected = torch.stack(logps).view(2, 2)
itself = torch.stack(logps).view(2, 2), torch.cat(logits)
elsewhere = torch.tensor([[-4.0, -7.0], [-5.0, -3.0]]), torch.zeros(len(itself[1]), 20)
losses = {"start": loss(by_line(), *itself), "start, shared": loss(shared(), *itself)}
losses["plain"] = -(chosen - rejected).sigmoid().log().sum().item()  # without a reference: -log p(chosen over rejected)
if head:
    with torch.no_grad():
        model.score.weight.normal_()
losses |= {"moved": loss(by_line(), *elsewhere), "moved, shared": loss(shared(), *elsewhere)}
print(json.dumps(losses))
'''


# Loss summed over rows with one answer, from their summed log-probabilities, those of the reference
# and labels, as each script's docstring writes it.
ONE_ANSWER = {
    "pointwise_dpo": lambda args, logps, ref, z: sum(
        -math.log(sigma((1 if y else -1) * args.beta * (p - r))) for p, r, y in zip(logps, ref, z)
    ),
    "ulma": lambda args, logps, ref, z: sum(
        -p if y else -math.log(sigma(-args.beta * (p - r))) for p, r, y in zip(logps, ref, z)
    ),
    "sft": lambda args, logps, ref, z: -sum(logps),
}

ONE_ANSWER_PROGRAM = """
model = LlamaForCausalLM(LlamaConfig(**shape))
rows, length = [([3, 4, 5], [6, 7]), ([11], [13, 14, 15, 1]), ([8, 9], [10])], 5
batch = {name: [] for name in ("input_ids", "position_ids", "attention_mask", "logit_index")}
batch |= {name: [] for name in ("targets", "sequence_ids", "completion_tokens")}
logps = []
for line, (prompt, answer) in enumerate(rows):
    ids = prompt + answer
    padding = [0] * (length - len(ids))
    batch["input_ids"].append(ids + padding)
    batch["position_ids"].append(list(range(len(ids))) + padding)
    batch["attention_mask"].append([1] * len(ids) + padding)
    begin = line * length + len(prompt)  # flat position of the answer's first token, predicted one before
    batch["logit_index"] += range(begin - 1, begin - 1 + len(answer))
    batch["targets"] += answer
    batch["sequence_ids"] += [line] * len(answer)
    batch["completion_tokens"].append(len(answer))
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logps.append(sum(table[t, ids[t + 1]].item() for t in range(len(prompt) - 1, len(ids) - 1)))
batch = {name: torch.tensor(value) for name, value in batch.items()}
ref, labels = [-4.0, -9.0, -1.0], [1.0, 0.0, 1.0]
batch |= {"ref_logps": torch.tensor(ref), "labels": torch.tensor(labels)}
value, metrics = compute_loss(model, batch, label_kind="binary")
value.backward()
gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
assert torch.stack([g.norm() for g in gradients]).norm() > 0 and all(g.isfinite().all() for g in gradients)
assert abs(metrics["loss"].item() - value.item()) < 1e-6
print(json.dumps([value.item(), logps, ref, labels]))
"""


REWARD_PROGRAM = """
model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1, pad_token_id=0))
# Chosen of both rows, then rejected of both.
lines = [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 1], [3, 4, 5, 8, 9, 10], [11, 12, 16]]
with torch.no_grad():
    rewards = [model(torch.tensor([ids])).logits.item() for ids in lines]
batch = {"input_ids": torch.tensor([ids + [0] * (6 - len(ids)) for ids in lines])}
batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (6 - len(ids)) for ids in lines])
value, metrics = compute_loss(model, batch, label_kind="binary")
value.backward()
assert all(p.grad.isfinite().all() for p in model.parameters()) and model.score.weight.grad.norm() > 0
assert abs(metrics["loss"].item() - value.item()) < 1e-6
print(json.dumps([value.item(), rewards]))
"""


SAMPLED_PROGRAM = (
    ONE_ANSWER_PROGRAM.split("ref, labels = ")[0]
    + """
logits = [model(torch.tensor([p + a])).logits[0, len(p) - 1 : len(p) + len(a) - 1] for p, a in rows]
tables = [table.log_softmax(-1).detach() for table in logits]
if hasattr(script, "add_critic"):
    model = script.add_critic(model, {})
    old = torch.cat([t.gather(-1, torch.tensor(a)[:, None])[:, 0] for t, (_, a) in zip(tables, rows)])
    advantages, returns = torch.arange(7.0), torch.ones(7) * 3
    batch |= {"old_logps": old, "old_values": torch.zeros(7), "advantages": advantages, "returns": returns}
    expected = -21.0 + script.Args().vf_coef * 0.5 * 9 * 7
else:
    head = model.get_output_embeddings().weight
    batch |= {"ref_states": torch.zeros(7, head.shape[1]), "ref_head": [head.detach()]}  # uniform
    kl = sum((0.05 * (torch.tensor(0.05).log() - t)).sum().item() for t in tables)
    expected = -sum(logps) + script.Args().kl * kl
value, metrics = compute_loss(model, batch, label_kind="binary")
value.backward()
assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
assert abs(metrics["loss"].item() - value.item()) < 1e-5
print(json.dumps([value.item(), expected]))
"""
)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Loss summed over the ten targets of two chunks, from their log-probabilities and scores, as each
# script's docstring writes it, at threshold .25. A zero head's value is -1/2.
CORPUS = {
    "mle_pretrain": lambda args, logp, score: -logp,
    "filtered_pretrain": lambda args, logp, score: -logp,
    "conditional_pretrain": lambda args, logp, score: -logp,
    "unlikelihood_pretrain": lambda args, logp, score: (
        -logp if score <= 0.25 else -args.alpha * math.log(1 - math.exp(logp))
    ),
    "rwr_pretrain": lambda args, logp, score: -math.exp(-score / args.beta) * logp,
    "awr_pretrain": lambda args, logp, score: (
        -args.alpha * math.exp((0.5 - score) / args.beta) * logp + (1 - args.alpha) * (0.5 - score) ** 2
    ),
}

CORPUS_PROGRAM = """
from transformers import GPT2Config, GPT2LMHeadModel

shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "initializer_range": 0.3}
model = GPT2LMHeadModel(GPT2Config(vocab_size=20, **shape)).eval()
model = script.add_value_head(model, {}) if hasattr(script, "add_value_head") else model
ids = torch.randint(20, (2, 6))
scores = torch.tensor([[0.9, 0.0, 0.0, 0.75, 0.75, 0.75], [0.0, 0.5, 0.5, 0.0, 1.0, 1.0]])
with torch.no_grad():
    logps = model(ids).logits.log_softmax(-1)
targets = [(logps[row, t, ids[row, t + 1]].item(), scores[row, t + 1].item()) for row in range(2) for t in range(5)]
value, metrics = compute_loss(model, {"input_ids": ids, "scores": scores}, threshold=0.25)
value.backward()
gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
assert torch.stack([g.norm() for g in gradients]).norm() > 0 and all(g.isfinite().all() for g in gradients)
assert abs(metrics["loss"].item() - value.item()) < 1e-6
print(json.dumps([value.item(), metrics["nll"].item(), metrics["bad_share"].item(), targets]))
"""


@pytest.fixture
def alone(tmp_path):
    """Runs Python in an empty folder that holds one script and nothing else of this repository."""

    def run(script: str, *command: str) -> subprocess.CompletedProcess:
        shutil.copyfile(ROOT / f"{script}.py", tmp_path / f"{script}.py")
        return subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_with_all_else_blocked(alone, script):
    done = alone(script, "-c", BEGIN + f"import {script}; print(callable({script}.compute_loss))")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("script", sorted(START))
def test_the_loss_runs_on_a_batch_made_by_hand(alone, script):
    done = alone(script, "-c", BEGIN + SETUP + PROGRAM, script)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)
    expected = losses["plain"] if START[script] is None else 2 * START[script]
    assert losses["start"] == pytest.approx(expected, abs=2e-5)
    assert losses["start, shared"] == pytest.approx(expected, abs=2e-5)
    assert losses["moved"] != pytest.approx(expected, abs=1e-2)
    assert losses["moved, shared"] == pytest.approx(losses["moved"], abs=1e-4)


@pytest.mark.parametrize("script", sorted(ONE_ANSWER))
def test_the_loss_runs_on_rows_with_one_answer_made_by_hand(alone, script):
    done = alone(script, "-c", BEGIN + SETUP + ONE_ANSWER_PROGRAM, script)
    assert done.returncode == 0, done.stderr
    value, *known = json.loads(done.stdout)
    assert value == pytest.approx(ONE_ANSWER[script](importlib.import_module(script).Args(), *known), rel=1e-5)


@pytest.mark.parametrize("script", sorted(CORPUS))
def test_the_loss_runs_on_chunks_made_by_hand(alone, script):
    """A target carries its own score, not that of the position that predicts it."""
    done = alone(script, "-c", BEGIN + SETUP + CORPUS_PROGRAM, script)
    assert done.returncode == 0, done.stderr
    loss, nll, bad, targets = json.loads(done.stdout)
    args = importlib.import_module(script).Args()
    assert loss == pytest.approx(sum(CORPUS[script](args, logp, score) for logp, score in targets), abs=1e-4)
    assert nll == pytest.approx(-sum(logp for logp, _ in targets), abs=1e-4)
    assert bad == 7


def test_the_reward_models_loss_runs_on_a_batch_made_by_hand(alone):
    done = alone("reward_model", "-c", BEGIN + SETUP + REWARD_PROGRAM, "reward_model")
    assert done.returncode == 0, done.stderr
    value, rewards = json.loads(done.stdout)
    assert value == pytest.approx(-sum(math.log(sigma(rewards[i] - rewards[2 + i])) for i in range(2)), rel=1e-5)


@pytest.mark.parametrize("script", ["superhf", "ppo"])
def test_the_loss_runs_on_sampled_completions_made_by_hand(alone, script):
    done = alone(script, "-c", BEGIN + SETUP + SAMPLED_PROGRAM, script)
    assert done.returncode == 0, done.stderr
    value, expected = json.loads(done.stdout)
    assert value == pytest.approx(expected, rel=1e-5)


def folders_of(sentence: str) -> set[str]:
    """The folders that the sentence of a script without them names."""
    return set(re.findall(r"(\w+)/", sentence.split("Training needs")[1].split(" beside this file.")[0]))


def packages_behind(script: str) -> set[str]:
    """The packages that a script imports and that those import, functions included; not the command
    line of `common.evaluate`, which a run does not start.
    """
    modules = house.modules_of(ROOT)
    todo, seen = [ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))], set()
    while todo:
        new = {name for _, name in house.imported_modules(todo.pop(), modules)} - seen - {"judging.command"}
        seen |= new
        todo += [modules[name][1] for name in new]
    return {name.split(".")[0] for name in seen}


@pytest.mark.parametrize("script", SCRIPTS)
def test_started_alone_it_names_all_that_it_needs_in_one_sentence(alone, script):
    done = alone(script, f"{script}.py")
    assert done.returncode not in (0, 2)
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert folders_of(done.stderr) == packages_behind(script)


def test_with_the_folders_that_it_names_a_script_trains(alone, tmp_path, tiny_llama, file13):
    for name in folders_of(alone("dpo", "dpo.py").stderr):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    few = ["--max-steps", "1", "--kl-samples", "2", "--holdout", "0.2"]
    done = alone("dpo", "dpo.py", "--model", str(tiny_llama), "--data", file13, *few)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "dpo-llama-seed0" / "summary.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_alone(alone, script):
    done = alone(script, f"{script}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--lr" in done.stdout
