//! What may differ from one host to the next, without L1 seeing any of it?

use std::fmt;

use nvmx::VmfuncMode;
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{L1Gpa, ProcCtls2, VmFuncCtls};
use vmx_model::ModelCaps;
use vmx_model::retention::Rng;

/// Size of the pages with which EPT01 maps L1's RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaves {
    /// 1 GByte.
    Huge,
    /// 2 MBytes, in place.
    Large,
    /// 4 KBytes, in place.
    Small,
    /// Each 2 MBytes of L1 by a page of that size or by 4-KByte pages, all somewhere in the host's
    /// memory as the seed says.
    Scattered(u64),
}

/// How the host of a [`crate::Nest`] is made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NestConfig {
    /// The processors below.
    pub hardware: ModelCaps,
    /// Frames in the pool of shadow tables: 16 or more, more than twice the processors.
    pub frames: u32,
    /// Greatest number of shadow roots, beyond the number of processors: 1 or more.
    pub roots: u32,
    /// VMCSs of L1 that are kept out of its memory, beyond the number of processors: 1 or more.
    pub vmcs_cache: usize,
    /// How EPT01 maps L1's RAM.
    pub leaves: Leaves,
    /// Pages of L1's address space that L0 keeps to itself.
    pub hidden: Vec<L1Gpa>,
    /// What VMFUNC of L2 does.
    pub vmfunc: VmfuncMode,
    /// L0 interrupts each processor before an operation once in so many times, by this seed.
    pub kicks: Option<(u64, u64)>,
    /// L0 moves a page of L1, or begins to track the writes to one, before an operation once in so
    /// many times, by this seed.
    pub moves: Option<(u64, u64)>,
}

impl Default for NestConfig {
    /// Plenty of everything, and EPT01 of the largest pages.
    fn default() -> Self {
        Self {
            hardware: ModelCaps::default(),
            frames: 512,
            roots: 64,
            vmcs_cache: 4,
            leaves: Leaves::Huge,
            hidden: Vec::new(),
            vmfunc: VmfuncMode::Emulated,
            kicks: None,
            moves: None,
        }
    }
}

impl NestConfig {
    /// So few frames, roots and VMCSs that something has to be thrown out all the time.
    pub fn scarce() -> Self {
        Self { frames: 16, roots: 1, vmcs_cache: 1, ..Self::default() }
    }

    /// A random host on a random processor: one that lacks, or has, what others do not.
    pub fn varied(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x9406_C352);
        Self { hardware: processor(&mut rng), ..Self::random(seed) }
    }

    /// The same host on a processor that knows every operand of INVEPT and INVVPID which an L1 may use
    /// that invalidates just enough.
    pub fn invalidating(mut self) -> Self {
        self.hardware.ept_vpid |= EptVpidCap::ACCESSED_DIRTY
            | EptVpidCap::INVVPID_ADDRESS
            | EptVpidCap::INVVPID_RETAIN_GLOBALS;
        self
    }

    /// A host that follows from a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xC0_4F16);
        let frames = rng.pick(&[16, 16, 20, 24, 32, 64, 512]);
        let roots = rng.pick(&[1, 1, 2, 3, 5, 64]);
        let vmcs_cache = rng.pick(&[1, 1, 2, 4]);
        let leaves = match rng.below(6) {
            0 => Leaves::Huge,
            1 => Leaves::Large,
            2 => Leaves::Small,
            _ => Leaves::Scattered(rng.next()),
        };
        let kicks = rng.one_in(3).then(|| (1 + rng.below(50), rng.next()));
        let moves = rng.one_in(4).then(|| (1 + rng.below(30), rng.next()));
        Self { frames, roots, vmcs_cache, leaves, kicks, moves, ..Self::default() }
    }
}

/// A processor that has all that L0 can't do without.
fn processor(rng: &mut Rng) -> ModelCaps {
    let mut caps = ModelCaps::default();
    if rng.one_in(2) {
        return caps;
    }
    for absent in [
        EptVpidCap::ACCESSED_DIRTY,
        EptVpidCap::EXECUTE_ONLY,
        EptVpidCap::PAGE_1G,
        EptVpidCap::MEMORY_TYPE_UC,
        EptVpidCap::INVVPID_ADDRESS,
        EptVpidCap::INVVPID_RETAIN_GLOBALS,
    ] {
        caps.ept_vpid.set(absent, !rng.one_in(3));
    }
    caps.ept_vpid.set(EptVpidCap::ADVANCED_EXIT_INFO, rng.one_in(4));
    for absent in [
        ProcCtls2::VM_FUNCTIONS,
        ProcCtls2::EPT_VIOLATION_VE,
        ProcCtls2::XSAVES,
        ProcCtls2::WBINVD_EXITING,
    ] {
        if rng.one_in(4) {
            caps.proc2.may_be_1 &= !absent.bits();
        }
    }
    if !caps.has_proc2(ProcCtls2::VM_FUNCTIONS) {
        caps.vm_functions = VmFuncCtls::empty();
    }
    caps.misc = caps
        .misc
        .with_stores_lma(rng.one_in(2))
        .with_vmwrite_any(rng.one_in(2))
        .with_zero_length_injection(rng.one_in(2))
        .with_cr3_targets(rng.pick(&[0, 2, 4]));
    caps.physical_width = rng.pick(&[36, 39, 40]);
    caps
}

impl fmt::Display for NestConfig {
    /// All of it, but for a processor that is the default one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hardware, frames, roots, vmcs_cache, leaves, hidden, vmfunc, kicks, moves } =
            self;
        write!(
            f,
            "NestConfig {{ frames: {frames}, roots: {roots}, vmcs_cache: {vmcs_cache}, \
             leaves: {leaves:?}, hidden: {hidden:?}, vmfunc: {vmfunc:?}, kicks: {kicks:?}, moves: {moves:?}"
        )?;
        if *hardware != ModelCaps::default() {
            write!(f, ", hardware: {hardware:?}")?;
        }
        f.write_str(" }")
    }
}
