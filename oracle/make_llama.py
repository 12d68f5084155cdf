"""Makes the tiny Llamas and Qwens under crates/model/tests/fixtures with transformers, and the loss that it gives them on fixed ids.

    pip install torch transformers
    python oracle/make_llama.py crates/model/tests/fixtures
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config


def ids():
    """Two sequences of 48 ids below 96, which the test writes once more."""
    return torch.tensor([[(7 * i + 13 * j * j + 5 * i * j) % 96 for j in range(48)] for i in range(2)])


def make(folder, seed, dtype, tied, shard, rope=None, of=LlamaConfig, **more):
    """Random weights, larger than those of a fresh model, so that attention is far from even."""
    torch.manual_seed(seed)
    config = of(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied, initializer_range=0.2,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 5000.0}, **more,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    # once more from the files, in f32, as a reader has it
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        loss = read(ids(), labels=ids()).loss.item()
    (folder / "loss.json").write_text(json.dumps({"loss": loss}) + "\n")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    make(out / "llama-f32-tied", 1, torch.float32, True, "1GB")
    make(out / "llama-bf16-sharded", 2, torch.bfloat16, False, "20KB")
    make(out / "llama-f16", 3, torch.float16, False, "1GB")
    # frequencies of all three bands: 16 original positions hold 2.5 waves of the fastest pair, 0.5 of the next, 0.1 and less of the others
    make(out / "llama3-f32", 4, torch.float32, False, "1GB", {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0, "original_max_position_embeddings": 16})
    make(out / "qwen2-bf16", 5, torch.bfloat16, True, "1GB", of=Qwen2Config, sliding_window=32, use_sliding_window=False)
    # heads wider than hidden / heads, as in the published ones
    make(out / "qwen3-f32", 6, torch.float32, False, "1GB", of=Qwen3Config, head_dim=12)
