"""The order in which training reads its prompts."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from opd_trainer.data import Prompt


class Order(Sampler[int]):
    """Yields the data's indices in the order of train_sampling_strategy, from a seed of the epoch.

    With steps_per_rollout above 1 each full batch comes several times in a row.
    """

    def __init__(self, trainer: Trainer, prompts: list[Prompt]) -> None:
        args = trainer.args
        self.lengths = [len(p.student_ids) for p in prompts]
        self.size = trainer.get_total_train_batch_size(args)
        self.times, self.trainer = args.steps_per_rollout, trainer
        count = len(self.lengths)
        self.used = count if self.times == 1 else count // self.size * self.size

    def __len__(self) -> int:
        return self.used * self.times

    def __iter__(self) -> Iterator[int]:
        args, count = self.trainer.args, len(self.lengths)
        seed = args.seed if args.data_seed is None else args.data_seed
        # Trainer does not call set_epoch on a rank that resumes, so the epoch comes from its state.
        generator = torch.Generator().manual_seed(seed + int(self.trainer.state.epoch or 0))
        if args.train_sampling_strategy == "sequential":
            order = list(range(count))
        elif args.train_sampling_strategy == "group_by_length":
            order = get_length_grouped_indices(self.lengths, self.size, generator=generator)
        else:
            order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, self.used, self.size):
            yield from order[start : start + self.size] * self.times
