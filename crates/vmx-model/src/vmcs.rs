//! What does a processor keep of a VMCS, and what does its memory hold?
//!
//! SDM Vol. 3C, "Virtual-Machine Control Structures". The data of an active VMCS lives in the
//! processor and reaches memory at VMCLEAR (or where another processor makes it active after that):
//! software that forgets a VMCLEAR finds old data, as it may on a real processor. The format in
//! memory is this model's own.

use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::Eptp;
use vmx_defs::field::{FIELDS, SLOTS};
use vmx_defs::{Field, Hpa};

use crate::memory::Memory;

/// Offset of the VMX-abort indicator (SDM Vol. 3C, "VMCS Data").
pub(crate) const ABORT_INDICATOR: u64 = 4;
/// Offset of the launch state in this model's format.
const LAUNCH_STATE: u64 = 8;
/// Offset of the first field in this model's format; they follow in order of encoding.
const DATA: u64 = 16;

/// An active VMCS.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vmcs {
    values: Box<[u64; SLOTS]>,
    /// Whether the launch state is *launched*, else *clear*.
    pub launched: bool,
}

impl Default for Vmcs {
    fn default() -> Self {
        Self { values: Box::new([0; SLOTS]), launched: false }
    }
}

impl Vmcs {
    /// Reads the data of the region at `region`.
    pub(crate) fn load(memory: &Memory, region: Hpa) -> Self {
        let at = |offset| Hpa::new(region.as_u64() + offset);
        let mut vmcs =
            Self { launched: memory.read_u64(at(LAUNCH_STATE)) & 1 != 0, ..Self::default() };
        for (offset, (field, _)) in (DATA..).step_by(8).zip(FIELDS) {
            vmcs.set(*field, memory.read_u64(at(offset)));
        }
        vmcs
    }

    /// Writes the data to the region at `region`.
    pub(crate) fn store(&self, memory: &mut Memory, region: Hpa) {
        let at = |offset| Hpa::new(region.as_u64() + offset);
        memory.write_u64(at(LAUNCH_STATE), self.launched.into());
        for (offset, (field, _)) in (DATA..).step_by(8).zip(FIELDS) {
            memory.write_u64(at(offset), self.get(*field));
        }
    }

    /// Clears the launch state of a region that is not active.
    pub(crate) fn clear_in_memory(memory: &mut Memory, region: Hpa) {
        memory.write_u64(Hpa::new(region.as_u64() + LAUNCH_STATE), 0);
    }

    /// Value of a field.
    #[inline]
    pub fn get(&self, field: Field) -> u64 {
        self.values[field.slot()]
    }

    /// The low 32 bits of a field.
    #[inline]
    pub fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// Sets a field, which keeps the bits of its width.
    #[inline]
    pub fn set(&mut self, field: Field, value: u64) {
        self.values[field.slot()] = value & field.width().mask();
    }

    /// Pin-based controls.
    pub fn pin(&self) -> PinCtls {
        PinCtls::from_bits_retain(self.get32(Field::PIN_CTLS))
    }

    /// Primary processor-based controls.
    #[inline]
    pub fn proc(&self) -> ProcCtls {
        ProcCtls::from_bits_retain(self.get32(Field::PROC_CTLS))
    }

    /// Secondary processor-based controls as they act: none, unless activated.
    #[inline]
    pub fn proc2(&self) -> ProcCtls2 {
        if self.proc().contains(ProcCtls::SECONDARY_CONTROLS) {
            ProcCtls2::from_bits_retain(self.get32(Field::PROC_CTLS2))
        } else {
            ProcCtls2::empty()
        }
    }

    /// VM-exit controls.
    pub fn exit(&self) -> ExitCtls {
        ExitCtls::from_bits_retain(self.get32(Field::EXIT_CTLS))
    }

    /// VM-entry controls.
    pub fn entry(&self) -> EntryCtls {
        EntryCtls::from_bits_retain(self.get32(Field::ENTRY_CTLS))
    }

    /// VM-function controls as they act: none, unless "enable VM functions" is 1.
    pub fn vm_functions(&self) -> VmFuncCtls {
        if self.proc2().contains(ProcCtls2::VM_FUNCTIONS) {
            VmFuncCtls::from_bits_retain(self.get(Field::VM_FUNCTION_CONTROLS))
        } else {
            VmFuncCtls::empty()
        }
    }

    /// The EPT pointer, if EPT is enabled.
    #[inline]
    pub fn eptp(&self) -> Option<Eptp> {
        self.proc2().contains(ProcCtls2::EPT).then(|| Eptp::from(self.get(Field::EPT_POINTER)))
    }

    /// The VPID that the guest runs with: 0000H unless VPIDs are enabled.
    #[inline]
    pub fn vpid(&self) -> u16 {
        if self.proc2().contains(ProcCtls2::VPID) { self.get(Field::VPID) as u16 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_goes_to_memory_and_back() {
        let mut memory = Memory::new(2);
        let mut vmcs = Vmcs { launched: true, ..Vmcs::default() };
        for (value, (field, _)) in (1..).zip(FIELDS) {
            vmcs.set(*field, value);
        }
        let region = Hpa::new(0x1000);
        vmcs.store(&mut memory, region);
        let back = Vmcs::load(&memory, region);
        assert!(back.launched);
        assert!(FIELDS.iter().all(|(field, _)| back.get(*field) == vmcs.get(*field)));
        Vmcs::clear_in_memory(&mut memory, region);
        assert!(!Vmcs::load(&memory, region).launched);
    }

    #[test]
    fn fields_keep_their_width() {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::VPID, 0x1_0002);
        vmcs.set(Field::EXIT_REASON, u64::MAX);
        assert_eq!((vmcs.get(Field::VPID), vmcs.get(Field::EXIT_REASON)), (2, 0xffff_ffff));
    }
}
