//! Do S1 to S9, the rules of EPTP switching, hold in the engine?

use super::*;
use crate::host::InvVpid;
use crate::testing::rig::{EPT, End, LIST, Rig, VMCS, eptp12, values, vmcs02};
use alloc::vec::Vec;
use vmx_defs::ExitReason;
use vmx_defs::controls::{EntryCtls, ProcCtls2};

/// Readable, writable, executable, write-back.
const RWX: u64 = 7 | 6 << 3;
/// PML4 table of view `n`, with the three tables after it.
fn view(n: u64) -> u64 {
    0x8_0000 + 0x4000 * n
}

fn eptp(n: u64) -> u64 {
    view(n) | 3 << 3 | 6
}

fn put_list(rig: &mut Rig, index: u64, eptp: u64) {
    rig.host.ram.write_u64(L1Gpa::new(LIST + 8 * index), eptp);
}

/// L2 runs on [`eptp12`]; entries 0 to 4 of the list are views that map 5000H to a page each, the
/// odd ones with accessed and dirty flags.
fn ready(vpid: bool, mode: VmfuncMode) -> Rig {
    let mut rig = Rig::with(1, mode);
    rig.make_ready(0, VMCS);
    if !vpid {
        let proc2 = values().get(Field::PROC_CTLS2) & !u64::from(ProcCtls2::VPID.bits());
        rig.vmwrite(0, Field::PROC_CTLS2, proc2);
    }
    rig.map(EPT, 0x5000, 0xf_0000, RWX);
    for n in 0..5 {
        rig.map(view(n), 0x5000, 0xf_1000 + 0x1000 * n, RWX);
        put_list(&mut rig, n, eptp(n) | (n & 1) << 6);
    }
    assert_eq!(rig.launch(0), End::Entered);
    rig
}

fn switch(rig: &mut Rig, index: u64) {
    let rip = rig.l2(0, Field::GUEST_RIP);
    assert_eq!(rig.vmfunc(0, 0, index), End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_RIP), rip + 3);
}

fn exit_and_read(rig: &mut Rig, field: Field) -> u64 {
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    let value = rig.vmread(0, field);
    assert_eq!(rig.resume(0), End::Entered);
    value
}

#[test]
fn s1_vm_entry_and_vmfunc_reach_the_same_root() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    let entered = rig.l2(0, Field::EPT_POINTER);
    put_list(&mut rig, 100, eptp12().into_bits());
    switch(&mut rig, 3);
    let switched = rig.l2(0, Field::EPT_POINTER);
    assert_ne!(switched, entered);
    switch(&mut rig, 100);
    assert_eq!(rig.l2(0, Field::EPT_POINTER), entered);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    rig.vmwrite(0, Field::EPT_POINTER, eptp(3) | 1 << 6);
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.l2(0, Field::EPT_POINTER), switched);
    assert_eq!(rig.nested.shadow_counters().roots_built, 2);
}

#[test]
fn s2_s6_switches_discard_no_root_and_no_translation() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    for n in 0..5 {
        switch(&mut rig, n);
        assert_eq!(rig.violation(0, 0x5000, 2), End::Entered);
    }
    let before = rig.nested.shadow_counters();
    let usage = rig.nested.shadow_usage();
    for round in 0..20 {
        switch(&mut rig, round * 3 % 5);
    }
    assert_eq!(rig.nested.shadow_counters(), before);
    assert_eq!(rig.nested.shadow_usage(), usage);
    assert!(rig.host.invepts.is_empty());
}

#[test]
fn s3_bit_6_of_the_list_entry_switches_accessed_and_dirty_flags() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    for n in [0, 1, 2, 1] {
        switch(&mut rig, n);
        assert_eq!(rig.l2(0, Field::EPT_POINTER) >> 6 & 1, n & 1);
        rig.violation(0, 0x5000, 2);
        let leaf = rig.host.ram.read_u64(L1Gpa::new(view(n) + 0x3000 + 8 * 5));
        assert_eq!(leaf >> 8 & 3, 3 * (n & 1));
    }
}

#[test]
fn s4_a_switch_flushes_vpid_0000h_and_no_other() {
    let mut rig = ready(false, VmfuncMode::Emulated);
    let vpid02 = rig.l2(0, Field::VPID) as u16;
    // Also to the EPTP in use already.
    for index in [0, 1, 1, 1, 0] {
        rig.host.invvpids.clear();
        switch(&mut rig, index);
        assert_eq!(rig.host.invvpids, [InvVpid::Single(vpid02)]);
    }
    rig.host.invvpids.clear();
    assert_eq!(rig.vmfunc(0, 0, 512), End::Exited);
    assert_eq!(rig.host.invvpids, [InvVpid::Single(crate::tlb::VPID01)], "that of the exit");

    let mut rig = ready(true, VmfuncMode::Emulated);
    rig.host.invvpids.clear();
    for index in [0, 1, 1, 0] {
        switch(&mut rig, index);
    }
    assert!(rig.host.invvpids.is_empty());
}

#[test]
fn s5_a_switch_does_not_load_pdptes() {
    let mut rig = Rig::ready();
    let ia32e = u64::from(EntryCtls::IA32E_MODE_GUEST.bits());
    for (field, value) in [
        (Field::ENTRY_CTLS, values().get(Field::ENTRY_CTLS) & !ia32e),
        (Field::GUEST_EFER, 0x801),
        (Field::GUEST_RIP, 0x1000),
        (Field::GUEST_CS_AR, 0xc09b),
        (Field::GUEST_PDPTE0, 0x3001),
    ] {
        assert_eq!(rig.vmwrite(0, field, value), End::Succeed);
    }
    put_list(&mut rig, 0, eptp(0));
    rig.map(view(0), 0x2_0000, 0x9_0000, RWX);
    rig.host.ram.write_u64(L1Gpa::new(0x9_0000), 0x7001);
    assert_eq!(rig.launch(0), End::Entered);
    // What L2 has in use now, with CR3 pointing elsewhere.
    rig.host.current = vmcs02(0);
    rig.host.set(Field::GUEST_PDPTE0, 0x5001);
    switch(&mut rig, 0);
    assert_eq!(rig.l2(0, Field::GUEST_PDPTE0), 0x5001);
    assert_eq!(exit_and_read(&mut rig, Field::GUEST_PDPTE0), 0x5001);
}

#[test]
fn s7_what_can_not_be_switched_exits_and_changes_nothing() {
    let good = eptp(0);
    let bad = [0, good | 1 << 40, good | 1 << 7, good | 1 << 63, good & !0x38, good & !7 | 2];
    for (n, entry) in bad.into_iter().enumerate() {
        let mut rig = ready(true, VmfuncMode::Emulated);
        put_list(&mut rig, 7, entry);
        exits(&mut rig, 0, 7, n);
    }
    for (rax, rcx) in [(0, 512), (0, 0xffff_ffff), (1, 0), (63, 0), (63, 512)] {
        let mut rig = ready(true, VmfuncMode::Emulated);
        exits(&mut rig, rax, rcx, 0);
    }
    let mut rig = Rig::ready();
    rig.vmwrite(0, Field::VM_FUNCTION_CONTROLS, 0);
    put_list(&mut rig, 0, good);
    assert_eq!(rig.launch(0), End::Entered);
    exits(&mut rig, 0, 0, 0);
}

fn exits(rig: &mut Rig, rax: u64, rcx: u64, number: usize) {
    let (rip, eptp) = (rig.l2(0, Field::GUEST_RIP), rig.l2(0, Field::EPT_POINTER));
    assert_eq!(rig.vmfunc(0, rax, rcx), End::Exited, "{rax} {rcx} {number}");
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::VMFUNC.bits().into());
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 0);
    assert_eq!(rig.vmread(0, Field::EXIT_INSTRUCTION_LEN), 3);
    assert_eq!(rig.vmread(0, Field::GUEST_RIP), rip);
    assert_eq!(rig.vmread(0, Field::EPT_POINTER), eptp12().into_bits());
    assert_eq!(rig.l2(0, Field::EPT_POINTER), eptp);
    assert_eq!(rig.cpus[0].counters().switches, 0);
}

#[test]
fn s7_upper_halves_do_not_count_and_rip_moves_by_the_reported_length() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    let rip = rig.l2(0, Field::GUEST_RIP);
    rig.gprs.set(RAX, 0xdead_beef_0000_0000);
    assert_eq!(rig.vmfunc(0, 0xdead_beef_0000_0000, 0xffff_ffff_0000_0002), End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_RIP), rip + 3);
    assert_eq!(exit_and_read(&mut rig, Field::EPT_POINTER), eptp(2));
    // With a prefix it is longer.
    rig.gprs.set(RAX, 0);
    rig.gprs.set(RCX, 0);
    rig.host.current = vmcs02(0);
    rig.host.set(Field::EXIT_INSTRUCTION_LEN, 5);
    assert_eq!(rig.exit(0, ExitReason::VMFUNC, 0), End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_RIP), rip + 8);
}

#[test]
fn s8_l1_reads_the_entry_bit_for_bit() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    for (n, bits) in [(0, 0), (0, 1 << 6), (3, 0), (3, 1 << 6)] {
        // Bits 2:0 are the memory type: UC is another EPTP value.
        for kind in [0, 6] {
            let entry = eptp(n) & !7 | kind | bits;
            put_list(&mut rig, 9, entry);
            switch(&mut rig, 9);
            assert_eq!(exit_and_read(&mut rig, Field::EPT_POINTER), entry);
        }
    }
    assert!(!rig.nested.caps().supports(Field::EPTP_INDEX), "no #VE, so no EPTP index");
}

#[test]
fn s9_the_list_is_read_at_each_switch() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    for n in [0, 3, 1, 0] {
        put_list(&mut rig, 4, eptp(n));
        rig.host.ram.reads.clear();
        switch(&mut rig, 4);
        assert_eq!(rig.host.ram.reads, [L1Gpa::new(LIST + 32)], "once");
        assert_eq!(exit_and_read(&mut rig, Field::EPT_POINTER), eptp(n));
    }
    put_list(&mut rig, 4, 0);
    assert_eq!(rig.vmfunc(0, 0, 4), End::Exited);
    // The last entry of the list, and a list in memory that L0 hides.
    let mut rig = ready(true, VmfuncMode::Emulated);
    put_list(&mut rig, 511, eptp(1));
    switch(&mut rig, 511);
    rig.host.ram.hidden.push(LIST..LIST + 0x1000);
    assert_eq!(rig.vmfunc(0, 0, 0), End::Exited);
}

#[test]
fn a_warm_switch_takes_few_vmreads_and_vmwrites() {
    for vpid in [true, false] {
        let mut rig = ready(vpid, VmfuncMode::Emulated);
        switch(&mut rig, 0);
        switch(&mut rig, 1);
        (rig.host.vmreads, rig.host.vmwrites) = (0, 0);
        switch(&mut rig, 0);
        assert!(rig.host.vmreads <= 4, "{} VMREADs", rig.host.vmreads);
        assert!(rig.host.vmwrites <= 2, "{} VMWRITEs", rig.host.vmwrites);
    }
}

#[test]
fn reloading_gives_the_same_translations_without_a_cache() {
    let mut rig = ready(true, VmfuncMode::Reload);
    for n in [0, 1, 0, 3, 3] {
        switch(&mut rig, n);
        assert_eq!(rig.nested.shadow_usage(), (1, 1));
        assert_eq!(rig.violation(0, 0x5000, 2), End::Entered);
        assert_eq!(exit_and_read(&mut rig, Field::EPT_POINTER), eptp(n) | (n & 1) << 6);
    }
}

#[test]
fn a_single_step_over_a_switch_traps() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    rig.host.current = vmcs02(0);
    rig.host.set(Field::GUEST_RFLAGS, 0x1_0102);
    rig.host.set(Field::GUEST_INTERRUPTIBILITY, 1);
    switch(&mut rig, 0);
    assert_eq!(rig.l2(0, Field::GUEST_PENDING_DEBUG), 1 << 14);
    assert_eq!(rig.l2(0, Field::GUEST_RFLAGS), 0x102);
    assert_eq!(rig.l2(0, Field::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn each_vmcs_goes_on_with_the_eptp_that_it_switched_to() {
    let mut rig = ready(true, VmfuncMode::Emulated);
    switch(&mut rig, 2);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    let other = VMCS + 0x1000;
    rig.put_revision(other);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, other), End::Succeed);
    rig.write_all(0, &values());
    assert_eq!(rig.launch(0), End::Entered);
    switch(&mut rig, 3);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(exit_and_read(&mut rig, Field::EPT_POINTER), eptp(2));
}

#[test]
fn switches_of_two_processors_do_not_disturb_each_other() {
    let mut rig = Rig::with(2, VmfuncMode::Emulated);
    for cpu in 0..2 {
        rig.make_ready(cpu, VMCS + 0x1000 * cpu as u64);
        for n in 0..5 {
            rig.map(view(n), 0x5000, 0xf_1000 + 0x1000 * n, RWX);
            put_list(&mut rig, n, eptp(n));
        }
        assert_eq!(rig.launch(cpu), End::Entered);
    }
    let mut roots = Vec::new();
    for n in 0..5 {
        for cpu in 0..2 {
            assert_eq!(rig.vmfunc(cpu, 0, (n + cpu as u64) % 5), End::Entered);
        }
        roots.push((rig.l2(0, Field::EPT_POINTER), rig.l2(1, Field::EPT_POINTER)));
    }
    for n in 0..5 {
        assert_eq!(roots[n].1, roots[(n + 1) % 5].0, "one root for both processors");
    }
    assert_eq!(rig.nested.shadow_counters().roots_built, 6);
}
