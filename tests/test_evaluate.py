"""The oracle, accuracy, KL, the choice of a layout, and `python -m common.evaluate` as a user runs
it.
"""

import contextlib
import gzip
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import dpo
from common import InputError, batches, data, evaluate, metrics, oracle
from common import models as model_loading
from judging import command
from tests import models

PAD, BOS, EOS = 0, 1, 2
ENDS = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)


def random_rows(count, vocabulary, seed=0, prompts=(1, 12), answers=(1, 9)):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    return [
        {"prompt": [BOS, *ids(*prompts)], "completions": [[*ids(*answers), *[EOS] * rng.randint(0, 1)] for _ in "ab"]}
        for _ in range(count)
    ]


# -- the oracle


@pytest.mark.parametrize("pad", [PAD, EOS, 77])
def test_the_oracle_knows_the_bigram_table(bigram, pad):
    """Prompts and answers of many lengths, cut answers among them, padded with an id that is
    padding, EOS or a word.
    """
    sequences = oracle.sequences_of(random_rows(13, len(bigram.table)))
    expected = torch.tensor([bigram.logps(*sequence) for sequence in sequences], dtype=torch.float64)
    logps = oracle.plain_logps(bigram.load(), sequences, pad, batch_size=5)
    assert logps.dtype == torch.float32
    assert (logps.double() - expected).abs().max() < 1e-4
    tokens, mask = oracle.plain_token_logps(bigram.load(), sequences, pad)
    assert mask.sum(1).tolist() == [len(completion) for _, completion in sequences]
    assert (tokens[~mask] == 0).all()
    for line, (prompt, completion) in enumerate(sequences):
        exact = [bigram.table[u, v].item() for u, v in itertools.pairwise([prompt[-1], *completion])]
        begin = len(prompt) - 1  # the column of the position that predicts the first completion token
        assert tokens[line, begin : begin + len(completion)].tolist() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_llama])
def test_the_oracle_does_not_depend_on_the_batch(build):
    """Against one unpadded sequence at a time, the shortest reading of the definition."""
    model, sequences = build(60), oracle.sequences_of(random_rows(9, 60))
    expected = []
    for prompt, completion in sequences:
        logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        expected.append(sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)))
    for batch_size in (1, 4, 64):
        assert oracle.plain_logps(model, sequences, PAD, batch_size).tolist() == pytest.approx(expected, abs=1e-4)


def test_log_probabilities_of_half_precision_logits_are_taken_in_float32(bigram):
    model, sequences = bigram.load().to(torch.bfloat16), oracle.sequences_of(random_rows(4, len(bigram.table)))
    rounded = bigram.table.to(torch.bfloat16).double()  # what the output layer holds now
    for value, (prompt, completion) in zip(oracle.plain_logps(model, sequences, PAD).tolist(), sequences):
        logps = rounded.log_softmax(-1)
        exact = sum(logps[u, v].item() for u, v in itertools.pairwise([prompt[-1], *completion]))
        assert value == pytest.approx(exact, abs=2e-3)  # a log-softmax in bfloat16 is off by about .02 a token
    tokens, _ = oracle.plain_token_logps(bigram.load().double(), sequences, PAD)
    assert tokens.dtype == torch.float64


def test_sequences_stand_in_the_order_of_collate():
    rows = random_rows(5, 60)
    batch = batches.collate(rows, PAD, "shared", "cpu")
    for s, (prompt, completion) in enumerate(oracle.sequences_of(rows)):
        assert batch["targets"][batch["sequence_ids"] == s].tolist() == completion
        assert rows[s % 5]["prompt"] == prompt


# -- accuracy


def test_accuracy_counts_ties_one_half():
    assert metrics.accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, -3.0]])) == 2.5 / 4
    assert metrics.accuracy(torch.tensor([[-5.0, -4.0]])) == 0
    assert metrics.accuracy(torch.zeros(3, 2)) == 0.5
    assert metrics.accuracy(torch.zeros(3, 2), ties_say_nothing=True) is None  # rewards before the first step
    assert metrics.accuracy(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), ties_say_nothing=True) == 0.75
    assert metrics.accuracy(torch.zeros(0, 2)) is None
    for wrong in (torch.zeros(3), torch.zeros(3, 3), torch.zeros(2, 3, 2)):
        with pytest.raises(ValueError, match=r"\[rows, 2\]"):
            metrics.accuracy(wrong)


# -- KL


def small_tables():
    """Policy and reference over <pad>, <s>, </s>, a, b."""
    return models.random_table(5, seed=1), models.random_table(5, seed=2)


def all_completions(longest: int):
    """Everything a model of these five tokens can say: ended by EOS, or cut at `longest` tokens."""
    ended = [[*words, EOS] for n in range(longest) for words in itertools.product((0, 1, 3, 4), repeat=n)]
    return ended + [list(words) for words in itertools.product((0, 1, 3, 4), repeat=longest)]


@pytest.mark.parametrize("prompt", [[BOS], [BOS, 3, 4]])
def test_kl_of_samples_is_exact_over_all_completions(prompt):
    """Weighted by their probability, the values along all completions add up to the sum of p log(p
    / q) over them.
    """
    p, q = small_tables()
    completions = all_completions(3)
    log_p, log_q = (
        torch.tensor([models.bigram_logps(table, prompt, c) for c in completions], dtype=torch.float64)
        for table in (p, q)
    )
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    kls = evaluate.kl_of_samples(
        models.bigram_model(p), models.bigram_model(q), [prompt] * len(completions), completions, PAD, batch_size=16
    )
    assert kls.dtype == torch.float64
    assert (log_p.exp() * kls).sum().item() == pytest.approx(exact, rel=1e-5)
    assert kls.min() > 0  # the log-ratio of a completion is often negative, its KL never
    assert (log_p - log_q).min() < -1
    # the other direction is another number
    back = evaluate.kl_of_samples(
        models.bigram_model(q), models.bigram_model(p), [prompt] * len(completions), completions, PAD
    )
    assert (log_q.exp() * back).sum().item() == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-5)
    assert abs((log_q.exp() * back).sum().item() - exact) > 0.05


def test_kl_along_one_completion_is_the_sum_over_its_tokens():
    p, q = small_tables()
    local = (p.exp() * (p - q)).sum(-1)  # [from], in nats
    prompts, completions = [[BOS, 3], [BOS], [BOS, 4, 4, 3]], [[4, EOS], [3, 3, 4], [EOS]]
    kls = evaluate.kl_of_samples(models.bigram_model(p), models.bigram_model(q), prompts, completions, PAD)
    exact = [
        sum(local[u].item() for u in [prompt[-1], *completion][:-1]) for prompt, completion in zip(prompts, completions)
    ]
    assert kls.tolist() == pytest.approx(exact, rel=1e-5)
    assert (
        evaluate.kl_of_samples(models.bigram_model(p), models.bigram_model(p), prompts, completions, PAD).abs().max()
        < 1e-6
    )
    assert evaluate.kl_of_samples(models.bigram_model(p), models.bigram_model(q), [], [], PAD).shape == (0,)


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_llama])
def test_kl_does_not_depend_on_the_batch(build):
    policy, reference = build(60), build(60, seed=1)
    prompts, completions = zip(*oracle.sequences_of(random_rows(9, 60)))
    expected = []
    for prompt, completion in zip(prompts, completions):
        log_p, log_q = (
            m(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            for m in (policy, reference)
        )
        expected.append((log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 : -1].sum().item())
    for batch_size in (1, 5, 64):
        assert evaluate.kl_of_samples(
            policy, reference, list(prompts), list(completions), PAD, batch_size
        ).tolist() == pytest.approx(expected, rel=1e-4)


# -- judgement of samples


def evaluated(policy, ref, rows, tokenizer, **changes):
    """What is measured of the policy's samples."""
    given = {"count": 2000, "max_new_tokens": 3, "seed": 0, "autocast": contextlib.nullcontext} | changes
    return evaluate.evaluate_samples(policy, ref, rows, tokenizer, **given)


def rows_of(tokenizer, texts):
    return data.encode_rows(tokenizer, [(text, " yes", " no") for text in texts], 64)


def test_the_kl_of_a_judgement_is_the_mean_over_prompts_and_samples():
    tokenizer = models.byte_tokenizer(bos=True, merges=())
    p, q = (torch.full((len(tokenizer), len(tokenizer)), -20.0, dtype=torch.float64) for _ in "pq")
    for table, small in zip((p, q), small_tables()):
        table[:5, :5] = small  # all other tokens are next to impossible
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    texts = [tokenizer.decode([3]), tokenizer.decode([4]), tokenizer.decode([3])]  # two distinct prompts
    rows = rows_of(tokenizer, texts)
    exact = []
    for prompt in (3, 4):
        completions = all_completions(3)
        log_p, log_q = (
            torch.tensor([models.bigram_logps(t, [prompt], c) for c in completions], dtype=torch.float64)
            for t in (p, q)
        )
        exact.append((log_p.exp() * (log_p - log_q)).sum().item())
    policy = models.bigram_model(p)
    measured = evaluated(policy, models.bigram_model(q), rows, tokenizer)
    assert measured["kl"] == pytest.approx(sum(exact) / 2, rel=0.05)
    assert 0 < measured["kl_se"] < 0.05 * measured["kl"]
    assert abs(measured["kl"] - sum(exact) / 2) < 4 * measured["kl_se"]
    assert [prompt for prompt, _ in measured["samples"]] == sorted(set(texts))
    assert set(measured) == {"kl", "kl_se", "samples"}  # the true reward is the toy's, and `judge` tells it
    alone = evaluated(policy, None, rows, tokenizer)
    assert (alone["kl"], alone["kl_se"]) == (0, None)  # nothing was estimated
    nothing = {"kl": None, "samples": []}
    assert evaluated(policy, None, rows, tokenizer, count=0) == nothing
    # No prompt leaves room for an answer in the model's 256 positions.
    assert evaluated(policy, None, rows, tokenizer, max_new_tokens=255) == nothing


def test_judges_are_asked_about_all_answers_and_their_kl(bigram):
    rows = rows_of(bigram.tokenizer, ["what is the capital of france ?", "what colour has snow ?"])
    asked = []

    def judge(answers, kl, ref):
        asked.append((answers, kl, ref))
        return {"true_reward": 1.5}

    def extra_metrics(prompts, answers):
        asked.append((prompts, answers))
        return {"length": len(answers)}

    ref = bigram.load()
    measured = evaluated(bigram.load(), ref, rows, bigram.tokenizer, count=6, judge=judge, extra_metrics=extra_metrics)
    assert (measured["true_reward"], measured["length"]) == (1.5, 6)
    (prompts, texts), (answers, kl, of) = asked
    assert answers == list(zip(prompts, texts))
    assert Counter(prompts) == {"what is the capital of france ?": 3, "what colour has snow ?": 3}
    assert (kl, of) == (measured["kl"], ref)


def test_best_of_n_picks_the_largest_reward_and_bounds_its_kl(bigram):
    rows = rows_of(bigram.tokenizer, ["what is the capital of france ?", "what colour has snow ?"])

    def rewards(batch):  # the answer with the largest sum of ids
        return torch.zeros(len(batch["completion_tokens"])).index_add(
            0, batch["sequence_ids"], batch["targets"].float()
        )

    picked = evaluated(bigram.load(), bigram.load(), rows, bigram.tokenizer, count=40, best_of=(4, rewards))
    # Policy and reference agree: what is left is the picking.
    assert picked["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-9)
    assert len(picked["candidates"]) == 40
    for line in picked["candidates"]:
        assert len(line["answers"]) == len(line["rewards"]) == 4
        assert line["rewards"][line["picked"]] == max(line["rewards"])
        ids = bigram.tokenizer.convert_tokens_to_ids(line["answers"][line["picked"]].split())
        assert line["rewards"][line["picked"]] in {sum(ids), sum(ids) + EOS}  # the reward is that of this answer
    prompts = {line["prompt"] for line in picked["candidates"]}
    assert prompts == {"what is the capital of france ?", "what colour has snow ?"}


def test_answers_are_sampled_for_each_row(bigram):
    """Each answer's first token follows its own row's prompt, and the longest prompt leaves room
    for its answer.
    """

    def sampled(model, rows, n, max_new_tokens=3):
        return evaluate.sample_rows(model, ENDS, rows, n, max_new_tokens, seed=0, autocast=contextlib.nullcontext)

    table = models.random_table(60, seed=3, spread=12.0)  # nearly always one word after another
    likeliest = table.argmax(-1)
    rows = [{"prompt": [BOS, *[5] * (i % 4), u], "completions": [[3]]} for i, u in enumerate(range(10, 30))]
    completions = sampled(models.bigram_model(table), rows, n=6)
    assert [len(answers) for answers in completions] == [6] * 20
    hits = [answer[0] == likeliest[row["prompt"][-1]] for row, answers in zip(rows, completions) for answer in answers]
    assert sum(hits) / len(hits) > 0.7
    long = sampled(bigram.load(), [{"prompt": [5] * 250, "completions": [[3]]}], n=20, max_new_tokens=99)
    assert max(len(answer) for answer in long[0]) == 6  # of 256 positions
    assert sampled(bigram.load(), [], n=2) == []


# -- the layout


def build(kind: str, **changes):
    """A small random model of a kind, its weights wide enough for every part to matter."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 60, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama |= {"max_position_embeddings": 128}
    shape = {
        "Llama": llama,
        "Mistral": llama,
        "Gemma2": llama | {"head_dim": 8, "sliding_window": 128},
        "Gemma3Text": llama | {"head_dim": 8, "sliding_window": 128},
        "Cohere": llama,
        "Granite": llama,
        "Phi": llama | {"num_key_value_heads": 4},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    }[kind]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**(common | shape | changes))
    )
    model_loading.disable_dropout(model)
    return models.spread_biases(model)


def gap(model, rows, layout):
    """Largest difference in nats between a layout's log-probabilities and the oracle's; infinite
    where the model does not take it.
    """
    expected = oracle.plain_logps(model, oracle.sequences_of(rows), PAD)
    try:
        with torch.no_grad():
            return (
                (dpo.completion_logps(model, batches.collate(rows, PAD, layout, "cpu")) - expected).abs().max().item()
            )
    except (TypeError, ValueError, RuntimeError):
        return float("inf")


def chosen(model, rows, share_prompt=True):
    """The chosen layout and what was printed."""
    printed: list[str] = []
    logps = model_loading.bind_forward(model, dpo.completion_logps)
    return oracle.choose_layout(
        logps, model, {"train": rows, "held_out": rows[:2]}, PAD, "cpu", share_prompt, printed.append
    ), printed


LAYOUTS = ("shared", "rows", "model_head")


@pytest.mark.parametrize(
    ("kind", "changes", "layout"),
    [
        ("Llama", {}, "shared"),
        ("GPT2", {}, "shared"),
        ("Mistral", {"sliding_window": 64}, "shared"),  # all rows are shorter than the window
        ("Phi", {}, "shared"),  # a bias in the output layer
        ("GPTJ", {}, "shared"),
        ("Mistral", {"sliding_window": 8}, "rows"),
        ("Gemma2", {"sliding_window": 8, "final_logit_softcapping": None}, "rows"),
        ("Bloom", {}, "rows"),  # ALiBi
        ("Mpt", {}, "rows"),
        ("Gemma2", {"final_logit_softcapping": 5.0}, "model_head"),
        ("Gemma3Text", {"final_logit_softcapping": 5.0}, "model_head"),
        ("Cohere", {}, "model_head"),  # logits are scaled
        ("Granite", {"logits_scaling": 4.0}, "model_head"),
    ],
)
def test_the_fastest_layout_that_is_right_is_chosen(kind, changes, layout):
    model, rows = build(kind, **changes), random_rows(12, 60)
    layout_chosen, printed = chosen(model, rows)
    assert layout_chosen == layout
    assert bool(printed) == (layout != "shared")
    for faster in LAYOUTS[: LAYOUTS.index(layout)]:
        assert gap(model, rows, faster) > 1e-2
    for right in LAYOUTS[LAYOUTS.index(layout) :]:
        assert gap(model, rows, right) < 1e-4


@pytest.mark.parametrize("kind", ["Phi", "GPTJ"])
def test_a_bias_in_the_output_layer_counts(kind):
    model, rows = build(kind), random_rows(6, 60)
    before = dpo.completion_logps(model, batches.collate(rows, PAD, "shared", "cpu"))
    assert gap(model, rows, "shared") < 1e-4
    with torch.no_grad():
        model.get_output_embeddings().bias.zero_()
    assert (dpo.completion_logps(model, batches.collate(rows, PAD, "shared", "cpu")) - before).abs().max() > 1


def test_a_cap_is_seen_where_it_still_changes_nothing():
    """Logits of a model at its start are so small that a cap of 30 is invisible; training makes
    them grow.
    """
    model, rows = build("Gemma2", initializer_range=0.02), random_rows(12, 60)
    assert model.config.final_logit_softcapping == 30
    assert gap(model, rows, "shared") < 1e-4
    layout_chosen, (printed,) = chosen(model, rows)
    assert layout_chosen == "model_head"
    assert "scales or caps its logits" in printed


def test_a_window_is_seen_where_only_one_row_is_longer():
    """The longest row of both answers together need not be the one with the longest prompt and
    answer.
    """
    model = build("Mistral", sliding_window=24)
    many = {
        "prompt": [BOS, *range(3, 13)],
        "completions": [list(range(4, 16)), list(range(14, 26))],
    }  # 35 tokens, 23 with one answer
    deep = {"prompt": [BOS, *range(3, 28)], "completions": [[9], [4, EOS]]}  # 29 tokens, 28 with one answer
    assert gap(model, [many], "shared") < 1e-4
    assert gap(model, [deep], "shared") > 1e-2
    assert chosen(model, [many] * 3)[0] == "shared"
    assert chosen(model, [many, deep, many])[0] == "rows"


def test_a_prompt_need_not_be_shared(tiny_llama):
    model, rows = model_loading.load_model(str(tiny_llama), "cpu"), random_rows(5, 60)
    assert chosen(model, rows, share_prompt=False) == ("rows", [])


def test_a_model_that_no_layout_fits_is_refused():
    model, rows = build("Llama"), random_rows(5, 60)
    with pytest.raises(InputError, match="cannot be trained"):
        oracle.choose_layout(
            lambda batch: torch.zeros(2), model, {"train": rows}, PAD, "cpu", True, lambda *words: None
        )


# -- command line


def evaluate_file(root, *words):
    """`python -m common.evaluate` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "common.evaluate", *map(str, words)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_command_scores_every_row_in_order(root, bigram, tmp_path):
    question = "what is the capital of france ?"
    rows = [
        {"prompt": question, "chosen": " it is paris .", "rejected": " it is rome , you fool ."},
        {"prompt": question, "chosen": "", "rejected": " it is rome ."},
        {"prompt": "what colour has snow ?", "chosen": " it is white", "rejected": " it is black , my friend ."},
        {"prompt": question, "chosen": " paris", "rejected": " paris"},
        {"chosen": "it is white .", "rejected": "it is black ."},  # an implicit prompt
        {"prompt": question, "chosen": 3, "rejected": " paris"},
        {"prompt": " ".join(["what"] * 40), "chosen": " paris", "rejected": " rome"},
        {"prompt": question, "chosen": " it" * 30, "rejected": " it is rome"},  # cut
    ]
    path, output = tmp_path / "rows.jsonl.gz", tmp_path / "scores.jsonl"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    done = evaluate_file(
        root, "--model", bigram.folder, "--data", path, "--output", output, "--max-length", 24, "--batch-size", 3
    )
    assert done.returncode == 0, done.stderr
    lines = read_lines(output)
    assert [line["row"] for line in lines] == list(range(8))
    reasons = {
        1: "an answer is empty",
        3: "both answers are identical",
        5: "a field is neither text nor chat messages",
        6: "the prompt alone fills max_length",
    }
    assert {line["row"]: line["reason"] for line in lines if "reason" in line} == reasons
    wins = []
    for line, row in zip(lines, rows):
        keys = ("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")
        if line["row"] in reasons:
            assert [line[key] for key in keys] == [None] * 4
            continue
        assert set(line) == {"row", *keys}
        prompt = bigram.tokenizer(row.get("prompt", "it is")).input_ids
        for side in ("chosen", "rejected"):
            text = row[side] if "prompt" in row else row[side].removeprefix("it is")
            ids = [*bigram.tokenizer(text).input_ids[1:], EOS][: 24 - len(prompt)]
            assert line[f"{side}_tokens"] == len(ids)
            assert line[f"{side}_logps"] == pytest.approx(bigram.logps(prompt, ids), abs=1e-4)
        wins.append(line["chosen_logps"] > line["rejected_logps"])
    assert lines[7]["chosen_tokens"] == 24 - 8
    assert done.stdout.strip() == (
        "8 rows, 4 scored, 1 dropped (an answer is empty), 1 dropped (both answers are identical), "
        "1 dropped (a field is neither text nor chat messages), 1 dropped (the prompt alone fills max_length). "
        f"Preference accuracy {sum(wins) / 4:.3f}. Written to {output}."
    )


def test_bad_input_ends_the_command_with_one_sentence(root, bigram, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"chosen": "p a", "rejected": "p b"}\n{"chosen": "p a"\n')
    done = evaluate_file(root, "--model", bigram.folder, "--data", path, "--output", tmp_path / "scores.jsonl")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith(f"{path}, line 2: not valid JSON")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "scores.jsonl").exists()


def test_refusals_come_before_any_work(bigram, tmp_path):
    path, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}\n')
    output.write_text("mine")

    def refused(**changes):
        with pytest.raises(InputError) as caught:
            command.main(
                command.Args(
                    **(
                        {"model": str(bigram.folder), "data": str(path), "output": str(tmp_path / "new.jsonl")}
                        | changes
                    )
                )
            )
        return caught.value.code

    assert refused(output=str(output)) == f"--output {output}: the file exists already; choose another name."
    assert output.read_text() == "mine"
    assert refused(output=str(tmp_path / "no" / "scores.jsonl")).startswith(
        f"--output {tmp_path}/no/scores.jsonl: there is no folder"
    )
    assert f'{path}, line 2: no field "rejected"' in refused(
        model="no/such-model"
    )  # the rows are read before the model is looked for
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "scores.jsonl"]


def test_a_file_without_a_usable_row_gives_nulls(bigram, tmp_path, capsys):
    path, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    command.main(command.Args(model=str(bigram.folder), data=str(path), output=str(output)))
    assert read_lines(output) == [
        {
            "row": 0,
            "chosen_logps": None,
            "rejected_logps": None,
            "chosen_tokens": None,
            "rejected_tokens": None,
            "reason": "both answers are identical",
        }
    ]
    assert "1 rows, 0 scored, 1 dropped (both answers are identical). Preference accuracy -." in capsys.readouterr().out


def test_a_real_model_on_real_dialogues(preference_data, tmp_path):
    """The tiny stories model on published dialogues: every number against one unpadded forward pass
    a sequence.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = preference_data / "models" / "stories260K"
    with gzip.open(preference_data / "pairs" / "hh_harmless_base.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 40)]
    path, output = tmp_path / "hh.jsonl", tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.main(command.Args(model=str(folder), data=str(path), output=str(output)))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    lines, limit = read_lines(output), model.config.max_position_embeddings
    assert len(lines) == 40
    assert {line.get("reason") for line in lines} <= {None, "the prompt alone fills max_length"}
    cut = 0
    for line, row in zip(lines, rows):
        shared = next((i for i, (a, b) in enumerate(zip(row["chosen"], row["rejected"])) if a != b), None)
        begin = row["chosen"][:shared].rfind("\n\nAssistant:") + len("\n\nAssistant:")
        prompt = tokenizer(row["chosen"][:begin]).input_ids
        assert ("reason" in line) == (len(prompt) >= limit)
        for side in ("chosen", "rejected") if "reason" not in line else ():
            ids = [*tokenizer(row[side]).input_ids, tokenizer.eos_token_id]
            assert ids[: len(prompt)] == prompt
            cut += len(ids) > limit
            ids = ids[:limit]
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            exact = sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
            assert line[f"{side}_tokens"] == len(ids) - len(prompt)
            assert line[f"{side}_logps"] == pytest.approx(exact, abs=2e-3, rel=1e-6)
    assert cut > 0
    assert sum("reason" not in line for line in lines) > 20
