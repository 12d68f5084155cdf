//! TensorBoard event files. Records and summaries are those of `tensorboard-rs`; its `SummaryWriter` is not used, because
//! it writes on a thread that panics on a full disk and takes the process along. Here a failed write is an error value.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::{Message, RepeatedField};
use tensorboard_proto::event::Event;
use tensorboard_proto::summary::{Summary, Summary_Value, SummaryMetadata, SummaryMetadata_PluginData};
use tensorboard_proto::tensor::TensorProto;
use tensorboard_proto::tensor_shape::TensorShapeProto;
use tensorboard_proto::types::DataType;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary::{histogram_raw, scalar};

/// An event file. After the first failed write it says so once and stays silent.
pub struct EventFile {
    writer: Option<RecordWriter<BufWriter<File>>>,
    complain: fn(&str),
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The records of an event file up to where it is damaged: length, its checksum, data, its checksum.
fn records(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let Some((head, rest)) = bytes.split_first_chunk::<12>() else { return events };
        let length = u64::from_le_bytes(*head.first_chunk().expect("12 bytes hold 8"));
        let Some(whole) = usize::try_from(length).ok().and_then(|n| n.checked_add(4)) else { return events };
        if rest.len() < whole {
            return events;
        }
        let Ok(event) = Event::parse_from_bytes(&rest[..whole - 4]) else { return events };
        events.push(event);
        bytes = &rest[whole..];
    }
}

/// The one event file of a folder, opened to be appended to, without what came after `step`: a resumed run writes that
/// again, and a curve must not go back. Several files (a clock that was set back puts the later one first) become one.
fn reopen(folder: &Path, step: u64) -> std::io::Result<(File, bool)> {
    std::fs::create_dir_all(folder)?;
    let is_events =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("events.out.tfevents."));
    let mut old: Vec<PathBuf> =
        std::fs::read_dir(folder)?.filter_map(|e| Some(e.ok()?.path())).filter(is_events).collect();
    old.sort();
    let Some(first) = old.first().cloned() else {
        let name = format!("events.out.tfevents.{:010}.dashlab.{}", now() as u64, std::process::id());
        return Ok((File::create(folder.join(name))?, true));
    };
    let mut kept: Vec<Event> = Vec::new();
    for path in &old {
        let events = records(&std::fs::read(path)?).into_iter();
        // a fresh start writes everything again, the card of step 0, too
        kept.extend(events.filter(|e| step > 0 && !e.has_file_version() && e.get_step() as u64 <= step));
    }
    // stable: figures of one step stay in their order
    kept.sort_by_key(Event::get_step);
    let aside = folder.join(".events.tmp");
    let mut writer = RecordWriter::new(BufWriter::new(File::create(&aside)?));
    for event in std::iter::once(version()).chain(kept) {
        writer.write(&event.write_to_bytes().map_err(std::io::Error::other)?)?;
    }
    writer.flush()?;
    std::fs::rename(&aside, &first)?;
    old.iter().skip(1).try_for_each(std::fs::remove_file)?;
    Ok((File::options().append(true).open(first)?, false))
}

/// What an event file begins with.
fn version() -> Event {
    let mut event = Event::new();
    event.set_wall_time(now());
    event.set_file_version("brain.Event:2".into());
    event
}

impl EventFile {
    /// The event file of `folder`, without what came after `step`; `complain` is told of the first failure, if there is one.
    pub fn open(folder: &Path, step: u64, complain: fn(&str)) -> Self {
        let mut file = EventFile { writer: None, complain };
        match reopen(folder, step) {
            Ok((f, fresh)) => {
                file.writer = Some(RecordWriter::new(BufWriter::new(f)));
                if fresh {
                    file.write(version());
                }
            }
            Err(e) => file.fail(&e),
        }
        file
    }

    fn fail(&mut self, e: &std::io::Error) {
        self.writer = None;
        (self.complain)(&format!(
            "TensorBoard event file cannot be written ({e}); the run goes on, metrics.jsonl has every figure"
        ));
    }

    fn write(&mut self, mut event: Event) {
        let Some(writer) = &mut self.writer else { return };
        event.set_wall_time(now());
        let bytes = event.write_to_bytes().map_err(std::io::Error::other);
        if let Err(e) = bytes.and_then(|b| writer.write(&b)) {
            self.fail(&e);
        }
    }

    fn summary(&mut self, step: u64, summary: Summary) {
        let mut event = Event::new();
        event.set_step(step as i64);
        event.set_summary(summary);
        self.write(event);
    }

    /// One number.
    pub fn scalar(&mut self, tag: &str, value: f64, step: u64) {
        self.summary(step, scalar(tag, value as f32));
    }

    /// A card of text in Markdown.
    pub fn text(&mut self, tag: &str, markdown: &str, step: u64) {
        let mut plugin = SummaryMetadata_PluginData::new();
        plugin.set_plugin_name("text".into());
        let mut metadata = SummaryMetadata::new();
        metadata.set_plugin_data(plugin);
        let mut tensor = TensorProto::new();
        tensor.set_dtype(DataType::DT_STRING);
        // no axes: one text
        tensor.set_tensor_shape(TensorShapeProto::new());
        tensor.set_string_val(RepeatedField::from(vec![markdown.as_bytes().to_vec()]));
        let mut value = Summary_Value::new();
        value.set_tag(tag.into());
        value.set_metadata(metadata);
        value.set_tensor(tensor);
        let mut summary = Summary::new();
        summary.set_value(RepeatedField::from(vec![value]));
        self.summary(step, summary);
    }

    /// Counts of the values 0, 1, 2, ...
    pub fn counts(&mut self, tag: &str, counts: &[u64], step: u64) {
        let numbers = || counts.iter().enumerate().map(|(i, &n)| (i as f64, n as f64));
        let total: f64 = numbers().map(|(_, n)| n).sum();
        let Some(low) = counts.iter().position(|&n| n > 0) else { return };
        let (sum, squares) = numbers().fold((0.0, 0.0), |(s, q), (x, n)| (s + n * x, q + n * x * x));
        let limits: Vec<f64> = (0..counts.len()).map(|i| i as f64 + 0.5).collect();
        let buckets: Vec<f64> = counts.iter().map(|&n| n as f64).collect();
        let high = (counts.len() - 1) as f64;
        self.summary(step, histogram_raw(tag, low as f64, high, total, sum, squares, &limits, &buckets));
    }

    /// A histogram of 32 equal buckets over the range of the values.
    pub fn histogram(&mut self, tag: &str, values: &[f64], step: u64) {
        const BUCKETS: usize = 32;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if !(low.is_finite() && high.is_finite()) {
            return;
        }
        let width = ((high - low) / BUCKETS as f64).max(1e-9);
        let mut counts = vec![0.0; BUCKETS];
        values.iter().for_each(|v| counts[(((v - low) / width) as usize).min(BUCKETS - 1)] += 1.0);
        let limits: Vec<f64> = (1..=BUCKETS).map(|i| low + i as f64 * width).collect();
        let (sum, squares) = values.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
        self.summary(step, histogram_raw(tag, low, high, values.len() as f64, sum, squares, &limits, &counts));
    }

    /// Hands everything to the operating system, so that a reader sees it now.
    pub fn flush(&mut self) {
        if let Some(writer) = &mut self.writer
            && let Err(e) = writer.flush()
        {
            self.fail(&e);
        }
    }
}

/// (step, tag, number) of every number in the folder, in the order that TensorBoard reads them: file by file, by name. A
/// histogram's number is 0.
#[cfg(test)]
pub(super) fn scalars(folder: &Path) -> Vec<(i64, String, f64)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let events = files.iter().flat_map(|f| records(&std::fs::read(f).unwrap()));
    let numbers = events.filter(|e| e.has_summary());
    let of = |e: Event| {
        let value = &e.get_summary().get_value()[0];
        (e.get_step(), value.get_tag().to_string(), value.get_simple_value() as f64)
    };
    numbers.map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_hold_what_was_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(dir.path(), 0, |e| panic!("{e}"));
        // nobody attends 0 chunks, two rows attend 1, one row 2
        file.counts("chunks", &[0, 2, 1], 7);
        // 33 numbers from 0 to 32 in 32 buckets of 1: the largest falls into the last
        file.histogram("values", &(0..=32).map(f64::from).collect::<Vec<_>>(), 8);
        // nothing to show
        file.counts("none", &[0, 0], 9);
        file.histogram("none", &[], 9);
        file.flush();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let events: Vec<Event> =
            records(&std::fs::read(path).unwrap()).into_iter().filter(|e| e.has_summary()).collect();
        assert_eq!(events.iter().map(Event::get_step).collect::<Vec<_>>(), [7, 8]);
        let of = |e: &Event| e.get_summary().get_value()[0].get_histo().clone();
        let h = of(&events[0]);
        assert_eq!((h.get_min(), h.get_max(), h.get_num()), (1.0, 2.0, 3.0));
        // 1 + 1 + 2, 1 + 1 + 4
        assert_eq!((h.get_sum(), h.get_sum_squares()), (4.0, 6.0));
        assert_eq!((h.get_bucket_limit(), h.get_bucket()), (&[0.5, 1.5, 2.5][..], &[0.0, 2.0, 1.0][..]));
        let h = of(&events[1]);
        assert_eq!((h.get_min(), h.get_max(), h.get_num()), (0.0, 32.0, 33.0));
        // 32 x 33 / 2, 32 x 33 x 65 / 6
        assert_eq!((h.get_sum(), h.get_sum_squares()), (528.0, 11440.0));
        assert_eq!((h.get_bucket_limit()[0], h.get_bucket_limit()[31]), (1.0, 32.0));
        assert!(h.get_bucket()[..31].iter().all(|&n| n == 1.0) && h.get_bucket()[31] == 2.0);
    }

    #[test]
    fn a_card_of_text_is_one_string_and_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let mut file = EventFile::open(dir.path(), 0, |e| panic!("{e}"));
            file.text("config", "a = 1", 0);
            file.flush();
        }
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let events = records(&std::fs::read(path).unwrap());
        let cards: Vec<_> = events.iter().filter(|e| e.has_summary()).collect();
        let [card] = cards[..] else { panic!("{} cards", cards.len()) };
        let value = &card.get_summary().get_value()[0];
        assert_eq!((value.get_tag(), value.get_metadata().get_plugin_data().get_plugin_name()), ("config", "text"));
        assert_eq!(value.get_tensor().get_string_val(), [b"a = 1".to_vec()]);
    }

    #[test]
    fn a_resumed_curve_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let fill = |from: u64, steps: std::ops::RangeInclusive<u64>| {
            let mut file = EventFile::open(dir.path(), from, |e| panic!("{e}"));
            for step in steps {
                file.scalar("loss", step as f64, step);
                file.scalar("lr", 0.1, step);
            }
            file.flush();
        };
        fill(0, 1..=18);
        // a crash cuts the last record, a clock set back names the next file before the first
        let first = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(&first).unwrap();
        std::fs::write(&first, &bytes[..bytes.len() - 5]).unwrap();
        std::fs::write(dir.path().join("events.out.tfevents.0000000001.dashlab.1"), &bytes).unwrap();
        fill(10, 11..=20);
        let steps: Vec<i64> =
            scalars(dir.path()).into_iter().filter(|(_, tag, _)| tag == "loss").map(|(s, ..)| s).collect();
        assert!(steps.is_sorted() && steps.last() == Some(&20), "{steps:?}");
        assert_eq!(steps.iter().filter(|s| **s > 10).count(), 10);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
