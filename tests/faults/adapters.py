"""Faults of LoRA: what is merged, what the reference is, what is saved."""

from tests.faults import Mutant

LORA = "adapters/lora.py"
TEST = "test_lora.py::"

TABLE = [
    Mutant(
        "lora: adapter left on in the reference",
        (LORA,),
        "start.set_submodule(name, start.get_submodule(name).base_layer)",
        "start.set_submodule(name, start.get_submodule(name))",
        TEST + "test_without_its_adapter_a_trained_model_is_the_start",
    ),
    Mutant(
        "lora: alpha lost on merging",
        (LORA,),
        "delta = SCALE * up.to(target.device)",
        "delta = up.to(target.device)",
        TEST + "test_what_is_saved_is_what_was_trained",
    ),
    Mutant(
        "lora: head not saved",
        (LORA,),
        'if name.startswith(f"{head}.")}',
        "if False}",
        TEST + "test_the_head_of_dph_is_saved_and_scores_alike",
    ),
    Mutant(
        "lora: head does not train",
        (LORA,),
        "model.get_submodule(head).requires_grad_(True)",
        "pass",
        TEST + "test_gradients_reach_the_adapter_and_the_head_alone",
    ),
    Mutant(
        "lora: the start's adapter left out",
        (LORA,),
        "        merge_layers({name: model.get_submodule(name) for name in layers}, model.state_dict(), layers)\n",
        "",
        TEST + "test_a_start_from_an_adapter_that_peft_made",
    ),
    Mutant(
        "lora: the start's adapter not saved with the new one",
        (LORA,),
        "        if name in adapter.earlier:\n            before = adapter.earlier[name]\n",
        "",
        TEST + "test_a_run_on_top_of_an_adapter",
    ),
    Mutant(
        "lora: another scaling read as ours",
        (LORA,),
        'ratio = settings["lora_alpha"] / settings["r"] / SCALE',
        "ratio = 1.0",
        TEST + "test_a_start_from_an_adapter_that_peft_made",
    ),
    Mutant(
        "lora: resumed from the wrong matrices",
        (LORA,),
        "copy_(down[-model.adapter.rank :])",
        "copy_(down[: model.adapter.rank])",
        TEST + "test_a_run_on_top_of_an_adapter_resumes_bit_for_bit",
    ),
    Mutant(
        "lora: hash without the base",
        (LORA,),
        "folders = [base_folder(folder, resolve), folder] if has_adapter(folder) else [folder]",
        "folders = [folder]",
        TEST + "test_hashes_of_an_adapter_are_of_its_base_too",
    ),
]
