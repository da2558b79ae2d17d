//! How do interprocessor interrupts go out: L0's own, and those that L1 asks for?
//!
//! With one processor L1 has its local APIC to itself. With several, L0 must see when L1 resets or
//! starts a processor: an INIT that reached a processor in VMX operation would stop it from being
//! L1's. So writes to the interrupt command register exit (x2APIC: the MSR; xAPIC: writes to
//! its page are tracked, L2's too), INIT and startup are served in software, and everything else is passed on as it
//! is.

use core::sync::atomic::Ordering;

use iced_x86::{Code, Decoder, DecoderOptions, OpKind, Register};
use nvmx::Gprs;
use nvmx::guest_memory::{GuestMemory, GuestSpace};
use nvmx::host::{HostResult, L1Memory, Vmx};
use nvmx::inject;
use nvmx::insn::{is_64_bit, register, set_register};
use nvmx::paging::{Access, Paging};
use vmx_defs::{Field, Gva, msr as number};

use crate::host::Host;
use crate::msr::{self, MsrFault};
use crate::phys::{PAGE, direct};
use crate::processor::Processor;
use crate::smp;

/// The x2APIC interrupt command register.
pub(crate) const X2APIC_ICR: u32 = 0x830;
const ID: u64 = 0x20;
const X2APIC_ID: u32 = 0x802;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

/// Delivery modes (SDM "Interrupt Command Register (ICR)").
const MODE_NMI: u32 = 4 << 8;
const MODE_INIT: u32 = 5 << 8;
const MODE_STARTUP: u32 = 6 << 8;
const MODE_MASK: u32 = 7 << 8;
const LOGICAL: u32 = 1 << 11;
const PENDING: u32 = 1 << 12;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const APIC_BASE_EXTD: u64 = 1 << 10;

/// Polls before a pending interrupt is taken for sent.
const PATIENCE: u32 = 1_000_000;

/// An operation on the real local APIC of this processor, in whichever mode it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LocalApic {
    /// Registers in memory at this physical address.
    Memory(u64),
    /// Registers in MSRs.
    X2,
}

impl LocalApic {
    /// The page of L1's, which stays where firmware has put it.
    pub(crate) fn page() -> u64 {
        page_of(msr::read(number::APIC_BASE))
    }

    /// As this processor's is now.
    pub(crate) fn current() -> Self {
        let base = msr::read(number::APIC_BASE);
        if base & APIC_BASE_EXTD != 0 { Self::X2 } else { Self::Memory(page_of(base)) }
    }

    fn read(page: u64, offset: u64) -> u32 {
        // SAFETY: the local APIC's page, below 4 GiB, which the direct map reaches; reads of these
        // registers have no side effects.
        unsafe { direct::<u32>(page + offset).read_volatile() }
    }

    fn write(page: u64, offset: u64, value: u32) {
        // SAFETY: the local APIC's page, which the direct map reaches; callers write what L1 may
        // write, or L0's own interrupts.
        unsafe { direct::<u32>(page + offset).write_volatile(value) };
    }

    /// Identifier of this processor.
    pub(crate) fn identifier(self) -> u32 {
        match self {
            Self::Memory(page) => Self::read(page, ID) >> 24,
            Self::X2 => msr::read(X2APIC_ID) as u32,
        }
    }

    /// Sends what `command` says to the processor with this identifier; L1's destination field is
    /// the same afterwards.
    fn send(self, identifier: u32, command: u32) {
        match self {
            Self::Memory(page) => {
                let idle = || {
                    (0..PATIENCE).any(|_| Self::read(page, ICR_LOW) & PENDING == 0);
                };
                idle();
                let destination = Self::read(page, ICR_HIGH);
                Self::write(page, ICR_HIGH, identifier << 24);
                Self::write(page, ICR_LOW, command);
                idle();
                Self::write(page, ICR_HIGH, destination);
            }
            Self::X2 => {
                let value = u64::from(identifier) << 32 | u64::from(command);
                // SAFETY: an interprocessor interrupt to a processor that expects it.
                unsafe { msr::write(X2APIC_ICR, value) };
            }
        }
    }

    /// Resets a processor that L0 has not taken yet.
    pub(crate) fn send_init(self, identifier: u32) {
        self.send(identifier, MODE_INIT | ASSERT);
    }

    /// Starts a processor that waits for it on page number `vector`, below 1 MiB.
    pub(crate) fn send_startup(self, identifier: u32, vector: u8) {
        self.send(identifier, MODE_STARTUP | ASSERT | u32::from(vector));
    }

    /// Makes a processor look at its requests.
    pub(crate) fn kick(self, identifier: u32) {
        // A write to the x2APIC's registers waits for no store: the request must be seen first.
        core::sync::atomic::fence(Ordering::SeqCst);
        self.send(identifier, MODE_NMI | ASSERT);
    }
}

fn page_of(base: u64) -> u64 {
    base & 0x000F_FFFF_FFFF_F000
}

/// Whether an interrupt command is one that L0 serves; it then has been.
fn serve_command(own: &Processor, destination: u32, command: u32, x2apic: bool) -> bool {
    let mode = command & MODE_MASK;
    if mode != MODE_INIT && mode != MODE_STARTUP {
        return false;
    }
    // INIT level de-assert does nothing on processors since the Pentium 4.
    if mode == MODE_INIT && command & LEVEL != 0 && command & ASSERT == 0 {
        return true;
    }
    let shorthand = command >> 18 & 3;
    let broadcast = if x2apic { u32::MAX } else { 0xFF };
    let is_target = |target: &Processor| match shorthand {
        // A processor can't reset itself so.
        1 => false,
        2 | 3 => true,
        // The logical identifier of xAPIC mode is the target's own affair: nobody resets so.
        _ if command & LOGICAL != 0 => x2apic && is_logical_x2(target.identifier, destination),
        _ => destination == broadcast || destination == target.identifier,
    };
    if mode == MODE_INIT {
        smp::reset_others(own, is_target);
    } else {
        smp::start_waiting(own, (command & 0xFF) as u8, is_target);
    }
    true
}

/// Whether a logical destination names the processor (SDM "Logical Destination Mode in x2APIC
/// Mode": the cluster above, a bit for each of its 16 processors below).
fn is_logical_x2(identifier: u32, destination: u32) -> bool {
    destination >> 16 == identifier >> 4 && destination & 1 << (identifier & 15) != 0
}

/// WRMSR of L1 to the x2APIC's interrupt command register.
pub(crate) fn write_x2apic_icr(value: u64) -> Result<(), MsrFault> {
    let x2apic = msr::read(number::APIC_BASE) & APIC_BASE_EXTD != 0;
    if x2apic && serve_command(Processor::current(), (value >> 32) as u32, value as u32, true) {
        return Ok(());
    }
    // SAFETY: an interprocessor interrupt among L1's processors, none of which is INIT.
    unsafe { msr::try_write(X2APIC_ICR, value) }
}

/// Lets the decoder build its tables now: exits allocate nothing.
pub(crate) fn prepare_decoder() {
    const NOP: [u8; 1] = [0x90];
    let _ = Decoder::new(64, &NOP, DecoderOptions::NONE).decode();
}

/// What becomes of a guest's write to the xAPIC's page.
pub(crate) enum PageWrite {
    /// It is done, and the guest goes on behind the instruction.
    Done,
    /// It is none that L0 can do.
    Refused,
}

/// Does a guest's write to the local APIC at `offset` of the page; `space` says where it finds its
/// code.
pub(crate) fn write_page(
    host: &mut Host,
    gprs: &mut Gprs,
    own: &Processor,
    offset: u64,
    space: GuestSpace,
) -> HostResult<PageWrite> {
    let Some((code, len)) = fetch(host, space)? else { return Ok(PageWrite::Refused) };
    let bits = if is_64_bit(host)? {
        64
    } else if host.vmread(Field::GUEST_CS_AR)? & 1 << 14 != 0 {
        32
    } else {
        16
    };
    let bytes = code.get(..len).unwrap_or_default();
    let instruction = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    let gpr = |which: Register| (which as usize).checked_sub(Register::EAX as usize);
    let value = match instruction.code() {
        // The SDM asks for aligned 32-bit accesses, with which every register is reached.
        Code::Mov_rm32_r32 | Code::Mov_moffs32_EAX | Code::Xchg_rm32_r32 => {
            let Some(number) = gpr(instruction.op1_register()).filter(|number| *number < 16) else {
                return Ok(PageWrite::Refused);
            };
            let value = register(host, gprs, number as u8)? as u32;
            if instruction.code() == Code::Xchg_rm32_r32 {
                let old = LocalApic::read(page_of(host.apic_base), offset);
                set_register(host, gprs, number as u8, u64::from(old))?;
            }
            value
        }
        Code::Mov_rm32_imm32 if instruction.op1_kind() == OpKind::Immediate32 => {
            instruction.immediate32()
        }
        _ => return Ok(PageWrite::Refused),
    };
    if offset.is_multiple_of(16) {
        let page = page_of(host.apic_base);
        let destination = LocalApic::read(page, ICR_HIGH) >> 24;
        if offset != ICR_LOW || !serve_command(own, destination, value, false) {
            LocalApic::write(page, offset, value);
        }
    }
    inject::advance_rip_by(host, instruction.len() as u64)?;
    Ok(PageWrite::Done)
}

/// The longest instruction.
const LONGEST: usize = 15;

/// The bytes at the guest's RIP, as many as are there.
fn fetch(host: &mut Host, space: GuestSpace) -> HostResult<Option<([u8; LONGEST], usize)>> {
    let long = is_64_bit(host)?;
    let base = if long { 0 } else { host.vmread(Field::GUEST_CS_BASE)? };
    let rip = host.vmread(Field::GUEST_RIP)?;
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    let paging = Paging::read(host, host.sizes())?;
    let mut memory = GuestMemory { memory: host, space };
    let mut code = [0; LONGEST];
    let mut len = 0;
    while len < LONGEST {
        let linear = base.wrapping_add(rip).wrapping_add(len as u64) & mask;
        // The processor has just fetched from there: what it may read is enough to know.
        let access = Access::Read;
        let Ok(gpa) = paging.translate(&mut memory, Gva::new(linear), access) else { break };
        let part = ((PAGE - gpa.page_offset()) as usize).min(LONGEST - len);
        let Some(target) = code.get_mut(len..len + part) else { break };
        memory.read(gpa, target);
        len += part;
    }
    Ok((len != 0).then_some((code, len)))
}
