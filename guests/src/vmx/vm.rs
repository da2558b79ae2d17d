//! Answers: how is an L2 set up, run and scripted?

use core::arch::asm;

use vmx_defs::{
    EntryCtls, ExitCtls, ExitReason, Field, L2Gpa, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls, msr,
};
use vmx_hw::VmFail;
use x86_64::registers::control::{Cr0, Cr3, Cr4};

use super::{
    Ept, Exit, Mode, Op, Outcome, Paging, Vmx, enter, rdmsr, vmclear,
    vmcs::{self, change, write},
    vmptrld,
};
use crate::{
    ensure_eq, gdt,
    memory::Page,
    skip,
    suite::{Ctx, Stop},
    traps,
};

/// L2's general registers, but RSP, which is a VMCS field.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// R8 to R15.
    pub r8: [u64; 8],
    /// What the host-RSP field holds.
    pub(super) host_rsp: u64,
}

/// An L2 with its VMCS, which is current after [`new`](Self::new).
pub struct Vm {
    /// The VMCS region.
    pub vmcs: Page,
    /// L2's registers.
    pub registers: Registers,
    /// Whether VMLAUNCH has succeeded since the last VMCLEAR.
    pub launched: bool,
    /// L2's page tables.
    pub paging: Paging,
    /// L2's EPT: the first GiB one to one.
    pub ept: Ept,
}

const UNUSABLE: u64 = 1 << 16;

impl Vm {
    /// A new L2 in `mode` at CPL 0, with EPT and without VPID, all exceptions exiting. Skips the
    /// case where there is no EPT.
    pub fn new(ctx: &mut Ctx<'_>, vmx: &Vmx, mode: Mode) -> Result<Self, Stop> {
        let vmcs = vmx.region(ctx);
        Self::over(ctx, vmx, mode, vmcs)
    }

    /// The same in a VMCS region that was used before, whatever it holds now. Every field that
    /// matters to an L2 with these controls is written.
    pub fn over(ctx: &mut Ctx<'_>, vmx: &Vmx, mode: Mode, vmcs: Page) -> Result<Self, Stop> {
        if !vmx.caps.has2(ProcCtls2::EPT) {
            skip!("no EPT");
        }
        ensure_eq!(vmclear(vmcs), Ok(()), "VMCLEAR");
        ensure_eq!(vmptrld(vmcs), Ok(()), "VMPTRLD");
        let paging = Paging::new(ctx.arena, mode);
        let ept = Ept::identity(ctx.arena, vmx.caps.ept);
        let stack = ctx.arena.page().address() + 4096 - 64;
        let mut vm = Self { vmcs, registers: Registers::default(), launched: false, paging, ept };
        vm.set_controls(vmx);
        vm.set_host();
        vm.set_guest(stack);
        write(Field::EPT_POINTER, ept.eptp(false));
        Ok(vm)
    }

    fn set_controls(&mut self, vmx: &Vmx) {
        let caps = &vmx.caps;
        let long = self.paging.mode == Mode::Long;
        let entry = EntryCtls::LOAD_EFER
            | if long { EntryCtls::IA32E_MODE_GUEST } else { EntryCtls::empty() };
        let exit = ExitCtls::HOST_ADDRESS_SPACE_SIZE | ExitCtls::LOAD_EFER | ExitCtls::SAVE_EFER;
        let proc = ProcCtls::SECONDARY_CONTROLS;
        write(Field::PIN_CTLS, caps.pin.adjust(PinCtls::empty().bits()).into());
        write(Field::PROC_CTLS, caps.proc.adjust(proc.bits()).into());
        write(Field::PROC_CTLS2, caps.proc2.adjust(ProcCtls2::EPT.bits()).into());
        write(Field::EXIT_CTLS, caps.exit.adjust(exit.bits()).into());
        write(Field::ENTRY_CTLS, caps.entry.adjust(entry.bits()).into());
        write(Field::EXCEPTION_BITMAP, 0xFFFF_FFFF);
        for zero in [
            Field::PF_ERROR_MASK,
            Field::PF_ERROR_MATCH,
            Field::CR3_TARGET_COUNT,
            Field::EXIT_MSR_STORE_COUNT,
            Field::EXIT_MSR_LOAD_COUNT,
            Field::ENTRY_MSR_LOAD_COUNT,
            Field::ENTRY_INTR_INFO,
            Field::ENTRY_EXCEPTION_ERROR,
            Field::ENTRY_INSTRUCTION_LEN,
            Field::CR0_MASK,
            Field::CR4_MASK,
            Field::CR0_SHADOW,
            Field::CR4_SHADOW,
        ] {
            write(zero, 0);
        }
    }

    fn set_host(&mut self) {
        write(Field::HOST_CR0, Cr0::read_raw());
        write(Field::HOST_CR3, Cr3::read_raw().0.start_address().as_u64());
        write(Field::HOST_CR4, Cr4::read_raw());
        write(Field::HOST_CS_SELECTOR, gdt::CODE64.into());
        for data in [Field::HOST_SS_SELECTOR, Field::HOST_DS_SELECTOR, Field::HOST_ES_SELECTOR] {
            write(data, gdt::DATA.into());
        }
        for null in [
            Field::HOST_FS_SELECTOR,
            Field::HOST_GS_SELECTOR,
            Field::HOST_FS_BASE,
            Field::HOST_GS_BASE,
            Field::HOST_SYSENTER_CS,
            Field::HOST_SYSENTER_ESP,
            Field::HOST_SYSENTER_EIP,
        ] {
            write(null, 0);
        }
        write(Field::HOST_TR_SELECTOR, gdt::TSS.into());
        write(Field::HOST_TR_BASE, gdt::task_base());
        write(Field::HOST_GDTR_BASE, gdt::table_base());
        write(Field::HOST_IDTR_BASE, traps::table_base());
        write(Field::HOST_EFER, rdmsr(msr::EFER));
        write(Field::HOST_RIP, enter::exit_address());
        self.registers.host_rsp = 0;
    }

    fn set_guest(&mut self, stack: u64) {
        let long = self.paging.mode == Mode::Long;
        write(Field::VMCS_LINK_POINTER, !0);
        write(Field::GUEST_CR0, Cr0::read_raw());
        write(Field::GUEST_CR4, Cr4::read_raw());
        write(Field::GUEST_CR3, self.paging.cr3);
        let efer = rdmsr(msr::EFER);
        write(Field::GUEST_EFER, if long { efer } else { efer & !0x500 });
        if !long {
            self.load_pdptes();
        }
        let code = if long { gdt::CODE64 } else { gdt::CODE32 };
        write(Field::GUEST_CS_SELECTOR, code.into());
        write(Field::GUEST_CS_AR, if long { 0xA09B } else { 0xC09B });
        write(Field::GUEST_CS_BASE, 0);
        write(Field::GUEST_CS_LIMIT, 0xFFFF_FFFF);
        for (selector, rights, base, limit) in [
            (
                Field::GUEST_SS_SELECTOR,
                Field::GUEST_SS_AR,
                Field::GUEST_SS_BASE,
                Field::GUEST_SS_LIMIT,
            ),
            (
                Field::GUEST_DS_SELECTOR,
                Field::GUEST_DS_AR,
                Field::GUEST_DS_BASE,
                Field::GUEST_DS_LIMIT,
            ),
            (
                Field::GUEST_ES_SELECTOR,
                Field::GUEST_ES_AR,
                Field::GUEST_ES_BASE,
                Field::GUEST_ES_LIMIT,
            ),
            (
                Field::GUEST_FS_SELECTOR,
                Field::GUEST_FS_AR,
                Field::GUEST_FS_BASE,
                Field::GUEST_FS_LIMIT,
            ),
            (
                Field::GUEST_GS_SELECTOR,
                Field::GUEST_GS_AR,
                Field::GUEST_GS_BASE,
                Field::GUEST_GS_LIMIT,
            ),
        ] {
            write(selector, gdt::DATA.into());
            write(rights, 0xC093);
            write(base, 0);
            write(limit, 0xFFFF_FFFF);
        }
        write(Field::GUEST_LDTR_SELECTOR, 0);
        write(Field::GUEST_LDTR_AR, UNUSABLE);
        write(Field::GUEST_LDTR_BASE, 0);
        write(Field::GUEST_LDTR_LIMIT, 0);
        write(Field::GUEST_TR_SELECTOR, gdt::TSS.into());
        write(Field::GUEST_TR_AR, 0x8B);
        write(Field::GUEST_TR_BASE, gdt::task_base());
        write(Field::GUEST_TR_LIMIT, 0x67);
        write(Field::GUEST_GDTR_BASE, gdt::table_base());
        write(Field::GUEST_GDTR_LIMIT, gdt::table_limit().into());
        write(Field::GUEST_IDTR_BASE, 0);
        write(Field::GUEST_IDTR_LIMIT, 0);
        write(Field::GUEST_DR7, 0x400);
        write(Field::GUEST_RSP, stack);
        write(Field::GUEST_RIP, Op::Nothing.address(self.paging.mode));
        write(Field::GUEST_RFLAGS, 2);
        for zero in [
            Field::GUEST_PENDING_DEBUG,
            Field::GUEST_INTERRUPTIBILITY,
            Field::GUEST_ACTIVITY,
            Field::GUEST_DEBUGCTL,
            Field::GUEST_SYSENTER_CS,
            Field::GUEST_SYSENTER_ESP,
            Field::GUEST_SYSENTER_EIP,
        ] {
            write(zero, 0);
        }
    }

    /// Sets the PDPTE fields from the table that L2's CR3 points to, as software that sets up PAE
    /// paging for an L2 with EPT must (SDM Vol. 3C, "Loading Page-Directory-Pointer-Table Entries").
    pub fn load_pdptes(&self) {
        for (index, field) in PDPTES.into_iter().enumerate() {
            write(field, self.paging.root.read(index));
        }
    }

    /// Makes this VM's VMCS the current one.
    pub fn make_current(&self) -> Result<(), Stop> {
        ensure_eq!(vmptrld(self.vmcs), Ok(()), "VMPTRLD");
        Ok(())
    }

    /// Enables secondary controls, or skips the case where the processor does not offer them.
    pub fn enable(&self, vmx: &Vmx, controls: ProcCtls2) -> Result<(), Stop> {
        if !vmx.caps.has2(controls) {
            skip!("secondary controls {controls:?} not offered");
        }
        change(Field::PROC_CTLS2, controls.bits().into(), 0);
        Ok(())
    }

    /// Runs L2 with this VPID.
    pub fn enable_vpid(&self, vmx: &Vmx, vpid: u16) -> Result<(), Stop> {
        self.enable(vmx, ProcCtls2::VPID)?;
        write(Field::VPID, vpid.into());
        Ok(())
    }

    /// Enables VMFUNC leaf 0 with this EPTP list, or skips the case.
    pub fn enable_eptp_switching(&self, vmx: &Vmx, list: Page) -> Result<(), Stop> {
        if !vmx.caps.eptp_switching() {
            skip!("EPTP switching not offered");
        }
        self.enable(vmx, ProcCtls2::VM_FUNCTIONS)?;
        write(Field::VM_FUNCTION_CONTROLS, VmFuncCtls::EPTP_SWITCHING.bits());
        write(Field::EPTP_LIST_ADDRESS, list.address());
        Ok(())
    }

    /// Enters L2 and returns after the next exit, or the failure.
    pub fn run(&mut self) -> Outcome {
        match self.enter() {
            0 => {
                let exit = Exit::read();
                // A VM-entry failure does not launch the VMCS.
                self.launched |= !exit.reason.is_entry_failure();
                Outcome::Exit(exit)
            }
            1 => Outcome::VmFail(VmFail::Invalid, 0),
            _ => Outcome::VmFail(VmFail::Valid, vmcs::read(Field::VM_INSTRUCTION_ERROR)),
        }
    }

    /// Enters L2 and reads nothing afterwards: 0 after an exit, as [`run`](Self::run) else. The
    /// caller keeps [`launched`](Self::launched).
    #[inline(always)]
    pub fn enter(&mut self) -> u64 {
        // SAFETY: `set_host` gave the VMCS this program's host state. The programs of L2 touch
        // the pages that cases give them.
        unsafe { enter::enter(&mut self.registers, self.launched) }
    }

    /// Has L2 execute a program; an end other than that program's VMCALL is the error.
    pub fn exec(&mut self, op: Op) -> Result<(), Outcome> {
        let start = op.address(self.paging.mode);
        self.exec_at(start)?;
        Ok(())
    }

    /// Has L2 execute from `start` to the next VMCALL, whose RIP is the result.
    pub fn exec_at(&mut self, start: u64) -> Result<u64, Outcome> {
        write(Field::GUEST_RIP, start);
        match self.run() {
            Outcome::Exit(exit) if exit.reason == ExitReason::VMCALL => Ok(exit.rip),
            other => Err(other),
        }
    }

    /// Goes on after the instruction that exited, up to the next exit.
    pub fn resume_after(&mut self, exit: &Exit) -> Outcome {
        write(Field::GUEST_RIP, exit.rip + exit.length);
        self.run()
    }

    /// L2 reads at `address`: 64 bits in 64-bit mode, 32 in 32-bit mode.
    pub fn load(&mut self, address: u64) -> Result<u64, Outcome> {
        self.registers.rbx = address;
        self.exec(Op::Load)?;
        Ok(self.registers.rax)
    }

    /// L2 writes `value` at `address`.
    pub fn store(&mut self, address: u64, value: u64) -> Result<(), Outcome> {
        self.registers.rbx = address;
        self.registers.rax = value;
        self.exec(Op::Store)
    }

    /// L2 jumps to `address`, where a VMCALL is.
    pub fn fetch(&mut self, address: u64) -> Result<(), Outcome> {
        self.registers.rbx = address;
        self.exec(Op::Fetch)
    }

    /// L2 executes VMFUNC with these values of RAX and RCX.
    pub fn vmfunc(&mut self, rax: u64, rcx: u64) -> Result<(), Outcome> {
        self.registers.rax = rax;
        self.registers.rcx = rcx;
        self.exec(Op::Vmfunc)
    }

    /// L2 writes its CR3.
    pub fn load_cr3(&mut self, value: u64) -> Result<(), Outcome> {
        self.registers.rax = value;
        self.exec(Op::LoadCr3)
    }

    /// Maps `gpa` to `page` in L2's EPT, everything allowed.
    pub fn map(&self, ctx: &mut Ctx<'_>, gpa: L2Gpa, page: Page) -> super::ept::Slot {
        self.ept.map(ctx.arena, gpa, 1, page.address() | super::ept::LEAF)
    }
}

/// The four PDPTE fields.
pub const PDPTES: [Field; 4] =
    [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];

/// The time-stamp counter. In Bochs, with one processor and no rate set, differences are counts of
/// instructions.
pub fn instructions() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe {
        asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}
