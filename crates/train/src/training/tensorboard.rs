//! TensorBoard event files. Records and summaries are those of `tensorboard-rs`; its `SummaryWriter` is not used, because
//! it writes on a thread that panics on a full disk and takes the process along. Here a failed write is an error value.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tensorboard_proto::event::Event;
use tensorboard_proto::summary::Summary;
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

impl EventFile {
    /// A new file in `folder`; `complain` is told of the first failure, if there is one.
    pub fn create(folder: &Path, complain: fn(&str)) -> Self {
        let open = || {
            std::fs::create_dir_all(folder)?;
            // TensorBoard sorts by name: a resumed run's file comes after the first.
            let name = format!("events.out.tfevents.{:017.6}.dashlab.{}", now(), std::process::id());
            File::create(folder.join(name))
        };
        let mut file = EventFile { writer: None, complain };
        match open() {
            Ok(f) => {
                file.writer = Some(RecordWriter::new(BufWriter::new(f)));
                let mut event = Event::new();
                event.set_file_version("brain.Event:2".into());
                file.write(event);
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
