//! Whatever hostile L1s do, on two processors at once: does the engine stay whole, and does the
//! processor never get an address that it must not have?

use super::*;
use crate::host::L1Memory;
use crate::regs::{RAX, RBX, RCX};
use crate::testing::TestHost;
use crate::testing::rig::{
    EPT, LIST, MSR_BITMAP, OPERAND, Rig, VMCS, VMXON, ept01, eptp12, scratch, values, vmcs01,
    vmcs02,
};
use alloc::vec::Vec;
use proptest::prelude::*;
use vmx_defs::ExitReason;
use vmx_defs::field::FIELDS;

const CPUS: usize = 2;
/// What L0 hides of L1's RAM.
const HIDDEN: u64 = 0x8_0000;

#[derive(Clone, Debug)]
enum Act {
    /// L1 executes an instruction with these operands.
    Instruction { cpu: usize, reason: u32, rax: u64, rbx: u64, operand: [u64; 2], register: bool },
    /// L1 VMWRITEs.
    Write { cpu: usize, field: usize, value: u64 },
    /// Any processor of L1 writes to memory.
    Poke { at: u64, value: u64 },
    /// L2 exits.
    Exit { cpu: usize, reason: u32, qualification: u64, gpa: u64, regs: [u64; 3] },
    /// L2 changes its state, or the processor reports something.
    Guest { cpu: usize, field: usize, value: u64 },
    /// Makes a good VMCS current, and enters.
    Enter { cpu: usize, region: u64 },
    /// INIT.
    Reset { cpu: usize },
}

/// Addresses that mean something somewhere.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => proptest::sample::select(alloc::vec![
            EPT, EPT + 0x1000, EPT + 0x2000, EPT + 0x3000, LIST, MSR_BITMAP, OPERAND, VMXON, VMCS,
            VMCS + 0x1000, VMCS + 0x2000, VMCS + 0x3000, HIDDEN, HIDDEN + 0x1000, 0x9000, 0xa000,
            0xff_ffff_f000, 1 << 40, 0xf_f000, 0,
        ]),
        1 => any::<u64>(),
    ]
}

/// Values that mean something somewhere.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => place(),
        2 => place().prop_map(|place| place | 7),
        2 => place().prop_map(|place| place | 0x37),
        2 => place().prop_map(|place| place | 3 << 3 | 6),
        1 => place().prop_map(|place| place | 1 << 6 | 3 << 3 | 6),
        2 => 0..64u64,
        1 => (0..64u32).prop_map(|bit| 1 << bit),
        1 => any::<u64>(),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let cpu = || 0..CPUS;
    let reason = || prop_oneof![5 => 18..28u32, 2 => Just(50u32), 2 => Just(53u32)];
    let exit = prop_oneof![
        4 => Just(48u32), 1 => Just(49u32), 4 => Just(59u32), 2 => Just(31u32), 2 => Just(32u32),
        1 => Just(0x8000_0021u32), 2 => 0..70u32,
    ];
    let list = || prop_oneof![4 => 0..6u64, 1 => value()];
    prop_oneof![
        6 => (cpu(), reason(), value(), value(), [value(), value()], any::<bool>()).prop_map(
            |(cpu, reason, rax, rbx, operand, register)| {
                Act::Instruction { cpu, reason, rax, rbx, operand, register }
            }
        ),
        3 => (cpu(), 0..FIELDS.len(), value())
            .prop_map(|(cpu, field, value)| Act::Write { cpu, field, value }),
        6 => (place(), 0..6u64, value())
            .prop_map(|(at, word, value)| Act::Poke { at: (at & !7).wrapping_add(8 * word), value }),
        6 => (cpu(), exit, value(), 0..6u64, [list(), list(), list()]).prop_map(
            |(cpu, reason, qualification, page, regs)| {
                Act::Exit { cpu, reason, qualification, gpa: page << 12, regs }
            }
        ),
        2 => (cpu(), 0..FIELDS.len(), value())
            .prop_map(|(cpu, field, value)| Act::Guest { cpu, field, value }),
        6 => (cpu(), 0..5u64)
            .prop_map(|(cpu, n)| Act::Enter { cpu, region: VMCS + 0x1000 * n }),
        1 => cpu().prop_map(|cpu| Act::Reset { cpu }),
    ]
}

/// L1's own state as it is before an instruction: an exit may have loaded any host state.
fn revive(rig: &mut Rig, cpu: usize) {
    rig.host.current = vmcs01(cpu);
    for (field, value) in [
        (Field::GUEST_CR0, 0x8000_0033),
        (Field::GUEST_CR3, crate::testing::rig::PAGING),
        (Field::GUEST_CR4, 0x2020),
        (Field::GUEST_EFER, 0xd01),
        (Field::GUEST_CS_AR, 0xa09b),
        (Field::GUEST_SS_AR, 0xc093),
        (Field::GUEST_INTERRUPTIBILITY, 0),
        (Field::GUEST_ACTIVITY, 0),
    ] {
        rig.host.set(field, value);
    }
}

fn l1_handled(rig: &mut Rig, cpu: usize, reason: ExitReason, register: bool) {
    revive(rig, cpu);
    rig.start(cpu, reason, register);
    rig.nested.l1_exit(&mut rig.cpus[cpu], &mut rig.host, &mut rig.gprs, reason).unwrap();
}

fn write(rig: &mut Rig, cpu: usize, field: Field, value: u64) {
    rig.gprs.set(RAX, field.encoding().into());
    rig.gprs.set(RBX, value);
    l1_handled(rig, cpu, ExitReason::VMWRITE, true);
}

fn perform(rig: &mut Rig, act: Act) {
    match act {
        Act::Instruction { cpu, reason, rax, rbx, operand, register } => {
            if rig.cpus[cpu].runs_l2() {
                return;
            }
            rig.gprs.set(RAX, rax);
            rig.gprs.set(RBX, rbx);
            rig.host.ram.write_u64(L1Gpa::new(OPERAND), operand[0]);
            rig.host.ram.write_u64(L1Gpa::new(OPERAND + 8), operand[1]);
            l1_handled(rig, cpu, ExitReason::from_bits(reason), register);
        }
        Act::Write { cpu, field, value } => {
            if !rig.cpus[cpu].runs_l2() {
                write(rig, cpu, FIELDS[field].0, value);
            }
        }
        Act::Poke { at, value } => rig.host.ram.write_u64(L1Gpa::new(at), value),
        Act::Exit { cpu, reason, qualification, gpa, regs } => {
            if !rig.cpus[cpu].runs_l2() {
                return;
            }
            for (register, value) in [RAX, RCX, RBX].into_iter().zip(regs) {
                rig.gprs.set(register, value);
            }
            rig.host.current = vmcs02(cpu);
            rig.host.set(Field::EXIT_REASON, reason.into());
            rig.host.set(Field::EXIT_QUALIFICATION, qualification);
            rig.host.set(Field::GUEST_PHYSICAL_ADDRESS, gpa);
            rig.host.set(Field::ENTRY_INTR_INFO, 0);
            let reason = ExitReason::from_bits(reason);
            let cpu = &mut rig.cpus[cpu];
            rig.nested.l2_exit(cpu, &mut rig.host, &mut rig.gprs, reason).unwrap();
        }
        Act::Guest { cpu, field, value } => {
            let field = FIELDS[field].0;
            // The link pointer is no state of L2.
            let state = matches!(field.kind(), Kind::Guest | Kind::ReadOnly)
                && field != Field::VMCS_LINK_POINTER;
            if rig.cpus[cpu].runs_l2() && state {
                rig.host.current = vmcs02(cpu);
                rig.host.set(field, value);
            }
        }
        Act::Enter { cpu, region } => {
            if rig.cpus[cpu].runs_l2() {
                return;
            }
            rig.put_revision(VMXON + 0x1000 * cpu as u64);
            rig.put_revision(region);
            for (reason, pointer) in [
                (ExitReason::VMXON, VMXON + 0x1000 * cpu as u64),
                (ExitReason::VMCLEAR, region),
                (ExitReason::VMPTRLD, region),
            ] {
                rig.host.ram.write_u64(L1Gpa::new(OPERAND), pointer);
                l1_handled(rig, cpu, reason, false);
            }
            let good = values();
            for (field, _) in FIELDS.iter().filter(|(field, _)| field.kind() != Kind::ReadOnly) {
                write(rig, cpu, *field, good.get(*field));
            }
            l1_handled(rig, cpu, ExitReason::VMLAUNCH, false);
        }
        Act::Reset { cpu } => {
            if !rig.cpus[cpu].runs_l2() {
                rig.nested.reset_processor(&mut rig.cpus[cpu]);
            }
        }
    }
}

fn check(rig: &mut Rig) {
    rig.nested.shadow.check(&rig.host);
    for cpu in 0..CPUS {
        let l2 = |field| rig.host.field_of(vmcs02(cpu), field);
        for field in [
            Field::IO_BITMAP_A,
            Field::IO_BITMAP_B,
            Field::VIRTUAL_APIC_ADDR,
            Field::APIC_ACCESS_ADDR,
        ] {
            let at = l2(field);
            let l1 = TestHost::HPA_OF_L1..TestHost::HPA_OF_L1 + (1 << 40);
            let hidden = TestHost::HPA_OF_L1 + HIDDEN;
            let good = at == 0
                || at == scratch(cpu).as_u64()
                || at == TestHost::ONES
                || l1.contains(&at) && !(hidden..hidden + 0x1000).contains(&at);
            assert!(good, "{field:?} is {at:#x}");
        }
        assert_eq!(l2(Field::MSR_BITMAP), vmcs01(cpu).as_u64() + 0x2000);
        assert_eq!(l2(Field::VM_FUNCTION_CONTROLS), 0);
        assert_eq!(l2(Field::VMCS_LINK_POINTER), u64::MAX);
        assert_eq!(l2(Field::HOST_RIP), 0xffff_8000_0000_1234);
        for count in
            [Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_COUNT]
        {
            assert_eq!(l2(count), 0);
        }
        if rig.cpus[cpu].runs_l2() {
            assert!(l2(Field::VPID) > crate::tlb::VPID01.into());
            let eptp = l2(Field::EPT_POINTER);
            let pool = 0x4000_0000..0x4000_0000 + 256 * 0x1000;
            assert!(eptp == ept01().into_bits() || pool.contains(&eptp), "{eptp:#x}");
        }
    }
    let regions: Vec<_> =
        rig.cpus.iter().flat_map(|cpu| cpu.current).map(|current| current.region).collect();
    assert!(regions.windows(2).all(|pair| pair[0] != pair[1]), "one VMCS, two processors");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn hostile_l1s_neither_break_the_engine_nor_get_past_it(
        acts in proptest::collection::vec(act(), 1..80)
    ) {
        let mut rig = Rig::with(CPUS, VmfuncMode::Emulated);
        rig.host.ram.hidden.push(HIDDEN..HIDDEN + 0x1000);
        for n in 0..6 {
            rig.map(EPT, n << 12, if n == 5 { HIDDEN } else { n << 12 }, 0x37);
            rig.host.ram.write_u64(L1Gpa::new(LIST + 8 * n), eptp12().into_bits() | (n & 1) << 6);
        }
        for act in acts {
            perform(&mut rig, act);
            check(&mut rig);
        }
    }
}
