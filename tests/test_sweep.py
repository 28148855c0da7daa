"""Twenty tiny architectures of sweep.py, of each mechanism one or two: never computed wrongly."""

import json
import sys
from pathlib import Path

import pytest
import sweep
from launch import Fork

SCRIPT = Path(__file__).parent / "sweep.py"
EXPECTED = {
    "qwen2:window": "exact",  # layers with and without a window
    "gemma2": "exact",  # windows, soft-caps of scores and of logits
    "gemma3n_text:shared": "exact",  # layers that share others' keys and values
    "qwen3_moe": "exact",  # experts
    "deepseek_v3": "exact",  # compressed keys and values, a router's bias in a buffer
    "minimax_m3_vl_text": "padded",  # attention to blocks that an indexer chooses
    "gpt_oss": "padded",  # attention sinks
    "llama4_text": "refused",  # attention within chunks
    "phi": "exact",  # biases, of the LM head too
    "cohere": "exact",  # multiplied logits
    "granite": "exact",  # divided logits
    "gpt2": "exact",  # learned positions
    "opt:post-norm": "exact",  # learned positions with an offset, embeddings of another size
    "bloom": "padded",  # ALiBi
    "mpt": "padded",  # ALiBi, attention of its own
    "apertus": "exact",  # an activation's constants in buffers
    "qwen3_next": "padded",  # a hybrid of linear attention
    "lfm2": "padded",  # a hybrid of convolutions
    "mamba2": "padded",  # no attention
    "bert:encoder": "refused",  # not causal
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of the script in a process of its own, as it starts others."""
    out = tmp_path_factory.mktemp("sweep") / "results.json"
    names = [name if ":" in name else f"{name}:" for name in EXPECTED]  # none of their variants
    with Fork([sys.executable, str(SCRIPT), *names, "--out", str(out)]) as finished:
        code = finished.wait()
    assert out.exists(), finished.stderr[-2000:]
    found = json.loads(out.read_text())
    wrong = any(result["outcome"] in sweep.FAILURES for result in found.values())
    assert code == wrong, finished.stderr[-2000:]
    assert f"{len(found)}/{len(EXPECTED)}" in finished.stderr  # the bar
    assert all(f"\n{outcome}: " in finished.stdout for outcome in sweep.OUTCOMES)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_is_right_or_refused(name, results):
    result = results[name]
    assert result["outcome"] not in sweep.FAILURES, result["reason"]
    assert result["outcome"] == EXPECTED[name], result["reason"]


def test_settings_are_of_architectures_that_exist():
    """A later transformers may drop one."""
    assert sweep.SETTINGS.keys() <= sweep.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no_such_model"):
        sweep.chosen(["no_such_model"])
