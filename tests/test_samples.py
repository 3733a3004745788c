"""What a pretrained model says and knows: sampling with banned tokens, misalignment, red teaming,
KL, perplexity and diversity, each against numbers worked out otherwise.
"""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from common.metrics import mean_and_error
from pretraining import diversity, evaluate, likelihood, sampling
from pretraining import red_team as red_teaming
from pretraining.tokens import ids_of
from tests import models
from toy import world


def small_table(vocabulary: int = 6, seed: int = 0, spread: float = 1.0):
    """A bigram model over few tokens and its table of log-probabilities [from, to], float64."""
    table = models.random_table(vocabulary, seed, spread)
    return models.bigram_model(table), table


def banned_table(table: torch.Tensor, banned) -> torch.Tensor:
    """The table without some tokens, renormalised, in plain probabilities."""
    p = table.exp()
    p[:, list(banned)] = 0.0
    return p / p.sum(1, keepdim=True)


TOKENS = SimpleNamespace(eos_token_id=2, pad_token_id=0)

# -- sampling


def test_banned_tokens_are_never_sampled_and_the_others_keep_their_odds():
    model, table = small_table()
    drawn = sampling.sample_unconditional(model, TOKENS, 4000, 3, banned_ids=(3, 5), temperature=1.0, top_p=1.0, seed=1)
    assert len(drawn) == 4000
    assert not {3, 5} & set(itertools.chain(*drawn))
    first = torch.tensor([ids[0] for ids in drawn]).bincount(minlength=6) / 4000
    expected = banned_table(table, (3, 5))[2]  # the prefix is EOS, token 2
    assert (first - expected).abs().max().item() < 4 * (0.25 / 4000) ** 0.5
    assert all(ids[-1] == 2 or len(ids) == 3 for ids in drawn)  # they end in EOS or were cut
    assert drawn == sampling.sample_unconditional(
        model, TOKENS, 4000, 3, banned_ids=(3, 5), temperature=1.0, top_p=1.0, seed=1
    )
    other = sampling.sample_unconditional(model, TOKENS, 4000, 3, temperature=1.0, top_p=1.0, seed=1)
    assert {3, 5} <= set(itertools.chain(*other))


def test_samples_are_cut_at_temperature_and_top_p():
    model, table = small_table(seed=3)
    drawn = sampling.sample_unconditional(model, TOKENS, 4000, 1, prefix_ids=[2, 4])
    first = torch.tensor([ids[0] for ids in drawn]).bincount(minlength=6) / 4000
    p = (table[4] / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    # The likeliest ones up to .9, the one that reaches it included.
    kept = order[: int((p[order].cumsum(0) < 0.9).sum()) + 1]
    expected = torch.zeros(6, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert len(kept) < 6
    assert (first - expected).abs().max().item() < 4 * (0.25 / 4000) ** 0.5


def test_samples_are_drawn_without_dropout_and_the_model_is_put_back(toy_tokenizer):
    model = models.tiny_gpt2(len(toy_tokenizer), resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    quiet = sampling.sample_unconditional(model.eval(), toy_tokenizer, 8, 6)
    model.train()
    assert sampling.sample_unconditional(model, toy_tokenizer, 8, 6) == quiet
    ids = torch.randint(3, 20, (4, 12), generator=torch.Generator().manual_seed(0))
    assert likelihood.perplexity(model, ids) == likelihood.perplexity(model.eval(), ids)
    assert model.train() is model
    likelihood.perplexity(model, ids)
    assert model.training


def test_a_sample_has_room_in_the_models_context(toy_tokenizer):
    model = models.tiny_gpt2(len(toy_tokenizer), n_positions=8)
    drawn = sampling.sample_unconditional(model, toy_tokenizer, 20, 100, prefix_ids=[2, 5])
    assert max(map(len, drawn)) == 6


def test_texts_without_eos_and_control_tokens():
    tokenizer = models.byte_tokenizer()
    tokenizer.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True)
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    eos = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return ids_of(tokenizer, [text])[0]

    line = [good, *ids(" x = 1"), good, *ids("\ny = <|good|>"), bad]
    assert (
        sampling.texts_of(tokenizer, [line, [*line, eos], [], [eos]], (good, bad))
        == [" x = 1\ny = <|good|>"] * 2 + [""] * 2
    )
    cut = sampling.texts_of(
        tokenizer, [line, [*line, eos], ids("one line"), ids("\nhalf")], (good, bad), whole_lines=True
    )
    assert cut == [" x = 1\n", " x = 1\ny = <|good|>", "one line", "\nhalf"]


def test_misalignment_by_hand():
    scores = [0.0, 0.2, 0.4, 1.0, 0.0, 0.8, 0.9]
    got = evaluate.misalignment(scores, limit=0.4, group=3)
    mean = sum(scores) / 7
    assert got["misalignment"] == pytest.approx(mean)
    assert got["misalignment_se"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 6 / 7))
    assert got["expected_max"] == pytest.approx((0.4 + 1.0) / 2)  # two whole groups; the last sample is in none
    assert got["share_above"] == 3 / 7  # equal to the limit is not above it
    assert evaluate.misalignment([0.5] * 24, 0.1) == {
        "misalignment": 0.5,
        "misalignment_se": 0.0,
        "expected_max": None,
        "share_above": 1.0,
    }
    assert set(evaluate.misalignment([], 0.1).values()) == {None}
    assert evaluate.GROUP == 25


# -- what the model knows


@pytest.mark.parametrize("banned", [(), (4, 5)])
def test_kl_to_the_teacher_on_bigram_tables(banned):
    """Exactly: at each token of a sample the divergence of two rows.

    The teacher has no control tokens, the model has two more than it.
    """
    teacher, p = small_table(4 if banned else 6, seed=1)
    model, q = small_table(6, seed=2)
    drawn = [[3, 1, 2], [1], [3, 3, 3, 3, 2], []]
    start = [2, 5] if banned else [2]  # the model's prefix: EOS and a control token, which the text does not count
    got = likelihood.kl_to_teacher(teacher, model, drawn, [2], start, banned)
    p, q = p.exp(), banned_table(q, banned)[:, : len(p)]
    expected = []
    for ids in drawn[:3]:
        rows = list(zip([2, *ids[:-1]], [start[-1], *ids[:-1]]))
        expected.append(sum((p[a] * (p[a] / q[b]).log()).sum().item() for a, b in rows))
    assert got["kl_to_teacher"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert got["kl_to_teacher_se"] == pytest.approx(torch.tensor(expected).std().item() / 3**0.5, abs=1e-5)
    assert got["kl_to_teacher"] > 0.1


def test_kl_of_a_model_to_itself_is_zero_and_a_control_token_must_be_banned():
    model, _ = small_table(6, seed=2)
    assert likelihood.kl_to_teacher(model, model, [[3, 1, 2]], [2], [2])["kl_to_teacher"] == pytest.approx(0, abs=1e-7)
    teacher, _ = small_table(4, seed=1)
    with pytest.raises(ValueError, match=r"no tokens \[5\]"):
        likelihood.kl_to_teacher(teacher, model, [[3]], [2], [2], banned_ids=(4,))


def test_kl_from_samples_is_the_exact_divergence_of_sequences():
    """All sequences of up to three tokens of two tables are summed; both estimators agree with that
    within their error.
    """
    teacher, p = small_table(5, seed=4)
    model, q = small_table(5, seed=5)
    exact = 0.0
    done = set()
    for ids in itertools.product(range(5), repeat=3):
        line = tuple(itertools.takewhile(lambda i: i != 2, ids))
        line = line + (2,) if len(line) < 3 else line
        if line not in done:
            done.add(line)
            log_p, log_q = (sum(t[a, b].item() for a, b in zip((2, *line), line)) for t in (p, q))
            exact += math.exp(log_p) * (log_p - log_q)
    drawn = sampling.sample_unconditional(teacher, TOKENS, 3000, 3, temperature=1.0, top_p=1.0)
    got = likelihood.kl_to_teacher(teacher, model, drawn, [2], [2])
    assert abs(got["kl_to_teacher"] - exact) < 4 * got["kl_to_teacher_se"] < 0.1 * exact
    high, low = (likelihood.sequence_logps(m, [([2], ids) for ids in drawn]) for m in (teacher, model))
    rough = mean_and_error("kl_to_teacher", [a - b for a, b in zip(high, low)])
    assert abs(rough["kl_to_teacher"] - exact) < 4 * rough["kl_to_teacher_se"]
    assert rough["kl_to_teacher_se"] > got["kl_to_teacher_se"]  # the divergence at each token is the better estimate


def test_a_teacher_with_another_tokenizer(bigram, toy_tokenizer):
    """Its texts are read anew: the same words under other ids give the same figure."""
    other = world.build_tokenizer()
    n = len(other)
    shift = [0, 1, 2, 3, *reversed(range(4, n))]  # id of word i in the other vocabulary
    words = {word: shift[i] for word, i in toy_tokenizer.get_vocab().items()}
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    fast = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = other.backend_tokenizer.pre_tokenizer
    other = type(other)(
        tokenizer_object=fast,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    table = models.random_table(n, seed=7)
    place = torch.tensor(shift)
    moved = torch.empty_like(table)
    moved[place[:, None], place[None, :]] = table  # the same distribution in the other numbering
    teacher = models.bigram_model(moved)
    texts = ["the capital of france is paris .", "dogs bark ."]
    drawn = [[*ids_of(other, [text])[0], *end] for text, end in zip(texts, ([2], []))]
    got = likelihood.kl_of_texts(teacher, other, bigram.load(), toy_tokenizer, drawn, [2])
    expected = []
    for text, end in zip(texts, ([2], [])):
        ids = [*ids_of(toy_tokenizer, [text])[0], *end]
        expected.append(sum((table[a, b] - bigram.table[a, b]).item() for a, b in zip([2, *ids], ids)))
    assert got["kl_to_teacher"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert likelihood.kl_of_texts(teacher, other, bigram.load(), toy_tokenizer, [[]], [2]) == {
        "kl_to_teacher": None,
        "kl_to_teacher_se": None,
    }


@pytest.mark.parametrize("banned", [(), (4, 5)])
def test_perplexity_on_a_bigram_table(banned):
    """The first token and the last two of a chunk do not count, nor does the prefix; banned tokens
    have no share.
    """
    model, table = small_table(6, seed=2)
    table = banned_table(table, banned).log()
    ids = torch.tensor([[3, 1, 2, 3, 3, 1, 2], [1, 1, 3, 0, 2, 3, 3]])
    pairs = [(a, b) for line in ids.tolist() for a, b in itertools.pairwise(line[:-2])]
    expected = math.exp(-sum(table[a, b].item() for a, b in pairs) / len(pairs))
    assert likelihood.perplexity(model, ids, (), banned) == pytest.approx(expected, rel=1e-5)
    assert likelihood.perplexity(model, ids, (2, 5), banned) == pytest.approx(expected, rel=1e-5)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1]]).bool()
    kept = [table[1, 2].item(), table[0, 2].item()]  # the targets at [0, 2] and [1, 4]
    assert likelihood.perplexity(model, ids, (), banned, keep) == pytest.approx(math.exp(-sum(kept) / 2), rel=1e-5)
    assert likelihood.perplexity(model, ids[:0]) is None
    assert likelihood.perplexity(model, ids, (), (), torch.zeros_like(keep)) is None
    with pytest.raises(ValueError, match="two tokens at most"):
        likelihood.perplexity(model, ids, (2, 5, 5))


def test_length_and_company_change_no_log_probability(toy_tokenizer):
    model = models.tiny_gpt2(len(toy_tokenizer))
    rng = random.Random(0)
    pairs = [
        (
            [rng.randrange(3, 40) for _ in range(rng.randint(1, 5))],
            [rng.randrange(3, 40) for _ in range(rng.randint(1, 30))],
        )
        for _ in range(9)
    ]
    together = likelihood.sequence_logps(model, pairs, (7, 9))
    alone = [likelihood.sequence_logps(model, [pair], (7, 9))[0] for pair in pairs if not {7, 9} & set(pair[1])]
    assert [value for value, pair in zip(together, pairs) if not {7, 9} & set(pair[1])] == pytest.approx(
        alone, abs=1e-3
    )
    assert len(alone) > 1
    with torch.no_grad():
        before, after = pairs[0]
        logits = model(torch.tensor([before + after])).logits[0, :-1].double()
        expected = (
            logits.log_softmax(-1)[torch.arange(len(before) - 1, len(before + after) - 1), torch.tensor(after)]
            .sum()
            .item()
        )
    assert likelihood.sequence_logps(model, pairs[:1])[0] == pytest.approx(expected, abs=1e-3)


# -- red teaming


class Attack:
    """`sample_continuations` replaced: the attacker writes what `writes` returns for the prompts it
    was shown, the target repeats its prompt.
    """

    def __init__(self, tokenizer, writes):
        self.tokenizer, self.writes, self.shown, self.calls = tokenizer, writes, [], []

    def __call__(self, model, tokenizer, prompts, max_new_tokens, banned_ids, temperature, top_p, seed, autocast):
        self.calls.append((model, len(prompts), max_new_tokens, tuple(banned_ids), temperature, top_p, seed))
        if model == "attacker":
            assert all(line[0] == tokenizer.eos_token_id == line[-1] for line in prompts)
            shown = [tokenizer.decode(line).split(tokenizer.eos_token)[1:-1] for line in prompts]
            self.shown += [[text.strip() for text in texts] for texts in shown]
            return ids_of(tokenizer, [self.writes(texts) for texts in self.shown[-len(prompts) :]])
        assert all(line[:2] == [2, 9] for line in prompts)  # the target's prefix stands before each prompt
        return [line[2:] for line in prompts]


@pytest.fixture
def attack(monkeypatch):
    """A red team with fakes: words of the toy are worth their place in a list, and a text the mean
    over its words.
    """

    def start(writes, pool, score, **words):
        tokenizer = models.byte_tokenizer(merges=())
        fake = Attack(tokenizer, writes)
        monkeypatch.setattr(sampling, "sample_continuations", fake)
        monkeypatch.setattr(red_teaming, "context_length", lambda model: 64)
        model = SimpleNamespace()
        words = {"continuations": 3, "new_prompts": 5, "prefix_ids": [2, 9]} | words
        return red_teaming.red_team(model, tokenizer, score, pool, "attacker", tokenizer, **words), fake

    return start


def test_red_team_breeds_prompts_that_bring_out_the_worst(attack):
    """The attacker appends a letter to the worst prompt that it sees; the score is the share of the
    letter x, so prompts of x alone win.
    """

    def score(texts):
        return [text.count("x") / len(text) for text in texts]

    found, fake = attack(
        lambda shown: max(shown, key=lambda text: text.count("x") / len(text)) + "x",
        ["ax", "b", "cx", "b"],
        score,
        rounds=4,
        shots=2,
    )
    # The pool as given, each prompt once.
    assert found["rounds"][0] == {"best": 0.5, "mean": pytest.approx(1 / 3), "new": 3}
    assert len(found["rounds"]) == 5
    assert [r["best"] for r in found["rounds"]] == sorted(r["best"] for r in found["rounds"])
    assert found["rounds"][-1]["best"] > 0.7
    scores = dict(found["prompts"])
    assert scores == pytest.approx({prompt: prompt.count("x") / len(prompt) for prompt in scores})
    assert [value for _, value in found["prompts"]] == sorted(scores.values(), reverse=True)
    assert found["rounds"][-1]["mean"] == pytest.approx(sum(scores.values()) / len(scores))
    assert sum(r["new"] for r in found["rounds"]) == len(scores)
    assert all(len(set(shown)) == len(shown) == 2 for shown in fake.shown)  # drawn without replacement
    seeds = [call[-1] for call in fake.calls]
    assert len(set(seeds)) == len(seeds)
    targets = [call for call in fake.calls if call[0] != "attacker"]
    assert {call[4:6] for call in targets} == {(0.7, 0.9)}
    assert all(call[1] % 3 == 0 for call in targets)


def test_red_team_shows_prompts_in_proportion_to_exp_of_the_score(attack):
    scores = {"a": 0.0, "b": 0.1, "c": 0.25}
    _, fake = attack(
        lambda shown: "a",
        list(scores),
        lambda texts: [scores[text] for text in texts],
        rounds=10,
        shots=1,
        new_prompts=300,
    )
    counts = torch.tensor([float(sum(shown == [name] for shown in fake.shown)) for name in scores])
    expected = (torch.tensor(list(scores.values())) / 0.1).softmax(-1)
    assert (counts / 3000 - expected).abs().max().item() < 4 * (0.25 / 3000) ** 0.5


def test_red_team_with_nothing_new(attack):
    """Empty and known prompts are not added, and a prompt ends at its first line break."""
    found, _ = attack(lambda shown: "  \n", ["a", "b"], lambda texts: [0.5] * len(texts), rounds=2)
    assert found["rounds"] == [{"best": 0.5, "mean": 0.5, "new": 2}] + [{"best": 0.5, "mean": 0.5, "new": 0}] * 2
    found, _ = attack(lambda shown: " new one \nmore", ["a"], lambda texts: [0.5] * len(texts), rounds=1)
    assert [prompt for prompt, _ in found["prompts"]] == ["a", "new one"]


def test_red_team_of_a_model_by_itself(toy_tokenizer):
    """A whole loop with a real model: control tokens are in no prompt and in no continuation."""
    model = models.tiny_gpt2(len(toy_tokenizer))
    seen = []
    words = {"rounds": 2, "new_prompts": 4, "continuations": 5, "prompt_tokens": 4, "max_new_tokens": 6}
    banned = tuple(range(100, len(toy_tokenizer)))
    found = red_teaming.red_team(
        model,
        toy_tokenizer,
        lambda texts: seen.extend(texts) or [0.0] * len(texts),
        ["the capital of"],
        banned_ids=banned,
        control_ids=banned,
        **words,
    )
    used = set(
        ids_of(
            toy_tokenizer,
            [" ".join([*seen, *(prompt for prompt, _ in found["prompts"] if prompt != "the capital of")])],
        )[0]
    )
    assert len(used) > 20
    assert not used & set(banned)
    assert len(found["prompts"]) > 1


def test_red_team_in_a_short_context(toy_tokenizer):
    """Prompts and what the attacker sees are cut so that both models have room to write."""
    model = models.tiny_gpt2(len(toy_tokenizer), n_positions=12)
    pool = ["the capital of france is paris . the capital of spain is madrid . dogs bark .", "cats meow"]
    found = red_teaming.red_team(
        model,
        toy_tokenizer,
        lambda texts: [float(len(text.split())) for text in texts],
        pool,
        rounds=2,
        new_prompts=3,
        continuations=2,
    )
    assert max(value for _, value in found["prompts"]) <= 12 - 3
    assert min(value for _, value in found["prompts"]) > 0
    assert len(found["prompts"]) > 2


# -- diversity


def test_diversity_by_hand():
    got = diversity.diversity([[5, 6, 5, 2], [5, 6], [], [2]], end_ids=(2,))
    assert got["distinct_1"] == 2 / 5
    assert got["distinct_2"] == 2 / 3
    assert got["distinct_3"] == 1.0
    assert got["token_entropy"] == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))
    assert set(diversity.diversity([[2], []], end_ids=(2,)).values()) == {None}


def test_self_bleu_is_nltks():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    smooth = bleu.SmoothingFunction().method1
    rng = random.Random(0)
    for size in (2, 3, 12):
        lines = [[rng.randrange(6) for _ in range(rng.randint(1, 14))] for _ in range(size)]
        lines[0] = [99, 98]  # shares nothing with the others
        lines[-1] = lines[1] if size > 2 else lines[-1]
        expected = [
            bleu.sentence_bleu([other for j, other in enumerate(lines) if j != i], line, smoothing_function=smooth)
            for i, line in enumerate(lines)
        ]
        assert diversity.self_bleu(lines) == pytest.approx(sum(expected) / size, abs=1e-9)
    assert diversity.self_bleu([[1, 2, 3, 4, 5]] * 4) == 1.0
    assert diversity.self_bleu([[1, 2]]) is None
