"""Faults of report/: what a run shows, and what its folder tells other programs."""

from tests.faults import Mutant

CARD = "report/card.py"
FOLDERS = "report/folders.py"
PROGRESS = "report/progress.py"
TRACKERS = "report/trackers.py"
RUN = "common/run.py"
FOLDERS_TEST = "test_folders.py::"
CARD_TEST = "test_card.py::"
PROGRESS_TEST = "test_progress.py::"

TABLE = [
    Mutant(
        "the rotary base stands where version 5 looks alone",
        (FOLDERS,),
        'config[base] = wide["rope_theta"]',
        "pass",
        FOLDERS_TEST + "test_the_rotary_base_stands_at_the_top_too",
    ),
    Mutant(
        "rotary scaling stands where version 5 looks alone",
        (FOLDERS,),
        'if wide.get("rope_type", "default") != "default":',
        "if False:",
        FOLDERS_TEST + "test_the_rotary_base_stands_at_the_top_too",
    ),
    Mutant(
        "layers with a window get the base of the others",
        (FOLDERS,),
        'config[local_base] = local["rope_theta"]',
        'config[local_base] = wide["rope_theta"]',
        FOLDERS_TEST + "test_models_within_models_too",
    ),
    Mutant(
        "a tokenizer class that version 4 does not know",
        (FOLDERS,),
        'config["tokenizer_class"] = "PreTrainedTokenizerFast"',
        "pass",
        FOLDERS_TEST + "test_tokenizer_classes_that_version_4_knows_stay",
    ),
    Mutant(
        "the word that pads becomes a special token",
        (FOLDERS,),
        'config["pad_token"] = None',
        "pass",
        "test_training.py::test_pad_is_not_eos_in_what_is_saved",
    ),
    Mutant(
        "a tokenizer's own pad token is lost",
        (FOLDERS,),
        'text_of(config["pad_token"]) not in special',
        "True",
        FOLDERS_TEST + "test_tokenizer_classes_that_version_4_knows_stay",
    ),
    Mutant(
        "folders stay as version 5 writes them",
        ("common/checkpoints.py",),
        "write_json(folder / name, content)",
        "pass",
        FOLDERS_TEST + "test_checkpoints_too",
    ),
    Mutant(
        "a folder is named as the hub's base model",
        (CARD,),
        'if values.get("model_revision"):',
        "if True:",
        CARD_TEST + "test_the_hub_reads_the_front_matter",
    ),
    Mutant(
        "an option that was switched off is switched on in the card's command",
        (CARD,),
        'words += [f"--{flag}" if value else f"--no-{flag}"]',
        'words += [f"--{flag}"]',
        CARD_TEST + "test_its_command_repeats_the_run",
    ),
    Mutant(
        "columns of the card's tables exchanged",
        (CARD,),
        "*(cell(m, name) for m in states)]",
        "*(cell(m, name) for m in states[::-1])]",
        CARD_TEST + "test_its_tables_are_the_end_table",
    ),
    Mutant(
        "trackers get no end table",
        (TRACKERS,),
        "self.run.summary.update(numbers_of(columns))",
        "pass",
        CARD_TEST + "test_wandb_gets_metrics_the_end_table_and_samples",
    ),
    Mutant(
        "a tracker's package is looked for when the folder is made",
        (RUN,),
        "    check_tracker(args.track)\n",
        "",
        CARD_TEST + "test_a_tracker_that_is_missing_leaves_nothing[wandb]",
    ),
    Mutant(
        "a line of progress for each batch",
        (PROGRESS,),
        "now - self.shown >= EVERY",
        "now >= self.shown",
        PROGRESS_TEST + "test_without_a_terminal_a_line_every_ten_seconds",
    ),
    Mutant(
        "a resumed run's remaining time from steps that it did not take",
        (PROGRESS,),
        "(self.done - self.first)",
        "self.done",
        PROGRESS_TEST + "test_a_resumed_bar_counts_from_where_it_is",
    ),
    Mutant(
        "the last evaluation sees some rows only",
        (RUN,),
        "if self._is_training and self._is_tiny is False:",
        "if self._is_tiny is False:",
        PROGRESS_TEST + "test_while_a_larger_model_trains_held_out_rows_take_a_tenth",
    ),
    Mutant(
        "held-out rows take as long as training",
        (RUN,),
        "* 3 // 10)",
        "* 3)",
        PROGRESS_TEST + "test_while_a_larger_model_trains_held_out_rows_take_a_tenth",
    ),
    Mutant(
        "larger models are sampled from as much as the toy's",
        (RUN,),
        "MANY if self._is_tiny or",
        "MANY if True or",
        PROGRESS_TEST + "test_larger_models_are_sampled_from_less",
    ),
]
