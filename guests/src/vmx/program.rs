//! Answers: what does L2 execute?
//!
//! Short programs in this image, one for 64-bit mode and one for 32-bit mode each, that do one
//! thing and then VMCALL. L1 sets RIP and the registers before each, so that a case scripts L2 step
//! by step.

use core::arch::global_asm;

use super::paging::Mode;

macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident: $long:literal, $pae:literal;)*) => {
        /// A program of L2. Registers are named as in 64-bit mode.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Op {
            $($(#[$doc])* $name,)*
        }

        global_asm!(
            ".text",
            $(
                ".balign 16",
                concat!("l2_long_", stringify!($name), ":"),
                $long,
                "vmcall",
                ".code32",
                ".balign 16",
                concat!("l2_pae_", stringify!($name), ":"),
                $pae,
                "vmcall",
                ".code64",
            )*
            ".section .rodata.l2_programs, \"a\"",
            ".balign 8",
            "l2_programs:",
            $(
                concat!(".quad l2_long_", stringify!($name)),
                concat!(".quad l2_pae_", stringify!($name)),
            )*
            ".text",
        );

        const PROGRAMS: usize = [$(Op::$name),*].len();
    };
}

programs! {
    /// Nothing.
    Nothing: "", "";
    /// RAX = memory at RBX.
    Load: "mov rax, [rbx]", "mov eax, [ebx]";
    /// Memory at RBX = RAX.
    Store: "mov [rbx], rax", "mov [ebx], eax";
    /// Jumps to RBX, where a VMCALL should be.
    Fetch: "jmp rbx", "jmp ebx";
    /// VMFUNC.
    Vmfunc: "vmfunc", "vmfunc";
    /// VMFUNC with a prefix that has no effect, four bytes long.
    VmfuncPrefixed: ".byte 0x48; vmfunc", ".byte 0x2E; vmfunc";
    /// VMFUNC, then RDX = memory at RBX.
    VmfuncLoad: "vmfunc; mov rdx, [rbx]", "vmfunc; mov edx, [ebx]";
    /// RDX = memory at RBX, then memory at RSI = RDI, VMFUNC, and R8 (EBP in 32-bit mode) = memory
    /// at RBX again.
    EditVmfuncLoad:
        "mov rdx, [rbx]; mov [rsi], rdi; vmfunc; mov r8, [rbx]",
        "mov edx, [ebx]; mov [esi], edi; vmfunc; mov ebp, [ebx]";
    /// For ECX = 0 .. RDI: VMFUNC with EAX = 0, then the word number ECX (of 8 bytes) at RSI =
    /// memory at RBX.
    Rotate:
        "xor ecx, ecx
        2: xor eax, eax
        vmfunc
        mov rdx, [rbx]
        mov [rsi + rcx * 8], rdx
        inc ecx
        cmp ecx, edi
        jb 2b",
        "xor ecx, ecx
        2: xor eax, eax
        vmfunc
        mov edx, [ebx]
        mov [esi + ecx * 8], edx
        inc ecx
        cmp ecx, edi
        jb 2b";
    /// The same with stores: memory at RBX = the word number ECX at RSI.
    RotateStore:
        "xor ecx, ecx
        2: xor eax, eax
        vmfunc
        mov rdx, [rsi + rcx * 8]
        mov [rbx], rdx
        inc ecx
        cmp ecx, edi
        jb 2b",
        "xor ecx, ecx
        2: xor eax, eax
        vmfunc
        mov edx, [esi + ecx * 8]
        mov [ebx], edx
        inc ecx
        cmp ecx, edi
        jb 2b";
    /// MOV to CR3 from RAX.
    LoadCr3: "mov cr3, rax", "mov cr3, eax";
    /// INVLPG of RBX.
    Invlpg: "invlpg [rbx]", "invlpg [ebx]";
    /// CPUID.
    Cpuid: "cpuid", "cpuid";
    /// HLT.
    Hlt: "hlt", "hlt";
    /// UD2.
    Ud2: "ud2", "ud2";
    /// RDTSC.
    Rdtsc: "rdtsc", "rdtsc";
    /// RDMSR.
    Rdmsr: "rdmsr", "rdmsr";
    /// WRMSR.
    Wrmsr: "wrmsr", "wrmsr";
    /// OUT of AL to DX.
    Out: "out dx, al", "out dx, al";
    /// IN from DX to AL.
    In: "in al, dx", "in al, dx";
    /// XSETBV.
    Xsetbv: "xsetbv", "xsetbv";
    /// MOV to CR0 from RAX.
    LoadCr0: "mov cr0, rax", "mov cr0, eax";
    /// RAX = CR0.
    StoreCr0: "mov rax, cr0", "mov eax, cr0";
    /// MOV to CR4 from RAX.
    LoadCr4: "mov cr4, rax", "mov cr4, eax";
    /// RAX = CR4.
    StoreCr4: "mov rax, cr4", "mov eax, cr4";
    /// RAX = CR3.
    StoreCr3: "mov rax, cr3", "mov eax, cr3";
    /// Goes to CPL 3 in 64-bit mode (RBX is the stack there) and executes VMFUNC, then VMCALL.
    UserVmfunc:
        "push 0x23
        push rbx
        push 0x2
        push 0x2B
        lea rdx, [rip + 2f]
        push rdx
        iretq
        2: vmfunc",
        "ud2";
    /// RDI times VMCALL, then one more.
    Vmcalls:
        "2: vmcall
        dec rdi
        jnz 2b",
        "2: vmcall
        dec edi
        jnz 2b";
    /// Switches and loads in rotation over a power of two of views, five instructions each: RCX's
    /// upper half counts down (VMFUNC ignores it), its lower half up; RSI is 1 - 2^32, RDI the mask
    /// that wraps the lower half; RBP sums what was read at RBX. RAX becomes the time.
    Measure:
        "rdtsc
        shl rdx, 32
        or rax, rdx
        mov r8, rax
        xor eax, eax
        2: vmfunc
        add rbp, [rbx]
        add rcx, rsi
        and rcx, rdi
        jnz 2b
        rdtsc
        shl rdx, 32
        or rax, rdx
        sub rax, r8",
        "ud2";
    /// Switches and loads from view RSI down to 0, RDI times: four instructions each, and three a
    /// rotation. RBP sums what was read at RBX. RAX becomes the time.
    MeasureAny:
        "rdtsc
        shl rdx, 32
        or rax, rdx
        mov r8, rax
        xor eax, eax
        3: mov ecx, esi
        2: vmfunc
        add rbp, [rbx]
        dec ecx
        jns 2b
        dec edi
        jnz 3b
        rdtsc
        shl rdx, 32
        or rax, rdx
        sub rax, r8",
        "ud2";
}

unsafe extern "C" {
    static l2_programs: [[u64; 2]; PROGRAMS];
}

impl Op {
    /// Where the program begins, in the mode's variant.
    pub fn address(self, mode: Mode) -> u64 {
        // SAFETY: the table has an entry for each program; it is never written.
        let variants = unsafe { l2_programs[self as usize] };
        variants[usize::from(mode == Mode::Pae)]
    }
}
