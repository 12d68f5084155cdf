use super::*;
use crate::device::Device;
use crate::testing::device;

fn tensor(device: &Device, x: &[f64]) -> Tensor {
    Tensor::from_vec(device, &[x.len()], x.to_vec()).unwrap()
}

#[test]
fn the_first_step_moves_by_the_learning_rate_and_the_decay() {
    // m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|, so the step is lr * sign(g) to the size of eps.
    let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-12, weight_decay: 0.5, step: 1 };
    let d = device();
    let (mut p, mut m, mut v) = (tensor(&d, &[2.0, -3.0]), tensor(&d, &[0.0, 0.0]), tensor(&d, &[0.0, 0.0]));
    // a factor that is not finite changes nothing
    adamw(s, &mut p, &mut m, &mut v, &tensor(&d, &[4.0, -0.5]), &tensor(&d, &[f64::NAN])).unwrap();
    assert_eq!((p.to_f64().unwrap(), m.to_f64().unwrap()), (vec![2.0, -3.0], vec![0.0, 0.0]));
    adamw(s, &mut p, &mut m, &mut v, &tensor(&d, &[4.0, -0.5]), &tensor(&d, &[0.25])).unwrap();
    let p = p.to_f64().unwrap();
    assert!((p[0] - (2.0 * 0.95 - 0.1)).abs() < 1e-10 && (p[1] - (-3.0 * 0.95 + 0.1)).abs() < 1e-10, "{p:?}");
    assert!((m.to_f64().unwrap()[0] - 0.1).abs() < 1e-15 && (v.to_f64().unwrap()[0] - 0.05).abs() < 1e-15);
}

#[test]
fn shapes_and_devices_must_agree() {
    let d = device();
    let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let (mut p, mut m, mut v) = (tensor(&d, &[2.0]), tensor(&d, &[0.0]), tensor(&d, &[0.0]));
    let one = tensor(&d, &[1.0]);
    assert!(adamw(s, &mut p, &mut m, &mut v, &tensor(&d, &[1.0, 2.0]), &one).is_err());
    let foreign = tensor(&device(), &[1.0]);
    assert!(
        adamw(s, &mut p, &mut m, &mut v, &foreign, &one)
            .unwrap_err()
            .to_string()
            .contains("inputs differ in device or element type")
    );
    assert!(adamw(s, &mut p, &mut m, &mut v, &one, &foreign).unwrap_err().to_string().contains("an input lives on"));
    assert_eq!(p.to_f64().unwrap(), [2.0]);
}
