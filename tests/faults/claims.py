"""Faults of what decides the papers' claims."""

from tests.faults import Mutant

EFFECTS, TEST = "experiments/effects.py", "test_claims.py::"

TABLE = [
    Mutant(
        "intervals have a degree of freedom too many",
        (EFFECTS,),
        "t_quantile(count - 1) * std",
        "t_quantile(count) * std",
        TEST + "test_the_paired_interval_in_closed_form",
    ),
    Mutant(
        "an interval that reaches beyond the bound holds",
        (EFFECTS,),
        "inside, outside = low > self.above, high < self.above",
        "inside, outside = high > self.above, high < self.above",
        TEST + "test_an_interval_has_the_verdict_of_its_goal",
    ),
    Mutant(
        "a claim holds though half of it was not run",
        (EFFECTS,),
        "verdicts = [effect.verdict for effect in self.effects if effect.decides]",
        "verdicts = [x.verdict for x in self.effects if x.decides and x.mean is not None] or [NOT_RUN]",
        TEST + "test_a_claim_has_the_verdict_of_all_that_decides_it",
    ),
    Mutant(
        "runs at a learning rate that was not chosen count",
        ("experiments/beds_pairs.py",),
        'line["lr"] == rates.get(line["method"])',
        'line["method"] in rates',
        TEST + "test_the_head_is_compared_over_the_same_questions",
    ),
]
