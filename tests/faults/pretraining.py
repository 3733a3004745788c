"""Faults of the scored-corpus family: its six scripts and pretraining/."""

from tests.faults import Mutant

CORPUS = tuple(f"{name}_pretrain.py" for name in ("mle", "filtered", "conditional", "unlikelihood", "rwr", "awr"))
LOSSES, PRETRAIN, SAMPLES = "test_pretrain_losses.py::", "test_pretrain.py::", "test_samples.py::"
READ, SEGMENTS = "test_corpus.py::", "test_scorers.py::"
OWN_LAYER = PRETRAIN + "test_a_model_that_changes_its_logits_trains_on_what_it_is_evaluated_on"

METHODS = [
    Mutant(
        "probabilities of one not clamped",
        ("unlikelihood_pretrain.py",),
        ".clamp(max=-torch.finfo(token_logps.dtype).eps)",
        "",
        LOSSES + "test_probabilities_of_one_give_no_nan_on_either_branch",
    ),
    Mutant(
        "a score equal to the threshold is bad",
        ("unlikelihood_pretrain.py",),
        "bad = token_scores > threshold",
        "bad = token_scores >= threshold",
        LOSSES + "test_a_score_equal_to_the_threshold_is_good",
    ),
    Mutant(
        "a segment at the threshold is bad",
        ("conditional_pretrain.py",),
        "GOOD if score <= threshold else BAD",
        "GOOD if score < threshold else BAD",
        LOSSES + "test_a_score_equal_to_the_threshold_is_good",
    ),
    Mutant(
        "weights not clipped",
        ("rwr_pretrain.py", "awr_pretrain.py"),
        "MAX_WEIGHT = 1000.0",
        "MAX_WEIGHT = 1e9",
        LOSSES + "test_weights_are_clipped_at_1000",
    ),
    Mutant(
        "the value trained through the weight",
        ("awr_pretrain.py",),
        "(token_rewards - values.detach()) / beta",
        "(token_rewards - values) / beta",
        LOSSES + "test_awr_loss_and_its_gradients_in_closed_form",
    ),
    Mutant(
        "scores taken for rewards",
        ("rwr_pretrain.py", "awr_pretrain.py"),
        "_loss(logps, -scores, ",
        "_loss(logps, scores, ",
        PRETRAIN + "test_the_first_loss_is_that_of_a_new_model_on_the_first_chunks",
    ),
    Mutant(
        "nothing filtered",
        ("filtered_pretrain.py",),
        "if mean_score(scores) <= threshold]",
        "if threshold is not None]",
        PRETRAIN + "test_filtering_trains_on_kept_documents_only_and_repeats_them",
    ),
    Mutant(
        "held-out documents filtered too",
        ("filtered_pretrain.py",),
        'documents["train"] = documents["train"].subset(kept)',
        "documents = {k: v.subset([i for i, s in enumerate(v.scores()) if mean_score(s) <= threshold])"
        " for k, v in documents.items()}",
        PRETRAIN + "test_filtering_leaves_held_out_documents_as_they_are",
    ),
    Mutant(
        "control tokens dropped anew on resume",
        ("conditional_pretrain.py",),
        "rng, id_of = Random(seed), {",
        "rng, id_of = Random(), {",
        PRETRAIN + "test_an_interrupted_run_resumes_bit_for_bit",
    ),
    Mutant(
        "new rows without noise",
        ("conditional_pretrain.py",),
        "weight[:old].mean(0) + 0.01 * noise",
        "weight[:old].mean(0) + 0.0 * noise",
        PRETRAIN + "test_rows_of_new_tokens_are_the_mean_of_the_old_ones_and_a_little_noise",
    ),
    Mutant(
        "both control tokens banned",
        ("conditional_pretrain.py",),
        'asked = {"after": ([good], [bad])',
        'asked = {"after": ([good], [good, bad])',
        PRETRAIN + "test_a_sample_asked_for_good_holds_good_tokens_alone_and_its_text_none",
    ),
    Mutant(
        "a control token banned where none is asked for",
        ("conditional_pretrain.py",),
        '"after_no_token": ([], [])',
        '"after_no_token": ([], [bad])',
        PRETRAIN + "test_inference_starts_from_the_token_asked_for_and_bans_the_other",
    ),
    Mutant(
        "control tokens in the red team's prompts",
        ("pretraining/red_team.py",),
        "sampling.texts_of(writer, written, control_ids)",
        "sampling.texts_of(writer, written)",
        SAMPLES + "test_red_team_of_a_model_by_itself",
    ),
]

TRUNK = [
    Mutant(
        "the score of the position, not of the target",
        CORPUS,
        'batch["scores"][:, 1:]',
        'batch["scores"][:, :-1]',
        PRETRAIN + "test_a_target_brings_its_own_score",
    ),
    Mutant(
        "a position predicts itself",
        CORPUS,
        ".last_hidden_state[:, :-1]",
        ".last_hidden_state[:, 1:]",
        PRETRAIN + "test_target_logps_are_exact_on_a_bigram_table",
    ),
    Mutant(
        "a step divided by its micro-batch",
        CORPUS,
        "/ (len(numbers_of_step) * targets)",
        "/ (len(numbers) * targets)",
        PRETRAIN + "test_every_token_weighs_the_same_however_a_step_is_cut",
    ),
    Mutant(
        "weight decay on norms and biases",
        CORPUS,
        '{"params": vectors, "weight_decay": 0.0}',
        '{"params": vectors}',
        PRETRAIN + "test_optimiser_schedule_and_decay",
    ),
    Mutant(
        "the bare product of a model that scales its logits",
        ("pretraining/chunks.py",),
        "for name, column in columns.items()} | more",
        "for name, column in columns.items()}",
        OWN_LAYER,
    ),
    Mutant(
        "a model's own output layer never used",
        CORPUS,
        'if "logits_to_keep" in batch:',
        'if "no such thing" in batch:',
        PRETRAIN + "test_gradients_through_a_models_own_output_layer",
    ),
    Mutant("scaled logits found and forgotten", ("pretraining/models.py",), "return more", "return {}", OWN_LAYER),
    Mutant(
        "a wrong output layer let through",
        ("pretraining/models.py",),
        "if gap <= tolerance:",
        "if gap <= 1e9:",
        PRETRAIN + "test_an_output_layer_that_is_off_for_another_reason_is_found_out",
    ),
]

BASELINE = [
    Mutant(
        "the plain model warmed up otherwise",
        ("pretraining/baseline.py",),
        " micro_batch_size warmup weight_decay",
        " micro_batch_size weight_decay",
        PRETRAIN + "test_the_plain_model_is_a_run_of_its_script",
    ),
    Mutant(
        "one plain model for all arguments",
        ("pretraining/baseline.py",),
        "facts = [same, data_sha256, ",
        "facts = [data_sha256, ",
        PRETRAIN + "test_whatever_the_plain_model_depends_on_makes_another_one",
    ),
    Mutant(
        "one plain model for all corpora",
        ("pretraining/baseline.py",),
        "facts = [same, data_sha256, ",
        "facts = [same, ",
        PRETRAIN + "test_whatever_the_plain_model_depends_on_makes_another_one",
    ),
    Mutant(
        "the plain model trained without a lock",
        ("pretraining/baseline.py",),
        "fcntl.flock(lock, fcntl.LOCK_EX)  # given",
        "pass  # given",
        PRETRAIN + "test_two_runs_train_the_plain_model_once",
    ),
    Mutant(
        "half of a plain model taken for a whole one",
        ("pretraining/baseline.py",),
        'if not (folder / "summary.json").is_file():',
        'if not (folder / "args.json").is_file():',
        PRETRAIN + "test_what_an_interrupted_plain_run_left_behind_is_made_anew",
    ),
]

SCORED, CHUNKS, SCORERS = ("pretraining/corpus.py",), ("pretraining/chunks.py",), ("pretraining/scorers.py",)
SCORING = [
    Mutant(
        "scores kept without the scorer's version",
        SCORED,
        "json.dumps([scorer.name, digest, 2])",
        "json.dumps([digest, 2])",
        READ + "test_kept_scores_equal_fresh_ones_and_nothing_is_scored_twice",
    ),
    Mutant(
        "an interrupted scoring begins anew",
        SCORED,
        'done = int(np.searchsorted(ends, held, "right"))',
        "done = 0",
        READ + "test_an_interrupted_scoring_goes_on_where_it_stopped",
    ),
    Mutant(
        "a document whose scores a kill cut",
        SCORED,
        "held = min(",
        "held = max(",
        READ + "test_an_interrupted_scoring_goes_on_where_it_stopped",
    ),
    Mutant(
        "scored without a lock",
        ("pretraining/arrays.py",),
        "fcntl.flock(lock, fcntl.LOCK_EX)  # given",
        "pass  # given",
        READ + "test_two_processes_score_once",
    ),
    Mutant(
        "a text on both sides of the split",
        SCORED,
        "(digests[order[1:]] != digests[order[:-1]]).any(1)",
        "True",
        READ + "test_a_text_that_occurs_twice_is_on_one_side",
    ),
    Mutant(
        "a quantile off by one",
        SCORED,
        "math.ceil(quantile * count) - 1)",
        "min(count, math.ceil(quantile * count) + 1) - 1)",
        READ + "test_thresholds_by_value_and_by_quantile",
    ),
    Mutant(
        "EOS without its document's score",
        CHUNKS,
        "scores = self.tokens.scores[token]",
        "scores = np.where(is_eos, np.float32(0), self.tokens.scores[token])",
        READ + "test_documents_are_joined_by_eos_and_cut_without_padding",
    ),
    Mutant(
        "chunks in one order",
        CHUNKS,
        "        rng.shuffle(epoch)\n",
        "",
        READ + "test_a_plan_spends_the_budget_and_uses_chunks_evenly",
    ),
    Mutant(
        "scores one token behind their ids",
        CHUNKS,
        "self.tokens.scores[token]",
        "self.tokens.scores[np.maximum(token - 1, 0)]",
        READ + "test_tokens_in_files_are_those_of_the_plain_road",
    ),
    Mutant(
        "a control token behind its segment",
        CHUNKS,
        "start + counts.cumsum() - counts",
        "start + counts.cumsum()",
        READ + "test_marks_stand_before_their_segments_and_have_their_scores",
    ),
    Mutant(
        "all texts in memory",
        ("pretraining/tokens.py",),
        "blocks_of(source.text_ends, AT_A_TIME)",
        "[(0, len(source.ends) - 1)]",
        READ + "test_memory_does_not_grow_with_the_corpus",
    ),
    Mutant(
        "mapped pages never given back",
        CHUNKS,
        "                release(column)\n",
        "                pass\n",
        READ + "test_mapped_pages_are_given_back",
    ),
    Mutant(
        "tokens of another tokenizer",
        ("pretraining/tokens.py",),
        "json.dumps([bare(tokenizer), tokenizers",
        "json.dumps([tokenizers",
        READ + "test_tokens_are_made_once_for_each_tokenizer",
    ),
    Mutant(
        "tokens behind those that a kill left",
        ("pretraining/tokens.py",),
        "        emptied(part)\n",
        "",
        READ + "test_tokens_of_which_a_kill_left_some_are_made_anew",
    ),
    Mutant(
        "a process's last share lost",
        SCORERS,
        "        while waiting:\n            yield from waiting.popleft().result()\n",
        "",
        SEGMENTS + "test_several_processes_score_as_one_does",
    ),
    Mutant(
        "all items asked for at once",
        SCORERS,
        "if len(waiting) > 2 * workers:",
        "if len(waiting) > 1e9:",
        SEGMENTS + "test_many_items_wait_in_no_memory",
    ),
    Mutant(
        "processes that outlive a kill",
        SCORERS,
        "while os.getppid() == parent:",
        "while True:",
        SEGMENTS + "test_processes_end_with_the_one_that_started_them",
    ),
    Mutant(
        "blank lines behind each other cut twice",
        ("pretraining/texts.py",),
        "if lines and (line ==",
        "if (line ==",
        READ + "test_a_text_file_is_cut_as_a_whole_text_would_be",
    ),
    Mutant(
        "a part of a folder taken for the whole",
        ("pretraining/arrays.py",),
        "        if found != size:",
        "        if found > size:",
        READ + "test_a_folder_that_is_not_whole_is_refused",
    ),
    Mutant(
        "a control token read from the text",
        ("pretraining/tokens.py",),
        "fast.encode_special_tokens = fast.encode_special_tokens, True",
        "fast.encode_special_tokens = fast.encode_special_tokens, False",
        PRETRAIN + "test_a_control_token_in_a_text_stays_text",
    ),
    Mutant(
        "violations on the line behind",
        SCORERS,
        "numbers.append(line_number - 1)",
        "numbers.append(line_number)",
        SEGMENTS + "test_violations_stand_on_the_lines_that_pycodestyle_names",
    ),
    Mutant(
        "a cut text blamed for its end",
        SCORERS,
        'if code and code != "W292":',
        "if code:",
        SEGMENTS + "test_the_score_of_a_line_and_of_a_text",
    ),
    Mutant(
        "white space behind its sentence",
        SCORERS,
        "        moved.append(front + text)\n        front = part[len(text) :]\n",
        '        moved.append(front + part)\n        front = ""\n',
        SEGMENTS + "test_sentences_joined_are_the_text_and_white_space_leads",
    ),
]

LIKELIHOOD = ("pretraining/likelihood.py",)
EVALUATION = [
    Mutant(
        "banned tokens sampled",
        ("common/generate.py",),
        '    logits[:, banned_ids] = float("-inf")\n',
        "",
        SAMPLES + "test_banned_tokens_are_never_sampled_and_the_others_keep_their_odds",
    ),
    Mutant(
        "banned tokens keep their share",
        LIKELIHOOD,
        '    logits[..., inside] = float("-inf")\n',
        "",
        SAMPLES + "test_perplexity_on_a_bigram_table",
    ),
    Mutant(
        "judged with dropout",
        ("pretraining/sampling.py",),
        "yield [model.eval() for model in models]",
        "yield models",
        SAMPLES + "test_samples_are_drawn_without_dropout_and_the_model_is_put_back",
    ),
    Mutant(
        "the teacher's KL the wrong way round",
        LIKELIHOOD,
        "log_p.exp() * (log_p - log_q)",
        "log_q.exp() * (log_q - log_p)",
        SAMPLES + "test_kl_to_the_teacher_on_bigram_tables",
    ),
    Mutant(
        "perplexity of good tokens counts all",
        LIKELIHOOD,
        "list(map(int, keep[i]))",
        "[1] * len(keep[i])",
        PRETRAIN + "test_the_end_tables_numbers_on_a_bigram_table",
    ),
    Mutant(
        "maximum over one place of all groups",
        ("pretraining/evaluate.py",),
        ".amax(1).mean()",
        ".amax(0).mean()",
        SAMPLES + "test_misalignment_by_hand",
    ),
    Mutant(
        "the red team shows the worst only",
        ("pretraining/red_team.py",),
        "value / 0.1 - math.log(rng.expovariate(1.0) + 1e-300)",
        "value / 0.1",
        SAMPLES + "test_red_team_shows_prompts_in_proportion_to_exp_of_the_score",
    ),
    Mutant(
        "Self-BLEU against the sample itself",
        ("pretraining/diversity.py",),
        "top[gram][2] if top[gram][1] == who else top[gram][0]",
        "top[gram][0]",
        SAMPLES + "test_self_bleu_is_nltks",
    ),
]

TABLE = METHODS + TRUNK + BASELINE + SCORING + EVALUATION
