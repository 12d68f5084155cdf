//! The tape: ops append a closure while they run, backward walks the list in reverse.
//!
//! `record` takes the closure, so an op without a backward cannot exist. A choice that has no gradient returns plain
//! tensors and never a [`Var`].

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::dispatch::same_place;
use crate::error::{Error, Result, ensure};
use crate::number::Compute;
use crate::tensor::Tensor;

/// A value on a tape.
#[derive(Debug, Clone)]
pub struct Var {
    id: Id,
    /// The number itself.
    pub value: Tensor,
}

/// Where the gradient of a variable is collected. A backward closure that needs no input value keeps this instead of the
/// [`Var`], so that the value's memory can go. It knows its tape: gradients of one tape are never taken for those of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    tape: u64,
    index: usize,
}

/// Numbers tapes, so that an [`Id`] can tell its own. Nothing that is computed depends on the numbers.
static TAPES: AtomicU64 = AtomicU64::new(0);

impl Var {
    /// Where its gradient is collected.
    pub fn id(&self) -> Id {
        self.id
    }
}

/// Takes the gradients of the outputs, of which at least one is there.
type Backward = Box<dyn FnOnce(Vec<Option<Tensor>>, &mut Grads) -> Result<()>>;

struct Node {
    name: &'static str,
    /// where it was recorded; empty unless the tape checks or is watched
    scope: String,
    /// the index of its first output; the others follow
    first: usize,
    /// extents of the outputs, which their gradients have, too
    shapes: Vec<Vec<usize>>,
    backward: Backward,
}

/// Sees values and gradients at the places that ops and models mark with [`Tape::watch`]: how a probe looks into a pass
/// without being part of the model. A place is a scope and a name, for example `model.layers.2.self_attn` and `router.q`.
pub trait Watcher {
    /// The value on its way forward; `Some` replaces it, which is how a test perturbs it.
    fn value(&self, scope: &str, name: &str, value: &Tensor) -> Option<Tensor>;
    /// The gradient of the same value on its way back.
    fn gradient(&self, scope: &str, name: &str, gradient: &Tensor);
}

/// Where a backward pass leaves a scalar that is no gradient of a variable. It stays on the device until someone reads it.
/// Clones share the place.
#[derive(Debug, Clone, Default)]
pub struct ScalarCell(Rc<RefCell<Option<Tensor>>>);

impl ScalarCell {
    /// Leaves a scalar.
    pub fn set(&self, value: Tensor) {
        self.0.replace(Some(value));
    }

    /// The scalar, where a backward pass has been.
    pub fn get(&self) -> Option<Tensor> {
        self.0.borrow().clone()
    }

    /// The scalar on the host, 0 before backward: waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self) -> Result<f64> {
        self.get().map_or(Ok(0.0), |scalar| scalar.item())
    }
}

/// A Wengert list.
pub struct Tape {
    number: u64,
    nodes: RefCell<Vec<Node>>,
    next: Cell<usize>,
    recording: bool,
    checking: bool,
    compute: Compute,
    scope: RefCell<String>,
    watcher: Option<Rc<dyn Watcher>>,
}

/// Gradients by variable of one tape.
pub struct Grads {
    tape: u64,
    slots: Vec<Option<Tensor>>,
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// A tape that records.
    pub fn new() -> Self {
        Tape {
            number: TAPES.fetch_add(1, Ordering::Relaxed),
            nodes: RefCell::default(),
            next: Cell::new(0),
            recording: true,
            checking: false,
            compute: Compute::Full,
            scope: RefCell::default(),
            watcher: None,
        }
    }

    /// A tape that keeps nothing: evaluation and generation.
    pub fn inference() -> Self {
        Tape { recording: false, ..Self::new() }
    }

    /// A tape that records, and stops at the first output or gradient that is not finite, naming scope and op.
    pub fn checking() -> Self {
        Tape { checking: true, ..Self::new() }
    }

    /// The same tape with products in another precision, forward and backward.
    pub fn computing(self, compute: Compute) -> Self {
        Tape { compute, ..self }
    }

    /// The same tape, telling `watcher` of every marked place.
    pub fn watched(self, watcher: Rc<dyn Watcher>) -> Self {
        Tape { watcher: Some(watcher), ..self }
    }

    /// Who watches.
    pub fn watcher(&self) -> Option<&Rc<dyn Watcher>> {
        self.watcher.as_ref()
    }

    /// Marks a place: `x` itself on an ordinary tape, an identity that tells value and gradient on a watched one.
    ///
    /// # Errors
    /// Only on a checking tape.
    pub fn watch(&self, name: &'static str, x: &Var) -> Result<Var> {
        let Some(watcher) = self.watcher.clone() else { return Ok(x.clone()) };
        let scope = self.scope_name();
        let value = watcher.value(&scope, name, &x.value).unwrap_or_else(|| x.value.clone());
        let id = x.id();
        self.record("watch", value, move |dy, grads| {
            watcher.gradient(&scope, name, &dy);
            grads.add(id, dy)
        })
    }

    /// The scope of the next op; empty unless the tape checks or is watched.
    pub fn scope_name(&self) -> String {
        self.scope.borrow().clone()
    }

    /// How operands of products are rounded: see [`Compute`].
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Whether a backward pass will follow; ops skip work that only serves it otherwise.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Whether every value is checked.
    pub fn is_checking(&self) -> bool {
        self.checking
    }

    /// Names the place in the model that the next ops belong to.
    pub fn scope(&self, name: impl FnOnce() -> String) {
        if self.checking || self.watcher.is_some() {
            self.scope.replace(name());
        }
    }

    /// Puts an input or a parameter on the tape.
    pub fn leaf(&self, value: Tensor) -> Var {
        let index = self.next.get();
        self.next.set(index + 1);
        Var { id: Id { tape: self.number, index }, value }
    }

    /// Appends an op: its output, and what turns the output's gradient into gradients of the inputs.
    ///
    /// # Errors
    /// Only on a checking tape: [`Error::NonFinite`]. (Such a tape reads every value on the host.)
    pub fn record(
        &self,
        name: &'static str,
        value: Tensor,
        backward: impl FnOnce(Tensor, &mut Grads) -> Result<()> + 'static,
    ) -> Result<Var> {
        let one = |mut dys: Vec<Option<Tensor>>, grads: &mut Grads| {
            let dy = dys.pop().flatten().expect("backward is called with the gradient of one output at least");
            backward(dy, grads)
        };
        let mut outs = self.record_list(name, vec![value], one)?;
        Ok(outs.pop().expect("as many variables as values"))
    }

    /// [`Tape::record`] for an op of several outputs. An output that nothing differentiated reaches has no gradient; where none has
    /// one, backward is not called.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record_several<const N: usize>(
        &self,
        name: &'static str,
        values: [Tensor; N],
        backward: impl FnOnce([Option<Tensor>; N], &mut Grads) -> Result<()> + 'static,
    ) -> Result<[Var; N]> {
        let several = |dys: Vec<Option<Tensor>>, grads: &mut Grads| {
            backward(dys.try_into().expect("as many gradients as outputs"), grads)
        };
        let outs = self.record_list(name, values.into(), several)?;
        Ok(outs.try_into().expect("as many variables as values"))
    }

    /// [`Tape::record_several`] for an op whose inputs say how many outputs it has.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record_list(
        &self,
        name: &'static str,
        values: Vec<Tensor>,
        backward: impl FnOnce(Vec<Option<Tensor>>, &mut Grads) -> Result<()> + 'static,
    ) -> Result<Vec<Var>> {
        if self.checking {
            for value in &values {
                if !value.is_finite()? {
                    return Err(Error::NonFinite { at: self.scope.borrow().clone(), op: name, what: "output" });
                }
            }
        }
        let first = self.next.get();
        let outs: Vec<Var> = values.into_iter().map(|value| self.leaf(value)).collect();
        if self.recording {
            let scope = self.scope.borrow().clone();
            let shapes = outs.iter().map(|out| out.value.shape().to_vec()).collect();
            self.nodes.borrow_mut().push(Node { name, scope, first, shapes, backward: Box::new(backward) });
        }
        Ok(outs)
    }

    /// Gradients of a scalar.
    ///
    /// # Errors
    /// When `out` has more than one element, or an op's backward fails.
    pub fn backward(self, out: &Var) -> Result<Grads> {
        ensure!(out.value.numel() == 1, "backward", "the output must be a scalar, got shape {:?}", out.value.shape());
        let seed = Tensor::full(out.value.device(), out.value.shape(), out.value.dtype(), 1.0)?;
        self.backward_from(out, seed)
    }

    /// Gradients of the inner product of `seed` and `out`. Everything the tape kept is freed as the walk passes it.
    ///
    /// # Errors
    /// When the tape does not record, `out` is of another tape, the seed or a gradient that a closure adds has another shape, type or
    /// device than the value, or an op's backward fails.
    pub fn backward_from(self, out: &Var, seed: Tensor) -> Result<Grads> {
        ensure!(self.recording, "backward", "this tape does not record");
        ensure!(out.id.tape == self.number, "backward", "the output is a variable of another tape");
        same_place("backward", &out.value, &seed)?;
        ensure!(
            seed.shape() == out.value.shape(),
            "backward",
            "seed {:?} for an output {:?}",
            seed.shape(),
            out.value.shape()
        );
        let mut grads = Grads { tape: self.number, slots: vec![None; self.next.get()] };
        grads.add(out.id, seed)?;
        for node in self.nodes.into_inner().into_iter().rev() {
            let slots = &mut grads.slots[node.first..][..node.shapes.len()];
            let dys: Vec<Option<Tensor>> = slots.iter_mut().map(Option::take).collect();
            if dys.iter().all(Option::is_none) {
                continue;
            }
            for (dy, shape) in dys.iter().zip(&node.shapes).filter_map(|(dy, shape)| Some((dy.as_ref()?, shape))) {
                ensure!(
                    dy.shape() == shape,
                    node.name,
                    "backward: the output is {shape:?}, a gradient {:?} was added for it",
                    dy.shape()
                );
                if self.checking && !dy.is_finite()? {
                    return Err(Error::NonFinite { at: node.scope, op: node.name, what: "gradient of the output" });
                }
            }
            (node.backward)(dys, &mut grads).map_err(|e| match e {
                Error::Invalid { op, what } => Error::invalid(node.name, format!("backward: {op}: {what}")),
                other => other,
            })?;
        }
        Ok(grads)
    }
}

impl Grads {
    fn slot(&mut self, id: Id) -> Option<&mut Option<Tensor>> {
        if id.tape == self.tape { self.slots.get_mut(id.index) } else { None }
    }

    /// The gradient of a leaf; `None` if nothing that it reaches was differentiated, or the variable is of another tape.
    /// Gradients of intermediate values are freed during the walk.
    pub fn get(&self, var: &Var) -> Option<&Tensor> {
        if var.id.tape == self.tape { self.slots.get(var.id.index)?.as_ref() } else { None }
    }

    /// Takes the gradient of a leaf out; `None` as for [`Grads::get`].
    pub fn take(&mut self, var: &Var) -> Option<Tensor> {
        self.slot(var.id)?.take()
    }

    /// Takes the gradient that a variable has received so far out, for an op that adds to it in place and gives it back with
    /// [`Grads::add`], and true; where nothing has been received, or its memory is shared, fresh memory to be written, and
    /// false.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub(crate) fn begin(&mut self, var: &Var) -> Result<(Tensor, bool)> {
        match self.slot(var.id).and_then(|slot| slot.take_if(|sum| sum.is_unique())) {
            Some(sum) => Ok((sum, true)),
            None => Ok((Tensor::empty(var.value.device(), var.value.shape(), var.value.dtype())?, false)),
        }
    }

    /// Adds to the gradient of a variable.
    ///
    /// # Errors
    /// When the variable is of another tape, or what it has received before has another shape, type or device.
    pub fn add(&mut self, id: Id, d: Tensor) -> Result<()> {
        match self.slot(id) {
            None => Err(Error::invalid("grads", "the variable is of another tape than the one that is walked")),
            Some(Some(sum)) => sum.accumulate(&d),
            Some(slot) => {
                *slot = Some(d);
                Ok(())
            }
        }
    }
}
