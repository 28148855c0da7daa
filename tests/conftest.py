"""Keeps the tests' caches away from the user's."""

import os
import re
import signal
import sys
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
# test_gpu.py sees the GPU where it is asked for alone.
if set(re.findall(r"\w+\.py\b", " ".join(sys.argv[1:]))) != {"test_gpu.py"}:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is exact on a CPU is what the others check
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # a closed port: no test reaches the hub
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: more threads only wait for one another

import pytest
import tiny
import torch

import curves

# Their assertions say what they found, as those of the tests do.
pytest.register_assert_rewrite("judging", "launch", "padded", "rows")
# A shell lets its background jobs ignore Ctrl-C, and they pass that on to the runs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_world():
    """A test that leaves its run early leaves its process group, too."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """They take seconds a run; test_newcomers.py, and runs in processes of their own, draw them."""
    if request.module.__name__ not in ("test_newcomers", "test_curves"):
        monkeypatch.setattr(curves, "draw", lambda folders, path: path.touch())


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with tiny models and 320 training pairs, 40 held-out ones and chats made of them."""
    folder = tmp_path_factory.mktemp("world")
    for kind in ("llama", "qwen2"):
        tiny.model(folder / kind, kind)
    data = folder / "data"
    data.mkdir()
    tiny.pairs(data / "train_prefs.jsonl", 320, seed=1)
    tiny.pairs(data / "test_prefs.jsonl", 40, seed=2)
    tiny.chats(data / "train_sft.jsonl", 160, seed=3)
    tiny.chats(data / "test_sft.jsonl", 20, seed=4)
    return folder
