"""Makes the corpora under crates/data/tests/fixtures, which the readers are tested on, with the libraries that people make theirs with.

    pip install zstandard numpy
    python oracle/make_corpora.py crates/data/tests/fixtures

Damaged twins of these files are made by the tests themselves. gzip files of another version of zlib may have other bytes and the same content.
"""

import gzip
import json
import sys
from pathlib import Path

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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    compressed(folder)
