//! How does a processor go into VMX operation, and what does it run L1 with?
//!
//! L1 gets the machine: interrupts, ports, devices and nearly all MSRs without exits. vmcs01 asks
//! for no more than the processor demands and L0's own protection needs.

use alloc::boxed::Box;
use core::arch::x86_64::__cpuid;

use nvmx::Gprs;
use nvmx::engine;
use nvmx::host::{HostResult, Vmx};
use nvmx::shootdown::{Place, Shootdown};
use nvmx::tracking::HardwareWrites;
use vmx_defs::event::activity;
use vmx_defs::msr::{self as number, Allowed, FeatureControl, VmxBasic};
use vmx_defs::{EntryCtls, ExitCtls, Field, Hpa, L1Gpa, PinCtls, ProcCtls, ProcCtls2};
use vmx_hw::Cpu;
use x86_64::registers::control::{Cr0, Cr3, Cr4};

use crate::apic::LocalApic;
use crate::counters::Counters;
use crate::guest_cr;
use crate::guest_msr;
use crate::host::Host;
use crate::l1::Start;
use crate::machine::Machine;
use crate::msr;
use crate::multiboot::BOOTLOADER_MAGIC;
use crate::phys::{PAGE, direct};
use crate::processor::{CODE, DATA, Processor, TASK};
use crate::world;

/// L1's own VPID.
pub(crate) const VPID01: u16 = 1;

const CR0_NE: u64 = 1 << 5;
const CR4_VMXE: u64 = 1 << 13;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Access rights of segments (SDM "Guest Register State").
mod rights {
    /// 32-bit code, execute and read, accessed, 4-KByte granular.
    pub(super) const CODE32: u64 = 0xC09B;
    /// 32-bit data, read and write, accessed, 4-KByte granular.
    pub(super) const DATA32: u64 = 0xC093;
    /// Real-mode code.
    pub(super) const CODE16: u64 = 0x009B;
    /// Real-mode data.
    pub(super) const DATA16: u64 = 0x0093;
    /// Busy 32-bit TSS.
    pub(super) const TASK32: u64 = 0x008B;
    /// No segment.
    pub(super) const UNUSABLE: u64 = 1 << 16;
}

/// What a segment register holds.
#[derive(Clone, Copy, Debug)]
struct Segment {
    selector: u16,
    base: u64,
    limit: u32,
    rights: u64,
}

/// A processor of L1.
#[derive(Debug)]
pub(crate) struct Vcpu {
    /// What the engine may use of the processor.
    pub(crate) host: Host,
    /// What L0 keeps of the processor.
    pub(crate) processor: &'static Processor,
    /// What the engine keeps of the processor.
    pub(crate) engine: engine::Processor,
    /// Says when its caches have to be flushed.
    pub(crate) shootdown: &'static Shootdown,
    /// What happened on it.
    pub(crate) counters: Counters,
}

/// The frames that one processor needs for VMX.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmxFrames {
    /// VMXON region.
    pub(crate) vmxon: Hpa,
    /// vmcs01.
    pub(crate) vmcs01: Hpa,
    /// L1's MSR bitmap.
    pub(crate) msr_bitmap: Hpa,
    /// vmcs02.
    pub(crate) vmcs02: Hpa,
    /// L2's MSR bitmap.
    pub(crate) msr_bitmap02: Hpa,
    /// Stands for pages that L0 hides where the processor would write to them.
    pub(crate) scratch: Hpa,
}

/// What kept a processor out of VMX operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmxUnavailable {
    /// CPUID has no VMX.
    NoVmx,
    /// The firmware locked it off.
    LockedOff,
    /// VMXON failed.
    VmxOn,
}

impl core::fmt::Display for VmxUnavailable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NoVmx => "the processor has no VT-x",
            Self::LockedOff => "the firmware has switched VT-x off (IA32_FEATURE_CONTROL)",
            Self::VmxOn => "VMXON failed",
        })
    }
}

/// Whether this processor has VMX and its firmware lets it be used; sets IA32_FEATURE_CONTROL where
/// the firmware left it open.
pub(crate) fn check_available() -> Result<(), VmxUnavailable> {
    if __cpuid(1).ecx & 1 << 5 == 0 {
        return Err(VmxUnavailable::NoVmx);
    }
    let wanted = FeatureControl::LOCK | FeatureControl::VMXON_OUTSIDE_SMX;
    let control = FeatureControl::from_bits_retain(msr::read(number::FEATURE_CONTROL));
    if !control.contains(FeatureControl::LOCK) {
        // SAFETY: enabling VMX changes nothing that runs.
        unsafe { msr::write(number::FEATURE_CONTROL, (control | wanted).bits()) };
        return Ok(());
    }
    if control.contains(wanted) { Ok(()) } else { Err(VmxUnavailable::LockedOff) }
}

/// Brings this processor into VMX operation. The token says so.
///
/// # Errors
/// See [`VmxUnavailable`].
///
/// # Safety
/// `region` is a frame for this alone; the processor stays in VMX operation for ever.
unsafe fn enter_vmx_operation(machine: &Machine, region: Hpa) -> Result<Cpu, VmxUnavailable> {
    let hardware = &machine.hardware;
    let fixed = |value: u64, fixed0, fixed1| (value | hardware.msr(fixed0)) & hardware.msr(fixed1);
    let osxsave = if __cpuid(1).ecx & 1 << 26 != 0 { CR4_OSXSAVE } else { 0 };
    let cr0 = fixed(Cr0::read_raw(), number::VMX_CR0_FIXED0, number::VMX_CR0_FIXED1);
    let cr4 =
        fixed(Cr4::read_raw() | CR4_VMXE | osxsave, number::VMX_CR4_FIXED0, number::VMX_CR4_FIXED1);
    // SAFETY: paging, protection and SSE stay on; the added bits are those VMX operation demands,
    // and OSXSAVE, which only permits XSETBV.
    unsafe {
        Cr0::write_raw(cr0);
        Cr4::write_raw(cr4);
    }
    write_revision(machine, region);
    // SAFETY: CR0, CR4 and IA32_FEATURE_CONTROL are as VMXON wants them, the region is the
    // caller's.
    unsafe { vmx_hw::vmxon(region) }.map_err(|_| VmxUnavailable::VmxOn)?;
    // SAFETY: in root operation from here on, says the caller.
    Ok(unsafe { Cpu::new() })
}

/// Puts the processor's VMCS revision identifier into a zeroed region.
pub(crate) fn write_revision(machine: &Machine, region: Hpa) {
    let revision = VmxBasic::from(machine.hardware.msr(number::VMX_BASIC)).revision();
    // SAFETY: a frame of L0's own that no processor uses yet.
    unsafe { direct::<u32>(region.as_u64()).write_volatile(revision) };
}

impl Vcpu {
    /// Brings this processor into VMX operation with a vmcs01 that is current and complete but for
    /// L1's first state.
    ///
    /// # Safety
    /// On the processor of `processor`, once, with frames for it alone; `stack_top` is a stack that
    /// nothing else uses once L1 has been entered.
    pub(crate) unsafe fn new(
        machine: &'static Machine,
        processor: &'static Processor,
        frames: VmxFrames,
        stack_top: u64,
    ) -> Result<Box<Self>, VmxUnavailable> {
        check_available()?;
        // SAFETY: as the caller promises.
        let cpu = unsafe { enter_vmx_operation(machine, frames.vmxon)? };
        let apic_base = msr::read(number::APIC_BASE);
        let mut host = Host { cpu, machine, apic_base, memory_types_changed: false };
        write_revision(machine, frames.vmcs01);
        write_revision(machine, frames.vmcs02);
        // SAFETY: the frame is a page of L0's own for the bitmap, which no processor uses yet.
        guest_msr::fill_bitmap(unsafe { &mut *direct(frames.msr_bitmap.as_u64()) });
        let engine = set_up(&mut host, processor, frames, stack_top);
        match engine {
            Ok(engine) => Ok(Box::new(Self {
                host,
                processor,
                engine,
                shootdown: &machine.shootdown,
                counters: Counters::new(),
            })),
            Err(error) => crate::console::fail(format_args!("vmcs01: {error:?}")),
        }
    }

    /// Has L1's writes to its local APIC exit from now on, with whatever it runs.
    pub(crate) fn track_local_apic(&mut self) {
        let page = L1Gpa::new(LocalApic::page());
        let machine = self.host.machine;
        let own = self.processor.index as usize;
        let deny =
            |_: &mut Host| machine.ept01.lock().deny_writes(page.as_u64(), &machine.shootdown, own);
        let hardware = HardwareWrites::Redirect;
        if let Err(error) = machine.nested.lock().track(&mut self.host, page, hardware, deny) {
            crate::console::fail(format_args!("writes to the local APIC: {error:?}"));
        }
    }

    /// Enters L1 as the Multiboot Specification's "Machine state" says.
    ///
    /// # Safety
    /// Once, on this vcpu's processor, whose current VMCS is its vmcs01; nothing on the stack that
    /// was given to [`Self::new`] is needed any more.
    pub(crate) unsafe fn start_multiboot(mut self: Box<Self>, start: Start, stack_top: u64) -> ! {
        if let Err(error) = self.set_multiboot_state(start) {
            crate::console::fail(format_args!("vmcs01: {error:?}"));
        }
        let mut gprs = Gprs::default();
        gprs.set(nvmx::regs::RAX, u64::from(BOOTLOADER_MAGIC));
        gprs.set(nvmx::regs::RBX, u64::from(start.information));
        let processor = self.processor;
        processor.set_launch(true);
        processor.set_vcpu(Box::leak(self));
        // SAFETY: vmcs01 is complete and clear; the caller promises the rest.
        unsafe { world::first_entry(&gprs, stack_top) }
    }

    /// Enters L1 as a processor that waits for its startup interrupt.
    ///
    /// # Safety
    /// As [`Self::start_multiboot`].
    pub(crate) unsafe fn start_waiting(mut self: Box<Self>, stack_top: u64) -> ! {
        let mut gprs = Gprs::default();
        if let Err(error) = self.set_reset_state(&mut gprs) {
            crate::console::fail(format_args!("vmcs01: {error:?}"));
        }
        let processor = self.processor;
        processor.set_launch(true);
        processor.set_vcpu(Box::leak(self));
        // SAFETY: vmcs01 is complete and clear; the caller promises the rest.
        unsafe { world::first_entry(&gprs, stack_top) }
    }

    fn set_multiboot_state(&mut self, start: Start) -> HostResult {
        let code = Segment { selector: 0x08, base: 0, limit: u32::MAX, rights: rights::CODE32 };
        let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: rights::DATA32 };
        // PE and ET.
        self.set_state(code, data, 0x11, u64::from(start.entry), activity::ACTIVE)
    }

    /// The state after INIT (SDM "Processor State After Reset"), waiting for a startup interrupt.
    /// L1 is not in VMX operation.
    pub(crate) fn set_reset_state(&mut self, gprs: &mut Gprs) -> HostResult {
        let code =
            Segment { selector: 0xF000, base: 0xFFFF_0000, limit: 0xFFFF, rights: rights::CODE16 };
        let data = Segment { selector: 0, base: 0, limit: 0xFFFF, rights: rights::DATA16 };
        // INIT leaves CD and NW as they are, and L1 has its own way to set them.
        self.set_state(code, data, 0x10, 0xFFF0, activity::WAIT_FOR_SIPI)?;
        *gprs = Gprs::default();
        gprs.set(nvmx::regs::RDX, crate::smp::signature());
        self.processor.set_waiting(true);
        // Nothing of L1 runs before the startup interrupt, which is an exit.
        self.shootdown.go(self.processor.index as usize, Place::Outside);
        Ok(())
    }

    /// Starts L1's processor at `vector`, as the startup interrupt says.
    pub(crate) fn start_at(&mut self, vector: u8) -> HostResult {
        let host = &mut self.host;
        for (field, value) in [
            (Field::GUEST_CS_SELECTOR, u64::from(vector) << 8),
            (Field::GUEST_CS_BASE, u64::from(vector) << 12),
            (Field::GUEST_RIP, 0),
            (Field::GUEST_ACTIVITY, u64::from(activity::ACTIVE)),
            // Some emulators leave blocking by SMI behind.
            (Field::GUEST_INTERRUPTIBILITY, 0),
        ] {
            host.vmwrite(field, value)?;
        }
        self.shootdown.go(self.processor.index as usize, Place::Ept01);
        self.processor.set_waiting(false);
        Ok(())
    }

    /// L1's state with these segments, and everything else as after a reset.
    fn set_state(
        &mut self,
        code: Segment,
        data: Segment,
        cr0: u64,
        rip: u64,
        activity: u32,
    ) -> HostResult {
        let host = &mut self.host;
        let mut entry = EntryCtls::from_bits_retain(host.vmread(Field::ENTRY_CTLS)? as u32);
        entry.remove(EntryCtls::IA32E_MODE_GUEST);
        host.vmwrite(Field::ENTRY_CTLS, u64::from(entry.bits()))?;
        let task = Segment { selector: 0x18, base: 0, limit: 0x67, rights: rights::TASK32 };
        let none = Segment { selector: 0, base: 0, limit: 0, rights: rights::UNUSABLE };
        // The fields of the eight segments follow each other in the order ES to TR.
        for (number, segment) in [data, code, data, data, data, data, none, task].iter().enumerate()
        {
            let field = |first: Field| {
                Field::from_encoding(first.encoding() + 2 * number as u32).unwrap_or(first)
            };
            host.vmwrite(field(Field::GUEST_ES_SELECTOR), u64::from(segment.selector))?;
            host.vmwrite(field(Field::GUEST_ES_BASE), segment.base)?;
            host.vmwrite(field(Field::GUEST_ES_LIMIT), u64::from(segment.limit))?;
            host.vmwrite(field(Field::GUEST_ES_AR), segment.rights)?;
        }
        for (field, value) in [
            (Field::GUEST_GDTR_BASE, 0),
            (Field::GUEST_GDTR_LIMIT, 0),
            (Field::GUEST_IDTR_BASE, 0),
            (Field::GUEST_IDTR_LIMIT, 0),
            (Field::GUEST_CR0, cr0 | CR0_NE),
            (Field::CR0_SHADOW, cr0),
            (Field::GUEST_CR3, 0),
            (Field::GUEST_CR4, CR4_VMXE),
            (Field::CR4_SHADOW, 0),
            (Field::GUEST_DR7, 0x400),
            (Field::GUEST_RSP, 0),
            (Field::GUEST_RIP, rip),
            (Field::GUEST_RFLAGS, 2),
            (Field::GUEST_DEBUGCTL, 0),
            (Field::GUEST_PAT, msr::read(number::PAT)),
            (Field::GUEST_EFER, 0),
            (Field::ENTRY_INTR_INFO, 0),
            (Field::GUEST_SYSENTER_CS, 0),
            (Field::GUEST_SYSENTER_ESP, 0),
            (Field::GUEST_SYSENTER_EIP, 0),
            (Field::GUEST_ACTIVITY, u64::from(activity)),
            (Field::GUEST_INTERRUPTIBILITY, 0),
            (Field::GUEST_PENDING_DEBUG, 0),
        ] {
            host.vmwrite(field, value)?;
        }
        let (mask0, mask4) = guest_cr::masks(host, false);
        host.vmwrite(Field::CR0_MASK, mask0)?;
        host.vmwrite(Field::CR4_MASK, mask4)
    }
}

/// Writes all of vmcs01 that does not depend on how L1 starts, and prepares vmcs02.
fn set_up(
    host: &mut Host,
    processor: &'static Processor,
    frames: VmxFrames,
    stack_top: u64,
) -> HostResult<engine::Processor> {
    host.cpu.vmclear(frames.vmcs01)?;
    host.vmptrld(frames.vmcs01)?;

    let hardware = &host.machine.hardware;
    let adjust = |register, wanted| Allowed::from_msr(hardware.msr(register)).adjust(wanted);
    // With several processors an NMI may be one of ours. What L1 blocks are then virtual ones: else
    // its IRET would not end the blocking.
    let pin = if host.machine.is_smp {
        PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS
    } else {
        PinCtls::empty()
    };
    let pin = adjust(number::VMX_TRUE_PINBASED_CTLS, pin.bits());
    let proc = adjust(
        number::VMX_TRUE_PROCBASED_CTLS,
        (ProcCtls::MSR_BITMAPS | ProcCtls::SECONDARY_CONTROLS).bits(),
    );
    let proc2 = adjust(
        number::VMX_PROCBASED_CTLS2,
        (ProcCtls2::EPT
            | ProcCtls2::VPID
            | ProcCtls2::UNRESTRICTED_GUEST
            | ProcCtls2::RDTSCP
            | ProcCtls2::INVPCID
            | ProcCtls2::XSAVES
            | ProcCtls2::ENCLS_EXITING
            | ProcCtls2::USER_WAIT_PAUSE)
            .bits(),
    );
    let exit = adjust(
        number::VMX_TRUE_EXIT_CTLS,
        (ExitCtls::SAVE_DEBUG_CONTROLS
            | ExitCtls::HOST_ADDRESS_SPACE_SIZE
            | ExitCtls::SAVE_PAT
            | ExitCtls::LOAD_PAT
            | ExitCtls::SAVE_EFER
            | ExitCtls::LOAD_EFER)
            .bits(),
    );
    let entry = adjust(
        number::VMX_TRUE_ENTRY_CTLS,
        (EntryCtls::LOAD_DEBUG_CONTROLS | EntryCtls::LOAD_PAT | EntryCtls::LOAD_EFER).bits(),
    );
    for (field, value) in [
        (Field::PIN_CTLS, pin),
        (Field::PROC_CTLS, proc),
        (Field::PROC_CTLS2, proc2),
        (Field::EXIT_CTLS, exit),
        (Field::ENTRY_CTLS, entry),
    ] {
        host.vmwrite(field, u64::from(value))?;
    }
    let proc2 = ProcCtls2::from_bits_retain(proc2);
    if proc2.contains(ProcCtls2::ENCLS_EXITING) {
        host.vmwrite(Field::ENCLS_EXITING_BITMAP, u64::MAX)?;
    }
    if proc2.contains(ProcCtls2::XSAVES) {
        host.vmwrite(Field::XSS_EXITING_BITMAP, 0)?;
    }
    let eptp = host.machine.ept01.lock().eptp();
    for (field, value) in [
        (Field::VPID, u64::from(VPID01)),
        (Field::EPT_POINTER, eptp.into_bits()),
        (Field::MSR_BITMAP, frames.msr_bitmap.as_u64()),
        (Field::VMCS_LINK_POINTER, u64::MAX),
        (Field::EXCEPTION_BITMAP, 0),
        (Field::PF_ERROR_MASK, 0),
        (Field::PF_ERROR_MATCH, 0),
        (Field::CR3_TARGET_COUNT, 0),
        (Field::EXIT_MSR_STORE_COUNT, 0),
        (Field::EXIT_MSR_LOAD_COUNT, 0),
        (Field::ENTRY_MSR_LOAD_COUNT, 0),
        (Field::ENTRY_INTR_INFO, 0),
    ] {
        host.vmwrite(field, value)?;
    }
    set_up_host_state(host, processor, stack_top)?;
    host.cpu.vmclear(frames.vmcs02)?;
    let nested = host.machine.nested.lock();
    nested.processor(
        host,
        processor.index as usize,
        frames.vmcs01,
        frames.vmcs02,
        frames.msr_bitmap02,
        frames.scratch,
    )
}

/// Writes the host-state area, the same for vmcs01 and vmcs02: what L0 runs with.
pub(crate) fn set_up_host_state(
    host: &mut impl Vmx,
    processor: &'static Processor,
    stack_top: u64,
) -> HostResult {
    for field in [Field::HOST_ES_SELECTOR, Field::HOST_SS_SELECTOR, Field::HOST_DS_SELECTOR] {
        host.vmwrite(field, u64::from(DATA))?;
    }
    for (field, value) in [
        (Field::HOST_CS_SELECTOR, u64::from(CODE)),
        (Field::HOST_FS_SELECTOR, 0),
        (Field::HOST_GS_SELECTOR, 0),
        (Field::HOST_TR_SELECTOR, u64::from(TASK)),
        (Field::HOST_FS_BASE, 0),
        (Field::HOST_GS_BASE, &raw const *processor as u64),
        (Field::HOST_TR_BASE, processor.task_base()),
        (Field::HOST_GDTR_BASE, processor.gdt_base()),
        (Field::HOST_IDTR_BASE, crate::trap::idt_base()),
        (Field::HOST_CR0, Cr0::read_raw()),
        (Field::HOST_CR3, Cr3::read_raw().0.start_address().as_u64()),
        (Field::HOST_CR4, Cr4::read_raw()),
        (Field::HOST_PAT, msr::read(number::PAT)),
        (Field::HOST_EFER, msr::read(number::EFER)),
        (Field::HOST_SYSENTER_CS, 0),
        (Field::HOST_SYSENTER_ESP, 0),
        (Field::HOST_SYSENTER_EIP, 0),
        (Field::HOST_RSP, stack_top),
        (Field::HOST_RIP, world::exit_address()),
    ] {
        host.vmwrite(field, value)?;
    }
    Ok(())
}

/// Frames for one processor, out of L0's memory.
pub(crate) fn take_frames(region: &mut crate::region::Region) -> VmxFrames {
    let start = region.take_frames(6);
    let frame = |n: u64| Hpa::new(start + n * PAGE);
    VmxFrames {
        vmxon: frame(0),
        vmcs01: frame(1),
        msr_bitmap: frame(2),
        vmcs02: frame(3),
        msr_bitmap02: frame(4),
        scratch: frame(5),
    }
}
