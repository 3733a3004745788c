"""Faults of common/ and toy/: what every script stands on."""

from tests.faults import Mutant

BATCHES = "common/batches.py"
CHECKPOINTS = "common/checkpoints.py"
ENCODE = "tokens/encode.py"
EVALUATE = "common/evaluate.py"
GENERATE = "common/generate.py"
METRICS = "common/metrics.py"
MODELS = "common/models.py"
ORACLE = "common/oracle.py"
RUN = "common/run.py"
WORLD = "toy/world.py"
FROZEN = "toy/frozen.py"
BASE = "toy/base.py"
LOGPS_TEST = "test_logps.py::"
TRAINING_TEST = "test_training.py::"
RUN_TEST = "test_run.py::"
DPH_TEST = "test_dph.py::"
TYPO_TEST = "test_typo.py::"
DATA_TEST = "test_data.py::"
SAMPLING_TEST = "test_sampling.py::"
TOY_TEST = "test_toy.py::"
WORLDS_TEST = "test_worlds.py::"
EVALUATE_TEST = "test_evaluate.py::"
PROCESSES_TEST = "test_processes.py::"

TABLE = [
    Mutant(
        "float32 mask in a bfloat16 run",
        (BATCHES,),
        "zero, masked = torch.tensor([0.0, MASKED], dtype=dtype, ",
        "zero, masked = torch.tensor([0.0, MASKED], dtype=torch.float32, ",
        LOGPS_TEST + "test_one_mask_is_kept_for_all_layers",
    ),
    Mutant(
        "bfloat16 for tiny models",
        (MODELS,),
        "if has_tiles and not is_tiny(model) else",
        "if has_tiles else",
        RUN_TEST + "test_dtype_by_processor_and_size",
    ),
    Mutant(
        "dtype chosen again by the processor that resumes",
        (RUN,),
        "self._args.dtype = choose_dtype(self._args.dtype, model, self.device)\n"
        "            self.dtype = getattr(torch, self._args.dtype)",
        "self.dtype = getattr(torch, choose_dtype(self._args.dtype, model, self.device))",
        TRAINING_TEST + "test_a_run_resumed_on_another_processor_keeps_its_dtype",
    ),
    Mutant(
        "label shift by one",
        (BATCHES,),
        "*range(begin, begin + k - 1)]",
        "*range(begin + 1, begin + k)]",
        LOGPS_TEST + "test_exact_on_a_bigram_table",
    ),
    Mutant(
        "first token predicted by itself",
        (BATCHES,),
        "logit_index += [start + len(prompt) - 1, ",
        "logit_index += [start + len(prompt), ",
        LOGPS_TEST + "test_exact_on_a_bigram_table",
    ),
    Mutant(
        "mask shift",
        (ORACLE,),
        "mask = ((position >= prompt) & (position < end))[:, 1:]",
        "mask = ((position >= prompt) & (position < end))[:, :-1]",
        LOGPS_TEST + "test_the_oracle_on_a_bigram_table",
    ),
    Mutant(
        "oracle counts padding",
        (ORACLE,),
        "mask = ((position >= prompt) & (position < end))[:, 1:]",
        "mask = (position >= prompt)[:, 1:]",
        LOGPS_TEST + "test_the_oracle_on_a_bigram_table",
    ),
    Mutant(
        "prompt counted in the completion",
        (ENCODE,),
        '"completions": completions}, None',
        '"completions": [[whole[0][boundary - 1], *c] for c in completions]}, None',
        LOGPS_TEST + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "padding counted",
        (BATCHES,),
        "        padding = length - len(ids)\n",
        "        padding = length - len(ids)\n        logit_index += [start + len(ids) - 1] * (padding > 0)\n"
        "        targets += [pad_id] * (padding > 0)\n        sequence_ids += [parts[-1][0]] * (padding > 0)\n",
        LOGPS_TEST + "test_padding_and_company_change_nothing_on_the_table",
    ),
    Mutant(
        "padding visible",
        (BATCHES,),
        "(segments >= 0).long()",
        "(segments >= -1).long()",
        DATA_TEST + "test_a_batch_by_hand",
    ),
    Mutant(
        "functional dropout left on",
        (MODELS,),
        'if "drop" in name and isinstance(value, float)',
        "if False",
        RUN_TEST + "test_disable_dropout[llama]",
    ),
    Mutant(
        "placeholders in the metrics",
        (RUN,),
        "value.detach() * (weight / world_size())",
        "value.detach()",
        TRAINING_TEST + "test_placeholder_micro_batches_count_nothing",
    ),
    Mutant(
        "placeholders count as rows",
        (BATCHES,),
        "(rows[:1], 0.0)",
        "(rows[:1], 1.0)",
        RUN_TEST + "test_over_all_processes_every_row_counts_once",
    ),
    Mutant(
        "metrics weigh steps alike",
        (RUN,),
        'sum(step["sums"][name] for step in steps) for name',
        'sum(step["sums"][name] / step["count"] for step in steps) / len(steps)'
        ' * sum(step["count"] for step in steps) for name',
        RUN_TEST + "test_logged_means_weigh_every_pair_alike_over_uneven_steps",
    ),
    Mutant(
        "held-out mean over one row more",
        (RUN,),
        "len(rows) * per_row)",
        "(len(rows) + 1) * per_row)",
        RUN_TEST + "test_evaluate_loss_weighs_every_row_alike",
    ),
    Mutant(
        "rows left in the order of length",
        (RUN,),
        "[places.argsort()]",
        "",
        RUN_TEST + "test_predict_keeps_the_order_of_the_rows",
    ),
    Mutant(
        "resume without optimiser state",
        (CHECKPOINTS,),
        "options=StateDictOptions(full_state_dict=True))\n",
        "options=StateDictOptions(full_state_dict=True))\n        for values in optimizer.state.values():\n"
        '            values["exp_avg"].zero_()\n',
        TRAINING_TEST + "test_a_killed_run_resumes_bit_for_bit[dpo]",
    ),
    Mutant(
        "resume without random numbers",
        (CHECKPOINTS,),
        'torch.set_rng_state(tensors["rng|cpu"])',
        'tensors["rng|cpu"]',
        TRAINING_TEST + "test_a_killed_run_resumes_bit_for_bit[dph]",
    ),
    Mutant(
        "resume without unlogged metrics",
        (RUN,),
        'self._window = state["window"]',
        "self._window = []",
        TRAINING_TEST + "test_ctrl_c_saves_and_resumes_bit_for_bit[dpo]",
    ),
    Mutant(
        "checkpoint not written aside",
        (CHECKPOINTS,),
        'for kind in ("part", "step"))',
        'for kind in ("step-9", "step"))',
        TRAINING_TEST + "test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one",
    ),
    Mutant(
        "contradictions on resume ignored",
        (RUN,),
        "if given != saved[name] and (on_line or given != field.default):",
        "if False:",
        TRAINING_TEST + "test_resume_refuses_what_it_cannot_do",
    ),
    Mutant(
        "not-a-number trains on",
        (RUN,),
        'if not math.isfinite(step["sums"]["loss"]):',
        "if False:",
        TRAINING_TEST + "test_a_number_that_is_not_finite_stops_the_run[loss]",
    ),
    Mutant(
        "only the likeliest are sampled",
        (GENERATE,),
        "logits = logits.float()\n",
        "logits = logits.float()\n    logits[logits < logits.topk(min(50, logits.shape[-1])).values[:, -1:]] = -1e9\n",
        SAMPLING_TEST + "test_frequencies_are_the_softmax",
    ),
    Mutant(
        "a token of probability 0 is drawn",
        (GENERATE,),
        "totals, right=True",
        "totals, right=False",
        SAMPLING_TEST + "test_a_token_of_probability_0_is_never_drawn",
    ),
    Mutant(
        "rare tokens are lost in the sum",
        (GENERATE,),
        ".exp_().cumsum(-1, dtype=torch.float64)",
        ".exp_().cumsum(-1).double()",
        SAMPLING_TEST + "test_rare_tokens_of_a_large_vocabulary_keep_their_odds",
    ),
    Mutant(
        "top_p looks at the likeliest alone",
        (GENERATE,),
        "if top < logits.shape[-1] and (is_kept & (ranked == ranked[:, -1:])).any():",
        "if False:",
        SAMPLING_TEST + "test_the_nucleus_is_that_of_a_full_sort",
    ),
    Mutant(
        "the room keeps the states of rows that left",
        ("attention/rooms.py",),
        "[room.index_select(0, beam_idx) for room in self.rooms]",
        "[room.index_select(0, beam_idx.flip(0)) for room in self.rooms]",
        SAMPLING_TEST + "test_states_in_spare_room_are_those_of_a_growing_cache",
    ),
    Mutant(
        "random numbers of the place in a batch",
        (GENERATE,),
        "tokenizer, uniforms[rows], pick",
        "tokenizer, uniforms[: len(rows)], pick",
        SAMPLING_TEST + "test_a_completion_does_not_depend_on_its_company",
    ),
    Mutant(
        "all processes draw the same",
        (GENERATE,),
        "[processes.rank() :: world]",
        "[::world]",
        SAMPLING_TEST + "test_two_processes_sample_what_one_does",
    ),
    Mutant(
        "positions count the padding",
        (GENERATE,),
        "positions, new = (mask.cumsum(-1) - 1).clamp(min=0), ",
        "positions, new = (mask.cumsum(-1) * 0 + torch.arange(mask.shape[1])), ",
        SAMPLING_TEST + "test_padding_on_the_left_changes_nothing",
    ),
    Mutant(
        "a process stops when its own rows end",
        (GENERATE,),
        "if not processes.sum_over_processes(torch.tensor(len(going), device=device)):",
        "if not going:",
        SAMPLING_TEST + "test_a_process_without_rows_makes_the_passes_of_the_others",
    ),
    Mutant(
        "a prompt is read for each completion",
        (GENERATE,),
        "[distinct[tuple(prompt)] for prompt in prompts]\n    ids, mask = pad_left(list(map(list, distinct)), ",
        "list(range(len(prompts)))\n    ids, mask = pad_left(list(map(list, prompts)), ",
        SAMPLING_TEST + "test_a_prompt_is_read_once_and_ended_rows_leave",
    ),
    Mutant(
        "EOS dropped",
        (ENCODE,),
        "whole = [ids if done or not add_eos else [*ids, eos] for",
        "whole = [ids if done or not add_eos else [*ids] for",
        LOGPS_TEST + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "EOS twice",
        (ENCODE,),
        "whole = [ids if done or not add_eos else [*ids, eos] for",
        "whole = [[*ids, eos] for",
        LOGPS_TEST + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "EOS on a cut answer",
        (ENCODE,),
        "completions = [ids[boundary:max_length] for ids in whole]",
        "completions = [ids[boundary : max_length - 1] + [eos] if len(ids) > max_length else ids[boundary:]"
        " for ids in whole]",
        LOGPS_TEST + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "positions do not restart",
        (BATCHES,),
        "positions += range(len(prompt), len(prompt) + k)",
        "positions += range(len(positions), len(positions) + k)",
        LOGPS_TEST + "test_every_layout_agrees_with_the_oracle",
    ),
    Mutant(
        "rejected sees chosen",
        (BATCHES,),
        "visible = causal & ((key == query) | (key == 0))",
        "visible = causal & (key >= 0)",
        LOGPS_TEST + "test_an_answer_does_not_see_the_other_one",
    ),
    Mutant(
        "answers do not see the prompt",
        (BATCHES,),
        "visible = causal & ((key == query) | (key == 0))",
        "visible = causal & (key == query)",
        LOGPS_TEST + "test_every_layout_agrees_with_the_oracle",
    ),
    Mutant(
        "wrong layout accepted",
        (ORACLE,),
        "if gap <= tolerance:",
        'if gap < float("inf"):',
        LOGPS_TEST + "test_a_layout_that_a_model_reads_wrongly_is_not_used",
    ),
    Mutant(
        "pad is EOS",
        (MODELS,),
        "if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:",
        "if tokenizer.pad_token_id is None:",
        RUN_TEST + "test_pad_equal_to_eos_is_replaced",
    ),
    Mutant(
        "pad id not saved",
        (MODELS,),
        "model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id",
        "pass",
        TRAINING_TEST + "test_pad_is_not_eos_in_what_is_saved",
    ),
    Mutant(
        "ties count as wins",
        (METRICS,),
        "0.5 * (chosen == rejected).double()",
        "1.0 * (chosen == rejected).double()",
        RUN_TEST + "test_accuracy_counts_ties_one_half",
    ),
    Mutant(
        "KL counts the prompt",
        (EVALUATE,),
        "mask = ((position >= begin) & (position < end - 1))[:, -keep:]",
        "mask = (position < end - 1).expand(len(chunk), -1)[:, -keep:]",
        RUN_TEST + "test_kl_of_samples_on_bigram_tables",
    ),
    Mutant(
        "KL of the other direction",
        (EVALUATE,),
        "log_p.exp() * (log_p - log_q), 0.0)",
        "log_q.exp() * (log_q - log_p), 0.0)",
        RUN_TEST + "test_kl_of_samples_on_bigram_tables",
    ),
    Mutant(
        "frontier sign",
        (WORLD,),
        "(rewards.double()[None] / betas[:, None, None])",
        "(-rewards.double()[None] / betas[:, None, None])",
        TOY_TEST + "test_the_frontier_of_two_answers_in_closed_form",
    ),
    Mutant(
        "a frozen world may be any bytes",
        (FROZEN,),
        "if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:",
        "if not (folder / name).read_bytes():",
        WORLDS_TEST + "test_a_damaged_frozen_world_is_one_sentence_before_any_work",
    ),
    Mutant(
        "temperature multiplies",
        (BASE,),
        "min(-gap / temperature, 700.0)",
        "min(-gap * temperature, 700.0)",
        WORLDS_TEST + "test_labels_follow_bradley_terry_at_a_temperature",
    ),
    Mutant(
        "askers take polite words for answers",
        (WORLD,),
        'agrees = judge({**row, "right": belief}, answer)["right"]',
        "agrees = belief in answer.split()",
        WORLDS_TEST + "test_a_polite_word_is_no_answer_that_an_asker_agrees_with",
    ),
    Mutant(
        "last token off by one",
        (BATCHES,),
        "last[s] = k, begin + k - 1",
        "last[s] = k, begin + k - 2",
        DPH_TEST + "test_rewards_and_gradients_of_separate_passes",
    ),
    Mutant(
        "best of n picks the smallest",
        (EVALUATE,),
        "picked = scores.argmax(1).tolist()",
        "picked = scores.argmin(1).tolist()",
        DPH_TEST + "test_candidates_have_all_rewards_and_the_largest_is_picked",
    ),
    Mutant(
        "rewards of other candidates",
        (EVALUATE,),
        "values.float().cpu().view(-1, len(chunk)).T",
        "values.float().cpu().view(len(chunk), -1)",
        DPH_TEST + "test_candidates_have_all_rewards_and_the_largest_is_picked",
    ),
    Mutant(
        "KL of the best of n without its bound",
        (EVALUATE,),
        "return math.log(best_of) - (best_of - 1) / best_of + logratios.double()",
        "return logratios.double()",
        DPH_TEST + "test_the_best_of_n_costs_at_most_its_bound",
    ),
    Mutant(
        "reference samples sharpened",
        (EVALUATE,),
        "room, seed=seed + 2",
        "room, temperature=0.3, seed=seed + 2",
        TYPO_TEST + "test_samples_come_from_the_reference_at_temperature_one",
    ),
    Mutant(
        "dropout of a loaded model left on",
        (MODELS,),
        "    fuse_gelu(model)\n    disable_dropout(model)\n",
        "    fuse_gelu(model)\n",
        RUN_TEST + "test_a_loaded_model_has_no_dropout_and_its_configuration_stays",
    ),
    Mutant(
        "a gradient that is not finite trains on",
        (RUN,),
        "if not math.isfinite(norm):",
        "if False:",
        TRAINING_TEST + "test_a_number_that_is_not_finite_stops_the_run[gradient]",
    ),
    Mutant(
        "the residual stream is rounded at the border of each sharded block",
        (MODELS,),
        "cast_forward_inputs=False",
        "cast_forward_inputs=True",
        PROCESSES_TEST + "test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32",
    ),
    Mutant(
        "embeddings and output layer are gathered in bfloat16 too",
        (MODELS,),
        "fully_shard(model, reshard_after_forward=True)",
        "fully_shard(model, reshard_after_forward=True, mp_policy=policy)",
        PROCESSES_TEST + "test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32",
    ),
    Mutant(
        "sharded blocks are gathered in float32",
        (MODELS,),
        "MixedPrecisionPolicy(dtype, torch",
        "MixedPrecisionPolicy(torch.float32, torch",
        PROCESSES_TEST + "test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32",
    ),
    Mutant(
        "sharded weights are kept in bfloat16",
        (MODELS,),
        "            fully_shard(module, mp_policy=policy)\n",
        "            fully_shard(module.to(dtype), mp_policy=policy)\n",
        PROCESSES_TEST + "test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32",
    ),
    Mutant(
        "processes ask each other at each step whether to stop",
        (RUN,),
        "self._agreed_stop() if reads or world_size() == 1 else 0",
        "self._agreed_stop()",
        PROCESSES_TEST + "test_a_run_stops_where_metrics_are_read_and_goes_on_with_another_number_of_processes",
    ),
    Mutant(
        "one process too goes on until metrics are read",
        (RUN,),
        "if reads or world_size() == 1 else 0",
        "if reads else 0",
        PROCESSES_TEST + "test_a_run_stops_where_metrics_are_read_and_goes_on_with_another_number_of_processes",
    ),
    Mutant(
        "gradients of several processes are summed",
        (BATCHES,),
        "chunks.append((share, float(world_size)) if share else (rows[:1], 0.0))",
        "chunks.append((share, float(world_size) ** 2) if share else (rows[:1], 0.0))",
        PROCESSES_TEST + "test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32",
    ),
    Mutant(
        "a run that is told to stop saves without its last metrics",
        (RUN,),
        "if reads or self.stopping:",
        "if reads:",
        TRAINING_TEST + "test_ctrl_c_saves_and_resumes_bit_for_bit[dpo]",
    ),
    Mutant(
        "answers of a pair exchanged in predicted columns",
        (RUN,),
        ".unflatten(0, (-1, len(numbers))).transpose(0, 1)",
        ".unflatten(0, (len(numbers), -1))",
        RUN_TEST + "test_predict_keeps_the_order_of_the_rows",
    ),
    Mutant(
        "the judge is not asked about all answers",
        (EVALUATE,),
        'metrics |= judge(answers, metrics["kl"], ref)',
        'metrics |= judge(answers[:1], metrics["kl"], ref)',
        EVALUATE_TEST + "test_judges_are_asked_about_all_answers_and_their_kl",
    ),
]
