#!/usr/bin/env python3
"""Kills the program at random instants and checks that nothing is lost: python3 oracle/kills.py [TRAIN] [--kills N] [--seed S]

Of N SIGKILLs, 4 of 10 hit training, 2 each preparing, compare and export, at instants drawn from a fixed seed. What a run that
nobody killed leaves is the reference, byte for byte:

* training: every finished checkpoint has its bytes at every instant and none is lost; at the end the folder has the same names, and
  metrics.jsonl and the TensorBoard events the same figures;
* preparing: a folder that has its name holds the whole corpus;
* compare: killed alone (its runs live on for a moment) or with its runs; at the end results.csv and all weights are the same;
* export: the folder is the old export or the new one, or there is none yet;
* afterwards nothing hidden is left in any folder.

Standard library only. TRAIN is target/debug/train where it is left out. Exit status 1 where a check failed; the folder stays then.
"""
import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

CONFIG = """
[run]
steps = 40
threads = 1
[data]
source = "text"
path = "{root}/text"
cache = "{root}/cache"
vocab_size = 300
seq_len = 32
batch_size = 4
[optim]
lr = 3e-3
warmup_steps = 5
[eval]
every = 10
batches = 2
sample_tokens = 4
[checkpoint]
every = 1
keep_last = 3
keep_best = 1
[log]
every = 1
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
ffn = 32
[model.attention]
kind = "dash"
chunk_size = 8
"""

# differ between two runs that compute the same: speed, wall clock
TIMED = {"tokens_per_s"}
# hold times, or what was said on the way
SPOKEN = {"run.log", "run.lock", "tensorboard", "logs", "metrics.jsonl", "provenance.json"}


class Fault(Exception):
    """A check that failed."""


def require(holds, what):
    if not holds:
        raise Fault(what)


def write_corpus(folder, rng):
    """Text of made-up words, so that a vocabulary is learned and documents differ."""
    folder.mkdir()
    words = ["".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(800)]
    for i in range(6):
        lines = (" ".join(rng.choice(words) for _ in range(rng.randint(5, 30))) for _ in range(1500))
        (folder / f"{i}.txt").write_text("\n".join(lines))
    for path in folder.iterdir():
        # what changed just now is not remembered in the index
        os.utime(path, (1e9, 1e9))


def content(path):
    """The bytes of a file, or what is in them beyond the order of keys and what a clock decides."""
    if path.name in ("state.json", "report.json"):
        return json.loads(path.read_text())
    return path.read_bytes()


def tree(folder, without=frozenset()):
    """Relative name to content of all files below a folder."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not without & set(name.parts):
            out[str(name)] = content(path)
    return out


def hidden(folder):
    """Leftovers: what is hidden or set aside, but for the index of prepared corpora."""
    names = (p.relative_to(folder) for p in folder.rglob("*"))
    return [str(n) for n in names if n.parts[0] != ".index" and (n.name.startswith(".") or ".tmp" in n.name)]


def same(found, wanted, where):
    require(found.keys() == wanted.keys(), f"{where}: {sorted(found.keys() ^ wanted.keys())} on one side only")
    for name, value in wanted.items():
        require(found[name] == value, f"{where}/{name}: another content")


def figures(folder):
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def event_steps(folder):
    """Steps of the TensorBoard events in the order in which they are read."""
    steps = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = struct.unpack_from("<Q", data, at)[0]
            record = data[at + 12 : at + 12 + length]
            require(len(record) == length, f"{path}: a cut event")
            at += 16 + length
            if record[9:10] == b"\x10":  # field 2, the step, behind the wall time; the head of a file has none
                step, shift, i = 0, 0, 10
                while True:
                    step |= (record[i] & 127) << shift
                    if record[i] < 128:
                        break
                    i, shift = i + 1, shift + 7
                steps.append(step)
    return steps


class Trial:
    """One command that is killed until it ends, again and again."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name
        self.folder = lab.root / name
        self.kills = self.ends = 0

    def run(self, kills):
        self.begin()
        while self.kills < kills:
            began = time.monotonic()
            limit = self.lab.rng.uniform(0, self.span)
            alone = self.lab.rng.random() < 0.5
            status = self.lab.start(self.command(), limit, alone)
            self.check(status is None)
            if status is None:
                self.kills += 1
                continue
            require(status == 0, f"{self.name}: exit status {status}; {self.lab.said()}")
            self.ends += 1
            # as slow as the machine is now; a start that went on from a checkpoint says less
            self.span = max(0.9 * self.span, time.monotonic() - began)
            self.finished()
            self.begin()
        status = self.lab.start(self.command())
        require(status == 0, f"{self.name}: exit status {status} at the end; {self.lab.said()}")
        self.finished()

    def timed(self, command):
        began = time.monotonic()
        status = self.lab.start(command)
        require(status == 0, f"{self.name}: exit status {status} without a kill; {self.lab.said()}")
        self.span = time.monotonic() - began

    def begin(self):
        pass

    def check(self, killed):
        pass


class Training(Trial):
    def __init__(self, lab):
        super().__init__(lab, "train")
        self.folder.mkdir()
        self.run_folder = self.folder / "tiny"
        lab.train(self.folder / "all", "--set", "checkpoint.keep_last=1000")
        self.all = tree(self.folder / "all/tiny/checkpoints")
        self.timed(self.command())
        self.wanted = tree(self.run_folder, SPOKEN)
        self.figures, self.steps = figures(self.run_folder), event_steps(self.run_folder)
        self.before = set()

    def command(self):
        return ["--config", self.lab.config, "--resume=auto", "--set", f"run.dir={self.folder}"]

    def begin(self):
        shutil.rmtree(self.run_folder, ignore_errors=True)
        self.before = set()

    def check(self, killed):
        place = self.run_folder / "checkpoints"
        found = {p.name: p for p in place.iterdir() if not p.name.startswith(".")} if place.exists() else {}
        for name, path in found.items():
            wanted = {k.split("/", 1)[1]: v for k, v in self.all.items() if k.startswith(name + "/")}
            same(tree(path), wanted, path)
        require(max(found, default="") >= max(self.before, default=""), "the newest checkpoint is lost")
        require(len(found) >= min(len(self.before), 3), f"of {sorted(self.before)} {sorted(found)} are left")
        self.before = set(found)

    def finished(self):
        same(tree(self.run_folder, SPOKEN), self.wanted, self.run_folder)
        require(figures(self.run_folder) == self.figures, "metrics.jsonl has other figures")
        steps = event_steps(self.run_folder)
        require(steps == sorted(steps), "the TensorBoard curve goes back")
        require(Counter(steps) == Counter(self.steps), f"TensorBoard events of other steps: {Counter(steps) - Counter(self.steps)}"
                f" too many, {Counter(self.steps) - Counter(steps)} missing")
        require(not hidden(self.run_folder), f"left over: {hidden(self.run_folder)}")


class Preparing(Trial):
    def __init__(self, lab):
        super().__init__(lab, "prepare")
        self.timed(self.command())
        self.wanted = tree(self.folder)

    def command(self):
        return ["prepare", "--config", self.lab.config, "--set", f"data.cache={self.folder}"]

    def begin(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, killed):
        for path in self.folder.iterdir() if self.folder.exists() else []:
            if not path.name.startswith("."):
                wanted = {k.split("/", 1)[1]: v for k, v in self.wanted.items() if k.startswith(path.name + "/")}
                # stamps say that a shard was checked, which happens after it has its name
                found = tree(path)
                same({k: v for k, v in found.items() if not k.endswith(".verified")},
                     {k: v for k, v in wanted.items() if not k.endswith(".verified")}, path)

    def finished(self):
        def unstamped(files):
            return {k: v for k, v in files.items() if not k.endswith(".verified")}
        same(unstamped(tree(self.folder)), unstamped(self.wanted), self.folder)
        require(not hidden(self.folder), f"left over: {hidden(self.folder)}")


class Comparing(Trial):
    def __init__(self, lab):
        super().__init__(lab, "compare")
        self.timed(self.command())
        self.wanted, self.results = tree(self.folder / "runs", SPOKEN), (self.folder / "results.csv").read_bytes()

    def command(self):
        return ["compare", "--config", self.lab.config, "--arms", "dense,dash", "--seeds", "2", "--out", self.folder,
                "--set", "run.steps=12", "--set", "log.tensorboard=false"]

    def begin(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self):
        same(tree(self.folder / "runs", SPOKEN), self.wanted, self.folder / "runs")
        require((self.folder / "results.csv").read_bytes() == self.results, "results.csv has other figures")
        require(not hidden(self.folder), f"left over: {hidden(self.folder)}")


class Exporting(Trial):
    def __init__(self, lab):
        super().__init__(lab, "export")
        self.folder.mkdir()
        self.sources = sorted((lab.root / "train/all/tiny/checkpoints").iterdir())[-2:]
        self.wanted = []
        for i, source in enumerate(self.sources):
            self.timed(["export", "--model", source, "--out", lab.root / f"exported-{i}"])
            self.wanted.append(tree(lab.root / f"exported-{i}"))
        require(self.wanted[0] != self.wanted[1], "two exports are the same")
        self.now = 0
        self.stood = False

    def command(self):
        return ["export", "--model", self.sources[self.now], "--out", self.folder / "hf"]

    def begin(self):
        # the next replaces this one; from time to time there is none
        self.now = 1 - self.now
        if self.lab.rng.random() < 0.2:
            shutil.rmtree(self.folder / "hf", ignore_errors=True)
            self.stood = False

    def check(self, killed):
        place = self.folder / "hf"
        require(place.exists() or not self.stood, "the older export is lost")
        if place.exists():
            self.stood = True
            require(tree(place) in self.wanted, f"{place} is neither the old export nor the new one")

    def finished(self):
        require(tree(self.folder / "hf") == self.wanted[self.now], "not the export that was asked for")
        require(not hidden(self.folder), f"left over: {hidden(self.folder)}")


class Lab:
    """A folder with a corpus and a configuration, and the program to start."""

    def __init__(self, program, root, seed):
        self.program, self.root, self.rng = program.resolve(), root, random.Random(seed)
        write_corpus(root / "text", self.rng)
        self.config, self.log = root / "tiny.toml", root / "last.log"
        self.config.write_text(CONFIG.format(root=root))

    def start(self, arguments, limit=None, alone=False):
        """Its exit status, or None if it was killed after `limit` seconds: with what it started, or alone."""
        with open(self.log, "wb") as log:
            child = subprocess.Popen([self.program, *map(str, arguments)], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                     start_new_session=True, cwd=self.root)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            if alone:
                child.kill()
            else:
                os.killpg(child.pid, signal.SIGKILL)
            # it may have ended in this moment
            return None if child.wait() == -signal.SIGKILL else child.returncode

    def train(self, folder, *more):
        status = self.start(["--config", self.config, "--set", f"run.dir={folder}", *more])
        require(status == 0, f"training: exit status {status}; {self.said()}")

    def said(self):
        return self.log.read_text(errors="replace")[-400:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="?", type=Path, default=Path("target/debug/train"))
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["train", "prepare", "compare", "export"], help="one command alone gets all kills")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    lab = Lab(arguments.train, root, arguments.seed)
    shares = [(Training, 4), (Preparing, 2), (Comparing, 2), (Exporting, 2)]
    try:
        # training first: the others start from its corpus and its checkpoints
        for kind, share in shares:
            began, trial = time.monotonic(), kind(lab)
            if arguments.only in (None, trial.name):
                trial.run(arguments.kills * share // 10 if arguments.only is None else arguments.kills)
            print(f"{trial.name}: {trial.kills} kills, {trial.ends} ends before a kill, {time.monotonic() - began:.0f} s", flush=True)
    except Fault as fault:
        print(f"FAULT: {fault}\n{root} has what was found")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
