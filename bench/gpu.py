"""Training speed and memory on a GPU of a model of Qwen2.5-0.5B's shape, on rows of UltraFeedback's
lengths, with and without gradient checkpointing; without a GPU, in small on the CPU.

    python bench/gpu.py                       # writes bench/results/gpu-<name>-<date>.json
    python bench/gpu.py --only spo --out FILE

dpo.py runs under torchrun, the others without. A run that fails stops no other; the exit code is
then 1. mfu counts 6 operations a parameter and token. Whether what a GPU computes is right, is for
tests/test_gpu.py."""

import argparse
import datetime
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
SCRIPTS = ["sft", "spo", "dpo"]
STEPS, BATCH = (12, 64) if GPU else (4, 4)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, SXM cards
QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN |= dict(num_attention_heads=14, num_key_value_heads=2)  # Qwen2.5-0.5B
if not GPU:
    QWEN |= dict(vocab_size=3000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
WORDS = "the quick brown fox jumps over a lazy dog while six wizards brew tea for us".split()
TORCHRUN = "-m torch.distributed.run --standalone --local_addr=localhost --nproc_per_node=1"
TORCHRUN = [sys.executable, *TORCHRUN.split(), "--no-python"]
CHILD = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
segments = torch.cuda.memory_snapshot() if torch.cuda.is_available() else []
expandable = any(segment.get("is_expandable") for segment in segments)
print(f"MEMORY {torch.cuda.max_memory_allocated() / 1e9} {expandable}")
"""


def make_tokenizer():
    """A byte-level BPE, as Qwen's is, which has each of WORDS as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = dict(initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False)
    options |= dict(special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    text = " ".join(["user assistant", *WORDS])
    bpe.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=400, **options))
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    tokenizer.chat_template = (ROOT / "toy/model/chat_template.jinja").read_text()
    return tokenizer


def prepare(work):
    """Writes a model folder without weights, and rows as pairs and as chats. Returns for each
    script the mean number of tokens of a row."""
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=True)
    AutoConfig.for_model("qwen2", **QWEN, **ends).save_pretrained(work / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(work / "model")
    rng = random.Random(0)

    def turn(role, median, spread):
        length = int(median * math.exp(spread * rng.gauss(0, 1)) * (1 if GPU else 0.05))
        content = " ".join(rng.choices(WORDS, k=min(max(length, 1), 1500)))
        return [{"role": role, "content": content}]

    def size(turns, header=False):
        options = dict(tokenize=False, add_generation_prompt=header)
        text = tokenizer.apply_chat_template(turns, **options)
        return min(2048, len(tokenizer(text)["input_ids"]))  # --max_length

    chats, pairs = [], []
    with open(work / "train.jsonl", "w") as file:
        for _ in range(STEPS * BATCH):
            prompt = turn("user", 109, 0.99)  # mean 178
            chosen, rejected = (prompt + turn("assistant", 298, 0.69) for _ in range(2))  # mean 378
            row = dict(chosen=chosen, rejected=rejected, messages=chosen)
            file.write(json.dumps(row) + "\n")
            chats.append(size(chosen))
            # The prompt is computed once.
            pairs.append(size(chosen) + size(rejected) - size(prompt, header=True))
    return dict(sft=statistics.mean(chats)) | dict.fromkeys(("spo", "dpo"), statistics.mean(pairs))


def run(script, work, checkpointing):
    """Runs a script as a process of its own: its lines of metrics, and what it printed."""
    settings = dict(model=work / "model", dataset=work, train_split="train", eval_split="")
    settings |= dict(max_steps=STEPS, batch_size=BATCH, eval_every=0, save_every=0)
    settings |= dict(output_dir=work / "run", gradient_checkpointing=checkpointing)
    if not GPU:
        settings["tokens_per_micro_batch"] = 256
    command = [*(TORCHRUN if script == "dpo" else []), sys.executable, "-c", CHILD, f"{script}.py"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    try:
        done = subprocess.run(command, **options)
        if done.returncode:
            raise RuntimeError(f"{script}.py ended with {done.returncode}: {done.stderr[-3000:]}")
        lines = (work / "run/metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(work / "run", ignore_errors=True)
    return [json.loads(line) for line in lines], done.stdout


def measure(script, work, tokens_per_row):
    """{"without checkpointing": {name: number}, "with checkpointing": the same}; on a CPU only the
    first."""
    hidden, inner, layers = (
        QWEN["hidden_size"],
        QWEN["intermediate_size"],
        QWEN["num_hidden_layers"],
    )
    queries = 1 + QWEN["num_key_value_heads"] / QWEN["num_attention_heads"]
    operations = hidden * (layers * (2 * hidden * queries + 3 * inner) + QWEN["vocab_size"])
    card = torch.cuda.get_device_name() if GPU else ""
    flops = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    result = {}
    for checkpointing in (False, True) if GPU else (False,):
        lines, text = run(script, work, checkpointing)
        speed = statistics.median(line["tokens_per_second"] for line in lines[STEPS // 2 :])
        peak, expandable = re.search(r"MEMORY (\S+) (\w+)", text).groups()
        result[f"{'with' if checkpointing else 'without'} checkpointing"] = dict(
            tokens_per_second=speed,
            rows_per_second=speed / tokens_per_row,
            mfu=flops and speed * 6 * operations / flops,
            peak_gb=float(peak),
            expandable_segments=expandable == "True",
            losses=[line["loss"] for line in lines],
        )
    return result


def machine():
    """What the numbers were taken with; `code` stands for the commit where there is no git."""

    def ask(*command):
        if not shutil.which(command[0]):
            return None
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
    return dict(
        gpu=torch.cuda.get_device_name() if GPU else None,
        driver=ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        transformers=transformers.__version__,
        commit=ask("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
        code=hashlib.sha256(code).hexdigest()[:16],
        date=datetime.date.today().isoformat(),
        runs={},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS)
    )
    parser.add_argument("--out", type=Path, help="file for the numbers")
    args, report = parser.parse_args(), machine()
    names = args.only or (SCRIPTS if GPU else SCRIPTS[:1])
    print(report if GPU else f"no GPU here: {', '.join(names)} in small, on the CPU", flush=True)
    label = re.sub(r"\W+", "-", f"gpu {report['gpu']} {report['date']}".lower())
    out = args.out or (ROOT / f"bench/results/{label}.json" if GPU else None)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tokens = prepare(Path(folder))
        for name in names:
            try:
                report["runs"][name] = measure(name, Path(folder), tokens[name])
            except Exception:
                report["runs"][name], failed = {"error": traceback.format_exc()}, failed + 1
            for key, value in report["runs"][name].items():
                print(f"{name}, {key}: {value}", flush=True)
            if out:  # after each script, so that a time limit loses none
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{failed} of {len(names)} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
