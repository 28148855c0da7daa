"""DPO, Direct Preference Optimization (Rafailov et al., 2023; https://arxiv.org/abs/2305.18290v3).

    h    = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]
    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)                        (Eq. 7 for e = 0)

Log-probs are sums over the completion's tokens, in nats; pi starts as ref. With e = label_smoothing = 0 the loss has
no minimum: it falls towards 0 as h grows without end. With e > 0, as in the DPO baseline of the SPO paper (its
Eq. 12), the minimum stands at h = log((1 - e) / e) / beta.

Departures from the paper: AdamW with the cosine schedule of the later papers, where the authors took RMSprop with a
constant rate; the label smoothing ("conservative DPO", Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    python dpo.py --model path/to/small-model --dataset path/to/pairs --max_steps 100
    torchrun --nproc_per_node 8 dpo.py --beta 0.1
    diff dpo.py ipo.py
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args:
    beta: float = HfArg(
        default=0.1, help="how dear it is to leave the reference: larger keeps the policy nearer"
    )
    label_smoothing: float = HfArg(
        default=0.0, help="share of the pairs taken to be labelled the wrong way round"
    )
    learning_rate: float = HfArg(default=5e-7, help="peak of the schedule")

    model: str = HfArg(default="Qwen/Qwen2.5-7B-Instruct", help="hub name or folder, also the reference")
    dataset: str = HfArg(default="HuggingFaceH4/ultrafeedback_binarized", help="hub name, folder or file")
    train_split: str = HfArg(default="train_prefs", help="split to train on")
    eval_split: str = HfArg(default="test_prefs", help="split to evaluate on, empty for none")
    output_dir: str = HfArg(default="runs/dpo", help="where the model and all else of the run goes")
    num_train_epochs: int = HfArg(default=1, help="passes over the training rows")
    max_steps: int = HfArg(default=0, help="optimizer steps, instead of epochs; 0 means off")
    batch_size: int = HfArg(default=128, help="rows of an optimizer step, over all processes")
    tokens_per_micro_batch: int = HfArg(default=7168, help="tokens that a process computes at a time: memory")
    max_length: int = HfArg(default=2048, help="tokens of a prompt with a completion; the rest is cut off")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps in which the learning rate rises")
    max_grad_norm: float = HfArg(default=1.0, help="gradients longer than this are scaled down to it")
    gradient_checkpointing: bool = HfArg(
        default=False, help="recompute activations: less memory, 30 %% slower"
    )
    eval_every: int = HfArg(default=100, help="steps between evaluations; 0 means off")
    save_every: int = HfArg(default=100, help="steps between checkpoints for --resume; 0 means off")
    keep_checkpoints: int = HfArg(default=1, help="newest checkpoints to keep")
    export_every: int = HfArg(default=0, help="steps between whole models in output_dir/models; 0 means off")
    resume: bool = HfArg(default=False, help="go on from output_dir's newest checkpoint")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = HfArg(default="none", help="tracker")
    seed: int = HfArg(default=42, help="order of the rows, and weights where the model has none")

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError("--beta must be above 0: at 0 the loss is constant")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                "--label_smoothing must lie in [0, 0.5): at 0.5 a pair says nothing, above it the opposite"
            )


def uses_reference(args):
    return True


def preference_loss(policy, ref, args):
    """policy, ref: common.PairLogps, (B,) sums in nats. Returns losses, chosen_rewards, rejected_rewards, (B,) each;
    the rewards, beta times the log-ratios, are detached."""
    chosen_logratios = policy.chosen - ref.chosen
    rejected_logratios = policy.rejected - ref.rejected
    margins = args.beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - args.label_smoothing) * F.logsigmoid(margins) - args.label_smoothing * F.logsigmoid(
        -margins
    )
    return losses, args.beta * chosen_logratios.detach(), args.beta * rejected_logratios.detach()


@torch.no_grad()
def evaluate(model, held_out, step, args, run):
    """The metrics of the held-out rows; the values of each row go to output_dir/eval."""
    metrics = common.Metrics(run)
    for batch in common.whole_split(held_out, "evaluate", args, run):
        policy, entropies = common.pair_logps_and_entropies(model, batch)
        losses, chosen_rewards, rejected_rewards = preference_loss(policy, batch.ref, args)
        metrics.add_pairs(batch, losses, policy, chosen_rewards, rejected_rewards, entropies)
    metrics.save_rows(held_out, step)
    return metrics.mean("eval/")


def main(args):
    run = common.start(args)
    tokenizer = common.load_tokenizer(args.model)
    train, held_out = common.load_pairs(args, tokenizer)
    model = common.load_model(args, run)
    if uses_reference(args):
        common.add_reference(model, train, held_out, args, run)  # the policy before its first step
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    first_step, last_step = common.resume(model, optimizer, train, args, run)

    for step in run.progress(first_step, last_step):
        metrics = common.Metrics(run)
        for batch in common.micro_batches(train, step, args, run):  # this process's share of the step's pairs
            policy = common.pair_logps(model, batch)  # (B,) each
            losses, chosen_rewards, rejected_rewards = preference_loss(policy, batch.ref, args)
            # The mean over the step's pairs, whatever micro-batch they fell into: FSDP averages over processes.
            (losses.sum() * run.world_size / args.batch_size).backward()
            metrics.add_pairs(batch, losses, policy, chosen_rewards, rejected_rewards)
        grad_norm = (
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).full_tensor().item()
        )
        common.stop_unless_finite(grad_norm, metrics, step)
        if step == 0 and uses_reference(args):
            common.check_reference(metrics, run)
        learning_rate = optimizer.param_groups[0]["lr"] = common.learning_rate(step, last_step, args)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        results = metrics.mean() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if held_out and common.due(args.eval_every, done, last_step):
            results |= evaluate(model, held_out, done, args, run)
        run.log(done, results)
        if common.due(args.save_every, done, last_step):
            common.save_checkpoint(model, optimizer, train, done, args, run)
        if args.export_every and done % args.export_every == 0:
            common.export(model, tokenizer, args, run, run.output_dir / "models" / f"step-{done:06d}")
    common.export(model, tokenizer, args, run)


if __name__ == "__main__":
    main(common.parse_args(Args))
