"""The end table of a run: what each metric is called, a column a state of the model; samples."""

from pathlib import Path

from common.processes import print0

METRICS = {  # what the end table calls each metric, in this order
    "preference_accuracy": "preferred answer more likely than the other",
    "reward_accuracy": "preferred answer has the higher reward",
    "margin_calibration": "calibration error of sigma(margin)",
    "rank_correlation": "rank correlation of reward and true reward",
    "logps_auc": "better labelled answer more likely than the other",
    "reward_auc": "better labelled answer has the higher reward",
    "reward": "reward that it was trained on",
    "test_reward": "reward that it was not trained on",
    "meteor_similarity": "METEOR between answers to different prompts",
    "duplicate_share": "same answer to different prompts",
    "short_share": "answers of three words or fewer",
    "length": "words an answer",
    "kl": "KL to the reference, nats per answer",
    "true_reward": "true reward of sampled answers",
    "misalignment": "mean score of samples",
    "expected_max": "expected maximum of 25 samples",
    "share_above": "samples with a score above the limit",
    "red_team_best": "mean score behind the red team's best prompt",
    "red_team_mean": "mean score behind the red team's prompts",
    "right_share": "right answers, or sentences that state a right fact",
    "rude_share": "rude answers",
    "frontier_efficiency": "share of the best possible gain at this KL",
    "perplexity": "perplexity per token of held-out text",
    "perplexity_good": "the same on good segments",
    "kl_to_teacher": "KL(teacher || model), nats per sequence",
    "sample_tokens": "mean length of a sample, tokens",
    "distinct_2": "different pairs of tokens among all",
    "token_entropy": "entropy of the tokens, nats",
    "self_bleu": "Self-BLEU of the samples",
}


TRAINED, HELD_OUT, UNSEEN = "On the questions trained for", "On held-out rows", "On unseen questions"


def cell(metrics: dict, name: str) -> str:
    """One number of the end table, with its standard error where there is one."""
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "-"
    number = f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
    return number if error is None else f"{number} ± {error:.2g}"


def print_end_table(columns: dict[str, dict], folder: Path, speed: float | None) -> None:
    """The end table, a line a metric and a column a state of the model; then samples of each state.

    Args:
        columns: name -> split -> metrics, with "samples": [prompt, answer] or texts.
        speed: tokens a second.
    """
    splits = next(iter(columns.values())).keys()
    trained = TRAINED if "unseen" in splits else HELD_OUT
    words = [cell(metrics, name) for column in columns.values() for metrics in column.values() for name in METRICS]
    width = max(17, *(len(word) + 2 for word in [*columns, *words]))
    heads = "".join(f"{name.replace('_', ' '):>{width}}" for name in columns)
    for split in splits:
        states = [column[split] for column in columns.values()]
        names = [name for name in METRICS if any(metrics.get(name) is not None for metrics in states)]
        if names:
            print0(f"\n{trained if split == 'held_out' else UNSEEN:66}{heads}")
        for name in names:
            cells = "".join(f"{cell(metrics, name):>{width}}" for metrics in states)
            print0(f"  {f'{METRICS[name]} ({name})':64}{cells}")
    print_samples({name: column["held_out"].get("samples", []) for name, column in columns.items()})
    print0(f"\n{speed or 0:,.0f} tokens a second. The model, its metrics and summary.json are in {folder}")


def print_samples(samples: dict[str, list]) -> None:
    """Three samples of each state of the model, below their prompt where they have one."""
    width = max(map(len, samples)) + 2
    for i in range(max(map(len, samples.values()))):
        print0("\nSampled" if i == 0 else "")
        for name, items in samples.items():
            prompt, text = ("", items[i]) if isinstance(items[i], str) else items[i]
            prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            if prompt and name == next(iter(samples)):
                print0(f"  {prompt.strip()[-300:]}")
            lines = [line[:400] for line in text.strip("\n").split("\n")[:12]]
            print0(f"    {name.replace('_', ' '):{width}}" + f"\n{'':{width + 4}}".join(lines))
