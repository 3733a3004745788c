"""Faults of superhf.py, ppo.py, reward_model.py and the rewards."""

from tests.faults import Mutant

BOTH = ("superhf.py", "ppo.py")
REWARD, SUPERHF, PPO = "test_reward_model.py::", "test_superhf.py::", "test_ppo.py::"
CHOICE = SUPERHF + "test_only_the_best_are_trained_on_with_exactly_their_tokens"
SECOND_ROAD = PPO + "test_advantages_of_a_run_by_a_second_road"
OUT_OF_RANGE = SUPERHF + "test_numbers_out_of_range_are_refused_by_their_flag"
MASKED_ENTRIES = SUPERHF + "test_vocabulary_entries_that_both_models_mask_count_nothing"

REWARDS = [
    Mutant(
        "rewards turned round",
        ("reward_model.py",),
        "-F.logsigmoid(chosen_rewards -",
        "-F.logsigmoid(-chosen_rewards +",
        REWARD + "test_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "reward reads padding",
        ("reward_model.py",),
        'logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]',
        'logits = model.score(model.base_model(input_ids=batch["input_ids"]).last_hidden_state[:, -1])[:, 0]',
        REWARD + "test_padding_and_company_never_change_a_score",
    ),
    Mutant(
        "new head at random",
        ("rewards/models.py",),
        "parameter.zero_()",
        "parameter.abs_()",
        REWARD + "test_a_new_head_is_zero_and_a_trained_one_goes_on",
    ),
    Mutant(
        "head of a stranger at random",
        ("rewards/models.py",),
        'if loading["missing_keys"]:',
        "if not loading:",
        REWARD + "test_a_model_without_a_head_is_no_reward",
    ),
    Mutant(
        "answer runs into the prompt",
        ("rewards/models.py",),
        '"" if apart else " "',
        '""',
        REWARD + "test_an_answer_without_its_leading_space_is_read_as_it_was_trained_on",
    ),
    Mutant(
        "half by position",
        ("reward_model.py",),
        "json.dumps(prompt or answer, default=str)",
        "json.dumps(i)",
        REWARD + "test_halves_are_disjoint_and_together_all",
    ),
    Mutant(
        "both halves are the first",
        ("reward_model.py",),
        'if is_first == (which == "first"):',
        "if is_first:",
        REWARD + "test_each_half_trains_on_its_own_prompts",
    ),
    Mutant(
        "METEOR one way",
        ("rewards/metrics.py",),
        "single_meteor_score(words[1], words[0]",
        "single_meteor_score(words[0], words[1]",
        REWARD + "test_meteor_against_its_formula",
    ),
    Mutant(
        "bins weighted by what they hold",
        ("rewards/metrics.py",),
        "return sum(gaps) / len(gaps) if gaps",
        "return sum(gaps) / len(p) if gaps",
        REWARD + "test_calibration_by_hand",
    ),
]

SAMPLED = [
    Mutant(
        "superhf: the KL turned round",
        ("superhf.py",),
        "kl = (log_ref.exp() * (log_ref.masked_fill(masked, 0.0) - log_policy)).sum(-1)",
        "kl = (log_policy.exp() * (log_policy - log_ref)).sum(-1)",
        SUPERHF + "test_the_kl_is_that_of_the_reference_to_the_policy",
    ),
    Mutant(
        "superhf: masked entries count nan",
        ("superhf.py",),
        'masked = log_ref == float("-inf")',
        "masked = log_ref.isnan()",
        MASKED_ENTRIES,
    ),
    Mutant(
        "superhf: kl not applied",
        ("superhf.py",),
        "loss = ce + kl * forward_kl",
        "loss = ce + forward_kl",
        SUPERHF + "test_the_training_step_is_superhf_loss",
    ),
    Mutant(
        "superhf: mask not shifted",
        ("superhf.py",),
        "mask = completion_mask[:, 1:].bool()",
        "mask = completion_mask[:, :-1].bool()",
        SUPERHF + "test_the_mask_stands_at_the_token_that_is_predicted",
    ),
    Mutant(
        "superhf: the worst are kept", ("superhf.py",), "completion.reward, reverse=True)", "completion.reward)", CHOICE
    ),
    Mutant("superhf: an empty one may be the best", ("superhf.py",), " if completion.answer.strip()]", "]", CHOICE),
    Mutant(
        "superhf: the reference is the policy",
        ("superhf.py",),
        "models.bind_forward(ref_model, ref_columns)",
        "models.bind_forward(model, ref_columns)",
        SUPERHF + "test_the_reference_stays_what_the_policy_began_as",
    ),
    Mutant(
        "the same random numbers at every step",
        BOTH,
        "first_seed + 1009 * step",
        "first_seed",
        SUPERHF + "test_sampling_is_asked_for_in_full",
    ),
    Mutant(
        "cut inside the marker's words",
        BOTH,
        'MARKERS = ("\\n\\nHuman:", "\\n\\nAssistant:")',
        'MARKERS = ("\\n\\nHuman", "\\n\\nAssistant")',
        SUPERHF + "test_completions_end_where_the_dialogue_would_go_on",
    ),
    Mutant("ranges not checked", BOTH, "            if not holds:\n", "            if False:\n", OUT_OF_RANGE),
    Mutant(
        "answers lose the space in front",
        ("common/generate.py",),
        "return whole[len(before) :] if whole.startswith(before) else alone",
        "return alone",
        SUPERHF + "test_what_a_reward_model_reads_is_what_stands_behind_the_prompt",
    ),
    Mutant(
        "ppo: the value of the next token forgotten",
        ("ppo.py",),
        "gamma * value_after - values[:, t]",
        "-values[:, t]",
        PPO + "test_advantages_are_the_written_out_sum",
    ),
    Mutant(
        "ppo: the hopeful side of the clip",
        ("ppo.py",),
        "policy_losses = torch.maximum(",
        "policy_losses = torch.minimum(",
        PPO + "test_losses_and_gradients_in_closed_form",
    ),
    Mutant(
        "ppo: the reward at the first token",
        ("ppo.py",),
        "completion_tokens.cumsum(0) - 1, rewards",
        "completion_tokens.cumsum(0) - completion_tokens, rewards",
        PPO + "test_rewards_of_tokens",
    ),
    Mutant(
        "ppo: penalty to the policy itself",
        ("ppo.py",),
        "ref_logps, _ = ref_of(batch)",
        "ref_logps, _ = policy_of(batch)",
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: the reference is the policy",
        ("ppo.py",),
        "models.bind_forward(ref_model, logps_and_values)",
        "models.bind_forward(model, logps_and_values)",
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: rewards in the order of collate, not of targets",
        ("ppo.py",),
        'rewards = [reward for row in rows for reward in row["rewards"]]',
        'rewards = [row["rewards"][j] for j in range(9) for row in rows if j < len(row["rewards"])]',
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: a mean over tokens for the log-ratio of a completion",
        ("ppo.py",),
        'pad_rows(logratios, batch["lengths"]).sum(1)',
        'pad_rows(logratios, batch["lengths"]).mean(1)',
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: a line longer than the limit",
        ("ppo.py",),
        "room = max_length - len(completion.prompt_ids)",
        "room = max_length",
        PPO + "test_completions_of_a_prompt_share_lines_as_far_as_they_fit",
    ),
    Mutant(
        "collate: rows counted as if all had as many answers as the first",
        ("common/batches.py",),
        "segment += [number] * k",
        "segment += [1 + s // len(rows)] * k",
        "test_logps.py::test_rows_may_differ_in_how_many_answers_they_have",
    ),
    Mutant(
        "ppo: rewards not whitened",
        ("ppo.py",),
        'scale = 1.0 / std(values_of_step(parts, "token_rewards", gather))',
        "scale = 1.0",
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: the mean put back whole",
        ("ppo.py",),
        'rewards = pad_rows(scale * batch["token_rewards"], lengths)',
        'mean = values_of_step(parts, "token_rewards", gather).mean().float()\n'
        '        rewards = pad_rows(scale * (batch["token_rewards"] - mean) + mean, lengths)',
        PPO + "test_whitened_rewards_pay_nothing_for_length",
    ),
    Mutant(
        "ppo: returns of other tokens",
        ("ppo.py",),
        "torch.cat([row[:length] for row, length in zip(padded, lengths)])",
        "torch.cat([row[-length:] for row, length in zip(padded, lengths)])",
        PPO + "test_whitened_rewards_pay_nothing_for_length",
    ),
    Mutant(
        "ppo: a mean over completions",
        ("ppo.py",),
        "(loss * weight / tokens).backward()",
        "(loss * weight / batch['completion_tokens'].sum()).backward()",
        PPO + "test_every_token_weighs_the_same_however_a_step_is_cut",
    ),
]

TABLE = REWARDS + SAMPLED
