"""Faults of the controlled-sentiment study."""

from tests.faults import Mutant

STUDY, ROWS, TEST = "experiments/sentiment.py", "experiments/sentiment_rows.py", "test_sentiment.py::"

TABLE = [
    Mutant(
        "the better answer is always chosen",
        (ROWS,),
        "return rng.random() < torch.tensor",
        "return 0.5 < torch.tensor",
        TEST + "test_bradley_terry_decides_which_answer_is_chosen",
    ),
    Mutant(
        "texts that were cut are taught to end",
        (ROWS,),
        "opening, limit = openings[i // n], len(prompts[i // n]) + new_tokens",
        "opening, limit = openings[i // n], len(prompts[i // n]) + new_tokens + 1",
        TEST + "test_scripts_read_the_very_tokens_that_were_sampled",
    ),
    Mutant(
        "the best possible curve goes on where one sample carries it",
        (STUDY,),
        "if (1 / weights.square().sum(-1)).mean() < EFFECTIVE or",
        "if (1 / weights.square().sum(-1)).mean() < 1 or",
        TEST + "test_the_curve_ends_where_few_samples_carry_it",
    ),
    Mutant(
        "a share of the gain is counted from nothing",
        (STUDY,),
        "(reward - start) / (best - start)",
        "reward / best",
        TEST + "test_points_come_of_lines_with_their_share_of_the_gain",
    ),
]
