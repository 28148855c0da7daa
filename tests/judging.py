"""What the tests of eval_judge.py share: tiny models, a rule as judge, runs, servers that judge.
A test file takes the fixtures by `pytest_plugins = ["judging"]`."""

import contextlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import eval_endpoint
import eval_judge

KEY = "sk-test-0123456789abcdefXYZ"
RULE = """
def judge(prompt, a, b):
    x, y = len(set(a.split())), len(set(b.split()))
    return "a" if x > y else "b" if y > x else "tie"
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Three models that answer differently, and a rule."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        tiny.model(folder / f"m{seed}", seed=seed)
    (folder / "rule.py").write_text(RULE)
    return folder


def settings(world, models, out, /, **others):
    names = [f"one={models}/m0", f"two={models}/m1"]
    shared = dict(models=names, judge=f"{models}/rule.py", output_dir=str(out), num_prompts=12)
    shared |= dict(max_length=96, max_new_tokens=16, temperature=1.0)
    return shared | dict(dataset=f"{world}/data") | others


@pytest.fixture(scope="session")
def generated(world, models, tmp_path_factory):
    """An output_dir that has all responses and no verdict yet."""
    out = tmp_path_factory.mktemp("generated")
    eval_judge.main(eval_judge.Args(**settings(world, models, out, num_prompts=30)))
    for name in ("verdicts.0.jsonl", "report.json", "report.html"):
        (out / name).unlink()
    return out


def evaluate(world, models, out, generated=None, /, **others):
    """A run in this process; returns report.json."""
    if generated:
        shutil.copytree(generated, out, dirs_exist_ok=True)
    eval_judge.main(eval_judge.Args(**settings(world, models, out, **others)))
    return json.loads((Path(out) / "report.json").read_text())


def journal(out, kind="verdicts"):
    paths = sorted(Path(out).glob(f"{kind}.*jsonl"))
    return [json.loads(line) for path in paths for line in open(path)]


def parts_of(message):
    """Conversation, response A and response B, as a judge that follows the rules finds them."""
    fence = re.search(r"begin with (\w+)\.", message)[1]
    parts = re.split(rf"^{fence} .*\n", message, flags=re.MULTILINE)
    return [part.rstrip("\n") for part in parts[1:4]]


def by_rule(message):
    _, a, b = parts_of(message)
    x, y = len(set(a.split())), len(set(b.split()))
    return "[[A]]" if x > y else "[[B]]" if y > x else "[[tie]]"


class Server(ThreadingHTTPServer):
    """An endpoint on a loopback port; reply(message, body, headers) is (status, headers, text)."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.lock = reply, threading.Lock()
        self.seen = []  # (message, body, headers) of the requests
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has given up

    def messages(self):
        return Counter(message for message, _, _ in self.seen)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = body["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append((message, body, dict(self.headers)))
        status, headers, text = self.server.reply(message, body, self.headers)
        self.send_response(status)
        length = {"Content-Length": str(len("".join(text).encode()))}
        for name, value in (length | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for part in [text] if isinstance(text, str) else text:
            time.sleep(0 if part is text else 0.3)  # a list is sent bit by bit
            self.wfile.write(part.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(reply):
            server = Server(reply)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return server

        yield start


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


def endpoint(server, **others):
    return dict(judge="some-model", base_url=server.url, yes=True, num_prompts=30) | others


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries a hundred times shorter."""
    monkeypatch.setattr(eval_endpoint.random, "uniform", lambda low, high: 0.01)


def expected_matrix(world, models, generated, tmp_path):
    return evaluate(world, models, tmp_path / "expected", generated, num_prompts=30)["matrix"]


def everything_in(folder):
    return b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


def journal_text(out):
    return (out / "verdicts.0.jsonl").read_text().splitlines()


def wait_for_verdicts(count, process, out):
    """Until a run in a process of its own has recorded so many."""
    while not (out / "verdicts.0.jsonl").exists() or len(journal_text(out)) < count:
        assert process.poll() is None, (process.stdout, process.stderr)
        time.sleep(0.002)


def judge_model(folder, answer, ends=True):
    """A model that answers everything alike: what it says next depends on the last token alone."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([answer])
    config = tiny.CONFIGS["llama"]()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 4096
    network = AutoModelForCausalLM.from_config(config)
    newline, verdict, end = tokenizer.convert_tokens_to_ids(["Ċ", answer, "<|im_end|>"])
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = network.model.embed_tokens.weight.zero_(), network.lm_head.weight.zero_()
        embedding[newline, 0] = embedding[verdict, 1] = 1
        head[verdict, 0] = head[end if ends else verdict, 1] = 9
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def first_judge(tmp_path_factory):
    return judge_model(tmp_path_factory.mktemp("judge"), "[[A]]")
