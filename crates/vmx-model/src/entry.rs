//! How does a VM entry check the VMCS, load the guest and inject an event?
//!
//! SDM Vol. 3C, chapter "VM Entries".

use vmx_defs::controls::{EntryCtls, PinCtls, ProcCtls2};
use vmx_defs::event::{Interruptibility, IntrInfo, kind};
use vmx_defs::{ExitReason, Field, Hpa, VmInstructionError};

use crate::checks::{self, Subject};
use crate::exit::SEGMENT_FIELDS;
use crate::memory::Memory;
use crate::processor::{Outcome, Processor, VmxMode};
use crate::registers::{DescriptorTable, Segment, cr0, efer, gpr};
use crate::stop::Event;
use crate::vmcs::Vmcs;

/// CR0 bits that a VM entry leaves alone: 63:32, CD, NW, ET, and the reserved 28:19, 17 and 15:6.
const CR0_KEPT: u64 = !0xffff_ffff | cr0::ET | cr0::CD | cr0::NW | 0x1ff8_0000 | 1 << 17 | 0xffc0;

impl Processor {
    /// Enters the guest of the current VMCS, whose launch state fits: a VMfail, or what became of
    /// it.
    pub(crate) fn vm_entry(&mut self, memory: &mut Memory) -> Result<Outcome, VmInstructionError> {
        let (Some(vmcs), Some(region)) = (self.vmcs(), self.current_region()) else {
            return Err(VmInstructionError::EntryControls);
        };
        let subject = Subject {
            vmcs,
            caps: &self.caps,
            memory,
            region,
            lma: self.regs.efer & efer::LMA != 0,
        };
        checks::controls(&subject).map_err(|_| VmInstructionError::EntryControls)?;
        checks::host_state(&subject).map_err(|_| VmInstructionError::EntryHostState)?;
        let pdptes = match checks::guest_state(&subject) {
            Ok(pdptes) => pdptes,
            Err(failure) => {
                let reason = ExitReason::ENTRY_GUEST_STATE;
                return Ok(self.entry_failure(memory, reason, failure.qualification));
            }
        };
        let Some(vmcs) = self.take_vmcs() else { return Err(VmInstructionError::EntryControls) };
        self.load_guest(&vmcs, pdptes);
        let area = Hpa::new(vmcs.get(Field::ENTRY_MSR_LOAD_ADDR));
        let count = vmcs.get32(Field::ENTRY_MSR_LOAD_COUNT);
        let loaded = self.load_msrs(memory, area, count);
        let injection = IntrInfo::from(vmcs.get32(Field::ENTRY_INTR_INFO));
        let error_code = vmcs.get32(Field::ENTRY_EXCEPTION_ERROR);
        let length = vmcs.get32(Field::ENTRY_INSTRUCTION_LEN);
        let vpid = vmcs.proc2().contains(ProcCtls2::VPID);
        self.put_vmcs(vmcs);
        if let Err(number) = loaded {
            return Ok(self.entry_failure(memory, ExitReason::ENTRY_MSR_LOADING, number));
        }
        if let Some(vmcs) = self.vmcs_mut() {
            vmcs.launched = true;
        }
        if !vpid {
            self.caches.transition_without_vpid();
        }
        self.mode = VmxMode::NonRoot;
        if !injection.valid() {
            return Ok(Outcome::Entered(None));
        }
        let info = injection.with_reserved(0);
        let external = !matches!(info.kind(), kind::SOFTWARE_INTERRUPT | kind::SOFTWARE_EXCEPTION);
        let event = Event { info, error_code, length, external, injected: true };
        Ok(match self.deliver_or_resolve(memory, event) {
            Outcome::Delivered(delivered) => {
                if event.is_software() {
                    self.regs.rip = self.next_rip(length);
                }
                Outcome::Entered(Some(delivered))
            }
            other => other,
        })
    }

    /// "Loading Guest State".
    fn load_guest(&mut self, vmcs: &Vmcs, pdptes: Option<[u64; 4]>) {
        let entry = vmcs.entry();
        let long = entry.contains(EntryCtls::IA32E_MODE_GUEST);
        let regs = &mut self.regs;
        regs.cr0 = regs.cr0 & CR0_KEPT | vmcs.get(Field::GUEST_CR0) & !CR0_KEPT;
        regs.cr3 = vmcs.get(Field::GUEST_CR3);
        regs.cr4 = vmcs.get(Field::GUEST_CR4);
        if entry.contains(EntryCtls::LOAD_DEBUG_CONTROLS) {
            regs.dr7 = vmcs.get(Field::GUEST_DR7) & !0xf000 & !(1 << 11) | 1 << 10;
            regs.debugctl = vmcs.get(Field::GUEST_DEBUGCTL);
        }
        regs.sysenter_cs = vmcs.get(Field::GUEST_SYSENTER_CS);
        regs.sysenter_esp = vmcs.get(Field::GUEST_SYSENTER_ESP);
        regs.sysenter_eip = vmcs.get(Field::GUEST_SYSENTER_EIP);
        if entry.contains(EntryCtls::LOAD_PAT) {
            regs.pat = vmcs.get(Field::GUEST_PAT);
        }
        if entry.contains(EntryCtls::LOAD_EFER) {
            regs.efer = vmcs.get(Field::GUEST_EFER);
        } else {
            let mode = |bit| if long { bit } else { 0 };
            regs.efer = regs.efer & !efer::LMA | mode(efer::LMA);
            if regs.cr0 & cr0::PG != 0 {
                regs.efer = regs.efer & !efer::LME | mode(efer::LME);
            }
        }
        for (segment, fields) in regs.segments.iter_mut().zip(SEGMENT_FIELDS) {
            *segment = Segment {
                selector: vmcs.get(fields[0]) as u16,
                base: vmcs.get(fields[1]),
                limit: vmcs.get32(fields[2]),
                rights: vmcs.get32(fields[3]),
            };
        }
        regs.gdtr = DescriptorTable {
            base: vmcs.get(Field::GUEST_GDTR_BASE),
            limit: vmcs.get32(Field::GUEST_GDTR_LIMIT),
        };
        regs.idtr = DescriptorTable {
            base: vmcs.get(Field::GUEST_IDTR_BASE),
            limit: vmcs.get32(Field::GUEST_IDTR_LIMIT),
        };
        regs.rip = vmcs.get(Field::GUEST_RIP);
        regs.gprs[gpr::RSP] = vmcs.get(Field::GUEST_RSP);
        regs.rflags = vmcs.get(Field::GUEST_RFLAGS);
        if let Some(pdptes) = pdptes {
            regs.pdptes = pdptes;
        }
        self.activity = vmcs.get32(Field::GUEST_ACTIVITY);
        self.pending_debug = vmcs.get(Field::GUEST_PENDING_DEBUG);
        let blocking =
            Interruptibility::from_bits_retain(vmcs.get32(Field::GUEST_INTERRUPTIBILITY));
        self.blocking = blocking & (Interruptibility::STI | Interruptibility::MOV_SS);
        let nmi = blocking.contains(Interruptibility::NMI);
        if vmcs.pin().contains(PinCtls::VIRTUAL_NMIS) {
            self.virtual_nmi_blocked = nmi;
            self.nmi_blocked = false;
        } else {
            self.virtual_nmi_blocked = false;
            self.nmi_blocked = nmi;
        }
    }
}
