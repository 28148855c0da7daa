"""Runs from end to end, stopped runs and errors of use: real files, real processes."""

import math
import time

import pytest
import tiny
import torch
import yaml
from launch import ROOT, Fork, command, metrics, refused, run, settings
from safetensors.torch import load_file, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import alphapo
import common
import data
import dpo
import ipo
import kto
import sft
import spo
import stapo

REAL_ROWS = ROOT.parent / "shared" / "data"


class Stopped(Exception):
    pass


def stop_after(step, monkeypatch):
    """Lets a run end as if it were killed, after `step` updates and their checkpoint."""
    save = common.save_checkpoint

    def save_and_stop(model, optimizer, train, done, args, run):
        save(model, optimizer, train, done, args, run)
        if done == step:
            raise Stopped

    monkeypatch.setattr(common, "save_checkpoint", save_and_stop)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    spo.main(spo.Args(**settings(world, out, num_train_epochs=1)))
    return out


@pytest.mark.parametrize("step", range(1, 10))
def test_a_resumed_run_ends_with_the_same_bits(
    world, uninterrupted, tmp_path, monkeypatch, capsys, step
):
    args = settings(world, tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(step, patch)
        spo.main(spo.Args(**args))
    torch.distributed.destroy_process_group()
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:  # after the checkpoint, and cut off
        file.write('{"step": 99, "loss": 0}\n{"step": 99, "lo')
    steps, rows_of_step = [], data.rows_of_step
    monkeypatch.setattr(
        data, "rows_of_step", lambda train, s, a: steps.append(s) or rows_of_step(train, s, a)
    )
    spo.main(spo.Args(**args, resume=True))
    assert steps == list(range(step, 10))
    printed = capsys.readouterr().out.split(f"resumed after step {step}")[0].splitlines()
    assert any("rows read from" in line for line in printed[-8:])
    whole, resumed = (
        load_file(out / "model.safetensors") for out in (uninterrupted, tmp_path / "stopped")
    )
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[name], resumed[name]) for name in whole
    )
    lines = [[{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics(out)]
             for out in (uninterrupted, tmp_path / "stopped")]  # fmt: skip
    assert lines[0] == lines[1]


def test_a_lost_reference_is_computed_again_from_the_start_weights(
    world, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(6, patch)
        spo.main(spo.Args(**settings(world, tmp_path / "stopped")))
    torch.distributed.destroy_process_group()
    for file in (tmp_path / "reference").iterdir():
        file.unlink()
    spo.main(spo.Args(**settings(world, tmp_path / "stopped", resume=True)))
    whole, resumed = (
        load_file(out / "model.safetensors") for out in (uninterrupted, tmp_path / "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_checkpoint_is_passed_over(world, tmp_path, monkeypatch, capsys):
    args = settings(world, tmp_path / "stopped", keep_checkpoints=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(3, patch)
        dpo.main(dpo.Args(**args))
    torch.distributed.destroy_process_group()
    newest = tmp_path / "stopped/checkpoints/step-000003"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-000002", "step-000003"]
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    dpo.main(dpo.Args(**args, resume=True, max_steps=4))
    assert "resumed after step 2" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 3, 4]


def test_more_epochs_go_on_with_the_schedule_of_the_new_total(world, tmp_path):
    args = settings(world, tmp_path / "run", batch_size=64, learning_rate=1.0, max_grad_norm=1e-9)
    sft_args = args | dict(batch_size=80)
    sft.main(sft.Args(**sft_args))
    assert len(metrics(tmp_path / "run")) == 2
    sft.main(sft.Args(**sft_args, num_train_epochs=3, resume=True))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # 6 steps, ceil(0.1 x 6) = 1 of warm-up: step 2 of 0..5 is a fifth of the way down
    assert lines[2]["learning_rate"] == pytest.approx(0.5 * (1 + math.cos(math.pi / 5)))


def test_a_run_is_evaluated_before_its_first_step(world, tmp_path, monkeypatch):
    """The policy still is the reference: its held-out values are taken from there. A method without
    a reference computes them, and gets the same."""
    forward, computed = common.LogprobModel.forward, []

    def count(model, batch, entropy=False):
        computed.append(entropy)
        return forward(model, batch, entropy)

    monkeypatch.setattr(common.LogprobModel, "forward", count)
    tables, lines, passes = {}, {}, {}
    for script, others in ((ipo, {}), (alphapo, dict(alpha=0.0))):
        out = tmp_path / script.__name__
        computed.clear()
        script.main(script.Args(**settings(world, out, eval_every=1, max_steps=1, **others)))
        tables[script] = load_file(out / "eval/step-000000.safetensors")
        lines[script], passes[script] = metrics(out)[0], sum(computed)
    assert lines[ipo]["step"] == lines[alphapo]["step"] == 0
    assert lines[ipo]["eval/loss"] == pytest.approx(100.0)  # (1 / (2 beta))^2 at beta 0.05
    assert lines[ipo]["eval/logratios/chosen"] == lines[ipo]["eval/rewards/margins"] == 0
    assert passes[ipo] == passes[alphapo]  # step 0: of the reference pass or its own; and step 1
    for name in ("policy", "entropy", "lengths"):
        torch.testing.assert_close(tables[ipo][name], tables[alphapo][name], atol=1e-5, rtol=0)
    assert torch.equal(tables[ipo]["policy"], tables[ipo]["reference"])
    for name in ("eval/entropy", "eval/logps/chosen", "eval/logps/rejected_mean"):
        assert lines[ipo][name] == pytest.approx(lines[alphapo][name], abs=1e-5)
    assert "eval/tokens_per_second" not in lines[ipo]  # nothing was computed
    assert lines[alphapo]["eval/tokens_per_second"] > 0


def test_a_killed_run_goes_on_with_another_number_of_processes(world, uninterrupted, tmp_path):
    args = settings(world, tmp_path / "killed")
    with Fork(command("spo.py", args, 2)) as torchrun:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("killed/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        torchrun.kill()  # and its workers
    assert not (tmp_path / "killed/config.json").exists()  # no whole model yet
    spo.main(spo.Args(**args, resume=True))
    assert len(metrics(tmp_path / "killed")) == 10
    for line, expected in zip(metrics(tmp_path / "killed"), metrics(uninterrupted), strict=True):
        for name in line.keys() - {"tokens_per_second"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5)


SCRIPTS = [dpo, ipo, kto, spo, stapo, alphapo, sft]
USES = [(0, script) for script in SCRIPTS] + [(2, script) for script in (dpo, kto)]


@pytest.mark.parametrize("processes, script", USES, ids=lambda use: getattr(use, "__name__", use))
def test_every_script_runs_as_a_user_runs_it(world, tmp_path, script, processes):
    options = settings(
        world, tmp_path / "out", max_steps=4, eval_every=2, save_every=2, export_every=2
    )
    # Once by torchrun itself; test_toy.py has a new interpreter for spo.py alone.
    new = processes > 0 and script is dpo
    done = run(f"{script.__name__}.py", options, processes, new)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out"
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert ["eval/entropy" in line for line in lines] == [True, False, True, False, True]
    assert ["loss" in line for line in lines] == [False, True, True, True, True]
    evaluations = sorted(path.name for path in (out / "eval").iterdir())
    assert evaluations == [f"step-{step:06d}.safetensors" for step in (0, 2, 4)]
    kept = [
        "README.md",
        "checkpoints",
        "config.json",
        "config.yaml",
        "eval",
        "metrics.jsonl",
        "models",
    ]
    assert set(kept) <= {path.name for path in out.iterdir()} and not (out / ".export").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"]
    final, snapshot = (
        load_file(folder / "model.safetensors") for folder in (out, out / "models/step-000004")
    )
    assert all(torch.equal(final[name], snapshot[name]) for name in final)
    table = load_file(out / "eval/step-000004.safetensors")
    logps, lengths, entropy = (table[name].sum() for name in ("policy", "lengths", "entropy"))
    assert lines[-1]["eval/entropy"] == pytest.approx(float(entropy / lengths), rel=1e-5)
    if script is sft:
        assert lines[-1]["eval/loss"] == pytest.approx(float(-logps / lengths), rel=1e-5)
    elif script in (stapo, alphapo):  # by default without a reference
        assert "reference" not in table and not (tmp_path / "reference").exists()
        logps = table["policy"][:, 0].mean()
        assert lines[-1]["eval/logps/chosen"] == pytest.approx(float(logps), rel=1e-5)
    elif script is kto:  # the pairs' two completions are rows by turns
        gap = (table["policy"] - table["reference"])[0::2].mean()
        assert lines[-1]["eval/logratios/chosen"] == pytest.approx(float(gap), rel=1e-4, abs=1e-5)
    else:
        gap = (table["policy"] - table["reference"])[:, 0].mean()
        assert lines[-1]["eval/logratios/chosen"] == pytest.approx(float(gap), rel=1e-4, abs=1e-5)


def test_training_does_what_the_loss_asks_for(world, tmp_path):
    """SPO pulls r_w to 1/beta - 1/alpha and r_l to -1/alpha, here +1 and -1 nats."""
    args = settings(
        world,
        tmp_path / "spo",
        beta=0.5,
        alpha=1.0,
        num_train_epochs=20,
        learning_rate=3e-3,
        save_every=0,
    )
    spo.main(spo.Args(**args))
    last = metrics(tmp_path / "spo")[-1]
    assert last["logratios/chosen"] == pytest.approx(1.0, abs=0.3)
    assert last["logratios/rejected"] == pytest.approx(-1.0, abs=0.3)
    assert last["rewards/accuracies"] > 0.95
    assert last["loss"] < -0.7  # -2/e = -0.736 at the minimum


def test_stapo_draws_z_between_its_margins(world, tmp_path):
    """Z, the difference of the mean log-probs, to the midpoint of 0.6 and 0.8 nats a token."""
    tiny.pairs(tmp_path / "rows.jsonl", 40, seed=8)
    rows = dict(
        dataset=str(tmp_path / "rows.jsonl"), batch_size=20, num_train_epochs=60, save_every=0
    )
    stapo.main(stapo.Args(**settings(world, tmp_path / "run", **rows | dict(learning_rate=3e-3))))
    first, *_, last = metrics(tmp_path / "run")
    z = [line["logps/chosen_mean"] - line["logps/rejected_mean"] for line in (first, last)]
    assert abs(z[0] - 0.7) > 0.3 and z[1] == pytest.approx(0.7, abs=0.1)
    assert last["rewards/margins"] == pytest.approx(2.5 * z[1], rel=1e-5)
    assert last["loss"] < 1.3 < first["loss"]  # 1.15 at the minimum


def test_stapo_with_one_margin_trains_as_simpo_does(world, tmp_path):
    """Two scripts, one loss: and `inf` gets through the command line, config.yaml and --resume."""
    options = settings(world, tmp_path / "stapo", max_steps=2) | dict(
        margin_left=0.4, margin_right="inf"
    )
    assert run("stapo.py", options).returncode == 0
    done = run("stapo.py", dict(config=tmp_path / "stapo/config.yaml", resume=True, max_steps=4))
    assert done.returncode == 0, done.stderr[-2000:]
    shared = settings(world, tmp_path / "simpo", max_steps=4)
    alphapo.main(alphapo.Args(**shared, alpha=0.0, gamma_beta_ratio=0.4))
    lines = [metrics(tmp_path / name) for name in ("stapo", "simpo")]
    assert len(lines[0]) == len(lines[1]) == 4
    assert lines[1][2]["loss"] != lines[1][0]["loss"]
    for one, other in zip(
        lines[0][:3], lines[1][:3], strict=True
    ):  # the third update has another rate
        for name in one.keys() - {"tokens_per_second", "learning_rate"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


def test_the_config_of_a_run_repeats_it(world, uninterrupted, tmp_path):
    options = dict(config=uninterrupted / "config.yaml", output_dir=tmp_path / "again")
    done = run("spo.py", options)
    assert done.returncode == 0, done.stderr[-2000:]
    first, again = (
        load_file(out / "model.safetensors") for out in (uninterrupted, tmp_path / "again")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_export_is_the_trained_model(world, tmp_path, kind):
    """Reloaded, it has the logits of the checkpoint's tensors in a plain transformers model."""
    out = tmp_path / "run"
    sft.main(sft.Args(**settings(world, out, model=f"{world}/{kind}", max_steps=3)))
    exported, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(
        info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    trained = AutoModelForCausalLM.from_config(exported.config)
    with (
        safe_open(next(out.glob("checkpoints/step-000003/*.safetensors")), "pt") as file,
        torch.no_grad(),
    ):
        for name, parameter in trained.named_parameters():
            parameter.copy_(file.get_tensor(name))
    ids = torch.arange(5, 60)[None]
    assert torch.equal(exported(ids).logits, trained(ids).logits)
    started = AutoModelForCausalLM.from_pretrained(f"{world}/{kind}")
    assert not torch.equal(exported(ids).logits, started(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [tiny.turn("user", "tea")], add_generation_prompt=True, return_tensors="pt"
    )
    answer = exported.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in exported.generation_config.eos_token_id
    card = (out / "README.md").read_text()
    assert "max_steps: 3" in card and f"Made from {kind} on train_sft of data" in card
    assert str(world) not in card  # where the folders of this machine lie concerns nobody


def test_an_export_has_the_dtype_of_the_start_model(world, tmp_path):
    AutoModelForCausalLM.from_pretrained(f"{world}/llama", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    AutoTokenizer.from_pretrained(f"{world}/llama").save_pretrained(tmp_path / "half")
    dpo.main(
        dpo.Args(**settings(world, tmp_path / "out", model=str(tmp_path / "half"), max_steps=2))
    )
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    checkpoint = load_file(next((tmp_path / "out").glob("checkpoints/*/*.safetensors")))
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}


def test_another_run_is_never_overwritten(world, uninterrupted, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert "has files" in refused(spo, settings(world, uninterrupted), capsys, monkeypatch)
    message = refused(
        spo, settings(world, uninterrupted, resume=True, beta=0.3), capsys, monkeypatch
    )
    assert "beta 0.1, not 0.3" in message
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_no_file_of_a_run_is_a_pickle(uninterrupted):
    for path in uninterrupted.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata"), path


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="the real rows are not part of the repository")
def test_real_rows_with_a_model_that_has_no_weights_yet(tmp_path):
    tiny.model(tmp_path / "model", "qwen2", weights=False)
    options = dict(
        model=tmp_path / "model",
        dataset=REAL_ROWS,
        output_dir=tmp_path / "run",
        max_steps=2,
        batch_size=8,
    )
    done = run("spo.py", options | dict(max_length=400, eval_split=""))
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if "train_prefs.parquet" in line)
    counts = [
        int(part.split()[0])
        for part in line.split(": ", 2)[2].split(", ")
        if "kept" in part or "dropped" in part
    ]
    assert "900 rows" in line and sum(counts) == 900
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "qwen2"


def test_a_loss_that_is_not_finite_stops_before_the_update(world, tmp_path):
    """With beta 100, SPO overflows float32 once a margin of log-ratios is below -0.84 nats."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        spo.main(spo.Args(**settings(world, out, beta=100, alpha=0.0, learning_rate=1e-2)))
    message = str(end.value)
    step = int(message.removeprefix("stopped in step ").split(":")[0])
    assert step > 1 and "losses not finite in rows [" in message
    assert [line["step"] for line in metrics(out)] == list(range(1, step))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step - 1:06d}"]
    weights = load_file(next(out.glob("checkpoints/*/*.safetensors")))
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_gradient_that_is_not_finite_stops_before_the_update(world, tmp_path, monkeypatch):
    """As of an attention whose backward pass gives NaN, while all losses are finite."""
    attend, out = common.response_attention, tmp_path / "run"

    def with_broken_backward(*args):
        result = attend(*args)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * torch.nan)
        return result

    monkeypatch.setattr(common, "response_attention", with_broken_backward)
    with pytest.raises(SystemExit) as end:
        dpo.main(dpo.Args(**settings(world, out)))
    assert str(end.value) == "stopped in step 1: gradient norm nan, losses are finite"
    assert metrics(out) == [] and not (out / "checkpoints").exists()


def test_config_yaml_holds_every_setting_but_resume(uninterrupted):
    saved = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert saved.keys() == vars(spo.Args()).keys() - {"resume", "overwrite"}


def test_tensorboard_gets_the_metrics(world, tmp_path):
    pytest.importorskip("tensorboard")
    dpo.main(dpo.Args(**settings(world, tmp_path / "run", max_steps=2, report_to="tensorboard")))
    assert list((tmp_path / "run").glob("tensorboard/events.out.tfevents.*"))
