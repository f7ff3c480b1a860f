"""Tiny models with random weights, one for each kind of KV cache: their answers mean nothing, their pages are real.

Written by transformers from a configuration and a seed, so that every machine has the same bytes. Their tokenizer is
the demo model's. Serve them with FLAGS: in float32 no two of their tokens are so near that the order of a sum decides.

    python -m benchmarks.tiny KIND FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.model import MODEL_DIR, build

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(128 << 20))
WINDOW = 200  # of the hybrid's layers, in tokens: neither a block nor whole blocks
_COMMON: Mapping[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 8192,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
# Two layers of a window to each layer of full attention: vLLM makes three groups of two layers, over the same memory.
_HYBRID: Mapping[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
# vLLM's kernel for CPUs knows one size of latent: 512 + 64.
_LATENT: Mapping[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32, "head_dim": 64, "first_k_dense_replace": 3,
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
}  # fmt: skip
# Heads of K and V for two ranks.
_PLAIN: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
RANK = 8
_TARGETS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}  # the hybrid's, and how wide they are
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {**_COMMON, **_PLAIN}, "hybrid": {**_COMMON, **_HYBRID}, "latent": {**_COMMON, **_LATENT},
}  # fmt: skip


def write(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes the model of this kind into `folder`. Raises ModelUnavailable without the demo model's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build(MODEL_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**KINDS[kind], "dtype": "float32"}, indent=2) + "\n")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(folder: Path, *, seed: int) -> Path:
    """A LoRA adapter for the hybrid, which changes keys and values of every layer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": list(_TARGETS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config) + "\n")
    generator = torch.Generator().manual_seed(seed)
    hidden, weights = _COMMON["hidden_size"], {}
    for layer in range(_HYBRID["num_hidden_layers"]):
        for target, width in _TARGETS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) / 4
            weights[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) / 4
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench tiny", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    print(write(options.kind, options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
