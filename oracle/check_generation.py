"""Uses an exported folder as people use it: python check_generation.py EXPORTED_DIR...

For each folder: AutoConfig, AutoModelForCausalLM, AutoTokenizer and pipeline load it; generate(**tokenizer(...)) gives the same tokens with
and without a cache, greedily, sampled and with beams; a batch of prompts of unequal length, padded on either side, gives the tokens
and the logits of each prompt alone; a loss ignores padding; save_pretrained gives a folder that loads to the same logits; stock code
refuses what it would compute otherwise. Needs torch, safetensors and transformers.
"""
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPTS = ["The", "DashLab trains small language models from scratch in Rust", "attention to the", "a", "cargo run -p train -- --config"]


def close(got, want, what, bound=1e-4):
    """Against the largest logit: f32 sums in another order, and an entmax threshold found by bisection."""
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < bound, f"{what}: {error:.1e} of the largest logit"
    return error


# Above 60 lines: what a user does with one folder, in order; most steps read the model, the tokens and the batch of those before.
@torch.no_grad()
def check(folder):
    options = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **options)
    kind = config.dashlab["attention"]["kind"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    parity = load_file(folder / "parity.safetensors")
    worst = close(model(parity["ids"]).logits, parity["logits"], "parity")

    # the same tokens with and without a cache, past several chunk borders
    new = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    alone = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}, set(inputs)
        with_cache = model.generate(**inputs, **new, do_sample=False)
        without = model.generate(**inputs, **new, do_sample=False, use_cache=False)
        assert with_cache.tolist() == without.tolist(), (prompt, with_cache, without)
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            drawn.append(model.generate(**inputs, **new, do_sample=True, top_p=0.9, use_cache=use_cache).tolist())
        assert drawn[0] == drawn[1], prompt
        alone.append(with_cache[0, inputs["input_ids"].shape[1] :])
    beams = [model.generate(**inputs, **new, do_sample=False, num_beams=3, use_cache=use).tolist() for use in (True, False)]
    assert beams[0] == beams[1], beams

    # a batch: each prompt's tokens and logits are those of the prompt alone, on whichever side the padding stands
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        together = model(**batch).logits
        for i, prompt in enumerate(PROMPTS):
            own = tokenizer(prompt, return_tensors="pt")
            worst = max(worst, close(together[i][batch["attention_mask"][i].bool()], model(**own).logits[0], f"{side} {prompt}"))
        if side == "left" or kind != "dense":
            tokens = model.generate(**batch, **new, do_sample=False)[:, batch["input_ids"].shape[1] :]
            for got, want, prompt in zip(tokens, alone, PROMPTS):
                assert got.tolist() == want.tolist(), (side, prompt, got, want)
    tokenizer.padding_side = "left"

    # passes of several tokens after others; the cache has another name in other versions
    ids = parity["ids"]
    out, cache, rows = None, None, []
    for part in ids.split([3, 1, 9, 2, ids.shape[1] - 15], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out[1]
        rows.append(out.logits)
    worst = max(worst, close(torch.cat(rows, 1), parity["logits"], "in passes"))

    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.isfinite(model(**batch, labels=labels).loss)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1

    generator = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, **options)
    texts = generator(PROMPTS, max_new_tokens=8, do_sample=False, batch_size=len(PROMPTS))
    assert all(text[0]["generated_text"].startswith(prompt) for text, prompt in zip(texts, PROMPTS)), texts

    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **options).eval()
        assert torch.equal(again(ids).logits, model(ids).logits), "save_pretrained and back"
        assert AutoTokenizer.from_pretrained(saved, **options)(PROMPTS)["input_ids"] == tokenizer(PROMPTS)["input_ids"]

    stock = json.loads((folder / "config.json").read_text())
    if not (folder / "modeling_dashlab.py").exists():
        assert kind == "dense" and stock["model_type"] in ("llama", "qwen3"), stock["model_type"]
    else:
        assert stock["model_type"] == "dashlab"
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            pass
        else:
            raise AssertionError("stock code computes another function without a word")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    close(half(ids).logits.float(), parity["logits"], "bfloat16", 0.2)
    print(f"{folder}: {kind}, largest difference {worst:.1e} of the largest logit")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        check(Path(name))
