"""Makes the corpora under crates/data/tests/fixtures, which the readers are tested on, with the libraries that people make theirs with.

    pip install zstandard numpy torch megatron-core pyarrow
    python oracle/make_corpora.py crates/data/tests/fixtures

Damaged twins of these files are made by the tests themselves. gzip files of another version of zlib may have other bytes and the same content.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import zstandard


def document(i):
    """Text of document `i`, which the tests write once more."""
    return f"document {i}: {i * i} sheep, \u00e4 \u6f22 \U0001f980\nand a second line\n"


def lines(documents, field="text"):
    """JSON lines as Dolma has them: the text among other fields, characters above ASCII as they are or escaped."""
    rows = []
    for i in documents:
        row = {"id": str(i), field: document(i), "source": "made", "metadata": {"text": None, "n": [i]}}
        rows.append(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n")
    return "".join(rows).encode()


def compressed(out):
    """gzip of three members and zstd of three frames, cut in the middle of lines; a skippable frame; a text."""
    data = lines(range(60))
    cuts = [data[:1000], data[1000:5001], data[5001:]]
    members = [gzip.compress(part, mtime=0) for part in cuts]
    (out / "dolma.json.gz").write_bytes(b"".join(members))
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    first = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(cuts[0])
    stream = zstandard.ZstdCompressor(level=19, write_checksum=True).compressobj()
    second = stream.compress(cuts[1]) + stream.flush()
    third = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(cuts[2])
    (out / "lines.jsonl.zst").write_bytes(first + skippable + second + third)
    (out / "page.txt.gz").write_bytes(gzip.compress("".join(document(i) for i in range(9)).encode(), mtime=0))


def ids(i):
    """Token ids of document `i`, which the tests write once more."""
    return [(31 * i + 7 * j) % 50000 for j in range(5 + i % 9)]


def llm_c(path, magic, version, dtype, documents, end):
    """A file as llm.c's `dev/data/data_common.py` writes it: 256 numbers of 32 bits, then the tokens."""
    tokens = [t for i in documents for t in [end] + ids(i)]
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=dtype).tobytes())


def nano_gpt(path, documents):
    """A file as nanoGPT's `data/openwebtext/prepare.py` writes it: 16 bits a token, each document before its end."""
    tokens = [t for i in documents for t in ids(i) + [50256]]
    path.parent.mkdir(exist_ok=True)
    array = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(tokens),))
    array[:] = tokens
    array.flush()


def megatron(prefix, dtype, documents):
    """Files of Megatron's own builder: documents of two sequences each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for i in documents:
        builder.add_document(np.array(ids(i) + [50256]), [3, len(ids(i)) - 2])
    builder.finalize(f"{prefix}.idx")


def parquet(out):
    """Rows as FineWeb has them (snappy, a dictionary) and as nanochat has them (zstd, one column, no dictionary, texts never null)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [None if i % 20 == 7 else "" if i % 20 == 9 else document(i) for i in range(60)]
    meta = pa.array([{"lang": "en", "note": t} for t in texts])
    fine = pa.table({"text": texts, "id": [str(i) for i in range(60)], "token_count": list(range(60)), "meta": meta, "tags": [["a", "b"]] * 60})
    (out / "parquet").mkdir(exist_ok=True)
    pq.write_table(fine, out / "parquet/fineweb.parquet", compression="snappy", row_group_size=25)
    schema = pa.schema([pa.field("text", pa.string(), nullable=False)])
    plain = pa.table({"text": [document(i) for i in range(60)]}, schema=schema)
    options = dict(compression="zstd", use_dictionary=False, write_statistics=False, row_group_size=16)
    pq.write_table(plain, out / "parquet/shard.parquet", **options)
    odd = out / "parquet-odd"
    odd.mkdir(exist_ok=True)
    for codec in ["gzip", "brotli"]:
        pq.write_table(plain, odd / f"{codec}.parquet", compression=codec, row_group_size=20)
    two = pa.Table.from_arrays([plain["text"], plain["text"]], names=["text", "text"])
    pq.write_table(two, odd / "two.parquet", compression="zstd")
    raw = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
    pq.write_table(plain, odd / "checksum.parquet", **raw, write_page_checksum=True, row_group_size=20)


def tokens(out):
    """Files of token ids."""
    llm_c(out / "llmc/fineweb_val_000000.bin", 20240520, 1, np.uint16, range(6), 50256)
    llm_c(out / "llmc/fineweb_train_000001.bin", 20240520, 1, np.uint16, range(6, 30), 50256)
    llm_c(out / "llama3/edu_val_000000.bin", 20240801, 7, np.uint32, range(6), 128000)
    llm_c(out / "llama3/edu_train_000001.bin", 20240801, 7, np.uint32, range(6, 30), 128000)
    nano_gpt(out / "nanogpt/train.bin", range(6, 30))
    nano_gpt(out / "nanogpt/val.bin", range(6))
    megatron(out / "megatron/pile_text_document", np.uint16, range(30))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    compressed(folder)
    parquet(folder)
    tokens(folder)
