"""Trains a tiny random model of every architecture behind AutoModelForCausalLM, and says what came
of it: python tests/sweep.py [NAME ...] [--jobs 2] [--out FILE.json]

A NAME is a model type with all of its variants ("qwen2"), one of these ("qwen2:window"), or the
model type without them ("qwen2:"). The outcomes:

    exact         log-probs, entropies and gradients are those of transformers' own forward on each
                  response alone, and an export after a step has the trained model's tensors
    padded        the same, computed by transformers' own attention on padded rows
    refused       one line "error: --model ..." and exit code 2
    WRONG         numbers differ
    export WRONG  the numbers are right, the export's tensors are not
    traceback     any other exception, or no end within the time limit
    unbuildable   transformers itself does not build or run the tiny model

The exit code is 1 if any is WRONG, export WRONG or traceback."""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import defaultdict
from multiprocessing.connection import wait
from pathlib import Path

if __name__ == "__main__":  # before torch and transformers read them; tests have conftest.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    hub = tempfile.TemporaryDirectory(prefix="hf-home-")
    os.environ |= dict(HF_HOME=hub.name, HF_HUB_OFFLINE="1")
    os.environ |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import datasets
import padded
import tiny
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import common

TIME_LIMIT = 60  # seconds for an architecture
LONGEST = 128  # tokens of a row, fewer than the models have positions for
LIMIT = 1e-4  # nats for log-probs and entropies; relative in norm for a gradient
FAILURES = "WRONG", "export WRONG", "traceback"
OUTCOMES = "exact", "padded", "refused", *FAILURES, "unbuildable"


# ---- Settings that make an architecture tiny ----
def named(value, names):
    """The same value for many settings."""
    return dict.fromkeys(names.split(), value)


# A config gets those that it has a field for. Windows, chunks and the like are shorter than a row.
SMALL = dict(vocab_size=400, pad_token_id=0, bos_token_id=0, eos_token_id=2, sep_token_id=None)
SMALL |= named(
    512,
    """max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length
    max_target_positions context_length original_max_position_embeddings""",
)
SMALL |= named(
    32,
    """hidden_size d_model n_embd dim_model embedding_dim emb_dim embedding_size hidden_dim
    word_embed_proj_dim lru_width attention_hidden_size input_embedding_size
    output_embedding_size mamba_d_ssm backbone_hidden_size""",
)
SMALL |= named(
    48,
    """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim ffn_hidden_size n_inner
    intermediate_size_mlp dim_ff dff feed_forward_size d_inner dense_intermediate_size""",
)
SMALL |= named(
    16,
    """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    expert_ffn_hidden_size shared_experts_intermediate_size moe_shared_expert_intermediate_size
    router_hidden_size prefix_dense_intermediate_size""",
)
SMALL |= named(
    2,
    """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_encoder_layers num_decoder_layers num_blocks num_layers_per_stack""",
)
SMALL |= named(
    4,
    """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
    encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
    swa_num_attention_heads linear_num_value_heads linear_num_heads""",
)
SMALL |= named(
    2,
    """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
    num_global_key_value_heads""",
)
SMALL |= named(
    8,
    """head_dim kv_channels dim_head d_head attention_head_size swa_head_dim global_head_dim
    linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim qk_head_dim""",
)
SMALL |= named(8, "q_lora_rank kv_lora_rank o_lora_rank v_head_dim swa_v_head_dim")
SMALL |= named(4, "qk_rope_head_dim qk_nope_head_dim rotary_dim")
SMALL |= named(
    7, "sliding_window sliding_window_size attention_window_size window_size keep_window_size"
)
SMALL |= named(
    8,
    "attention_chunk_size chunk_size mamba_chunk_size block_size index_block_size local_attention",
)
SMALL |= named(
    4,
    """num_experts n_routed_experts num_local_experts moe_num_experts index_topk floor_scale
    conv_kernel linear_conv_kernel_dim d_rel rel_extent laurel_rank index_n_heads gated_norm_rank
    mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads time_step_rank
    mamba_dt_rank vision_soft_tokens_per_image prompt_length""",
)
SMALL |= named(
    2,
    """num_experts_per_tok moe_topk moe_k top_k_experts n_group num_shared_experts
    n_shared_experts moe_num_shared_experts zero_expert_num n_groups index_topk_blocks hc_mult
    num_random_blocks""",
)
SMALL |= named(1, "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index")
SMALL |= named(400, "vocab_size_per_layer_input decoder_vocab_size image_vocab_size")
SMALL |= named(8, "hidden_size_per_layer_input type_vocab_size segment_types prompt_types")
SMALL |= dict(query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
SMALL |= dict(
    logits_soft_cap=3.0, output_logit_soft_cap=3.0, num_mtp_layers=0, num_kv_shared_layers=0
)
SMALL |= dict(embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5)
SMALL |= dict(attention_multiplier=0.2, num_nextn_predict_layers=0, dim_model_base=16)
SMALL |= dict(moe_layer_end_index=3, image_size=8, is_decoder=True)
SMALL |= dict(mamba_d_head=16, mamba_head_dim=16, use_mamba_kernels=False)

PER_LAYER = """layer_types mlp_layer_types layers_block_type no_rope_layers indexer_types
    block_types activation_sparsity_pattern intermediate_size""".split()


def small_settings(config_class):
    """Settings for any config class, and for the configs within it."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        settings["num_key_value_heads"] = 4  # one for each head: keys and values are compressed
    settings |= layer_lists(config_class)
    for name, spec in getattr(config_class, "sub_configs_defaults", {}).items():
        part = getattr(spec, "config_class", spec)
        if part is AutoConfig:
            settings[name] = small_settings(CONFIG_MAPPING[spec.model_type])
            settings[name]["model_type"] = spec.model_type
        else:
            settings[name] = small_settings(part)
    return settings


def layer_lists(config_class):
    """The kinds of layers of a default config in turn; of two such lists, in all combinations."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            default = vars(config_class())
        except Exception:  # a default that its own checks refuse
            return {}
    kinds = {name: default[name] for name in PER_LAYER if isinstance(default.get(name), list)}
    kinds = {name: list(dict.fromkeys(values)) for name, values in kinds.items()}
    kinds = {name: values for name, values in kinds.items() if len(values) > 1}
    if not kinds:
        return {}
    layers = 4 if len(kinds) > 1 else max(map(len, kinds.values()))
    settings = {"num_hidden_layers": layers}
    for place, (name, values) in enumerate(kinds.items()):
        repeated = 2**place
        settings[name] = [values[i // repeated % len(values)] for i in range(layers)]
        if name == "intermediate_size":
            settings[name] = [48] * layers
    return settings


# ---- What single architectures need, and their variants ----
WINDOWED = dict(layer_types=["sliding_attention", "full_attention"])
MOE = dict(mlp_layer_types=["dense", "sparse"])
ROPE = dict(rope_type="default", rope_theta=1e4)
LONG_ROPE = ROPE | dict(rope_type="longrope", original_max_position_embeddings=28)
LONG_ROPE |= dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
DYNAMIC = dict(
    max_position_embeddings=16, rope_parameters=ROPE | dict(rope_type="dynamic", factor=4.0)
)
YARN = ROPE | dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
GEMMA4 = dict(global_head_dim=8, num_global_key_value_heads=1)
LLAMA4 = dict(num_hidden_layers=4, interleave_moe_layer_step=2, moe_layers=[1, 3])
LLAMA4 |= dict(no_rope_layers=[1, 0, 1, 0])
LLAMA4 |= dict(layer_types=["chunked_attention", "full_attention"] * 2)
ASSISTANT = dict(num_kv_shared_layers=2, hidden_size_per_layer_input=0)
ASSISTANT |= dict(vocab_size_per_layer_input=0)
QWEN4 = dict(hc_lowrank=4, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8)
QWEN4 |= dict(indexer_budget=8, indexer_compress_ratio=4, ngram_vocab_size_base=50)
QWEN4 |= dict(split_ngram_parts=1, heads_per_ngram=2, make_ngram_vocab_size_divisible_by=8)
QWEN4_PLE = QWEN4 | dict(ple_layer_ids=[1], ple_embed_dim=32)
DOTS3 = dict(head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=4)
DOTS3 |= dict(swa_q_lora_rank=8, swa_kv_lora_rank=8, swa_v_head_dim=8)
DOTS3 |= dict(swa_head_dim=16, swa_qk_nope_head_dim=8)
CHUNKS = dict(local_attn_chunk_length=8, lsh_attn_chunk_length=8, axial_pos_shape=(16, 32))

# {model type: settings}, or {model type: {variant: settings}} where one of the variants is "".
SETTINGS = {
    "afmoe": dict(num_hidden_layers=4, layer_types=WINDOWED["layer_types"] * 2, mup_enabled=True),
    "apertus": {"": {}, "bias": dict(attention_bias=True)},
    "arcee": {"": {}, "bias": dict(attention_bias=True, mlp_bias=True)},
    "axk2": MOE | dict(num_hidden_layers=2),
    "bamba": dict(attn_layer_indices=[1]),
    "bart": {"": {}, "scaled": dict(scale_embedding=True)},
    "bert": {"": {}, "encoder": dict(is_decoder=False)},
    "bloom": {"": {}, "post-norm": dict(apply_residual_connection_post_layernorm=True)},
    "blt": dict(
        vocab_size=400,
        encoder_hash_byte_group_vocab=50,
        local_attention_window_len=7,
        encoder_config=dict(hidden_size_global=32, vocab_size=400),
        decoder_config=dict(hidden_size_global=32, vocab_size=400),
        patcher_config=dict(vocab_size=400),
    ),
    "cohere": {
        "": dict(logit_scale=0.5),
        "unscaled": dict(logit_scale=1.0),
        "qk-norm": dict(use_qk_norm=True, attention_bias=True),
    },
    "cohere2": {"": dict(logit_scale=0.5), "unscaled": dict(logit_scale=1.0)},
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=ROPE)),
    "cwm": WINDOWED,
    "dbrx": dict(
        attn_config=dict(clip_qkv=1.0, kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": {
        "": {},
        "no-q-lora": dict(q_lora_rank=None),
        "grouped": dict(topk_method="group_limited_greedy"),
    },
    "deepseek_v3": {
        "": {},
        "halves": dict(rope_interleave=False, q_lora_rank=None),
        "yarn": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    },
    "doge": {"": {}, "experts": dict(is_moe=True)},
    "dots1": WINDOWED,
    "dots3_note": dict(
        text_config=DOTS3,
        vision_config=dict(
            adapter_in_dim=32, adapter_out_dim=32, num_hidden_layers=1, patch_size=4
        ),
        audio_config=dict(
            adapter_input_size=32,
            adapter_out_dim=32,
            downsample_hidden_size=8,
            feature_size=8,
            head_dim=8,
            num_key_value_heads=4,
        ),
    ),
    "dots3_note_text": DOTS3,
    "falcon": {
        "": {},
        "alibi": dict(alibi=True),
        "new": dict(new_decoder_architecture=True, num_kv_heads=2),
        "sequential": dict(parallel_attn=False, bias=True, multi_query=False, num_kv_heads=4),
    },
    "falcon_h1": dict(
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.7,
        attention_out_multiplier=0.8,
        attention_in_multiplier=1.2,
        ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
        mlp_multipliers=[0.7, 0.8],
        ssm_in_multiplier=1.1,
        ssm_out_multiplier=0.9,
    ),
    "flint": dict(mlp_only_layers=[0]),
    "fuyu": dict(patch_size=4, text_config=dict(partial_rotary_factor=0.5)),
    "gemma3": dict(
        mm_tokens_per_image=4, vision_config=dict(patch_size=4, num_channels=3, image_size=8)
    ),
    "gemma3n_text": {
        "": {},
        "shared": dict(
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=WINDOWED["layer_types"] * 2,
            intermediate_size=[48] * 4,
            activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0],
        ),
    },
    "gemma4": dict(
        text_config=GEMMA4,
        vision_config=dict(position_embedding_size=16),
        audio_config=dict(output_proj_dims=32),
    ),
    "gemma4_assistant": dict(backbone_hidden_size=32, text_config=ASSISTANT),
    "gemma4_unified_assistant": dict(backbone_hidden_size=32, text_config=ASSISTANT),
    "gemma4_text": {
        "": GEMMA4,
        "plain": GEMMA4 | dict(hidden_size_per_layer_input=0),
        "experts": GEMMA4 | dict(enable_moe_block=True, attention_k_eq_v=True),
        "shared": GEMMA4
        | dict(
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=WINDOWED["layer_types"] * 2,
            use_double_wide_mlp=True,
        ),
    },
    "gemma4_unified": dict(
        text_config=GEMMA4,
        vision_config=dict(mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32, patch_size=4),
    ),
    "gemma4_unified_text": GEMMA4,
    "glm4_moe": {"": {}, "qk-norm": dict(use_qk_norm=True)},
    "glm_moe_dsa": MOE | dict(num_hidden_layers=2),
    "got_ocr2": dict(
        vision_config=dict(
            patch_size=4,
            image_size=8,
            output_channels=8,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=48,
        )
    ),
    "gpt2": {
        "": {},
        "by-layer": dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        "unscaled": dict(scale_attn_weights=False),
    },
    "gpt_bigcode": {"": {}, "multi-head": dict(multi_query=False)},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {"": {}, "sequential": dict(use_parallel_residual=False)},
    "gptj": dict(rotary_dim=4),
    "granite": {"": {}, "unscaled": dict(logits_scaling=1.0)},
    "granitemoehybrid": {
        "": dict(layer_types=["linear_attention", "full_attention"]),
        "rope": dict(
            layer_types=["linear_attention", "full_attention"], position_embedding_type="rope"
        ),
    },
    "gpt_oss": dict(rope_parameters=ROPE),
    "inkling_text": {"": {}, "dense": dict(num_hidden_layers=2) | MOE},
    "jamba": dict(
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,
        expert_layer_offset=2,
    ),
    "laguna": MOE
    | WINDOWED
    | dict(num_attention_heads_per_layer=[4, 2], moe_router_logit_softcapping=2.0),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_multiple_of=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "llama": {
        "": {},
        "bias": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "dynamic": DYNAMIC,
        "yarn": dict(rope_parameters=YARN),
    },
    "llama4": dict(text_config=LLAMA4),
    "llama4_text": LLAMA4,
    "longcat_flash": dict(head_dim=4, qk_head_dim=8),
    "mamba2": dict(head_dim=16),
    "mellum": MOE | WINDOWED,
    "minicpm3": dict(scale_emb=3, scale_depth=1.4),
    "minimax_m3_vl_text": MOE | dict(layer_types=["full_attention", "minimax_m3_sparse"]),
    "mistral": {"": {}, "full": dict(sliding_window=None)},
    "mixtral": {"": {}, "full": dict(sliding_window=None)},
    "mllama": dict(
        text_config=dict(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=ROPE)
    ),
    "modernbert-decoder": dict(sep_token_id=1, cls_token_id=1),
    "moshi": dict(audio_vocab_size=40, num_codebooks=2),
    "mpt": {"": {}, "scaled": dict(logit_scale=0.5, attn_config=dict(clip_qkv=1.0))},
    "mvp": {"": {}, "prompt": dict(use_prompt=True, prompt_mid_dim=8)},
    "olmo": dict(clip_qkv=1.0),
    "olmoe": dict(clip_qkv=1.0),
    "opt": {"": {}, "post-norm": dict(do_layer_norm_before=False, word_embed_proj_dim=16)},
    "persimmon": {"": {}, "no-qk-norm": dict(qk_layernorm=False)},
    "phi": {"": {}, "qk-norm": dict(qk_layernorm=True)},
    "phi3": {
        "": {},
        "longrope": dict(rope_parameters=LONG_ROPE, original_max_position_embeddings=28),
    },
    "phi4_multimodal": dict(
        vision_config=dict(image_size=8, patch_size=4, crop_size=8),
        audio_config=dict(
            ext_pw_out_channel=8,
            depthwise_separable_out_channel=8,
            nemo_conv_channels=8,
            input_size=8,
        ),
    ),
    "phimoe": {"": {}, "head-bias": dict(lm_head_bias=True, attention_bias=True)},
    "qwen2": {"": {}, "window": WINDOWED | dict(use_sliding_window=True, max_window_layers=1)},
    "qwen2_moe": {"": {}, "window": WINDOWED | dict(use_sliding_window=True, mlp_only_layers=[0])},
    "qwen3": {"": {}, "window": WINDOWED | dict(use_sliding_window=True)},
    "qwen3_moe": {"": {}, "window": dict(use_sliding_window=True, mlp_only_layers=[0])},
    "qwen4_exp": dict(text_config=QWEN4),
    "qwen4_exp_text": {"": QWEN4, "ngrams": QWEN4_PLE},
    "reformer": CHUNKS
    | dict(
        axial_pos_embds_dim=(16, 16),
        attn_layers=["local", "lsh"],
        hash_seed=0,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    ),
    "roc_bert": dict(
        pronunciation_vocab_size=50,
        shape_vocab_size=50,
        pronunciation_embed_dim=8,
        shape_embed_dim=8,
    ),
    "roformer": {"": {}, "values": dict(rotary_value=True)},
    "seed_oss": {"": {}, "bias": dict(attention_out_bias=True)},
    "smollm3": WINDOWED | dict(use_sliding_window=True),
    "stablelm": {
        "": {},
        "qk-norm": dict(qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True),
    },
    "xlm": dict(causal=True),
    "xmod": dict(default_language="en_XX"),
    "youtu": {"": dict(pad_token_id=None), "padding": {}},
    "zamba": dict(
        attention_hidden_size=64,
        attention_head_dim=16,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba2": {
        "": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
        "rope": dict(
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "hybrid"] * 2,
            use_mem_rope=True,
            num_key_value_heads=4,
            use_shared_attention_adapter=True,
            num_mem_blocks=2,
            adapter_rank=4,
        ),
    },
    "zaya": {
        "": dict(num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"]),
        "head-bias": dict(num_experts_per_tok=1, lm_head_bias=True, sliding_window=None),
    },
}


def variants(name):
    """{full name: settings} of a model type, beside the small ones."""
    settings = SETTINGS.get(name, {})
    if "" not in settings:
        return {name: settings}
    return {f"{name}:{key}" if key else name: more for key, more in settings.items()}


def everything():
    """{full name: settings} of all model types."""
    return {
        full: more
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for full, more in variants(name).items()
    }


def config_of(full_name):
    """A tiny config."""
    name = full_name.partition(":")[0]
    config_class = CONFIG_MAPPING[name]
    settings = copy.deepcopy(merged(small_settings(config_class), everything()[full_name]))
    return config_class(**settings)  # which may change what it gets


def merged(settings, more):
    """More settings win; those of a config within a config are merged in turn."""
    both = dict(settings)
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(settings.get(name), dict)
        both[name] = merged(settings[name], value) if nested else value
    return both


# ---- The model on disk and what transformers computes of it ----
def randomize(model):
    """Makes every tensor matter: matrices larger than usual, and nothing constant."""
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dim() > 1 and 0 < tensor.std() < 0.06:
            tensor.mul_(0.12 / tensor.std())
        elif tensor.numel() == 1 or tensor.std() == 0:
            if name in parameters or not tensor.any():
                tensor.add_(0.2 * torch.randn(tensor.shape).to(tensor.dtype))


def save(model, config, folder):
    """With tiny's tokenizer. config: what the model was made of."""
    model.save_pretrained(folder)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a part of it, which is not loaded
        config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def build(full_name, folder):
    """Saves a random model in float32 with tiny's tokenizer, and returns its number of weights."""
    torch.manual_seed(0)
    config = config_of(full_name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        randomize(model)
    save(model, config, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def plain(folder, rows):
    """(rows, responses) log-probs and entropies, and {parameter: gradient}, by transformers' own
    forward on each response alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logps, entropies = [], []
    for ids, mask in (response for row in rows for response in row):
        ids, mask = torch.tensor(ids), torch.tensor(mask)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        table = logits.log_softmax(-1)
        logps.append((table.gather(1, ids[1:, None])[:, 0] * mask).sum())
        entropies.append((-(table.exp() * table).sum(-1) * mask).sum())
    logps, entropies = (torch.stack(x).view(len(rows), -1) for x in (logps, entropies))
    (logps * padded.mixed_signs(logps.shape)).sum().backward()
    if not (logps.isfinite().all() and entropies.isfinite().all()):
        raise ValueError("its own log-probs are not finite")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logps.detach(), entropies.detach(), gradients


# ---- What this project computes of it ----
def is_padded(model):
    """Whether common.py computes it on padded rows, by transformers' own attention."""
    return getattr(model, "way", "packed") == "padded"


def backward(start):
    """{parameter: gradient or None} of padded.mixed_signs' sum of the log-probs."""
    weights = padded.mixed_signs(start.train.lengths.shape)
    for batch in common.split_batches(start.train, "test", start.args, start.run):
        sums, _ = start.model(batch)
        (sums.view(len(batch.rows), -1) * weights[batch.rows]).sum().backward()
    parameters = start.model.hf_model.named_parameters()
    return {
        name: x.grad if x.grad is None else common.full_tensor(x.grad) for name, x in parameters
    }


def difference(start, expected):
    """In words, where log-probs, entropies or gradients are not the expected ones, or None."""
    for what, found, right in zip(("log-probs", "entropies"), padded.packed(start), expected):
        error = (found - right).abs().max().item()
        if not error <= LIMIT:
            return f"{what} differ by up to {error:.2g} nats"
    found, right = backward(start), expected[2]
    if found.keys() != right.keys():
        return f"parameters differ: {sorted(found.keys() ^ right.keys())[:3]}"
    found, right = ({k: x for k, x in grads.items() if x is not None} for grads in (found, right))
    # What is 0 but for rounding is measured by the other gradients' size.
    scale = torch.stack([gradient.norm() for gradient in right.values()]).max().item()
    errors = {}
    for name in found.keys() | right.keys():
        one, other = found.get(name), right.get(name)
        one, other = (torch.zeros(()) if x is None else x for x in (one, other))
        errors[name] = float((one - other).norm() / (other.norm() + 1e-3 * scale))
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= LIMIT]
    return f"{len(wrong)} gradients differ, that of {wrong[0]}" if wrong else None


def step_and_export(folder, data):
    """In words, how the export after a step differs from the trained model, or None. The files are
    in bfloat16, but for what transformers keeps in float32."""
    narrow = folder.parent / "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    save(model, AutoConfig.from_pretrained(folder), narrow)
    expected = AutoModelForCausalLM.from_pretrained(narrow, dtype="auto").state_dict()
    start = padded.settle(narrow, data, max_length=LONGEST)
    optimizer = torch.optim.AdamW(start.model.parameters(), lr=0.01, weight_decay=0.0)
    backward(start)
    optimizer.step()
    common.export(start.model, common.load_tokenizer(narrow), start.args, start.run)
    options = dict(dtype="auto", output_loading_info=True)
    try:
        again, info = AutoModelForCausalLM.from_pretrained(start.run.output_dir, **options)
    except Exception as error:
        return f"it does not load: {last_line(error)}"
    lacking = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if lacking:
        return f"tensors are missing or unexpected: {lacking[:3]}"
    return compare_states(again.state_dict(), expected, start.model.hf_model)


def compare_states(found, expected, trained):
    """In words, where names, dtypes or values differ, or None. expected: before the step, for the
    names, dtypes and buffers."""
    if found.keys() != expected.keys():
        return f"names differ: {sorted(found.keys() ^ expected.keys())[:3]}"
    values = dict(expected)
    for name, parameter in trained.named_parameters(remove_duplicate=False):
        values[name] = common.full_tensor(parameter.detach())
    for name, tensor in found.items():
        if tensor.dtype != expected[name].dtype:
            return f"{name} is {tensor.dtype}, not {expected[name].dtype}"
        if not torch.equal(tensor, values[name].to(tensor.dtype)):
            return f"{name} has other values"
    return None


# ---- One architecture ----
def last_line(error):
    """The last line of its traceback, and where in the project or in transformers it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    first_line = str(error).strip().partition("\n")[0][:200]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {first_line} ({where})"


def examine(full_name, folder):
    """{"outcome", "reason", "size"} of an architecture, in this process."""
    model, data = folder / "model", tiny.pairs(folder / "pairs.jsonl", 3, seed=1, words=20)
    size = None
    try:
        size = build(full_name, model)
        rows = padded.encoded_rows(model, data)
        expected = plain(model, rows)
    except Exception as error:
        return dict(outcome="unbuildable", reason=last_line(error), size=size)
    (folder / "ready").touch()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            start = padded.settle(model, data, max_length=LONGEST)
            reason = difference(start, expected)
            outcome = "WRONG" if reason else "padded" if is_padded(start.model) else "exact"
            if not reason and (reason := step_and_export(model, data)):
                outcome = "export WRONG"
    except SystemExit as stopped:
        lines = [x for x in errors.getvalue().splitlines() if x.startswith("error: --model ")]
        outcome = "refused" if stopped.code == 2 and len(lines) == 1 else "traceback"
        reason = lines[0] if lines else f"exit code {stopped.code}: {errors.getvalue()[-200:]}"
        reason = reason.replace(f"{folder}/", "")
    except Exception as error:
        outcome, reason = "traceback", last_line(error)
    return dict(outcome=outcome, reason=reason, size=size)


def child(full_name, folder, pipe):
    """The process of an architecture: what it prints is lost, its result goes into the pipe."""
    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # none that another process writes to
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        pipe.send(examine(full_name, folder))


# ---- All of them ----
class Examination:
    """A process that examines an architecture, in a folder of its own."""

    def __init__(self, full_name):
        self.name, self.started = full_name, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="sweep-"))
        # A fork: torch and transformers are imported once.
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=child, args=(full_name, self.folder, sender))
        self.process.start()
        sender.close()  # the process has a copy, whose end `receiver` notices

    def result(self):
        """{"outcome", "reason", "size", "seconds"}, or None for a process that goes on."""
        seconds = time.monotonic() - self.started
        if self.receiver.poll():
            try:
                result = self.receiver.recv()
            except EOFError:
                self.process.join()
                result = self.failed(f"its process ended with {self.process.exitcode}")
        elif seconds > TIME_LIMIT:
            self.process.kill()
            result = self.failed(f"no end within {TIME_LIMIT} s")
        else:
            return None
        self.process.join()
        self.receiver.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return result | dict(seconds=round(seconds, 1))

    def failed(self, reason):
        """A result for a process that has sent none. It touches `ready` once transformers, alone,
        has computed the model."""
        outcome = "traceback" if (self.folder / "ready").exists() else "unbuildable"
        return dict(outcome=outcome, reason=reason, size=None)


def sweep(names, jobs=2, out=None):
    """{full name: what Examination.result gives}; so far as it is known, also as the file `out`."""
    results, running, waiting = {}, [], list(reversed(names))
    with tqdm(total=len(names), desc="sweep", unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Examination(waiting.pop()))
            wait([examination.receiver for examination in running], timeout=1)
            for examination in list(running):
                if result := examination.result():
                    running.remove(examination)
                    results[examination.name] = result
                    if out:
                        out.write_text(json.dumps(results, indent=2) + "\n")
                    bar.set_postfix_str(f"{examination.name}: {result['outcome']}")
                    bar.update()
    return {name: results[name] for name in names}


def print_table(results):
    by_outcome = defaultdict(list)
    for name, result in results.items():
        by_outcome[result["outcome"]].append((name, result["reason"] or ""))
    for outcome in OUTCOMES:
        members = by_outcome[outcome]
        print(f"\n{outcome}: {len(members)}")
        if outcome in ("exact", "padded"):
            print(textwrap.indent(textwrap.fill(", ".join(name for name, _ in members), 98), "  "))
        else:
            print("".join(f"  {name:28} {reason}\n" for name, reason in members), end="")


def chosen(names):
    """The full names that these stand for; without names all."""
    known = everything()
    meant = {full: {full.partition(":")[0], full if ":" in full else f"{full}:"} for full in known}
    for name in names:
        if not any(name in ways for ways in meant.values()):
            raise SystemExit(f"error: {name} is no architecture of this transformers")
    return [full for full, ways in meant.items() if not names or ways & set(names)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = sweep(chosen(args.names), args.jobs, args.out)
    print_table(results)
    raise SystemExit(any(result["outcome"] in FAILURES for result in results.values()))


if __name__ == "__main__":
    main()
