//! Answers: how does a case execute a VMX instruction with any operand, at any privilege level?
//!
//! Instructions are written into a page of code, with the memory operand at RDI and the register
//! operands in RCX and RAX. The same bytes run in L1 at CPL 0 or 3, and in L2.

use core::arch::asm;

use vmx_defs::ExitReason;

use crate::{
    gdt,
    memory::{PAGE, Page},
    suite::Ctx,
    traps::{Fault, catch},
};

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// Its mnemonic.
    pub name: &'static str,
    /// Its encoding in 64-bit mode.
    pub bytes: &'static [u8],
    /// Why L2 exits when it executes it.
    pub reason: ExitReason,
}

macro_rules! instructions {
    ($($(#[$doc:meta])* $name:ident = [$($byte:literal),*], $reason:ident;)*) => {
        $(
            $(#[$doc])*
            pub const $name: Raw = Raw {
                name: stringify!($name),
                bytes: &[$($byte),*],
                reason: ExitReason::$reason,
            };
        )*
    };
}

instructions! {
    /// VMXON with the address at RDI.
    VMXON = [0xF3, 0x0F, 0xC7, 0x37], VMXON;
    /// VMXOFF.
    VMXOFF = [0x0F, 0x01, 0xC4], VMXOFF;
    /// VMCLEAR with the address at RDI.
    VMCLEAR = [0x66, 0x0F, 0xC7, 0x37], VMCLEAR;
    /// VMPTRLD with the address at RDI.
    VMPTRLD = [0x0F, 0xC7, 0x37], VMPTRLD;
    /// VMPTRST to RDI.
    VMPTRST = [0x0F, 0xC7, 0x3F], VMPTRST;
    /// VMREAD of field RCX to RAX.
    VMREAD = [0x0F, 0x78, 0xC8], VMREAD;
    /// VMREAD of field RCX to memory at RDI.
    VMREAD_MEMORY = [0x0F, 0x78, 0x0F], VMREAD;
    /// VMWRITE of RAX to field RCX.
    VMWRITE = [0x0F, 0x79, 0xC8], VMWRITE;
    /// VMWRITE of memory at RDI to field RCX.
    VMWRITE_MEMORY = [0x0F, 0x79, 0x0F], VMWRITE;
    /// VMLAUNCH. In L1 only for cases in which it fails.
    VMLAUNCH = [0x0F, 0x01, 0xC2], VMLAUNCH;
    /// VMRESUME. In L1 only for cases in which it fails.
    VMRESUME = [0x0F, 0x01, 0xC3], VMRESUME;
    /// VMCALL.
    VMCALL = [0x0F, 0x01, 0xC1], VMCALL;
    /// INVEPT of type RCX with the descriptor at RDI.
    INVEPT = [0x66, 0x0F, 0x38, 0x80, 0x0F], INVEPT;
    /// INVVPID of type RCX with the descriptor at RDI.
    INVVPID = [0x66, 0x0F, 0x38, 0x81, 0x0F], INVVPID;
    /// VMFUNC.
    VMFUNC = [0x0F, 0x01, 0xD4], VMFUNC;
    /// CPUID.
    CPUID = [0x0F, 0xA2], CPUID;
    /// INVD.
    INVD = [0x0F, 0x08], INVD;
    /// XSETBV.
    XSETBV = [0x0F, 0x01, 0xD1], XSETBV;
}

/// The register operands.
#[derive(Clone, Copy, Default, Debug)]
pub struct Operands {
    /// RDI: address of the memory operand.
    pub rdi: u64,
    /// RCX.
    pub rcx: u64,
    /// RAX, which VMREAD changes.
    pub rax: u64,
}

/// How a VMX instruction tells what came of it ("Conventions" of the VMX instruction reference).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flags {
    /// The six flags clear.
    Succeed,
    /// CF set, the other five clear.
    FailInvalid,
    /// ZF set, the other five clear.
    FailValid,
    /// None of these: RFLAGS.
    Other(u64),
}

/// CF, PF, AF, ZF, SF and OF.
const ALL_FLAGS: u64 = 0x8D5;

/// Code in a page of its own.
#[derive(Clone, Copy)]
pub struct Code {
    page: Page,
}

impl Code {
    /// The instruction, then RET for [`run`](Self::run).
    pub fn new(ctx: &mut Ctx<'_>, raw: &Raw) -> Self {
        Self::with_end(ctx, raw, &[0xC3])
    }

    /// The instruction, then a division by zero for [`run_user`](Self::run_user).
    pub fn user(ctx: &mut Ctx<'_>, raw: &Raw) -> Self {
        Self::with_end(ctx, raw, &[0x31, 0xC9, 0xF7, 0xF1])
    }

    /// The instruction, then VMCALL, for L2.
    pub fn l2(ctx: &mut Ctx<'_>, raw: &Raw) -> Self {
        Self::with_end(ctx, raw, VMCALL.bytes)
    }

    fn with_end(ctx: &mut Ctx<'_>, raw: &Raw, end: &[u8]) -> Self {
        let page = ctx.arena.page();
        page.put(0, raw.bytes);
        page.put(raw.bytes.len(), end);
        Self { page }
    }

    /// Where the instruction is.
    pub fn address(&self) -> u64 {
        self.page.address()
    }

    /// Executes it at CPL 0, with the six flags set before. The result has RAX, too.
    pub fn run(&self, operands: Operands) -> Result<(Flags, u64), Fault> {
        let (code, mut rax, mut flags) = (self.address(), operands.rax, ALL_FLAGS | 2);
        catch(|| {
            // SAFETY: the code is one instruction and RET; it changes RAX, flags and VMX state,
            // or its memory operand, which the case chose; a fault is caught.
            unsafe {
                asm!(
                    "push {flags}",
                    "popfq",
                    "call {code}",
                    "pushfq",
                    "pop {flags}",
                    code = in(reg) code,
                    flags = inout(reg) flags,
                    inout("rax") rax,
                    in("rcx") operands.rcx,
                    in("rdi") operands.rdi,
                );
            }
            let result = match flags & ALL_FLAGS {
                0 => Flags::Succeed,
                0x1 => Flags::FailInvalid,
                0x40 => Flags::FailValid,
                _ => Flags::Other(flags),
            };
            (result, rax)
        })
    }

    /// Executes it at CPL 3 and gives the fault; a fault of vector 0 means that it had none.
    pub fn run_user(&self, ctx: &mut Ctx<'_>, operands: Operands) -> Option<Fault> {
        let stack = ctx.arena.page().address() + PAGE - 64;
        let code = self.address();
        // SAFETY: the code ends in a fault at the latest, which is caught on the stack of CPL 0.
        catch(|| unsafe {
            asm!(
                "push {data}",
                "push {stack}",
                "push 2",
                "push {code_segment}",
                "push {code}",
                "iretq",
                data = in(reg) u64::from(gdt::USER_DATA),
                code_segment = in(reg) u64::from(gdt::USER_CODE64),
                stack = in(reg) stack,
                code = in(reg) code,
                in("rax") operands.rax,
                in("rcx") operands.rcx,
                in("rdi") operands.rdi,
            );
        })
        .err()
    }
}
