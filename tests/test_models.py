"""Start models: which are refused, which are computed rightly, what is loaded and exported."""

import pytest
import tiny
import torch
import transformers
from padded import assert_equals_padded, encoded_rows, gradients, packed, settle
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import common


def config_of(name, **settings):
    """A tiny config of any architecture."""
    return getattr(transformers, f"{name}Config")(**tiny.SIZES | settings)


def assert_refused(capsys, load, *words):
    """Exit code 2 and one line that holds these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines


TEXT = tiny.SIZES | dict(initializer_range=0.1)
MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
WINDOW = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
PACKED = {
    "Cohere": dict(logit_scale=0.25),
    "Granite": dict(logits_scaling=2.0),
    "Phi": {},  # its LM head has a bias
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=256),
    "Olmo3": WINDOW,
}
PADDED = {
    "Falcon": {},
    "GptOss": EXPERTS | WINDOW | dict(head_dim=8),  # sinks
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Qwen3Next": EXPERTS
    | LINEAR
    | dict(head_dim=8)
    | dict(layer_types=["linear_attention", "full_attention"]),
    "Qwen3_5Text": LINEAR
    | dict(head_dim=8)
    | dict(layer_types=["linear_attention", "full_attention"]),
    "Phimoe": EXPERTS | dict(sliding_window=7),  # the window is in transformers' mask alone
    "Doge": {},  # a mask of its own
    "Nemotron": {},  # hands nothing on to its attention
}
WAYS = [("packed", name) for name in PACKED] + [("padded", name) for name in PADDED]


@pytest.mark.parametrize("way, name", WAYS)
def test_architectures_give_transformers_log_probs(way, name, tmp_path):
    """Values, entropies and gradients, of rows longer than the windows."""
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 6)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TEXT | (PACKED | PADDED)[name])
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in network.get_output_embeddings().parameters():  # with a bias, it is not 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    start = settle(folder, data, max_length=256)
    assert start.model.way == way
    # The chunks of a linear attention add up in another order; Doge's `A` has a tiny gradient.
    limit = {"Qwen3Next": 1e-3, "Doge": 1e-4}.get(name, 1e-5)
    assert_equals_padded(start, encoded_rows(folder, data), limit)


LONG_ROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
LONG_ROPE |= dict(rope_theta=1e4, original_max_position_embeddings=28)
LONG_ROPED = dict(rope_parameters=LONG_ROPE, original_max_position_embeddings=28)
BY_TYPE = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
BY_TYPE = {name: BY_TYPE for name in WINDOW["layer_types"]}
REFUSED = {
    "Phi3": (LONG_ROPED, "above 28 tokens, where positions depend"),
    "Olmo3": (
        WINDOW | dict(rope_parameters=BY_TYPE, max_position_embeddings=512),
        "above 512 tokens, where positions depend",
    ),
    "GPT2": (
        dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=300),
        "300 tokens, all that it has",
    ),
    "OPT": (dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=300), "all that it"),
    "Gemma4Unified": (dict(text_config=TEXT), "it is multimodal"),
    "Gemma3Text": (WINDOW | dict(use_bidirectional_attention=True), "it is not causal"),
    "Youtu": (MLA | dict(num_key_value_heads=4), "set pad_token_id null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_architectures(name, tmp_path, capsys):
    settings, words = REFUSED[name]
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 6)
    settings = settings if "text_config" in settings else TEXT | settings
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    if "text_config" in settings:
        config.save_pretrained(folder)
    else:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert_refused(capsys, lambda: settle(folder, data, max_length=600), words, str(folder))


def test_log_probs_that_differ_are_refused(tmp_path, capsys, monkeypatch):
    """A head that is computed otherwise, which no list of architectures knows."""
    folder, data = tiny.model(tmp_path / "model"), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    hidden_of = common.LogprobModel.padded_hidden, common.LogprobModel.packed_hidden
    for name, hidden in zip(("padded_hidden", "packed_hidden"), hidden_of, strict=True):
        scaled = lambda model, batch, hidden=hidden: 1.01 * hidden(model, batch)  # noqa: E731
        monkeypatch.setattr(common.LogprobModel, name, scaled)
    assert_refused(capsys, lambda: settle(folder, data), "off from transformers'", str(folder))
    monkeypatch.setenv("RANK", "1")  # torchrun's other processes find the same, and are silent
    with pytest.raises(SystemExit):
        settle(folder, data)
    assert "error" not in capsys.readouterr().err


def test_a_window_that_packing_loses_is_padded(tmp_path, monkeypatch):
    folder = tiny.model(tmp_path / "model", "mistral")
    data = tiny.pairs(tmp_path / "pairs.jsonl", 6)
    attention = common.packed_attention

    def without_window(*args, sliding_window=None, **options):
        return attention(*args, **options)

    monkeypatch.setattr(common, "packed_attention", without_window)
    start = settle(folder, data)
    assert start.model.way == "padded"
    assert_equals_padded(start, encoded_rows(folder, data))


def test_more_tokens_than_a_model_is_made_for_is_a_warning(tmp_path, capsys):
    folder, data = tiny.model(tmp_path / "model"), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    settle(folder, data, max_length=4097)
    assert "WARNING: --max_length 4097" in capsys.readouterr().out
    settle(folder, data, max_length=4096)
    assert "WARNING" not in capsys.readouterr().out


def test_pickled_weights_are_refused(tmp_path, capsys):
    folder = tiny.model(tmp_path / "model", weights=False)
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(capsys, lambda: settle(folder), "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize("lacking", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensors_are_refused(lacking, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(capsys, lambda: settle(folder), lacking)


def test_tensors_of_another_shape_are_refused(tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(capsys, lambda: settle(folder), str(folder))


def test_a_broken_file_is_refused(tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused(capsys, lambda: settle(folder), str(folder))


def full(start):
    parameters = start.model.hf_model.named_parameters()
    return {name: common.full_tensor(parameter.detach()) for name, parameter in parameters}


def test_without_weights_the_seed_draws_them(tmp_path):
    folder = tiny.model(tmp_path / "model", weights=False)
    one, same, other = (full(settle(folder, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "norm" not in name)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_weights_come_in_as_float32_and_go_out_as_they_were(kind, tmp_path):
    """From bfloat16 files and back; a tied weight is one parameter, buffers are transformers'."""
    folder = tiny.model(tmp_path / "model", kind)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    files, start = load_file(folder / "model.safetensors"), settle(folder)
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in start.model.parameters()} == {torch.float32}
    parameters = full(start)
    assert parameters.keys() == files.keys()
    assert all(torch.equal(parameters[name], files[name].float()) for name in files)
    hf_model = start.model.hf_model
    head, words = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    assert (head.weight is words.weight) == (kind != "llama")
    # In bfloat16, which rounds Gemma's embedding scale.
    plain_buffers = dict(AutoModelForCausalLM.from_pretrained(folder).named_buffers())
    buffers = dict(hf_model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers and buffers.keys() == plain_buffers.keys()
    assert all(torch.equal(buffers[name].float(), plain_buffers[name].float()) for name in buffers)
    common.export(start.model, common.load_tokenizer(folder), start.args, start.run)
    exported = load_file(start.run.output_dir / "model.safetensors")
    assert exported.keys() == files.keys()
    for name in files:
        assert exported[name].dtype == torch.bfloat16, name
        assert torch.equal(exported[name], files[name]), name


def test_the_memory_that_is_printed_is_that_of_weights_gradients_and_moments(tmp_path, capsys):
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 2)
    config = config_of("Llama", intermediate_size=8192)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    start = settle(folder, data)
    attention, mlp, norms = 32 * (32 + 16 + 16 + 32), 3 * 32 * 8192, 2 * 32
    size = 2 * 400 * 32 + 2 * (attention + mlp + norms) + 32  # embedding and head, layers, norm
    out = capsys.readouterr().out
    assert f"{size:,} parameters, computing in torch.float32 on cpu" in out
    assert "memory per process: 0.03 GB" in out  # 16 bytes each: 25.7 MB
    optimizer = torch.optim.AdamW(start.model.parameters())
    common.init_adamw(optimizer)
    state = [x for moments in optimizer.state.values() for x in moments.values() if x.dim()]
    tensors = [*start.model.parameters(), *gradients(start).values(), *state]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 16 * size


MOE = dict(moe_intermediate_size=16, num_key_value_heads=4)
EXPORTED = {  # mostly with buffers that are learned elsewhere, and stand in the model's files
    "Apertus": dict(head_dim=8),
    "DeepseekV3": MOE
    | MLA
    | dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    | dict(first_k_dense_replace=0),
    "Youtu": MLA | dict(num_key_value_heads=4, pad_token_id=None),  # without one, no row is cleared
    "Ernie4_5_Moe": MOE | dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_have_all_tensors_in_their_own_dtypes(name, tmp_path):
    """Apertus keeps constants of its activation as buffers, a router its bias; some of it stays in
    float32 in a bfloat16 model, as the choice of experts depends on it."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config_of(name, **EXPORTED[name]))
    network.to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    state = loaded.state_dict()
    for tensor in state.values():  # none is what the config alone would give
        tensor.add_(torch.rand(tensor.shape).to(tensor.dtype))
    loaded.save_pretrained(folder)
    start = settle(folder)
    common.export(start.model, common.load_tokenizer(folder), start.args, start.run)
    again = AutoModelForCausalLM.from_pretrained(start.run.output_dir, dtype="auto").state_dict()
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key


def test_an_export_that_lacks_a_tensor_says_so(tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.extra.weight": torch.ones(2)}  # transformers reads past it
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    start = settle(folder)
    common.export(start.model, common.load_tokenizer(folder), start.args, start.run)
    out = capsys.readouterr().out
    assert "the export lacks 1 of" in out and "model.layers.0.extra.weight" in out
    common.export(start.model, common.load_tokenizer(folder), start.args, start.run)
    again = settle(start.run.output_dir)
    capsys.readouterr()
    common.export(again.model, common.load_tokenizer(folder), again.args, again.run)
    assert "the export lacks" not in capsys.readouterr().out


NOISY = {
    "GPT2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "Mixtral": dict(num_local_experts=4, attention_dropout=0.1),
    "Mixtral-jitter": dict(num_local_experts=4, router_jitter_noise=0.1),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_in_training_is_off(name, tmp_path):
    """A model whose config asks for noise computes in training what it computes in evaluation."""
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 6)
    torch.manual_seed(0)
    config = config_of(name.partition("-")[0], **NOISY[name])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    start = settle(folder, data, max_length=256)
    assert torch.equal(packed(start), packed(start))
    assert_equals_padded(start, encoded_rows(folder, data))
