"""Use the loss in transformers' Trainer, by a subclass with its own compute_loss.

`call_with_lazy_logits` runs the loss inside the model's forward pass, as DDP and FSDP2 require.
Tokens with the label -100 do not count. Without arguments both models are tiny and random. For real
models pass `--student NAME --teacher NAME --data FILE`, with a .jsonl file of {"text": ...}.
"""

import argparse
from functools import partial
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, load_dataset
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from opd_kernels import distillation_loss, forward_kl
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits


class DistillationTrainer(Trainer):
    """A Trainer that distils a teacher, instead of learning labels."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = inputs["input_ids"], inputs.get("attention_mask")
        labels = pad(inputs["labels"], (0, 1), value=-100)[:, 1:]  # each position's next token
        options = {"k": 20, "support": "teacher", "objective": partial(forward_kl, tail="bucket")}
        options |= {"token_weights": (labels != -100).float(), "denominator": num_items_in_batch}
        with torch.no_grad():
            teacher = lazy_logits(self.teacher, *tokens)

        def loss_of(student):
            return distillation_loss(student, teacher, **options).loss

        loss = call_with_lazy_logits(model, loss_of, *tokens)
        if num_items_in_batch is not None:  # it counts all ranks, but DDP averages over ranks
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


parser = argparse.ArgumentParser()
for option in ("--student", "--teacher", "--data"):
    parser.add_argument(option)
arguments = parser.parse_args()

torch.manual_seed(0)
if arguments.student:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        for name in (arguments.student, arguments.teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    texts = load_dataset("json", data_files=arguments.data, split="train")["text"]
    rows = tokenizer(list(texts), truncation=True, max_length=512).input_ids
else:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=2, **sizes)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    teacher.lm_head.weight.data *= 30  # without this its predictions are nearly uniform
    rows = torch.randint(3, 100, (64, 16)).tolist()


def collate(batch):
    """Pad sequences on the right, with attention masks from their lengths."""
    ids = [torch.tensor(row["ids"]) for row in batch]
    mask = [torch.ones_like(row) for row in ids]
    fill = torch.nn.utils.rnn.pad_sequence
    inputs = {"input_ids": fill(ids, True), "attention_mask": fill(mask, True)}
    return inputs | {"labels": fill(ids, True, -100)}


with TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=20,
        learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to="none",
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"ids": rows})
    trainer = DistillationTrainer(student, options, collate, data, teacher=teacher)
    trainer.train()
