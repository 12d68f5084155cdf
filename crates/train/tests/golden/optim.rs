use dash_core::{DType, Tensor, ops};
use dash_model::Group;
use train::config::Optim;
use train::optim::{Item, Update, rule};

use crate::files::{all, error};

/// Ten updates of a matrix through the rule of `optim.kind`, in f64 to the rounding that five steps with slopes up to 3.4 carry on, and in
/// f32 to what they make of its rounding.
#[test]
fn golden_optimizers_follow_pytorch_over_ten_updates() {
    for g in all("optim") {
        let mut optim: Optim = toml::from_str(&format!("kind = {:?}\nlr = 1.0", g.text("kind"))).unwrap();
        optim.momentum = Some(g.number("momentum"));
        optim.adjust_lr = Some(serde_json::from_value(g.config["adjust_lr"].clone()).unwrap());
        for (dtype, bound) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            let mut param = g.tensor("start", dtype);
            let mut state = [Tensor::zeros(param.device(), param.shape(), dtype).unwrap()];
            for i in 0..10 {
                let grad = g.tensor(&format!("grad.{i}"), dtype);
                let norm = ops::grad_norm(grad.device(), [&grad]).unwrap();
                let scale = ops::clip_factor(&norm, 0.0, &[]).unwrap();
                let (lr, weight_decay) = (g.number("lr"), g.number("weight_decay"));
                let item =
                    Item { group: Group::Matrix, lr, weight_decay, param: &mut param, state: &mut state, grad: &grad };
                let update = Update { settings: &optim, step: i + 1, scale: &scale };
                rule(optim.kind).update(&update, vec![item]).unwrap();
                let e = error(&param, g.numbers(&format!("param.{i}")));
                assert!(e <= bound, "{} {dtype:?}: the parameter after update {i} is off by {e:e}", g.name);
            }
            let e = error(&state[0], g.numbers("momentum"));
            assert!(e <= bound, "{} {dtype:?}: the momentum is off by {e:e}", g.name);
        }
    }
}
