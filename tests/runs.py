"""Short training runs for tests: a file of pairs in the toy's words, and a script's main() called
in this process.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from common import batches, data
from common import models as model_loading
from common.run import Run
from report import curves
from tests import models
from tests.house import FAMILIES
from toy import world

ROOT = Path(__file__).resolve().parent.parent
PAIRS = FAMILIES["pairs"]


def start_of(script: str) -> float | None:
    """The loss of a pair where policy and reference are the same, as the docstring of the script's
    loss names it ("At policy = ref: log 2."); None where it names none.
    """
    if script == "dph":
        return 3 * math.log(2)  # 2 log 2 of the separable loss where the head is zero, and cDPO's log 2
    named = re.search(r"At policy = ref: (.+?)\.\s", (ROOT / f"{script}.py").read_text(encoding="utf-8"))
    if named is None:
        return None
    factor, is_log, _ = named[1].partition("log 2")
    return float(factor or 1) * (math.log(2) if is_log else 1)


KNOWN = [name for name in PAIRS if start_of(name) is not None]  # scripts whose first loss is known


def numbers_of(module) -> dict:
    """The numbers that a script's `compute_loss` takes, as its command line has them by default."""
    wanted = list(inspect.signature(module.compute_loss).parameters)[2:]  # behind model and batch
    return {name: value for name, value in vars(module.Args()).items() if name in wanted}


def pairs(rows: int, seed: int = 0) -> list[dict]:
    """Preference pairs in the toy's words, all prompts different; the chosen answer is the one with
    the larger true reward.
    """
    rng, made = random.Random(seed), []
    for question in rng.sample(world.questions(), rows):
        texts: set[str] = set()
        while len(texts) < 2:
            texts.add(world.corpus_answer(question, rng))
        rejected, chosen = sorted(texts, key=lambda text: (world.true_reward(question, text), text))
        made.append({"prompt": world.prompt_of(question), "chosen": " " + chosen, "rejected": " " + rejected})
    return made


def write_pairs(path: Path, rows: int, seed: int = 0) -> str:
    """A .jsonl of such pairs."""
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(rows, seed)))
    return str(path)


def toy_examples(folder: Path | str, rows: int = 6) -> list[dict]:
    """Such pairs of different lengths, encoded."""
    tokenizer = model_loading.load_tokenizer(str(folder))
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs(rows)]
    return list(data.encode_rows(tokenizer, texts, 128))


# Ids of a vocabulary of 8 with 2 as EOS: prompts and answers of many lengths, one answer without
# EOS (cut), one that is EOS alone.
EXAMPLES = [
    {"prompt": [1, 5, 6], "completions": [[4, 3, 2], [7, 2]]},
    {"prompt": [1], "completions": [[2], [3, 3, 3, 3, 5, 2]]},
    {"prompt": [1, 7, 7, 4, 3, 5, 6], "completions": [[4, 6, 5, 3], [3, 4, 2]]},
    # Pad and EOS among the prompt's and the answer's tokens count like any other.
    {"prompt": [1, 0, 2], "completions": [[0, 0, 2], [2]]},
]


def lines_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    """A .jsonl of these rows; its path."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# A chat template that keeps every turn as it is.
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m.role + ']' + m.content + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)

# Small and quick; each test names what it is about on top of these. No samples: they are the slow
# part of a short run.
SHORT = {
    "kl_samples": 0,
    "batch_size": 8,
    "micro_batch_size": 8,
    "log_every": 1,
    "eval_every": 1000,
    "save_every": 1000,
    "lr": 1e-2,
    "holdout": 0.0,
}


def arguments(script: str, folder: Path, **changes):
    """(the script's module, its Args) of a short run called `folder.name` in `folder.parent`."""
    module = importlib.import_module(script)
    return module, module.Args(**{**SHORT, "name": folder.name, "output_dir": str(folder.parent), **changes})


def train(script: str, folder: Path, **changes) -> Path:
    """Runs a script's main() here and returns the run's folder."""
    module, args = arguments(script, folder, **changes)
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(curves, "draw_curves"),
    ):  # drawing takes longer than the run
        module.main(args)
    return folder


def train_until_killed(script: str, folder: Path, step: int = 3, **changes) -> Path:
    """Begins a run here, with a line of metrics a step, and ends it without a word behind the line
    of `step`.
    """
    log = Run.log

    def log_and_die(self, split, numbers):
        log(self, split, numbers)
        if self.step == step and split == "train":
            raise KilledRun

    with mock.patch.object(Run, "log", log_and_die), contextlib.suppress(KilledRun):
        train(script, folder, **changes)
        raise AssertionError(f"the run ended before step {step}")
    return folder


class KilledRun(Exception):
    """What ends a run where a signal would."""


def resume(script: str, folder: Path, **changes) -> Path:
    """Goes on with a run here."""
    module = importlib.import_module(script)
    with torch.random.fork_rng(devices=[]), mock.patch.object(curves, "draw_curves"):
        module.main(module.Args(resume=str(folder), **changes))
    return folder


def recorded(script: str, folder: Path, **changes) -> tuple[list[list[int]], list[dict[str, torch.Tensor]]]:
    """Trains and returns the rows of each step and each step's gradient by parameter, before
    clipping.
    """
    plans, gradients, clip = [], [], torch.nn.utils.clip_grad_norm_
    plan_batches, load_model, loaded = batches.plan_batches, model_loading.load_model, []

    def plan(*args, **kwargs):
        plans.append(plan_batches(*args, **kwargs))
        return plans[-1]

    def load(*args, **kwargs):
        loaded.append(load_model(*args, **kwargs))
        return loaded[-1]

    def clipped(parameters, *args, **kwargs):
        gradients.append({name: p.grad.clone() for name, p in loaded[0].named_parameters() if p.grad is not None})
        return clip(parameters, *args, **kwargs)

    with (
        mock.patch.object(batches, "plan_batches", plan),
        mock.patch.object(model_loading, "load_model", load),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped),
    ):
        train(script, folder, **changes)
    return plans[0], gradients


def lines_of(folder: Path, split: str = "train") -> list[dict]:
    """Lines of metrics.jsonl of one split."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def model_of(folder: Path | str):
    """The folder's causal LM in evaluation mode."""
    return model_loading.load_model(str(folder), "cpu").eval()


def weights(folder: Path) -> str:
    """A hash of a saved model's weights: pytest would compare bytes that differ for minutes."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def assert_close_weights(a: dict, b: dict, limit: float) -> None:
    """Weights within `limit`, GPT-2's key biases left out: attention does not depend on them, so
    their gradient is rounding alone, of which Adam makes steps as large as any other's.
    """
    for name in a:
        gap = (a[name] - b[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            query, _, value = gap.chunk(3)
            gap = torch.cat([query, value])
        assert gap.max() <= limit, name


def start_process(words: list[str], cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess:
    """A command of the project in a process of its own, on one thread; its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def in_processes(count: int, work, timeout: float = 120) -> list:
    """What `work()` returned, or exited with, in so many forked processes of one group on the CPU.

    They have the libraries loaded already: torchrun would take ten seconds to start them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]

    def process(number: int) -> None:
        place = {"WORLD_SIZE": count, "RANK": number, "LOCAL_RANK": number}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            try:
                value = work()
            except SystemExit as stopped:
                value = stopped.code
        pipes[number][1].send_bytes(pickle.dumps(value))

    processes = [fork.Process(target=process, args=(number,), daemon=True) for number in range(count)]
    for one in processes:
        one.start()
    try:
        for _, end in pipes:
            end.close()  # else the other end would not see that a process died
        values = []
        for begin, _ in pipes:
            assert begin.poll(timeout), "a process does not come to an end"
            values.append(pickle.loads(begin.recv_bytes()))
        return values
    finally:
        for one in processes:
            one.join(5)
            one.kill()


def gpt2_like(folder: Path, **changes) -> str:
    """A random GPT-2 with a tokenizer in GPT-2's manner: one special token that is BOS, EOS and
    UNK, and no pad token.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "is", "Ġis", "zq", end]
    tokenizer = Tokenizer(
        tokenizer_models.BPE({word: i for i, word in enumerate(words)}, [("i", "s"), ("Ġ", "is"), ("z", "q")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )
    ends = {"bos_token_id": len(words) - 1, "eos_token_id": len(words) - 1, "pad_token_id": None}
    return str(models.save(models.tiny_gpt2(len(words), **ends, **changes), fast, folder))


def canned_sample(model, prompts: list[list[int]], tokenizer, max_new_tokens: int, n=1, **shape) -> list[list[int]]:
    """Stands for generate.sample: completions that depend on the prompt, and on how often it came
    before in this call, and on nothing else.
    """
    times: dict[tuple, int] = {}
    completions = []
    for prompt in (prompt for prompt in prompts for _ in range(n)):
        times[tuple(prompt)] = times.get(tuple(prompt), -1) + 1
        rng = random.Random(json.dumps([prompt, times[tuple(prompt)]]))
        ids = [rng.randrange(4, len(tokenizer)) for _ in range(rng.randrange(1, max_new_tokens + 1))]
        completions.append(ids + [tokenizer.eos_token_id] * (len(ids) < max_new_tokens))
    return completions


def toy_reward_anywhere(load):
    """Stands for rewards.models.load_reward: the toy's true reward also for a file of its
    questions, which a run would refuse, since a file could hold any prompt.
    """

    def loading(name: str, data: str, *rest):
        if name == "toy" and data != "toy":
            return lambda prompts, answers: torch.tensor(
                [world.true_reward(world.row_of(p), a) for p, a in zip(prompts, answers)]
            )
        return load(name, data, *rest)

    return loading
