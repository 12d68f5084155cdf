"""Measures 1, 2, 4, 8 GPUs of one host: tokens a second, equal bytes, and the share that exchange and sum take.

python3 docs/scaling/measure.py --train target/debug/train --worlds 1,2,4,8 --out scaling

Two models of 100.7 M parameters: dense at 2048 tokens, and dash at 32768 with a gamma
that attends few chunks (how many is measured: 7 % of random text, 2 % of the recall task after 20 updates). Twenty updates each; with W
processes an update has `micro` x W micro-batches, so that each process does the same work. The bytes are compared at one size of update, with as many
micro-batches as the most processes. Writes scaling.csv, scaling.svg and a table for docs/SCALING.md.
"""

import argparse
import csv
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys

CONFIG = """
[run]
steps = 20
device = "cuda"
[data]
vocab_size = 32768
seq_len = {seq_len}
batch_size = {batch_size}
[optim]
lr = 1e-3
warmup_steps = 5
[eval]
every = 100000
batches = 1
[checkpoint]
every = 100000
keep_last = 1
[log]
every = 100000
[model]
layers = 12
width = 768
heads = 12
kv_heads = 4
ffn = 2048
[model.attention]
{attention}
[task]
kind = "recall"
eval_sequences = 2
"""
MODELS = {
    "dense": dict(seq_len=2048, batch_size=32, attention='kind = "dense"'),
    "dash": dict(seq_len=32768, batch_size=2, attention='kind = "dash"\nchunk_size = 64\ngamma = 48.0'),
}


def train(a, folder, kind, world, micro, name):
    """Tokens a second of updates 2 to 20, and a hash of the last checkpoint's files."""
    config = folder / f"{kind}.toml"
    config.write_text(CONFIG.format(**MODELS[kind]))
    command = [a.train, "--config", str(config), "--set", f"data.grad_accum={micro}", "--set", f"run.name={name}"]
    command += ["--set", f"run.dir={folder / 'runs'}"] + (["--processes", str(world)] if world > 1 else [])
    done = subprocess.run(command, capture_output=True, text=True, timeout=a.timeout)
    (folder / f"{name}.txt").write_text(done.stderr)
    if done.returncode != 0:
        sys.exit(f"{name}: status {done.returncode}\n{done.stderr[-2000:]}")
    line = next(l for l in done.stderr.splitlines() if l.startswith("step 20/20"))
    share = re.search(r"attends (\d+) % of tokens", line)
    digest = hashlib.sha256()
    for file in sorted((folder / "runs" / name / "checkpoints").glob("*/*.safetensors")):
        digest.update(file.read_bytes())
    shutil.rmtree(folder / "runs" / name)
    return float(re.search(r"([\d.]+) tok/s", line)[1]), digest.hexdigest()[:16], share and share[1]


def picture(path, rows):
    """Times as fast as one process, against processes; the diagonal is what could be at best."""
    most = max(r["processes"] for r in rows)
    at = lambda x, y: (60 + 400 * x / most, 340 - 300 * y / most)
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 400" font-family="sans-serif" font-size="13">']
    lines.append('<rect width="520" height="400" fill="white"/>')
    (x0, y0), (x1, y1) = at(0, 0), at(most, most)
    lines.append(f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#444"/>')
    lines.append(f'<path d="M{x0} {y0}L{x1} {y1}" stroke="#bbb" stroke-dasharray="4 4"/>')
    for n in sorted({r["processes"] for r in rows}):
        x, y = at(n, n)
        lines.append(f'<text x="{x:.0f}" y="{y0 + 18}" text-anchor="middle">{n}</text>')
        lines.append(f'<text x="{x0 - 8}" y="{y + 4:.0f}" text-anchor="end">{n}</text>')
    for kind, colour, shape in (("dense", "#1f4e8c", "circle"), ("dash", "#b5541c", "square")):
        points = [(at(r["processes"], r["times"]), r) for r in rows if r["kind"] == kind]
        path_of = "L".join(f"{x:.1f} {y:.1f}" for (x, y), _ in points)
        lines.append(f'<path d="M{path_of}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), _ in points:
            mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"' if shape == "circle" else f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
            lines.append(f'{mark} fill="{colour}"/>')
        if points:
            low = 290 if kind == "dense" else 312
            lines.append(f'<text x="{x1:.0f}" y="{low}" text-anchor="end" fill="{colour}">{kind}: {points[-1][1]["times"]:.2f} times</text>')
    lines.append(f'<text x="{(x0 + x1) / 2:.0f}" y="{y0 + 40}" text-anchor="middle">processes, one a GPU</text>')
    lines.append('<text x="60" y="24">tokens a second, times those of one process (dashed: processes)</text></svg>')
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="target/debug/train")
    parser.add_argument("--worlds", default="1,2,4,8")
    parser.add_argument("--micro", type=int, default=1, help="micro-batches a process")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scaling"))
    parser.add_argument("--timeout", type=float, default=600)
    a = parser.parse_args()
    a.train = str(pathlib.Path(a.train).resolve())
    worlds = [int(w) for w in a.worlds.split(",")]
    a.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in MODELS:
        bytes_of = {}
        for world in worlds:
            speed, _, share = train(a, a.out, kind, world, a.micro * world, f"{kind}-{world}")
            _, bytes_of[world], _ = train(a, a.out, kind, world, max(worlds), f"{kind}-{world}-bytes")
            one = next((r for r in rows if r["kind"] == kind and r["processes"] == 1), None)
            times = speed / one["tokens_per_s"] if one else 1.0
            row = dict(kind=kind, processes=world, micro_batches=a.micro * world, tokens_per_s=round(speed), times=round(times, 3))
            row["share"] = round(1 - times / world, 4)
            row |= dict(attended=share or 100, bytes=bytes_of[world], equal=bytes_of[world] == bytes_of[worlds[0]])
            rows.append(row)
            print(row, flush=True)
    with open(a.out / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    picture(a.out / "scaling.svg", rows)
    print("\n| | processes | micro-batches | tokens/s | times | exchange, sum and all else that one process has not | equal bytes |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        equal = "yes" if r["equal"] else "NO"
        print(f"| {r['kind']} | {r['processes']} | {r['micro_batches']} | {r['tokens_per_s']:,} | {r['times']:.2f} | {100 * r['share']:.1f} % | {equal} |")
    if not all(r["equal"] for r in rows):
        sys.exit("bytes differ")


main()
