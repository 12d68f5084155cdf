//! One batch, again and again: every variant must learn it by heart.

use dash_core::Device;
use dash_core::rng::Rng;
use dash_data::{Batch, LoaderState};
use dash_model::Attention;
use train::config::Config;
use train::trainer::Trainer;

#[test]
fn every_variant_learns_one_batch_by_heart() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/test.toml");
    for kind in dash_model::kinds() {
        let set = ["run.steps=150", "optim.lr=1e-2", "optim.weight_decay=0.0"].map(String::from);
        let mut config = Config::load(&path, &set).unwrap();
        config.model.attention = Attention::small(kind).unwrap();
        let device = Device::cpu(2).unwrap();
        let mut trainer = Trainer::new(&config, &device).unwrap();
        let mut rng = Rng::new(5);
        let n = config.data.batch_size * config.data.seq_len;
        let ids: Vec<u32> = (0..=n).map(|_| rng.below(config.data.vocab_size) as u32).collect();
        let batch = Batch {
            inputs: ids[..n].into(),
            targets: ids[1..].to_vec(),
            batch: config.data.batch_size,
            state: LoaderState::default(),
            questions: Vec::new(),
            documents: Vec::new(),
        };
        let first = trainer.step(&config, std::slice::from_ref(&batch), false).unwrap().unwrap().loss;
        let mut last = first;
        for _ in 1..config.run.steps {
            last = trainer.step(&config, std::slice::from_ref(&batch), false).unwrap().unwrap().loss;
        }
        assert!((first - (config.data.vocab_size as f64).ln()).abs() < 0.2, "{kind}: starts at {first}");
        assert!(last < 0.1, "{kind}: ends at {last}");
    }
}
