"""Faults of multiple choice: its pairs, and the scores of its questions."""

from tests.faults import Mutant

TEMPLATES, SCORES, DATA = "choices/templates.py", "judging/choices.py", "common/data.py"
TEST = "test_choices.py::"

TABLE = [
    Mutant(
        "the first wrong choice is always taken",
        (TEMPLATES,),
        "wrong = [wrong[hash_of(question) % len(wrong)]]",
        "wrong = wrong[:1]",
        TEST + "test_the_right_choice_stands_against_one_or_all_wrong_ones",
    ),
    Mutant(
        "kept token ids forget which choices they are of",
        (DATA,),
        'settings["choices"] = [name for name in sources if is_choices(name)]',
        'settings["choices"] = [True for name in sources if is_choices(name)]',
        TEST + "test_kept_token_ids_are_of_one_kind_of_pairs",
    ),
    Mutant(
        "the head is read before EOS",
        (SCORES,),
        'ends = hidden[batch["last"]]',
        'ends = hidden[batch["last"] - 1]',
        TEST + "test_scores_are_those_of_the_plain_oracle",
    ),
    Mutant(
        "EOS counts in a choice's log-probability",
        (SCORES,),
        "scores[:, 0].index_add_(0, sequence[~is_eos], logps[~is_eos])",
        "scores[:, 0].index_add_(0, sequence, logps)",
        TEST + "test_scores_are_those_of_the_plain_oracle",
    ),
]
