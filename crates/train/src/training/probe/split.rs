//! What of a gradient came through the router.

/// Gradient through the router (r) against the one through the tokens (t).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Split {
    /// |r|
    pub router: f64,
    /// |t|
    pub token: f64,
    /// <r, t> / (|r| |t|), 0 where one is 0.
    pub cosine: f64,
}

impl Split {
    fn of(router: impl Iterator<Item = f64>, total: impl Iterator<Item = f64>) -> Self {
        let (mut rr, mut tt, mut rt) = (0.0, 0.0, 0.0);
        for (r, all) in router.zip(total) {
            let t = all - r;
            rr += r * r;
            tt += t * t;
            rt += r * t;
        }
        let (router, token) = (rr.sqrt(), tt.sqrt());
        let cosine = if router == 0.0 || token == 0.0 { 0.0 } else { rt / (router * token) };
        Split { router, token, cosine }
    }

    /// Of a gradient `[b, t, heads, head_dim]` and the part of it that came through the router: all of it, and by head.
    pub(super) fn by_head(router: &[f64], total: &[f64], heads: usize, head_dim: usize) -> (Self, Vec<Self>) {
        let own = |x: &[f64], head: usize| -> Vec<f64> {
            x.chunks_exact(head_dim).skip(head).step_by(heads).flatten().copied().collect()
        };
        let one = |head| Split::of(own(router, head).into_iter(), own(total, head).into_iter());
        (Split::of(router.iter().copied(), total.iter().copied()), (0..heads).map(one).collect())
    }

    /// |r| / (|r| + |t|)
    pub fn share(&self) -> f64 {
        if self.router == 0.0 { 0.0 } else { self.router / (self.router + self.token) }
    }
}
