//! Is every write to a tracked page seen, and does L1 see nothing of it?

use super::*;
use crate::engine::VmfuncMode;
use crate::host::L1Memory;
use crate::shootdown::Place;
use crate::testing::rig::{
    EXIT_STORE, End, IO_BITMAP_A, MSR_BITMAP, OPERAND, Rig, VIRTUAL_APIC, VMCS, values, vmcs02,
};
use crate::testing::{Remapped, TestHost};
use vmx_defs::controls::{ProcCtls, ProcCtls2};
use vmx_defs::ept::Eptp;
use vmx_defs::event::{IntrInfo, vector};
use vmx_defs::{ExitReason, Field};

/// The EPT of the L2s here: four tables.
const ROOT: u64 = 0xc_0000;
/// The tracked page.
const PAGE: u64 = 0xd_0000;
/// Where L2 has it.
const GPA: u64 = 0x5000;
/// Readable, writable, executable, write-back.
const RWX: u64 = 7 | 6 << 3;

const READ: u64 = 1;
const WRITE: u64 = 2;
const FETCH: u64 = 4;
/// A linear address is valid, and was translated.
const TRANSLATED: u64 = 3 << 7;
/// A linear address is valid, and was being translated.
const WALK: u64 = 1 << 7;

fn control(field: Field, set: u32, clear: u32) -> (Field, u64) {
    (field, values().get(field) & !u64::from(clear) | u64::from(set))
}

/// L2 runs on the first of `cpus` processors, with the tracked page at [`GPA`].
fn running(cpus: usize, flags: bool, writes: &[(Field, u64)]) -> Rig {
    let mut rig = Rig::with(cpus, VmfuncMode::Emulated);
    rig.map(ROOT, GPA, PAGE, RWX);
    for cpu in 0..cpus {
        rig.make_ready(cpu, VMCS + 0x1000 * cpu as u64);
        let eptp = Eptp::from(ROOT | 3 << 3 | 6).with_accessed_dirty(flags);
        assert_eq!(rig.vmwrite(cpu, Field::EPT_POINTER, eptp.into_bits()), End::Succeed);
        for (field, value) in writes {
            assert_eq!(rig.vmwrite(cpu, *field, *value), End::Succeed, "{field:?}");
        }
    }
    assert_eq!(rig.launch(0), End::Entered);
    rig
}

/// Takes write access to a page away in EPT01.
fn deny(host: &mut TestHost, page: u64) {
    let rights = EptPermissions::READ | EptPermissions::EXECUTE;
    let range = page..page + 0x1000;
    host.ram.remapped.push(Remapped { range, offset: TestHost::HPA_OF_L1, rights });
}

fn try_to_track(rig: &mut Rig, page: u64, on: HardwareWrites) -> Result<Request, TrackError<()>> {
    rig.nested.track(&mut rig.host, L1Gpa::new(page), on, |host| {
        deny(host, page);
        Ok(())
    })
}

fn track(rig: &mut Rig, page: u64) -> Request {
    try_to_track(rig, page, HardwareWrites::Pass).unwrap()
}

fn untrack(rig: &mut Rig, page: u64) -> Option<Request> {
    rig.nested.untrack(&mut rig.host, L1Gpa::new(page), |host| {
        host.ram.remapped.retain(|one| one.range.start != page);
    })
}

fn writes(rig: &Rig, page: u64) -> Option<u64> {
    rig.nested.tracked().writes(L1Gpa::new(page))
}

fn injected(rig: &Rig) -> Option<u8> {
    let info = IntrInfo::from(rig.l2(0, Field::ENTRY_INTR_INFO) as u32);
    info.valid().then_some(info.vector())
}

#[test]
fn a_write_of_l2_is_the_hosts_and_all_else_goes_on() {
    for flags in [false, true] {
        let mut rig = running(1, flags, &[]);
        assert_eq!(rig.violation(0, GPA, READ | WRITE | TRANSLATED), End::Entered);
        track(&mut rig, PAGE);
        assert_eq!(rig.violation(0, GPA, READ | TRANSLATED), End::Entered);
        assert_eq!(rig.violation(0, GPA, FETCH | TRANSLATED), End::Entered);
        assert_eq!(rig.violation(0, GPA + 8, WRITE | TRANSLATED), End::Tracked(PAGE + 8));
        assert_eq!(injected(&rig), None);
        // A page walk counts as a write where the EPT has accessed and dirty flags.
        let walk = rig.violation(0, GPA, READ | WALK);
        assert_eq!(walk, if flags { End::Tracked(PAGE) } else { End::Entered });
        assert_eq!(rig.violation(0, GPA, WRITE | WALK), End::Tracked(PAGE));
        assert!(untrack(&mut rig, PAGE).is_some());
        assert_eq!(rig.violation(0, GPA, WRITE | TRANSLATED), End::Entered);
        assert_eq!(injected(&rig), None);
        assert_eq!(untrack(&mut rig, PAGE), None);
    }
}

#[test]
fn what_l1s_ept_denies_is_l1s_and_what_l0_hides_a_fault() {
    let mut rig = running(1, false, &[]);
    rig.map(ROOT, GPA + 0x1000, PAGE, READ | 6 << 3);
    rig.map(ROOT, GPA + 0x2000, PAGE + 0x1000, RWX);
    rig.host.ram.hidden.push(PAGE + 0x1000..PAGE + 0x2000);
    track(&mut rig, PAGE);
    assert_eq!(rig.violation(0, GPA + 0x2000, WRITE | TRANSLATED), End::Entered);
    assert_eq!(injected(&rig), Some(vector::GP));
    assert_eq!(rig.violation(0, GPA + 0x1000, WRITE | TRANSLATED), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::EPT_VIOLATION.bits().into());
    // L1's own rights, not those of EPT01.
    let told = rig.vmread(0, Field::EXIT_QUALIFICATION);
    assert_eq!(told >> 3 & 7, READ);
}

#[test]
fn without_ept_l2_writes_to_l1s_own_addresses() {
    let off = ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS;
    let mut rig = running(1, false, &[control(Field::PROC_CTLS2, 0, off.bits())]);
    track(&mut rig, PAGE);
    assert_eq!(rig.violation(0, PAGE + 4, WRITE | TRANSLATED), End::Tracked(PAGE + 4));
    untrack(&mut rig, PAGE);
    // The processor's translation was a stale one.
    assert_eq!(rig.violation(0, PAGE + 4, WRITE | TRANSLATED), End::Entered);
    assert_eq!(injected(&rig), None);
}

#[test]
fn an_access_to_l1s_apic_access_page_comes_first() {
    let apic = control(Field::PROC_CTLS2, ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits(), 0);
    let mut rig = running(1, false, &[apic, (Field::APIC_ACCESS_ADDR, PAGE)]);
    track(&mut rig, PAGE);
    assert_eq!(rig.violation(0, GPA + 0x300, WRITE | TRANSLATED), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::APIC_ACCESS.bits().into());
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 0x1300);
}

#[test]
fn tracking_waits_for_every_processor_that_runs() {
    let mut rig = running(2, false, &[]);
    assert_eq!(rig.launch(1), End::Entered);
    for cpu in 0..2 {
        assert_eq!(rig.violation(cpu, GPA, WRITE | TRANSLATED), End::Entered);
    }
    // Both have cached the page for writing; the first acts.
    let request = track(&mut rig, PAGE);
    let shootdown = rig.nested.shootdown().clone();
    assert!(!shootdown.is_complete(request, Place::Ept01, Some(0)));
    assert!(rig.cpus[0].is_behind() && rig.cpus[1].is_behind());
    assert_eq!(rig.violation(1, GPA, WRITE | TRANSLATED), End::Tracked(PAGE));
    assert!(shootdown.is_complete(request, Place::Ept01, Some(0)));
    assert_eq!(rig.violation(0, GPA, READ | TRANSLATED), End::Entered);
    assert!(shootdown.is_complete(request, Place::Ept01, None));
    assert!(!rig.cpus[0].is_behind());
}

#[test]
fn what_the_engine_writes_for_l1_is_counted() {
    // Everything that it writes, in a page of its own: L1's instruction, a VMCS, an MSR area, flags.
    let mut rig = running(1, true, &[(Field::EXIT_MSR_STORE_COUNT, 1)]);
    rig.host.ram.write_u64(L1Gpa::new(EXIT_STORE), 0x10);
    assert_eq!(rig.violation(0, GPA, READ | TRANSLATED), End::Entered);
    for page in [OPERAND, VMCS, EXIT_STORE, ROOT + 0x3000, MSR_BITMAP] {
        track(&mut rig, page);
        assert_eq!(writes(&rig, page), Some(0));
    }
    // The dirty flag of a leaf; the others are set already.
    assert_eq!(rig.violation(0, GPA, WRITE | TRANSLATED), End::Entered);
    assert_eq!(writes(&rig, ROOT + 0x3000), Some(1));
    // An exit stores an MSR.
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(writes(&rig, EXIT_STORE), Some(1));
    assert_eq!(writes(&rig, OPERAND), Some(0));
    assert_eq!(rig.exec(0, ExitReason::VMPTRST, false), End::Succeed);
    assert_eq!(writes(&rig, OPERAND), Some(1));
    let before = writes(&rig, VMCS);
    assert_eq!(before, Some(0));
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, VMCS), End::Succeed);
    assert!(writes(&rig, VMCS) > before);
    assert_eq!(writes(&rig, MSR_BITMAP), Some(0), "only read");
    // Across a border both pages are written.
    let (tracked, count) = (rig.nested.tracked(), |at| writes(&rig, at).unwrap());
    let before = (count(VMCS), count(MSR_BITMAP));
    tracked.about_to_write(L1Gpa::new(VMCS - 4), 8);
    tracked.about_to_write(L1Gpa::new(MSR_BITMAP + 0xfff), 1);
    tracked.about_to_write(L1Gpa::new(MSR_BITMAP + 0x1000), 8);
    tracked.about_to_write(L1Gpa::new(MSR_BITMAP), 0);
    assert_eq!((count(VMCS), count(MSR_BITMAP)), (before.0 + 1, before.1 + 1));
}

#[test]
fn the_processors_own_writes_end_the_count_or_go_elsewhere() {
    let apic = |page| [control(Field::PROC_CTLS, ProcCtls::TPR_SHADOW.bits(), 0), page];
    let apic = apic((Field::VIRTUAL_APIC_ADDR, VIRTUAL_APIC));
    let real = TestHost::HPA_OF_L1 + VIRTUAL_APIC;
    let mut rig = running(1, false, &apic);
    assert_eq!(rig.l2(0, Field::VIRTUAL_APIC_ADDR), real);
    // While it runs, the processor writes there.
    let refused = try_to_track(&mut rig, VIRTUAL_APIC, HardwareWrites::Pass);
    assert_eq!(refused, Err(TrackError::WrittenByHardware));
    assert!(rig.host.ram.remapped.is_empty());
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    track(&mut rig, VIRTUAL_APIC);
    assert_eq!(writes(&rig, VIRTUAL_APIC), Some(0));
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.l2(0, Field::VIRTUAL_APIC_ADDR), real);
    assert_eq!(writes(&rig, VIRTUAL_APIC), None, "nobody can know");
    assert!(rig.nested.tracked().contains(L1Gpa::new(VIRTUAL_APIC)));
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(writes(&rig, VIRTUAL_APIC), None);
    untrack(&mut rig, VIRTUAL_APIC);
    // A device's registers are not for a virtual APIC: also while one runs there.
    assert_eq!(rig.resume(0), End::Entered);
    try_to_track(&mut rig, VIRTUAL_APIC, HardwareWrites::Redirect).unwrap();
    rig.nested.catch_up(&mut rig.cpus[0], &mut rig.host).unwrap();
    let scratch = crate::testing::rig::scratch(0).as_u64();
    assert_eq!(rig.l2(0, Field::VIRTUAL_APIC_ADDR), scratch);
    assert_eq!(writes(&rig, VIRTUAL_APIC), Some(0));
}

#[test]
fn what_can_not_be_tracked_is_refused_and_nothing_changes() {
    let mut rig = running(1, false, &[]);
    rig.host.ram.hidden.push(PAGE..PAGE + 0x1000);
    let pass = HardwareWrites::Pass;
    assert_eq!(try_to_track(&mut rig, PAGE, pass), Err(TrackError::NotWritable));
    rig.host.ram.hidden.clear();
    let fails = rig.nested.track(&mut rig.host, L1Gpa::new(PAGE), pass, |_| Err("no frames"));
    assert_eq!(fails, Err(TrackError::Host("no frames")));
    assert!(!rig.nested.tracked().contains(L1Gpa::new(PAGE)));
    for number in 0..TRACKED_PAGES as u64 {
        track(&mut rig, 0xe_0000 + 0x1000 * number);
    }
    assert_eq!(try_to_track(&mut rig, 0xe_0000, pass), Err(TrackError::Twice));
    assert_eq!(try_to_track(&mut rig, PAGE, pass), Err(TrackError::Full));
    assert_eq!(rig.host.ram.remapped.len(), TRACKED_PAGES);
    untrack(&mut rig, 0xe_3000);
    track(&mut rig, PAGE);
}

#[test]
fn pages_that_vmcs02_names_follow_ept01() {
    let bitmaps = control(Field::PROC_CTLS, ProcCtls::IO_BITMAPS.bits(), 0);
    let mut rig = running(2, false, &[bitmaps]);
    assert_eq!(rig.launch(1), End::Entered);
    assert_eq!(rig.exit(1, ExitReason::CPUID, 0), End::Exited);
    let plain = TestHost::HPA_OF_L1 + IO_BITMAP_A;
    let there = |rig: &Rig| [0, 1].map(|cpu| rig.l2(cpu, Field::IO_BITMAP_A));
    assert_eq!(there(&rig), [plain; 2]);
    let moved = Remapped {
        range: IO_BITMAP_A..IO_BITMAP_A + 0x1000,
        offset: 5 << 40,
        rights: EptPermissions::all(),
    };
    let (answer, request) =
        rig.nested.change_ept01(&mut rig.host, L1Gpa::new(IO_BITMAP_A), 1, |host| {
            host.ram.remapped.push(moved);
            7
        });
    assert_eq!(answer, 7);
    assert!(!rig.nested.shootdown().is_complete(request, Place::Ept01, None));
    // Where L2 runs, before it goes on; where L1 does, at the next VM entry.
    rig.host.current = vmcs02(0);
    rig.nested.catch_up(&mut rig.cpus[0], &mut rig.host).unwrap();
    let after = (5 << 40) + IO_BITMAP_A;
    assert_eq!(there(&rig), [after, plain]);
    assert_eq!(rig.resume(1), End::Entered);
    assert_eq!(there(&rig), [after, after]);
    assert!(rig.nested.shootdown().is_complete(request, Place::Ept01, None));
}

#[test]
fn a_large_page_that_a_change_touches_is_split_and_joined_again() {
    for (size, level) in [(21, 2), (30, 3)] {
        let mut rig = running(1, false, &[]);
        rig.host.ram.leaf_shift = size;
        // L2's addresses from 1 GByte on are L1's from 0 on, in one page.
        let table = L1Gpa::new(ROOT + 0x1000 * (4 - level) + if level == 3 { 8 } else { 0 });
        if level == 2 {
            let above = L1Gpa::new(ROOT + 0x1000 + 8);
            rig.host.ram.write_u64(above, (ROOT + 0x2000) | 7);
        }
        rig.host.ram.write_u64(table, RWX | 1 << 7);
        let at = (1 << 30) + PAGE;
        assert_eq!(rig.violation(0, at, WRITE | TRANSLATED), End::Entered);
        let (whole, _) = rig.nested.shadow_usage();
        track(&mut rig, PAGE);
        assert_eq!(rig.violation(0, at, READ | TRANSLATED), End::Entered);
        let (split, _) = rig.nested.shadow_usage();
        assert_eq!(split, whole + level as usize - 1, "a table for each size less");
        assert_eq!(rig.violation(0, at, WRITE | TRANSLATED), End::Tracked(PAGE));
        assert_eq!(rig.violation(0, at + 0x1000, WRITE | TRANSLATED), End::Entered);
        untrack(&mut rig, PAGE);
        assert_eq!(rig.violation(0, at, WRITE | TRANSLATED), End::Entered);
        assert_eq!(rig.nested.shadow_usage().0, whole);
        assert_eq!(injected(&rig), None);
    }
}
