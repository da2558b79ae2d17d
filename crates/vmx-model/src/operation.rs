//! What can software do in one step?
//!
//! Operations stand for instructions. They keep the architecture's operands: values go through the
//! general registers that the instruction would name, so that a hypervisor that emulates one after
//! a VM exit finds its operands where the exit says they are, and puts results where the operation's
//! [`value`](Operation::value) is then read. Loading the operands into the registers is part of the
//! operation.

use vmx_defs::exit::InstructionInfo;

use crate::registers::{gpr, segment};

/// A step of software. Addresses are linear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reads `size` bytes (1, 2, 4 or 8) into RAX.
    Load {
        /// Where.
        at: u64,
        /// How many bytes.
        size: u8,
    },
    /// Writes the low `size` bytes (1, 2, 4 or 8) of RAX.
    Store {
        /// Where.
        at: u64,
        /// How many bytes.
        size: u8,
        /// What.
        value: u64,
    },
    /// Fetches code: one byte, which becomes the value.
    Fetch {
        /// Where.
        at: u64,
    },
    /// MOV to CR0, CR3, CR4 or CR8 from RAX.
    MovToCr {
        /// The number of the register.
        register: u8,
        /// The value.
        value: u64,
    },
    /// MOV from CR0, CR2, CR3, CR4 or CR8 to RAX.
    MovFromCr {
        /// The number of the register.
        register: u8,
    },
    /// CLTS.
    Clts,
    /// MOV to DR7 from RAX.
    MovToDr7(u64),
    /// MOV from DR7 to RAX.
    MovFromDr7,
    /// INVLPG.
    Invlpg {
        /// The linear address.
        at: u64,
    },
    /// INVPCID with its type in RCX and its descriptor in memory.
    Invpcid {
        /// The type.
        kind: u64,
        /// Where the descriptor is.
        descriptor: u64,
    },
    /// CPUID with EAX and ECX. The value is EAX in its low half and EBX in the high one.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// RDMSR of the MSR in ECX.
    Rdmsr(u32),
    /// WRMSR to the MSR in ECX.
    Wrmsr {
        /// The MSR.
        index: u32,
        /// The value, in EDX:EAX.
        value: u64,
    },
    /// IN from the port in DX.
    In {
        /// The port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
    },
    /// OUT to the port in DX.
    Out {
        /// The port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// The value, in EAX.
        value: u32,
    },
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// HLT.
    Hlt,
    /// PAUSE.
    Pause,
    /// INVD.
    Invd,
    /// WBINVD.
    Wbinvd,
    /// XSETBV of XCR0, which has only x87 state here.
    Xsetbv,
    /// INT *n*.
    Int(u8),
    /// INT3.
    Int3,
    /// UD2.
    Ud2,
    /// Sets RFLAGS, as CLI, STI, STAC, CLAC and POPF do; reserved bits and VM stay.
    SetFlags(u64),
    /// Goes to another privilege level: CS and SS get this DPL and RPL. No memory is accessed.
    SetPrivilege(u8),

    /// VMCALL.
    Vmcall,
    /// VMFUNC with the function in RAX and, for function 0, the list index in RCX.
    Vmfunc {
        /// RAX.
        rax: u64,
        /// RCX.
        rcx: u64,
    },
    /// VMXON.
    Vmxon {
        /// Where the m64 operand is.
        operand: u64,
    },
    /// VMXOFF.
    Vmxoff,
    /// VMCLEAR.
    Vmclear {
        /// Where the m64 operand is.
        operand: u64,
    },
    /// VMPTRLD.
    Vmptrld {
        /// Where the m64 operand is.
        operand: u64,
    },
    /// VMPTRST.
    Vmptrst {
        /// Where the m64 operand is.
        operand: u64,
    },
    /// VMREAD of the field whose encoding is in RCX, into RAX.
    Vmread {
        /// The encoding.
        encoding: u64,
    },
    /// VMREAD of the field whose encoding is in RCX, into memory.
    VmreadMemory {
        /// The encoding.
        encoding: u64,
        /// Where to.
        operand: u64,
    },
    /// VMWRITE to the field whose encoding is in RCX, from RAX.
    Vmwrite {
        /// The encoding.
        encoding: u64,
        /// The value.
        value: u64,
    },
    /// VMWRITE to the field whose encoding is in RCX, from memory.
    VmwriteMemory {
        /// The encoding.
        encoding: u64,
        /// Where from.
        operand: u64,
    },
    /// VMLAUNCH.
    Vmlaunch,
    /// VMRESUME.
    Vmresume,
    /// INVEPT with its type in RCX.
    Invept {
        /// The type.
        kind: u64,
        /// Where the descriptor is.
        descriptor: u64,
    },
    /// INVVPID with its type in RCX.
    Invvpid {
        /// The type.
        kind: u64,
        /// Where the descriptor is.
        descriptor: u64,
    },
}

/// Memory operands are addressed by RBX and this displacement.
pub(crate) const DISPLACEMENT: u64 = 8;

/// What a VMREAD that fails leaves in its destination register, since that is not written.
const UNREAD: u64 = 0x5a5a_0bad_f1e1_d5a5;

impl Operation {
    /// The linear address of the memory operand of a VMX instruction or INVPCID.
    pub(crate) fn memory_operand(&self) -> Option<u64> {
        match *self {
            Self::Invpcid { descriptor, .. }
            | Self::Invept { descriptor, .. }
            | Self::Invvpid { descriptor, .. } => Some(descriptor),
            Self::Vmxon { operand }
            | Self::Vmclear { operand }
            | Self::Vmptrld { operand }
            | Self::Vmptrst { operand }
            | Self::VmreadMemory { operand, .. }
            | Self::VmwriteMemory { operand, .. } => Some(operand),
            _ => None,
        }
    }

    /// Puts the operands into their registers.
    pub fn load_registers(&self, gprs: &mut [u64; 16]) {
        if let Some(operand) = self.memory_operand() {
            gprs[gpr::RBX] = operand.wrapping_sub(DISPLACEMENT);
        }
        match *self {
            Self::Store { value, .. } | Self::MovToCr { value, .. } | Self::MovToDr7(value) => {
                gprs[gpr::RAX] = value;
            }
            Self::Invpcid { kind, .. } | Self::Invept { kind, .. } | Self::Invvpid { kind, .. } => {
                gprs[gpr::RCX] = kind;
            }
            Self::Cpuid { leaf, subleaf } => {
                gprs[gpr::RAX] = leaf.into();
                gprs[gpr::RCX] = subleaf.into();
            }
            Self::Rdmsr(index) => gprs[gpr::RCX] = index.into(),
            Self::Wrmsr { index, value } => {
                gprs[gpr::RCX] = index.into();
                gprs[gpr::RAX] = value & 0xffff_ffff;
                gprs[gpr::RDX] = value >> 32;
            }
            Self::In { port, .. } => gprs[gpr::RDX] = port.into(),
            Self::Out { port, value, .. } => {
                gprs[gpr::RDX] = port.into();
                gprs[gpr::RAX] = value.into();
            }
            Self::Xsetbv => {
                gprs[gpr::RCX] = 0;
                gprs[gpr::RAX] = 1;
                gprs[gpr::RDX] = 0;
            }
            Self::Vmfunc { rax, rcx } => {
                gprs[gpr::RAX] = rax;
                gprs[gpr::RCX] = rcx;
            }
            Self::Vmread { encoding } => {
                gprs[gpr::RCX] = encoding;
                // What it finds there if it fails: not what RDTSC may have left, which is no one's
                // promise.
                gprs[gpr::RAX] = UNREAD;
            }
            Self::VmreadMemory { encoding, .. } | Self::VmwriteMemory { encoding, .. } => {
                gprs[gpr::RCX] = encoding;
            }
            Self::Vmwrite { encoding, value } => {
                gprs[gpr::RCX] = encoding;
                gprs[gpr::RAX] = value;
            }
            _ => {}
        }
    }

    /// The result, from the registers after the operation; 0 where it has none.
    pub fn value(&self, gprs: &[u64; 16]) -> u64 {
        let low = |number: usize| gprs[number] & 0xffff_ffff;
        match self {
            Self::Load { .. }
            | Self::Fetch { .. }
            | Self::MovFromCr { .. }
            | Self::MovFromDr7
            | Self::In { .. }
            | Self::Vmread { .. } => gprs[gpr::RAX],
            Self::Rdmsr(_) | Self::Rdtsc | Self::Rdtscp => low(gpr::RAX) | low(gpr::RDX) << 32,
            Self::Cpuid { .. } => low(gpr::RAX) | low(gpr::RBX) << 32,
            _ => 0,
        }
    }

    /// Whether the operation is an access to memory and nothing else.
    pub fn is_access(&self) -> bool {
        matches!(self, Self::Load { .. } | Self::Store { .. } | Self::Fetch { .. })
    }

    /// Whether the operation ends in VMsucceed or VMfail.
    pub fn is_vmx(&self) -> bool {
        matches!(
            self,
            Self::Vmxon { .. }
                | Self::Vmxoff
                | Self::Vmclear { .. }
                | Self::Vmptrld { .. }
                | Self::Vmptrst { .. }
                | Self::Vmread { .. }
                | Self::VmreadMemory { .. }
                | Self::Vmwrite { .. }
                | Self::VmwriteMemory { .. }
                | Self::Vmlaunch
                | Self::Vmresume
                | Self::Vmcall
                | Self::Invept { .. }
                | Self::Invvpid { .. }
        )
    }

    /// Length of the instruction in bytes.
    pub fn length(&self) -> u32 {
        match self {
            Self::Pause | Self::Cpuid { .. } | Self::Rdmsr(_) | Self::Wrmsr { .. } => 2,
            Self::Clts | Self::Rdtsc | Self::Invd | Self::Wbinvd | Self::Ud2 | Self::Int(_) => 2,
            Self::In { size: 2, .. } | Self::Out { size: 2, .. } => 2,
            Self::In { .. } | Self::Out { .. } | Self::Hlt | Self::Int3 | Self::SetFlags(_) => 1,
            Self::Load { size: 2, .. } | Self::Store { size: 2, .. } => 3,
            Self::Load { .. } | Self::Store { .. } | Self::Fetch { .. } => 2,
            Self::SetPrivilege(_) => 2,
            Self::MovToCr { .. } | Self::MovFromCr { .. } => 3,
            Self::MovToDr7(_) | Self::MovFromDr7 | Self::Invlpg { .. } => 3,
            Self::Rdtscp | Self::Xsetbv | Self::Vmcall | Self::Vmfunc { .. } => 3,
            Self::Vmxoff | Self::Vmlaunch | Self::Vmresume => 3,
            Self::Vmread { .. } | Self::Vmwrite { .. } => 3,
            Self::Vmptrld { .. } | Self::Vmptrst { .. } => 4,
            Self::VmreadMemory { .. } | Self::VmwriteMemory { .. } => 4,
            Self::Vmxon { .. } | Self::Vmclear { .. } => 5,
            Self::Invpcid { .. } | Self::Invept { .. } | Self::Invvpid { .. } => 6,
        }
    }

    /// The VM-exit instruction-information field (SDM Vol. 3C, "Information for VM Exits Due to
    /// Instruction Execution"), of instructions that have it.
    pub(crate) fn information(&self, long: bool) -> Option<u32> {
        let address_size = if long { 2 } else { 1 };
        let memory = InstructionInfo::new()
            .with_address_size(address_size)
            .with_segment(segment::DS as u8)
            .with_index_invalid(true)
            .with_base(gpr::RBX as u8);
        let reg2 = gpr::RCX as u8;
        let register = InstructionInfo::new().with_is_register(true).with_reg2(reg2);
        Some(u32::from(match self {
            Self::Vmread { .. } | Self::Vmwrite { .. } => register.with_reg1(gpr::RAX as u8),
            Self::VmreadMemory { .. }
            | Self::VmwriteMemory { .. }
            | Self::Invpcid { .. }
            | Self::Invept { .. }
            | Self::Invvpid { .. } => memory.with_reg2(reg2),
            _ if self.memory_operand().is_some() => memory,
            _ => return None,
        }))
    }
}
