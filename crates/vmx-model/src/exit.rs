//! How does a VM exit save the guest and bring the hypervisor back?
//!
//! SDM Vol. 3C, chapter "VM Exits".

use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls2};
use vmx_defs::event::{Interruptibility, activity, kind};
use vmx_defs::exit::ENTRY_FAILURE;
use vmx_defs::{ExitReason, Field, Hpa};

use crate::events::information;
use crate::memory::Memory;
use crate::paging::is_valid_pdpte;
use crate::processor::{Outcome, Processor, VmxMode};
use crate::registers::{DescriptorTable, Segment, cr0, cr4, efer, gpr, rflags, segment};
use crate::stop::{Event, ExitInfo};
use crate::vmcs::{ABORT_INDICATOR, Vmcs};

/// Why a VM exit could not be completed (SDM Vol. 3C, "VMX Aborts").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Abort {
    SavingMsrs = 1,
    HostPdptes = 2,
    LoadingMsrs = 4,
}

/// Fields of a segment register in the guest-state area: selector, base, limit, access rights; in
/// the order of [`crate::registers::Registers::segments`].
pub(crate) const SEGMENT_FIELDS: [[Field; 4]; 8] = [
    [Field::GUEST_ES_SELECTOR, Field::GUEST_ES_BASE, Field::GUEST_ES_LIMIT, Field::GUEST_ES_AR],
    [Field::GUEST_CS_SELECTOR, Field::GUEST_CS_BASE, Field::GUEST_CS_LIMIT, Field::GUEST_CS_AR],
    [Field::GUEST_SS_SELECTOR, Field::GUEST_SS_BASE, Field::GUEST_SS_LIMIT, Field::GUEST_SS_AR],
    [Field::GUEST_DS_SELECTOR, Field::GUEST_DS_BASE, Field::GUEST_DS_LIMIT, Field::GUEST_DS_AR],
    [Field::GUEST_FS_SELECTOR, Field::GUEST_FS_BASE, Field::GUEST_FS_LIMIT, Field::GUEST_FS_AR],
    [Field::GUEST_GS_SELECTOR, Field::GUEST_GS_BASE, Field::GUEST_GS_LIMIT, Field::GUEST_GS_AR],
    [
        Field::GUEST_LDTR_SELECTOR,
        Field::GUEST_LDTR_BASE,
        Field::GUEST_LDTR_LIMIT,
        Field::GUEST_LDTR_AR,
    ],
    [Field::GUEST_TR_SELECTOR, Field::GUEST_TR_BASE, Field::GUEST_TR_LIMIT, Field::GUEST_TR_AR],
];

/// The PDPTE fields.
pub(crate) const PDPTE_FIELDS: [Field; 4] =
    [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];

/// CR0 bits that a VM exit leaves alone: 63:32, ET, CD, NW, and the reserved 28:19, 17 and 15:6.
const CR0_KEPT: u64 = !0xffff_ffff | cr0::ET | cr0::CD | cr0::NW | 0x1ff8_0000 | 1 << 17 | 0xffc0;

impl Processor {
    /// Carries out a VM exit.
    pub(crate) fn vm_exit(&mut self, memory: &mut Memory, info: ExitInfo) -> Outcome {
        debug_assert_eq!(self.mode, VmxMode::NonRoot, "only a guest can exit");
        let vectoring = self.delivering.take().filter(|_| {
            // A triple fault is no exit during delivery.
            info.reason != ExitReason::TRIPLE_FAULT
        });
        let virtual_nmis =
            self.guest_vmcs().is_some_and(|vmcs| vmcs.pin().contains(PinCtls::VIRTUAL_NMIS));
        let nmi_exit = info.reason == ExitReason::EXCEPTION_OR_NMI
            && info.interruption.is_some_and(|event| event.info.kind() == kind::NMI);

        let Some(mut vmcs) = self.take_vmcs() else { return Outcome::Stopped };
        record(&mut vmcs, &info);
        match vectoring {
            Some(event) => {
                vmcs.set(Field::IDT_VECTORING_INFO, information(&event));
                if event.info.has_error_code() {
                    vmcs.set(Field::IDT_VECTORING_ERROR, event.error_code.into());
                }
                if event.is_software() {
                    vmcs.set(Field::EXIT_INSTRUCTION_LEN, event.length.into());
                }
            }
            None => vmcs.set(Field::IDT_VECTORING_INFO, 0),
        }
        // The event was injected once.
        let injection = vmcs.get(Field::ENTRY_INTR_INFO) & 0x7fff_ffff;
        vmcs.set(Field::ENTRY_INTR_INFO, injection);
        self.regs.rflags = self.saved_flags(&info, vectoring.as_ref());
        self.save_guest(&mut vmcs, virtual_nmis);
        let stored = self.store_msrs(memory, &vmcs);
        if nmi_exit {
            self.nmi_blocked = true;
        }
        self.virtual_nmi_blocked = false;
        let loaded = stored.and_then(|()| self.load_host(memory, &vmcs));
        let vpid = vmcs.proc2().contains(ProcCtls2::VPID);
        self.put_vmcs(vmcs);
        if !vpid {
            self.caches.transition_without_vpid();
        }
        self.finish_exit(memory, loaded, info.reason)
    }

    /// A VM entry that failed once guest state was being checked or loaded: nothing of the guest is
    /// saved (SDM Vol. 3C, "VM-Entry Failures During or After Loading Guest State").
    pub(crate) fn entry_failure(
        &mut self,
        memory: &mut Memory,
        reason: ExitReason,
        qualification: u64,
    ) -> Outcome {
        let Some(mut vmcs) = self.take_vmcs() else { return Outcome::Stopped };
        let reason = ExitReason::from_bits(reason.bits() | ENTRY_FAILURE);
        vmcs.set(Field::EXIT_REASON, reason.bits().into());
        vmcs.set(Field::EXIT_QUALIFICATION, qualification);
        let loaded = self.load_host(memory, &vmcs);
        self.put_vmcs(vmcs);
        self.finish_exit(memory, loaded, reason)
    }

    fn finish_exit(
        &mut self,
        memory: &mut Memory,
        loaded: Result<(), Abort>,
        reason: ExitReason,
    ) -> Outcome {
        self.mode = VmxMode::Root;
        match loaded {
            Ok(()) => Outcome::Exit(reason),
            Err(abort) => {
                if let Some(region) = self.current_region() {
                    let at = Hpa::new(region.as_u64() + ABORT_INDICATOR);
                    memory.write_u32(at, abort as u32);
                }
                self.activity = activity::SHUTDOWN;
                Outcome::Stopped
            }
        }
    }

    /// Takes the current VMCS out, so that the registers can be changed by it.
    pub(crate) fn take_vmcs(&mut self) -> Option<Vmcs> {
        self.vmcs_mut().map(std::mem::take)
    }

    /// Puts the current VMCS back.
    pub(crate) fn put_vmcs(&mut self, vmcs: Vmcs) {
        if let Some(slot) = self.vmcs_mut() {
            *slot = vmcs;
        }
    }

    /// RFLAGS as an exit saves it: RF is what the stack would show for an event, 0 for an instruction
    /// that exits, 1 for an access that does ("Saving RIP, RSP, RFLAGS, and SSP").
    fn saved_flags(&self, info: &ExitInfo, vectoring: Option<&Event>) -> u64 {
        let flags = self.regs.rflags;
        let access =
            matches!(info.reason, ExitReason::EPT_VIOLATION | ExitReason::EPT_MISCONFIGURATION);
        match (info.interruption, vectoring) {
            (Some(event), _) => event.flags(flags),
            (None, Some(event)) if access => event.flags(flags),
            (None, _) if access => flags | rflags::RF,
            (None, _) if info.length.is_some() => flags & !rflags::RF,
            _ => flags,
        }
    }

    /// "Saving Guest State".
    fn save_guest(&self, vmcs: &mut Vmcs, virtual_nmis: bool) {
        let regs = &self.regs;
        let exit = vmcs.exit();
        let paging = [
            (Field::GUEST_CR0, regs.cr0),
            (Field::GUEST_CR3, regs.cr3),
            (Field::GUEST_CR4, regs.cr4),
            (Field::GUEST_SYSENTER_CS, regs.sysenter_cs),
            (Field::GUEST_SYSENTER_ESP, regs.sysenter_esp),
            (Field::GUEST_SYSENTER_EIP, regs.sysenter_eip),
            (Field::GUEST_GDTR_BASE, regs.gdtr.base),
            (Field::GUEST_GDTR_LIMIT, regs.gdtr.limit.into()),
            (Field::GUEST_IDTR_BASE, regs.idtr.base),
            (Field::GUEST_IDTR_LIMIT, regs.idtr.limit.into()),
            (Field::GUEST_RIP, regs.rip),
            (Field::GUEST_RSP, regs.gprs[gpr::RSP]),
            (Field::GUEST_RFLAGS, regs.rflags),
            (Field::GUEST_ACTIVITY, self.activity.into()),
            (Field::GUEST_PENDING_DEBUG, self.pending_debug),
        ];
        for (field, value) in paging {
            vmcs.set(field, value);
        }
        if exit.contains(ExitCtls::SAVE_DEBUG_CONTROLS) {
            vmcs.set(Field::GUEST_DR7, regs.dr7);
            vmcs.set(Field::GUEST_DEBUGCTL, regs.debugctl);
        }
        if exit.contains(ExitCtls::SAVE_PAT) {
            vmcs.set(Field::GUEST_PAT, regs.pat);
        }
        if exit.contains(ExitCtls::SAVE_EFER) {
            vmcs.set(Field::GUEST_EFER, regs.efer);
        }
        for (fields, segment) in SEGMENT_FIELDS.iter().zip(&regs.segments) {
            vmcs.set(fields[0], segment.selector.into());
            vmcs.set(fields[1], segment.base);
            vmcs.set(fields[2], segment.limit.into());
            vmcs.set(fields[3], segment.rights.into());
        }
        let mut blocking = self.blocking;
        let nmi = if virtual_nmis { self.virtual_nmi_blocked } else { self.nmi_blocked };
        blocking.set(Interruptibility::NMI, nmi);
        vmcs.set(Field::GUEST_INTERRUPTIBILITY, blocking.bits().into());
        if vmcs.eptp().is_some() && regs.is_pae() {
            for (field, pdpte) in PDPTE_FIELDS.into_iter().zip(regs.pdptes) {
                vmcs.set(field, pdpte);
            }
        }
        if self.caps.misc.stores_lma() {
            let mut entry = vmcs.entry();
            entry.set(EntryCtls::IA32E_MODE_GUEST, regs.is_ia32e());
            vmcs.set(Field::ENTRY_CTLS, entry.bits().into());
        }
    }

    /// "Loading Host State".
    pub(crate) fn load_host(&mut self, memory: &mut Memory, vmcs: &Vmcs) -> Result<(), Abort> {
        let exit = vmcs.exit();
        let long = exit.contains(ExitCtls::HOST_ADDRESS_SPACE_SIZE);
        let regs = &mut self.regs;
        regs.cr0 = regs.cr0 & CR0_KEPT | vmcs.get(Field::HOST_CR0) & !CR0_KEPT;
        regs.cr3 = vmcs.get(Field::HOST_CR3);
        regs.cr4 = vmcs.get(Field::HOST_CR4);
        if long {
            regs.cr4 |= cr4::PAE;
        } else {
            regs.cr4 &= !cr4::PCIDE;
        }
        regs.dr7 = 0x400;
        regs.debugctl = 0;
        regs.sysenter_cs = vmcs.get(Field::HOST_SYSENTER_CS);
        regs.sysenter_esp = vmcs.get(Field::HOST_SYSENTER_ESP);
        regs.sysenter_eip = vmcs.get(Field::HOST_SYSENTER_EIP);
        if exit.contains(ExitCtls::LOAD_PAT) {
            regs.pat = vmcs.get(Field::HOST_PAT);
        }
        let mode = efer::LMA | efer::LME;
        if exit.contains(ExitCtls::LOAD_EFER) {
            regs.efer = vmcs.get(Field::HOST_EFER);
        } else if long {
            regs.efer |= mode;
        } else {
            regs.efer &= !mode;
        }

        let data = |selector: Field, base: u64| {
            let selector = vmcs.get(selector) as u16;
            let unusable = if selector == 0 { Segment::UNUSABLE } else { 0 };
            Segment { selector, base, limit: u32::MAX, rights: 0xc093 | unusable }
        };
        regs.segments[segment::ES] = data(Field::HOST_ES_SELECTOR, 0);
        regs.segments[segment::SS] = data(Field::HOST_SS_SELECTOR, 0);
        regs.segments[segment::DS] = data(Field::HOST_DS_SELECTOR, 0);
        regs.segments[segment::FS] = data(Field::HOST_FS_SELECTOR, vmcs.get(Field::HOST_FS_BASE));
        regs.segments[segment::GS] = data(Field::HOST_GS_SELECTOR, vmcs.get(Field::HOST_GS_BASE));
        regs.segments[segment::CS] = Segment {
            selector: vmcs.get(Field::HOST_CS_SELECTOR) as u16,
            base: 0,
            limit: u32::MAX,
            rights: 0x809b | if long { Segment::LONG } else { Segment::BIG },
        };
        regs.segments[segment::TR] = Segment {
            selector: vmcs.get(Field::HOST_TR_SELECTOR) as u16,
            base: vmcs.get(Field::HOST_TR_BASE),
            limit: 0x67,
            rights: 0x8b,
        };
        let ldtr = &mut regs.segments[segment::LDTR];
        *ldtr = Segment { selector: 0, rights: Segment::UNUSABLE, ..*ldtr };
        regs.gdtr = DescriptorTable { base: vmcs.get(Field::HOST_GDTR_BASE), limit: 0xffff };
        regs.idtr = DescriptorTable { base: vmcs.get(Field::HOST_IDTR_BASE), limit: 0xffff };
        regs.rip = vmcs.get(Field::HOST_RIP);
        regs.gprs[gpr::RSP] = vmcs.get(Field::HOST_RSP);
        regs.rflags = rflags::FIXED;
        self.blocking = Interruptibility::empty();
        self.activity = activity::ACTIVE;
        self.pending_debug = 0;

        if self.regs.is_pae() {
            let table = self.regs.cr3 & 0xffff_ffe0;
            let pdptes = [0, 8, 16, 24].map(|offset| memory.read_u64(Hpa::new(table + offset)));
            let width = self.caps.physical_width;
            if !pdptes.iter().all(|pdpte| is_valid_pdpte(*pdpte, width)) {
                return Err(Abort::HostPdptes);
            }
            self.regs.pdptes = pdptes;
        }
        let area = Hpa::new(vmcs.get(Field::EXIT_MSR_LOAD_ADDR));
        let count = vmcs.get32(Field::EXIT_MSR_LOAD_COUNT);
        self.load_msrs(memory, area, count).map_err(|_| Abort::LoadingMsrs)
    }

    /// "Saving MSRs".
    fn store_msrs(&self, memory: &mut Memory, vmcs: &Vmcs) -> Result<(), Abort> {
        let area = vmcs.get(Field::EXIT_MSR_STORE_ADDR);
        for number in 0..vmcs.get(Field::EXIT_MSR_STORE_COUNT) {
            let at = area.wrapping_add(16 * number);
            let head = memory.read_u64(Hpa::new(at));
            let index = head as u32;
            // Reserved bits, x2APIC MSRs and IA32_SMBASE; then what RDMSR refuses.
            let refused = head >> 32 != 0 || index >> 8 == 8 || index == 0x9e;
            match self.read_msr(index) {
                Some(value) if !refused => memory.write_u64(Hpa::new(at.wrapping_add(8)), value),
                _ => return Err(Abort::SavingMsrs),
            }
        }
        Ok(())
    }

    /// "Loading MSRs", of VM entry and VM exit alike: the number of the entry that can't be loaded,
    /// counted from 1.
    pub(crate) fn load_msrs(&mut self, memory: &Memory, area: Hpa, count: u32) -> Result<(), u64> {
        for number in 0..u64::from(count) {
            let at = area.as_u64().wrapping_add(16 * number);
            let head = memory.read_u64(Hpa::new(at));
            let value = memory.read_u64(Hpa::new(at.wrapping_add(8)));
            let index = head as u32;
            let refused = head >> 32 != 0
                || index >> 8 == 8
                || matches!(index, 0x79 | 0x9b)
                || matches!(index, vmx_defs::msr::FS_BASE | vmx_defs::msr::GS_BASE);
            if refused || !self.write_msr(index, value) {
                return Err(number + 1);
            }
        }
        Ok(())
    }
}

/// "Recording VM-Exit Information".
fn record(vmcs: &mut Vmcs, info: &ExitInfo) {
    vmcs.set(Field::EXIT_REASON, info.reason.bits().into());
    vmcs.set(Field::EXIT_QUALIFICATION, info.qualification);
    match info.interruption {
        Some(event) => {
            vmcs.set(Field::EXIT_INTR_INFO, information(&event));
            if event.info.has_error_code() {
                vmcs.set(Field::EXIT_INTR_ERROR, event.error_code.into());
            }
        }
        None => vmcs.set(Field::EXIT_INTR_INFO, 0),
    }
    let optional = [
        (Field::EXIT_INSTRUCTION_LEN, info.length.map(u64::from)),
        (Field::EXIT_INSTRUCTION_INFO, info.instruction_info.map(u64::from)),
        (Field::GUEST_LINEAR_ADDRESS, info.gva.map(|gva| gva.as_u64())),
        (Field::GUEST_PHYSICAL_ADDRESS, info.gpa.map(|gpa| gpa.as_u64())),
    ];
    for (field, value) in optional {
        if let Some(value) = value {
            vmcs.set(field, value);
        }
    }
}
