"""Faults of labelled answers: pointwise_dpo.py, ulma.py, sft.py and labelled/."""

from tests.faults import Mutant, scripts_of

LABELLED_SCRIPTS = scripts_of("labelled answers")
RUN, ROWS = "common/run.py", "labelled/rows.py"
LABELLED_TEST = "test_labelled.py::"
LABELS_TEST = "test_labelled_losses.py::"

TABLE = [
    Mutant(
        "point-wise: positive and negative exchanged",
        ("pointwise_dpo.py",),
        "return -labels * F.logsigmoid(h) - (1 - labels) * F.logsigmoid(-h)",
        "return -labels * F.logsigmoid(-h) - (1 - labels) * F.logsigmoid(h)",
        LABELS_TEST + "test_binary_gradients_in_closed_form",
    ),
    Mutant(
        "point-wise: the constant inside beta",
        ("pointwise_dpo.py",),
        "h = beta * (policy_logps - ref_logps) + beta_log_z",
        "h = beta * (policy_logps - ref_logps + beta_log_z)",
        LABELS_TEST + "test_the_constant_is_added_after_beta",
    ),
    Mutant(
        "ulma: the likelihood scaled by beta",
        ("ulma.py",),
        "return -labels * policy_logps -",
        "return -labels * beta * policy_logps -",
        LABELS_TEST + "test_values_where_the_policy_is_the_reference",
    ),
    Mutant(
        "ulma: every label above a half is a demonstration",
        ("ulma.py",),
        "torch.where(labels == 1, -policy_logps",
        "torch.where(labels > 0.5, -policy_logps",
        LABELS_TEST + "test_continuous_gradients_in_closed_form",
    ),
    Mutant(
        "weights of the classes exchanged",
        LABELLED_SCRIPTS,
        "(labels == 1, positive_weight, negative_weight)",
        "(labels == 1, negative_weight, positive_weight)",
        LABELLED_TEST + "test_the_loss_of_a_batch_by_hand",
    ),
    Mutant(
        "beta log Z not added",
        LABELLED_SCRIPTS,
        'return torch.full_like(batch["labels"], beta_log_z)',
        'return torch.zeros_like(batch["labels"])',
        LABELLED_TEST + "test_the_loss_of_a_batch_by_hand",
    ),
    Mutant(
        "the partition reads the answer",
        LABELLED_SCRIPTS,
        "first = lengths.cumsum(0) - lengths",
        "first = lengths.cumsum(0) - 1",
        LABELLED_TEST + "test_prompt_states_are_those_of_the_prompt_alone",
    ),
    Mutant(
        "the partition at the policy's learning rate",
        LABELLED_SCRIPTS,
        '"lr_scale": args.partition_lr / args.lr',
        '"lr_scale": 1.0',
        LABELLED_TEST + "test_a_learned_partition_moves_with_its_own_rate_and_is_saved",
    ),
    Mutant(
        "a class's mean over all rows",
        (RUN,),
        'counts = {name: sums.get(f"count {name}", count)',
        "counts = {name: count",
        LABELLED_TEST + "test_means_over_a_class_are_over_that_class",
    ),
    Mutant(
        "sft: a mean over rows",
        ("sft.py",),
        "(loss * weight / tokens).backward()",
        "(loss * weight / len(rows_of_step)).backward()",
        LABELLED_TEST + "test_sft_is_the_mean_over_the_tokens_of_a_step",
    ),
    Mutant(
        "the rejected answer labelled good",
        (ROWS,),
        "(prompt, chosen, 1.0), (prompt, rejected, 0.0)",
        "(prompt, chosen, 1.0), (prompt, rejected, 1.0)",
        LABELLED_TEST + "test_pairs_become_two_rows_of_one_split",
    ),
    Mutant(
        "quantiles without ties",
        (ROWS,),
        "(bisect.bisect_left(ordered, z) + bisect.bisect_right(ordered, z)) / (2 * len(ordered))",
        "bisect.bisect_left(ordered, z) / len(ordered)",
        LABELLED_TEST + "test_scales",
    ),
]
