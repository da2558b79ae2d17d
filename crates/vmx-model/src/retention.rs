//! What does the processor keep in its caches, where the architecture leaves it free?
//!
//! A processor may forget any cached mapping at any time, and is never obliged to cache one. A
//! policy decides; every choice follows from the policy and the history alone.

/// What is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retention {
    /// Everything: a mapping goes only when an operation that the SDM lists invalidates it.
    Everything,
    /// As the numbers drawn from this seed say: now and then a mapping is not cached, or forgotten
    /// when it would have been used, or the caches are emptied.
    Random(u64),
    /// Nothing: each access walks the tables.
    Nothing,
}

/// A sequence of numbers that follows from its seed: SplitMix64 of Steele, Lea and Flood. It is
/// written out here, since a seed in a report must replay for as long as the project lives.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    #[inline]
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// The next number, below `bound`, which is not 0.
    #[inline]
    pub const fn below(&mut self, bound: u64) -> u64 {
        ((self.next() as u128 * bound as u128) >> 64) as u64
    }

    /// True once in `n` times.
    #[inline]
    pub const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `choices`, which is not empty.
    #[inline]
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// The policy at work.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    policy: Retention,
    rng: Rng,
}

impl Keeper {
    pub(crate) fn new(policy: Retention) -> Self {
        let seed = if let Retention::Random(seed) = policy { seed } else { 0 };
        Self { policy, rng: Rng::new(seed) }
    }

    /// Whether a mapping is cached.
    #[inline]
    pub(crate) fn caches(&mut self) -> bool {
        match self.policy {
            Retention::Everything => true,
            Retention::Random(_) => !self.rng.one_in(4),
            Retention::Nothing => false,
        }
    }

    /// Whether a mapping that would be used has been forgotten.
    #[inline]
    pub(crate) fn forgot(&mut self) -> bool {
        matches!(self.policy, Retention::Random(_)) && self.rng.one_in(8)
    }

    /// Whether everything has been forgotten.
    #[inline]
    pub(crate) fn forgot_all(&mut self) -> bool {
        matches!(self.policy, Retention::Random(_)) && self.rng.one_in(64)
    }
}
