"""KTO, Kahneman-Tversky Optimization (Ethayarajh et al., 2024), https://arxiv.org/abs/2402.01306v4

    r    = log pi(y|x)/ref(y|x)
    z0   = max(0, mean over the step of log pi(y'|x)/ref(y'|x)), y' the completion of another row
    loss = w_D sigmoid(-beta (r - z0)) for a desirable y
    loss = w_U sigmoid(-beta (z0 - r)) for an undesirable one

A row is a prompt x, one completion y and a label, true for desirable. Pairs are taken apart into
two rows, and all rows are shuffled together. pi is the policy, and ref the policy before its first
step. A log-prob is the sum over the completion's tokens, its end token included, in nats; so is z0,
which has no gradient.

Minimum: none; the loss falls towards 0 as r grows for desirable rows and falls for undesirable
ones. It begins at w / 2, with r = z0 = 0. The slope is w beta / 4 at r = z0 and vanishes on both
sides, so a row far on the wrong side is given up. For n_D and n_U rows of the two classes, the
paper recommends weights for which w_D n_D / (w_U n_U) is from 1 to 4/3, or, in version 4, 3/2.

Departures from the paper: z0. The authors shift the completions within each micro-batch by one and
average over those that are computed at a time, so that z0 depends on how a batch is computed, and
needs two rows. Here each row is paired once, for the whole run, with the completion of the next row
(in first-epoch order) that has another prompt, cut to --max_length; and the mean is over the whole
step and all processes, before its training passes (in an evaluation, over the whole held-out
split). So z0 depends on neither processes nor micro-batches, a step of one row has one, and
ref(y'|x) is computed beforehand. The paper advises a learning rate of 5e-6; the default is that of
dpo.py, to compare the two.

Differences from dpo.py beyond the loss: rows instead of pairs, so `common.load_unpaired` and
metrics by class; for z0, `mismatch` before the loop, and `estimate_kl` in each step and evaluation,
which is one more forward pass, without gradients.

    python kto.py --model MODEL_FOLDER --dataset DATA_FOLDER --max_steps 100
    torchrun --nproc_per_node 8 kto.py --beta 0.1
    diff dpo.py kto.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

import common
import data


@dataclass
class Args:
    beta: float = HfArg(default=0.1, help="reward of a nat of log-ratio: larger saturates sooner")
    desirable_weight: float = HfArg(default=1.0, help="weight of a row labelled true: w_D")
    undesirable_weight: float = HfArg(default=1.0, help="weight of a row labelled false: w_U")
    learning_rate: float = HfArg(default=5e-7, help="peak of the schedule")

    model: str = HfArg(default="Qwen/Qwen2.5-7B-Instruct", help="start model: hub name or folder")
    dataset: str = HfArg(default="HuggingFaceH4/ultrafeedback_binarized", help="hub name or path")
    train_split: str = HfArg(default="train_prefs", help="split to train on")
    eval_split: str = HfArg(default="test_prefs", help="split to evaluate on; empty for none")
    max_rows: int = HfArg(default=0, help="rows of each split, for a trial; 0 is all of them")
    apply_chat_template: bool = HfArg(default=False, help="wrap plain strings in the chat template")
    chat_template: str = HfArg(default="", help="file with one, or model to copy it from")
    output_dir: str = HfArg(default=f"runs/{Path(__file__).stem}", help="folder of the run")
    num_train_epochs: int = HfArg(default=1, help="passes over the training rows")
    max_steps: int = HfArg(default=0, help="optimizer steps, instead of epochs; 0 is off")
    batch_size: int = HfArg(default=128, help="examples per optimizer step, over all processes")
    tokens_per_micro_batch: int = HfArg(
        default=common.MICRO_BATCH_TOKENS, help="tokens per forward pass; lower it if out of memory"
    )
    max_length: int = HfArg(default=2048, help="tokens of prompt and completion; longer is cut")
    warmup_ratio: float = HfArg(default=0.1, help="fraction of the steps with linear warm-up")
    lr_scheduler: Literal["cosine", "linear", "constant"] = HfArg(
        default="cosine", help="decay of the learning rate after the warm-up"
    )
    max_grad_norm: float = HfArg(default=1.0, help="the gradient is clipped to this norm")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory")
    eval_every: int = HfArg(default=100, help="steps between evaluations; 0 is off")
    save_every: int = HfArg(default=100, help="steps between checkpoints for --resume; 0 is off")
    keep_checkpoints: int = HfArg(default=2, help="how many of the newest checkpoints to keep")
    export_every: int = HfArg(default=0, help="steps between models in output_dir/models; 0 is off")
    resume: bool = HfArg(default=False, help="resume from the newest checkpoint in output_dir")
    overwrite: bool = HfArg(default=False, help="delete the run in output_dir and start over")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = HfArg(
        default="none", help="also log the metrics to this tracker"
    )
    seed: int = HfArg(default=42, help="data order; weights, if the model has none")

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError("--beta must be above 0: at 0 no row has a gradient")
        if self.desirable_weight <= 0 or self.undesirable_weight <= 0:
            raise ValueError("--desirable_weight and --undesirable_weight must be above 0")


def uses_reference(args):
    """Whether the loss needs the log-probs of the reference, the policy before its first step."""
    return True


def kto_loss(policy_logps, ref_logps, desirable, kl, args):
    """policy_logps, ref_logps: (B,) sums in nats; desirable: (B,) bool; kl: 0-d, z0, a constant.
    Returns losses, rewards: (B,). The rewards are beta times the log-ratios, detached."""
    logratios = policy_logps - ref_logps  # (B,)
    # sigmoid(-x) and not 1 - sigmoid(x): from x = 17 on float32 rounds that to 0, without a slope.
    desirable_losses = args.desirable_weight * torch.sigmoid(-args.beta * (logratios - kl))
    undesirable_losses = args.undesirable_weight * torch.sigmoid(-args.beta * (kl - logratios))
    losses = torch.where(desirable, desirable_losses, undesirable_losses)
    return losses, args.beta * logratios.detach()


def partners(prompts, seed):
    """(rows,) for each row the next row with another prompt, in the shuffled order of the first
    epoch, cyclically. prompts: (rows,), of which at least two differ."""
    order = np.random.default_rng((seed, 0)).permutation(len(prompts))
    partner = np.empty_like(order)
    # Backwards, so that a row with the same prompt as the next row takes that one's partner; and
    # twice around, as the last rows find theirs at the front.
    for i in reversed(range(2 * len(order))):
        row, following = order[i % len(order)], order[(i + 1) % len(order)]
        partner[row] = following
        if prompts[row] == prompts[following]:
            partner[row] = partner[following]
    return partner


def mismatch(split, args):
    """A split of the same prompts, each with the completion of its partner, cut to max_length."""
    prompts = [hash(tuple(prompt)) for prompt in split.rows["prompt"]]
    if len(set(prompts)) == 1:
        common.fail(f"{split.source}: all rows have the same prompt, z0 needs several", shared=True)
    partner = partners(prompts, args.seed)

    def swap(row, i):
        other = split.rows[int(partner[i])]
        completion = dict(responses=other["responses"], scored=other["scored"])
        whole = dict(empty=False, notes={}, max_length=args.max_length)
        return data.finish_example(row["prompt"], **completion, **whole)

    key = [split.rows._fingerprint, args.seed, Path(__file__).read_text()]  # all that goes into it
    rows = data.map_once(split.rows, swap, key, desc="mismatch")
    cut = sum(map(bool, rows["notes"]))
    pairs = f"{len(rows)} mismatched pairs for z0, {cut} of them cut to max_length"
    common.print0(f"{split.source}: {pairs}")
    return data.Split(rows, f"{split.source}, mismatched")


def report_classes(train, args):
    """Prints how many rows each class has and how the weights balance them."""
    desirable = int(train.labels.sum())
    undesirable = len(train) - desirable
    message = f"{train.source}: {desirable} desirable and {undesirable} undesirable rows"
    if desirable and undesirable:
        ratio = args.desirable_weight * desirable / (args.undesirable_weight * undesirable)
        message += f", w_D n_D / (w_U n_U) = {ratio:.2f}; the paper advises 1 to 4/3 (weights)"
    else:
        message += f". WARNING: all labels are {bool(desirable)}: there is nothing to tell apart"
    common.print0(message)


@torch.no_grad()
def estimate_kl(model, batches, run):
    """z0, 0-d: the mean log-ratio of all processes' mismatched pairs, at least 0."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # sum, count
    for batch in batches:
        logps, _ = model(batch)  # (B,)
        total[0] += (logps - batch.ref_logps).double().sum()
        total[1] += len(logps)
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).clamp(min=0)


def add_rows(metrics, batch, logps, losses, rewards, kl, entropies=None):
    """Adds a batch to the metrics, under TRL's names where it has them. All (B,); the values of a
    class come with a mask of its rows. A step without such rows leaves its names out."""
    values = {"kl": kl.expand(len(losses))}
    for name, rows in {"chosen": batch.labels, "rejected": ~batch.labels}.items():
        values[f"rewards/{name}"] = rewards * rows, rows
        values[f"logps/{name}"] = logps * rows, rows
        values[f"logps/{name}_mean"] = logps / batch.lengths * rows, rows
        values[f"logratios/{name}"] = (logps - batch.ref_logps) * rows, rows
    metrics.add(batch, logps, losses, values, entropies)


def with_margins(results, prefix=""):
    """The results and the difference of the classes' mean rewards, where there are rows of both."""
    chosen, rejected = f"{prefix}rewards/chosen", f"{prefix}rewards/rejected"
    if chosen not in results or rejected not in results:
        return results
    return results | {f"{prefix}rewards/margins": results[chosen] - results[rejected]}


@torch.no_grad()
def evaluate(model, held_out, done, args, run):
    """The metrics of the held-out rows; the values of each row go to output_dir/eval."""
    metrics = common.Metrics(model, run)
    mismatched = common.split_batches(held_out.mismatched, "evaluate z0", args, run)
    kl = estimate_kl(model, mismatched, run) if done > 0 else torch.zeros((), device=run.device)
    for batch in common.split_batches(held_out, "evaluate", args, run):
        if done == 0 and uses_reference(args):  # the policy still is the reference
            logps, entropies = batch.ref_logps, batch.ref_entropies
        else:
            logps, entropies = model(batch, entropy=True)  # (R,) summed over tokens
        losses, rewards = kto_loss(logps, batch.ref_logps, batch.labels, kl, args)
        add_rows(metrics, batch, logps, losses, rewards, kl, entropies)
    metrics.save_rows(held_out, done)
    return with_margins(metrics.reduce("eval/"), "eval/")


def main(args):
    run = common.start(args)
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    train, held_out = common.load_unpaired(args, tokenizer)
    report_classes(train, args)
    with common.rank_zero_first():
        train.mismatched = mismatch(train, args)
        if held_out:
            held_out.mismatched = mismatch(held_out, args)
    num_steps = args.max_steps or len(train) // args.batch_size * args.num_train_epochs
    common.exit_if_finished(num_steps, args, run)  # --resume of a finished run
    model = common.load_model(args, run)  # float32 weights, sharded over the processes
    common.check_model(model, train, held_out, args, run)  # against transformers' log-probs
    if uses_reference(args):
        # The reference is the policy as it is now. Its log-probs are computed once, and each batch
        # has its own, as batch.ref_logps: no second model is in memory.
        common.add_reference(model, train, held_out, args, run)
        common.add_reference(model, train.mismatched, held_out and held_out.mismatched, args, run)
    # Weights and moments are float32: bfloat16 would round nearly every update of this size away.
    # The loop sets the learning rate of each step.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    common.init_adamw(optimizer)
    first_step = common.load_checkpoint(model, optimizer, train, num_steps, args, run)
    common.begin_output(first_step, args, run)

    if held_out and first_step == 0:
        run.log(0, evaluate(model, held_out, 0, args, run))  # where the curves begin
    for step in run.progress(first_step, num_steps):
        metrics = common.Metrics(model, run)
        kl = estimate_kl(model, common.micro_batches(train.mismatched, step, args, run), run)
        # This process's share of the step's rows, packed into sequences that fit in memory.
        for batch in common.micro_batches(train, step, args, run):
            logps, _ = model(batch)  # (R,) summed over each completion's tokens, in nats
            losses, rewards = kto_loss(logps, batch.ref_logps, batch.labels, kl, args)
            # The mean over the step's rows. FSDP divides gradients by world_size, so we multiply.
            loss = losses.sum() * run.world_size / args.batch_size
            loss.backward()
            add_rows(metrics, batch, logps, losses, rewards, kl)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        grad_norm = common.full_tensor(grad_norm).item()  # of the whole model, before clipping
        common.stop_unless_finite(grad_norm, metrics, train, step)
        if step == 0 and uses_reference(args):
            common.check_reference(metrics, train, run)
        learning_rate = common.learning_rate(step, num_steps, args)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        # All that follows reports and saves: it changes nothing in the training.
        done = step + 1  # updates so far, the number in logs and files: 0 is before training
        results = with_margins(metrics.reduce())  # means over all processes' rows
        results |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if held_out and common.due(args.eval_every, done, num_steps):
            results |= evaluate(model, held_out, done, args, run)
        run.log(done, results)
        if args.export_every and done % args.export_every == 0:
            common.export(model, tokenizer, args, run, f"{args.output_dir}/models/step-{done:06d}")
        if run.signal or common.due(args.save_every, done, num_steps):
            common.save_checkpoint(model, optimizer, train, done, args, run)
        run.exit_on_signal(done)  # Ctrl-C or SIGTERM
    common.export(model, tokenizer, args, run)
    run.close()


if __name__ == "__main__":
    main(common.parse_args(Args))
