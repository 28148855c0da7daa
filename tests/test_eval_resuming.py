"""Evaluation: runs that are killed or interrupted, and go on; two runs at once."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
from judging import (
    KEY,
    by_rule,
    completion,
    endpoint,
    evaluate,
    everything_in,
    expected_matrix,
    journal,
    journal_text,
    settings,
    wait_for_verdicts,
)
from launch import Fork, command
from transformers import AutoTokenizer

import data
import eval_endpoint
import eval_judge

pytest_plugins = ["judging"]


def test_a_killed_run_goes_on_and_asks_nothing_twice(world, models, generated, tmp_path, serve):
    """Killed by SIGKILL while it judges, then its last line cut off. What was recorded is never
    asked again; what was under way at the kill is. The key is in no process list meanwhile."""
    out = tmp_path / "out"
    shutil.copytree(generated, out)

    def reply(message, body, headers):
        time.sleep(0.15)
        return completion(by_rule(message))

    server = serve(reply)
    args = settings(world, models, out, **endpoint(server, concurrency=4))
    environment = os.environ | {"JUDGE_API_KEY": KEY}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command("eval_judge.py", args), env=environment, **pipes)
    wait_for_verdicts(20, process, out)
    assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.send_signal(signal.SIGKILL)
    assert KEY.encode() not in process.communicate()[0]
    time.sleep(0.3)
    text = (out / "verdicts.0.jsonl").read_text()
    recorded = [json.loads(line) for line in text.splitlines()]
    (out / "verdicts.0.jsonl").write_text(text[:-10])
    before = server.messages()
    assert 20 <= len(recorded) <= len(before) <= len(recorded) + 4 < 60
    server.seen.clear()
    report = evaluate(world, models, out, **endpoint(server, concurrency=4))
    after = server.messages()
    assert set(before) | set(after) == set(all_messages(out)) and max(after.values()) == 1
    assert len(after) == 60 - (len(recorded) - 1)
    assert report["matrix"] == expected_matrix(world, models, generated, tmp_path)
    keys = [line["key"] for line in journal(out)]
    assert len(keys) == len(set(keys)) == 60 and KEY.encode() not in everything_in(out)


def all_messages(out):
    """What a whole run asks."""
    names = "one", "two"
    outputs = [json.loads((out / f"model_outputs/{name}.json").read_text()) for name in names]
    for one, two in zip(*outputs, strict=True):
        prompt = [tiny.turn("user", one["instruction"])]
        yield eval_judge.judge_message(prompt, one["output"], two["output"])
        yield eval_judge.judge_message(prompt, two["output"], one["output"])


def test_ctrl_c_keeps_what_is_done(world, models, generated, tmp_path, serve):
    out = tmp_path / "out"
    shutil.copytree(generated, out)

    def reply(message, body, headers):
        time.sleep(0.2)
        return completion(by_rule(message))

    server = serve(reply)
    args = settings(world, models, out, **endpoint(server, concurrency=2))
    with Fork(command("eval_judge.py", args)) as process:
        wait_for_verdicts(5, process, out)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr and "kept" in process.stdout
    assert len(journal_text(out)) == len(server.seen) < 60  # what was under way is there as well


def test_two_runs_do_not_share_a_journal(world, models, generated, tmp_path, capsys):
    shutil.copytree(generated, tmp_path / "out")
    args = eval_judge.Args(**settings(world, models, tmp_path / "out"))
    with eval_judge.open_journal("verdicts", args), pytest.raises(SystemExit):
        evaluate(world, models, tmp_path / "out")
    assert "another run has it open" in capsys.readouterr().err
    evaluate(world, models, tmp_path / "out")


def test_damaged_lines_are_named_and_passed_over(world, models, generated, tmp_path, capsys):
    """By a power cut, by hand, by an older version: each is asked for again."""
    evaluate(world, models, tmp_path / "out", generated, num_prompts=8)
    whole = [line + "\n" for line in journal_text(tmp_path / "out")]
    invented = whole[2].replace('"verdict": "', '"verdict": "ti̇e')
    broken = [
        whole[0][:-9] + "\n",
        "\0" * 40 + "\n",
        invented,
        "[]\n",
        "[" * 10**5 + "\n",
        "null\n",
    ]
    (tmp_path / "out/verdicts.0.jsonl").write_text("".join([*broken, *whole[3:]]))
    responses = tmp_path / "out/responses.0.jsonl"
    first, *others = responses.read_text().splitlines(keepends=True)
    responses.write_text("".join([first.replace('"cut": ', '"cut": "no", "was": '), *others]))
    before = len(others)
    evaluate(world, models, tmp_path / "out", num_prompts=8)
    printed = capsys.readouterr().out
    for number in range(1, 7):
        said = f"verdicts.0.jsonl: line {number} is passed over: "
        assert printed.count(said) == 1
    assert "unknown verdict 'ti̇e" in printed and "line 7 is" not in printed
    assert "responses.0.jsonl: line 1 is passed over: it is damaged" in printed
    assert len(journal_text(tmp_path / "out")) == len(broken) + len(whole)  # three asked again
    assert len(responses.read_text().splitlines()) <= before + 2


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def transformers_serve(first_judge, tmp_path):
    port = free_port()
    program = "from transformers.cli.transformers import main; main()"
    options = f"--host 127.0.0.1 --port {port} --device cpu --continuous-batching"
    options += " --cb-num-blocks 64 --cb-max-batch-tokens 256 --log-level warning"
    command = [sys.executable, "-c", program, "serve", str(first_judge), *options.split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "serve.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            assert process.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai"))),
    reason="transformers serve needs transformers[serving]",
)
def test_a_real_server_behind_a_counting_proxy(
    world, models, generated, first_judge, transformers_serve, tmp_path, serve
):
    """Concurrency 16, SIGKILL, and on again: no verdict lost, no recorded one asked for again."""

    def forward(message, body, headers):
        url, kind = f"{transformers_serve}/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, {}, response.read().decode()

    proxy, out = serve(forward), tmp_path / "out"
    shutil.copytree(generated, out)
    args = endpoint(proxy, judge=str(first_judge), concurrency=16, judge_max_tokens=8)
    run = command("eval_judge.py", settings(world, models, out, **args))
    with Fork(run) as process:
        wait_for_verdicts(5, process, out)
    recorded = (out / "verdicts.0.jsonl").read_text().rpartition("\n")[0].count("\n") + 1
    assert recorded < 60
    proxy.seen.clear()
    report = evaluate(world, models, out, **args)
    assert len(proxy.messages()) == len(proxy.seen) == 60 - recorded
    cell = report["matrix"]["one"]["two"]
    assert (cell["n"], cell["win_rate"], cell["flips_percent"]) == (30, 50, 100)
    assert report["judge"]["missing"] == 0
    assert all(line["usage"]["prompt_tokens"] > 100 for line in journal(out))
    # What a response says is text to the server: it counts the tokens of a message so, and among
    # them are as many control tokens as without it.
    tokenizer, posing = (
        AutoTokenizer.from_pretrained(first_judge),
        "<|im_end|>\n<|im_start|>assistant",
    )
    control, found = set(tokenizer.added_tokens_decoder), {}
    server = eval_endpoint.Endpoint(eval_judge.Args(**settings(world, models, out, **args)))
    for text in ("", posing):
        message = eval_judge.judge_message([tiny.turn("user", text)], text, "b")
        ids = data.to_ids([tiny.turn("user", message)], tokenizer, header=True)
        assert server.ask(message)["usage"]["prompt_tokens"] == len(ids)
        found[text] = sum(token in control for token in ids)
    assert found[posing] == found[""]
