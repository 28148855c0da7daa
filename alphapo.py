"""AlphaPO, SimPO with a reward of adjustable shape (Gupta et al., 2025),
https://arxiv.org/abs/2501.03884v4

    a    = log pi(y|x) / |y|, or log (pi(y|x)/ref(y|x)) / |y| with --use_reference    (appendix A.4)
    r(y) = beta (1 - exp(-alpha a)) / alpha, and beta a for alpha 0                    (Eq. 3)
    loss = -log sigmoid(r(y_w) - r(y_l) - gamma), gamma = beta gamma_beta_ratio        (Eq. 4)

y_w is the chosen completion, y_l the rejected one, |y| the number of its tokens, pi the policy, and
ref the policy before its first step. A log-prob is the sum over the completion's tokens, its end
token included, in nats, so a is in nats per token. With alpha 0 this is SimPO (Meng et al., 2024,
https://arxiv.org/abs/2405.14734v3), exactly.

Minimum: none; the loss falls towards 0 as r(y_w) - r(y_l) grows. For alpha < 0 without a reference,
r lies between beta / alpha and 0, so that the loss stays above log(1 + exp(gamma + beta / alpha)).
The slope of r along a is beta exp(-alpha a): alpha > 0 pulls most at unlikely completions, alpha <
0 at likely ones. Where -alpha a nears 86, float32 overflows, and the run stops before that update.

Departures from the paper: the loss is its own, by expm1, as 1 - exp(-alpha a) loses all digits near
alpha 0. Its Eq. 10 (Corollary 3.3) is wrong: Eq. 27 inverts the fraction of Eq. 26. Misprints:
section 3.1 defines pi_l by y_w; section 3.3 says larger |alpha| "close to 0" and seems to mean
smaller; Illustration 1 cuts 1.6398 and 5.606e-11 off to 1.63 and 5.60e-11. The defaults are Table
3's for Mistral, with the learning rate of Llama 3.

    python alphapo.py --model MODEL_FOLDER --dataset DATA_FOLDER --max_steps 100
    torchrun --nproc_per_node 8 alphapo.py --alpha 0.25
    diff dpo.py alphapo.py
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
    alpha: float = HfArg(default=0.25, help="shape of the reward, of any sign; 0 is SimPO")
    beta: float = HfArg(default=2.5, help="scale of the rewards")
    gamma_beta_ratio: float = HfArg(default=0.1, help="margin of the rewards, divided by beta")
    use_reference: bool = HfArg(default=False, help="a from log-ratios, not log-probs")
    learning_rate: float = HfArg(default=1e-6, help="peak of the schedule")

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
            raise ValueError("--beta must be above 0: at 0 no pair has a gradient")
        if self.gamma_beta_ratio < 0:
            raise ValueError("--gamma_beta_ratio must be at least 0: the lead that chosen needs")


def uses_reference(args):
    """Whether the loss needs the log-probs of the reference, the policy before its first step."""
    return args.use_reference


def preference_loss(policy, ref, args):
    """policy, ref: common.PairLogps, sums in nats. Returns losses, chosen_rewards,
    rejected_rewards: (B,). The rewards are r of the docstring above, detached."""
    chosen, rejected = policy.chosen, policy.rejected  # (B,)
    if args.use_reference:
        chosen, rejected = chosen - ref.chosen, rejected - ref.rejected
    chosen, rejected = chosen / policy.chosen_lengths, rejected / policy.rejected_lengths  # a
    if args.alpha != 0:  # 1 - exp(-alpha a) would lose all digits near 0
        chosen, rejected = (-torch.expm1(-args.alpha * a) / args.alpha for a in (chosen, rejected))
    losses = -F.logsigmoid(args.beta * (chosen - rejected - args.gamma_beta_ratio))
    return losses, args.beta * chosen.detach(), args.beta * rejected.detach()


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
