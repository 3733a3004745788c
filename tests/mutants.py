"""Tests of the tests: `python -m tests.mutants [--jobs 2] [--only NAME] [--part 1 --of 3]` applies faults one at a time and sees whether the tests notice.

Each fault is made in a copy of the tree, in every file named for it, and only the test that must catch it is run there. It counts as caught
only if, for every script that carries the fault, an assertion of that test fails (or an exception that it waits for does not come): a crash,
an import error or a check of the code's form proves nothing. Before all, the copy without a fault must pass all these tests.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Scripts that share a trunk: a fault in it is made in each of them at once.
PAIRS = tuple(f"{name}.py" for name in ("dpo", "cdpo", "typo", "dph") if (ROOT / f"{name}.py").exists())
WITH_REFERENCE = ("dpo.py", "cdpo.py", "dph.py")
DATA, EVALUATE, RUNTIME, TOY = "common/data.py", "common/evaluate.py", "common/runtime.py", "common/toy.py"
TIME_LIMIT = 240  # seconds for a test that takes a few, on a busy machine too


@dataclass
class Mutant:
    name: str
    files: tuple[str, ...]
    old: str  # the exact text, once in each file
    new: str
    test: str  # the node that must catch it, below tests/; a test with parameters runs with all of them


LOSSES, LOGPS, TRAINING, RUN, DPH = (
    f"test_{name}.py::" for name in ("pairs_losses", "logps", "training", "runtime", "dph")
)
HELD_OUT = TRAINING + "test_held_out_metrics_are_those_of_the_saved_model"
WEIGHS = TRAINING + "test_every_pair_weighs_the_same"
RESUMED = TRAINING + "test_a_killed_run_resumes_bit_for_bit"

FOUNDATION = [
    Mutant(
        "sign flip",
        ("dpo.py",),
        "return -F.logsigmoid(logits)",
        "return -F.logsigmoid(-logits)",
        LOSSES + "test_dpo_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "rejected minus chosen",
        ("dpo.py",),
        "(chosen_logratios - rejected_logratios)",
        "(rejected_logratios - chosen_logratios)",
        HELD_OUT + "[tiny_llama-dpo]",
    ),
    Mutant(
        "beta not applied",
        ("dpo.py",),
        "logits = beta * (",
        "logits = 1.0 * (",
        LOSSES + "test_dpo_at_values_known_from_elsewhere",
    ),
    Mutant(
        "beta not applied to rewards",
        ("dpo.py", "cdpo.py"),
        "chosen_rewards = args.beta * (chosen_logps",
        "chosen_rewards = (chosen_logps",
        HELD_OUT,
    ),
    Mutant(
        "reference forgotten",
        ("dpo.py",),
        "rejected_logratios = policy_rejected_logps - ref_rejected_logps",
        "rejected_logratios = policy_rejected_logps",
        LOSSES + "test_dpo_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "reference of the wrong answer",
        ("dpo.py", "cdpo.py", "dph.py"),
        'batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref[split]',
        'batch["ref_rejected_logps"], batch["ref_chosen_logps"] = ref[split]',
        TRAINING + "test_the_first_logged_loss_is_known_though_the_configuration_has_dropout",
    ),
    Mutant(
        "shapes not checked",
        ("dpo.py",),
        "if len(shapes) > 1 or policy_chosen_logps.dim() != 1:",
        "if False:",
        LOSSES + "test_shapes_that_would_broadcast_are_refused",
    ),
    Mutant(
        "label shift by one",
        (DATA,),
        "*range(begin, begin + k - 1)]",
        "*range(begin + 1, begin + k)]",
        LOGPS + "test_exact_on_a_bigram_table",
    ),
    Mutant(
        "first token predicted by itself",
        (DATA,),
        "source += [start + len(prompt) - 1, ",
        "source += [start + len(prompt), ",
        LOGPS + "test_exact_on_a_bigram_table",
    ),
    Mutant(
        "mask shift",
        (EVALUATE,),
        "mask = ((position >= prompt) & (position < end))[:, 1:]",
        "mask = ((position >= prompt) & (position < end))[:, :-1]",
        LOGPS + "test_the_oracle_on_a_bigram_table",
    ),
    Mutant(
        "oracle counts padding",
        (EVALUATE,),
        "mask = ((position >= prompt) & (position < end))[:, 1:]",
        "mask = (position >= prompt)[:, 1:]",
        LOGPS + "test_the_oracle_on_a_bigram_table",
    ),
    Mutant(
        "mean for sum",
        PAIRS,
        '.index_add(0, batch["sequence"], logps)',
        '.index_add(0, batch["sequence"], logps) / batch["completion_tokens"]',
        LOGPS + "test_exact_on_a_bigram_table",
    ),
    Mutant(
        "prompt counted in the completion",
        (DATA,),
        '"completions": completions}, None',
        '"completions": [[whole[0][boundary - 1], *c] for c in completions]}, None',
        LOGPS + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "padding counted",
        (DATA,),
        "        padding = length - len(ids)\n",
        "        padding = length - len(ids)\n        source, targets, sequence = source + [start + len(ids) - 1] * (padding > 0), targets + [pad_id] * (padding > 0), sequence + [parts[-1][0]] * (padding > 0)\n",
        LOGPS + "test_padding_and_company_change_nothing_on_the_table",
    ),
    Mutant(
        "padding visible",
        (DATA,),
        "(segments >= 0).long()",
        "(segments >= -1).long()",
        "test_data.py::test_a_batch_by_hand",
    ),
    Mutant(
        "dropout left on",
        PAIRS,
        "    for step in run.steps(len(plan)):\n",
        "    for module in model.modules():\n        vars(module).update({'p': 0.1} if isinstance(module, torch.nn.Dropout) else {})\n    for step in run.steps(len(plan)):\n",
        TRAINING + "test_the_first_logged_loss_is_known_though_the_configuration_has_dropout",
    ),
    Mutant(
        "functional dropout left on",
        (RUNTIME,),
        'if "drop" in name and isinstance(value, float)',
        "if False",
        RUN + "test_disable_dropout[llama]",
    ),
    Mutant(
        "reference taken after a step",
        ("dpo.py", "cdpo.py"),
        "        optimizer.zero_grad()\n",
        "        optimizer.zero_grad()\n        ref.update({split: score(split) for split in splits} if step == 0 else {})\n",
        HELD_OUT,
    ),
    Mutant(
        "last window by batch_size",
        PAIRS,
        "run.world_size / len(plan[step]))",
        "run.world_size / args.batch_size)",
        WEIGHS,
    ),
    Mutant(
        "micro-batch means",
        PAIRS,
        "return losses.sum(), pair_metrics(",
        "return losses.mean() * args.batch_size, pair_metrics(",
        WEIGHS,
    ),
    Mutant(
        "placeholders in the loss",
        PAIRS,
        "(loss * real * run.world_size",
        "(loss * run.world_size",
        TRAINING + "test_placeholder_micro_batches_count_nothing",
    ),
    Mutant(
        "placeholders in the metrics",
        (RUNTIME,),
        "value.detach() * float(real)",
        "value.detach()",
        TRAINING + "test_placeholder_micro_batches_count_nothing",
    ),
    Mutant(
        "placeholders count as rows",
        (DATA,),
        "(rows[:1], False)",
        "(rows[:1], True)",
        RUN + "test_over_all_processes_every_row_counts_once",
    ),
    Mutant("gradients not cleared", PAIRS, "        optimizer.zero_grad()\n", "", WEIGHS),
    Mutant(
        "metrics weigh steps alike",
        (RUNTIME,),
        'sum(p["sums"][name] for p in steps) for name',
        'sum(p["sums"][name] / p["rows"] for p in steps) / len(steps) * sum(p["rows"] for p in steps) for name',
        RUN + "test_logged_means_weigh_every_pair_alike_over_uneven_steps",
    ),
    Mutant(
        "held-out mean over one row more",
        (RUNTIME,),
        "len(rows) * targets)",
        "(len(rows) + 1) * targets)",
        RUN + "test_mean_metrics_weigh_every_row_alike",
    ),
    Mutant(
        "rows left in the order of length",
        (RUNTIME,),
        "[indices.argsort()]",
        "",
        RUN + "test_map_rows_keeps_the_order_of_the_rows",
    ),
    Mutant(
        "learning rate not set",
        PAIRS,
        'group["lr"] = lr',
        'group["lr"] = args.lr',
        TRAINING + "test_the_learning_rate_of_each_step_is_the_schedules",
    ),
    Mutant(
        "resume without the data order",
        PAIRS,
        "args.epochs, args.max_steps, args.seed)",
        "args.epochs, args.max_steps, args.seed + run.step)",
        RESUMED,
    ),
    Mutant(
        "resume without optimiser state",
        (RUNTIME,),
        "options=StateDictOptions(full_state_dict=True))\n\n    # -- the end",
        'options=StateDictOptions(full_state_dict=True))\n        for values in optimizer.state.values():\n            values["exp_avg"].zero_()\n\n    # -- the end',
        RESUMED,
    ),
    Mutant(
        "resume without random numbers",
        (RUNTIME,),
        'torch.set_rng_state(tensors.pop("rng|cpu"))',
        'tensors.pop("rng|cpu")',
        RESUMED + "[dph]",
    ),
    Mutant(
        "resume without unlogged metrics",
        (RUNTIME,),
        'self._read = state["unlogged"]',
        "self._read = []",
        TRAINING + "test_ctrl_c_saves_and_resumes_bit_for_bit",
    ),
    Mutant(
        "checkpoint not written aside",
        (RUNTIME,),
        'for kind in ("part", "step"))',
        'for kind in ("step-9", "step"))',
        TRAINING + "test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one",
    ),
    Mutant(
        "contradictions on resume ignored",
        (RUNTIME,),
        "if differs and (on_line or given != field.default):",
        "if False:",
        TRAINING + "test_resume_refuses_what_it_cannot_do",
    ),
    Mutant(
        "not-a-number trains on",
        (RUNTIME,),
        'if not (math.isfinite(p["sums"]["loss"]) and math.isfinite(norm)):',
        "if False:",
        TRAINING + "test_a_number_that_is_not_finite_stops_the_run",
    ),
    Mutant(
        "top_k left at its default",
        (EVALUATE,),
        ', "top_k": 0}',
        "}",
        "test_sampling.py::test_frequencies_are_the_softmax",
    ),
    Mutant(
        "EOS dropped",
        (DATA,),
        "whole = [ids if done else [*ids, eos] for",
        "whole = [ids if done else [*ids] for",
        LOGPS + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "EOS twice",
        (DATA,),
        "whole = [ids if done else [*ids, eos] for",
        "whole = [[*ids, eos] for",
        LOGPS + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "EOS on a cut answer",
        (DATA,),
        "completions = [ids[boundary:max_length] for ids in whole]",
        "completions = [ids[boundary : max_length - 1] + [eos] if len(ids) > max_length else ids[boundary:] for ids in whole]",
        LOGPS + "test_one_eos_ends_an_answer_and_none_a_cut_one",
    ),
    Mutant(
        "positions do not restart",
        (DATA,),
        "positions += range(len(prompt), len(prompt) + k)",
        "positions += range(len(positions), len(positions) + k)",
        LOGPS + "test_every_layout_agrees_with_the_oracle",
    ),
    Mutant(
        "rejected sees chosen",
        (DATA,),
        "visible = causal & ((key == query) | (key == 0))",
        "visible = causal & (key >= 0)",
        LOGPS + "test_an_answer_does_not_see_the_other_one",
    ),
    Mutant(
        "answers do not see the prompt",
        (DATA,),
        "visible = causal & ((key == query) | (key == 0))",
        "visible = causal & (key == query)",
        LOGPS + "test_every_layout_agrees_with_the_oracle",
    ),
    Mutant(
        "log-softmax in bf16",
        PAIRS,
        "wide = torch.promote_types(logits.dtype, torch.float32)",
        "wide = logits.dtype",
        LOGPS + "test_bf16_logits_are_scored_in_float32",
    ),
    Mutant(
        "gradient of the log-softmax without the target",
        PAIRS,
        ".mul_(-g).scatter_add_(-1, y, g)",
        ".mul_(-g)",
        LOGPS + "test_token_logps_gradient_is_exact",
    ),
    Mutant(
        "gradient that forgets what comes from above",
        PAIRS,
        "(logits, targets, totals, grad[:, None])",
        "(logits, targets, totals, torch.ones_like(grad)[:, None])",
        LOGPS + "test_token_logps_gradient_is_exact",
    ),
    Mutant(
        "a chunk left out",
        PAIRS,
        "for h, t in chunks])",
        "for h, t in list(chunks)[:-1] + [(states[:0], targets[:0])]] + [states.new_zeros(1 + (len(targets) - 1) % CHUNK)])",
        LOGPS + "test_chunks_change_neither_values_nor_gradients",
    ),
    Mutant(
        "wrong layout accepted",
        (EVALUATE,),
        "if gap <= 1e-3 + 1e-6 * expected.abs().max().item():",
        "if gap < float('inf'):",
        LOGPS + "test_a_layout_that_a_model_reads_wrongly_is_not_used",
    ),
    Mutant(
        "pad is EOS",
        (RUNTIME,),
        "if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:",
        "if tokenizer.pad_token_id is None:",
        RUN + "test_pad_equal_to_eos_is_replaced",
    ),
    Mutant(
        "pad id not saved",
        (RUNTIME,),
        "model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id",
        "pass",
        TRAINING + "test_pad_is_not_eos_in_what_is_saved",
    ),
    Mutant(
        "ties count as wins",
        (EVALUATE,),
        "0.5 * (chosen == rejected).double()",
        "1.0 * (chosen == rejected).double()",
        RUN + "test_accuracy_counts_ties_one_half",
    ),
    Mutant(
        "KL counts the prompt",
        (EVALUATE,),
        "mask = ((position >= begin) & (position < end - 1))[:, -keep:]",
        "mask = (position < end - 1).expand(len(chunk), -1)[:, -keep:]",
        RUN + "test_kl_of_samples_on_bigram_tables",
    ),
    Mutant(
        "KL of the other direction",
        (EVALUATE,),
        "kl = (log_p.exp() * (log_p - log_q)).sum(-1)",
        "kl = (log_q.exp() * (log_q - log_p)).sum(-1)",
        RUN + "test_kl_of_samples_on_bigram_tables",
    ),
    Mutant(
        "frontier sign",
        (TOY,),
        "(rewards.double()[None] / betas[:, None, None])",
        "(-rewards.double()[None] / betas[:, None, None])",
        "test_toy.py::test_the_frontier_of_two_answers_in_closed_form",
    ),
]

METHODS = [
    Mutant(
        "eps swapped",
        ("cdpo.py",),
        "-(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)",
        "-label_smoothing * F.logsigmoid(logits) - (1 - label_smoothing) * F.logsigmoid(-logits)",
        LOSSES + "test_cdpo_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "cdpo: smoothing ignored",
        ("cdpo.py",),
        "args.beta, args.label_smoothing)  # [batch]",
        "args.beta, 0.0)  # [batch]",
        HELD_OUT,
    ),
    Mutant(
        "cdpo: sign of the smoothed term",
        ("cdpo.py",),
        "- label_smoothing * F.logsigmoid(-logits)",
        "+ label_smoothing * F.logsigmoid(-logits)",
        LOSSES + "test_cdpo_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "cdpo: no 1 - eps",
        ("cdpo.py",),
        "-(1 - label_smoothing) * F.logsigmoid(logits)",
        "-F.logsigmoid(logits)",
        LOSSES + "test_minima",
    ),
    Mutant(
        "cdpo: eps of a half taken",
        ("cdpo.py",),
        "if not 0 <= label_smoothing < 0.5:",
        "if False:",
        LOSSES + "test_label_smoothing_out_of_range_is_refused",
    ),
    Mutant(
        "separable: second term's sign",
        ("dph.py",),
        "return -chosen - rejected",
        "return -chosen + rejected",
        LOSSES + "test_separable_dph_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "separable: mean of the terms",
        ("dph.py",),
        "return -chosen - rejected",
        "return (-chosen - rejected) / 2",
        LOSSES + "test_where_nothing_is_preferred",
    ),
    Mutant(
        "separable: labels of the rejected",
        ("dph.py",),
        "label_smoothing * F.logsigmoid(rejected_rewards) + (1 - label_smoothing) * F.logsigmoid(-rejected_rewards)",
        "(1 - label_smoothing) * F.logsigmoid(rejected_rewards) + label_smoothing * F.logsigmoid(-rejected_rewards)",
        LOSSES + "test_separable_dph_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "contrastive: eps swapped",
        ("dph.py",),
        "-(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)",
        "-label_smoothing * F.logsigmoid(margins) - (1 - label_smoothing) * F.logsigmoid(-margins)",
        LOSSES + "test_contrastive_dph_is_cdpo_on_the_rewards_of_the_head",
    ),
    Mutant(
        "contrastive: rejected minus chosen",
        ("dph.py",),
        "margins = chosen_rewards - rejected_rewards\n    return",
        "margins = rejected_rewards - chosen_rewards\n    return",
        LOSSES + "test_contrastive_dph_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "dph: shapes not checked",
        ("dph.py",),
        "if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:",
        "if False:",
        LOSSES + "test_shapes_that_would_broadcast_are_refused",
    ),
    Mutant(
        "the other loss",
        ("dph.py",),
        'if args.dph_loss == "separable" else contrastive_dph_loss',
        'if args.dph_loss != "separable" else contrastive_dph_loss',
        DPH + "test_the_joint_objective",
    ),
    Mutant(
        "reward read one token early",
        ("dph.py",),
        'hidden[batch["last"]]',
        'hidden[batch["last"] - 1]',
        DPH + "test_rewards_of_a_model_made_by_hand",
    ),
    Mutant(
        "last token off by one",
        (DATA,),
        "last[s] = k, begin + k - 1",
        "last[s] = k, begin + k - 2",
        DPH + "test_rewards_and_gradients_of_separate_passes",
    ),
    Mutant(
        "head dropout in evaluation",
        ("dph.py",),
        "training=torch.is_grad_enabled())",
        "training=True)",
        DPH + "test_head_dropout_acts_in_training_and_not_in_evaluation",
    ),
    Mutant(
        "head dropout ignored",
        ("dph.py",),
        "logps_and_rewards(model, batch, args.head_dropout, train_lm",
        "logps_and_rewards(model, batch, 0.0, train_lm",
        DPH + "test_head_dropout_acts_in_training_and_not_in_evaluation",
    ),
    Mutant(
        "prior pushes away",
        ("dph.py",),
        "parameter.sub_(rate * (parameter - prior[name]))",
        "parameter.add_(rate * (parameter - prior[name]))",
        DPH + "test_the_prior_pulls_back_and_decay_does_not",
    ),
    Mutant(
        "prior is zero",
        ("dph.py",),
        "parameter.sub_(rate * (parameter - prior[name]))",
        "parameter.sub_(rate * parameter)",
        DPH + "test_the_prior_pulls_back_and_decay_does_not",
    ),
    Mutant(
        "prior on embeddings",
        ("dph.py",),
        "if p.dim() > 1 and id(p) not in embeddings}",
        "if p.dim() > 1}",
        DPH + "test_a_strong_prior_holds_the_matrices_and_nothing_else",
    ),
    Mutant(
        "prior on norms",
        ("dph.py",),
        "if p.dim() > 1 and id(p) not in embeddings}",
        "if id(p) not in embeddings}",
        DPH + "test_a_strong_prior_holds_the_matrices_and_nothing_else",
    ),
    Mutant(
        "prior ignored",
        ("dph.py",),
        "pull_to_prior(model, prior, lr * args.prior_decay)",
        "pull_to_prior(model, prior, 0.0)",
        DPH + "test_a_strong_prior_holds_the_matrices_and_nothing_else",
    ),
    Mutant(
        "backbone not frozen",
        ("dph.py",),
        "model.requires_grad_(False).score.requires_grad_(True)",
        "model.score.requires_grad_(True)",
        DPH + "test_a_frozen_backbone_leaves_the_lm_untouched",
    ),
    Mutant(
        "dpo_weight ignored",
        ("dph.py",),
        "losses = losses + dpo_weight * contrastive",
        "losses = losses + contrastive",
        DPH + "test_the_joint_objective",
    ),
    Mutant(
        "dph_weight ignored",
        ("dph.py",),
        "losses = args.dph_weight * head_loss(",
        "losses = head_loss(",
        DPH + "test_the_joint_objective",
    ),
    Mutant(
        "smoothing ignored in dph's cDPO",
        ("dph.py",),
        "args.beta * rejected_logratios, args.label_smoothing)",
        "args.beta * rejected_logratios, 0.0)",
        DPH + "test_the_joint_objective",
    ),
    Mutant(
        "beta ignored in dph's cDPO",
        ("dph.py",),
        "contrastive_dph_loss(args.beta * chosen_logratios, args.beta * rejected_logratios,",
        "contrastive_dph_loss(chosen_logratios, rejected_logratios,",
        DPH + "test_the_joint_objective",
    ),
    Mutant(
        "head starts at random",
        ("dph.py",),
        'saved.get("score.weight", torch.zeros(()))',
        'saved.get("score.weight", model.score.weight)',
        DPH + "test_a_new_head_is_zero_and_a_saved_one_is_kept",
    ),
    Mutant(
        "head not reloaded on resume",
        ("dph.py",),
        'runtime.load_weights(run.checkpoint or base, "score.weight")',
        'runtime.load_weights(base, "score.weight")',
        RESUMED + "[dph]",
    ),
    Mutant(
        "head not reloaded from a run",
        ("dph.py",),
        'runtime.load_weights(run.checkpoint or base, "score.weight")',
        'runtime.load_weights(run.checkpoint or "", "score.weight")',
        DPH + "test_a_second_run_goes_on_with_the_head",
    ),
    Mutant(
        "num_labels not saved",
        ("dph.py",),
        "    model.config.num_labels = 1\n",
        "",
        DPH + "test_a_run_is_a_causal_lm_and_a_reward_model",
    ),
    Mutant(
        "best of n picks the smallest",
        (EVALUATE,),
        "best = scores.argmax(1).tolist()",
        "best = scores.argmin(1).tolist()",
        DPH + "test_candidates_have_all_rewards_and_the_largest_is_picked",
    ),
    Mutant(
        "rewards of other candidates",
        (EVALUATE,),
        "got.float().cpu().view(-1, len(chunk)).T",
        "got.float().cpu().view(len(chunk), -1)",
        DPH + "test_candidates_have_all_rewards_and_the_largest_is_picked",
    ),
    Mutant(
        "KL of the best of n without its bound",
        (EVALUATE,),
        "kl = math.log(n) - (n - 1) / n + ratio.double()",
        "kl = ratio.double()",
        DPH + "test_the_best_of_n_costs_at_most_its_bound",
    ),
]

TYPO = "test_typo.py::"
TYPO_TERMS = TYPO + "test_loss_is_the_supervised_term_plus_lambda_times_the_sum_over_tokens"
DESIDERATA = [
    Mutant(
        "typo: rejected minus chosen",
        ("typo.py",),
        "-F.logsigmoid(policy_chosen_logps - policy_rejected_logps)",
        "-F.logsigmoid(policy_rejected_logps - policy_chosen_logps)",
        TYPO + "test_supervised_term_against_its_gradient",
    ),
    Mutant(
        "typo: reverse KL",
        ("typo.py",),
        "return (log_ref.exp() * (log_ref - policy_logits.log_softmax(-1))).sum(-1)",
        "return (policy_logits.softmax(-1) * (policy_logits.log_softmax(-1) - log_ref)).sum(-1)",
        TYPO + "test_forward_kl_value_gradient_and_direction",
    ),
    Mutant(
        "typo: KL averaged over the vocabulary",
        ("typo.py",),
        "(log_ref - policy_logits.log_softmax(-1))).sum(-1)",
        "(log_ref - policy_logits.log_softmax(-1))).mean(-1)",
        TYPO + "test_forward_kl_value_gradient_and_direction",
    ),
    Mutant(
        "typo: lambda grows with the samples",
        ("typo.py",),
        "kl.view(-1, len(losses)).mean(0)",
        "kl.view(-1, len(losses)).sum(0)",
        TYPO_TERMS + "[2]",
    ),
    Mutant("typo: KL without lambda", ("typo.py",), "losses + args.lam * kl.view", "losses + kl.view", TYPO_TERMS),
    Mutant(
        "typo: each answer of a pair with the whole lambda",
        ("typo.py",),
        "losses - args.lam / 2 * (chosen_logps",
        "losses - args.lam * (chosen_logps",
        TYPO + "test_pairs_term",
    ),
    Mutant(
        "typo: the policy is its own reference",
        ("typo.py",),
        "runtime.as_forward(anchor, completion_logits)",
        "runtime.as_forward(model, completion_logits)",
        TYPO + "test_large_lambda_stays_at_the_reference",
    ),
    Mutant(
        "reference samples sharpened",
        (EVALUATE,),
        "seed=run.args.seed + 1000 * run.rank + 2",
        "temperature=0.3, seed=run.args.seed + 1000 * run.rank + 2",
        TYPO + "test_samples_come_from_the_reference_at_temperature_one",
    ),
]

LABELLED, LABELS = "test_labelled.py::", "test_labelled_losses.py::"
BOTH = ("pointwise_dpo.py", "ulma.py")
BY_HAND = LABELLED + "test_the_loss_of_a_batch_by_hand"
ONE_ANSWER = [
    Mutant(
        "point-wise: positive and negative exchanged",
        ("pointwise_dpo.py",),
        "return -labels * F.logsigmoid(h) - (1 - labels) * F.logsigmoid(-h)",
        "return -labels * F.logsigmoid(-h) - (1 - labels) * F.logsigmoid(h)",
        LABELS + "test_binary_gradients_in_closed_form",
    ),
    Mutant(
        "point-wise: the constant inside beta",
        ("pointwise_dpo.py",),
        "h = beta * (policy_logps - ref_logps) + beta_log_z",
        "h = beta * (policy_logps - ref_logps + beta_log_z)",
        LABELS + "test_the_constant_is_added_after_beta",
    ),
    Mutant(
        "ulma: the likelihood scaled by beta",
        ("ulma.py",),
        "return -labels * policy_logps -",
        "return -labels * beta * policy_logps -",
        LABELS + "test_values_where_the_policy_is_the_reference",
    ),
    Mutant(
        "ulma: every label above a half is a demonstration",
        ("ulma.py",),
        "torch.where(labels == 1, -policy_logps",
        "torch.where(labels > 0.5, -policy_logps",
        LABELS + "test_continuous_gradients_in_closed_form",
    ),
    Mutant(
        "weights of the classes exchanged",
        BOTH,
        "(labels == 1, args.positive_weight, args.negative_weight)",
        "(labels == 1, args.negative_weight, args.positive_weight)",
        BY_HAND,
    ),
    Mutant(
        "beta log Z not added",
        BOTH,
        'return torch.full_like(batch["labels"], args.beta_log_z)',
        'return torch.zeros_like(batch["labels"])',
        BY_HAND,
    ),
    Mutant(
        "the partition reads the answer",
        BOTH,
        'first = batch["completion_tokens"].cumsum(0) - batch["completion_tokens"]',
        'first = batch["completion_tokens"].cumsum(0) - 1',
        LABELLED + "test_prompt_states_are_those_of_the_prompt_alone",
    ),
    Mutant(
        "the partition at the policy's learning rate",
        BOTH,
        '"share": args.partition_lr / args.lr',
        '"share": 1.0',
        LABELLED + "test_a_learned_partition_moves_with_its_own_rate_and_is_saved",
    ),
    Mutant(
        "a class's mean over all rows",
        (RUNTIME,),
        'counts = {name: sums.get(f"count {name}", rows)',
        "counts = {name: rows",
        LABELLED + "test_means_over_a_class_are_over_that_class",
    ),
    Mutant(
        "sft: a mean over rows",
        ("sft.py",),
        "run.world_size / tokens).backward()",
        "run.world_size / len(plan[step])).backward()",
        LABELLED + "test_sft_is_the_mean_over_the_tokens_of_a_step",
    ),
    Mutant(
        "the rejected answer labelled good",
        (DATA,),
        "((prompt, good, 1.0), (prompt, bad, 0.0))",
        "((prompt, good, 1.0), (prompt, bad, 1.0))",
        LABELLED + "test_pairs_become_two_rows_of_one_split",
    ),
    Mutant(
        "quantiles without ties",
        (DATA,),
        "(bisect.bisect_left(ordered, z) + bisect.bisect_right(ordered, z)) / (2 * len(ordered))",
        "bisect.bisect_left(ordered, z) / len(ordered)",
        LABELLED + "test_scales",
    ),
]

CORPUS = tuple(f"{name}_pretrain.py" for name in ("mle", "filtered", "conditional", "unlikelihood", "rwr", "awr"))
CORPUS_LOSSES, PRETRAIN = "test_pretrain_losses.py::", "test_pretrain.py::"

PRETRAINING = [
    Mutant(
        "probabilities of one not clamped",
        ("unlikelihood_pretrain.py",),
        ".clamp(max=-torch.finfo(token_logps.dtype).eps)",
        "",
        CORPUS_LOSSES + "test_probabilities_of_one_give_no_nan_on_either_branch",
    ),
    Mutant(
        "a score equal to the threshold is bad",
        ("unlikelihood_pretrain.py",),
        "bad = token_scores > threshold",
        "bad = token_scores >= threshold",
        CORPUS_LOSSES + "test_a_score_equal_to_the_threshold_is_good",
    ),
    Mutant(
        "a segment at the threshold is bad",
        ("conditional_pretrain.py",),
        "GOOD if score <= threshold else BAD",
        "GOOD if score < threshold else BAD",
        CORPUS_LOSSES + "test_a_score_equal_to_the_threshold_is_good",
    ),
    Mutant(
        "the score of the position, not of the target",
        CORPUS,
        'batch["scores"][:, 1:]',
        'batch["scores"][:, :-1]',
        "test_standalone.py::test_the_loss_runs_on_chunks_made_by_hand",
    ),
    Mutant(
        "a position predicts itself",
        CORPUS,
        ".last_hidden_state[:, :-1]",
        ".last_hidden_state[:, 1:]",
        PRETRAIN + "test_target_logps_are_exact_on_a_bigram_table",
    ),
    Mutant(
        "weights not clipped",
        ("rwr_pretrain.py", "awr_pretrain.py"),
        "MAX_WEIGHT = 1000.0",
        "MAX_WEIGHT = 1e9",
        CORPUS_LOSSES + "test_weights_are_clipped_at_1000",
    ),
    Mutant(
        "the value trained through the weight",
        ("awr_pretrain.py",),
        "(token_rewards - values.detach()) / beta",
        "(token_rewards - values) / beta",
        CORPUS_LOSSES + "test_awr_loss_and_its_gradients_in_closed_form",
    ),
    Mutant(
        "scores taken for rewards",
        ("rwr_pretrain.py", "awr_pretrain.py"),
        "_loss(logps, -scores, ",
        "_loss(logps, scores, ",
        PRETRAIN + "test_the_first_loss_is_that_of_a_new_model_on_the_first_chunks",
    ),
    Mutant(
        "a step divided by its micro-batch",
        CORPUS,
        "/ (len(plan[step]) * targets)",
        "/ (len(rows) * targets)",
        PRETRAIN + "test_every_token_weighs_the_same_however_a_step_is_cut",
    ),
    Mutant(
        "nothing filtered",
        ("filtered_pretrain.py",),
        'if mean_score(document["scores"]) <= args.threshold]',
        "if args.threshold is not None]",
        PRETRAIN + "test_filtering_trains_on_kept_documents_only_and_repeats_them",
    ),
    Mutant(
        "control tokens dropped anew on resume",
        ("conditional_pretrain.py",),
        'random.Random(f"{args.seed} {split}")',
        "random.Random()",
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
        "both control tokens banned on code",
        ("conditional_pretrain.py",),
        'asked |= {"after": ([good], [bad])',
        'asked |= {"after": ([good], both)',
        PRETRAIN + "test_inference_starts_from_the_good_token_and_bans_what_it_must",
    ),
    Mutant(
        "a control token read from the text",
        ("common/corpus.py",),
        "fast.encode_special_tokens = fast.encode_special_tokens, True",
        "fast.encode_special_tokens = fast.encode_special_tokens, False",
        PRETRAIN + "test_a_control_token_in_a_text_stays_text",
    ),
    Mutant(
        "weight decay on norms and biases",
        CORPUS,
        '{"params": vectors, "weight_decay": 0.0}',
        '{"params": vectors}',
        PRETRAIN + "test_optimiser_schedule_and_decay",
    ),
    Mutant(
        "perplexity of good tokens counts all",
        ("common/samples.py",),
        "else list(map(int, keep[i])))",
        "else [1] * len(keep[i]))",
        PRETRAIN + "test_the_end_tables_numbers_on_a_bigram_table",
    ),
]

SCORED, SCORERS, SAMPLES, SAID = "common/corpus.py", "common/scorers.py", "common/samples.py", "test_samples.py::"
READ, SEGMENTS = "test_corpus.py::", "test_scorers.py::"

SCORING = [
    Mutant(
        "scores kept without the scorer's version",
        (SCORED,),
        "json.dumps([scorer.name, digest, 1])",
        "json.dumps([digest, 1])",
        READ + "test_cached_scores_equal_fresh_ones_and_nothing_is_scored_twice",
    ),
    Mutant(
        "an interrupted scoring begins anew",
        (SCORED,),
        'done = part.read_bytes().split(b"\\n")[:-1] if part.exists() else []',
        "done = []",
        READ + "test_an_interrupted_scoring_goes_on_where_it_stopped",
    ),
    Mutant(
        "scored without a lock",
        (SCORED,),
        "fcntl.flock(lock, fcntl.LOCK_EX)  # given",
        "pass  # given",
        READ + "test_two_processes_score_once",
    ),
    Mutant(
        "a text on both sides of the split",
        (SCORED,),
        'hashlib.sha256("".join(d["segments"]).encode()).hexdigest(), d)',
        "str(id(d)), d)",
        READ + "test_a_text_that_occurs_twice_is_on_one_side",
    ),
    Mutant(
        "EOS without its document's score",
        (SCORED,),
        "scores.extend([*token_scores, token_scores[-1]])",
        "scores.extend([*token_scores, 0.0])",
        READ + "test_documents_are_joined_by_eos_and_cut_without_padding",
    ),
    Mutant(
        "a quantile off by one",
        (SCORED,),
        "math.ceil(quantile * len(scores)) - 1)",
        "min(len(scores), math.ceil(quantile * len(scores)) + 1) - 1)",
        READ + "test_thresholds_by_value_and_by_quantile",
    ),
    Mutant(
        "chunks in one order",
        (SCORED,),
        "        rng.shuffle(epoch)\n",
        "",
        READ + "test_a_plan_spends_the_budget_and_uses_chunks_evenly",
    ),
    Mutant(
        "violations on the line behind",
        (SCORERS,),
        "found.append(line_number - 1)",
        "found.append(line_number)",
        SEGMENTS + "test_violations_stand_on_the_lines_that_pycodestyle_names",
    ),
    Mutant(
        "a cut text blamed for its end",
        (SCORERS,),
        'if code and code != "W292":',
        "if code:",
        SEGMENTS + "test_the_score_of_a_line_and_of_a_text",
    ),
    Mutant(
        "white space behind its sentence",
        (SCORERS,),
        "        moved.append(front + text)\n        front = part[len(text) :]\n",
        '        moved.append(front + part)\n        front = ""\n',
        SEGMENTS + "test_sentences_joined_are_the_text_and_white_space_leads",
    ),
    Mutant(
        "banned tokens sampled",
        (EVALUATE,),
        "config.suppress_tokens = list(banned_ids) or None",
        "config.suppress_tokens = None",
        SAID + "test_banned_tokens_are_never_sampled_and_the_others_keep_their_odds",
    ),
    Mutant(
        "banned tokens keep their share",
        (SAMPLES,),
        '    logits[..., inside] = float("-inf")\n',
        "",
        SAID + "test_perplexity_on_a_bigram_table",
    ),
    Mutant(
        "judged with dropout",
        (SAMPLES,),
        "yield [model.eval() for model in models]",
        "yield models",
        SAID + "test_samples_are_drawn_without_dropout_and_the_model_is_put_back",
    ),
    Mutant(
        "the teacher's KL the wrong way round",
        (SAMPLES,),
        "log_p.exp() * (log_p - log_q)",
        "log_q.exp() * (log_q - log_p)",
        SAID + "test_kl_to_the_teacher_on_bigram_tables",
    ),
    Mutant(
        "maximum over one place of all groups",
        (SAMPLES,),
        ".amax(1).mean()",
        ".amax(0).mean()",
        SAID + "test_misalignment_by_hand",
    ),
    Mutant(
        "the red team shows the worst only",
        (SAMPLES,),
        "value / 0.1 - math.log(rng.expovariate(1.0) + 1e-300)",
        "value / 0.1",
        SAID + "test_red_team_shows_prompts_in_proportion_to_exp_of_the_score",
    ),
    Mutant(
        "Self-BLEU against the sample itself",
        (SAMPLES,),
        "top[gram][2] if top[gram][1] == who else top[gram][0]",
        "top[gram][0]",
        SAID + "test_self_bleu_is_nltks",
    ),
]

REWARD = "test_reward_model.py::"

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
        (RUNTIME,),
        "parameter.zero_()",
        "parameter.abs_()",
        REWARD + "test_a_new_head_is_zero_and_a_trained_one_goes_on",
    ),
    Mutant(
        "head of a stranger at random",
        ("common/rewards.py",),
        'if found["missing_keys"]:',
        "if not found:",
        REWARD + "test_a_model_without_a_head_is_no_reward",
    ),
    Mutant(
        "answer runs into the prompt",
        ("common/rewards.py",),
        '"" if apart else " "',
        '""',
        REWARD + "test_an_answer_without_its_leading_space_is_read_as_it_was_trained_on",
    ),
    Mutant(
        "half by position",
        (DATA,),
        "json.dumps(texts[0] or texts[1])",
        "json.dumps(rows.texts.index(texts))",
        REWARD + "test_halves_are_disjoint_and_together_all",
    ),
    Mutant(
        "both halves are the first",
        (DATA,),
        'if is_first == (which == "first")',
        "if is_first",
        REWARD + "test_each_half_trains_on_its_own_prompts",
    ),
    Mutant(
        "METEOR one way",
        (EVALUATE,),
        "single_meteor_score(words[1], words[0]",
        "single_meteor_score(words[0], words[1]",
        REWARD + "test_meteor_against_its_formula",
    ),
    Mutant(
        "bins weighted by what they hold",
        (EVALUATE,),
        "return sum(gaps) / len(gaps) if gaps",
        "return sum(gaps) / len(p) if gaps",
        REWARD + "test_calibration_by_hand",
    ),
]
SUPERHF, PPO = "test_superhf.py::", "test_ppo.py::"
CHOICE = SUPERHF + "test_only_the_best_are_trained_on_with_exactly_their_tokens"
SECOND_ROAD = PPO + "test_advantages_of_a_run_by_a_second_road"
SAMPLED = [
    Mutant(
        "superhf: the KL turned round",
        ("superhf.py",),
        "(ref.exp() * (ref - policy)).sum(-1)",
        "(policy.exp() * (policy - ref)).sum(-1)",
        SUPERHF + "test_the_kl_is_that_of_the_reference_to_the_policy",
    ),
    Mutant(
        "superhf: kl not applied",
        ("superhf.py",),
        "loss = ce + args.kl * kl",
        "loss = ce + kl",
        SUPERHF + "test_the_training_step_is_superhf_loss",
    ),
    Mutant(
        "superhf: mask not shifted",
        ("superhf.py",),
        "mask = completion_mask[:, 1:].bool()",
        "mask = completion_mask[:, :-1].bool()",
        SUPERHF + "test_the_mask_stands_at_the_token_that_is_predicted",
    ),
    Mutant("superhf: the worst are kept", ("superhf.py",), "key=lambda c: -c[4])", "key=lambda c: c[4])", CHOICE),
    Mutant("superhf: an empty one may be the best", ("superhf.py",), " if c[3].strip())", ")", CHOICE),
    Mutant(
        "the same random numbers at every step",
        ("superhf.py", "ppo.py"),
        "1009 * step + run.rank",
        "run.rank",
        SUPERHF + "test_sampling_is_asked_for_in_full",
    ),
    Mutant(
        "cut inside the marker's words",
        ("superhf.py", "ppo.py"),
        'MARKERS = ("\\n\\nHuman:", "\\n\\nAssistant:")',
        'MARKERS = ("\\n\\nHuman", "\\n\\nAssistant")',
        SUPERHF + "test_completions_end_where_the_dialogue_would_go_on",
    ),
    Mutant(
        "answers lose the space in front",
        (EVALUATE,),
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
        "policy = torch.maximum(",
        "policy = torch.minimum(",
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
        "ref_logps, _ = ref_both(batch)",
        "ref_logps, _ = both(batch)",
        SECOND_ROAD,
    ),
    Mutant(
        "ppo: rewards not whitened", ("ppo.py",), "scale = 1.0 / deviation_of(rewards_now)", "scale = 1.0", SECOND_ROAD
    ),
    Mutant(
        "ppo: a mean over completions",
        ("ppo.py",),
        "(loss * real * run.world_size / tokens).backward()",
        "(loss * real / batch['completion_tokens'].sum()).backward()",
        PPO + "test_every_token_weighs_the_same_however_a_step_is_cut",
    ),
]

TABLE = FOUNDATION + METHODS + DESIDERATA + ONE_ANSWER + PRETRAINING + SCORING + REWARDS + SAMPLED


# ------------------------------------------------------------------------------------------------------------- the work


def copy_of_tree(folder: Path) -> Path:
    """The project as it is here, without the runs and caches that lie about."""
    tree = folder / "tree"
    shutil.copytree(
        ROOT,
        tree,
        ignore=shutil.ignore_patterns(".git", ".*cache*", ".venv*", "__pycache__", "runs", "results", "docs"),
    )
    return tree


def run_tests(tree: Path, nodes: list[str], limit: float) -> tuple[list[ElementTree.Element], str]:
    """(test cases with their outcome, the end of pytest's output); no case where pytest did not come to an end."""
    report = tree / "report.xml"
    words = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        f"--junitxml={report}",
        "-o",
        "junit_logging=no",
        *nodes,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        process = subprocess.run(
            [sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return [], f"not finished after {limit:.0f} s"
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    return cases, process.stdout[-2000:] + process.stderr[-500:]


def complaint(case: ElementTree.Element) -> str | None:
    """The first line of what a test case complains of, or None where it passed."""
    found = case.find("failure") if case.find("failure") is not None else case.find("error")
    return None if found is None else (found.get("message") or "").split("\n")[0]


def is_assertion(case: ElementTree.Element) -> bool:
    """Whether a test failed through an assertion of its own, one of torch.testing, or an exception it waited for in vain."""
    failure = case.find("failure")
    if failure is None:
        return False
    message = failure.get("message") or ""
    return message.startswith(("AssertionError", "assert ", "Failed: DID NOT RAISE"))


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """(caught, what was seen)."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = copy_of_tree(Path(scratch))
        for name in mutant.files:
            text = (tree / name).read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                return False, f"the text to replace is {text.count(mutant.old)} times in {name}, not once"
            (tree / name).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        cases, output = run_tests(tree, ["tests/" + mutant.test], TIME_LIMIT)
    if not cases:
        return False, output.strip().splitlines()[-1] if output.strip() else "pytest said nothing"
    asserted = [case for case in cases if is_assertion(case)]
    if not asserted:
        seen = next(filter(None, map(complaint, cases)), None)
        return False, f"no assertion, but: {seen}" if seen else "survived"
    # A test that runs script by script must notice the fault in each script that carries it.
    words = [set(re.split(r"[\[\]-]", case.get("name", ""))) for case in cases]
    seen = [set(re.split(r"[\[\]-]", case.get("name", ""))) for case in asserted]
    for stem in (Path(name).stem for name in mutant.files):
        if any(stem in some for some in words) and not any(stem in some for some in seen):
            return False, f"survived in {stem}.py"
    return True, complaint(asserted[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="mutants whose name holds one of these")
    parser.add_argument(
        "--part", type=int, default=0, help="with --of N: every Nth mutant, counted from this one (taken modulo N)"
    )
    parser.add_argument("--of", type=int, default=1, help="see --part")
    options = parser.parse_args()
    table = [
        mutant
        for mutant in TABLE[options.part % options.of :: options.of]
        if any(words in mutant.name for words in options.only)
    ]
    if not table or len({mutant.name for mutant in TABLE}) < len(TABLE):
        sys.exit("No mutant has that name." if not table else "Two mutants have the same name.")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        cases, output = run_tests(
            copy_of_tree(Path(scratch)), sorted({"tests/" + mutant.test for mutant in table}), 600
        )
    wrong = [f"{case.get('name')}: {complaint(case)}" for case in cases if complaint(case) is not None]
    if wrong or not cases:
        sys.exit("Without a fault these tests do not pass, so they can show nothing:\n" + ("\n".join(wrong) or output))
    passed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (caught, seen) in zip(table, pool.map(verdict, table)):
            passed += caught
            print(
                f"{'caught' if caught else 'MISSED':7} {mutant.name:42} {mutant.test.split('[')[0]}: {seen[:100]}",
                flush=True,
            )
    print(f"{passed} passed, {len(table) - passed} failed ({time.perf_counter() - started:.0f} s)")
    return 0 if passed == len(table) else 1


if __name__ == "__main__":
    sys.exit(main())
