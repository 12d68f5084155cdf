"""Checks what a run leaves behind with the Python world's own readers: python check_export.py EXPORTED_DIR [RUN_DIR]

EXPORTED_DIR (from `train export`): transformers loads the model and tokenizer and computes the logits of parity.safetensors, to
1e-4 of the largest: a dense model as a stock Llama or Qwen3, every other with the folder's own modeling_dashlab.py. DashAttention and
top-k are compared with oracle.py in float64 besides.
RUN_DIR (a run folder): TensorBoard reads every event file and finds the figures of metrics.jsonl.
Needs torch, safetensors, transformers; for RUN_DIR tensorboard, without which it says that the event files were not read.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import oracle as O


@torch.no_grad()
def check_logits(folder):
    config = json.loads((folder / "config.json").read_text())
    attention = config["dashlab"]["attention"]
    parity = load_file(folder / "parity.safetensors")
    ids, want = parity["ids"], parity["logits"].double()
    from transformers import AutoModelForCausalLM

    own = config["model_type"] == "dashlab"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own)
    by = "transformers with modeling_dashlab.py" if own else f"transformers as {config['model_type']}"
    compare(model(ids).logits.double(), want, by)
    if attention["kind"] in ("dash", "topk"):
        params = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        g, d = config["num_key_value_heads"], config["head_dim"]

        def attend(layer, _, q, k, v):
            name = f"model.layers.{layer}.self_attn."
            if attention.get("per_head"):
                return O.moba(q, k, v, attention["chunk_size"], attention["top"])
            if attention["kind"] == "topk":
                mean = params.get(name + "indexer_q", torch.zeros(g * d, dtype=torch.float64)).reshape(g, d)
                return O.topk(q, k, v, mean, attention["chunk_size"], attention["top"], attention["gamma"])
            knobs = {n: attention[n] for n in ("alpha", "gamma", "sigma", "center", "forward_bias") if n in attention}
            qbar = params[name + "indexer_q"].reshape(g, d)
            return O.dash(q, k, v, qbar, attention["chunk_size"], diagonal=params.get(name + "diagonal"), **knobs)

        compare(O.llama(params, config, ids, attend), want, "the float64 oracle")
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        text = tokenizer.decode(ids[0])
        assert tokenizer(text)["input_ids"] == ids[0].tolist(), "the tokenizer does not give back its own ids"
        assert tokenizer.eos_token_id == config["eos_token_id"]


def compare(got, want, by):
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"logits of {tuple(want.shape)} by {by}: largest difference {error:.1e} of the largest logit")
    assert error < 1e-4, error


def check_events(run):
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        print("the event files were not read: that needs the package tensorboard")
        return
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for split in ("train", "val"):
        want = [(x["step"], x["loss"]) for x in lines if x["split"] == split]
        got = {e.step: e.value for e in events.Scalars(f"loss/{split}")}
        assert all(abs(got[step] - loss) < 1e-5 * abs(loss) for step, loss in want), split
        print(f"TensorBoard reads {len(got)} {split} losses, equal to metrics.jsonl")
    tags = events.Tags()
    print(f"{len(tags['scalars'])} scalar tags, {len(tags['histograms'])} histogram tags")


if __name__ == "__main__":
    check_logits(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        check_events(Path(sys.argv[2]))
