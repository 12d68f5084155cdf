//! Round trips, and every kind of damage.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use super::*;

fn written(vocab: usize, counted: bool) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.shard");
    let mut w = ShardWriter::create(&path, vocab, 77, counted).unwrap();
    w.begin();
    w.append(&[1, 2, 3], &[4, 0, 70_000]).unwrap();
    w.begin();
    w.append(&[vocab as u32 - 1], &[5]).unwrap();
    w.append(&[0], &[6]).unwrap();
    w.finish().unwrap();
    (dir, path)
}

/// Changes a shard and makes both checksums right again: what a file from elsewhere may hold.
fn forge(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    let content = xxh3_64(&bytes[HEADER..]);
    bytes[56..64].copy_from_slice(&content.to_le_bytes());
    let header = xxh3_64(&bytes[..64]);
    bytes[64..72].copy_from_slice(&header.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn error(path: &Path) -> String {
    Shard::open(path).err().expect("the shard is refused").to_string()
}

#[test]
fn round_trip_in_both_widths() {
    for vocab in [300, 65_536, 65_537, 200_000] {
        for counted in [false, true] {
            let (_dir, path) = written(vocab, counted);
            let s = Shard::open(&path).unwrap();
            let mut out = Vec::new();
            s.read(1, 4, &mut out);
            assert_eq!((out, s.len(), s.vocab(), s.tokenizer()), (vec![2, 3, vocab as u32 - 1, 0], 5, vocab, 77));
            assert_eq!(s.document_starts(), [0, 3]);
            assert_eq!(s.text_bytes(1, 3), counted.then_some(70_005));
            assert_eq!(s.text_bytes(5, 0), counted.then_some(0));
        }
    }
}

#[test]
fn a_shard_of_version_1_is_read() {
    let (_dir, path) = written(300, false);
    forge(&path, |x| x[8] = 1);
    let s = Shard::open(&path).unwrap();
    assert_eq!((s.len(), s.text_bytes(0, 5)), (5, None));
    forge(&path, |x| x[36] = 1);
    assert!(error(&path).contains("is version 1"));
    forge(&path, |x| (x[8], x[36]) = (3, 0));
    assert!(error(&path).contains("is version 3"));
}

#[test]
fn every_flipped_bit_and_every_truncation_is_found() {
    let (_dir, path) = written(300, true);
    let good = fs::read(&path).unwrap();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 1 << (byte % 8);
        fs::write(&path, &bad).unwrap();
        assert!(Shard::open(&path).is_err(), "byte {byte}");
    }
    for len in 0..good.len() {
        fs::write(&path, &good[..len]).unwrap();
        assert!(Shard::open(&path).is_err(), "{len} bytes");
    }
    fs::write(&path, &good).unwrap();
    assert!(Shard::open(&path).is_ok());
}

#[test]
fn sizes_that_wrap_are_refused() {
    let (_dir, path) = written(300, false);
    let put = |at: usize, value: u64| move |x: &mut Vec<u8>| x[at..at + 8].copy_from_slice(&value.to_le_bytes());
    // 2^63 tokens of two bytes, 2^61 documents of eight and 2^62 text counts of four are no bytes at all if they wrap
    for (at, value) in [(16, 1 << 63), (16, (1 << 63) + 5), (24, 1 << 61), (24, (1 << 61) + 2), (16, u64::MAX)] {
        let (_dir, path) = written(300, false);
        forge(&path, put(at, value));
        assert!(error(&path).contains("its header announces more than a file can have"), "{at} {value}");
    }
    forge(&path, |x| {
        x[16..24].copy_from_slice(&(1u64 << 62).to_le_bytes());
        x[36] = 1;
    });
    assert!(error(&path).contains("more than a file can have"));
}

#[test]
fn a_token_above_the_vocabulary_is_told_by_reader_and_writer() {
    let (dir, path) = written(300, false);
    forge(&path, |x| x[HEADER + 2..HEADER + 4].copy_from_slice(&300u16.to_le_bytes()));
    assert!(error(&path).contains("token 1 is 300, the vocabulary size is 300"));
    let mut w = ShardWriter::create(&dir.path().join("b.shard"), 300, 0, false).unwrap();
    assert!(w.append(&[1, 65_536 + 65], &[]).unwrap_err().to_string().contains("id 65601 is not below"));
    assert!(ShardWriter::create(&path, 1 << 33, 0, false).is_err());
}

#[test]
fn documents_out_of_order_are_told() {
    let (_dir, path) = written(300, false);
    let at = HEADER + 16;
    forge(&path, |x| x[at..at + 8].copy_from_slice(&9u64.to_le_bytes()));
    assert!(error(&path).contains("not in order"));
}

#[test]
fn a_stamp_saves_the_second_check_until_the_file_changes() {
    let (_dir, path) = written(300, false);
    let stamp = path.with_extension("shard.verified");
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    let age = |to| File::options().write(true).open(&path).unwrap().set_modified(to).unwrap();
    Shard::open(&path).unwrap();
    assert!(!stamp.exists(), "a file changed just now may change again within one tick");
    age(long_ago);
    Shard::open(&path).unwrap();
    assert!(stamp.exists());
    // a bit that flips without another time is not looked for again: this is what the stamp saves
    let mut bytes = fs::read(&path).unwrap();
    bytes[HEADER] ^= 1;
    fs::write(&path, &bytes).unwrap();
    age(long_ago);
    assert!(Shard::open(&path).is_ok());
    age(long_ago + Duration::from_nanos(1_000_000));
    assert!(error(&path).contains("a bit was flipped"));
    fs::remove_file(&stamp).unwrap();
    age(long_ago);
    assert!(error(&path).contains("a bit was flipped"));
}

/// Bytes of a mapped file that are in this process's memory.
#[cfg(target_os = "linux")]
fn resident(path: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let own = maps.split_once(path.to_str().unwrap()).expect("the file is mapped").1;
    let line = own.lines().find(|l| l.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[test]
#[cfg(target_os = "linux")]
fn a_pass_over_a_mapped_shard_leaves_it_out_of_memory() {
    let (dir, piece) = (tempfile::tempdir().unwrap(), 1 << 20);
    let path = dir.path().join("large.shard");
    let mut w = ShardWriter::create(&path, 1000, 77, false).unwrap();
    w.begin();
    let ids: Vec<u32> = (0..piece).map(|i| i % 1000).collect();
    for _ in 0..33 {
        w.append(&ids, &[]).unwrap();
    }
    w.append(&[999, 1], &[]).unwrap();
    w.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    assert!(shard.bytes() > MAP_ABOVE as usize);
    assert!(resident(&path) < shard.bytes() / 8, "{} bytes after the check", resident(&path));
    for overlap in [0, 1, 5] {
        let mut seen = Vec::new();
        shard.pieces(overlap, |ids| seen.push((ids.len(), ids[0], ids[ids.len() - 1])));
        let full = (piece as usize + overlap, 0, [575, 0, 4][overlap.min(2)]);
        assert_eq!(seen[..32], [full; 32]);
        // the tokens that the last full piece takes of the next one are two at most
        let last = [(piece as usize, 0, 575), (piece as usize + 1, 0, 999), (piece as usize + 2, 0, 1)][overlap.min(2)];
        assert_eq!(seen[32..], [last, (2, 999, 1)]);
        assert!(resident(&path) < shard.bytes() / 8, "{} bytes after a pass", resident(&path));
    }
}

#[test]
fn a_wrong_token_behind_the_first_piece_is_told_by_its_place() {
    for vocab in [300u32, 70_000] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.shard");
        let mut w = ShardWriter::create(&path, vocab as usize, 77, true).unwrap();
        w.begin();
        let n = PIECE + 3;
        w.append(&vec![1; n], &vec![1; n]).unwrap();
        w.finish().unwrap();
        let width = if vocab == 300 { 2 } else { 4 };
        let at = HEADER + (n - 1) * width;
        forge(&path, |x| x[at..at + width].copy_from_slice(&vocab.to_le_bytes()[..width]));
        let told = error(&path);
        assert!(told.contains(&format!("token {} is {vocab}, the vocabulary size is {vocab}", n - 1)), "{told}");
    }
}
