//! Is vmcs02 what vmcs12, L1's processor and L0's own needs make it, at the first entry and later?

use super::*;
use crate::host::{Frames, L1Memory};
use crate::testing::TestHost;
use crate::testing::rig::{
    ENTRY_LOAD, End, IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, PAGING, Rig, VIRTUAL_APIC, VMCS, ept01,
    scratch, values, vmcs02,
};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use proptest::prelude::*;
use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::exit::entry_failure;
use vmx_defs::field::FIELDS;
use vmx_defs::msr;

/// Writes a field, then launches.
fn launch_with(writes: &[(Field, u64)]) -> (Rig, End) {
    let mut rig = Rig::ready();
    for (field, value) in writes {
        assert_eq!(rig.vmwrite(0, *field, *value), End::Succeed, "{field:?}");
    }
    let end = rig.launch(0);
    (rig, end)
}

fn control(field: Field, set: u32, clear: u32) -> (Field, u64) {
    (field, values().get(field) & !u64::from(clear) | u64::from(set))
}

#[test]
fn what_l1_wrote_runs_l2_with_what_l0_adds() {
    let rig = Rig::running();
    let l1 = values();
    for field in &rig.nested.plain_guest {
        assert_eq!(rig.l2(0, *field), l1.get(*field), "{field:?}");
    }
    for field in rig.nested.plain_controls.of_kind(Kind::Control) {
        let expected = match field {
            Field::TSC_OFFSET => 0,
            Field::CR4_MASK => l1.get(field) | !rig.nested.config.caps.cr4_fixed1,
            _ => l1.get(field),
        };
        assert_eq!(rig.l2(0, field), expected, "{field:?}");
    }
    let proc = ProcCtls::from_bits_retain(rig.l2(0, Field::PROC_CTLS) as u32);
    assert!(proc.contains(ProcCtls::MSR_BITMAPS | ProcCtls::SECONDARY_CONTROLS));
    let proc2 = ProcCtls2::from_bits_retain(rig.l2(0, Field::PROC_CTLS2) as u32);
    assert!(proc2.contains(ProcCtls2::EPT | ProcCtls2::VPID));
    assert_eq!(rig.l2(0, Field::VM_FUNCTION_CONTROLS), 0, "each VMFUNC exits");
    assert_eq!(rig.l2(0, Field::VMCS_LINK_POINTER), u64::MAX);
    assert_eq!(rig.l2(0, Field::HOST_RIP), 0xffff_8000_0000_1234, "L0 gets the exits");
    for count in
        [Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_COUNT]
    {
        assert_eq!(rig.l2(0, count), 0);
    }
    let exit = ExitCtls::from_bits_retain(rig.l2(0, Field::EXIT_CTLS) as u32);
    assert!(exit.contains(
        ExitCtls::HOST_ADDRESS_SPACE_SIZE
            | ExitCtls::SAVE_PAT
            | ExitCtls::LOAD_PAT
            | ExitCtls::SAVE_EFER
            | ExitCtls::LOAD_EFER
            | ExitCtls::SAVE_DEBUG_CONTROLS
    ));
    assert_ne!(rig.l2(0, Field::EPT_POINTER), l1.get(Field::EPT_POINTER));
    assert_ne!(rig.l2(0, Field::MSR_BITMAP), l1.get(Field::MSR_BITMAP));
}

/// Fields that the processor does not look at with the controls of [`values`].
const NOT_IN_USE: [Field; 6] = [
    Field::EXIT_MSR_STORE_ADDR,
    Field::EXIT_MSR_LOAD_ADDR,
    Field::ENTRY_MSR_LOAD_ADDR,
    Field::EXECUTIVE_VMCS_POINTER,
    Field::EPTP_LIST_ADDRESS,
    Field::VM_INSTRUCTION_ERROR,
];

#[test]
fn no_field_in_use_is_left_without_a_value() {
    // With every page at address 0, where the fields of the first entry equal what was never there.
    let zero = [
        (Field::IO_BITMAP_A, 0),
        (Field::IO_BITMAP_B, 0),
        (Field::VIRTUAL_APIC_ADDR, 0),
        (Field::GUEST_RSP, 0),
    ];
    let (rig, end) = launch_with(&zero);
    assert_eq!(end, End::Entered);
    let unused = |field: Field| {
        NOT_IN_USE.contains(&field)
            || (Field::GUEST_PDPTE0..=Field::GUEST_PDPTE3).contains(&field)
            || field.kind() == Kind::ReadOnly
    };
    for (field, _) in FIELDS {
        if rig.nested.caps().supports(*field) && !unused(*field) {
            let poison = TestHost::POISON & field.width().mask();
            assert_ne!(rig.l2(0, *field), poison, "{field:?}");
        }
    }
}

#[test]
fn pages_are_where_ept01_has_them() {
    let apic = ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits();
    let (rig, end) = launch_with(&[control(Field::PROC_CTLS2, apic, 0)]);
    assert_eq!(end, End::Entered);
    for (field, page) in [
        (Field::IO_BITMAP_A, IO_BITMAP_A),
        (Field::IO_BITMAP_B, IO_BITMAP_B),
        (Field::VIRTUAL_APIC_ADDR, VIRTUAL_APIC),
        (Field::APIC_ACCESS_ADDR, 0x5000),
    ] {
        assert_eq!(rig.l2(0, field), TestHost::HPA_OF_L1 + page);
    }
}

#[test]
fn vmcs02_never_gets_an_address_of_hidden_memory() {
    let hidden = 0x8_0000;
    let hide = |writes: &[(Field, u64)]| {
        let mut rig = Rig::ready();
        rig.host.ram.hidden.push(hidden..hidden + 0x1000);
        for (field, value) in writes {
            rig.vmwrite(0, *field, *value);
        }
        assert_eq!(rig.launch(0), End::Entered);
        rig
    };
    let apic = ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits();
    for field in [Field::IO_BITMAP_A, Field::IO_BITMAP_B, Field::APIC_ACCESS_ADDR] {
        let rig = hide(&[control(Field::PROC_CTLS2, apic, 0), (field, hidden)]);
        assert_eq!(rig.l2(0, field), TestHost::ONES, "{field:?}");
    }
    // The processor writes to the virtual-APIC page: not to the page of ones.
    let rig = hide(&[(Field::VIRTUAL_APIC_ADDR, hidden)]);
    assert_eq!(rig.l2(0, Field::VIRTUAL_APIC_ADDR), scratch(0).as_u64());
    assert!((0..512).all(|at| rig.host.load(scratch(0), at) == u64::MAX));
    // The MSR bitmap reads as ones: every access exits.
    let rig = hide(&[(Field::MSR_BITMAP, hidden)]);
    let bitmap = Hpa::new(rig.l2(0, Field::MSR_BITMAP));
    assert!((0..512).all(|at| rig.host.load(bitmap, at) == u64::MAX));
    // An EPT there is one that is misconfigured.
    let mut rig = hide(&[(Field::EPT_POINTER, hidden | 3 << 3 | 6)]);
    assert_eq!(rig.violation(0, 0x5000, 1), End::Exited);
    let reason = rig.vmread(0, Field::EXIT_REASON);
    assert_eq!(reason, ExitReason::EPT_MISCONFIGURATION.bits().into());
    // And an MSR area has nothing but reserved bits.
    let mut rig = Rig::ready();
    rig.host.ram.hidden.push(hidden..hidden + 0x1000);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_ADDR, hidden);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 3);
    assert_eq!(rig.launch(0), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 1);
}

#[test]
fn without_ept_l2_runs_on_ept01() {
    let off = ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS;
    let (mut rig, end) = launch_with(&[control(Field::PROC_CTLS2, 0, off.bits())]);
    assert_eq!(end, End::Entered);
    assert_eq!(rig.l2(0, Field::EPT_POINTER), ept01().into_bits());
    let injected = |rig: &Rig| IntrInfo::from(rig.l2(0, Field::ENTRY_INTR_INFO) as u32);
    // What EPT01 allows by now was a stale translation: again.
    assert_eq!(rig.violation(0, 0x8_0000, 2), End::Entered);
    assert!(!injected(&rig).valid());
    // What L0 hides: #GP.
    rig.host.ram.hidden.push(0x8_0000..0x8_1000);
    assert_eq!(rig.violation(0, 0x8_0000, 2), End::Entered);
    assert_eq!((injected(&rig).valid(), injected(&rig).vector()), (true, vector::GP));
    assert_eq!(rig.nested.shadow_usage(), (0, 0));
}

#[test]
fn state_that_no_control_loads_is_l1s() {
    let entry = EntryCtls::LOAD_DEBUG_CONTROLS | EntryCtls::LOAD_PAT | EntryCtls::LOAD_EFER;
    for (with, name) in [(true, "loaded"), (false, "kept")] {
        let mut rig = Rig::ready();
        if !with {
            let (field, value) = control(Field::ENTRY_CTLS, 0, entry.bits());
            rig.vmwrite(0, field, value);
        }
        rig.vmwrite(0, Field::GUEST_DR7, 0x401);
        rig.vmwrite(0, Field::GUEST_DEBUGCTL, 1);
        rig.vmwrite(0, Field::GUEST_PAT, 0x0606_0606_0606_0606);
        rig.host.set(Field::GUEST_DR7, 0x402);
        rig.host.set(Field::GUEST_DEBUGCTL, 2);
        assert_eq!(rig.launch(0), End::Entered);
        let l2 = |field| rig.l2(0, field);
        let expected = if with {
            (0x401, 1, 0x0606_0606_0606_0606, 0xd01)
        } else {
            (0x402, 2, 0x0007_0406_0007_0406, 0xd01)
        };
        let found = (
            l2(Field::GUEST_DR7),
            l2(Field::GUEST_DEBUGCTL),
            l2(Field::GUEST_PAT),
            l2(Field::GUEST_EFER),
        );
        assert_eq!(found, expected, "{name}");
        let loads = EntryCtls::from_bits_retain(l2(Field::ENTRY_CTLS) as u32);
        assert!(loads.contains(entry), "vmcs02 always loads them");
    }
    // IA32_EFER that is not loaded follows the mode that is entered.
    let (rig, end) = launch_with(&[
        control(Field::ENTRY_CTLS, 0, (EntryCtls::LOAD_EFER | EntryCtls::IA32E_MODE_GUEST).bits()),
        (Field::GUEST_RIP, 0x1000),
        (Field::GUEST_CS_AR, 0xc09b),
        (Field::GUEST_CR4, 0x2000),
    ]);
    assert_eq!(end, End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_EFER), 0x801);
}

#[test]
fn events_are_injected_as_l1_says_and_only_once() {
    let info = IntrInfo::exception(vector::GP, true);
    let (mut rig, end) = launch_with(&[
        (Field::ENTRY_INTR_INFO, u32::from(info).into()),
        (Field::ENTRY_EXCEPTION_ERROR, 0x18),
        (Field::ENTRY_INSTRUCTION_LEN, 2),
    ]);
    assert_eq!(end, End::Entered);
    assert_eq!(rig.l2(0, Field::ENTRY_INTR_INFO), u32::from(info).into());
    assert_eq!(rig.l2(0, Field::ENTRY_EXCEPTION_ERROR), 0x18);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    let after = u32::from(info.with_valid(false));
    assert_eq!(rig.vmread(0, Field::ENTRY_INTR_INFO), after.into());
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.l2(0, Field::ENTRY_INTR_INFO), after.into());
}

#[test]
fn a_bad_guest_state_is_an_exit_that_saves_nothing() {
    let nmi = IntrInfo::new().with_vector(2).with_kind(kind::NMI).with_valid(true);
    for (writes, qualification) in [
        (&[(Field::GUEST_RFLAGS, 0)][..], entry_failure::DEFAULT),
        (&[(Field::VMCS_LINK_POINTER, VMCS)], entry_failure::VMCS_LINK_POINTER),
        (
            &[
                (Field::ENTRY_INTR_INFO, u64::from(u32::from(nmi))),
                (Field::GUEST_INTERRUPTIBILITY, 1),
            ],
            entry_failure::NMI_INJECTION,
        ),
    ] {
        let mut rig = Rig::ready();
        for (field, value) in writes {
            rig.vmwrite(0, *field, *value);
        }
        rig.vmwrite(0, Field::EXIT_INSTRUCTION_LEN, 77);
        rig.vmwrite(0, Field::IDT_VECTORING_INFO, 78);
        rig.host.invvpids.clear();
        assert_eq!(rig.launch(0), End::Exited);
        let reason = rig.vmread(0, Field::EXIT_REASON);
        assert_eq!(reason, 1 << 31 | u64::from(ExitReason::ENTRY_GUEST_STATE.bits()));
        assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), qualification);
        // Nothing else of the exit-information area, no guest state, no injection was touched.
        assert_eq!(rig.vmread(0, Field::EXIT_INSTRUCTION_LEN), 77);
        assert_eq!(rig.vmread(0, Field::IDT_VECTORING_INFO), 78);
        for (field, value) in writes {
            assert_eq!(rig.vmread(0, *field), *value);
        }
        let mut good = values();
        good.set(Field::HOST_RIP, good.get(Field::HOST_RIP));
        rig.write_all(0, &good);
        assert_eq!(rig.launch(0), End::Entered, "the launch state is still clear");
    }
}

#[test]
fn pdptes_are_checked_and_loaded() {
    let pae = |with_ept: bool| {
        let mut rig = Rig::ready();
        let off = if with_ept { 0 } else { (ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS).bits() };
        for (field, value) in [
            control(Field::ENTRY_CTLS, 0, EntryCtls::IA32E_MODE_GUEST.bits()),
            control(Field::PROC_CTLS2, 0, off),
            (Field::GUEST_EFER, 0x801),
            (Field::GUEST_RIP, 0x1000),
            (Field::GUEST_CS_AR, 0xc09b),
            (Field::GUEST_CR3, 0x2_0020),
            (Field::GUEST_PDPTE0, 0x3001),
            (Field::GUEST_PDPTE1, 0x4001),
            (Field::GUEST_PDPTE2, 0x5001),
            (Field::GUEST_PDPTE3, 0x6001),
        ] {
            assert_eq!(rig.vmwrite(0, field, value), End::Succeed);
        }
        for n in 0..4 {
            rig.host.ram.write_u64(L1Gpa::new(0x2_0020 + 8 * n), 0x7001 + 0x1000 * n);
        }
        rig
    };
    for (with_ept, first) in [(true, 0x3001), (false, 0x7001)] {
        let mut rig = pae(with_ept);
        assert_eq!(rig.launch(0), End::Entered);
        let check = |rig: &Rig| {
            for (n, field) in PDPTES.into_iter().enumerate() {
                assert_eq!(rig.l2(0, field), first + 0x1000 * n as u64, "EPT {with_ept}");
            }
        };
        check(&rig);
        // L2 has left PAE paging: what the exit saves in the fields is undefined.
        for field in PDPTES {
            rig.host.set(field, 0x5a5a_5a5a);
        }
        rig.host.set(Field::GUEST_CR0, 0x33);
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        rig.vmwrite(0, Field::GUEST_CR0, 0x8000_0033);
        assert_eq!(rig.resume(0), End::Entered);
        check(&rig);
    }
    let mut rig = pae(true);
    rig.vmwrite(0, Field::GUEST_PDPTE2, 1 << 40 | 1);
    assert_eq!(rig.launch(0), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), entry_failure::PDPTE);
    let mut rig = pae(false);
    rig.host.ram.write_u64(L1Gpa::new(0x2_0020), 0x7 << 1 | 1);
    assert_eq!(rig.launch(0), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), entry_failure::PDPTE);
}

/// Writes an MSR area.
fn area(rig: &mut Rig, at: u64, entries: &[(u64, u64)]) {
    for (n, (head, data)) in entries.iter().enumerate() {
        rig.host.ram.write_u64(L1Gpa::new(at + 16 * n as u64), *head);
        rig.host.ram.write_u64(L1Gpa::new(at + 16 * n as u64 + 8), *data);
    }
}

#[test]
fn msrs_are_loaded_in_order_until_one_can_not_be() {
    let mut rig = Rig::ready();
    let swap: u64 = 0xc000_0102;
    area(&mut rig, ENTRY_LOAD, &[(0x10, 7), (swap, 8), (swap, 9)]);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 3);
    assert_eq!(rig.launch(0), End::Entered);
    assert_eq!((rig.host.msrs[&0x10], rig.host.msrs[&0xc000_0102]), (7, 9));

    for bad in [
        0x10 | 1 << 32,
        0x10 | 1 << 63,
        msr::FS_BASE.into(),
        msr::GS_BASE.into(),
        0x800,
        0x8ff,
        0x9b,
        0x79,
        0x1234,
    ] {
        let mut rig = Rig::ready();
        area(&mut rig, ENTRY_LOAD, &[(0x10, 7), (bad, 8), (0x10, 9)]);
        rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 3);
        assert_eq!(rig.launch(0), End::Exited, "{bad:#x}");
        let reason = rig.vmread(0, Field::EXIT_REASON);
        assert_eq!(reason, 1 << 31 | u64::from(ExitReason::ENTRY_MSR_LOADING.bits()));
        assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 2);
        assert_eq!(rig.host.msrs[&0x10], 7);
        rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 0);
        assert_eq!(rig.launch(0), End::Entered, "the launch state is still clear");
    }
}

#[test]
fn what_a_failed_msr_load_did_to_vmcs02_is_undone() {
    let mut rig = Rig::ready();
    area(&mut rig, ENTRY_LOAD, &[(msr::PAT.into(), 0x0101_0101_0101_0101), (0x800, 0)]);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 2);
    assert_eq!(rig.launch(0), End::Exited);
    assert_eq!(rig.l2(0, Field::GUEST_PAT), 0x0101_0101_0101_0101);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 0);
    assert_eq!(rig.launch(0), End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_PAT), values().get(Field::GUEST_PAT));
}

#[test]
fn later_entries_write_little() {
    let mut rig = Rig::running();
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    rig.vmwrite(0, Field::GUEST_RIP, 0x1000);
    rig.host.vmwrites = 0;
    rig.host.ram.reads.clear();
    assert_eq!(rig.resume(0), End::Entered);
    assert!(rig.host.vmwrites <= 8, "{} VMWRITEs", rig.host.vmwrites);
    assert!(rig.host.ram.reads.len() <= 14, "{:?}", rig.host.ram.reads);
    assert!(rig.host.ram.reads.iter().all(|at| at.page().as_u64() == MSR_BITMAP));
}

#[test]
fn l1_memory_is_read_once() {
    let mut rig = Rig::ready();
    area(&mut rig, ENTRY_LOAD, &[(0x10, 7), (0x10, 8), (0x10, 9)]);
    rig.vmwrite(0, Field::ENTRY_MSR_LOAD_COUNT, 3);
    rig.host.ram.reads.clear();
    assert_eq!(rig.launch(0), End::Entered);
    let mut seen = BTreeMap::new();
    for at in &rig.host.ram.reads {
        *seen.entry(*at).or_insert(0) += 1;
    }
    assert!(seen.values().all(|count| *count == 1), "{seen:?}");
}

/// A step of L1 or of the processor between two VM entries.
#[derive(Clone, Debug)]
enum Step {
    Write(Field, u64),
    /// The processor's own debug registers, as L1 left them.
    Debug(u64, u64),
    /// L2 changed its state before it exited.
    Guest(Field, u64),
    Enter,
    /// VMPTRLD of the other VMCS.
    Other,
    /// VMCLEAR and VMPTRLD of this one.
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    let good = values();
    let fields: Vec<_> = FIELDS
        .iter()
        .map(|(field, _)| *field)
        .filter(|field| crate::caps::tests::rich_caps().supports(*field))
        .filter(|field| field.kind() != Kind::ReadOnly)
        // Each value has a root and a VPID of its own, with other numbers in another machine.
        .filter(|field| !matches!(*field, Field::EPT_POINTER | Field::VPID | Field::HOST_RIP))
        .collect();
    let bits = proptest::sample::select(fields).prop_flat_map(move |field| {
        let value = good.get(field);
        prop_oneof![
            3 => Just((field, value)),
            2 => (0..64u32).prop_map(move |bit| (field, value ^ 1 << bit)),
            1 => Just((field, 0)),
        ]
    });
    let known = [
        (Field::GUEST_RIP, 0x1000),
        (Field::GUEST_RSP, 0x2000),
        (Field::GUEST_CR3, 0x3000),
        (Field::TSC_OFFSET, 0x1234),
        (Field::CR0_SHADOW, 0x21),
        (Field::PROC_CTLS, values().get(Field::PROC_CTLS) | 8),
        (Field::GUEST_PAT, 0x0606_0606_0606_0606),
        (Field::GUEST_DR7, 0x401),
        (Field::PIN_CTLS, values().get(Field::PIN_CTLS) | 1 << 6),
        (Field::PREEMPTION_TIMER, 99),
        (Field::ENTRY_INTR_INFO, 0x8000_0320),
        (Field::ENTRY_CTLS, values().get(Field::ENTRY_CTLS) & !(1 << 14)),
        (Field::ENTRY_CTLS, values().get(Field::ENTRY_CTLS) & !(1 << 9)),
        (Field::EXIT_CTLS, values().get(Field::EXIT_CTLS) | 1 << 2 | 1 << 18),
    ];
    let guest = [
        (Field::GUEST_RIP, 0x7000),
        (Field::GUEST_RSP, 0x8000),
        (Field::GUEST_CR3, 0x9000),
        (Field::GUEST_RFLAGS, 0x246),
        (Field::GUEST_DR7, 0x403),
        (Field::GUEST_PAT, 0x0404_0404_0404_0404),
        (Field::GUEST_GS_BASE, 0x1234_5000),
        (Field::PREEMPTION_TIMER, 5),
        (Field::GUEST_INTERRUPTIBILITY, 8),
    ];
    prop_oneof![
        4 => bits.prop_map(|(field, value)| Step::Write(field, value)),
        4 => proptest::sample::select(known.to_vec()).prop_map(|(field, value)| Step::Write(field, value)),
        3 => proptest::sample::select(guest.to_vec()).prop_map(|(field, value)| Step::Guest(field, value)),
        1 => (0x400..0x404u64, 0..3u64).prop_map(|(dr7, debugctl)| Step::Debug(dr7, debugctl)),
        6 => Just(Step::Enter),
        1 => Just(Step::Other),
        1 => Just(Step::Clear),
    ]
}

/// Enters L2 in a new machine with the VMCS that `rig` has, and compares.
fn compare_with_first_entry(rig: &mut Rig, cpu_state: &[(Field, u64)]) {
    let vmcs = rig.nested.vmcs12(&rig.cpus[0]).unwrap().clone();
    let mut fresh = Rig::ready();
    fresh.write_all(0, &vmcs);
    for (field, value) in cpu_state {
        fresh.host.regions.get_mut(&crate::testing::rig::vmcs01(0)).unwrap()[field.slot()] = *value;
        rig.host.current = crate::testing::rig::vmcs01(0);
        rig.host.set(*field, *value);
    }
    fresh.host.ram.bytes.clone_from(&rig.host.ram.bytes);
    let expected = fresh.launch(0);
    let end = match vmcs.launch_state {
        LaunchState::Clear => rig.launch(0),
        LaunchState::Launched => rig.resume(0),
    };
    assert_eq!(end, expected);
    if end == End::Exited {
        for field in [Field::EXIT_REASON, Field::EXIT_QUALIFICATION] {
            assert_eq!(rig.vmread(0, field), fresh.vmread(0, field));
        }
    }
    if end != End::Entered {
        return;
    }
    let in_use = |field: Field| match field {
        Field::IO_BITMAP_A | Field::IO_BITMAP_B => vmcs.proc().contains(ProcCtls::IO_BITMAPS),
        Field::VIRTUAL_APIC_ADDR => vmcs.proc().contains(ProcCtls::TPR_SHADOW),
        Field::APIC_ACCESS_ADDR => vmcs.proc2().contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES),
        Field::PREEMPTION_TIMER => vmcs.pin().contains(PinCtls::PREEMPTION_TIMER),
        field if PDPTES.contains(&field) => check::pae_paging(&vmcs),
        // The number of a vpid02 depends on what came before.
        Field::VPID | Field::EPT_POINTER => false,
        _ => !NOT_IN_USE.contains(&field) && field.kind() != Kind::ReadOnly,
    };
    for (field, _) in FIELDS {
        if fresh.nested.caps().supports(*field) && in_use(*field) {
            let first = fresh.host.field_of(vmcs02(0), *field);
            assert_eq!(rig.host.field_of(vmcs02(0), *field), first, "{field:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn an_entry_does_not_depend_on_those_before(
        steps in proptest::collection::vec(step(), 1..40)
    ) {
        let mut rig = Rig::ready();
        let other = VMCS + 0x1000;
        rig.put_revision(other);
        rig.pointer(0, ExitReason::VMPTRLD, other);
        rig.write_all(0, &values());
        let mut regions = [VMCS, other];
        let mut l1 = [
            (Field::GUEST_DR7, 0x400),
            (Field::GUEST_DEBUGCTL, 0),
            (Field::GUEST_PAT, 0x0007_0406_0007_0406),
            (Field::GUEST_EFER, 0xd01),
            (Field::GUEST_CR0, 0x8000_0033),
            (Field::GUEST_CR3, PAGING),
            (Field::GUEST_CR4, 0x2020),
            (Field::GUEST_CS_AR, 0xa09b),
            (Field::GUEST_INTERRUPTIBILITY, 0),
        ];
        let mut guest = Vec::new();
        for step in steps {
            match step {
                Step::Write(field, value) => {
                    rig.vmwrite(0, field, value);
                }
                Step::Debug(dr7, debugctl) => (l1[0].1, l1[1].1) = (dr7, debugctl),
                Step::Guest(field, value) => guest.push((field, value)),
                Step::Enter => {
                    compare_with_first_entry(&mut rig, &l1);
                    if rig.cpus[0].runs_l2() {
                        rig.host.current = vmcs02(0);
                        let timer = rig.l2(0, Field::PIN_CTLS) & 1 << 6 != 0;
                        for (field, value) in guest.drain(..) {
                            if timer || field != Field::PREEMPTION_TIMER {
                                rig.host.set(field, value);
                            }
                        }
                        rig.exit(0, ExitReason::CPUID, 0);
                    }
                    // Whatever L1's host state was, L1 has put its own back.
                    rig.host.current = crate::testing::rig::vmcs01(0);
                    for (field, value) in l1 {
                        rig.host.set(field, value);
                    }
                }
                Step::Other => {
                    regions.swap(0, 1);
                    rig.pointer(0, ExitReason::VMPTRLD, regions[1]);
                }
                Step::Clear => {
                    rig.pointer(0, ExitReason::VMCLEAR, regions[1]);
                    rig.pointer(0, ExitReason::VMPTRLD, regions[1]);
                }
            }
        }
    }
}
