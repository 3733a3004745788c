"""Faults of chat/ and tokens/, and of what reads chats."""

from tests.faults import Mutant

MESSAGES, TEMPLATES, ENCODE, STORE = "chat/messages.py", "chat/templates.py", "tokens/encode.py", "tokens/store.py"
CHAT_TEST, ROWS_TEST = "test_chat.py::", "test_rows.py::"
READ_AS_MADE = CHAT_TEST + "test_the_answer_and_the_prompt_are_what_the_template_makes_of_them"

TABLE = [
    Mutant(
        "thinking is never switched off",
        (TEMPLATES,),
        'MODES: tuple[dict, ...] = ({}, {"enable_thinking": False})',
        "MODES: tuple[dict, ...] = ({},)",
        READ_AS_MADE,
    ),
    Mutant(
        "thinking is always switched off",
        (TEMPLATES,),
        'MODES: tuple[dict, ...] = ({}, {"enable_thinking": False})',
        'MODES: tuple[dict, ...] = ({"enable_thinking": False},)',
        CHAT_TEST + "test_an_exact_prompt_is_taken_as_the_template_gives_it",
    ),
    Mutant(
        "the end of a turn is not EOS",
        ("common/models.py",),
        "if token := end_of_turn(tokenizer):",
        "if token := None:",
        CHAT_TEST + "test_a_model_that_ends_its_turns_stops_there",
    ),
    Mutant(
        "what stands before an answer ends it",
        (TEMPLATES,),
        "if found and behind.lstrip().startswith(token)]",
        "if found and token in text]",
        CHAT_TEST + "test_a_template_of_plain_text_ends_no_turn",
    ),
    Mutant(
        "a prompt alone keeps its opened thought",
        (TEMPLATES,),
        "for answer in answers or PROBES]",
        "for answer in answers or [[]]]",
        CHAT_TEST + "test_what_is_sampled_from_is_the_prompt_of_the_pairs",
    ),
    Mutant(
        "a boundary inside the conversation is let through",
        (TEMPLATES,),
        "if kept < length_of_prompt(tokenizer, prompt, text):",
        "if kept < 0:",
        CHAT_TEST + "test_a_boundary_inside_the_conversation_is_refused",
    ),
    Mutant(
        "a second BOS stays",
        (ENCODE,),
        "ids[:2] == [bos, bos] and",
        "ids[:2] == [bos] and",
        CHAT_TEST + "test_a_prompt_that_begins_with_bos_gets_no_second_one",
    ),
    Mutant(
        "an answer keeps the white space before it in a chat",
        (MESSAGES,),
        "as_answer(answer.lstrip())",
        "as_answer(answer)",
        CHAT_TEST + "test_strings_become_a_question_and_answers",
    ),
    Mutant(
        "the first answer of a whole chat is trained on",
        (MESSAGES,),
        'last = max((i for i, message in enumerate(chat) if message["role"] == "assistant"), default=-1)',
        'last = min((i for i, message in enumerate(chat) if message["role"] == "assistant"), default=-1)',
        CHAT_TEST + "test_whole_chats_end_in_their_last_answer",
    ),
    Mutant(
        "a reward model reads strings as the policy does",
        ("rewards/models.py",),
        '.get("chat") is True',
        '.get("chat") is True or chat',
        CHAT_TEST + "test_a_reward_model_reads_strings_as_it_was_trained_to",
    ),
    Mutant(
        "one chosen answer above the others is enough",
        ("judging/scores.py",),
        "worst = min(worst) if",
        "worst = max(worst) if",
        CHAT_TEST + "test_the_worst_chosen_answer_counts",
    ),
    Mutant(
        "kept rows do not depend on the tokenizer's template",
        (STORE,),
        '"template": template,',
        '"template": None,',
        ROWS_TEST + "test_all_that_shapes_rows_is_in_their_key",
    ),
    Mutant(
        "kept rows do not depend on the settings",
        (STORE,),
        '"settings": settings,',
        '"settings": None,',
        ROWS_TEST + "test_all_that_shapes_rows_is_in_their_key",
    ),
    Mutant(
        "completions of kept rows begin one token late",
        (STORE,),
        "self.ids[a:b].tolist() for a, b in",
        "self.ids[a + 1 : b].tolist() for a, b in",
        ROWS_TEST + "test_rows_from_the_disk_are_those_of_memory",
    ),
    Mutant(
        "a folder has its name before it is complete",
        (STORE,),
        '(aside / "rows").mkdir()',
        '(aside / "rows").mkdir(), folder.mkdir()',
        ROWS_TEST + "test_an_interruption_leaves_nothing",
    ),
]
