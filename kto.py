"""KTO, Kahneman-Tversky Optimization (Ethayarajh et al., 2024), https://arxiv.org/abs/2402.01306v4

    r    = log pi(y|x)/ref(y|x)
    z0   = max(0, mean over the step's rows of log pi(y'|x)/ref(y'|x)), y' the completion of another row
    loss = w_D sigmoid(-beta (r - z0)) for a desirable y, w_U sigmoid(-beta (z0 - r)) for an undesirable one

A row is a prompt x, one completion y and a label, true for desirable. Pairs are taken apart into two rows,
and all rows are shuffled together. pi is the policy, and ref the policy before its first step. A log-prob is
the sum over the completion's tokens, its end token included, in nats; so is z0, which passes on no gradient.

Minimum: none; the loss falls towards 0 as r grows for desirable rows and falls for undesirable ones. It
begins at w / 2, with r = z0 = 0. The slope is w beta / 4 at r = z0 and dies out on both sides, so that a row
far on the wrong side is given up. For n_D and n_U rows of the two classes, the paper recommends weights for
which w_D n_D / (w_U n_U) is from 1 to 4/3, or, in version 4, 3/2.

Departures from the paper: z0. The authors shift the completions of each micro-batch by one and average over
those that the processes compute at a time, so that z0 varies with how a batch is computed, and takes two
rows. Here y' is the completion of one row for the whole run, the next one with another prompt in the order of
the first epoch, cut where it would exceed --max_length; and the mean is over the whole step and all
processes, before its training passes (in an evaluation, over the whole held-out split). So z0 depends on
neither processes nor micro-batches, a step of one row has one, and ref(y'|x) is computed beforehand. The
paper advises a learning rate of 5e-6; the default is that of dpo.py, to compare the two.

Larger differences from dpo.py: rows for pairs, so `common.load_unpaired`, metrics by class and
`report_classes`; for z0 `partners`, `mismatch`, `add_mismatched` and `add_reference` before the loop, and
`reference_point` in each step and evaluation, which is one more pass, without gradients.

    python kto.py --model MODEL_FOLDER --dataset DATA_FOLDER --max_steps 100
    torchrun --nproc_per_node 8 kto.py --beta 0.1
    diff dpo.py kto.py
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args:
    beta: float = HfArg(default=0.1, help="reward of a nat of log-ratio: larger saturates sooner")
    desirable_weight: float = HfArg(default=1.0, help="weight of a row labelled true: w_D")
    undesirable_weight: float = HfArg(default=1.0, help="weight of a row labelled false: w_U")
    learning_rate: float = HfArg(default=5e-7, help="peak of the schedule")

    model: str = HfArg(default="Qwen/Qwen2.5-7B-Instruct", help="hub name or folder of the start model")
    dataset: str = HfArg(default="HuggingFaceH4/ultrafeedback_binarized", help="hub name, folder or file")
    train_split: str = HfArg(default="train_prefs", help="split to train on")
    eval_split: str = HfArg(default="test_prefs", help="split to evaluate on; empty for none")
    output_dir: str = HfArg(default=f"runs/{Path(__file__).stem}", help="folder for all that the run writes")
    num_train_epochs: int = HfArg(default=1, help="passes over the training rows")
    max_steps: int = HfArg(default=0, help="optimizer steps, instead of epochs; 0 is off")
    batch_size: int = HfArg(default=128, help="rows of an optimizer step, over all processes")
    tokens_per_micro_batch: int = HfArg(default=7168, help="tokens computed at once by a process: the memory")
    max_length: int = HfArg(default=2048, help="tokens of a prompt with one completion; longer ones are cut")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps in which the learning rate rises")
    max_grad_norm: float = HfArg(default=1.0, help="longer gradients are scaled down to this")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, slower")
    eval_every: int = HfArg(default=100, help="steps between evaluations; 0 is off")
    save_every: int = HfArg(default=100, help="steps between checkpoints for --resume; 0 is off")
    keep_checkpoints: int = HfArg(default=1, help="how many of the newest checkpoints to keep")
    export_every: int = HfArg(default=0, help="steps between whole models in output_dir/models; 0 is off")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in output_dir")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = HfArg(default="none", help="tracker")
    seed: int = HfArg(default=42, help="order of the rows; weights of a model that has none")

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError("--beta must be above 0: at 0 no row has a gradient")
        if self.desirable_weight <= 0 or self.undesirable_weight <= 0:
            raise ValueError("--desirable_weight and --undesirable_weight must be above 0")


def uses_reference(args):
    return True


def kto_loss(policy_logps, ref_logps, desirable, kl, args):
    """policy_logps, ref_logps: (B,) sums in nats; desirable: (B,) bool; kl: 0-d, z0, taken as a constant.
    Returns losses, rewards: (B,). The rewards are beta times the log-ratios, detached."""
    logratios = policy_logps - ref_logps  # (B,)
    # sigmoid(-x) and not 1 - sigmoid(x), which float32 rounds to 0 from x = 17 on, and its slope with it.
    desirable_losses = args.desirable_weight * torch.sigmoid(-args.beta * (logratios - kl))
    undesirable_losses = args.undesirable_weight * torch.sigmoid(-args.beta * (kl - logratios))
    return torch.where(desirable, desirable_losses, undesirable_losses), args.beta * logratios.detach()


def partners(prompts, seed):
    """(rows,) row numbers: for each row the next one with another prompt, in the order of the first epoch,
    after whose end it begins again. prompts: (rows,), of which at least two differ."""
    order = np.random.default_rng((seed, 0)).permutation(len(prompts))
    found = np.empty_like(order)
    # From back to front, so that a row can take over what the row behind it found; twice, for the last rows.
    for row, behind in 2 * list(zip(order[::-1], np.roll(order, -1)[::-1], strict=True)):
        found[row] = found[behind] if prompts[behind] == prompts[row] else behind
    return found


def mismatch(split, name, args):
    """A split of the same prompts, each with the completion of the row's partner, cut to max_length."""
    prompts = [hash(tuple(prompt)) for prompt in split.rows["prompt"]]
    if len(set(prompts)) == 1:
        common.fail(f"{name}: all rows have the same prompt, and z0 needs completions of another one")
    partner = partners(prompts, args.seed)

    def swap(row, place):
        other = split.rows[int(partner[place])]
        completion = dict(responses=other["responses"], scored=other["scored"], empty=False, merged=False)
        return common.fit(row["prompt"], **completion, max_length=args.max_length)

    # `datasets` keeps the result under a hash of all that goes into it.
    key = repr([split.rows._fingerprint, args.seed, Path(__file__).read_text()])
    how = dict(new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32], features=common.FEATURES)
    how |= dict(num_proc=min(os.cpu_count(), 32) if len(split) >= 1000 else None, desc="mismatch")
    rows = split.rows.map(swap, with_indices=True, **how)
    cut = sum(map(bool, rows["notes"]))
    common.print0(f"{name}: {len(rows)} mismatched pairs for z0, {cut} of them cut to max_length")
    return common.Split(rows)


def add_mismatched(train, held_out, args):
    """Gives the splits their mismatched pairs, from which z0 is estimated."""
    with common.rank_zero_first():
        train.mismatched = mismatch(train, args.train_split, args)
        if held_out:
            held_out.mismatched = mismatch(held_out, args.eval_split, args)


def report_classes(train, args):
    """Prints how many rows each class has and how the weights balance them."""
    desirable = int(train.labels.sum())
    undesirable = len(train) - desirable
    message = f"{args.train_split}: {desirable} desirable and {undesirable} undesirable rows"
    if desirable and undesirable:
        ratio = args.desirable_weight * desirable / (args.undesirable_weight * undesirable)
        message += f", w_D n_D / (w_U n_U) = {ratio:.2f}; the paper recommends 1 to 4/3 (v4: 3/2)"
    else:
        message += f". WARNING: all labels are {bool(desirable)}: nothing sets good rows apart from bad ones"
    common.print0(message)


def add_reference(model, train, held_out, args, run):
    """Gives the splits and their mismatched pairs the reference's log-probs, by one pass and in one file."""
    splits = list(filter(None, (train, held_out)))
    both = [common.Split(concatenate_datasets([split.rows, split.mismatched.rows])) for split in splits]
    common.add_reference(model, both[0], both[1] if held_out else None, args, run)
    for split, joined in zip(splits, both, strict=True):
        split.ref, split.mismatched.ref = joined.ref.split(len(split))
        split.fingerprint = joined.fingerprint  # what a checkpoint has to agree with


@torch.no_grad()
def reference_point(model, batches, metrics, run):
    """z0, 0-d: the mean log-ratio of the mismatched pairs, all processes' `batches` together, at least 0.
    Their tokens count as computed."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # sum, count
    for batch in batches:
        logratios = common.response_logps(model, batch) - batch.ref_sums  # (B,)
        total[0] += logratios.double().sum()
        total[1] += len(logratios)
        metrics.tokens += len(batch.ids)
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).clamp(min=0)


def values_of(policy, batch, losses, rewards, kl):
    """What is reported of a batch, under TRL's names where it has them: (B,) each, and for a class also (B,)
    which rows are its own. A step without any of them leaves its names out."""
    values = {"loss": losses, "kl": kl.expand(len(losses))}
    for name, rows in {"chosen": batch.labels, "rejected": ~batch.labels}.items():
        values[f"rewards/{name}"] = rewards * rows, rows
        values[f"logps/{name}"] = policy * rows, rows
        values[f"logps/{name}_mean"] = policy / batch.lengths * rows, rows
        values[f"logratios/{name}"] = (policy - batch.ref_sums) * rows, rows
    return values


def with_margins(results, prefix=""):
    """The results and the difference of the classes' mean rewards, where there are rows of both."""
    names = [f"{prefix}rewards/{name}" for name in ("chosen", "rejected")]
    if all(name in results for name in names):
        results[f"{prefix}rewards/margins"] = results[names[0]] - results[names[1]]
    return results


@torch.no_grad()
def evaluate(model, held_out, step, args, run):
    """The metrics of the held-out rows; the values of each row go to output_dir/eval."""
    metrics = common.Metrics(run)
    mismatched = common.whole_split(held_out.mismatched, "evaluate z0", args, run)
    kl = reference_point(model, mismatched, metrics, run)
    for batch in common.whole_split(held_out, "evaluate", args, run):
        policy = common.response_logps(model, batch, entropy=True)
        losses, rewards = kto_loss(policy, batch.ref_sums, batch.labels, kl, args)
        metrics.add(batch, values_of(policy, batch, losses, rewards, kl))
    metrics.save_rows(held_out, step)
    return with_margins(metrics.mean("eval/"), "eval/")


def main(args):
    run = common.start(args)
    tokenizer = common.load_tokenizer(args.model)
    train, held_out = common.load_unpaired(args, tokenizer)
    add_mismatched(train, held_out, args)
    report_classes(train, args)
    model = common.load_model(args, run)
    if uses_reference(args):
        add_reference(model, train, held_out, args, run)  # the policy before its first step
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    first_step, last_step = common.resume(model, optimizer, train, args, run)

    for step in run.progress(first_step, last_step):
        metrics = common.Metrics(run)
        mismatched = common.micro_batches(train.mismatched, step, args, run)
        kl = reference_point(model, mismatched, metrics, run)
        for batch in common.micro_batches(train, step, args, run):  # this process's share of the step's rows
            policy = common.response_logps(model, batch)  # (B,), one response a row
            losses, rewards = kto_loss(policy, batch.ref_sums, batch.labels, kl, args)
            # FSDP takes the mean over processes; what remains is the mean over the step's rows.
            (losses.sum() * run.world_size / args.batch_size).backward()
            metrics.add(batch, values_of(policy, batch, losses, rewards, kl))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        grad_norm = grad_norm.full_tensor().item()
        common.stop_unless_finite(grad_norm, metrics, step)
        if step == 0 and uses_reference(args):
            common.check_reference(metrics, run)
        learning_rate = optimizer.param_groups[0]["lr"] = common.learning_rate(step, last_step, args)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        results = with_margins(metrics.mean()) | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if held_out and common.due(args.eval_every, done, last_step):
            results |= evaluate(model, held_out, done, args, run)
        run.log(done, results)
        if common.due(args.save_every, done, last_step):
            common.save_checkpoint(model, optimizer, train, done, args, run)
        if args.export_every and done % args.export_every == 0:
            common.export(model, tokenizer, args, run, run.output_dir / "models" / f"step-{done:06d}")
    common.export(model, tokenizer, args, run)
    run.close()


if __name__ == "__main__":
    main(common.parse_args(Args))
