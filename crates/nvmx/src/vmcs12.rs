//! What has L1 written into its VMCS, and in what state is that VMCS?
//!
//! A [`Vmcs12`] is plain values, a slot for each field; nothing in it is checked yet. Which fields
//! L1 may name at all is [`crate::caps`]'s to say, whether the values make a VM entry
//! [`crate::check`]'s.

use crate::host::L1Memory;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::Eptp;
use vmx_defs::field::{FIELDS, Kind, SLOTS};
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
    /// What L1 has written since the last VM entry.
    written: FieldSet,
    /// Names the processor state that this VMCS was last entered with; 0 is none. While it is the
    /// same, vmcs02 holds all values but those written since.
    pub(crate) merged: u64,
    /// Launch state.
    pub launch_state: LaunchState,
}

impl Default for Vmcs12 {
    fn default() -> Self {
        Self {
            values: [0; SLOTS],
            written: FieldSet::NONE,
            merged: 0,
            launch_state: LaunchState::Clear,
        }
    }
}

/// A set of fields, one bit for each slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FieldSet([u64; SLOTS / 64]);

impl FieldSet {
    /// No field.
    pub(crate) const NONE: Self = Self([0; SLOTS / 64]);

    /// Every field.
    pub(crate) const ALL: Self = Self([u64::MAX; SLOTS / 64]);

    /// The fields of the table for which `wanted` holds.
    pub(crate) fn of(wanted: impl Fn(Field) -> bool) -> Self {
        let mut set = Self::NONE;
        for (field, _) in FIELDS {
            if wanted(*field) {
                set.insert(*field);
            }
        }
        set
    }

    /// Adds a field.
    #[inline]
    fn insert(&mut self, field: Field) {
        let slot = field.slot();
        if let Some(word) = self.0.get_mut(slot / 64) {
            *word |= 1 << (slot % 64);
        }
    }

    /// Whether a field of this kind is in the set. A slot's two highest bits are the kind.
    #[inline]
    pub(crate) fn any(&self, kind: Kind) -> bool {
        let [c0, c1, r0, r1, g0, g1, h0, h1] = self.0;
        match kind {
            Kind::Control => c0 | c1 != 0,
            Kind::ReadOnly => r0 | r1 != 0,
            Kind::Guest => g0 | g1 != 0,
            Kind::Host => h0 | h1 != 0,
        }
    }

    /// The fields that are in both sets.
    #[inline]
    pub(crate) fn both(&self, other: &Self) -> Self {
        let mut both = *self;
        for (word, other) in both.0.iter_mut().zip(other.0) {
            *word &= other;
        }
        both
    }

    /// The set without a field.
    #[inline]
    pub(crate) fn without(mut self, field: Field) -> Self {
        let slot = field.slot();
        if let Some(word) = self.0.get_mut(slot / 64) {
            *word &= !(1 << (slot % 64));
        }
        self
    }

    /// The fields of one kind in the set, of the table's.
    #[inline]
    pub(crate) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = Field> + use<> {
        let [c0, c1, r0, r1, g0, g1, h0, h1] = self.0;
        let (first, words) = match kind {
            Kind::Control => (0, (c0, c1)),
            Kind::ReadOnly => (128, (r0, r1)),
            Kind::Guest => (256, (g0, g1)),
            Kind::Host => (384, (h0, h1)),
        };
        let mut rest = u128::from(words.0) | u128::from(words.1) << 64;
        core::iter::from_fn(move || {
            while rest != 0 {
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(field) = Field::from_slot(first + bit) {
                    return Some(field);
                }
            }
            None
        })
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

    /// VMWRITE of L1: sets a field, and notes that it was written.
    #[inline]
    pub(crate) fn write(&mut self, field: Field, value: u64) {
        self.set(field, value);
        self.written.insert(field);
    }

    /// Keeps what VMREAD of the hardware gave: it is no wider than the field.
    #[inline]
    pub(crate) fn keep(&mut self, field: Field, value: u64) {
        if let Some(slot) = self.values.get_mut(field.slot() & (SLOTS - 1)) {
            *slot = value;
        }
    }

    /// What L1 has written since the last VM entry.
    #[inline]
    pub(crate) fn written(&self) -> FieldSet {
        self.written
    }

    /// A VM entry has taken all that was written; vmcs02 of the processor state that `merged` names
    /// now holds it.
    #[inline]
    pub(crate) fn taken(&mut self, merged: u64) {
        self.written = FieldSet::NONE;
        self.merged = merged;
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
