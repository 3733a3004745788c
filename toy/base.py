"""The toy's base model and the rows that are made of its answers: pairs, labelled answers, prompts.

Everything is built once per seed and kept in the user's cache folder; the same seed gives the same
bytes on the same versions.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch

from common import InputError, first_line, generate
from common.generate import decode_completion, is_tiny, sample
from common.metrics import auc
from toy.world import (
    build_tokenizer,
    corpus_answer,
    frontier_efficiency,
    judge_answers,
    prompt_of,
    questions,
    row_of,
    true_reward,
)

SAMPLES = 512  # answers to each question that are kept: what pairs are made of, and what the frontier is drawn from
PAIR_SAMPLES = 160  # the first of these make training pairs
EVAL_SAMPLES = 20  # and the next ones held-out pairs
MAX_NEW_TOKENS = 24
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "answers.json")


def cache_folder(seed: int) -> Path:
    """Where the world of this seed is kept: one folder for each version of the code that makes it
    and of torch."""
    sources = [Path(__file__).with_name("world.py"), Path(__file__), Path(generate.__file__)]
    code = b"".join(path.read_bytes() for path in sources)
    version = hashlib.sha256(code + torch.__version__.encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-toy"
    return root / f"{version}-seed{seed}"


def base_model(seed: int = 0) -> Path:
    """Folder of the base model, trained on first use (about 20 s on one CPU thread): the same bytes
    for the same seed.

    The folder is made aside and renamed, so that two runs starting together do no harm."""
    folder = cache_folder(seed)
    if not all((folder / name).exists() for name in FILES):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            cause = f"cannot be written ({first_line(error)}); XDG_CACHE_HOME names another folder"
            raise InputError(f"The toy's base model is kept in {folder.parent}, which {cause}.") from None
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # layers this small are many times faster on one thread; and the bytes are then the same everywhere
        try:
            with torch.random.fork_rng(devices=[]):
                model, tokenizer = train_base(seed)
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
                (aside / "answers.json").write_text(json.dumps(sample_answers(model, tokenizer, SAMPLES, seed)))
        except BaseException:  # Ctrl-C too: nothing half-made stays behind
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            torch.set_num_threads(threads)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:  # another process was first, or a file had vanished: the bytes are the same
            for name in (name for name in FILES if not (folder / name).exists()):
                os.replace(aside / name, folder / name)
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def train_base(seed: int, steps: int = 900):
    """A two-layer Llama type trained on question-answer lines, the loss on the answers only."""
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, peak = 32, 1e-2
    tokenizer, rows, rng = build_tokenizer(), questions(), random.Random(seed)
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **shape, **ends)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    prompts = [tokenizer(prompt_of(row)).input_ids for row in rows]
    for step in tqdm(range(steps), desc="building the toy's base model (once)", unit="step", mininterval=1.0):
        lines = []
        for _ in range(batch):
            i = rng.randrange(len(rows))
            answer = tokenizer(corpus_answer(rows[i], rng)).input_ids[1:] + [tokenizer.eos_token_id]
            lines.append((prompts[i], answer))
        length = max(len(p) + len(a) for p, a in lines)
        ids = torch.tensor([p + a + [0] * (length - len(p) - len(a)) for p, a in lines])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in lines])
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 40, 1 - 0.95 * step / steps)
        model(input_ids=ids, labels=labels).loss.backward()  # padding is on the right: no real token sees it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def sample_answers(model, tokenizer, count: int, seed: int) -> list[list[str]]:
    """`count` answers to each question at temperature 1, [questions][count]."""
    prompts = [tokenizer(prompt_of(row)).input_ids for row in questions()]
    answers = sample(model, prompts, tokenizer, MAX_NEW_TOKENS, seed=seed, n=count)
    texts = [decode_completion(tokenizer, ids) for ids in answers]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def flip_share(name: str) -> float | None:
    """The share of flipped training labels that `--data` asks for: 0 for `toy`, .2 for `toy:0.2`;
    None for what is not the toy."""
    kind, _, share = name.partition(":")
    if kind != "toy":
        return None
    try:
        flip = float(share or 0)
    except ValueError:
        flip = -1.0
    if not 0 <= flip <= 1:
        raise InputError(f"--data {name}: expected toy, or toy: and the share of flipped labels, for example toy:0.2.")
    return flip


def pairs(seed: int = 0, flip: float = 0.0) -> dict[str, list[tuple[str, str, str]]]:
    """Preference pairs (prompt, chosen, rejected): "train", "held_out" (other answers to the same
    questions), "unseen" (other questions).

    Two answers of the base model to one question; the better one is chosen with probability
    sigma(r*(a) - r*(b)), and in "train" a share `flip` of the labels is then turned round.
    Identical answers say nothing and are left out."""
    answers = json.loads((base_model(seed) / "answers.json").read_text())
    rng = random.Random(seed + 1)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for row, texts in zip(questions(), answers):
        trained, held_out = texts[:PAIR_SAMPLES], texts[PAIR_SAMPLES : PAIR_SAMPLES + EVAL_SAMPLES]
        for name, some in (("unseen", held_out),) if row["unseen"] else (("train", trained), ("held_out", held_out)):
            for a, b in zip(some[::2], some[1::2]):
                first_better = rng.random() < 1 / (1 + math.exp(true_reward(row, b) - true_reward(row, a)))
                first_chosen = first_better != (rng.random() < flip and name == "train")
                if a != b and a and b:
                    chosen, rejected = (a, b) if first_chosen else (b, a)
                    splits[name].append((prompt_of(row), " " + chosen, " " + rejected))
    rng.shuffle(splits["train"])
    return splits


def labelled(seed: int = 0, flip: float = 0.0, continuous: bool = False) -> dict[str, list[tuple[str, str, float]]]:
    """Labelled answers (prompt, answer, label) to the questions of `pairs`, from the same answers
    of the base model, each labelled alone.

    The label is 1 with probability sigma(r*), else 0, or with `continuous` sigma(r*) itself; in
    "train" a share `flip` of the labels z becomes 1 - z."""
    answers = json.loads((base_model(seed) / "answers.json").read_text())
    rng = random.Random(seed + 2)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for row, texts in zip(questions(), answers):
        trained, held_out = texts[:PAIR_SAMPLES], texts[PAIR_SAMPLES : PAIR_SAMPLES + EVAL_SAMPLES]
        for name, some in (("unseen", held_out),) if row["unseen"] else (("train", trained), ("held_out", held_out)):
            for text in filter(None, some):
                good = 1 / (1 + math.exp(-true_reward(row, text)))
                is_good, flipped = rng.random() < good, rng.random() < flip and name == "train"
                label = good if continuous else float(is_good)
                splits[name].append((prompt_of(row), " " + text, 1 - label if flipped else label))
    rng.shuffle(splits["train"])
    return splits


def prompts(seed: int = 0, flip: float = 0.0) -> dict[str, list[tuple[str]]]:
    """Questions alone, (prompt,): "train", "held_out" (the same questions, which are then answered
    anew) and "unseen". They are the same for every seed and have no label that could be flipped."""
    trained = [(prompt_of(row),) for row in questions() if not row["unseen"]]
    return {
        "train": trained,
        "held_out": trained,
        "unseen": [(prompt_of(row),) for row in questions() if row["unseen"]],
    }


def answers_of(model, tokenizer, folder: str, seed: int) -> list[list[str]]:
    """Answers of a reference model to all questions, [questions][n]: those kept with the base
    model, or 256 new ones of another model."""
    kept = Path(folder) / "answers.json"
    return json.loads(kept.read_text()) if kept.exists() else sample_answers(model, tokenizer, 256, seed)


def reference_rewards(prompt: str, answers: list[list[str]]) -> torch.Tensor:
    """True rewards [questions, n] of the reference's answers to the trained questions, or the
    unseen ones, whichever `prompt` is one of."""
    unseen = row_of(prompt)["unseen"]
    chosen = [(row, texts) for row, texts in zip(questions(), answers) if row["unseen"] == unseen]
    return torch.tensor([[true_reward(row, text) for text in texts] for row, texts in chosen], dtype=torch.float64)


def judge_of(data: str, model_folder: str, tokenizer, seed: int):
    """What the toy's true reward says of answers, as a function for `evaluate_samples`; None where
    `--data` is not the toy.

    Args:
        model_folder: of the reference.
    """
    if flip_share(data) is None:
        return None

    def judge(answers: list[tuple[str, str]], kl: float, ref_model) -> dict:
        metrics = judge_answers(answers) | {"frontier_efficiency": None}
        # The frontier takes hundreds of answers to each question: cheap for tiny models only.
        if ref_model is not None and is_tiny(ref_model) and len(tokenizer) < 1000:
            texts = answers_of(ref_model, tokenizer, model_folder, seed)
            ref_rewards = reference_rewards(answers[0][0], texts)
            metrics["frontier_efficiency"] = frontier_efficiency(kl, metrics["true_reward"], ref_rewards)
        return metrics

    return judge


def rank_correlation(rows: list[dict], rewards: torch.Tensor) -> float | None:
    """On the toy, how well rewards [rows, 2] order the answers to a question as the true reward
    does, mean over questions.

    1 always, 0 no better than chance, -1 never; ties of the true reward left out, of the rewards
    counted as one half. Answers to different questions are not compared: Bradley-Terry says nothing
    of them."""
    by_question: dict[str, list] = {}
    for row, values in zip(rows, rewards.tolist()):
        prompt, *answers = row["texts"]
        for answer, reward in zip(answers, values):
            by_question.setdefault(prompt, []).append((true_reward(row_of(prompt), answer), reward))
    tables = [torch.tensor(pairs) for pairs in by_question.values()]  # [answers, 2] each: true reward, reward
    shares = [share for table in tables if (share := auc(table[:, 1], table[:, 0])) is not None]
    return 2 * sum(shares) / len(shares) - 1 if shares else None
