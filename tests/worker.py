"""What tests/test_processes.py starts under torchrun: python worker.py WORLD OUT

Runs scripts from the folder WORLD by their own `main`, and keeps in OUT, besides what a run writes,
the first step's gradients and what every process computed."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import alphapo
import common
import data
import dpo
import ipo
import kto
import sft
import spo
import stapo
from baselines import orpo, sppo

SHARED = dict(
    batch_size=16, max_grad_norm=1e9, warmup_ratio=0.0, eval_every=0, save_every=0, seed=3
)
SHORT = dict(model="llama", learning_rate=3e-4, max_steps=3, tokens_per_micro_batch=150)
GRADIENTS = dict(model="qwen2", beta=0.5, max_steps=1)
SMALL = dict(model="qwen2", max_steps=1, tokens_per_micro_batch=90)
CASES = {
    "gradients": (dpo, GRADIENTS | dict(tokens_per_micro_batch=90)),
    "gradients-large-budget": (dpo, GRADIENTS | dict(tokens_per_micro_batch=4000)),
    "kto-gradients": (kto, GRADIENTS | dict(tokens_per_micro_batch=90)),
    "kto-gradients-large-budget": (kto, GRADIENTS | dict(tokens_per_micro_batch=4000)),
    "dpo": (dpo, SHORT | dict(max_steps=6, eval_every=3)),
    "kto-odd": (kto, SHORT | dict(max_steps=6, batch_size=5)),
    "ipo": (ipo, SHORT),
    "kto": (kto, SHORT | dict(max_steps=6, eval_every=3)),
    "spo": (spo, SHORT),
    "spo-one-term": (spo, SHORT | dict(alpha=0.0)),
    "stapo": (stapo, SHORT | dict(contrast="dpo", beta=0.1, margin_left=15, margin_right=20)),
    "stapo-simpo": (stapo, SHORT),
    "alphapo": (alphapo, SHORT | dict(use_reference=True)),
    "sft": (sft, SHORT),
    "dpo-one-row-missing": (dpo, SHORT | dict(max_steps=6, eval_every=3)),
    "orpo-gradients": (orpo, SMALL | dict(odds_ratio_weight=0.5)),
    "sppo-gradients": (sppo, SMALL),
}
# Four processes on few cores are slow, and what two of them show of a loss need not be shown again.
OF_FOUR = list(CASES)[:4]


def cases_of(processes):
    return OF_FOUR if processes == 4 else list(CASES)


class Recorder(torch.optim.AdamW):
    """AdamW that keeps the gradients of its first step."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        Recorder.gradients = None

    def step(self):
        if Recorder.gradients is None:
            parameters = self.param_groups[0]["params"]
            whole = [common.full_tensor(parameter.grad).cpu() for parameter in parameters]
            Recorder.gradients = {str(i): gradient for i, gradient in enumerate(whole)}
            own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
            Recorder.shard_size = sum(shard.numel() for shard in own)
        super().step()


class RecordedBatch(data.Batch):
    """A batch that adds its tokens to a list."""

    tokens = []

    def __init__(self, split, rows, *rest):
        super().__init__(split, rows, *rest)
        self.tokens.append(int(split.tokens[rows].sum()))


def moved(add_reference):
    """References up to 3 nats away from the policy, so that z0 is not 0 in the first step."""
    nats = iter([(0, 1.5), (1.5, 3)])  # of the training rows, then of the mismatched pairs

    def add(model, split, *rest):
        add_reference(model, split, *rest)
        split.ref -= torch.linspace(*next(nats), len(split))[:, None]

    return add


def forgotten(check_model):
    """Its rows are the same on all processes, and no part of the training."""

    def check(*args):
        check_model(*args)
        RecordedBatch.tokens.clear()

    return check


def forget_a_row(folder):
    """Makes one row's log-probs unknown in each reference file."""
    for path in folder.glob("*.safetensors") if dist.get_rank() == 0 else []:
        values = load_file(path)
        del values["checksum"]
        known = values["logps"][:, 0].isfinite().nonzero()[0]
        values["logps"][known] = torch.nan
        save_file(values | {"checksum": common.checksum(values)}, path)
    dist.barrier()


def main(world, out):
    dist.init_process_group("gloo")
    common.check_model = forgotten(common.check_model)
    torch.optim.AdamW, data.Batch = Recorder, RecordedBatch
    common.Run.close = lambda run: None  # one world for all cases, and no curves
    common.ROWS_KEPT_AT_ONCE = 19  # 96 rows are five times as many and one
    add_reference = common.add_reference
    for name in cases_of(dist.get_world_size()):
        script, settings = CASES[name]
        if name == "dpo-one-row-missing":
            forget_a_row(Path(out) / "reference")
        RecordedBatch.tokens.clear()
        moves = name.startswith("kto-gradients")
        common.add_reference = moved(add_reference) if moves else add_reference
        settings = SHARED | settings | dict(dataset=f"{world}/data", output_dir=f"{out}/{name}")
        script.main(script.Args(**settings | dict(model=f"{world}/{settings['model']}")))
        seen = dict(packed=RecordedBatch.tokens, shard_size=Recorder.shard_size)
        Path(f"{out}/{name}/process-{dist.get_rank()}.json").write_text(json.dumps(seen))
        if dist.get_rank() == 0:
            save_file(Recorder.gradients, f"{out}/{name}/gradients.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
