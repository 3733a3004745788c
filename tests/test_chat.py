"""Chats: the forms in which rows hold them, templates of current models, strings as chats."""

import copy
import json

import pytest
import torch

from chat import messages, templates
from common import InputError, data, evaluate, fields, generate, oracle
from common import models as model_loading
from judging import command, scores
from labelled import rows as labelled_rows
from rewards import models as reward_models
from rewards import prompts as rewards_prompts
from tests import models, runs
from tests.chat_templates import TEMPLATES
from tests.runs import CHAT, lines_file, train

EVERY = pytest.mark.parametrize("name", TEMPLATES)
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>greet</think>Good day."}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# -- templates of current models


def prompts_for(template) -> list[list[dict]]:
    """One turn, three turns, and with a message of the system's."""
    made = [[user("Who?")], [*HISTORY, user("Who?")]]
    return made + [[system("Be short."), user("Who?")]] * template.has_system


@EVERY
def test_the_answer_and_the_prompt_are_what_the_template_makes_of_them(name):
    template = TEMPLATES[name]
    tokenizer = template.tokenizer()
    for prompt in prompts_for(template):
        answers = [[assistant("Hello.")], [assistant("Nobody there")]]
        row, reason, moved = data.encode_row(tokenizer, prompt, answers, 999)
        assert (reason, moved) == (None, template.moved)
        texts = [tokenizer.decode(ids) for ids in (row["prompt"], *row["completions"])]
        assert texts[0].endswith(template.ends)
        assert texts[0].count("Who?") == 1
        assert texts[1:] == [template.answer, template.answer.replace("Hello.", "Nobody there")]
        whole = tokenizer.apply_chat_template([*prompt, *answers[0]], tokenize=False)
        end = template.eos if template.eos not in whole[len(texts[0]) :] else ""
        assert texts[0] + texts[1] == whole + end  # nothing lost, nothing twice
        assert row["completions"][0].count(tokenizer.eos_token_id) == 1


@EVERY
def test_a_model_that_ends_its_turns_stops_there(name, tmp_path):
    """Loaded as a script does, the token that ends an answer in the template is EOS."""
    template = TEMPLATES[name]
    template.tokenizer().save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):  # a saved one is as it was
        tokenizer = model_loading.load_tokenizer(str(folder if folder.exists() else tmp_path))
        tokenizer.save_pretrained(tmp_path / "again")
        eos = {"gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}.get(name, template.eos)
        assert tokenizer.eos_token == eos
        assert tokenizer.pad_token != eos
        for prompt in prompts_for(template):
            row, _, _ = data.encode_row(tokenizer, prompt, [[assistant("Hello.")], [assistant("No")]], 999)
            for ids, answer in zip(row["completions"], ("Hello.", "No")):
                assert ids.count(tokenizer.eos_token_id) == 1
                text = template.answer.replace("Hello.", answer)
                assert tokenizer.decode(ids) == (text if eos == template.eos else text.removesuffix(template.eos))
                sampled = ids[: ids.index(tokenizer.eos_token_id) + 1]  # sampling ends there
                assert generate.decode_completion(tokenizer, sampled).endswith(answer)


def test_a_template_of_plain_text_ends_no_turn(toy_tokenizer):
    toy_tokenizer = copy.deepcopy(toy_tokenizer)
    assert templates.end_of_turn(toy_tokenizer) is None
    for template in (
        "{% for m in messages %}{{ m.content }} done {% endfor %}",  # an ordinary word
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # nothing
        "{{ raise_exception('nothing will do') }}",
        "{% for m in messages %}{{ '<pad>' + m.content }}{% endfor %}",  # before it
    ):
        toy_tokenizer.chat_template = template
        assert templates.end_of_turn(toy_tokenizer) is None


@EVERY
def test_what_is_sampled_from_is_the_prompt_of_the_pairs(name):
    """Rows of prompts alone, as superhf.py and ppo.py have them, and those of the KL's samples."""
    template = TEMPLATES[name]
    tokenizer = template.tokenizer()
    for prompt in prompts_for(template):
        pair = data.encode_rows(tokenizer, [(prompt, [assistant("Hello.")], [assistant("No")])], 999)
        alone, reason, moved = data.encode_row(tokenizer, prompt, [], 999)
        assert (reason, moved) == (None, template.moved)
        assert alone == {"prompt": pair[0]["prompt"], "completions": []}
        assert evaluate.distinct_prompts(pair, 999)[0][1] == pair[0]["prompt"]


@EVERY
def test_a_message_that_the_template_refuses_is_a_reason(name):
    template = TEMPLATES[name]
    if not template.has_system:
        prompt = [system("Be short."), user("Who?")]
        row, reason, _ = data.encode_row(template.tokenizer(), prompt, [[assistant("Hello.")]], 999)
        assert row is None
        assert reason.startswith("the chat template refuses the messages: ")


def test_an_exact_prompt_is_taken_as_the_template_gives_it():
    """Without thinking Qwen3's prompt would be longer; where the default begins the answer it is
    taken.
    """
    tokenizer = TEMPLATES["qwen3"].tokenizer()
    row, _, _ = data.encode_row(tokenizer, [user("Who?")], [[assistant("Hello.")]], 999)
    expected = tokenizer.apply_chat_template([user("Who?")], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt"]) == expected


def test_a_boundary_inside_the_conversation_is_refused():
    """A system message that vanishes once another turn follows: no prompt would be left."""
    fickle = (
        "{% for m in messages %}{% if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    tokenizer = models.byte_tokenizer(bos=True, chat_template=fickle)
    assert data.encode_row(tokenizer, [user("Who?")], [[assistant("A")]], 99)[1] is None
    prompt = [system("Be short."), user("Who?")]
    for answers in ([[assistant("A")]], []):
        assert data.encode_row(tokenizer, prompt, answers, 99) == (None, templates.REWRITTEN, False)


def test_moved_boundaries_are_counted_and_said():
    tokenizer = TEMPLATES["deepseek-r1"].tokenizer()
    rows = data.encode_rows(tokenizer, [([user(q)], [assistant("A")], [assistant("B")]) for q in "xyz"], 99)
    assert rows.moved == 3
    assert "in 3 the boundary moved left" in rows.describe("Rows")


# -- BOS


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = models.byte_tokenizer(bos=True)
    for text in ("<s>x", "x"):
        row, _, moved = data.encode_row(tokenizer, text, [" cd", " e"], 99)
        assert row["prompt"] == [1, *tokenizer.convert_tokens_to_ids(["x"])]
        assert not moved
    assert data.encode_row(tokenizer, "", ["<s>cd"], 99)[0]["prompt"] == [1]  # text alone, which begins with it
    without = models.byte_tokenizer()  # puts no BOS before a text: what stands there is the user's
    assert data.encode_row(without, "<s><s>x", [" c"], 99)[0]["prompt"][:3] == [1, 1, *without("x").input_ids]


# -- forms of rows


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (user("a"), [user("a")]),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [user("a"), assistant("b")]),
        ([{"from": "system", "value": "s"}, {"from": "user", "value": "a"}], [system("s"), user("a")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], [user("ab")]),
        ([user("a") | {"name": None, "tool_calls": None}], [user("a")]),  # as .parquet fills what is absent
        ([user("a") | {"name": "Ann"}], [user("a") | {"name": "Ann"}]),
        ("text", "text"),
        (None, None),
        ([], []),
        (["a"], ["a"]),
        ([{"from": ["human"], "value": "a"}], [{"from": ["human"], "value": "a"}]),
        ([{"role": "user", "content": None}], [{"role": "user", "content": None}]),
    ],
)
def test_chats_are_read_in_every_form(value, expected):
    assert messages.read_chat(value) == (expected, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "a message calls a tool and has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message has parts other than text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "a message has parts other than text"),
    ],
)
def test_chats_that_cannot_be_used_have_their_own_reason(value, reason):
    assert messages.read_chat(value) == (None, reason)
    assert fields.pair_of_row("here", {"prompt": "p", "chosen": value, "rejected": "x"}) == (None, reason)
    assert rewards_prompts.prompt_of_row("here", {"prompt": value}) == (None, reason)
    row = {"prompt": "p", "completion": value, "label": 1}
    assert labelled_rows.labelled_of_row("here", row) == (None, reason)
    assert labelled_rows.demonstration_of_row("here", {"messages": [user("q"), *value]}) == (None, reason)


PAIR = ([user("q")], [assistant("a")], [assistant("b")])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {"prompt": user("q"), "chosen": assistant("a"), "rejected": assistant("b")},
        {"prompt": "q", "chosen": assistant("a"), "rejected": assistant("b")},
        {"prompt": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": [assistant("b")]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")], "messages": [user("other")]},
    ],
)
def test_pairs_of_chats(row):
    assert fields.pair_of_row("here", row) == (PAIR, None)


def test_whole_chats_end_in_their_last_answer():
    chat = [user("q"), assistant("early"), user("more"), assistant("late"), user("left")]
    shared = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in chat]
    for row in ({"messages": chat}, {"conversations": shared}):
        assert labelled_rows.demonstration_of_row("here", row) == ((chat[:3], [chat[3]]), None)
        assert labelled_rows.labelled_of_row("here", row | {"score": 0.5}) == ((chat[:3], [chat[3]], 0.5), None)
        assert rewards_prompts.prompt_of_row("here", row) == ((chat,), None)  # the user has the last word
    assert rewards_prompts.prompt_of_row("here", {"messages": chat[:4]}) == ((chat[:3],), None)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([user("q")], "no message of the assistant"),
        ([assistant("a")], "no message before the answer"),
        ([user("q"), assistant(" ")], "the answer is empty"),
        ("q", "messages holds no chat messages"),
    ],
)
def test_whole_chats_without_an_answer(chat, reason):
    assert labelled_rows.demonstration_of_row("here", {"messages": chat}) == (None, reason)


def test_a_row_of_no_known_form_stops_the_run():
    with pytest.raises(InputError, match=r'here: no field "prompt"; expected prompt, chosen and rejected, or messages'):
        rewards_prompts.prompt_of_row("here", {"question": "q"})
    with pytest.raises(InputError, match=r'here: no field "label" or "score"'):
        labelled_rows.labelled_of_row("here", {"messages": [user("q"), assistant("a")]})


# -- strings through the template


@pytest.fixture(scope="module")
def chat_tokenizer():
    return models.byte_tokenizer(bos=True, chat_template=CHAT)


def test_strings_become_a_question_and_answers(chat_tokenizer):
    row, reason, moved = data.encode_row(chat_tokenizer, "hi ", [" yo", "\n no "], 99, chat=True)
    assert (reason, moved) == (None, False)
    assert chat_tokenizer.decode(row["prompt"]) == "<s>[user]hi </s>\n[assistant]"
    assert [chat_tokenizer.decode(ids) for ids in row["completions"]] == ["yo</s>\n", "no </s>\n"]
    assert row["prompt"].count(1) == 1
    as_messages = data.encode_row(chat_tokenizer, [user("hi ")], [[assistant("yo")], [assistant("no ")]], 99)[0]
    assert as_messages == row
    assert data.encode_row(chat_tokenizer, "", ["text"], 99, chat=True)[1] == "no prompt, which --chat needs"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", [user("Hi")]),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes?\nWell?\n\nHuman: a\n\nb\n\nAssistant:",
            [user("Hi"), assistant("Yes?\nWell?"), user("a\n\nb")],
        ),
        ("\n\nHuman: Hi\n\nAssistant: So", None),  # the answer has begun
        ("Read:\n\nHuman: Hi\n\nAssistant:", None),
        ("\n\nHuman: Hi\n\nHuman: Hi\n\nAssistant:", None),
        ("\n\nHuman:\n\nAssistant:", None),
        ("What is\n\nAssistant:", None),
        ("plain", None),
    ],
)
def test_a_dialogue_in_one_string_becomes_its_turns(prompt, expected):
    assert messages.turns_of(prompt) == (expected or [user(prompt)])


def load(path, tokenizer, said=None, **options):
    """Pairs of a file."""
    say = (said if said is not None else []).append
    return data.load_pairs(str(path), None, 0.0, 0, tokenizer, 99, say, **options)[0]["train"]


def test_one_line_says_that_a_template_is_not_used(tmp_path, chat_tokenizer, toy_tokenizer):
    strings = lines_file(tmp_path, [{"prompt": "hi", "chosen": " yo", "rejected": " no"}], "strings.jsonl")
    chats = lines_file(tmp_path, [{"prompt": [user("hi")], "chosen": "yo", "rejected": "no"}], "chats.jsonl")
    for path, options, count in ((strings, {}, 1), (strings, {"chat": True}, 0), (chats, {}, 0)):
        said: list[str] = []
        rows = load(path, chat_tokenizer, said, **options)
        assert sum("--chat uses it" in words for words in said) == count
        assert chat_tokenizer.decode(rows[0]["prompt"]).endswith("hi" if count else "[assistant]")
    said = []
    load("toy", chat_tokenizer, said)
    load(strings, models.byte_tokenizer(), said)
    assert not any("--chat" in words for words in said)


def test_chat_where_it_cannot_be_had_is_refused(tmp_path, chat_tokenizer):
    path = lines_file(tmp_path, [{"prompt": "hi", "chosen": " yo", "rejected": " no"}])
    with pytest.raises(InputError, match=r"^--chat: the model's tokenizer has no chat template; --chat-template FILE"):
        load(path, models.byte_tokenizer(), chat=True)
    with pytest.raises(InputError, match=r"^--chat: the toy's rows"):
        load("toy", chat_tokenizer, chat=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b" \n", "the file is empty"),
        (b"a\n{% for m in messages %}", "line 2: not a Jinja template"),
    ],
)
def test_a_template_file_that_cannot_be_used(content, words, tmp_path):
    path, tokenizer = tmp_path / "mine.jinja", models.byte_tokenizer()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^--chat-template ") as error:
        templates.use_template(tokenizer, str(path))
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# -- scripts


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> str:
    """A model with a tokenizer without a template."""
    tokenizer = models.byte_tokenizer(bos=True)
    return str(models.save(models.tiny_llama(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("base")))


SCRIPTS = {
    "dpo": {"prompt": "q{}", "chosen": " yo", "rejected": " no"},
    "ulma": {"prompt": "q{}", "completion": " yo", "label": 1},
    "sft": {"prompt": "q{}", "completion": " yo"},
    "reward_model": {"prompt": "q{}", "chosen": " yo", "rejected": " no"},
    "superhf": {"prompt": "q{}"},
    "ppo": {"prompt": "q{}"},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_strings_as_chats_with_a_template_of_a_file(script, tmp_path, base_model, monkeypatch):
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT)
    rows = [{k: v.format(i) if k == "prompt" else v for k, v in SCRIPTS[script].items()} for i in range(4)]
    seen, load_splits = [], data.load_splits

    def watch(*args, **options):
        splits, facts = load_splits(*args, **options)
        seen.extend(splits["train"])
        return splits, facts

    for module in (data, labelled_rows, rewards_prompts):
        monkeypatch.setattr(module, "load_splits", watch)
    monkeypatch.setattr(reward_models, "load_reward", lambda *rest: lambda prompts, answers: torch.ones(len(prompts)))
    changes = {"model": base_model, "data": lines_file(tmp_path, rows), "max_steps": 1, "batch_size": 4}
    if script == "reward_model":  # which samples nothing
        monkeypatch.delitem(runs.SHORT, "kl_samples")
    if script in ("superhf", "ppo"):
        changes |= {"max_new_tokens": 4, "reward": "mine"}
    folder = train(script, tmp_path / "run", chat=True, chat_template=str(template), **changes)
    tokenizer = model_loading.load_tokenizer(str(folder))  # the run loads with its template
    assert tokenizer.chat_template == CHAT
    assert sorted(tokenizer.decode(row["prompt"]) for row in seen) == [
        f"<s>[user]q{i}</s>\n[assistant]" for i in range(4)
    ]
    assert seen[0]["texts"][0].startswith("q")  # what was read stays what is shown and judged


# -- reward models


def reward_folder(folder, chat: bool | None):
    """A reward model whose tokenizer has a template; a run of a script here unless chat is None."""
    tokenizer = models.byte_tokenizer(bos=True, chat_template=CHAT)
    base = models.save(models.tiny_llama(len(tokenizer)), tokenizer, folder / "base")
    model = reward_models.load_classifier(str(base), "cpu", tokenizer)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    models.save(model, tokenizer, folder / "judge")
    if chat is not None:
        (folder / "judge" / "args.json").write_text(json.dumps({"chat": chat}))
    return str(folder / "judge"), tokenizer, model.eval()


@pytest.mark.parametrize(
    ("trained", "policy", "chat"),
    [(True, True, True), (True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_a_reward_model_reads_strings_as_it_was_trained_to(trained, policy, chat, tmp_path):
    folder, tokenizer, model = reward_folder(tmp_path, trained)
    judge = reward_models.load_reward(folder, "file.jsonl", torch.device("cpu"), torch.no_grad, policy)
    text = "<s>[user]hi</s>\n[assistant]yo</s>\n" if chat else "<s>hi yo" + "</s>" * (trained is not None)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    for answer in (" yo", "yo"):  # sampled answers come without the space, or with it
        assert judge(["hi"], [answer]).item() == pytest.approx(expected, abs=1e-6)


# -- python -m common.evaluate


def evaluate_rows(folder, rows, model, **changes) -> list[dict]:
    """The lines that the command writes."""
    output = folder / f"scores-{len(list(folder.iterdir()))}.jsonl"
    args = command.Args(model=model, data=lines_file(folder, rows), output=str(output), **changes)
    command.main(args)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_scores_of_several_answers_on_a_side(tmp_path, base_model, capsys):
    texts = ["a", "bc", "d", "efg"]
    several = {"prompt": "q", "chosen": texts[:1], "rejected": texts[1:]}
    both = {"prompt": "q", "chosen": texts[:2], "rejected": texts[2:]}
    mixed = {"prompt": "q", "chosen": "a", "rejected": texts[1:]}
    pairs = [{"prompt": "q", "chosen": x, "rejected": y} for x, y in (texts[:2], texts[2:])]
    lines = evaluate_rows(tmp_path, [several, both, mixed, *pairs], base_model)
    single = [line[f"{side}_logps"] for line in lines[3:] for side in ("chosen", "rejected")]
    assert lines[0]["chosen_logps"] == pytest.approx(single[:1], abs=1e-4)
    assert lines[0]["rejected_logps"] == pytest.approx(single[1:], abs=1e-4)
    assert (lines[0]["chosen_tokens"], lines[0]["rejected_tokens"]) == ([2], [3, 2, 4])
    assert lines[1]["rejected_logps"] == pytest.approx(single[2:], abs=1e-4)
    assert lines[2]["chosen_logps"] == pytest.approx(single[0], abs=1e-4)  # one answer stays a number
    wins = [min(line) > max(other) for line, other in ((single[:1], single[1:]), (single[:2], single[2:]))]
    wins += [wins[0], single[0] > single[1], single[2] > single[3]]
    assert f"Preference accuracy {sum(wins) / 5:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chosen", "rejected", "share"),
    [
        ([2.0, 3.0], [1.0, 0.0], "1.000"),
        ([0.5, 3.0], [1.0, 0.0], "0.000"),
        ([1.0, 3.0], [1.0, 0.0], "0.500"),
        (2.0, [1.0, 0.0], "1.000"),
        (0.5, 1.0, "0.000"),
    ],
)
def test_the_worst_chosen_answer_counts(chosen, rejected, share):
    assert scores.share_above([{"a": chosen, "b": rejected}, {"a": None, "b": None}], "a", "b") == share


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": []}, "a side has no answer"),
        ({"rejected": ["b", 7]}, "a field is neither text nor chat messages"),
        ({"rejected": ["b", " "]}, "an answer is empty"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": None}, "a field is neither text nor chat messages"),
        ({"rejected": ["half \ud800"]}, "a field is not valid Unicode text"),
    ],
)
def test_several_answers_that_cannot_be_used(changes, reason, tmp_path, base_model):
    lines = evaluate_rows(tmp_path, [{"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]} | changes], base_model)
    assert lines == [
        {"row": 0}
        | dict.fromkeys(("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens"))
        | {"reason": reason}
    ]


def test_the_command_puts_strings_through_a_template(tmp_path, base_model, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT)
    row = {"prompt": "q", "chosen": " yo", "rejected": " no"}
    chats = {"prompt": [user("q")], "chosen": ["yo"], "rejected": ["no", "so"]}
    lines = evaluate_rows(tmp_path, [row, chats], base_model, chat=True, chat_template=str(template))
    tokenizer = models.byte_tokenizer(bos=True, chat_template=CHAT)
    ids = data.encode_row(tokenizer, [user("q")], [[assistant("yo")]], 99)[0]
    model = model_loading.load_model(base_model, "cpu").eval()
    expected = oracle.plain_logps(model, [(ids["prompt"], ids["completions"][0])], 0).item()
    assert lines[0]["chosen_logps"] == pytest.approx(expected, abs=1e-4)
    assert lines[1]["chosen_logps"] == pytest.approx([expected], abs=1e-4)
    assert "--chat uses it" not in capsys.readouterr().out
    evaluate_rows(tmp_path, [row], base_model, chat_template=str(template))
    assert capsys.readouterr().out.count("--chat uses it") == 1
