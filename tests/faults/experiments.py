"""Faults of the experiments."""

from tests.faults import Mutant

FRONTIER = "test_frontier.py::"
TABLE = [
    Mutant(
        "an interval of the values, not of their mean",
        ("experiments/study.py",),
        "t_quantile(n - 1) * std / math.sqrt(n)",
        "t_quantile(n - 1) * std",
        FRONTIER + "test_an_interval_is_of_the_mean_over_seeds",
    ),
    Mutant(
        "of equal scores each is the pick",
        ("experiments/policies.py",),
        "(ways[not_better] - ways[worse]) / (not_better - worse)",
        "ways[not_better] - ways[worse]",
        FRONTIER + "test_weights_of_a_pick_are_those_of_all_draws",
    ),
    Mutant(
        "the KL of picks without what picking adds",
        ("experiments/policies.py",),
        "kl = kl_of_best(n) + ",
        "kl = ",
        FRONTIER + "test_a_head_picks_among_its_own_lms_answers",
    ),
    Mutant(
        "the log-ratio of all answers, not of those picked",
        ("experiments/policies.py",),
        "(weights * logratios.view(-1, count)).sum(1).mean()",
        "logratios.mean()",
        FRONTIER + "test_a_head_picks_among_its_own_lms_answers",
    ),
]
