//! How does an address of L2 become a real one?
//!
//! [`walk`](walk()) reads L1's EPT (EPT12); [`Shadow`] composes it with EPT01 into the shadow EPT
//! (EPT02) that the processor runs L2 on, one root for each EPTP value.

mod compose;
mod pool;
mod role;
mod shadow;
mod walk;

pub use shadow::{Resolution, RootHint, Shadow, ShadowCounters};
pub(crate) use walk::wanted;
pub use walk::{Path, Step, Walk, WalkRules, walk};
