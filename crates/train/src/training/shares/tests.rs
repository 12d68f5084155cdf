use std::path::Path;

use dash_data::LoaderState;

use super::*;
use crate::config::Config;
use crate::config::reference::SMALLEST;
use crate::training::material::Material;
use crate::training::trainer::{StepStats, Trainer};

#[test]
fn every_parameter_has_one_owner_and_the_shares_are_about_equal() {
    for world in 1..=64 {
        let sizes: Vec<usize> = (0..97).map(|i| 1 + (i * 7919) % 5000).collect();
        let ranges = owned(&sizes, world);
        assert_eq!(ranges.len(), world);
        assert_eq!(ranges.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..97).collect::<Vec<_>>(), "{world}");
        let total: usize = sizes.iter().sum();
        let largest = ranges.iter().map(|r| sizes[r.clone()].iter().sum::<usize>()).max().unwrap();
        assert!(largest <= total / world + 5000, "{world}: {largest} of {total}");
    }
    assert_eq!(owned(&[5], 3).iter().map(Range::len).sum::<usize>(), 1);
    assert_eq!(owned(&[], 2), [0..0, 0..0]);
}

fn config(set: &[&str]) -> Config {
    let all = [
        "run.steps=5",
        "data.seq_len=48",
        "data.batch_size=1",
        "model.attention.kind=dash",
        "model.attention.chunk_size=16",
    ];
    let set: Vec<String> = all.iter().chain(set).map(|s| s.to_string()).collect();
    Config::from_text(SMALLEST, &set, Path::new("small.toml")).unwrap()
}

/// Bits of the weights, named optimiser state (in the first process), figures of all updates.
type Trained = (Vec<u32>, Vec<(String, Vec<u32>)>, Vec<StepStats>);

/// Bits of all weights, optimiser state, and figures after five updates in each of the processes.
fn trained(config: &Config, world: usize) -> Vec<Trained> {
    let material = Material::of(config).unwrap();
    let run = |peers: Peers| {
        // a device of its own: a thread that waits for another one must not hold a worker that this one needs
        let device = Device::cpu(1).unwrap();
        let mut trainer = Trainer::new(config, &device).unwrap();
        trainer.share(&peers);
        let mut loader = material.loader(config, LoaderState::default()).unwrap();
        let mut told = Vec::new();
        for _ in 0..config.run.steps {
            let batches: Vec<_> = (0..config.data.grad_accum).map(|_| loader.next_batch()).collect();
            told.push(trainer.step(config, &batches, true).unwrap().unwrap());
        }
        trainer.check_weights(5, None).unwrap();
        let bits = |x: &Tensor| x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>();
        let weights = trainer.model.params().iter().flat_map(|p| bits(&p.value)).collect();
        let state = trainer.gathered_state().unwrap().iter().map(|(name, x)| (name.clone(), bits(x))).collect();
        (weights, state, told)
    };
    let all = if world == 1 { vec![Peers::Alone] } else { Peers::threads(world) };
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.into_iter().map(|peers| scope.spawn(|| run(peers))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn same(config: &Config, worlds: &[usize]) {
    let one = trained(config, 1).remove(0);
    for &world in worlds {
        for (rank, (weights, state, told)) in trained(config, world).into_iter().enumerate() {
            assert!(weights == one.0, "rank {rank} of {world}: weights");
            for (step, (a, b)) in told.iter().zip(&one.2).enumerate() {
                assert_eq!(format!("{a:?}"), format!("{b:?}"), "rank {rank} of {world}: figures of step {step}");
            }
            if rank == 0 {
                assert!(state == one.1, "{world}: state of the optimiser");
            }
        }
    }
}

#[test]
fn any_number_of_processes_gives_the_bits_of_one() {
    same(&config(&["data.grad_accum=64"]), &[2, 4, 16, 64]);
    // leaves of three micro-batches
    same(&config(&["data.grad_accum=12", "optim.clip=0.01"]), &[2, 4]);
    // state that differs by group
    same(&config(&["data.grad_accum=4", "optim.kind=muon"]), &[2, 4]);
}

#[test]
fn documents_do_not_see_the_number_of_processes() {
    let folder = tempfile::tempdir().unwrap();
    let line = |i: usize| format!("{{\"text\": \"{}\"}}\n", "a document of its own ".repeat(1 + i * i % 23));
    std::fs::write(folder.path().join("own.jsonl"), (0..300).map(line).collect::<String>()).unwrap();
    let text = SMALLEST.replace("[task]\nkind = \"recall\"\n", "");
    let places = ["path", "cache"].map(|key| format!("data.{key}={}", folder.path().join("own.jsonl").display()));
    let places = [places[0].clone(), places[1].replace("own.jsonl", "cache")];
    let set = ["run.steps=3", "data.seq_len=48", "data.batch_size=1", "data.grad_accum=4", "data.source=text"];
    let documents =
        ["data.vocab_size=270", "data.document_mask=true", "data.packing=best-fit", "router.target_share=0.9"];
    let set = set.iter().chain(&documents).chain(&["model.attention.kind=dash", "model.attention.chunk_size=16"]);
    let set: Vec<String> = set.map(|s| s.to_string()).chain(places).collect();
    same(&Config::from_text(&text, &set, Path::new("small.toml")).unwrap(), &[2, 4]);
}

#[test]
fn the_controller_steers_alike_everywhere() {
    same(&config(&["data.grad_accum=4", "router.target_share=0.9"]), &[2, 4]);
}

#[test]
fn optimisers_and_what_leaves_updates_out_do_not_see_the_number_of_processes() {
    same(&config(&["data.grad_accum=4", "optim.kind=muon"]), &[2, 4]);
    // an update is left out by the norm, which all have: one in two is above 1.0001 times the median
    let guarded = ["data.grad_accum=2", "optim.spike_guard=1.0001", "run.steps=40"];
    let config_of = config(&guarded);
    same(&config_of, &[2]);
    assert!(trained(&config_of, 2)[0].2.iter().any(|s| s.skipped > Some(0)), "none was left out");
    same(&config(&["data.grad_accum=2", "model.qk_norm=true", "model.qkv_bias=true"]), &[2]);
}

#[test]
fn more_processes_than_parameters_are_no_fault() {
    same(&config(&["data.grad_accum=32"]), &[32]);
}

#[test]
fn a_step_that_is_not_finite_ends_all_and_the_first_tells() {
    let config = config(&["data.grad_accum=2", "optim.lr=1e38", "optim.clip=0", "optim.warmup_steps=0"]);
    let material = Material::of(&config).unwrap();
    let run = |peers: Peers| {
        let mut trainer = Trainer::new(&config, &Device::cpu(1).unwrap()).unwrap();
        trainer.share(&peers);
        let mut loader = material.loader(&config, LoaderState::default()).unwrap();
        for _ in 0..config.run.steps {
            let batches: Vec<_> = (0..2).map(|_| loader.next_batch()).collect();
            if let Err(e) = trainer.step(&config, &batches, false) {
                return (e.status(), e.to_string());
            }
        }
        panic!("it was to fail");
    };
    let told: Vec<(u8, String)> = std::thread::scope(|scope| {
        let all: Vec<_> = Peers::threads(2).into_iter().map(|peers| scope.spawn(|| run(peers))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!((told[0].0, told[1].0), (1, 1));
    assert!(told[0].1.contains("is not finite") && told[1].1.contains("another process"), "{told:?}");
}
