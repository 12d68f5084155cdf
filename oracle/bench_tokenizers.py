"""Times Python's `tokenizers` on what `train prepare` does: python bench_tokenizers.py corpus.jsonl [--vocab 4096]

Reads the documents, learns a byte-level BPE vocabulary from the same even sample of 16 MiB, encodes every document, ends it
with the end-of-text token and writes the ids as 16-bit numbers. Threads: RAYON_NUM_THREADS, as for `train prepare`.
"""
import argparse
import json
import time
from array import array
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TRAINING_BYTES = 16 << 20
END = "<|endoftext|>"

p = argparse.ArgumentParser()
p.add_argument("corpus")
p.add_argument("--vocab", type=int, default=4096)
p.add_argument("--out", default="/tmp/tokens.bin")
a = p.parse_args()

start = time.perf_counter()
with open(a.corpus, encoding="utf-8") as f:
    texts = [json.loads(line)["text"] for line in f if line.strip()]
total = sum(len(t.encode()) for t in texts)
every = max(1, -(-total // TRAINING_BYTES))
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=a.vocab, show_progress=False, special_tokens=[END],
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
tokenizer.train_from_iterator(texts[::every], trainer)
tokenizer.save(str(Path(a.out).with_suffix(".json")))
learned = time.perf_counter()
end, count = tokenizer.token_to_id(END), 0
with open(a.out, "wb") as out:
    for i in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[i:i + 256], add_special_tokens=False):
            ids = array("H", encoding.ids)
            ids.append(end)
            count += len(ids)
            out.write(ids.tobytes())
done = time.perf_counter()
print(json.dumps({"mb": total / 1e6, "tokens": count, "learn_s": learned - start, "encode_s": done - learned,
                  "total_s": done - start}))
