//! What does each instruction do, and when does it exit?
//!
//! All instructions but those of VMX itself. SDM Vol. 2 for what they do; Vol. 3C, "Instructions
//! That Cause VM Exits Unconditionally", "Instructions That Cause VM Exits Conditionally" and
//! "Changes to Instruction Behavior in VMX Non-Root Operation" for a guest. Faults due to privilege
//! come before exits ("Relative Priority of Faults and VM Exits").

use vmx_defs::controls::{ProcCtls, ProcCtls2};
use vmx_defs::event::{activity, kind, vector};
use vmx_defs::exit::{CrAccess, IoAccess};
use vmx_defs::{ExitReason, Field, Gva};

use crate::addr::is_canonical;
use crate::caps::LINEAR_WIDTH;
use crate::memory::Memory;
use crate::operation::{DISPLACEMENT, Operation};
use crate::paging::Kind;
use crate::processor::{Outcome, Processor, VmxMode};
use crate::registers::{Segment, cr0, cr4, efer, gpr, rflags, segment};
use crate::stop::{Event, Exception, ExitInfo, Flow, Stop, exit, fault};

/// Bit 63 of a value for CR3 with PCIDs: nothing is invalidated.
const CR3_NO_FLUSH: u64 = 1 << 63;

impl Processor {
    /// Executes an operation. `Some` is an outcome that already is complete (a VM entry); `None` is
    /// an instruction that RIP has to pass.
    pub(crate) fn dispatch(
        &mut self,
        memory: &mut Memory,
        operation: &Operation,
    ) -> Flow<Option<Outcome>> {
        match *operation {
            Operation::Load { at, size } => {
                let access = self.access(Kind::Read);
                let value = self.read_linear(memory, at, size, access)?;
                self.regs.gprs[gpr::RAX] = value;
            }
            Operation::Store { at, size, value } => {
                let access = self.access(Kind::Write);
                self.write_linear(memory, at, size, value, access)?;
            }
            Operation::Fetch { at } => {
                let access = self.access(Kind::Fetch);
                let value = self.read_linear(memory, at, 1, access)?;
                self.regs.gprs[gpr::RAX] = value;
            }
            Operation::MovToCr { register, value } => {
                self.privileged()?;
                self.mov_to_cr(memory, register, value)?;
            }
            Operation::MovFromCr { register } => {
                self.privileged()?;
                self.regs.gprs[gpr::RAX] = self.mov_from_cr(register)?;
            }
            Operation::Clts => {
                self.privileged()?;
                self.clts()?;
            }
            Operation::MovToDr7(value) => {
                self.privileged()?;
                self.dr_exit(false)?;
                if value >> 32 != 0 {
                    return fault(Exception::GP);
                }
                self.regs.dr7 = value & 0xffff_27ff | 0x400;
            }
            Operation::MovFromDr7 => {
                self.privileged()?;
                self.dr_exit(true)?;
                self.regs.gprs[gpr::RAX] = self.regs.dr7;
            }
            Operation::Invlpg { at } => {
                self.privileged()?;
                let qualified = ExitInfo::qualified(ExitReason::INVLPG, at);
                self.exit_if(operation, ProcCtls::INVLPG_EXITING, qualified)?;
                // An address that is not canonical is no error, and maps nothing.
                if is_canonical(at, LINEAR_WIDTH) {
                    let space = self.space();
                    self.caches.invlpg(space.vpid, space.pcid, self.linear(at)?);
                }
            }
            Operation::Invpcid { kind, descriptor } => {
                self.invpcid(memory, operation, kind, descriptor)?;
            }
            Operation::Cpuid { leaf, .. } => {
                if self.mode == VmxMode::NonRoot {
                    return exit(self.instruction_exit(operation, ExitReason::CPUID));
                }
                let answer = self.cpuid(leaf);
                let registers = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX];
                for (number, value) in registers.into_iter().zip(answer) {
                    self.regs.gprs[number] = value.into();
                }
            }
            Operation::Rdmsr(index) => {
                self.privileged()?;
                if self.msr_exits(memory, index, false) {
                    return exit(self.instruction_exit(operation, ExitReason::RDMSR));
                }
                let value = self.read_msr(index).ok_or(Exception::GP)?;
                self.set_edx_eax(value);
            }
            Operation::Wrmsr { index, value } => {
                self.privileged()?;
                if self.msr_exits(memory, index, true) {
                    return exit(self.instruction_exit(operation, ExitReason::WRMSR));
                }
                if !self.write_msr(index, value) {
                    return fault(Exception::GP);
                }
            }
            Operation::In { port, size } => {
                self.io(memory, operation, port, size, true)?;
                let ones = u64::from(u32::MAX) >> (32 - 8 * u32::from(size));
                self.regs.gprs[gpr::RAX] = ones;
            }
            Operation::Out { port, size, .. } => self.io(memory, operation, port, size, false)?,
            Operation::Rdtsc => {
                let info = ExitInfo::new(ExitReason::RDTSC);
                self.exit_if(operation, ProcCtls::RDTSC_EXITING, info)?;
                self.set_edx_eax(self.guest_tsc());
            }
            Operation::Rdtscp => {
                if !self.guest_has(ProcCtls2::RDTSCP) {
                    return fault(Exception::UD);
                }
                let info = ExitInfo::new(ExitReason::RDTSCP);
                self.exit_if(operation, ProcCtls::RDTSC_EXITING, info)?;
                self.set_edx_eax(self.guest_tsc());
                self.regs.gprs[gpr::RCX] = self.regs.tsc_aux;
            }
            Operation::Hlt => {
                self.privileged()?;
                let info = ExitInfo::new(ExitReason::HLT);
                self.exit_if(operation, ProcCtls::HLT_EXITING, info)?;
                self.activity = activity::HLT;
            }
            Operation::Pause => {
                let info = ExitInfo::new(ExitReason::PAUSE);
                self.exit_if(operation, ProcCtls::PAUSE_EXITING, info)?;
            }
            Operation::Invd => {
                self.privileged()?;
                self.always_exits(operation, ExitReason::INVD)?;
            }
            Operation::Wbinvd => {
                self.privileged()?;
                let wanted =
                    |vmcs: &crate::vmcs::Vmcs| vmcs.proc2().contains(ProcCtls2::WBINVD_EXITING);
                if self.guest_vmcs().is_some_and(wanted) {
                    return exit(self.instruction_exit(operation, ExitReason::WBINVD));
                }
            }
            Operation::Xsetbv => {
                // Outside of a guest it needs CR4.OSXSAVE, which is not there.
                if self.regs.cr4 >> 18 & 1 == 0 {
                    return fault(Exception::UD);
                }
                self.privileged()?;
                self.always_exits(operation, ExitReason::XSETBV)?;
            }
            Operation::Int(number) => {
                let length = operation.length();
                let event = Event::software(kind::SOFTWARE_INTERRUPT, number, length);
                return Err(Stop::Software(event));
            }
            Operation::Int3 => {
                let length = operation.length();
                let event = Event::software(kind::SOFTWARE_EXCEPTION, vector::BP, length);
                return Err(Stop::Software(event));
            }
            Operation::Ud2 => return fault(Exception::UD),
            Operation::SetFlags(flags) => {
                let writable = 0x0024_0fd5;
                self.regs.rflags = self.regs.rflags & !writable | flags & writable;
            }
            Operation::SetPrivilege(level) => self.set_privilege(level & 3),
            _ => return self.vmx_instruction(memory, operation),
        }
        Ok(None)
    }

    /// #GP(0) unless at CPL 0.
    pub(crate) fn privileged(&self) -> Flow {
        if self.regs.cpl() > 0 { fault(Exception::GP) } else { Ok(()) }
    }

    /// The exit of an instruction, with its length and the information that it has.
    pub(crate) fn instruction_exit(&self, operation: &Operation, reason: ExitReason) -> ExitInfo {
        let memory = operation.memory_operand().is_some();
        ExitInfo {
            length: Some(operation.length()),
            instruction_info: operation.information(self.regs.is_64bit()),
            ..ExitInfo::qualified(reason, if memory { DISPLACEMENT } else { 0 })
        }
    }

    /// Exits if a guest executes the instruction.
    pub(crate) fn always_exits(&self, operation: &Operation, reason: ExitReason) -> Flow {
        if self.mode == VmxMode::NonRoot {
            return exit(self.instruction_exit(operation, reason));
        }
        Ok(())
    }

    /// Exits if a guest executes the instruction with this control set.
    fn exit_if(&self, operation: &Operation, control: ProcCtls, info: ExitInfo) -> Flow {
        match self.guest_vmcs() {
            Some(vmcs) if vmcs.proc().contains(control) => {
                exit(ExitInfo { length: Some(operation.length()), ..info })
            }
            _ => Ok(()),
        }
    }

    /// Whether an instruction that a guest has only with this control is there.
    fn guest_has(&self, control: ProcCtls2) -> bool {
        self.guest_vmcs().is_none_or(|vmcs| vmcs.proc2().contains(control))
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.regs.gprs[gpr::RAX] = value & 0xffff_ffff;
        self.regs.gprs[gpr::RDX] = value >> 32;
    }

    fn guest_tsc(&self) -> u64 {
        match self.guest_vmcs() {
            Some(vmcs) if vmcs.proc().contains(ProcCtls::TSC_OFFSETTING) => {
                self.tsc.wrapping_add(vmcs.get(Field::TSC_OFFSET))
            }
            _ => self.tsc,
        }
    }

    fn set_privilege(&mut self, level: u8) {
        if self.regs.cr0 & cr0::PE == 0 {
            // Real-address mode has no levels.
            return;
        }
        for number in [segment::CS, segment::SS] {
            let register = &mut self.regs.segments[number];
            register.selector = register.selector & !3 | u16::from(level);
            register.rights = register.rights & !0x60 | u32::from(level) << 5;
        }
        // Segments that the level may not use become null.
        for number in [segment::ES, segment::DS, segment::FS, segment::GS] {
            let register = &mut self.regs.segments[number];
            if register.dpl() < level {
                *register = Segment { selector: 0, rights: Segment::UNUSABLE, ..*register };
            }
        }
    }

    fn io(
        &mut self,
        memory: &mut Memory,
        operation: &Operation,
        port: u16,
        size: u8,
        is_in: bool,
    ) -> Flow {
        // IOPL and the TSS's permission map: IOPL is 0 unless software set it.
        let level = (self.regs.rflags >> 12 & 3) as u8;
        if self.regs.cpl() > level {
            return fault(Exception::GP);
        }
        if self.io_exits(memory, port, size) {
            let access =
                IoAccess::new().with_size_minus_1(size - 1).with_is_in(is_in).with_port(port);
            let info = ExitInfo::qualified(ExitReason::IO_INSTRUCTION, access.into_bits());
            return exit(ExitInfo { length: Some(operation.length()), ..info });
        }
        Ok(())
    }

    /// CPUID of a processor that has what the model implements. (SDM Vol. 2A, "CPUID".)
    /// What CPUID answers in EAX, EBX, ECX and EDX; no leaf has more than one part.
    pub fn cpuid(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            0 => [
                7,
                u32::from_le_bytes(*b"vmxm"),
                u32::from_le_bytes(*b"sing"),
                u32::from_le_bytes(*b"odel"),
            ],
            // PCID and VMX; PSE, MSR, PAE, SEP, PGE, PAT, PSE-36.
            1 => [0x0006_0000, 0, 1 << 17 | 1 << 5, 0x0003_2868],
            // SMEP, INVPCID and SMAP.
            7 => [0, 1 << 7 | 1 << 10 | 1 << 20, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            // SYSCALL, NX, 1-GByte pages, RDTSCP, Intel 64.
            0x8000_0001 => [0, 0, 0, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29],
            0x8000_0008 => {
                [u32::from(LINEAR_WIDTH) << 8 | u32::from(self.caps.physical_width), 0, 0, 0]
            }
            _ => [0; 4],
        }
    }

    fn dr_exit(&self, from: bool) -> Flow {
        match self.guest_vmcs() {
            Some(vmcs) if vmcs.proc().contains(ProcCtls::MOV_DR_EXITING) => {
                let qualification = 7 | if from { 1 << 4 } else { 0 };
                let info = ExitInfo::qualified(ExitReason::MOV_DR, qualification);
                exit(ExitInfo { length: Some(3), ..info })
            }
            _ => Ok(()),
        }
    }

    fn cr_exit<T>(&self, register: u8, access: u8, length: u32) -> Flow<T> {
        let access =
            CrAccess::new().with_register(register).with_access(access).with_gpr(gpr::RAX as u8);
        let info = ExitInfo::qualified(ExitReason::CR_ACCESS, access.into_bits());
        exit(ExitInfo { length: Some(length), ..info })
    }

    fn mov_from_cr(&self, register: u8) -> Flow<u64> {
        const FROM: u8 = 1;
        let shadowed = |value: u64, mask: Field, shadow: Field| match self.guest_vmcs() {
            Some(vmcs) => value & !vmcs.get(mask) | vmcs.get(shadow) & vmcs.get(mask),
            None => value,
        };
        let guest_proc = self.guest_vmcs().map(|vmcs| vmcs.proc()).unwrap_or_default();
        Ok(match register {
            0 => shadowed(self.regs.cr0, Field::CR0_MASK, Field::CR0_SHADOW),
            2 => self.regs.cr2,
            3 if guest_proc.contains(ProcCtls::CR3_STORE_EXITING) => {
                return self.cr_exit(3, FROM, 3);
            }
            3 => self.regs.cr3,
            4 => shadowed(self.regs.cr4, Field::CR4_MASK, Field::CR4_SHADOW),
            8 if guest_proc.contains(ProcCtls::CR8_STORE_EXITING) => {
                return self.cr_exit(8, FROM, 3);
            }
            8 => self.regs.cr8,
            _ => return fault(Exception::UD),
        })
    }

    fn mov_to_cr(&mut self, memory: &mut Memory, register: u8, value: u64) -> Flow {
        const TO: u8 = 0;
        let value = if self.regs.is_64bit() { value } else { value & 0xffff_ffff };
        let guest_proc = self.guest_vmcs().map(|vmcs| vmcs.proc()).unwrap_or_default();
        match register {
            0 => {
                let Some(value) =
                    self.unmasked(Field::CR0_MASK, Field::CR0_SHADOW, value, self.regs.cr0)
                else {
                    return self.cr_exit(0, TO, 3);
                };
                self.set_cr0(memory, value)
            }
            3 => {
                if guest_proc.contains(ProcCtls::CR3_LOAD_EXITING) && !self.is_cr3_target(value) {
                    return self.cr_exit(3, TO, 3);
                }
                self.set_cr3(memory, value)
            }
            4 => {
                let Some(value) =
                    self.unmasked(Field::CR4_MASK, Field::CR4_SHADOW, value, self.regs.cr4)
                else {
                    return self.cr_exit(4, TO, 3);
                };
                self.set_cr4(memory, value)
            }
            8 => {
                if guest_proc.contains(ProcCtls::CR8_LOAD_EXITING) {
                    return self.cr_exit(8, TO, 3);
                }
                if value >> 4 != 0 {
                    return fault(Exception::GP);
                }
                self.regs.cr8 = value;
                Ok(())
            }
            _ => fault(Exception::UD),
        }
    }

    /// The value that a guest's MOV to CR0 or CR4 gives the register: bits of the guest/host mask
    /// stay. `None` is an exit, where one of those would differ from the read shadow (SDM Vol. 3C,
    /// "Guest/Host Masks and Read Shadows for CR0 and CR4").
    fn unmasked(&self, mask: Field, shadow: Field, value: u64, current: u64) -> Option<u64> {
        let Some(vmcs) = self.guest_vmcs() else { return Some(value) };
        let mask = vmcs.get(mask);
        if (value ^ vmcs.get(shadow)) & mask != 0 {
            return None;
        }
        Some(value & !mask | current & mask)
    }

    fn is_cr3_target(&self, value: u64) -> bool {
        let Some(vmcs) = self.guest_vmcs() else { return false };
        let targets =
            [Field::CR3_TARGET0, Field::CR3_TARGET1, Field::CR3_TARGET2, Field::CR3_TARGET3];
        let count = vmcs.get(Field::CR3_TARGET_COUNT) as usize;
        targets.iter().take(count).any(|field| vmcs.get(*field) == value)
    }

    fn clts(&mut self) -> Flow {
        const CLTS: u8 = 2;
        if let Some(vmcs) = self.guest_vmcs()
            && vmcs.get(Field::CR0_MASK) & cr0::TS != 0
        {
            if vmcs.get(Field::CR0_SHADOW) & cr0::TS != 0 {
                let access = CrAccess::new().with_access(CLTS);
                let info = ExitInfo::qualified(ExitReason::CR_ACCESS, access.into_bits());
                return exit(ExitInfo { length: Some(2), ..info });
            }
            return Ok(());
        }
        self.regs.cr0 &= !cr0::TS;
        Ok(())
    }

    /// Bits of CR0 that VMX operation fixes now; an unrestricted guest chooses PE and PG.
    fn cr0_fixed0(&self) -> u64 {
        let free = match self.guest_vmcs() {
            Some(vmcs) if vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST) => cr0::PE | cr0::PG,
            _ => 0,
        };
        if self.mode == VmxMode::Off { 0 } else { self.caps.cr0_fixed0 & !free }
    }

    /// MOV to CR0 (SDM Vol. 2B, "MOV—Move to/from Control Registers").
    fn set_cr0(&mut self, memory: &mut Memory, value: u64) -> Flow {
        let old = self.regs.cr0;
        let value = value & (cr0::DEFINED | !0xffff_ffff) | cr0::ET;
        let (paging, was_paging) = (value & cr0::PG != 0, old & cr0::PG != 0);
        let long = self.regs.efer & efer::LME != 0;
        let bad = value >> 32 != 0
            || paging && value & cr0::PE == 0
            || value & cr0::NW != 0 && value & cr0::CD == 0
            || value & self.cr0_fixed0() != self.cr0_fixed0()
            || !paging && self.regs.cr4 & cr4::PCIDE != 0
            || !paging && self.regs.is_64bit()
            || paging && !was_paging && long && self.regs.cr4 & cr4::PAE == 0
            || paging
                && !was_paging
                && long
                && self.regs.segments[segment::CS].rights & Segment::LONG != 0;
        if bad {
            return fault(Exception::GP);
        }
        // IA-32e mode goes with paging.
        let mut efer = self.regs.efer & !efer::LMA;
        if paging && long {
            efer |= efer::LMA;
        }
        let pae = paging && self.regs.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
        if pae && (value ^ old) & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.regs.pdptes = self.load_pdptes(memory, self.regs.cr3)?;
        }
        if was_paging && !paging {
            let vpid = self.space().vpid;
            self.caches.all_contexts(vpid);
        }
        self.regs.cr0 = value;
        self.regs.efer = efer;
        Ok(())
    }

    /// MOV to CR3.
    fn set_cr3(&mut self, memory: &mut Memory, value: u64) -> Flow {
        let pcids = self.regs.cr4 & cr4::PCIDE != 0;
        let keeps = pcids && value & CR3_NO_FLUSH != 0;
        let value = if pcids { value & !CR3_NO_FLUSH } else { value };
        if value >> self.caps.physical_width != 0 && self.regs.is_64bit() {
            return fault(Exception::GP);
        }
        if self.regs.is_pae() {
            self.regs.pdptes = self.load_pdptes(memory, value)?;
        }
        self.regs.cr3 = value;
        if !keeps {
            let space = self.space();
            self.caches.mov_to_cr3(space.vpid, space.pcid);
        }
        Ok(())
    }

    /// MOV to CR4.
    fn set_cr4(&mut self, memory: &mut Memory, value: u64) -> Flow {
        let old = self.regs.cr4;
        let changed = old ^ value;
        let set = changed & value;
        let fixed0 = if self.mode == VmxMode::Off { 0 } else { self.caps.cr4_fixed0 };
        let bad = value & !(self.caps.cr4_fixed1 | cr4::VMXE) != 0
            || value & fixed0 != fixed0
            || self.regs.is_ia32e() && value & cr4::PAE == 0
            || set & cr4::PCIDE != 0 && (!self.regs.is_ia32e() || self.regs.cr3 & 0xfff != 0);
        if bad {
            return fault(Exception::GP);
        }
        let pae = self.regs.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !self.regs.is_ia32e();
        if pae && changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0 {
            self.regs.pdptes = self.load_pdptes(memory, self.regs.cr3)?;
        }
        let space = self.space();
        if changed & cr4::PGE != 0 || changed & old & cr4::PCIDE != 0 {
            self.caches.all_contexts(space.vpid);
        } else if changed & cr4::PAE != 0 || set & cr4::SMEP != 0 {
            self.caches.mov_to_cr4(space.vpid, space.pcid);
        }
        self.regs.cr4 = value;
        Ok(())
    }

    /// INVPCID (SDM Vol. 2A).
    fn invpcid(
        &mut self,
        memory: &mut Memory,
        operation: &Operation,
        kind: u64,
        descriptor: u64,
    ) -> Flow {
        if !self.guest_has(ProcCtls2::INVPCID) {
            return fault(Exception::UD);
        }
        self.privileged()?;
        if let Some(vmcs) = self.guest_vmcs()
            && vmcs.proc().contains(ProcCtls::INVLPG_EXITING)
        {
            return exit(self.instruction_exit(operation, ExitReason::INVPCID));
        }
        let access = self.access(Kind::Read);
        let low = self.read_linear(memory, descriptor, 8, access)?;
        let address = self.read_linear(memory, descriptor.wrapping_add(8), 8, access)?;
        let pcid = low as u16 & 0xfff;
        let pcids = self.regs.cr4 & cr4::PCIDE != 0;
        let kind = if self.regs.is_64bit() { kind } else { kind & 0xffff_ffff };
        let bad = kind > 3
            || low >> 12 != 0
            || kind < 2 && pcid != 0 && !pcids
            || kind == 0 && !is_canonical(address, LINEAR_WIDTH);
        if bad {
            return fault(Exception::GP);
        }
        let vpid = self.space().vpid;
        match kind {
            0 => self.caches.invpcid_address(vpid, pcid, Gva::new(address)),
            1 => self.caches.invpcid_context(vpid, pcid),
            2 => self.caches.all_contexts(vpid),
            _ => self.caches.invpcid_all_but_globals(vpid),
        }
        Ok(())
    }
}

/// CF and ZF as VMX instructions leave them.
pub(crate) fn vmx_flags(flags: u64, result: u64) -> u64 {
    flags & !rflags::ARITHMETIC | result
}
