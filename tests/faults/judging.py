"""Faults in what is said of a model by running it on a file."""

from tests.faults import Mutant

JUDGING = "test_judging.py::"

TABLE = [
    Mutant(
        "judging: the head picks the worst",
        ("judging/answers.py",),
        'line["picked"] = max(',
        'line["picked"] = min(',
        JUDGING + "test_the_head_picks_the_largest_reward",
    ),
    Mutant(
        "judging: half a group is kept",
        ("judging/answers.py",),
        "lines = lines[: len(lines) - len(lines) % GROUP]",
        "lines = lines[:]",
        JUDGING + "test_an_interrupted_command_goes_on_where_it_stopped",
    ),
    Mutant(
        "judging: begun with another seed, and gone on",
        ("judging/answers.py",),
        "if values and values[0] != settings:",
        "if not values:",
        JUDGING + "test_an_interrupted_command_goes_on_where_it_stopped",
    ),
    Mutant(
        "judging: the rate at equal length is the plain one",
        ("judging/win_rate.py",),
        "at_zero = weights[0].sigmoid().item()",
        "at_zero = rate",
        JUDGING + "test_a_preference_for_length_alone_is_taken_out",
    ),
    Mutant(
        "judging: lengths without a prior",
        ("judging/win_rate.py",),
        "torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))",
        "torch.diag(torch.tensor([0.0, 1e-9], dtype=torch.float64))",
        JUDGING + "test_lengths_that_tell_wins_apart_end_in_numbers",
    ),
    Mutant(
        "judging: windows of a text predict tokens twice",
        ("judging/perplexity.py",),
        "for begin in (0, *range(context, len(ids), stride))]",
        "for begin in (0, *range(stride, len(ids), stride))]",
        "test_tasks.py::test_perplexity_of_a_model_that_is_known",
    ),
    Mutant(
        "judging: a suite counts the parts of a task",
        ("judging/tasks.py",),
        'scores.append(sum(part["score"] for part in found) / len(found))',
        'scores += [part["score"] for part in found]',
        "test_tasks.py::test_averages_by_hand",
    ),
    Mutant(
        "judging: ties without the single right answer's margin",
        ("judging/reward_bench.py",),
        'parts["preferred_hard"] = mean([min(ref, tied) > spread',
        'parts["preferred_hard"] = mean([tied > spread',
        "test_reward_bench.py::test_ties_by_hand",
    ),
    Mutant(
        "judging: a classifier looks for padding in a text alone",
        ("judging/heads.py",),
        "model.config.pad_token_id = None",
        "model.config.pad_token_id = tokenizer.pad_token_id",
        "test_reward_bench.py::test_reward_models_of_others_are_read_at_the_text_s_end",
    ),
]
