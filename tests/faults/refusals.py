"""Faults in what is refused, pinned and counted: cases that once ended well with wrong numbers."""

from tests.faults import Mutant

REFUSALS = "test_refusals.py::"

TABLE = [
    Mutant(
        "refusals: a missing file of rows waits for the toy's base model",
        ("common/run.py",),
        "not Path(source).exists():",
        "False:",
        REFUSALS + "test_a_missing_file_of_rows_is_refused_before_the_toys_base_model_is_built",
    ),
    Mutant(
        "refusals: missing weights stay random",
        ("common/models.py",),
        'refuse_missing(f"--model {folder}", loading["missing_keys"])',
        "pass",
        REFUSALS + "test_missing_weights_are_refused_by_name",
    ),
    Mutant(
        "refusals: a bidirectional model passes",
        ("common/oracle.py",),
        "return not torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)",
        "return False",
        REFUSALS + "test_a_bidirectional_model_is_refused",
    ),
    Mutant(
        "refusals: rows in another order pass",
        ("common/run.py",),
        '(("data_sha256", "rows of the data"), ',
        '(("model_sha256", "rows of the data"), ',
        REFUSALS + "test_resuming_on_rows_in_another_order_is_refused",
    ),
    Mutant(
        "refusals: other weights pass",
        ("common/run.py",),
        ', ("model_sha256", "weights of the model"))',
        ",)",
        REFUSALS + "test_resuming_on_other_weights_is_refused",
    ),
    Mutant(
        "refusals: masked entries count",
        ("typo.py",),
        'masked = log_ref == float("-inf")',
        'masked = log_ref == float("inf")',
        REFUSALS + "test_entries_that_are_masked_in_both_models_count_nothing",
    ),
    Mutant(
        "refusals: the KL of masked entries is nan",
        ("common/evaluate.py",),
        'torch.where(log_p > float("-inf"), log_p.exp() * (log_p - log_q), 0.0)',
        "(log_p.exp() * (log_p - log_q))",
        REFUSALS + "test_entries_that_are_masked_in_both_models_count_nothing",
    ),
    Mutant(
        "refusals: one learning rate for all models",
        ("common/run.py",),
        'return sizes.get(args.model.partition(":")[0], 1e-3 if hasattr(args, "context") else 1e-5)',
        "return 1e-3",
        REFUSALS + "test_the_default_learning_rate_depends_on_the_model",
    ),
    Mutant(
        "refusals: a destroyed model is saved",
        ("common/run.py",),
        "if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):",
        "if False:",
        REFUSALS + "test_a_model_that_the_last_step_destroyed_ends_in_a_sentence",
    ),
    Mutant(
        "refusals: the error of a mean is its deviation",
        ("common/metrics.py",),
        "values.std(correction=1) / math.sqrt(len(values))",
        "values.std(correction=1) * 1.0",
        REFUSALS + "test_means_of_samples_have_their_standard_errors",
    ),
    Mutant(
        "refusals: the last line averages what is new",
        ("common/run.py",),
        "self._window = [*self._window, *steps][-self._args.log_every :]",
        "self._window = steps",
        REFUSALS + "test_the_last_line_averages_a_whole_window",
    ),
    Mutant(
        "refusals: a reader that goes away ends the run",
        ("common/processes.py",),
        "except BrokenPipeError:",
        "except NotImplementedError:",
        REFUSALS + "test_a_reader_that_goes_away_does_not_end_the_run",
    ),
]
