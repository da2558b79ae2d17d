//! How often did what happen? L1 reads these counts in CPUID leaves, whose layout
//! `docs/counters.md` describes.

/// Version of the layout.
pub(crate) const LAYOUT: u32 = 1;
/// Exit reasons that are counted apart.
pub(crate) const REASONS: usize = 80;

/// A level of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// The hypervisor that L0 runs.
    L1,
    /// A guest of L1.
    L2,
}

/// The counts of one processor.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    /// VM exits of L1 by basic exit reason.
    l1: [u64; REASONS],
    /// VM exits of L2 by basic exit reason.
    l2: [u64; REASONS],
}

impl Counters {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self { l1: [0; REASONS], l2: [0; REASONS] }
    }

    /// Counts an exit.
    #[inline]
    pub(crate) fn exit(&mut self, level: Level, reason: u32) {
        let counts = match level {
            Level::L1 => &mut self.l1,
            Level::L2 => &mut self.l2,
        };
        if let Some(count) = counts.get_mut(reason as usize) {
            *count += 1;
        }
    }

    /// Exits for `reason`, of L1 and of L2.
    pub(crate) fn exits(&self, reason: u32) -> (u64, u64) {
        let get = |counts: &[u64; REASONS]| counts.get(reason as usize).copied().unwrap_or(0);
        (get(&self.l1), get(&self.l2))
    }

    /// Exits of any reason, of L1 and of L2.
    pub(crate) fn all_exits(&self) -> (u64, u64) {
        (self.l1.iter().sum(), self.l2.iter().sum())
    }
}
