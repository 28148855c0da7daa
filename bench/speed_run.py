"""One run of bench/speed.py, as a process of its own, so that its peak memory is its own: `ours`
trains by dpo.py, `trl` by TRL's DPOTrainer, `limit` measures the matrix products that both need,
`profile` says which operators the time of a step of dpo.py goes to.

    python bench/speed_run.py ours '{"model": ..., ...}'        # the keys of speed.py's `job`

The last line that it prints is JSON."""

import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()


def now():
    """Seconds, after all that the GPU was given is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """The ends of the steps, their losses, and the peak memory by then: before any export."""

    def __init__(self):
        self.ends, self.losses, self.reference, self.peak = [], [], 0.0, 0.0

    def step(self):
        self.ends.append(now())
        if GPU:
            self.peak = torch.cuda.max_memory_allocated() / 1e9
        else:  # of this process alone; getrusage's also counts the one that started it
            status = Path("/proc/self/status").read_text()
            self.peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9

    def time_reference(self, function):
        """The function, with its seconds added to `reference`."""

        def timed(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            self.reference += now() - start
            return result

        return timed

    def report(self, job):
        """The first step warms up: it is in the losses and in no time."""
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        rate = len(seconds) * job["batch_size"] / sum(seconds)
        of_reference = len(self.ends) * job["batch_size"] / self.reference
        return dict(
            pairs_per_second=rate,
            # As in a training of one epoch: a pass of the reference for each pair.
            pairs_per_second_with_reference=1 / (1 / rate + 1 / of_reference),
            reference_seconds=self.reference,
            step_seconds=seconds,
            peak_gb=self.peak,
            losses=self.losses,
        )


class ProfilingClock(Clock):
    """One that profiles the second step."""

    def __init__(self):
        super().__init__()
        kinds = torch.profiler.ProfilerActivity
        kinds = [kinds.CPU, kinds.CUDA] if GPU else [kinds.CPU]
        self.profiler = torch.profiler.profile(activities=kinds)

    def step(self):
        super().step()
        if len(self.ends) == 1:
            self.profiler.start()
        elif len(self.ends) == 2:
            self.profiler.stop()

    def report(self, job):
        """{operator: its share of the time in operators}, the largest first."""
        rows = [x for x in self.profiler.key_averages() if x.key.startswith("aten::")]
        seconds = {x.key: x.self_device_time_total if GPU else x.self_cpu_time_total for x in rows}
        shares = {key[6:]: x / sum(seconds.values()) for key, x in seconds.items()}
        return dict(shares=dict(sorted(shares.items(), key=lambda item: -item[1])))


def profile(job):
    return ours(job | dict(steps=2), ProfilingClock())


def ours(job, clock=None):
    """dpo.py as it is; only its clock is read from outside."""
    sys.path.insert(0, str(ROOT))
    import common
    import dpo

    clock, log = clock or Clock(), common.Run.log

    def log_and_note(run, step, metrics):
        log(run, step, metrics)
        clock.step()
        clock.losses.append(metrics["loss"])

    common.Run.log = log_and_note
    common.add_reference = clock.time_reference(common.add_reference)
    settings = dict(model=job["model"], dataset=job["rows"], eval_split="", eval_every=0)
    settings |= dict(output_dir=f"{job['folder']}/run", save_every=0, warmup_ratio=0.0)
    same = "batch_size max_length learning_rate beta tokens_per_micro_batch".split()
    settings |= {name: job[name] for name in same}
    settings |= dict(max_steps=job["steps"], lr_scheduler="constant")
    dpo.main(dpo.Args(**settings))
    return clock.report(job)


def trl(job):
    """DPOTrainer on the same rows in the same order. In bfloat16 its weights are float32, too."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = Clock()

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step()

        def on_log(self, args, state, control, logs, **_):
            clock.losses += [logs["loss"]] if "loss" in logs else []

    DPOTrainer._precompute_ref_logps = clock.time_reference(DPOTrainer._precompute_ref_logps)
    micro_batch = job["trl"]["micro_batch"]
    settings = {name: job[name] for name in ("beta", "learning_rate", "max_length")}
    settings |= dict(lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0)
    settings |= dict(max_grad_norm=1.0, optim="adamw_torch_fused", max_steps=job["steps"])
    settings |= dict(per_device_train_batch_size=micro_batch, precompute_ref_log_probs=True)
    settings |= dict(gradient_accumulation_steps=job["batch_size"] // micro_batch)
    settings |= dict(gradient_checkpointing=job["trl"]["gradient_checkpointing"])
    settings |= dict(train_sampling_strategy="sequential", save_strategy="no", report_to=[])
    settings |= dict(logging_steps=1, disable_tqdm=True, bf16=GPU, use_cpu=not GPU)
    lines = Path(job["rows_in_order"]).read_text().splitlines()
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=DPOConfig(output_dir=f"{job['folder']}/trl", **settings),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Note],
    ).train()
    return clock.report(job)


# ---- The machine's limit ----
def limit(job):
    """The pairs/s at which the matrix products of the needed FLOPs alone would run, one after the
    other, each at the speed that its shape reaches here."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(job["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = model.base_model.modules()
    shapes = [tuple(x.weight.shape) for x in modules if isinstance(x, torch.nn.Linear)]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["rows_in_order"]).read_text().splitlines()[job["batch_size"] :]
    flops = needed_flops(config, shapes, map(json.loads, lines), tokenizer, job["max_length"])
    head = config.vocab_size, config.hidden_size
    rates = {shape: matmul_rate(*shape) for shape in {*shapes, head}}
    body_rate = sum(n * m for n, m in shapes) / sum(n * m / rates[n, m] for n, m in shapes)
    # Attention's products are counted at the rate of the blocks' others, which few kernels reach.
    seconds = (flops["body"] + flops["attention"]) / body_rate + flops["head"] / rates[head]
    return dict(
        flops_per_pair={name: value / len(lines) for name, value in flops.items()},
        body_flops_per_second=body_rate,
        head_flops_per_second=rates[head],
        pairs_per_second=len(lines) / seconds,
        pairs_per_second_with_reference=len(lines) / (seconds * 4 / 3),
    )


def needed_flops(config, shapes, rows, tokenizer, max_length):
    """{part: FLOPs of forward and backward}: 6 for each weight and token, with a pair's prompt
    once and the LM head at the scored tokens alone; causal attention's are 6 n^2 for n tokens and
    each number of a layer's query."""
    body = sum(rows * columns for rows, columns in shapes)
    queries = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries *= config.num_attention_heads * config.num_hidden_layers
    flops = dict(body=0, head=0, attention=0)
    for row in rows:
        count = {name: len(tokenizer(text)["input_ids"]) for name, text in row.items()}
        prompt = count["prompt"]
        # Of both responses, with their end tokens.
        wholes = [min(prompt + count[x] + 1, max_length) for x in ("chosen", "rejected")]
        scored = sum(wholes) - 2 * prompt
        flops["body"] += 6 * body * (prompt + scored)
        flops["head"] += 6 * config.vocab_size * config.hidden_size * scored
        # n^2 / 2 pairs of tokens, 2 products of 2 FLOPs, in forward and twice in backward.
        flops["attention"] += 6 * queries * (sum(n**2 for n in wholes) - prompt**2)
    return flops


def matmul_rate(outputs, inputs, tokens=2048, repeats=5):
    """FLOPs a second of a linear layer's three products: forward, and backward's two."""
    options = dict(device="cuda", dtype=torch.bfloat16) if GPU else {}
    shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
    x, weight, grad_y = (torch.randn(shape, **options) for shape in shapes)
    y, grad_x, grad_weight = (torch.zeros_like(like) for like in (grad_y, x, weight))
    seconds = []
    for _ in range(repeats + 1):
        start = now()
        torch.mm(x, weight.T, out=y)
        torch.mm(grad_y, weight, out=grad_x)
        torch.mm(grad_y.T, x, out=grad_weight)
        seconds.append(now() - start)
    return 6 * tokens * outputs * inputs / statistics.median(seconds[1:])


if __name__ == "__main__":
    kind, job = sys.argv[1:]
    kinds = {"ours": ours, "profile": profile, "trl": trl, "limit": limit}
    print(json.dumps(kinds[kind](json.loads(job))))
