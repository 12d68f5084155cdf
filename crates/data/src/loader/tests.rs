use super::*;
use crate::shard::ShardWriter;

fn shards(lengths: &[usize]) -> (tempfile::TempDir, Vec<Arc<Shard>>) {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 0;
    let shards = lengths.iter().enumerate().map(|(i, &n)| {
        let path = dir.path().join(format!("{i}.shard"));
        let mut w = ShardWriter::create(&path, 10_000, 0, false).unwrap();
        w.begin();
        w.append(&(next..next + n as u32).collect::<Vec<_>>(), &[]).unwrap();
        w.finish().unwrap();
        next += n as u32;
        Arc::new(Shard::open(&path).unwrap())
    });
    let shards = shards.collect();
    (dir, shards)
}

#[test]
fn an_epoch_gives_every_target_once_and_targets_follow_inputs() {
    let (_dir, shards) = shards(&[41, 25]);
    let mut loader = Loader::new(&shards, Layout::stream(4), 4, 9, LoaderState::default()).unwrap();
    let mut targets = Vec::new();
    for _ in 0..4 {
        let b = loader.next_batch();
        assert!(b.inputs.iter().zip(&b.targets).all(|(x, y)| x + 1 == *y));
        targets.extend(b.targets);
    }
    targets.sort_unstable();
    assert_eq!(targets, (1..=40).chain(42..=65).collect::<Vec<_>>());
}

#[test]
fn resuming_continues_the_order_across_epochs() {
    let (_dir, shards) = shards(&[100]);
    let mut whole = Loader::new(&shards, Layout::stream(6), 5, 3, LoaderState::default()).unwrap();
    let batches: Vec<Batch> = (0..12).map(|_| whole.next_batch()).collect();
    for k in 0..11 {
        let mut resumed = Loader::new(&shards, Layout::stream(6), 5, 3, batches[k].state).unwrap();
        assert_eq!(resumed.next_batch(), batches[k + 1]);
    }
    assert!(batches[11].state.epoch > 1);
}

#[test]
fn a_mixture_resumes_keeps_its_share_and_reads_the_text_in_the_same_order() {
    let (_dir, shards) = shards(&[400]);
    let task = Task {
        kind: crate::TaskKind::Needle,
        pairs: 1,
        queries: 0,
        distractors: 0,
        value_tokens: 1,
        power: 0.01,
        share: 0.25,
        eval_lengths: vec![],
        eval_sequences: 1,
    };
    let mixture = Mixture { task, seq_len: 8, vocab: 32 };
    let start = |state| Loader::with_task(&shards, mixture.clone(), 5, 3, state).unwrap();
    let mut whole = start(LoaderState::default());
    let batches: Vec<Batch> = (0..40).map(|_| whole.next_batch()).collect();
    for k in [0, 7, 20] {
        assert_eq!(start(batches[k].state).next_batch(), batches[k + 1]);
    }
    let tasks: usize = batches.iter().map(|b| b.questions.len()).sum();
    // 200 sequences at a share of a quarter: 50, standard deviation 6
    assert!((30..=70).contains(&tasks), "{tasks}");
    let text = |batches: &[Batch]| -> Vec<u32> {
        let rows = batches.iter().flat_map(|b| b.targets.chunks(8).map(<[u32]>::to_vec).collect::<Vec<_>>());
        rows.filter(|r| !r.contains(&IGNORE)).flatten().collect()
    };
    let mut plain = Loader::new(&shards, Layout::stream(8), 5, 3, LoaderState::default()).unwrap();
    let want = text(&(0..40).map(|_| plain.next_batch()).collect::<Vec<_>>());
    let got = text(&batches);
    assert_eq!(got, want[..got.len()]);
}

#[test]
fn too_short_a_corpus_is_told() {
    let (_dir, shards) = shards(&[8]);
    let err = Loader::new(&shards, Layout::stream(8), 1, 0, LoaderState::default()).err().unwrap().to_string();
    assert!(err.contains("8 tokens hold no window of seq_len + 1 = 9"), "{err}");
}

/// Documents of these lengths, each of which ends with token 0, in one shard.
fn documents(lengths: &[usize]) -> (tempfile::TempDir, Vec<Arc<Shard>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.shard");
    let mut w = ShardWriter::create(&path, 10_000, 0, false).unwrap();
    let mut next = 1;
    for &n in lengths {
        w.begin();
        let mut tokens: Vec<u32> = (next..next + n as u32 - 1).collect();
        next += n as u32 - 1;
        tokens.push(0);
        w.append(&tokens, &[]).unwrap();
    }
    w.finish().unwrap();
    let shards = vec![Arc::new(Shard::open(&path).unwrap())];
    (dir, shards)
}

/// Starts of all documents of a batch, those of its sequences included.
fn all_starts(b: &Batch) -> Vec<usize> {
    let t = b.inputs.len() / b.batch;
    let mut all: Vec<usize> = (0..b.batch).map(|i| i * t).chain(b.documents.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn a_marked_stream_has_the_same_tokens_and_tells_where_documents_begin() {
    // 1 2 3 0 | 4 0 | 5 6 7 8 9 10 0 | 11 12 0
    let (_dir, shards) = documents(&[4, 2, 7, 3]);
    let marked = Layout { marks_documents: true, ..Layout::stream(5) };
    let mut plain = Loader::new(&shards, Layout::stream(5), 1, 9, LoaderState::default()).unwrap();
    let mut loader = Loader::new(&shards, marked, 1, 9, LoaderState::default()).unwrap();
    let mut seen = 0;
    for _ in 0..6 {
        let (plain, marked) = (plain.next_batch(), loader.next_batch());
        assert!(plain.documents.is_empty());
        assert_eq!((&plain.inputs, &plain.targets, plain.state), (&marked.inputs, &marked.targets, marked.state));
        // the end of a document begins the next one
        let want: Vec<usize> = (1..5).filter(|&i| marked.inputs[i] == 0).collect();
        assert_eq!(marked.documents, want, "{:?}", marked.inputs);
        seen += want.len();
    }
    assert!(seen > 3);
    let before = Layout { end: crate::Side::Before, ..marked };
    let text = Loader::validation(&shards, before, 3, 1).unwrap();
    // 1 2 3 0 4 | 0 5 6 7 8 | 9 10 0 11 12, where a document begins with its first token
    assert_eq!(text.batches[0].documents, [4, 6, 13]);
    assert_eq!(Loader::validation(&shards, marked, 3, 1).unwrap().batches[0].documents, [3, 12]);
    // 1 2 3 0 | 4 0 5 6 | 7 8 9 10: the document behind the first window begins with its last token
    let shorter = Loader::validation(&shards, Layout { seq_len: 4, ..marked }, 3, 1).unwrap();
    assert_eq!(shorter.batches[0].documents, [3, 5]);
    let packed = Layout { packing: Packing::BestFit, ..marked };
    let validation = |layout| Loader::validation(&shards, layout, 3, 1).unwrap();
    assert_eq!(validation(packed), validation(marked), "asked for the same targets however training is laid out");
}

#[test]
fn the_bytes_of_a_validation_are_those_behind_its_targets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.shard");
    let mut w = ShardWriter::create(&path, 100, 0, true).unwrap();
    w.begin();
    w.append(&(0..11).collect::<Vec<_>>(), &(0..11).map(|i| 1 << i).collect::<Vec<_>>()).unwrap();
    w.finish().unwrap();
    let shards = [Arc::new(Shard::open(&path).unwrap())];
    // targets 1 to 3, 4 to 6, 7 to 9
    let validation = Loader::validation(&shards, Layout::stream(3), 2, 9).unwrap();
    assert_eq!((validation.bytes, validation.batches.len()), (Some((1 << 10) - 2), 2));
}

#[test]
fn best_fit_gives_every_target_once_an_epoch_and_cuts_only_what_is_too_long() {
    let lengths = [4, 2, 23, 3, 8, 5, 5, 1, 9, 2, 2, 17, 6];
    let (_dir, shards) = documents(&lengths);
    let tokens: usize = lengths.iter().sum();
    let layout = Layout { packing: Packing::BestFit, marks_documents: true, ..Layout::stream(8) };
    let mut loader = Loader::new(&shards, layout, 1, 9, LoaderState::default()).unwrap();
    let packed = loader.packed().unwrap();
    // as inputs 3, 2, 8 + 8 + 7, 3, 8, 5, 5, 1, 8 + 1, 2, 2, 8 + 8 + 1, 6: the last token is a target alone
    assert_eq!((tokens, packed.sequences, packed.pieces), (87, 11, 18));
    assert!((packed.padding - 2.0 / 88.0).abs() < 1e-12, "{}", packed.padding);
    let mut all = Vec::new();
    for _ in 0..packed.sequences {
        let b = loader.next_batch();
        let starts = all_starts(&b);
        for (i, &from) in starts.iter().enumerate() {
            let to = starts.get(i + 1).copied().unwrap_or(8);
            let (inputs, targets) = (&b.inputs[from..to], &b.targets[from..to]);
            if targets[0] == IGNORE {
                // padding is a document of its own
                assert!(targets.iter().all(|&t| t == IGNORE) && to == 8);
                continue;
            }
            assert_eq!(inputs[1..], targets[..targets.len() - 1]);
            assert!(
                inputs[1..].iter().all(|&id| id != 0),
                "a document begins with the end of the one before: {inputs:?}"
            );
            all.extend_from_slice(targets);
        }
    }
    let mut text = Vec::new();
    shards[0].read(1, tokens - 1, &mut text);
    all.sort_unstable();
    text.sort_unstable();
    assert_eq!(all, text);
}

#[test]
fn the_longest_go_first_and_each_where_it_fits_best() {
    // as inputs 2, 5, 3, 2, 4, which fill two sequences; in the order of the text, or each where most is left, they need three
    let (_dir, shards) = documents(&[3, 5, 3, 2, 4]);
    let layout = Layout { packing: Packing::BestFit, ..Layout::stream(8) };
    let loader = Loader::new(&shards, layout, 1, 9, LoaderState::default()).unwrap();
    assert_eq!(loader.packed(), Some(PackedEpoch { sequences: 2, pieces: 5, padding: 0.0 }));
}

#[test]
fn best_fit_is_the_same_at_every_start_resumes_and_is_reordered_by_the_seed() {
    let lengths: Vec<usize> = (0..60).map(|i| 1 + i * 7 % 13).collect();
    let (_dir, shards) = documents(&lengths);
    let layout = Layout { packing: Packing::BestFit, ..Layout::stream(10) };
    let start = |seed, state| Loader::new(&shards, layout, 3, seed, state).unwrap();
    let mut whole = start(3, LoaderState::default());
    let batches: Vec<Batch> = (0..40).map(|_| whole.next_batch()).collect();
    for k in 0..39 {
        assert_eq!(start(3, batches[k].state).next_batch(), batches[k + 1]);
    }
    assert!(batches[39].state.epoch > 0 && batches.iter().all(|b| b.documents.is_empty()));
    assert!(start(4, LoaderState::default()).next_batch() != batches[0]);
    let packed = whole.packed().unwrap();
    assert!(packed.padding < 0.1 && packed.padding > 0.0, "{packed:?}");
    assert!(Loader::new(&shards, Layout::stream(10), 3, 3, LoaderState::default()).unwrap().packed().is_none());
}

#[test]
fn the_first_sequences_of_a_batch_keep_their_documents() {
    let (_dir, shards) = documents(&[4, 2, 7, 3]);
    let marked = Layout { marks_documents: true, ..Layout::stream(5) };
    let whole = Loader::validation(&shards, marked, 3, 1).unwrap().batches.remove(0);
    let two = whole.first(2);
    assert_eq!((two.batch, two.inputs.len(), two.targets.len(), &two.documents[..]), (2, 10, 10, &[3][..]));
    // 1 2 3 | 0 4, 0 5 6 7 8, 9 10 | 0 11 12: the second sequence begins with a document
    assert_eq!(whole.lengths(), [3, 2, 5, 2, 3]);
    assert_eq!((whole.first(0).batch, whole.first(9)), (1, whole));
}
