"""The 21 claims of the papers, in words: what is claimed, the paper's number and where it is from,
the command that decides it here, the bed, and why the verdict is what it is.

The sentences that say why are written by hand, one for each verdict that a claim can be expected to
have. They hold no measured number: those come from the result files, by the function of each claim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import beds_pairs, beds_toy
from experiments.effects import FAILS, HOLDS, NOT_RUN, UNDECIDED, Finding


@dataclass(frozen=True)
class Claim:
    """A claim of a paper."""

    text: str
    reported: str  # the paper's number, with where it is from
    command: str  # what decides it here
    bed: str
    finding: Callable[[Path], Finding]
    because: dict[str, str]  # verdict: the sentence that justifies it


OWN = "no number at hand"
SECOND_HAND = "[second-hand, unconfirmed]"
AUTHORS = "[authors' README; model size unconfirmed]"
CHOICES = "python -m experiments.dph_choices --model SmolLM2-135M-Instruct"
CHOICE_BED = (
    "SmolLM2-135M-Instruct, six multiple-choice tasks of which the training files are learned; three learning "
    "rates each"
)
TABLES = "a table of three answers, exact population minimisers"
CHAT = (
    "python -m experiments.chat_model --model SmolLM2-135M-Instruct --part pairs --data hh_harmless "
    "hh_helpful --methods dpo typo --rows 300 --judge-rows 800 --lrs 1e-5 3e-5 1e-4 --judge-lr 3e-5 "
    "--max-length 384 --max-new-tokens 64"
)
TOY = "easy toy, trained questions"
HACKING = "python -m experiments.reward_hacking --seeds 0 1 2 3 4"
HACKING_BED = "easy toy, trained on a proxy that pays for length; SuperHF at six priors, PPO at three"
PARETO = "python -m experiments.pareto"
PARETO_BED = "toy corpus, 500,000 tokens, a teacher that is itself rude"


def toy_runs(number: int, *runs: str) -> str:
    """The command that makes toy runs of five seeds and gathers them."""
    letters = "abcdef"
    made = " ".join(f"python {run} --seed $seed --name {number}{x}-$seed;" for x, run in zip(letters, runs))
    gathered = f"python -m experiments.collect runs/{number}[a-f]-* --output results/toy_claim{number}.json"
    return f"for seed in 0 1 2 3 4; do {made} done; {gathered}"


CLAIMS = {
    1: Claim(
        "DPH: the head ranks better than the language model that it sits on",
        f"GPT4All average 60.21 by DPH's head, 57.05 by DPO's LM {AUTHORS}",
        CHOICES,
        CHOICE_BED,
        beds_pairs.head_against_lm,
        {
            NOT_RUN: (
                "The study is ready and not run to its end. The toy cannot decide: in the easy world the base "
                "model hardly errs, and the hard one ([toy.md](toy.md)) was run with one seed."
            ),
            HOLDS: (
                "Over the same questions the head of the joint objective takes the right choice more often than "
                "the LM beside it."
            ),
            FAILS: "Over the same questions the LM takes the right choice more often than the head that sits on it.",
            UNDECIDED: "The interval holds 0, or fewer than three seeds have run.",
        },
    ),
    2: Claim(
        "DPH beats SFT and DPO",
        (
            "GLUE 78.6 against 72.0 (SFT) and 77.0 (DPO), GPT4All 60.21 against 53.04 and 57.05, RACE 62.5 "
            f"against 53.8 and 61.6 {AUTHORS}"
        ),
        CHOICES,
        CHOICE_BED,
        beds_pairs.head_against_methods,
        {
            NOT_RUN: (
                "As claim 1. DPO's LM is what the paper compares with; DPO's implicit reward, which is as cheap "
                "to read as a head, will stand beside it."
            ),
            HOLDS: "The head finds more right choices than SFT's and DPO's language models, each tuned as often.",
            FAILS: "One of SFT's and DPO's language models, tuned as often, finds more right choices than the head.",
            UNDECIDED: "One of the two intervals holds 0, or fewer than three seeds have run.",
        },
    ),
    3: Claim(
        "DPH: the language model is unharmed",
        OWN,
        CHOICES,
        "the same models on HellaSwag, PIQA, BoolQ and WinoGrande, which were not trained on, and WikiText-2",
        beds_pairs.lm_unharmed,
        {
            NOT_RUN: (
                "As claim 1. On a frozen backbone it holds by construction; with the head's loss alone the toy's "
                "LM loses ([dph.md](dph.md))."
            ),
            HOLDS: "Neither accuracy on other tasks nor the perplexity of plain text is worse by the margin.",
            FAILS: "Accuracy on other tasks, or the perplexity of plain text, is worse by more than the margin.",
            UNDECIDED: "The interval of one of the two holds its margin, or fewer than three seeds have run.",
        },
    ),
    4: Claim(
        "Contrastive DPH is cDPO on rewards",
        "closed form [derived]",
        "python -m experiments.equivalence",
        "losses and gradients of `dph.py` and `cdpo.py`, float64, drawn rewards",
        beds_pairs.contrastive_is_cdpo,
        {HOLDS: "Two scripts' own losses agree to rounding at all scales and label smoothings."},
    ),
    5: Claim(
        "TYPO interpolates strongly: from pi* as lambda goes to zero to ref as it grows",
        "from sampled pairs .610 .292 .099 at lambda 1e-5 for pi* = .6 .3 .1 [code]",
        "python -m experiments.interpolation",
        f"{TABLES}; total variation",
        beds_pairs.typo_interpolates,
        {
            HOLDS: (
                "Both ends are reached, and every lambda between moves the policy further from pi*. A network was "
                "not tried."
            )
        },
    ),
    6: Claim(
        "TYPO preserves: a prompt whose reference is right stays, while another improves",
        "error 0 at every lambda [derived]",
        "python -m experiments.preservation",
        f"{TABLES}, 41 values of lambda, two ways to draw pairs; total variation",
        beds_pairs.typo_preserves,
        {
            HOLDS: (
                "Nothing is lost beyond rounding where the other prompt gains at every lambda. A network, whose "
                "prompts share weights, was not tried."
            )
        },
    ),
    7: Claim(
        "DPO, IPO and f-DPO do neither",
        "DPO .994 .006 0, IPO and f-DPO 1 0 0 where pi* = .6 .3 .1 [code]",
        "python -m experiments.preservation && python -m experiments.interpolation",
        f"{TABLES}; total variation",
        beds_pairs.family_does_neither,
        {
            HOLDS: (
                "Wherever one of them gains on the bad prompt it loses at least as much on the good one, and as "
                "lambda goes to zero all three end at the likeliest answer, not at pi*."
            )
        },
    ),
    8: Claim(
        "Constraints break the equivalence of DPO and RLHF",
        "derived for small lambda",
        "python -m experiments.constraints",
        "a table of three answers, lambda from .01 to 10; total variation",
        beds_pairs.constraints_break_it,
        {
            HOLDS: (
                "Without a constraint both policies are one; stopped early, or with decay, DPO stays near the "
                "reference where RLHF does not."
            )
        },
    ),
    9: Claim(
        "TYPO's win rate on real data is competitive",
        f'HH and IMDb, "competitive" {SECOND_HAND}',
        CHAT,
        (
            "SmolLM2-135M-Instruct on HH, judged by a reward model of other prompts at equal length; the margin "
            "is five points"
        ),
        beds_pairs.typo_wins,
        {
            NOT_RUN: (
                "The study has begun with other rows and methods ([chat_model.md](chat_model.md)). It runs TYPO "
                "at its default lambda; a sweep of lambda would have to follow."
            ),
            HOLDS: "TYPO's win rate is not below DPO's by the margin; lambda was not swept.",
            FAILS: (
                "TYPO's win rate is below DPO's by more than the margin; lambda was not swept, so this says it of "
                "the default."
            ),
            UNDECIDED: "The interval holds the margin, or too few seeds have run; lambda was not swept.",
        },
    ),
    10: Claim(
        "Labels on single answers: the point-wise loss beats the pair-wise one",
        OWN,
        "python -m experiments.frontier",
        "easy toy, trained questions, three values of beta each, compared over the KL that both reach",
        beds_toy.pointwise_beats_pairs,
        {
            UNDECIDED: (
                "At the same KL the point-wise loss is ahead in every seed. But it sees a label of each answer, "
                "where DPO sees which of two is better: the answers are the same, what is said of them is not. "
                "DPO's pairs made of the labels, a good and a bad answer, would decide it."
            )
        },
    ),
    11: Claim(
        "ULMA beats point-wise DPO and SFT",
        OWN,
        toy_runs(11, "ulma.py", "pointwise_dpo.py", "sft.py"),
        TOY,
        beds_toy.ulma_beats_both,
        {
            UNDECIDED: (
                "The three gain alike for their KL. In true reward ULMA is behind point-wise DPO in every seed: it "
                "stays near the base model, and a part of the positives that it imitates is rude. Right and polite "
                "demonstrations would be its fair bed."
            )
        },
    ),
    12: Claim(
        "Continuous labels help",
        OWN,
        toy_runs(
            12,
            "pointwise_dpo.py --labels continuous --beta 0.05 --learn-partition",
            "pointwise_dpo.py --learn-partition",
            "ulma.py --labels continuous --beta 0.05 --learn-partition",
            "ulma.py --learn-partition",
            "pointwise_dpo.py --labels continuous --beta 0.05",
            "pointwise_dpo.py",
        ),
        TOY,
        beds_toy.continuous_labels_help,
        {
            UNDECIDED: (
                "With a learned beta log Z continuous labels are ahead by less than the interval, with beta log Z "
                "at zero they are behind. ULMA's gain is no evidence: without a label of exactly one it has no "
                "demonstrations and becomes point-wise DPO. That continuous labels rank held-out answers better does "
                "not count: those have no noise, the binary ones have."
            )
        },
    ),
    13: Claim(
        "SuperHF reaches PPO's training reward",
        "SuperHF .582, PPO .317 (7B, normalised)",
        f"python -m experiments.frontier && {HACKING}",
        f"easy toy, trained on the true reward; and {HACKING_BED}",
        beds_toy.superhf_reaches_ppo,
        {
            UNDECIDED: (
                "Each at its best prior, SuperHF ends a little below PPO in every seed, on the true reward by "
                "about the margin, on the proxy by less than the interval. With the paper's prior it is far behind: "
                "that prior caps the reward, however many steps are taken [derived]."
            )
        },
    ),
    14: Claim(
        "The KL prior trades reward for hacking",
        (
            "reward and METEOR similarity 1.45 and .77 without it, 1.00 and .21 at .35 (means of four seeds with "
            "a large spread)"
        ),
        HACKING,
        HACKING_BED,
        beds_toy.prior_trades,
        {
            UNDECIDED: (
                "The prior costs proxy reward for sure; that it lowers similarity shows in every seed, but three "
                'are too few. "Little hacking" is not what is left: similarity stays far above the base model\'s, '
                "since length is the proxy's only flaw. A learned reward would be fairer."
            )
        },
    ),
    15: Claim(
        "SuperHF improves calibration",
        "squared error .0212 before, .0050 after",
        "python superhf.py --model MODEL --data PROMPTS --reward runs/REWARD --name superhf && "
        "python -m common.evaluate --model runs/superhf --tasks mmlu",
        "a chat model on choices where it errs",
        beds_toy.calibration,
        {
            NOT_RUN: (
                "On the toy any sharpening helps, so it cannot show it; a model of a size that knows some of MMLU "
                "was not trained, and no program gathers its seeds yet."
            )
        },
    ),
    16: Claim(
        "More completions per prompt help",
        "test reward -.28, .34, .40, .52, .47 for 1, 2, 8, 16, 64",
        HACKING,
        "easy toy, trained on a proxy that pays for length; the paper's prior",
        beds_toy.completions_help,
        {
            HOLDS: (
                "On the proxy that is trained on, flat from eight. The true reward is best at two and falls from "
                "there: more candidates find more of the flaw. The paper's is the reward of another reward model, "
                "which the toy does not have."
            )
        },
    ),
    17: Claim(
        "Conditional pretraining is Pareto-optimal",
        f"on toxicity; on the frontier for PII and PEP8 {SECOND_HAND}",
        PARETO,
        PARETO_BED,
        beds_toy.conditional_is_optimal,
        {
            UNDECIDED: (
                "Swept alike, the three are tied: among settings with a tenth of MLE's misalignment none pays less for "
                "sure. At the paper's d conditional training pays more than at the larger ones. A polite teacher would "
                "be fairer."
            )
        },
    ),
    18: Claim(
        "Ten times fewer bad samples, under a red team too",
        f"toxicity .0141 to .0011, about 13 times {SECOND_HAND}",
        f"{PARETO} --red-team 5",
        PARETO_BED,
        beds_toy.ten_times_fewer,
        {
            UNDECIDED: (
                "Unprompted samples are far more than ten times less often bad. The red team, the other half of the "
                "claim, was never run."
            )
        },
    ),
    19: Claim(
        "Conditional pretraining keeps capability",
        f"downstream performance kept {SECOND_HAND}",
        PARETO,
        PARETO_BED,
        beds_toy.capability_kept,
        {
            UNDECIDED: (
                "At the paper's d perplexity on good segments is higher, in part where sentences end and a control "
                "token was expected; at the largest d it is not. Perplexity apart from sentence ends, or tasks "
                "downstream, would decide it."
            )
        },
    ),
    20: Claim(
        "Feedback from the start is better than MLE followed by feedback",
        f"PII .0013 against .0018 {SECOND_HAND}",
        PARETO,
        PARETO_BED,
        beds_toy.better_from_the_start,
        {
            UNDECIDED: (
                "One seed says so and makes all of the difference; only half of the budget was tried as the start of "
                "feedback."
            )
        },
    ),
    21: Claim(
        "Filtering costs capability, unlikelihood is mixed",
        f"filtering pays most, unlikelihood helps on toxicity only {SECOND_HAND}",
        PARETO,
        PARETO_BED,
        beds_toy.filtering_and_unlikelihood,
        {
            HOLDS: (
                "Both leave no bad text and both pay for it, here unlikelihood most. The teacher is itself rude, "
                "so some of the price is for never being so; on good segments filtering costs nothing "
                "([conditional_pretrain.md](conditional_pretrain.md))."
            )
        },
    ),
}
