//! Which event does a guest get next, when L0 has raised one for it?
//!
//! An exception that L0 raises may meet an event that was being delivered when the guest exited;
//! then the two become one, a double fault, or the end of the guest (SDM Vol. 3A, "Interrupt
//! 8—Double Fault Exception (#DF)"). An event whose delivery was cut short by an exit that concerns
//! L0 alone is injected again (SDM Vol. 3C, "Information for VM Exits That Occur During Event
//! Delivery"). And an instruction that L0 completes for the guest ends as it would have ended on
//! the processor ([`advance_rip`]).
//!
//! All functions act on the current VMCS.

use crate::host::{HostResult, InvVpid, Vmx};
use crate::insn::is_64_bit;
use crate::paging::{CR0_PE, PageFault, RFLAGS_RF, RFLAGS_TF, Untranslated};
use crate::tlb::VPID01;
use vmx_defs::event::{Interruptibility, IntrInfo, kind, vector};
use vmx_defs::{Field, Gva};

/// What a guest gets instead of the effect of its instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// #UD.
    Ud,
    /// #GP with this error code.
    Gp(u32),
    /// #SS with this error code.
    Ss(u32),
    /// #PF.
    Pf(PageFault),
    /// Nothing: the instruction is executed again from its beginning, since other processors of the
    /// guest raced with L0 for too long.
    Retry,
}

/// An exception that L0 raises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Vector, of [`vector`].
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// What CR2 shall hold, for #PF.
    pub address: Option<Gva>,
}

impl Exception {
    /// The exception `vector`; its error code, if it has one, is 0.
    #[inline]
    pub const fn new(vector: u8) -> Self {
        let error_code = if vector::has_error_code(vector) { Some(0) } else { None };
        Self { vector, error_code, address: None }
    }

    /// Whether it is a fault, so that the saved RFLAGS.RF is 1. #DB counts as none: L0 raises it as
    /// a trap, or leaves RF to the caller (SDM Vol. 3B, "Instruction-Breakpoint Exception
    /// Condition" and RF's description in Vol. 1; Vol. 3A, "Exception Classifications").
    const fn is_fault(&self) -> bool {
        !matches!(
            self.vector,
            vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF | vector::MC
        )
    }
}

impl Fault {
    /// The exception that delivers the fault; none for [`Fault::Retry`].
    pub const fn exception(self) -> Option<Exception> {
        let (vector, error_code, address) = match self {
            Fault::Ud => (vector::UD, None, None),
            Fault::Gp(error) => (vector::GP, Some(error), None),
            Fault::Ss(error) => (vector::SS, Some(error), None),
            Fault::Pf(PageFault { error, address }) => (vector::PF, Some(error), Some(address)),
            Fault::Retry => return None,
        };
        Some(Exception { vector, error_code, address })
    }
}

impl From<Untranslated> for Fault {
    fn from(untranslated: Untranslated) -> Self {
        match untranslated {
            Untranslated::Fault(fault) => Fault::Pf(fault),
            Untranslated::Raced => Fault::Retry,
        }
    }
}

/// The classes of the double-fault rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

const fn class(vector: u8) -> Class {
    match vector {
        0 | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP => Class::Contributory,
        vector::PF | vector::VE => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What becomes of an exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// This exception is delivered: the one that was raised, or #DF in place of it.
    Exception(Exception),
    /// The guest is in shutdown: a triple fault.
    TripleFault,
}

/// What becomes of `second`, raised while the event of `first` (in the format of IDT-vectoring
/// information, valid or not) was being delivered.
///
/// Where the two are handled serially, the second is delivered and the first is dropped, as the
/// processor does: a fault is met again when its instruction is.
pub fn combine(first: IntrInfo, second: Exception) -> Outcome {
    let first = if first.valid() && first.kind() == kind::HARDWARE_EXCEPTION {
        class(first.vector())
    } else {
        // Interrupts and software events are benign, whatever their vector.
        Class::Benign
    };
    let double_fault = Outcome::Exception(Exception::new(vector::DF));
    match (first, class(second.vector)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
            Outcome::TripleFault
        }
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => double_fault,
        _ => Outcome::Exception(second),
    }
}

/// An event that VM entry shall deliver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// VM-entry interruption information.
    pub info: IntrInfo,
    /// VM-entry exception error code, where `info` says that there is one.
    pub error_code: u32,
    /// VM-entry instruction length, for software interrupts and exceptions.
    pub instruction_length: u32,
}

/// Whether VM entry needs an instruction length for an event of this type.
const fn is_software(event_kind: u8) -> bool {
    matches!(
        event_kind,
        kind::SOFTWARE_INTERRUPT | kind::PRIVILEGED_SOFTWARE_EXCEPTION | kind::SOFTWARE_EXCEPTION
    )
}

impl Event {
    /// Injection of `exception`. In real-address mode no error code is delivered (SDM Vol. 3C,
    /// "VM-Entry Control Fields" under "Checks on VMX Controls": with unrestricted guest, bit 11 of
    /// the interruption information needs CR0.PE).
    pub fn of_exception(exception: Exception, protected: bool) -> Self {
        let error_code = exception.error_code.filter(|_| protected);
        Self {
            info: IntrInfo::exception(exception.vector, error_code.is_some()),
            error_code: error_code.unwrap_or(0),
            instruction_length: 0,
        }
    }

    /// Injection once more of an event that IDT-vectoring information describes, with the
    /// IDT-vectoring error code and the VM-exit instruction length of the same exit. `None` where
    /// no event was being delivered.
    pub fn of_vectoring(info: IntrInfo, error_code: u32, instruction_length: u32) -> Option<Self> {
        info.valid().then(|| Self {
            // Bit 12 is undefined in IDT-vectoring information and reserved in VM entry's.
            info: info.with_nmi_unblocking(false).with_reserved(0),
            error_code,
            instruction_length,
        })
    }

    /// Writes the event to the VM-entry fields of the current VMCS.
    ///
    /// # Errors
    /// [`crate::HostError::VmWrite`].
    pub fn apply(self, host: &mut impl Vmx) -> HostResult {
        host.vmwrite(Field::ENTRY_INTR_INFO, u32::from(self.info).into())?;
        if self.info.has_error_code() {
            host.vmwrite(Field::ENTRY_EXCEPTION_ERROR, self.error_code.into())?;
        }
        if is_software(self.info.kind()) {
            host.vmwrite(Field::ENTRY_INSTRUCTION_LEN, self.instruction_length.into())?;
        }
        Ok(())
    }
}

/// Raises an exception in the guest whose VMCS is current, to be delivered at the next VM entry.
/// `vectoring` is the IDT-vectoring information of the exit that led here, not valid if none did.
///
/// [`Outcome::TripleFault`] leaves the shutdown to the caller.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
pub fn raise(
    host: &mut impl Vmx,
    vectoring: IntrInfo,
    exception: Exception,
) -> HostResult<Outcome> {
    let outcome = combine(vectoring, exception);
    // A page fault has set CR2 also where it ends in a double fault.
    if let Some(address) = exception.address {
        host.write_cr2(address);
    }
    if let Outcome::Exception(exception) = outcome {
        // Injection pushes RFLAGS as the guest-state area has it, whatever the event (SDM Vol. 3C,
        // "Details of Vectored-Event Injection").
        set_resume_flag(host, exception)?;
        let protected = host.vmread(Field::GUEST_CR0)? & CR0_PE != 0;
        Event::of_exception(exception, protected).apply(host)?;
    }
    Ok(outcome)
}

/// Makes RFLAGS in the guest-state area what an exception pushes, or an exit due to it saves: RF is 1
/// for a fault (SDM Vol. 3C, "Saving RIP, RSP, RFLAGS, and SSP").
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
pub fn set_resume_flag(host: &mut impl Vmx, exception: Exception) -> HostResult {
    if exception.is_fault() {
        let rflags = host.vmread(Field::GUEST_RFLAGS)?;
        if rflags & RFLAGS_RF == 0 {
            host.vmwrite(Field::GUEST_RFLAGS, rflags | RFLAGS_RF)?;
        }
    }
    Ok(())
}

/// Delivers the fault of an instruction of L1 that exited. Nothing else was being delivered:
/// instructions are not executed during event delivery.
///
/// # Errors
/// [`crate::HostError`] of VMREAD, VMWRITE or INVVPID.
pub fn deliver(host: &mut impl Vmx, fault: Fault) -> HostResult {
    if let Some(exception) = fault.exception() {
        if exception.address.is_some() {
            // A page fault leaves nothing cached for its address (SDM Vol. 3A, "Operations that
            // Invalidate TLBs and Paging-Structure Caches"); L0's walk knows nothing of caches.
            host.invvpid(InvVpid::Single(VPID01))?;
        }
        raise(host, IntrInfo::new(), exception)?;
    }
    Ok(())
}

/// Injects the event again that the last exit kept from being delivered, if there is one; says
/// whether there is. For exits that L0 has dealt with so that the delivery now gets further.
///
/// RFLAGS need no change: the exit has saved RF as the event would have pushed it.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
pub fn reinject(host: &mut impl Vmx) -> HostResult<bool> {
    let info = IntrInfo::from(host.vmread(Field::IDT_VECTORING_INFO)? as u32);
    if !info.valid() {
        return Ok(false);
    }
    let error_code =
        if info.has_error_code() { host.vmread(Field::IDT_VECTORING_ERROR)? as u32 } else { 0 };
    let length =
        if is_software(info.kind()) { host.vmread(Field::EXIT_INSTRUCTION_LEN)? as u32 } else { 0 };
    if info.kind() == kind::NMI {
        // An NMI that is delivered again must not find itself blocked (SDM Vol. 3C, "Checks on
        // Guest Non-Register State"); its delivery blocks the next.
        set_interruptibility(host, Interruptibility::NMI, false)?;
    }
    if let Some(event) = Event::of_vectoring(info, error_code, length) {
        event.apply(host)?;
    }
    Ok(true)
}

/// Blocks NMIs again where the exit's *NMI unblocking due to IRET* is set: the IRET that was about
/// to unblock them did not complete and is executed again (SDM Vol. 3C, "Resuming Guest Software
/// after Handling an Exception"). Not for exits with valid IDT-vectoring information, nor for a
/// double fault, where the bit is undefined.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
pub fn block_nmi_again(host: &mut impl Vmx) -> HostResult {
    set_interruptibility(host, Interruptibility::NMI, true)
}

/// The guest tries again what an EPT violation kept it from, which now gets further: an event that
/// was being delivered is injected again, an IRET that did not complete unblocks NMIs once more.
/// `unblocking` is the exit's *NMI unblocking due to IRET*.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
pub fn retry(host: &mut impl Vmx, unblocking: bool) -> HostResult {
    if !reinject(host)? && unblocking {
        block_nmi_again(host)?;
    }
    Ok(())
}

fn set_interruptibility(host: &mut impl Vmx, bits: Interruptibility, on: bool) -> HostResult {
    let old =
        Interruptibility::from_bits_retain(host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32);
    let mut new = old;
    new.set(bits, on);
    if new != old {
        host.vmwrite(Field::GUEST_INTERRUPTIBILITY, new.bits().into())?;
    }
    Ok(())
}

/// Pending debug exceptions: BS, a single step is due.
const PENDING_DEBUG_BS: u64 = 1 << 14;
/// IA32_DEBUGCTL: BTF, single-step on branches.
const DEBUGCTL_BTF: u64 = 1 << 1;

/// Ends the instruction that exited, which L0 has completed in the guest's place: RIP moves to the
/// next one, blocking by STI and by MOV SS ends, RFLAGS.RF is cleared, and a guest that
/// single-steps gets its trap.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
#[doc(alias = "skip_emulated_instruction")]
#[inline]
pub fn advance_rip(host: &mut impl Vmx) -> HostResult {
    let length = host.vmread(Field::EXIT_INSTRUCTION_LEN)? & 0xffff_ffff;
    advance_rip_by(host, length)
}

/// As [`advance_rip`], for exits that do not report the instruction's length, such as EPT violations.
///
/// # Errors
/// [`crate::HostError`] of VMREAD or VMWRITE.
#[inline]
pub fn advance_rip_by(host: &mut impl Vmx, length: u64) -> HostResult {
    let rip = host.vmread(Field::GUEST_RIP)?;
    let next = next_rip(host, rip, length)?;
    host.vmwrite(Field::GUEST_RIP, next)?;
    set_interruptibility(host, Interruptibility::STI | Interruptibility::MOV_SS, false)?;

    let rflags = host.vmread(Field::GUEST_RFLAGS)?;
    if rflags & RFLAGS_RF != 0 {
        host.vmwrite(Field::GUEST_RFLAGS, rflags & !RFLAGS_RF)?;
    }
    // SDM Vol. 3B, "Single-Step Exception Condition"; with BTF only branches step, and no
    // instruction that L0 completes is one.
    if rflags & RFLAGS_TF != 0 && host.vmread(Field::GUEST_DEBUGCTL)? & DEBUGCTL_BTF == 0 {
        let pending = host.vmread(Field::GUEST_PENDING_DEBUG)?;
        host.vmwrite(Field::GUEST_PENDING_DEBUG, pending | PENDING_DEBUG_BS)?;
    }
    Ok(())
}

/// RIP after an instruction at `rip`. Outside of 64-bit mode the instruction pointer has 32 bits;
/// the mode is only asked for where that makes a difference.
fn next_rip(host: &mut impl Vmx, rip: u64, length: u64) -> HostResult<u64> {
    let next = rip.wrapping_add(length);
    if rip >> 32 == 0 && next >> 32 != 0 && !is_64_bit(host)? {
        return Ok(next & 0xffff_ffff);
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::EFER_LMA;
    use crate::testing::TestHost;
    use vmx_defs::event::kind;

    const NONE: IntrInfo = IntrInfo::new();

    fn hardware(vector: u8) -> IntrInfo {
        IntrInfo::exception(vector, vector::has_error_code(vector))
    }

    #[test]
    fn two_exceptions_become_one_as_the_table_says() {
        let contributory = [0u8, 10, 11, 12, 13, 21];
        let page_fault = [14u8, 20];
        for first in 0..32u8 {
            for second in 0..32u8 {
                let raised = Exception::new(second);
                let (c1, c2) = (contributory.contains(&first), contributory.contains(&second));
                let (p1, p2) = (page_fault.contains(&first), page_fault.contains(&second));
                let expected = if first == 8 && (c2 || p2 || second == 8) {
                    Outcome::TripleFault
                } else if (c1 && c2) || (p1 && (c2 || p2)) {
                    Outcome::Exception(Exception { vector: 8, error_code: Some(0), address: None })
                } else {
                    Outcome::Exception(raised)
                };
                assert_eq!(combine(hardware(first), raised), expected, "{first} {second}");
                // Interrupts and INT n are benign with every vector, and so is no event.
                for kind in [
                    kind::EXTERNAL,
                    kind::NMI,
                    kind::SOFTWARE_INTERRUPT,
                    kind::PRIVILEGED_SOFTWARE_EXCEPTION,
                    kind::SOFTWARE_EXCEPTION,
                ] {
                    let other = hardware(first).with_kind(kind);
                    assert_eq!(combine(other, raised), Outcome::Exception(raised));
                }
                let invalid = hardware(first).with_valid(false);
                assert_eq!(combine(invalid, raised), Outcome::Exception(raised));
            }
        }
    }

    #[test]
    fn faults_are_injected_with_error_code_cr2_and_rf() {
        let address = Gva::new(0xffff_8000_0000_1234);
        for (fault, info, error, cr2) in [
            (Fault::Ud, 0x8000_0306, 0, 0),
            (Fault::Gp(0), 0x8000_0b0d, 0, 0),
            (Fault::Gp(0x18), 0x8000_0b0d, 0x18, 0),
            (Fault::Ss(0), 0x8000_0b0c, 0, 0),
            (Fault::Pf(PageFault { error: 3, address }), 0x8000_0b0e, 3, address.as_u64()),
        ] {
            let mut host = TestHost::new(0);
            host.set(Field::GUEST_CR0, CR0_PE);
            host.set(Field::GUEST_RFLAGS, 0x202);
            deliver(&mut host, fault).unwrap();
            assert_eq!(host.field(Field::ENTRY_INTR_INFO), info);
            assert_eq!(host.field(Field::ENTRY_EXCEPTION_ERROR), error);
            assert_eq!(host.cr2.as_u64(), cr2);
            assert_eq!(host.field(Field::GUEST_RFLAGS), 0x202 | RFLAGS_RF);
            let flushes: &[_] = if cr2 == 0 { &[] } else { &[InvVpid::Single(VPID01)] };
            assert_eq!(host.invvpids, flushes);
        }
        let mut host = TestHost::new(0);
        deliver(&mut host, Fault::Retry).unwrap();
        assert!(host.regions.is_empty(), "nothing is written");
    }

    #[test]
    fn real_mode_gets_no_error_code() {
        let mut host = TestHost::new(0);
        deliver(&mut host, Fault::Gp(0)).unwrap();
        assert_eq!(host.field(Field::ENTRY_INTR_INFO), 0x8000_030d);
    }

    #[test]
    fn traps_and_aborts_leave_rf_alone() {
        for vector in 0..22 {
            let mut host = TestHost::new(0);
            raise(&mut host, NONE, Exception::new(vector)).unwrap();
            let rf = host.field(Field::GUEST_RFLAGS) == RFLAGS_RF;
            assert_eq!(rf, ![1, 2, 3, 4, 8, 18].contains(&vector), "{vector}");
        }
    }

    #[test]
    fn a_page_fault_that_ends_in_another_event_has_set_cr2() {
        let fault =
            Exception { vector: vector::PF, error_code: Some(2), address: Some(Gva::new(0x5000)) };
        let mut host = TestHost::new(0);
        host.set(Field::GUEST_CR0, CR0_PE);
        raise(&mut host, hardware(vector::PF), fault).unwrap();
        assert_eq!(host.field(Field::ENTRY_INTR_INFO), 0x8000_0b08);
        assert_eq!(host.field(Field::ENTRY_EXCEPTION_ERROR), 0);
        assert_eq!(host.cr2, Gva::new(0x5000));

        let mut host = TestHost::new(0);
        assert_eq!(raise(&mut host, hardware(vector::DF), fault), Ok(Outcome::TripleFault));
        assert_eq!(host.cr2, Gva::new(0x5000));
        assert!(host.regions.is_empty(), "nothing is injected");
    }

    #[test]
    fn events_cut_short_are_injected_again() {
        // (vectoring information, VM-entry information, error code and length are copied)
        for (vectoring, entry, error, length) in [
            (0x8000_0020u64, 0x8000_0020, false, false),
            (0x8000_0202, 0x8000_0202, false, false),
            (0x8000_0b0e, 0x8000_0b0e, true, false),
            (0x8000_0306, 0x8000_0306, false, false),
            (0x8000_0480, 0x8000_0480, false, true),
            (0x8000_0501, 0x8000_0501, false, true),
            (0x8000_0603, 0x8000_0603, false, true),
            // Bit 12 is undefined; bits 30:13 are cleared by the processor, and here again.
            (0xffff_f020, 0x8000_0020, false, false),
        ] {
            let mut host = TestHost::new(0);
            host.set(Field::IDT_VECTORING_INFO, vectoring);
            host.set(Field::IDT_VECTORING_ERROR, 0x77);
            host.set(Field::EXIT_INSTRUCTION_LEN, 2);
            host.set(Field::GUEST_INTERRUPTIBILITY, 8);
            assert_eq!(reinject(&mut host), Ok(true));
            assert_eq!(host.field(Field::ENTRY_INTR_INFO), entry, "{vectoring:#x}");
            let copied = host.field(Field::ENTRY_EXCEPTION_ERROR);
            assert_eq!(copied, if error { 0x77 } else { 0 });
            let copied = host.field(Field::ENTRY_INSTRUCTION_LEN);
            assert_eq!(copied, if length { 2 } else { 0 });
            let nmi = entry == 0x8000_0202;
            assert_eq!(host.field(Field::GUEST_INTERRUPTIBILITY), if nmi { 0 } else { 8 });
        }
        let mut host = TestHost::new(0);
        host.set(Field::IDT_VECTORING_INFO, 0x0b0e);
        assert_eq!(reinject(&mut host), Ok(false));
        assert_eq!(host.field(Field::ENTRY_INTR_INFO), 0);
    }

    #[test]
    fn nmis_are_blocked_again_after_an_iret_that_faulted() {
        let mut host = TestHost::new(0);
        host.set(Field::GUEST_INTERRUPTIBILITY, 1);
        block_nmi_again(&mut host).unwrap();
        assert_eq!(host.field(Field::GUEST_INTERRUPTIBILITY), 9);
    }

    #[test]
    fn the_next_instruction() {
        for (long, rip, next) in [
            (false, 0x1000, 0x1003),
            (false, 0xffff, 0x1_0002),
            (false, 0xffff_ffff, 2),
            (true, 0x1000, 0x1003),
            (true, 0xffff_ffff, 0x1_0000_0002),
            (true, 0x7fff_ffff_ffff, 0x8000_0000_0002),
            (true, u64::MAX, 2),
        ] {
            let mut host = TestHost::new(0);
            if long {
                host.set(Field::GUEST_EFER, EFER_LMA);
                host.set(Field::GUEST_CS_AR, 0xa09b);
            }
            host.set(Field::GUEST_RIP, rip);
            host.set(Field::EXIT_INSTRUCTION_LEN, 3);
            advance_rip(&mut host).unwrap();
            assert_eq!(host.field(Field::GUEST_RIP), next, "{long} {rip:#x}");
        }
        // Compatibility mode has a 32-bit instruction pointer too.
        let mut host = TestHost::new(0);
        host.set(Field::GUEST_EFER, EFER_LMA);
        host.set(Field::GUEST_RIP, 0xffff_fffe);
        host.set(Field::EXIT_INSTRUCTION_LEN, 2);
        advance_rip(&mut host).unwrap();
        assert_eq!(host.field(Field::GUEST_RIP), 0);
    }

    #[test]
    fn an_instruction_that_ends_unblocks_and_single_steps() {
        for (tf, btf, pending) in
            [(false, false, 0), (true, false, 1 << 14), (true, true, 0), (false, true, 0)]
        {
            let mut host = TestHost::new(0);
            host.set(Field::GUEST_RFLAGS, 2 | RFLAGS_RF | if tf { RFLAGS_TF } else { 0 });
            host.set(Field::GUEST_DEBUGCTL, if btf { 2 } else { 0 });
            host.set(Field::GUEST_INTERRUPTIBILITY, 0xb);
            host.set(Field::GUEST_RIP, 0x1000);
            // The length of a MOV to a register in memory, which an EPT violation does not report.
            advance_rip_by(&mut host, 6).unwrap();
            assert_eq!(host.field(Field::GUEST_RIP), 0x1006);
            assert_eq!(host.field(Field::GUEST_RFLAGS), 2 | if tf { RFLAGS_TF } else { 0 });
            assert_eq!(host.field(Field::GUEST_INTERRUPTIBILITY), 8);
            assert_eq!(host.field(Field::GUEST_PENDING_DEBUG), pending);
        }
    }
}
