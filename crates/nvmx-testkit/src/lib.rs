//! Is the engine a processor? The engine of `nvmx` on the processors of `vmx-model`, and the question
//! whether a hypervisor above can tell that there is anything in between.
//!
//! A [`Nest`] is a machine of the model whose root software is a small L0 around the engine; L1 runs
//! as its guest, L2 as the guest of that. It is a [`vmx_model::Platform`], so that whatever runs on
//! the bare model runs on it, too. The property that everything else hangs on is *transparency*
//! ([`compare`]): the same program gives the same trace here as on a bare machine with the abilities
//! that L1 is offered ([`caps`]), whatever the caches of either keep.
//!
//! Everything follows from a seed: the program, the policy of the caches, and the host's own
//! configuration ([`NestConfig`]).
#![forbid(unsafe_code)]

pub mod caps;
pub mod compare;
pub mod config;
mod control_registers;
mod ept01;
mod frames;
pub mod fuzz;
mod host;
mod moves;
mod nest;
mod rehouse;
pub mod seeds;
mod vmcs01;
pub mod walks;
pub mod watch;

pub use compare::{Case, Failure, Report};
pub use config::{Leaves, NestConfig};
pub use nest::Nest;
