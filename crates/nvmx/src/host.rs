//! What does the engine need from the hypervisor that embeds it?
//!
//! Four traits, one a question: the VMX instructions of the processor that calls ([`Vmx`]), L1's
//! memory ([`L1Memory`]), the frames that the engine builds tables in ([`Frames`]), and the MSRs
//! that a guest may touch ([`Msrs`]). [`Host`] is all of them; the engine's functions take one
//! `&mut impl Host` for the processor they run on.

use vmx_defs::{EptPermissions, Eptp, Field, Gva, Hpa, L1Gpa};

/// The number of 8-byte entries in a 4-KByte page.
pub const ENTRIES: usize = 512;

/// The processor refused something that the engine is sure it supports: a bug of the engine or of
/// its host, never something a guest can bring about. The host should take the virtual machine down
/// with a message; guest state is undefined after it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostError {
    /// VMREAD of the field failed.
    VmRead(Field),
    /// VMWRITE of the field failed.
    VmWrite(Field),
    /// VMPTRLD of the region failed.
    VmPtrLd(Hpa),
    /// VMCLEAR of the region failed.
    VmClear(Hpa),
    /// INVEPT failed.
    InvEpt,
    /// INVVPID failed.
    InvVpid,
    /// The pool of frames is smaller than [`crate::Config::frame_count`] asks for.
    OutOfFrames,
    /// The engine was called in a state that the call does not fit (say, an L2 exit while L1 ran).
    WrongState,
}

/// What the engine's functions return: `Err` only for [`HostError`]s. What a guest sees (a fault, a
/// VMfail, an exit) is never an `Err`.
pub type HostResult<T = ()> = Result<T, HostError>;

/// Which guest-physical and combined mappings an INVEPT drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InvEpt {
    /// Those of this EPTP's EP4TA (single-context).
    Single(Eptp),
    /// All (all-context, "global").
    All,
}

/// Which linear and combined mappings an INVVPID drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InvVpid {
    /// Those of this VPID for one linear address (type 0).
    Address(u16, Gva),
    /// Those of this VPID (type 1).
    Single(u16),
    /// Those of all VPIDs but 0000H (type 2).
    All,
    /// Those of this VPID, but for global translations (type 3).
    RetainGlobals(u16),
}

/// The VMX instructions and the few registers of the processor that calls.
pub trait Vmx {
    /// VMREAD from the current VMCS.
    ///
    /// # Errors
    /// [`HostError::VmRead`].
    fn vmread(&mut self, field: Field) -> HostResult<u64>;

    /// VMWRITE to the current VMCS.
    ///
    /// # Errors
    /// [`HostError::VmWrite`].
    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult;

    /// VMPTRLD: `region` is a VMCS that the host gave to the engine for this processor.
    ///
    /// # Errors
    /// [`HostError::VmPtrLd`].
    fn vmptrld(&mut self, region: Hpa) -> HostResult;

    /// INVEPT on this processor.
    ///
    /// # Errors
    /// [`HostError::InvEpt`].
    fn invept(&mut self, scope: InvEpt) -> HostResult;

    /// INVVPID on this processor.
    ///
    /// # Errors
    /// [`HostError::InvVpid`].
    fn invvpid(&mut self, scope: InvVpid) -> HostResult;

    /// Sets CR2, which no VMCS field holds, for a page fault about to be injected.
    fn write_cr2(&mut self, address: Gva);
}

/// How EPT01 maps an address of L1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L1Mapping {
    /// Where the address really is. For an address that L0 hides, a page of ones.
    pub hpa: Hpa,
    /// What L1 may do there.
    pub permissions: EptPermissions,
    /// Memory type of the EPT01 leaf, of [`vmx_defs::ept::memory_type`].
    pub memory_type: u8,
    /// Log2 of the size in bytes of the naturally aligned block around the address that EPT01 maps
    /// with one leaf, contiguously and with the same rights and type: 12, 21 or 30.
    pub size_shift: u8,
}

/// L1's memory, as L1's processors see it.
///
/// An address where L1 has no RAM reads as ones and swallows writes: so do L0's own frames, and
/// device registers, whose side effects no architectural structure of VMX should meet.
/// All accesses are to values that L1 may change at any time: the engine copies once, checks the
/// copy and uses the copy.
///
/// Before each write, compare-exchanges included, an implementation calls
/// [`Tracked::about_to_write`](crate::Tracked::about_to_write), if the host ever
/// [tracks](crate::Nested::track) a page. The engine writes where L1's instruction does, whatever
/// EPT01 says of a tracked page.
pub trait L1Memory {
    /// Copies from L1's memory. The range may cross pages and have any alignment.
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]);

    /// Copies to L1's memory. The range may cross pages and have any alignment.
    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]);

    /// Reads 8 bytes in one access. `gpa` is 8-byte aligned.
    fn read_u64(&mut self, gpa: L1Gpa) -> u64;

    /// Writes 8 bytes in one access. `gpa` is 8-byte aligned.
    fn write_u64(&mut self, gpa: L1Gpa, value: u64);

    /// Replaces 8 bytes by `new` if they are `old`, in one locked access; returns what was there.
    /// `gpa` is 8-byte aligned.
    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64;

    /// As [`Self::compare_exchange_u64`], for 4 bytes; `gpa` is 4-byte aligned.
    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32;

    /// Copies 8-byte entries of a table, each in one access. `gpa` is 8-byte aligned, and the range
    /// does not cross into another page.
    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]);

    /// Compares `eights` times 8 entries of L1's table from `gpa` on with those of the table at
    /// `frame` from entry `first` on. Answers how many eights at the beginning have nothing but
    /// entries of which L1's XOR ours is `by`; an answer that is too low only costs time. `gpa` is
    /// 8-byte aligned, and neither range crosses into another page.
    fn differ_by(&mut self, gpa: L1Gpa, frame: Hpa, first: usize, eights: usize, by: u64) -> usize
    where
        Self: Frames,
    {
        let entries = (0..8 * eights).take_while(|number| {
            gpa.checked_add(8 * *number as u64)
                .is_some_and(|gpa| self.read_u64(gpa) ^ self.load(frame, first + number) == by)
        });
        entries.count() / 8
    }

    /// EPT01's translation. Total: every address below the physical-address width has one; for
    /// others the answer is the page of ones.
    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping;
}

/// The frames that the engine's tables live in: host memory that no guest reaches.
///
/// The engine only names frames of the pool and of the pages given to it in its configuration, and
/// indexes below [`ENTRIES`].
pub trait Frames {
    /// Reads an entry of the page at `frame`.
    fn load(&self, frame: Hpa, index: usize) -> u64;

    /// Writes an entry of the page at `frame` in one access: a processor may be walking the table.
    fn store(&mut self, frame: Hpa, index: usize, value: u64);

    /// Sets all 512 entries of the page at `frame`.
    fn fill(&mut self, frame: Hpa, value: u64);
}

/// RDMSR or WRMSR would have raised #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsrFault;

/// MSRs as the guest whose VMCS is current sees them.
///
/// The same code that answers L1's RDMSR and WRMSR exits: an MSR that a guest-state field of the
/// VMCS holds (IA32_EFER, IA32_PAT, ...) is read from and written to the *current* VMCS.
pub trait Msrs {
    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrFault`] where the instruction raises #GP(0).
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrFault>;

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrFault`] where the instruction raises #GP(0).
    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault>;

    /// Whether a guest may read `index` without an exit (as far as L0 is concerned).
    fn may_pass_read(&self, index: u32) -> bool;

    /// Whether a guest may write `index` without an exit (as far as L0 is concerned).
    fn may_pass_write(&self, index: u32) -> bool;
}

/// Everything the engine needs of the processor it runs on.
pub trait Host: Vmx + L1Memory + Frames + Msrs {}

impl<T: Vmx + L1Memory + Frames + Msrs> Host for T {}
