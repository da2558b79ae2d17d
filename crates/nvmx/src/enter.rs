//! How does L1's VM entry become one of the processor's?
//!
//! The checks of SDM Vol. 3C, "VM Entries", on vmcs12's values; then vmcs02 is made of vmcs12, of
//! what L1's processor holds where vmcs12 says nothing, and of L0's own needs.

use crate::cache::VmcsId;
use crate::caps::Caps;
use crate::check;
use crate::engine::{Handled, Nested, Processor};
use crate::exit::ExitInfo;
use crate::host::{Host, HostError, HostResult, Vmx};
use crate::msr_area;
use crate::paging::{CR0_PG, EFER_LMA};
use crate::tracking::Tracked;
use crate::vmcs12::{FieldSet, LaunchState, Vmcs12};
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2};
use vmx_defs::field::Kind;
use vmx_defs::{EptPermissions, ExitReason, Field, Hpa, L1Gpa, VmInstructionError};

/// IA32_EFER.LME.
pub(crate) const EFER_LME: u64 = 1 << 8;

/// What became of a VMLAUNCH or VMRESUME.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    /// vmcs02 is current and L2 runs next; or the entry failed in a way that L1 sees as an exit,
    /// and vmcs01 is current.
    Done(Handled),
    /// VMfailValid with this number.
    Fail(VmInstructionError),
}

/// Writes fields of vmcs02, but only what differs from what stands there.
pub(crate) struct Vmcs02Writer<'a, H> {
    pub(crate) host: &'a mut H,
    pub(crate) values: &'a mut Vmcs12,
    pub(crate) known: bool,
}

impl<H: Vmx> Vmcs02Writer<'_, H> {
    #[inline]
    fn write(&mut self, field: Field, value: u64) -> HostResult {
        if self.known && self.values.get(field) == value {
            return Ok(());
        }
        self.values.set(field, value);
        self.host.vmwrite(field, value)
    }
}

/// What L1's processor holds that L2 gets where vmcs12 does not load it.
struct L1State {
    efer: u64,
    pat: u64,
    dr7: u64,
    debugctl: u64,
}

impl Nested {
    /// Carries out a VM entry of L1 on its current VMCS `id`, whose launch state fits. vmcs01 is
    /// current.
    pub(crate) fn enter(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        id: VmcsId,
        region: L1Gpa,
    ) -> HostResult<Entry> {
        let caps = &self.config.caps;
        let stint = self.stint();
        let vmcs = self.vmcss.get(id).ok_or(HostError::WrongState)?;

        let l1 = L1State {
            efer: host.vmread(Field::GUEST_EFER)?,
            pat: host.vmread(Field::GUEST_PAT)?,
            dr7: host.vmread(Field::GUEST_DR7)?,
            debugctl: host.vmread(Field::GUEST_DEBUGCTL)?,
        };
        // Where vmcs02 is still what the last entry with this VMCS made of it, only what L1 wrote
        // since is checked and taken: the rest passed then, or was saved by the processor.
        let same = vmcs.merged != 0 && vmcs.merged == processor.merged;
        let written = if same { vmcs.written() } else { FieldSet::ALL };

        let vtpr = check::vtpr_to_read(vmcs, caps);
        if written.any(Kind::Control) || vtpr.is_some() {
            let mut byte = [0];
            if let Some(at) = vtpr {
                host.read(at, &mut byte);
            }
            let [vtpr] = byte;
            if check::controls(vmcs, caps, vtpr).is_err() {
                return Ok(Entry::Fail(VmInstructionError::EntryControls));
            }
        }
        let lma = l1.efer & EFER_LMA != 0;
        if (written.any(Kind::Control) || written.any(Kind::Host) || lma != processor.checked_lma)
            && check::host_state(vmcs, caps, lma).is_err()
        {
            return Ok(Entry::Fail(VmInstructionError::EntryHostState));
        }

        let mut inputs =
            check::GuestInputs { current_vmcs: region, link_revision: 0, pdptes: [0; 4] };
        let link = check::link_to_read(vmcs, caps);
        if let Some(at) = link {
            let mut revision = [0; 4];
            host.read(at, &mut revision);
            inputs.link_revision = u32::from_le_bytes(revision);
        }
        let pdptes = check::pdptes_to_read(vmcs);
        if let Some(at) = pdptes {
            inputs.pdptes = read_pdptes(host, at);
        }
        let beyond_rip = written.without(Field::GUEST_RIP).without(Field::GUEST_RSP);
        let whole = written.any(Kind::Control)
            || beyond_rip.any(Kind::Guest)
            || link.is_some()
            || pdptes.is_some();
        let checked = if whole {
            check::guest_state(vmcs, caps, &inputs)
        } else {
            check::instruction_pointer(vmcs, caps)
        };
        if let Err(failure) = checked {
            let info =
                ExitInfo::entry_failure(ExitReason::ENTRY_GUEST_STATE, failure.qualification());
            return self.fail_entry(processor, host, id, info).map(Entry::Done);
        }
        processor.checked_lma = lma;

        host.vmptrld(processor.vmcs02)?;
        let vpid12 = vmcs.has_vpid().then(|| vmcs.get(Field::VPID) as u16);
        let vpid02 = processor.vpids.enter(host, vpid12)?;
        processor.bitmap.merge(host, vmcs);
        let eptp02 = if vmcs.has_ept() {
            let hint = &mut processor.entry_hint;
            match self.shadow.switch(host, processor.number, vmcs.eptp(), hint)? {
                Some(eptp02) => eptp02,
                None => {
                    // L1 tries its VM entry again, as if it had not come to it yet.
                    host.vmptrld(processor.vmcs01)?;
                    return Ok(Entry::Done(Handled::Enter));
                }
            }
        } else {
            self.config.ept01
        };

        let mut writer = Vmcs02Writer {
            host: &mut *host,
            values: &mut processor.values,
            known: processor.known,
        };
        writer.write(Field::VPID, vpid02.into())?;
        for field in written.both(&self.plain_controls).of_kind(Kind::Control) {
            writer.write(field, plain_control(vmcs, caps, field))?;
        }
        if written.any(Kind::Control) {
            // What hangs on another control follows that one.
            for field in [Field::TSC_OFFSET, Field::CR4_SHADOW] {
                writer.write(field, plain_control(vmcs, caps, field))?;
            }
        }
        let moved = processor.ept01_seen != self.ept01_changes;
        let virtual_apic = virtual_apic(vmcs);
        if written.any(Kind::Control) {
            write_controls(&mut writer, vmcs, caps, stint.is_some())?;
        }
        // TPR shadow: the page that stands for one that L0 hides is made anew.
        if written.any(Kind::Control) || virtual_apic.is_some() || moved {
            write_pages(&mut writer, vmcs, &self.tracked, processor.scratch)?;
        }
        processor.ept01_seen = self.ept01_changes;
        if let Some(known) = self.virtual_apics.get_mut(processor.number) {
            *known = virtual_apic;
        }
        for field in written.both(&self.plain_set).of_kind(Kind::Guest) {
            writer.host.vmwrite(field, vmcs.get(field))?;
        }
        write_switched_state(&mut writer, vmcs, &l1)?;
        let timer = vmcs
            .pin()
            .contains(PinCtls::PREEMPTION_TIMER)
            .then(|| vmcs.get(Field::PREEMPTION_TIMER));
        let (now, rest) = split_timer(timer, stint);
        if let Some(now) = now {
            writer.write(Field::PREEMPTION_TIMER, now)?;
        }
        processor.timer_rest = rest;
        if check::pae_paging(vmcs) {
            // Without EPT the processor would have loaded them from L1's memory; vmcs02 has EPT.
            let pdptes =
                if vmcs.has_ept() { PDPTES.map(|field| vmcs.get(field)) } else { inputs.pdptes };
            for (field, value) in PDPTES.into_iter().zip(pdptes) {
                // Exits change these fields also where they are not read back: to undefined values,
                // if the guest has left PAE paging.
                writer.host.vmwrite(field, value)?;
            }
        }
        processor.known = true;
        self.last_merged += 1;
        processor.merged = self.last_merged;

        // What the processor changes behind the writer's back is written always.
        host.vmwrite(Field::EPT_POINTER, eptp02.into_bits())?;
        for field in
            [Field::ENTRY_INTR_INFO, Field::ENTRY_EXCEPTION_ERROR, Field::ENTRY_INSTRUCTION_LEN]
        {
            host.vmwrite(field, vmcs.get(field))?;
        }
        let entry = vmcs.entry_ctls()
            | EntryCtls::LOAD_EFER
            | EntryCtls::LOAD_PAT
            | EntryCtls::LOAD_DEBUG_CONTROLS;
        host.vmwrite(Field::ENTRY_CTLS, caps.entry.adjust(entry.bits()).into())?;

        let area = L1Gpa::new(vmcs.get(Field::ENTRY_MSR_LOAD_ADDR));
        let count = vmcs.get32(Field::ENTRY_MSR_LOAD_COUNT);
        if let Err(bad) = msr_area::load(host, area, count) {
            // The entries before may have changed fields of vmcs02.
            processor.known = false;
            host.vmptrld(processor.vmcs01)?;
            let info = ExitInfo::entry_failure(ExitReason::ENTRY_MSR_LOADING, bad.0);
            return self.fail_entry(processor, host, id, info).map(Entry::Done);
        }

        if vmcs.has_ept() {
            self.shadow.enter(processor.number);
        }
        if let Some(vmcs) = self.vmcss.get_mut(id) {
            vmcs.launch_state = LaunchState::Launched;
            vmcs.taken(processor.merged);
        }
        processor.running = true;
        processor.counters.entries += 1;
        Ok(Entry::Done(Handled::Enter))
    }
}

impl Nested {
    /// EPT01 has changed while L2 runs on the processor: vmcs02, which is current, gets the real
    /// addresses of L1's pages anew.
    #[cold]
    pub(crate) fn translate_pages(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
    ) -> HostResult {
        let id = processor.current.ok_or(HostError::WrongState)?.id;
        let vmcs = self.vmcss.get(id).ok_or(HostError::WrongState)?;
        let known = processor.known;
        let mut writer = Vmcs02Writer { host, values: &mut processor.values, known };
        write_pages(&mut writer, vmcs, &self.tracked, processor.scratch)?;
        processor.ept01_seen = self.ept01_changes;
        Ok(())
    }
}

/// The PDPTE fields, in order.
pub(crate) const PDPTES: [Field; 4] =
    [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];

/// Copies the four PDPTEs that CR3 points to.
pub(crate) fn read_pdptes(host: &mut impl Host, at: L1Gpa) -> [u64; 4] {
    let mut bytes = [[0; 8]; 4];
    host.read(at, bytes.as_flattened_mut());
    bytes.map(u64::from_le_bytes)
}

/// A control that L2 runs with as L1 wrote it, or as it acts where another control disables it.
///
/// Bits of CR4 that L1 is not offered are L0's in L2, too, and read as 0: the processor may have
/// their features.
#[inline]
fn plain_control(vmcs: &Vmcs12, caps: &Caps, field: Field) -> u64 {
    let value = vmcs.get(field);
    match field {
        Field::TSC_OFFSET if !vmcs.proc().contains(ProcCtls::TSC_OFFSETTING) => 0,
        Field::CR4_MASK => value | !caps.cr4_fixed1,
        Field::CR4_SHADOW => value & (caps.cr4_fixed1 | vmcs.get(Field::CR4_MASK)),
        _ => value,
    }
}

/// The controls of which L0 adds some: EPT, VPID and the MSR bitmap are always in use, exits always
/// save and load what L1's entries and exits may.
fn write_controls<H: Host>(
    writer: &mut Vmcs02Writer<'_, H>,
    vmcs: &Vmcs12,
    caps: &Caps,
    timer: bool,
) -> HostResult {
    let pin = vmcs.pin();
    let wanted = if timer { pin | PinCtls::PREEMPTION_TIMER } else { pin };
    writer.write(Field::PIN_CTLS, caps.pin.adjust(wanted.bits()).into())?;
    let proc = vmcs.proc() | ProcCtls::MSR_BITMAPS | ProcCtls::SECONDARY_CONTROLS;
    writer.write(Field::PROC_CTLS, caps.proc.adjust(proc.bits()).into())?;
    let proc2 = vmcs.proc2() | ProcCtls2::EPT | ProcCtls2::VPID;
    writer.write(Field::PROC_CTLS2, caps.proc2.adjust(proc2.bits()).into())?;

    let mut exit = ExitCtls::HOST_ADDRESS_SPACE_SIZE
        | ExitCtls::SAVE_DEBUG_CONTROLS
        | ExitCtls::SAVE_PAT
        | ExitCtls::LOAD_PAT
        | ExitCtls::SAVE_EFER
        | ExitCtls::LOAD_EFER
        | vmcs.exit_ctls() & ExitCtls::ACK_INTERRUPT;
    // Always saved, since exits that L0 handles must not lose it.
    exit.set(ExitCtls::SAVE_PREEMPTION_TIMER, pin.contains(PinCtls::PREEMPTION_TIMER));
    writer.write(Field::EXIT_CTLS, caps.exit.adjust(exit.bits()).into())
}

/// What the processor counts down, if anything, of L1's preemption timer and of the longest time that
/// L2 may run, and what of L1's timer is left then.
pub(crate) fn split_timer(timer: Option<u64>, stint: Option<u32>) -> (Option<u64>, u64) {
    let Some(stint) = stint.map(u64::from) else { return (timer, 0) };
    let now = timer.unwrap_or(stint).min(stint);
    (Some(now), timer.unwrap_or(now) - now)
}

/// The page that the processor writes a virtual APIC to, if it does.
fn virtual_apic(vmcs: &Vmcs12) -> Option<L1Gpa> {
    vmcs.proc()
        .contains(ProcCtls::TPR_SHADOW)
        .then(|| L1Gpa::new(vmcs.get(Field::VIRTUAL_APIC_ADDR)).page())
}

/// The pages that the processor accesses by real address, as EPT01 has them. What L0 hides reads as
/// ones: where the processor would write there too, it gets a page of its own.
fn write_pages<H: Host>(
    writer: &mut Vmcs02Writer<'_, H>,
    vmcs: &Vmcs12,
    tracked: &Tracked,
    scratch: Hpa,
) -> HostResult {
    let (proc, proc2) = (vmcs.proc(), vmcs.proc2());
    let mut page = |active: bool, field: Field, written: bool| {
        if !active {
            return Ok(());
        }
        let gpa = L1Gpa::new(vmcs.get(field));
        let mapping = writer.host.translate(gpa);
        let mut hpa = mapping.hpa;
        if written
            && !mapping.permissions.contains(EptPermissions::WRITE)
            && !tracked.passes_to_hardware(gpa)
        {
            writer.host.fill(scratch, u64::MAX);
            hpa = scratch;
        }
        writer.write(field, hpa.as_u64())
    };
    page(proc.contains(ProcCtls::IO_BITMAPS), Field::IO_BITMAP_A, false)?;
    page(proc.contains(ProcCtls::IO_BITMAPS), Field::IO_BITMAP_B, false)?;
    page(proc.contains(ProcCtls::TPR_SHADOW), Field::VIRTUAL_APIC_ADDR, true)?;
    let apic_access = proc2.contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES);
    page(apic_access, Field::APIC_ACCESS_ADDR, false)
}

/// State that L2 gets from vmcs12 or keeps from L1, as the VM-entry controls say (SDM Vol. 3C,
/// "Loading Guest Control Registers, Debug Registers, and MSRs"). vmcs02 always loads it.
fn write_switched_state<H: Host>(
    writer: &mut Vmcs02Writer<'_, H>,
    vmcs: &Vmcs12,
    l1: &L1State,
) -> HostResult {
    let entry = vmcs.entry_ctls();
    let (dr7, debugctl) = if entry.contains(EntryCtls::LOAD_DEBUG_CONTROLS) {
        (vmcs.get(Field::GUEST_DR7), vmcs.get(Field::GUEST_DEBUGCTL))
    } else {
        (l1.dr7, l1.debugctl)
    };
    writer.write(Field::GUEST_DR7, dr7)?;
    writer.write(Field::GUEST_DEBUGCTL, debugctl)?;
    let pat = if entry.contains(EntryCtls::LOAD_PAT) { vmcs.get(Field::GUEST_PAT) } else { l1.pat };
    writer.write(Field::GUEST_PAT, pat)?;
    let efer = if entry.contains(EntryCtls::LOAD_EFER) {
        vmcs.get(Field::GUEST_EFER)
    } else {
        // LMA follows the mode; LME does where the guest has paging.
        let ia32e = entry.contains(EntryCtls::IA32E_MODE_GUEST);
        let mut efer = l1.efer & !EFER_LMA | if ia32e { EFER_LMA } else { 0 };
        if vmcs.get(Field::GUEST_CR0) & CR0_PG != 0 {
            efer = efer & !EFER_LME | if ia32e { EFER_LME } else { 0 };
        }
        efer
    };
    writer.write(Field::GUEST_EFER, efer)
}

#[cfg(test)]
mod tests;
