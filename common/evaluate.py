"""Generation, preference accuracy, KL, the toy's judgement, and the plain log-probabilities that every fast path is tested against.

    python -m common.evaluate --model runs/my-run --data pairs.jsonl --output scores.jsonl

writes one line per row, in order: row, chosen_logps, rejected_logps, chosen_tokens, rejected_tokens, and chosen_reward, rejected_reward where the
folder has a reward head (a run of dph.py); null values and `reason` for a row that cannot be used. It is deliberately plain: two lines per pair, full logits, float32, nothing gathered and nothing shared.
"""

import functools
import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common import data, runtime, toy
from common.data import InputError

# ------------------------------------------------------------------------------------------------------------- the oracle


@torch.no_grad()
def plain_token_logps(model, sequences: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of completion tokens by the shortest road: full logits of right-padded lines, float32.

    Args:
        sequences: (prompt ids, completion ids) of each sequence.

    Returns:
        token log-probabilities [batch, length - 1] in nats, zero where mask is, and the mask [batch, length - 1] of completion tokens.
    """
    device = next(model.parameters()).device
    length = max(len(p) + len(c) for p, c in sequences)
    ids = torch.tensor([p + c + [pad_id] * (length - len(p) - len(c)) for p, c in sequences], device=device)  # [batch, length]
    position = torch.arange(length, device=device)
    prompt = torch.tensor([len(p) for p, _ in sequences], device=device)[:, None]
    end = torch.tensor([len(p) + len(c) for p, c in sequences], device=device)[:, None]
    logits = model(input_ids=ids, attention_mask=(position < end).long(), use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # position t scores the token at t + 1
    mask = ((position >= prompt) & (position < end))[:, 1:]
    return logps.masked_fill(~mask, 0.0), mask


def plain_logps(model, sequences, pad_id: int, batch_size: int = 8) -> torch.Tensor:
    """Summed completion log-probabilities in nats, [sequences], float32, on the CPU: the oracle."""
    parts = [plain_token_logps(model, sequences[i : i + batch_size], pad_id)[0].sum(-1).cpu() for i in range(0, len(sequences), batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def plain_rewards(model, head: torch.Tensor, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    """Rewards of a head [1, hidden] at each sequence's last token, one sequence at a time without padding, float32."""
    device, rewards = next(model.parameters()).device, []
    for prompt, completion in sequences:
        hidden = model.base_model(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False).last_hidden_state
        rewards.append((hidden[0, -1].float() @ head[0].float().to(device)).item())
    return rewards


def sequences_of(examples: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) answer by answer, in the order of `collate`: all first completions, then all second ones."""
    return [(e["prompt"], e["completions"][j]) for j in range(len(examples[0]["completions"])) for e in examples]


@torch.no_grad()
def changes_logits(model, ids: list[int]) -> bool:
    """Whether the model does something to its output layer's product, as soft-capping or scaling of logits does.

    Measured with a product a thousand times too large: a cap is nearly invisible on the small logits that training may begin with.
    """
    seen = []

    def enlarge(module, inputs, output):
        seen.append(output * 1e3)
        return seen[-1]

    hook = model.get_output_embeddings().register_forward_hook(enlarge)
    try:
        logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False).logits
    finally:
        hook.remove()
    return not seen or not torch.equal(logits.float(), seen[-1].float())


@torch.no_grad()
def choose_layout(logps, model, splits: dict, pad_id: int, device, share_prompt: bool, say=print) -> str:
    """The fastest layout of `collate` whose log-probabilities agree with the plain ones on the longest rows.

    Masks that a model ignores (sliding windows, ALiBi) and output layers with scaling or soft-capping would be wrong without a word, so this
    is measured before the first step: on the longest row, and on the one with the longest prompt and answer, which a window cuts first.
    `logps(batch)` returns summed log-probabilities [sequences]. A change of layout is said.
    """
    rows = [row for rows in splits.values() for row in rows]
    longest = [max(rows, key=data.row_length)]
    reach = max(rows, key=lambda row: len(row["prompt"]) + max(map(len, row["completions"])))
    longest += [reach] if reach is not longest[0] and len(reach["completions"]) == len(longest[0]["completions"]) else []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    expected = plain_logps(model, sequences_of(longest), pad_id)
    found, what = None, {"shared": "sharing the prompt", "rows": "the gathered output layer"}
    layouts = (["shared"] if share_prompt else []) + ["rows", "model_head"]
    if changes_logits(model, longest[0]["prompt"]):
        layouts = ["model_head"]
        say("This model scales or caps its logits, so its own output layer is used as it is; training is slower and right.")
    for layout in layouts:
        try:
            got = logps(data.collate(longest, pad_id, layout, device)).float().cpu()
            gap = (got - expected).abs().max().item()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            gap, got = float("inf"), error
        if gap <= 1e-3 + 1e-6 * expected.abs().max().item():
            found = layout
            break
        if layout in what:
            reason = f"is off by {gap:.2g} nats" if gap < float("inf") else f"fails ({type(got).__name__})"
            say(f"With this model {what[layout]} {reason} on the longest rows, so it is not used; training is slower and right.")
    torch.set_float32_matmul_precision(precision)
    if found is None:
        raise InputError("This model's log-probabilities differ between a plain forward pass and every batch layout; it cannot be trained here.")
    return found


# ------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    tokenizer,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    autocast=None,
    banned_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """One sampled completion for each prompt, as token ids that end in EOS unless cut at `max_new_tokens`.

    Everything that shapes the distribution is passed here and the checkpoint's generation_config is set aside: transformers would sample from
    the 50 likeliest tokens where nothing is said. temperature 0 is greedy. `banned_ids` are never sampled, the others share their probability. Prompts are padded on the left, with position ids from the mask.
    The caller's random numbers are untouched. With several processes each must call with the same number of prompts.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(**shape, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, use_cache=True)
    config.suppress_tokens = list(banned_ids) or None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list = [None] * len(prompts)
    was_training, saved = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    synced = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                length = max(len(prompts[i]) for i in chunk)
                ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in chunk], device=device)
                mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=device)
                with autocast() if autocast else torch.no_grad():
                    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced)
                for i, new in zip(chunk, out[:, length:].tolist()):
                    completions[i] = new[: new.index(eos) + 1] if eos in new else new[:max_new_tokens]
        finally:
            model.generation_config = saved
            model.train(was_training)
    return completions


def text_of(tokenizer, completion: list[int]) -> str:
    """The text of a completion, its EOS left out and nothing else."""
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()


def text_behind(tokenizer, prompt: list[int], completion: list[int]) -> str:
    """The text that a completion adds to its prompt, its EOS left out: with the white space between them, which decoding it alone can lose.

    A reward model must read prompt + answer as it read them in training.
    """
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    before, whole, alone = (tokenizer.decode(x, skip_special_tokens=False, clean_up_tokenization_spaces=False) for x in (prompt, prompt + ids, ids))
    return whole[len(before) :] if whole.startswith(before) else alone


# -------------------------------------------------------------------------------------------------------------- metrics


def accuracy(scores: torch.Tensor, ties_say_nothing: bool = False) -> float | None:
    """Share of rows whose chosen answer scores higher than the rejected one; ties count one half.

    Args:
        scores: [rows, 2], chosen and rejected: log-probabilities or rewards.
        ties_say_nothing: None instead of .5 where all rows are ties, as rewards are before the first step.
    """
    if scores.dim() != 2 or scores.shape[1] != 2:
        raise ValueError(f"expected scores [rows, 2], got {tuple(scores.shape)}")
    chosen, rejected = scores.unbind(1)
    if not len(scores) or (ties_say_nothing and bool((chosen == rejected).all())):
        return None
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def concordance(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Share of the couples of rows with different labels whose scores are ordered as their labels, ties counting one half: for binary labels the
    area under the ROC curve.

    Args:
        scores, labels: [rows].

    Returns:
        None where all labels are the same, or all scores are, as rewards are before the first step.
    """
    if scores.shape != labels.shape or scores.dim() != 1:
        raise ValueError(f"expected scores and labels of one shape [rows], got {tuple(scores.shape)} and {tuple(labels.shape)}")
    ordered = couples = 0.0
    for score, label in zip(scores.split(512), labels.split(512)):
        above = label[:, None] > labels[None]  # [some rows, rows]
        couples += above.sum().item()
        ordered += ((score[:, None] > scores[None]) & above).sum().item() + 0.5 * ((score[:, None] == scores[None]) & above).sum().item()
    return ordered / couples if couples and bool((scores != scores[0]).any()) else None


def judge_rewards(args, rows, rewards: torch.Tensor) -> dict:
    """On the toy, how well rewards [rows, 2] order the answers to a question as the true reward does, mean over questions: 1 always, 0 no better than
    chance, -1 never; ties of the true reward left out, of the rewards counted as one half. Elsewhere nothing. Answers to different questions are not
    compared: Bradley-Terry says nothing of them."""
    if toy.flip_share(args.data) is None or not len(rewards):
        return {}
    by_question: dict[str, list] = {}
    for (prompt, *answers), row in zip(rows.texts, rewards.tolist()):
        by_question.setdefault(prompt, []).extend((toy.true_reward(toy.row_of(prompt), answer), reward) for answer, reward in zip(answers, row))
    tables = [torch.tensor(found) for found in by_question.values()]  # [answers, 2] each: true reward, reward
    shares = [share for table in tables if (share := concordance(table[:, 1], table[:, 0])) is not None]
    return {"rank_correlation": 2 * sum(shares) / len(shares) - 1 if shares else None}


@functools.cache
def meteor_form() -> str | None:
    """Which METEOR can be computed here: "exact, stem and WordNet matches", "exact and stem matches" where WordNet's data is not installed, or None
    without nltk. Nothing is downloaded."""
    try:
        import nltk
    except ImportError:
        return None
    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        try:
            nltk.data.find("corpora/wordnet.zip")
        except LookupError:
            return "exact and stem matches"
    return "exact, stem and WordNet matches"


class NoSynonyms:
    """Stands for WordNet where its data is not installed."""

    def synsets(self, word: str) -> list:
        return []


def meteor(hypothesis: str, reference: str) -> float:
    """METEOR of two texts by nltk with its defaults (alpha .9, beta 3, gamma .5), lower-cased words between white space; 0 where one is empty.

    Raises InputError where nltk is not installed.
    """
    if meteor_form() is None:
        raise InputError("METEOR needs a package that is not installed: pip install nltk")
    from nltk.translate.meteor_score import single_meteor_score

    words = [text.lower().split() for text in (hypothesis, reference)]
    extra = {} if "WordNet" in meteor_form() else {"wordnet": NoSynonyms()}
    return single_meteor_score(words[1], words[0], **extra) if all(words) else 0.0


def sameness(prompts: list, answers: list[str], seed: int = 0, pairs: int = 200) -> dict:
    """How much answers to different prompts are alike, which shows a collapsed policy (arXiv 2310.16763).

    Returns:
        "meteor_similarity": mean METEOR of random pairs of answers to different prompts, in both directions (None without nltk, or with one prompt);
        "duplicate_share": share of such pairs that are the same text; "short_share": answers of three words or fewer; "length": words an answer.
    """
    rng, order = random.Random(seed), list(range(len(answers)))
    drawn = []
    for _ in range(20 * pairs):
        if len(drawn) < pairs and len(answers) > 1:
            i, j = rng.sample(order, 2)
            drawn += [(i, j)] if prompts[i] != prompts[j] else []
    both = [(meteor(answers[i], answers[j]) + meteor(answers[j], answers[i])) / 2 for i, j in drawn] if meteor_form() else []
    counts = [len(answer.split()) for answer in answers]
    return {
        "meteor_similarity": sum(both) / len(both) if both else None,
        "duplicate_share": sum(answers[i] == answers[j] for i, j in drawn) / len(drawn) if drawn else None,
        "short_share": sum(n <= 3 for n in counts) / len(counts) if counts else None,
        "length": sum(counts) / len(counts) if counts else None,
    }


def calibration_error(probabilities: torch.Tensor, answers: torch.Tensor) -> float:
    """Calibration of choices (arXiv 2310.16763): every (probability of a choice, whether it is the right one) goes into one of ten bins [lo, lo + .1), the
    last one closed; the mean over non-empty bins of (share of right ones - the bin's middle)^2.

    Args:
        probabilities: [questions, choices], summing to 1 over the choices that a question has; nan where it has fewer.
        answers: [questions], index of the right choice.
    """
    if probabilities.dim() != 2 or answers.shape != probabilities.shape[:1]:
        raise ValueError(f"expected probabilities [questions, choices] and answers [questions], got {tuple(probabilities.shape)} and {tuple(answers.shape)}")
    right = torch.zeros_like(probabilities).scatter_(1, answers[:, None].long(), 1.0)
    there = ~probabilities.isnan()
    p, right = probabilities[there].double(), right[there].double()
    bins = (p * 10 + 1e-6).floor().long().clamp(0, 9)  # float32 .7 * 10 is a little below 7
    gaps = [(right[bins == b].mean().item() - (b + 0.5) / 10) ** 2 for b in range(10) if bool((bins == b).any())]
    return sum(gaps) / len(gaps) if gaps else math.nan


@torch.no_grad()
def kl_of_samples(policy, reference, prompts: list[list[int]], completions: list[list[int]], pad_id: int, batch_size: int = 16, autocast=None) -> torch.Tensor:
    """KL(policy || reference) in nats along each completion sampled from the policy: [samples], float64.

    At each token the full-vocabulary KL is taken; its sum along samples of the policy at temperature 1 is an unbiased estimate of the KL per
    completion, never negative and of lower variance than the log-ratio of the sampled tokens.
    """
    device, values = next(policy.parameters()).device, []
    for start in range(0, len(prompts), batch_size):
        chunk = list(zip(prompts[start : start + batch_size], completions[start : start + batch_size]))
        length = max(len(p) + len(c) for p, c in chunk)
        ids = torch.tensor([p + c + [pad_id] * (length - len(p) - len(c)) for p, c in chunk], device=device)
        position = torch.arange(length, device=device)
        begin = torch.tensor([len(p) - 1 for p, _ in chunk], device=device)[:, None]
        end = torch.tensor([len(p) + len(c) for p, c in chunk], device=device)[:, None]
        inputs = {"input_ids": ids, "attention_mask": (position < end).long(), "use_cache": False}
        keep = length - min(len(p) - 1 for p, _ in chunk)
        with autocast() if autocast else torch.no_grad():
            log_p, log_q = (m(**inputs).logits[:, -keep:].float().log_softmax(-1) for m in (policy, reference))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).double()  # [batch, keep]
        mask = ((position >= begin) & (position < end - 1))[:, -keep:]  # position t predicts the token at t + 1
        values.append(kl.masked_fill(~mask, 0.0).sum(-1).cpu())
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def judge_samples(run, policy, reference, base: str, tokenizer, rows, n: int = 1, rewards=None, record: dict | None = None, look=None) -> dict:
    """What a policy says: `--kl-samples` answers sampled at temperature 1, spread over the distinct prompts of `rows`.

    Args:
        reference: the model to take the KL to, or None where the policy is the reference itself (the KL is then 0).
        base: the reference's folder.
        n, rewards: best of n. For each answer n are sampled, and the one with the largest reward counts; `rewards(batch)` -> [sequences].
        look: `look(prompts, answers)` -> more keys, from all answers as texts.
        record: words that name these answers in candidates.jsonl, where best of n writes all candidates with their rewards.

    Returns:
        "kl" in nats per completion; on the toy also "true_reward", "right_share", "rude_share", "frontier_efficiency"; and "samples", three
        [prompt, answer]. None where nothing can be sampled. For best of n the KL is an upper bound, log n - (n - 1)/n plus the mean
        log-ratio of the picked answers between policy and reference (exact where no two candidates tie), so the efficiency is a lower one.
    """
    args = run.args
    limit = runtime.context_length(policy) - args.max_new_tokens
    distinct = {json.dumps(t[0]): (t[0], e["prompt"]) for e, t in zip(rows, rows.texts) if len(e["prompt"]) <= limit}
    distinct = list(distinct.values())
    count = args.kl_samples
    if not distinct or count <= 0:
        return {"kl": None, "samples": []}
    order = [i * len(distinct) // count if count < len(distinct) else i % len(distinct) for i in range(count)]
    mine = run.share_out(order)  # every process runs the same number of passes
    prompts, tiny, pad = [distinct[i][1] for i in mine], runtime.is_tiny(policy), tokenizer.pad_token_id
    answers = sample(
        policy,
        [prompt for prompt in prompts for _ in range(n)],
        tokenizer,
        args.max_new_tokens,
        seed=args.seed + 1000 * run.rank + 1,
        batch_size=512 if tiny else 32,
        autocast=run.autocast,
    )
    kl = torch.zeros(len(mine), dtype=torch.float64)
    if n > 1:
        candidates = [{"prompt": p, "completions": answers[i * n : (i + 1) * n]} for i, p in enumerate(prompts)]
        scores = score_candidates(run, rewards, candidates, pad)  # [mine, n]
        best = scores.argmax(1).tolist()
        answers = [c["completions"][j] for c, j in zip(candidates, best)]
        texts = [[text_of(tokenizer, ids) for ids in c["completions"]] for c in candidates]
        lines = run.gather(
            [{**record, "prompt": distinct[i][0], "answers": t, "rewards": s, "picked": j} for i, t, s, j in zip(mine, texts, scores.tolist(), best)]
        )
        run.append("candidates.jsonl", lines[:count])
        if reference is not None:
            pairs = list(zip(prompts, answers))
            ratio = plain_logps(policy, pairs, pad, 256 if tiny else 8) - plain_logps(reference, pairs, pad, 256 if tiny else 8)
            kl = math.log(n) - (n - 1) / n + ratio.double()
    elif reference is not None:
        kl = kl_of_samples(policy, reference, prompts, answers, pad, batch_size=256 if tiny else 4, autocast=run.autocast)
    found = run.gather(list(zip(mine, [text_behind(tokenizer, p, ids) for p, ids in zip(prompts, answers)], kl.tolist())))[:count]
    result = {"kl": sum(nats for _, _, nats in found) / count}
    said = [(distinct[i][0], text) for i, text, _ in found]
    result |= look([prompt for prompt, _ in said], [text for _, text in said]) if look else {}
    if toy.flip_share(args.data) is not None:
        result |= toy.judge_answers(said)
        result["frontier_efficiency"] = None
        if reference is not None and tiny and len(tokenizer) < 1000:  # the frontier takes hundreds of answers to each question: cheap for tiny models only
            rewards_of_reference = toy.reference_rewards(said[0][0], toy.answers_of(reference, tokenizer, base, args.seed))
            result["frontier_efficiency"] = toy.frontier_efficiency(result["kl"], result["true_reward"], rewards_of_reference)
    first = {json.dumps(prompt): [prompt, text.strip()] for prompt, text in reversed(said)}
    result["samples"] = [first[k] for k in sorted(first)[:: max(1, len(first) // 3)][:3]]
    return result


def sample_rows(run, model, tokenizer, rows: list[dict], n: int) -> list[list[list[int]]]:
    """`n` answers sampled at temperature 1 to the prompt of each row, as token ids, [rows][n]; shared out over the processes."""
    limit = runtime.context_length(model)
    order = list(range(len(rows)))
    mine = run.share_out(order)
    room = min([run.args.max_new_tokens, *(limit - len(rows[i]["prompt"]) for i in order)])  # the longest prompt must leave room for its answer
    prompts = [rows[i]["prompt"] for i in mine for _ in range(n)]
    size = 512 if runtime.is_tiny(model) else 32
    answers = sample(model, prompts, tokenizer, room, seed=run.args.seed + 1000 * run.rank + 2, batch_size=size, autocast=run.autocast) if prompts else []
    return run.gather([answers[i * n : (i + 1) * n] for i in range(len(mine))])[: len(rows)]


@torch.no_grad()
def score_candidates(run, rewards, candidates: list[dict], pad_id: int) -> torch.Tensor:
    """Rewards of sampled answers, [prompts, n]: each answer in a line of its own, `rewards(batch)` -> [sequences]."""
    values, size = [], 64 if len(candidates[0]["completions"]) * data.row_length(candidates[0]) < 4096 else 4
    for start in range(0, len(candidates), size):
        chunk = candidates[start : start + size]
        with run.autocast():
            got = rewards(data.collate(chunk, pad_id, "rows", run.device))  # answer by answer
        values.append(got.float().cpu().view(-1, len(chunk)).T)
    return torch.cat(values)


# --------------------------------------------------------------------------------------------------------------- report

WORDS = {
    "preference_accuracy": "preferred answer more likely than the other",
    "reward_accuracy": "preferred answer has the higher reward",
    "margin_calibration": "calibration error of sigma(margin)",
    "rank_correlation": "rank correlation of reward and true reward",
    "logps_auc": "better labelled answer more likely than the other",
    "reward_auc": "better labelled answer has the higher reward",
    "perplexity": "perplexity per token of the demonstrations",
    "reward": "reward that it was trained on",
    "test_reward": "reward that it was not trained on",
    "meteor_similarity": "METEOR between answers to different prompts",
    "duplicate_share": "same answer to different prompts",
    "short_share": "answers of three words or fewer",
    "length": "words an answer",
    "kl": "KL to the reference, nats per answer",
    "true_reward": "true reward of sampled answers",
    "right_share": "right answers",
    "rude_share": "rude answers",
    "frontier_efficiency": "share of the best possible gain at this KL",
}


def print_report(run, columns: dict[str, dict]) -> None:
    """The end table in plain words, a line a key and a column a state of the policy, and three questions with their answers in each state.

    Args:
        columns: name ("before", "after", ...) -> split -> the dict that a script's `report` returns.
    """
    if not run.main:
        return
    titles = {"held_out": "On the questions trained for" if "unseen" in columns["before"] else "On held-out rows", "unseen": "On unseen questions"}
    width = max(9, *(len(name) + 2 for name in columns))
    for split in columns["before"]:
        keys = [k for k in WORDS if k in columns["before"][split]]
        if keys:
            print(f"\n{titles[split]:66}" + "".join(f"{name.replace('_', ' '):>{width}}" for name in columns))
        for key in keys:
            cells = ("-" if (v := values[split].get(key)) is None else f"{v:.3f}" for values in columns.values())
            print(f"  {WORDS[key] + ' (' + key + ')':64}" + "".join(f"{cell:>{width}}" for cell in cells))
    samples = {name: values["held_out"]["samples"] for name, values in columns.items() if "held_out" in values}
    if samples and samples["before"]:
        print("\nAnswers sampled at temperature 1")
    for i, (prompt, _) in enumerate(samples.get("before", [])):
        print(f"  {(prompt if isinstance(prompt, str) else prompt[-1]['content']).strip()[-300:]}")
        for name, values in samples.items():
            print(f"    {name.replace('_', ' '):{width}}{values[i][1][:400]}")
    print(f"\nThe model, its metrics and summary.json are in {run.folder}")


# ---------------------------------------------------------------------------------------------------------- command line


@dataclass
class Args:
    model: str
    """A folder, a hub id, or toy."""
    data: str
    """A file of preference pairs: .jsonl .json .csv .parquet, each also with .gz."""
    output: str = "scores.jsonl"
    """Where the lines go; an existing file is refused."""
    max_length: int | None = None
    """Limit in tokens for prompt and one completion; None: the smaller of 1024 and the model's context."""
    batch_size: int = 8
    """Sequences in one forward pass."""


def main(args: Args) -> None:
    """Scores every row of a file; see the module's docstring."""
    output = Path(args.output)
    if output.exists():
        raise InputError(f"--output {output}: the file exists already; choose another name.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}.")
    found = data.read_rows(args.data)
    for where, row in found:
        data.pair_of_row(where, row)  # a missing column stops here, before any work
    folder = runtime.resolve_model(args.model)
    tokenizer = runtime.load_tokenizer(folder)
    model = runtime.load_model(folder, "cuda" if torch.cuda.is_available() else "cpu", tokenizer).eval()
    if runtime.is_tiny(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    max_length = runtime.length_limit(args.max_length, model)
    head = runtime.load_weights(folder, "score.weight").get("score.weight")  # [1, hidden] where the folder is a dph.py run, or another reward model
    fields = ("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens") + (("chosen_reward", "rejected_reward") if head is not None else ())
    lines, examples, reasons = [], [], Counter()
    for number, (where, row) in enumerate(found):
        pair, reason = data.pair_of_row(where, row)
        if pair:
            example, reason, _ = data.encode(tokenizer, pair[0], list(pair[1:]), max_length)
        line = {"row": number, **dict.fromkeys(fields)}
        if reason:
            line["reason"] = reason
            reasons[reason] += 1
        else:
            examples.append((number, example))
        lines.append(line)
    examples.sort(key=lambda item: data.row_length(item[1]))
    step = max(1, args.batch_size // 2)
    for start in range(0, len(examples), step):
        chunk = examples[start : start + step]
        logps = plain_logps(model, sequences_of([e for _, e in chunk]), tokenizer.pad_token_id, args.batch_size).tolist()
        for i, (number, example) in enumerate(chunk):
            chosen, rejected = example["completions"]
            lines[number] |= {"chosen_logps": logps[i], "rejected_logps": logps[len(chunk) + i], "chosen_tokens": len(chosen), "rejected_tokens": len(rejected)}
            if head is not None:
                lines[number] |= dict(zip(fields[4:], plain_rewards(model, head, [(example["prompt"], ids) for ids in (chosen, rejected)])))
    aside = output.with_name(output.name + ".part")
    aside.write_text("".join(json.dumps(runtime.plain(line), allow_nan=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, output)
    scores = [[line["chosen_logps"], line["rejected_logps"]] for line in lines if line["chosen_logps"] is not None]
    dropped = "".join(f", {n:,} dropped ({reason})" for reason, n in reasons.most_common())
    share = accuracy(torch.tensor(scores).view(-1, 2))
    print(f"{len(lines):,} rows, {len(examples):,} scored{dropped}. Preference accuracy {'-' if share is None else f'{share:.3f}'}. Written to {output}.")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__))
