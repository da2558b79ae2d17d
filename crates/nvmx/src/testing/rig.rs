//! How does a test run the engine as a host would: L1's instructions and L2's exits, one call each?
//!
//! A [`Rig`] is a virtual machine with L1 in 64-bit mode on identity-mapped memory, and a set of
//! VMCS values that make a VM entry. The processor is a script: a test says what the exit was.

use super::TestHost;
use crate::caps::tests::rich_caps;
use crate::check::tests::valid;
use crate::engine::{Config, Handled, Nested, Processor, VmfuncMode};
use crate::host::L1Memory;
use crate::paging::AddressSizes;
use crate::regs::{Gprs, RAX, RBX};
use crate::vmcs12::Vmcs12;
use alloc::vec::Vec;
use vmx_defs::event::IntrInfo;
use vmx_defs::exit::InstructionInfo;
use vmx_defs::field::{FIELDS, Kind};
use vmx_defs::{Eptp, ExitReason, Field, Hpa, L1Gpa, VmInstructionError};

/// Where L1 keeps what; each has a page.
pub const IO_BITMAP_A: u64 = 0x1000;
/// The second I/O bitmap.
pub const IO_BITMAP_B: u64 = 0x2000;
/// The MSR bitmap.
pub const MSR_BITMAP: u64 = 0x3000;
/// The virtual-APIC page.
pub const VIRTUAL_APIC: u64 = 0x4000;
/// The PML4 table of the EPT.
pub const EPT: u64 = 0x6000;
/// The EPTP list.
pub const LIST: u64 = 0x7000;
/// MSR-store area of VM exit.
pub const EXIT_STORE: u64 = 0x8000;
/// MSR-load area of VM exit.
pub const EXIT_LOAD: u64 = 0x9000;
/// MSR-load area of VM entry.
pub const ENTRY_LOAD: u64 = 0xa000;
/// The memory operand of L1's instructions.
pub const OPERAND: u64 = 0xb000;
/// A VMXON region.
pub const VMXON: u64 = 0xc000;
/// L1's page tables, as HOST_CR3 says.
pub const PAGING: u64 = 0x1_0000;
/// The first of L1's VMCS regions; the others follow.
pub const VMCS: u64 = 0x4_0000;

/// Where L1 is.
pub const RIP: u64 = 0x20_0000;
/// Where L1's VMCS says that it goes on after an exit.
pub const HOST_RIP: u64 = 0x30_0000;

/// How an instruction of L1 ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// VMsucceed.
    Succeed,
    /// VMfailInvalid.
    FailInvalid,
    /// VMfailValid with this number.
    Fail(VmInstructionError),
    /// Nothing changed but that this exception is delivered.
    Fault(u8),
    /// Nothing happened: it will be executed again.
    Again,
    /// L2 runs.
    Entered,
    /// L1 goes on at the host state's RIP: an exit, or a VM entry that failed late.
    Exited,
    /// L2 wrote to a tracked page at this address of L1.
    Tracked(u64),
    /// The processor is in shutdown.
    Shutdown,
}

/// A virtual machine under test.
#[derive(Debug)]
pub struct Rig {
    /// The host, L1's memory in it.
    pub host: TestHost,
    /// The engine.
    pub nested: Nested,
    /// The processors.
    pub cpus: Vec<Processor>,
    /// General registers, of the processor that acts.
    pub gprs: Gprs,
}

/// Address of a processor's vmcs01.
pub fn vmcs01(cpu: usize) -> Hpa {
    Hpa::new(0x7000_0000 + 0x1_0000 * cpu as u64)
}

/// Address of a processor's vmcs02.
pub fn vmcs02(cpu: usize) -> Hpa {
    Hpa::new(vmcs01(cpu).as_u64() + 0x1000)
}

/// Address of a processor's scratch page.
pub fn scratch(cpu: usize) -> Hpa {
    Hpa::new(vmcs01(cpu).as_u64() + 0x3000)
}

/// EPTP of EPT01.
pub fn ept01() -> Eptp {
    Eptp::from(0x6000_0000 | 3 << 3 | 6)
}

/// The EPTP that the VMCS of [`Rig::ready`] has.
pub fn eptp12() -> Eptp {
    Eptp::from(EPT | 3 << 3 | 6)
}

impl Rig {
    /// A machine of one processor.
    pub fn one() -> Self {
        Self::with(1, VmfuncMode::Emulated)
    }

    /// A machine of `cpus` processors, outside of VMX operation.
    pub fn with(cpus: usize, vmfunc: VmfuncMode) -> Self {
        let caps = rich_caps();
        let nested = Nested::new(Config {
            sizes: AddressSizes { physical_width: caps.physical_width, gigabyte_pages: true },
            caps,
            frames: Hpa::new(0x4000_0000),
            frame_count: 256,
            roots: 64,
            processors: cpus,
            vmcs_cache: cpus + 2,
            vmfunc,
            ept01: ept01(),
            stint: None,
        });
        let mut host = TestHost::new(0x10_0000);
        host.tracked = Some(nested.tracked().clone());
        // Identity: a PML4 table, and a PDPT with one page of a GByte.
        host.ram.write_u64(L1Gpa::new(PAGING), (PAGING + 0x1000) | 3);
        host.ram.write_u64(L1Gpa::new(PAGING + 0x1000), 0x83);
        for msr in [vmx_defs::msr::PAT, vmx_defs::msr::EFER, 0x10, 0xc000_0102] {
            host.msrs.insert(msr, 0);
        }
        let mut rig = Self { host, nested, cpus: Vec::new(), gprs: Gprs::default() };
        for cpu in 0..cpus {
            rig.host.poison(vmcs01(cpu));
            rig.host.poison(vmcs02(cpu));
            // The processor writes these at each exit.
            rig.host.current = vmcs02(cpu);
            for (field, _) in FIELDS.iter().filter(|(field, _)| field.kind() == Kind::ReadOnly) {
                rig.host.set(*field, 0);
            }
            rig.host.current = vmcs01(cpu);
            for (field, _) in FIELDS.iter().filter(|(field, _)| field.kind() != Kind::ReadOnly) {
                rig.host.set(*field, 0);
            }
            // L0's own host state, which vmcs02 gets too.
            rig.host.set(Field::HOST_RIP, 0xffff_8000_0000_1234);
            for (field, value) in [
                (Field::GUEST_CR0, 0x8000_0033),
                (Field::GUEST_CR3, PAGING),
                (Field::GUEST_CR4, 0x2020),
                (Field::GUEST_EFER, 0xd01),
                (Field::GUEST_PAT, 0x0007_0406_0007_0406),
                (Field::GUEST_DR7, 0x400),
                (Field::GUEST_CS_AR, 0xa09b),
                (Field::GUEST_SS_AR, 0xc093),
                (Field::GUEST_RFLAGS, 2),
                (Field::GUEST_RIP, RIP),
                (Field::ENTRY_CTLS, 0x200),
            ] {
                rig.host.set(field, value);
            }
            let base = vmcs01(cpu).as_u64();
            let processor = rig.nested.processor(
                &mut rig.host,
                cpu,
                vmcs01(cpu),
                vmcs02(cpu),
                Hpa::new(base + 0x2000),
                scratch(cpu),
            );
            assert_eq!(rig.host.current, vmcs01(cpu));
            rig.cpus.push(processor.unwrap());
        }
        rig
    }

    /// A machine whose processor 0 has a current VMCS that makes a VM entry.
    pub fn ready() -> Self {
        let mut rig = Self::one();
        rig.make_ready(0, VMCS);
        rig
    }

    /// A machine whose L2 runs on processor 0.
    pub fn running() -> Self {
        let mut rig = Self::ready();
        assert_eq!(rig.launch(0), End::Entered);
        rig
    }

    /// VMXON, VMCLEAR, VMPTRLD, and a VMWRITE for each field.
    pub fn make_ready(&mut self, cpu: usize, region: u64) {
        let vmxon = VMXON + 0x1000 * cpu as u64;
        self.put_revision(vmxon);
        self.put_revision(region);
        assert_eq!(self.pointer(cpu, ExitReason::VMXON, vmxon), End::Succeed);
        assert_eq!(self.pointer(cpu, ExitReason::VMCLEAR, region), End::Succeed);
        assert_eq!(self.pointer(cpu, ExitReason::VMPTRLD, region), End::Succeed);
        self.write_all(cpu, &values());
    }

    /// A VMWRITE for each field that L1 has, with the value that `vmcs` has.
    pub fn write_all(&mut self, cpu: usize, vmcs: &Vmcs12) {
        for (field, _) in FIELDS {
            if self.nested.caps().supports(*field) && field.kind() != Kind::ReadOnly {
                assert_eq!(self.vmwrite(cpu, *field, vmcs.get(*field)), End::Succeed);
            }
        }
    }

    /// Writes our revision identifier to a region.
    pub fn put_revision(&mut self, region: u64) {
        let revision = self.nested.caps().basic.revision();
        self.host.ram.write(L1Gpa::new(region), &revision.to_le_bytes());
    }

    /// Makes L2's address `gpa` that of `page`, with these bits in the leaf, in the EPT at `root`
    /// (a PML4 table with the three pages after it for the tables below).
    pub fn map(&mut self, root: u64, gpa: u64, page: u64, bits: u64) {
        for level in 0..3 {
            let table = L1Gpa::new(root + level * 0x1000);
            self.host.ram.write_u64(table, (root + (level + 1) * 0x1000) | 7);
        }
        let at = root + 0x3000 + 8 * (gpa >> 12 & 511);
        self.host.ram.write_u64(L1Gpa::new(at), page | bits);
    }

    /// An instruction of L1 with its memory operand at [`OPERAND`], and RAX and RBX as its register
    /// operands.
    pub fn exec(&mut self, cpu: usize, reason: ExitReason, register: bool) -> End {
        self.start(cpu, reason, register);
        let handled = self
            .nested
            .l1_exit(&mut self.cpus[cpu], &mut self.host, &mut self.gprs, reason)
            .unwrap();
        self.end(cpu, handled)
    }

    /// L1 meets an instruction: its exit, not yet handled.
    pub fn start(&mut self, cpu: usize, reason: ExitReason, register: bool) {
        assert!(!self.cpus[cpu].runs_l2(), "L1 does not run");
        self.host.current = vmcs01(cpu);
        let info = InstructionInfo::new()
            .with_address_size(2)
            .with_segment(3)
            .with_base_invalid(true)
            .with_index_invalid(true)
            .with_is_register(register)
            .with_reg1(RBX)
            .with_reg2(RAX);
        for (field, value) in [
            (Field::EXIT_REASON, u64::from(reason.bits())),
            (Field::EXIT_INSTRUCTION_INFO, u32::from(info).into()),
            (Field::EXIT_QUALIFICATION, OPERAND),
            (Field::EXIT_INSTRUCTION_LEN, 5),
            (Field::ENTRY_INTR_INFO, 0),
            (Field::GUEST_RIP, RIP),
            (Field::GUEST_RFLAGS, 0x8d7),
        ] {
            self.host.set(field, value);
        }
    }

    /// What became of L1.
    pub fn end(&mut self, cpu: usize, handled: Handled) -> End {
        if self.cpus[cpu].is_behind() {
            self.nested.catch_up(&mut self.cpus[cpu], &mut self.host).unwrap();
        }
        if handled == Handled::Shutdown {
            assert!(!self.cpus[cpu].runs_l2());
            return End::Shutdown;
        }
        if let Handled::TrackedWrite(gpa) = handled {
            assert!(self.cpus[cpu].runs_l2());
            assert_eq!(self.host.current, vmcs02(cpu));
            return End::Tracked(gpa.as_u64());
        }
        assert_eq!(handled, Handled::Enter);
        if self.cpus[cpu].runs_l2() {
            assert_eq!(self.host.current, vmcs02(cpu));
            return End::Entered;
        }
        assert_eq!(self.host.current, vmcs01(cpu), "the VMCS of L1 is current");
        let injected = IntrInfo::from(self.host.field(Field::ENTRY_INTR_INFO) as u32);
        let (rip, flags) =
            (self.host.field(Field::GUEST_RIP), self.host.field(Field::GUEST_RFLAGS));
        if injected.valid() {
            assert_eq!(rip, RIP);
            return End::Fault(injected.vector());
        }
        match rip {
            RIP => End::Again,
            HOST_RIP => {
                assert_eq!(flags, 2);
                End::Exited
            }
            _ => {
                assert_eq!(rip, RIP + 5);
                // CF, PF, AF, ZF, SF and OF were set before.
                match flags {
                    0x002 => End::Succeed,
                    0x003 => End::FailInvalid,
                    0x042 => {
                        let vmcs = self.nested.vmcs12(&self.cpus[cpu]).unwrap();
                        End::Fail(error(vmcs.get32(Field::VM_INSTRUCTION_ERROR)))
                    }
                    other => panic!("flags {other:#x}"),
                }
            }
        }
    }

    /// VMXON, VMCLEAR or VMPTRLD.
    pub fn pointer(&mut self, cpu: usize, reason: ExitReason, region: u64) -> End {
        self.host.ram.write_u64(L1Gpa::new(OPERAND), region);
        self.exec(cpu, reason, false)
    }

    /// VMWRITE from a register.
    pub fn vmwrite(&mut self, cpu: usize, field: Field, value: u64) -> End {
        self.vmwrite_encoding(cpu, field.encoding().into(), value)
    }

    /// VMWRITE from a register, of any encoding.
    pub fn vmwrite_encoding(&mut self, cpu: usize, encoding: u64, value: u64) -> End {
        self.gprs.set(RAX, encoding);
        self.gprs.set(RBX, value);
        self.exec(cpu, ExitReason::VMWRITE, true)
    }

    /// VMREAD to a register.
    pub fn vmread_encoding(&mut self, cpu: usize, encoding: u64) -> (End, u64) {
        self.gprs.set(RAX, encoding);
        self.gprs.set(RBX, 0x5a5a);
        let end = self.exec(cpu, ExitReason::VMREAD, true);
        (end, self.gprs.get(RBX))
    }

    /// What L1 reads in a field.
    pub fn vmread(&mut self, cpu: usize, field: Field) -> u64 {
        let (end, value) = self.vmread_encoding(cpu, field.encoding().into());
        assert_eq!(end, End::Succeed, "{field:?}");
        value
    }

    /// INVEPT or INVVPID.
    pub fn invalidate(
        &mut self,
        cpu: usize,
        reason: ExitReason,
        kind: u64,
        low: u64,
        high: u64,
    ) -> End {
        self.gprs.set(RAX, kind);
        self.host.ram.write_u64(L1Gpa::new(OPERAND), low);
        self.host.ram.write_u64(L1Gpa::new(OPERAND + 8), high);
        self.exec(cpu, reason, false)
    }

    /// VMLAUNCH.
    pub fn launch(&mut self, cpu: usize) -> End {
        self.exec(cpu, ExitReason::VMLAUNCH, false)
    }

    /// VMRESUME.
    pub fn resume(&mut self, cpu: usize) -> End {
        self.exec(cpu, ExitReason::VMRESUME, false)
    }

    /// An exit of L2, with its qualification. Other exit fields are what they were.
    pub fn exit(&mut self, cpu: usize, reason: ExitReason, qualification: u64) -> End {
        assert!(self.cpus[cpu].runs_l2(), "L2 does not run");
        self.host.current = vmcs02(cpu);
        self.host.set(Field::EXIT_REASON, reason.bits().into());
        self.host.set(Field::EXIT_QUALIFICATION, qualification);
        // The processor has delivered what entry injected.
        self.host
            .set(Field::ENTRY_INTR_INFO, self.host.field(Field::ENTRY_INTR_INFO) & 0x7fff_ffff);
        let handled = self
            .nested
            .l2_exit(&mut self.cpus[cpu], &mut self.host, &mut self.gprs, reason)
            .unwrap();
        self.end(cpu, handled)
    }

    /// An EPT violation of L2 at `gpa`.
    pub fn violation(&mut self, cpu: usize, gpa: u64, qualification: u64) -> End {
        self.host.current = vmcs02(cpu);
        self.host.set(Field::GUEST_PHYSICAL_ADDRESS, gpa);
        self.exit(cpu, ExitReason::EPT_VIOLATION, qualification)
    }

    /// VMFUNC of L2.
    pub fn vmfunc(&mut self, cpu: usize, rax: u64, rcx: u64) -> End {
        self.gprs.set(RAX, rax);
        self.gprs.set(crate::regs::RCX, rcx);
        self.host.current = vmcs02(cpu);
        self.host.set(Field::EXIT_INSTRUCTION_LEN, 3);
        self.exit(cpu, ExitReason::VMFUNC, 0)
    }

    /// A field of vmcs02.
    pub fn l2(&self, cpu: usize, field: Field) -> u64 {
        self.host.field_of(vmcs02(cpu), field)
    }

    /// A field of vmcs01.
    pub fn l1(&self, cpu: usize, field: Field) -> u64 {
        self.host.field_of(vmcs01(cpu), field)
    }
}

/// Values that make a VM entry of a 64-bit L2 with EPT, VPID and EPTP switching.
pub fn values() -> Vmcs12 {
    let mut vmcs = valid();
    for (field, value) in [
        (Field::EPT_POINTER, eptp12().into_bits()),
        (Field::EXIT_MSR_STORE_COUNT, 0),
        (Field::EXIT_MSR_STORE_ADDR, EXIT_STORE),
        (Field::EXIT_MSR_LOAD_COUNT, 0),
        (Field::EXIT_MSR_LOAD_ADDR, EXIT_LOAD),
        (Field::ENTRY_MSR_LOAD_COUNT, 0),
        (Field::ENTRY_MSR_LOAD_ADDR, ENTRY_LOAD),
        (Field::EPTP_LIST_ADDRESS, LIST),
        (Field::HOST_CR3, PAGING),
        (Field::HOST_RIP, HOST_RIP),
    ] {
        vmcs.set(field, value);
    }
    vmcs
}

/// The VM-instruction error of a number.
fn error(number: u32) -> VmInstructionError {
    use VmInstructionError as E;
    [
        E::VmcallInRoot,
        E::VmclearAddress,
        E::VmclearVmxonPointer,
        E::VmlaunchNotClear,
        E::VmresumeNotLaunched,
        E::EntryControls,
        E::EntryHostState,
        E::VmptrldAddress,
        E::VmptrldVmxonPointer,
        E::VmptrldRevision,
        E::UnsupportedComponent,
        E::ReadOnlyComponent,
        E::VmxonInRoot,
        E::EntryBlockedByMovSs,
        E::InvalidInvalidation,
    ]
    .into_iter()
    .find(|error| error.number() == number)
    .unwrap()
}
