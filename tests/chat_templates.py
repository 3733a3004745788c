"""Chat templates with the structure of current models', in short forms of our own."""

from dataclasses import dataclass

from tokenizers.pre_tokenizers import ByteLevel

from tests import models

LOOP, END = "{% for m in messages %}", "{% endfor %}"
SYSTEM_FIRST = "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
IM_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
IM_GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# What the assistant said, its thought left out; and whether it is the answer to the last question.
SAID = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
ANSWER_NOW = "m.role == 'assistant' and loop.last"
THINKING_TURN = (
    SAID
    + "{% if "
    + ANSWER_NOW
    + " %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + said + '<|im_end|>\n' }}"
    + "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}"
    + "{% else %}"
    + IM_TURN
    + "{% endif %}"
)
OFF = "{% set off = enable_thinking is defined and not enable_thinking %}"
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)


@dataclass
class Template:
    """A template; how its tokenizer begins and ends; how the prompt ends and the answer "Hello."
    reads in a row made with it, and whether the boundary moved.
    """

    text: str
    eos: str
    ends: str
    answer: str
    moved: bool = False
    bos: str = "<s>"
    has_system: bool = True

    def tokenizer(self):
        """A byte-level tokenizer with this template and its special tokens."""
        made = models.byte_tokenizer(chat_template=self.text)
        # As current models do, and GPT-2 does not, line breaks are kept apart from what follows.
        made.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|end|>", "<start_of_turn>", "<end_of_turn>"]
        made.add_special_tokens({"eos_token": self.eos, "bos_token": self.bos, "additional_special_tokens": marks})
        return made


IM = {"eos": "<|im_end|>", "ends": "<|im_start|>assistant\n", "answer": "Hello.<|im_end|>\n"}
DEEPSEEK_TURNS = (
    "{{ bos_token }}"
    + LOOP
    + SAID
    + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    + "{% else %}{{ '<|Assistant|>' + PREFIX + said + eos_token }}{% endif %}"
    + END
)
TEMPLATES = {
    "chatml": Template(LOOP + IM_TURN + END + IM_GENERATE, **IM),
    "smollm2": Template(LOOP + SYSTEM_FIRST + IM_TURN + END + IM_GENERATE, **IM),
    "qwen2.5": Template(LOOP + SYSTEM_FIRST + IM_TURN + END + IM_GENERATE, **IM),
    "llama3": Template(
        "{{ bos_token }}"
        + LOOP
        + "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        "<|head|>assistant<|/head|>\n\n",
        "Hello.<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    # The thought, an empty one, belongs to the answer: the prompt does not open it.
    "qwen3": Template(
        LOOP
        + THINKING_TURN
        + END
        + OFF
        + IM_GENERATE
        + "{% if add_generation_prompt and off %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        **IM | {"answer": "<think>\n\n</think>\n\nHello.<|im_end|>\n"},
    ),
    # The prompt opens a thought, so that only without thinking it begins what is answered.
    "qwen3.5": Template(
        LOOP
        + THINKING_TURN
        + END
        + OFF
        + IM_GENERATE
        + "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' if off else '<think>\n' }}{% endif %}",
        **IM | {"ends": "<|im_start|>assistant\n<think>\n\n</think>\n\n"},
    ),
    "nemotron3": Template(
        LOOP
        + SAID
        + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think></think>' + said + '<|im_end|>\n' }}"
        + "{% else %}"
        + IM_TURN
        + "{% endif %}"
        + END
        + OFF
        + IM_GENERATE
        + "{% if add_generation_prompt %}{{ '<think></think>' if off else '<think>\n' }}{% endif %}",
        **IM | {"ends": "<|im_start|>assistant\n<think></think>"},
    ),
    "deepseek-r1": Template(
        DEEPSEEK_TURNS.replace("PREFIX + ", "")
        + "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        "<|end_of_sentence|>",
        "<|Assistant|>",
        "Hello.<|end_of_sentence|>",
        moved=True,
        bos="<|begin_of_sentence|>",
    ),
    "deepseek-v3": Template(
        DEEPSEEK_TURNS.replace("PREFIX", "'</think>'")
        + "{% if add_generation_prompt %}{{ '<|Assistant|></think>' }}{% endif %}",
        "<|end_of_sentence|>",
        "<|Assistant|></think>",
        "Hello.<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
    ),
    # No role of the system's; EOS is not the end of a turn, so one is put behind it.
    "gemma2": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + LOOP
        + ALTERNATE
        + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        + "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<eos>",
        "<start_of_turn>model\n",
        "Hello.<end_of_turn>\n<eos>",
        bos="<bos>",
        has_system=False,
    ),
    # What the system says opens the first question.
    "gemma3": Template(
        "{{ bos_token }}{% set ns = namespace(first='') %}"
        + LOOP
        + "{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}{% else %}"
        + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        + "{{ '<start_of_turn>' + role + '\n' + ns.first + m.content | trim + '<end_of_turn>\n' }}"
        + "{% set ns.first = '' %}{% endif %}"
        + END
        + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<eos>",
        "<start_of_turn>model\n",
        "Hello.<end_of_turn>\n<eos>",
        bos="<bos>",
    ),
    # Nothing stands for the generation prompt.
    "mistral": Template(
        "{{ bos_token }}"
        + LOOP
        + ALTERNATE
        + "{{ '[INST] ' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}"
        + END,
        "</s>",
        "[/INST]",
        " Hello.</s>",
        has_system=False,
    ),
    # Without a generation prompt the text ends in EOS.
    "phi3": Template(
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        + END
        + "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        "<|endoftext|>",
        "<|assistant|>\n",
        "Hello.<|end|>\n<|endoftext|>",
    ),
    "phi4": Template(
        LOOP
        + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
        "Hello.<|im_end|>",
    ),
    # The channel belongs to the answer.
    "harmony": Template(
        "{{ '<|start|>system<|message|>Channels: analysis, final.<|end|>' }}"
        + LOOP
        + "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        + "{{ '<|return|>' if loop.last else '<|end|>' }}"
        + "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
        + END
        + "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|return|>",
        "<|start|>assistant",
        "<|channel|>final<|message|>Hello.<|return|>",
    ),
    "zephyr": Template(
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        + "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        + END,
        "</s>",
        "<|assistant|>\n",
        "Hello.</s>\n",
    ),
    "command-r": Template(
        "{{ bos_token }}"
        + LOOP
        + "{% set who = {'user': '<|USER|>', 'assistant': '<|CHATBOT|>', 'system': '<|SYSTEM|>'}[m.role] %}"
        + "{{ '<|START_OF_TURN|>' + who + m.content | trim + '<|END_OF_TURN|>' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|CHATBOT|>' }}{% endif %}",
        "<|END_OF_TURN|>",
        "<|START_OF_TURN|><|CHATBOT|>",
        "Hello.<|END_OF_TURN|>",
        bos="<BOS_TOKEN>",
    ),
}
