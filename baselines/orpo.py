"""ORPO, Odds Ratio Preference Optimization (Hong et al., 2024), https://arxiv.org/abs/2403.07691v2

    a    = log pi(y|x) / |y|
    o(y) = log (P / (1 - P)), P = exp(a)
    loss = -a_w - odds_ratio_weight log sigmoid(o(y_w) - o(y_l))

y_w is the chosen completion, y_l the rejected one, |y| the number of its tokens, and pi the policy;
there is no reference. A log-prob is the sum over the completion's tokens, its end token included,
in nats, so a is in nats per token. P is the geometric mean of the tokens' probabilities, and o its
log odds.

Minimum: none; the loss falls towards 0 as a_w does, whatever y_l is. The slope of o along a is 1 /
(1 - P): it is 1 at unlikely completions and grows without bound as they become certain, but that of
the whole loss along a_w stays between -1 and -1 - odds_ratio_weight / (1 - P).

Departures from the paper: the first term is the mean over each completion, and the loss the mean
over pairs, so that a long answer weighs as much as a short one. The authors' code and TRL's
ORPOTrainer (July 2026) take the mean over all tokens of a micro-batch, and these include those of
the prompt (in the authors', if not told otherwise). log (1 - P) is log(-expm1(a)), which loses no
digits near P = 1. ORPO trains from a base model, in place of supervised training. The defaults are
the authors' for Mistral-7B (github.com/xfactlab/orpo); Table 3 of RePO
(https://arxiv.org/abs/2503.07426), a later comparison, searches the weight from 0.1 to 2. The
paper's own text has not been consulted; the formula is that of these three.

    python -m baselines.orpo --model MODEL_FOLDER --dataset DATA_FOLDER --max_steps 100
    torchrun --nproc_per_node 8 -m baselines.orpo --odds_ratio_weight 0.1
    diff dpo.py baselines/orpo.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args:
    odds_ratio_weight: float = HfArg(default=0.1, help="weight of the second term; 0 is SFT")
    learning_rate: float = HfArg(default=5e-6, help="peak of the schedule")

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
        if self.odds_ratio_weight < 0:
            raise ValueError("--odds_ratio_weight must be at least 0: below, rejected is preferred")


def uses_reference(args):
    """Whether the loss needs the log-probs of the reference, the policy before its first step."""
    return False


def preference_loss(policy, ref, args):
    """policy, ref: common.PairLogps, sums in nats. Returns losses, chosen_rewards,
    rejected_rewards: (B,). The rewards are the log odds, detached."""
    chosen = policy.chosen / policy.chosen_lengths  # (B,), a of the docstring above
    rejected = policy.rejected / policy.rejected_lengths
    # log (P / (1 - P)): 1 - exp(a) would lose all digits near 0.
    chosen_odds, rejected_odds = (a - torch.log(-torch.expm1(a)) for a in (chosen, rejected))
    losses = -chosen - args.odds_ratio_weight * F.logsigmoid(chosen_odds - rejected_odds)
    return losses, chosen_odds.detach(), rejected_odds.detach()


@torch.no_grad()
def evaluate(model, held_out, done, args, run):
    """The metrics of the held-out rows; the values of each row go to output_dir/eval."""
    metrics = common.Metrics(model, run)
    for batch in common.split_batches(held_out, "evaluate", args, run):
        if done == 0 and uses_reference(args):  # the policy still is the reference
            logps, entropies = batch.ref_logps, batch.ref_entropies
        else:
            logps, entropies = model(batch, entropy=True)  # (R,) summed over tokens
        policy = common.as_pairs(logps, batch.lengths)  # (B,) each, as R is 2 B
        ref = common.as_pairs(batch.ref_logps, batch.lengths)
        losses, *rewards = preference_loss(policy, ref, args)
        metrics.add_pairs(batch, logps, losses, *rewards, entropies=entropies)
    metrics.save_rows(held_out, done)
    return metrics.reduce("eval/")


def main(args):
    run = common.start(args)
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    train, held_out = common.load_pairs(args, tokenizer)
    num_steps = args.max_steps or len(train) // args.batch_size * args.num_train_epochs
    common.exit_if_finished(num_steps, args, run)  # --resume of a finished run
    model = common.load_model(args, run)  # float32 weights, sharded over the processes
    common.check_model(model, train, held_out, args, run)  # against transformers' log-probs
    if uses_reference(args):
        # The reference is the policy as it is now. Its log-probs are computed once, and each batch
        # has its own, as batch.ref_logps: no second model is in memory.
        common.add_reference(model, train, held_out, args, run)
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
        # This process's share of the step's rows, packed into sequences that fit in memory.
        for batch in common.micro_batches(train, step, args, run):
            logps, _ = model(batch)  # (R,) summed over each completion's tokens, in nats
            policy = common.as_pairs(logps, batch.lengths)  # (B,) each, as R is 2 B
            ref = common.as_pairs(batch.ref_logps, batch.lengths)  # None without a reference
            losses, *rewards = preference_loss(policy, ref, args)  # (B,) each: chosen, rejected
            # The mean over the step's rows. FSDP divides gradients by world_size, so we multiply.
            loss = losses.sum() * run.world_size / args.batch_size
            loss.backward()
            metrics.add_pairs(batch, logps, losses, *rewards)
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
        results = metrics.reduce()  # means over all processes' rows
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
