//! What has L1 written into its VMCS, and in what state is that VMCS?
//!
//! A [`Vmcs12`] is plain values, a slot for each field; nothing in it is checked yet. Which fields
//! L1 may name at all is [`crate::caps`]'s to say, whether the values make a VM entry
//! [`crate::check`]'s.

use crate::host::L1Memory;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::Eptp;
use vmx_defs::field::{FIELDS, SLOTS};
use vmx_defs::{Field, L1Gpa};

/// Launch state (SDM Vol. 3C, "Overview" of virtual-machine control structures).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LaunchState {
    /// VMLAUNCH is possible, VMRESUME is not.
    #[default]
    Clear,
    /// VMRESUME is possible, VMLAUNCH is not.
    Launched,
}

/// The values of a VMCS of L1.
#[derive(Clone, Debug)]
pub struct Vmcs12 {
    values: [u64; SLOTS],
    /// Launch state.
    pub launch_state: LaunchState,
}

impl Default for Vmcs12 {
    fn default() -> Self {
        Self { values: [0; SLOTS], launch_state: LaunchState::Clear }
    }
}

/// Offset in the VMCS region of our own data; the revision identifier and the VMX-abort indicator
/// stand before it (SDM Vol. 3C, "Format of the VMCS Region").
const DATA_OFFSET: u64 = 8;

impl Vmcs12 {
    /// Value of a field, at most as wide as the field.
    #[inline]
    pub fn get(&self, field: Field) -> u64 {
        // `slot` is below SLOTS by construction; the mask lets the compiler see it too.
        self.values.get(field.slot() & (SLOTS - 1)).copied().unwrap_or(0)
    }

    /// Value of a field of 32 bits or less.
    #[inline]
    pub fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// Sets a field; bits beyond its width are dropped.
    #[inline]
    pub fn set(&mut self, field: Field, value: u64) {
        if let Some(slot) = self.values.get_mut(field.slot() & (SLOTS - 1)) {
            *slot = value & field.width().mask();
        }
    }

    /// Pin-based VM-execution controls.
    #[inline]
    pub fn pin(&self) -> PinCtls {
        PinCtls::from_bits_retain(self.get32(Field::PIN_CTLS))
    }

    /// Primary processor-based VM-execution controls.
    #[inline]
    pub fn proc(&self) -> ProcCtls {
        ProcCtls::from_bits_retain(self.get32(Field::PROC_CTLS))
    }

    /// Secondary processor-based VM-execution controls, as they act: all 0 unless the primary
    /// controls activate them.
    #[inline]
    pub fn proc2(&self) -> ProcCtls2 {
        if self.proc().contains(ProcCtls::SECONDARY_CONTROLS) {
            ProcCtls2::from_bits_retain(self.get32(Field::PROC_CTLS2))
        } else {
            ProcCtls2::empty()
        }
    }

    /// VM-exit controls.
    #[inline]
    pub fn exit_ctls(&self) -> ExitCtls {
        ExitCtls::from_bits_retain(self.get32(Field::EXIT_CTLS))
    }

    /// VM-entry controls.
    #[inline]
    pub fn entry_ctls(&self) -> EntryCtls {
        EntryCtls::from_bits_retain(self.get32(Field::ENTRY_CTLS))
    }

    /// VM-function controls, as they act: all 0 unless VM functions are enabled.
    #[inline]
    pub fn vm_functions(&self) -> VmFuncCtls {
        if self.proc2().contains(ProcCtls2::VM_FUNCTIONS) {
            VmFuncCtls::from_bits_retain(self.get(Field::VM_FUNCTION_CONTROLS))
        } else {
            VmFuncCtls::empty()
        }
    }

    /// Whether L2 runs with EPT.
    #[inline]
    pub fn has_ept(&self) -> bool {
        self.proc2().contains(ProcCtls2::EPT)
    }

    /// Whether L2 runs with a VPID of its own.
    #[inline]
    pub fn has_vpid(&self) -> bool {
        self.proc2().contains(ProcCtls2::VPID)
    }

    /// The EPT pointer.
    #[inline]
    pub fn eptp(&self) -> Eptp {
        Eptp::from(self.get(Field::EPT_POINTER))
    }

    /// CR0 or CR4 as L2 reads it: the guest/host mask chooses between shadow and register.
    #[inline]
    pub fn read_shadowed(register: u64, mask: u64, shadow: u64) -> u64 {
        register & !mask | shadow & mask
    }

    /// Reads back what [`Self::store`] wrote, from a region that L1 may have changed to anything:
    /// every value is possible, and none is trusted.
    pub fn load(memory: &mut impl L1Memory, region: L1Gpa) -> Self {
        let mut vmcs = Self::default();
        let mut at = DATA_OFFSET;
        let mut next = |memory: &mut _| {
            let value = read(memory, region, at);
            at += 8;
            value
        };
        if next(memory) == 1 {
            vmcs.launch_state = LaunchState::Launched;
        }
        for (field, _) in FIELDS {
            let value = next(memory);
            vmcs.set(*field, value);
        }
        vmcs
    }

    /// Sets the launch state to clear in a region whose VMCS is in memory only.
    pub fn clear_in_memory(memory: &mut impl L1Memory, region: L1Gpa) {
        write(memory, region, DATA_OFFSET, 0);
    }

    /// Writes all values to the VMCS region in L1's memory, in our own format.
    pub fn store(&self, memory: &mut impl L1Memory, region: L1Gpa) {
        let mut at = DATA_OFFSET;
        let mut next = |memory: &mut _, value| {
            write(memory, region, at, value);
            at += 8;
        };
        next(memory, u64::from(self.launch_state == LaunchState::Launched));
        for (field, _) in FIELDS {
            next(memory, self.get(*field));
        }
    }
}

fn read(memory: &mut impl L1Memory, region: L1Gpa, offset: u64) -> u64 {
    region.checked_add(offset).map_or(u64::MAX, |gpa| memory.read_u64(gpa))
}

fn write(memory: &mut impl L1Memory, region: L1Gpa, offset: u64, value: u64) {
    if let Some(gpa) = region.checked_add(offset) {
        memory.write_u64(gpa, value);
    }
}

/// The data fits in the smallest region that a processor could report.
const _: () = assert!(DATA_OFFSET as usize + 8 + 8 * FIELDS.len() <= 4096);
