//! Every op of the tape against central differences. Extents are odd, so that no kernel meets only whole tiles.

use dash_core::ops::attention::{
    Routes, Span, block_attention, chunk_summary, dense_attention, indexer_kl, span_attention, topk_routing,
};
use dash_core::testing::{GRADIENT_ERROR, grad_errors, normal};
use dash_core::{DType, Device, Ids, Result as CoreResult, Tape, Tensor, Var, ops};

use super::check::{Check, DIFFERENCES, largest};

type Op<'a> = Box<dyn Fn(&Tape, &[Var]) -> CoreResult<Var> + 'a>;

/// Name, inputs, op.
type Case<'a> = (&'static str, Vec<Tensor>, Op<'a>);

/// A tensor of normal numbers, another one every time.
type Draw<'a> = &'a mut dyn FnMut(&[usize]) -> Tensor;

/// What ops take beside tensors that have a gradient.
struct Constants {
    targets: Ids,
    ids: Ids,
    mask: Ids,
    places: Ids,
    rope: ops::RopeTable,
    list: Routes,
    /// A number an entry of the list.
    bias: Tensor,
    /// Queries and keys of attention that an indexer learns from.
    attention: [Tensor; 2],
}

impl Constants {
    fn new(device: &Device, x: Draw) -> CoreResult<Self> {
        // chunks wider than the 16 lanes of a vector, so that both the lanes and what is left over are checked
        let list = topk_routing(&x(&[1, 61, 1, 4]), &x(&[1, 3, 1, 4]), 18, 3, 1.0)?;
        Ok(Constants {
            targets: Ids::new(device, &[5], &[3, 0, dash_core::IGNORE, 6, 3])?,
            ids: Ids::new(device, &[2, 2], &[2, 0, 2, 5])?,
            mask: Ids::mask(device, &[3], &[true, false, false])?,
            places: Ids::places(device, &[3, 0, 3])?,
            rope: ops::RopeTable::new(device, DType::F64, 7, 6, 1e4)?,
            bias: list.entries_from_host(&x(&[list.to_host()?.len()]).to_f64()?, DType::F64)?,
            list,
            attention: [x(&[1, 61, 2, 3]), x(&[1, 61, 1, 3])],
        })
    }
}

/// Every op.
pub fn against_differences(device: &Device) -> CoreResult<Vec<Check>> {
    let mut seed = 0;
    let mut x = |shape: &[usize]| {
        seed += 1;
        normal(device, shape, seed)
    };
    let c = Constants::new(device, &mut x)?;
    let mut cases = elements(&mut x, &c);
    cases.extend(layers(&mut x, &c));
    cases.extend(attention(&mut x, &c));
    let check = |(name, inputs, op): Case| {
        let error = largest(&grad_errors(&inputs, &op, &op)?);
        Ok(Check { what: format!("op {name}"), against: DIFFERENCES, error, allowed: GRADIENT_ERROR })
    };
    cases.into_iter().map(check).collect()
}

/// Element by element, shapes and sums.
fn elements<'a>(x: Draw, c: &'a Constants) -> Vec<Case<'a>> {
    vec![
        ("add", vec![x(&[2, 3]), x(&[3])], Box::new(|t, v| ops::add(t, &v[0], &v[1]))),
        ("sub", vec![x(&[2, 3]), x(&[3])], Box::new(|t, v| ops::sub(t, &v[0], &v[1]))),
        ("mul", vec![x(&[2, 3]), x(&[2, 1])], Box::new(|t, v| ops::mul(t, &v[0], &v[1]))),
        ("scale", vec![x(&[5])], Box::new(|t, v| ops::scale(t, &v[0], -1.7))),
        ("exp", vec![x(&[5])], Box::new(|t, v| ops::exp(t, &v[0]))),
        ("ln", vec![x(&[5])], Box::new(|t, v| ops::ln(t, &ops::exp(t, &v[0])?))),
        ("sigmoid", vec![x(&[5])], Box::new(|t, v| ops::sigmoid(t, &v[0]))),
        ("mask_fill", vec![x(&[2, 3])], Box::new(|t, v| ops::mask_fill(t, &v[0], &c.mask, 2.0))),
        ("reshape", vec![x(&[2, 3])], Box::new(|t, v| ops::reshape(t, &v[0], &[3, 2]))),
        ("transpose", vec![x(&[2, 3, 4])], Box::new(|t, v| ops::transpose(t, &v[0], &[2, 0, 1]))),
        ("index_select", vec![x(&[2, 4, 3])], Box::new(|t, v| ops::index_select(t, &v[0], 1, &c.places))),
        ("sum_axis", vec![x(&[2, 3, 4])], Box::new(|t, v| ops::sum_axis(t, &v[0], 1))),
        ("sum_all", vec![x(&[2, 3])], Box::new(|t, v| ops::sum_all(t, &v[0]))),
    ]
}

/// Products, normalisations and what a decoder is made of beside attention.
fn layers<'a>(x: Draw, c: &'a Constants) -> Vec<Case<'a>> {
    vec![
        ("matmul", vec![x(&[2, 3, 5]), x(&[2, 5, 4])], Box::new(|t, v| ops::matmul(t, &v[0], &v[1]))),
        ("linear", vec![x(&[2, 3, 5]), x(&[7, 5])], Box::new(|t, v| ops::linear(t, &v[0], &v[1]))),
        (
            "linear_add",
            vec![x(&[2, 3, 5]), x(&[7, 5]), x(&[2, 3, 7])],
            Box::new(|t, v| ops::linear_add(t, &v[0], &v[1], &v[2])),
        ),
        (
            "gated_sum",
            vec![x(&[2, 3, 3]), x(&[2, 3, 19]), x(&[2, 3, 19]), x(&[2, 3, 19])],
            Box::new(|t, v| ops::gated_sum(t, &v[0], [&v[1], &v[2], &v[3]])),
        ),
        ("softmax", vec![x(&[3, 19])], Box::new(|t, v| ops::softmax(t, &v[0]))),
        ("entmax, alpha 1.25", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 1.25))),
        ("entmax, alpha 1.5", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 1.5))),
        ("entmax, alpha 2", vec![x(&[3, 19])], Box::new(|t, v| ops::entmax(t, &v[0], 2.0))),
        ("rmsnorm", vec![x(&[3, 19]), x(&[19])], Box::new(|t, v| ops::rmsnorm(t, &v[0], &v[1], 1e-6))),
        ("rope", vec![x(&[1, 7, 2, 6])], Box::new(|t, v| ops::rope(t, &v[0], &c.rope, 0))),
        (
            "attention_heads",
            vec![x(&[1, 7, 5]), x(&[12, 5]), x(&[12, 5]), x(&[12, 5])],
            Box::new(|t, v| {
                let [q, k, values] = ops::attention_heads(t, &v[0], [&v[1], &v[2], &v[3]], &c.rope, 0)?;
                ops::add(t, &ops::mul(t, &q, &k)?, &values)
            }),
        ),
        (
            "swiglu",
            vec![x(&[2, 3, 5]), x(&[37, 5]), x(&[37, 5]), x(&[5, 37]), x(&[2, 3, 5])],
            Box::new(|t, v| ops::swiglu(t, &v[0], [&v[1], &v[2], &v[3]], Some(&v[4]))),
        ),
        ("embedding", vec![x(&[6, 3])], Box::new(|t, v| ops::embedding(t, &v[0], &c.ids))),
        (
            "linear_cross_entropy",
            vec![x(&[5, 4]), x(&[7, 4])],
            Box::new(|t, v| ops::linear_cross_entropy(t, &v[0], &v[1], &c.targets, 4.0)),
        ),
    ]
}

/// Attention, and its summaries.
fn attention<'a>(x: Draw, c: &'a Constants) -> Vec<Case<'a>> {
    let mut cases: Vec<Case> = vec![
        ("chunk_summary", vec![x(&[1, 14, 2, 3]), x(&[6])], Box::new(|t, v| chunk_summary(t, &v[0], &v[1], 4))),
        (
            "dense_attention",
            vec![x(&[1, 37, 4, 3]), x(&[1, 37, 2, 3]), x(&[1, 37, 2, 3])],
            Box::new(|t, v| dense_attention(t, &v[0], &v[1], &v[2])),
        ),
        (
            "block_attention, with a bias",
            vec![x(&[1, 61, 2, 3]), x(&[1, 61, 1, 3]), x(&[1, 61, 1, 3]), c.bias.clone()],
            Box::new(|t, v| block_attention(t, &v[0], &v[1], &v[2], &c.list, Some(&v[3]))),
        ),
    ];
    let [q, k] = &c.attention;
    cases.push((
        "indexer_kl",
        vec![x(&[1, 61, 1, 5]), x(&[1, 61, 1, 5])],
        Box::new(|t, v| indexer_kl(t, [&v[0], &v[1]], [q, k], &c.list)),
    ));
    for (name, span, alpha) in [
        ("span_attention, entmax", Span::Causal, 1.5),
        ("span_attention, sliding window", Span::Sliding(5), 1.0),
        ("span_attention, compressed windows", Span::Windows { length: 4, stride: 2 }, 1.0),
    ] {
        let m = span.keys(37);
        let inputs = vec![x(&[1, 37, 4, 3]), x(&[1, m, 2, 3]), x(&[1, m, 2, 3])];
        cases.push((name, inputs, Box::new(move |t, v| span_attention(t, &v[0], &v[1], &v[2], span, alpha))));
    }
    cases
}
