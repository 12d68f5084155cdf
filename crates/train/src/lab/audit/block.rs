//! A decoder block against dfdx.

use dash_core::{Device, Result as CoreResult};

use super::check::Check;
use crate::lab::peer;

/// Every gradient of the block, dense and with DashAttention.
pub fn against_dfdx(device: &Device) -> CoreResult<Vec<Check>> {
    let mut out = Vec::new();
    for (name, kind) in [("dense", peer::Kind::Dense), ("dash", peer::Kind::Dash)] {
        for o in peer::opinions(device, kind)? {
            let what = format!("Llama block, {name}: d{}", o.name);
            out.push(Check { what, against: "dfdx 0.13 (f32)", error: o.dfdx, allowed: peer::ALLOWED });
            let what = format!("Llama block, {name}: d{} in f32", o.name);
            out.push(Check { what, against: "ours in f64", error: o.own, allowed: peer::ALLOWED });
        }
    }
    Ok(out)
}
