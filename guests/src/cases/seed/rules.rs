//! Answers: which view does L2 see, what does L1 read afterwards, and what is refused?

use super::*;
use crate::{ensure, vmx::Op};
use vmx_defs::{Eptp, VmFuncCtls};

/// S1: VMFUNC leaf 0 switches to the EPTP number ECX of the list; so do VM entries.
pub(super) fn switches(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let results = ctx.arena.page();
    rotate(&mut stage, results, Op::Rotate)?;
    for view in 0..setting.views {
        let read = results.read(view) as u32;
        ensure_eq!(u64::from(read), Views::value(view), "what L2 read in view {view}");
    }
    // Writes go to the page of the view.
    for view in 0..setting.views {
        results.write(view, 0x0DD0_0000 + view as u64);
    }
    rotate(&mut stage, results, Op::RotateStore)?;
    for view in 0..setting.views {
        let written = stage.views.data(view).read(0) as u32;
        ensure_eq!(u64::from(written), 0x0DD0_0000 + view as u64, "what view {view} holds");
        stage.views.data(view).write(0, Views::value(view));
    }
    // Switches and VM entries with another EPTP take turns.
    for view in stage.sample() {
        let entered = setting.views - 1 - view;
        vmcs::write(Field::EPT_POINTER, stage.views.eptp(entered));
        stage.expect_view(entered)?;
        stage.switch(view)?;
        stage.expect_view(view)?;
    }
    Ok(())
}

fn rotate(stage: &mut Stage, results: Page, op: Op) -> Result<(), Outcome> {
    stage.vm.registers.rbx = WINDOW;
    stage.vm.registers.rsi = results.address();
    stage.vm.registers.rdi = stage.views.count as u64;
    stage.vm.exec(op)
}

/// S2: later switches find what earlier ones used, although L1 does nothing in between. Where L0
/// lets its exits be counted, none of them is an EPT violation: no root was discarded.
pub(super) fn keeps_roots(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let results = ctx.arena.page();
    for round in 0..3 {
        let before = crate::vmx::l0_exits_of_l2(ExitReason::EPT_VIOLATION);
        rotate(&mut stage, results, Op::Rotate)?;
        if let (1.., Some(before), Some(after)) =
            (round, before, crate::vmx::l0_exits_of_l2(ExitReason::EPT_VIOLATION))
        {
            ensure_eq!(after - before, 0, "L0's EPT violations of L2 in round {round}");
        }
        for view in 0..setting.views {
            let read = results.read(view) as u32;
            ensure_eq!(u64::from(read), Views::value(view), "view {view} in round {round}");
            results.write(view, 0);
        }
    }
    // A page that is granted needs no invalidation to be seen in the view that was not current.
    for view in stage.sample() {
        let late = ctx.arena.page();
        late.write(0, 0x1A7E_0000 + view as u64);
        stage.views.leaf(view).table.write(2, late.address() | LEAF);
    }
    for view in stage.sample() {
        stage.switch(view)?;
        let read = stage.vm.load(WINDOW + 0x2000)?;
        ensure_eq!(read, 0x1A7E_0000 + view as u64, "the page granted to view {view}");
        stage.expect_view(view)?;
    }
    Ok(())
}

/// S3: accessed and dirty flags are set in the views whose EPTP enables them, and only there.
pub(super) fn follows_ad(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    use crate::vmx::ept::{ACCESSED, AD, DIRTY};
    let enabled = |view: usize| setting.ad ^ (view % 2 == 1);
    let mut stage = Stage::with_flags(ctx, setting, enabled)?;
    let results = ctx.arena.page();
    rotate(&mut stage, results, Op::Rotate)?;
    for view in 0..setting.views {
        let flags = stage.views.leaf(view).get() & (ACCESSED | DIRTY);
        let expected = if enabled(view) { ACCESSED } else { 0 };
        ensure_eq!(flags, expected, "flags of view {view} after a read");
    }
    rotate(&mut stage, results, Op::RotateStore)?;
    for view in 0..setting.views {
        let flags = stage.views.leaf(view).get() & (ACCESSED | DIRTY);
        let expected = if enabled(view) { ACCESSED | DIRTY } else { 0 };
        ensure_eq!(flags, expected, "flags of view {view} after a write");
        stage.views.data(view).write(0, Views::value(view));
    }
    // The same tables through an EPTP with the flag the other way.
    for view in stage.sample() {
        let leaf = stage.views.leaf(view);
        leaf.set(leaf.get() & !(ACCESSED | DIRTY));
        let old = stage.views.eptp(view);
        stage.views.list.write(view, old ^ AD);
        crate::vmx::invept_single(old)?;
        stage.switch(view)?;
        stage.expect_view(view)?;
        let expected = if enabled(view) { 0 } else { ACCESSED };
        ensure_eq!(leaf.get() & (ACCESSED | DIRTY), expected, "view {view} flipped, read");
        stage.vm.store(WINDOW, Views::value(view))?;
        let expected = if enabled(view) { 0 } else { ACCESSED | DIRTY };
        ensure_eq!(leaf.get() & (ACCESSED | DIRTY), expected, "view {view} flipped, written");
        ensure_eq!(vmcs::read(Field::EPT_POINTER), old ^ AD, "EPT pointer in view {view}");
    }
    Ok(())
}

/// S6: L1's memory, another VM and the other views are as they were.
pub(super) fn leaves_others(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let mut second = Vm::new(ctx, &stage.vmx, setting.mode)?;
    let page = ctx.arena.page();
    page.write(0, 0x2ECD_0000);
    second.map(ctx, L2Gpa::new(WINDOW), page);
    let own: [Page; 8] = core::array::from_fn(|_| ctx.arena.page());
    for (index, page) in own.iter().enumerate() {
        page.fill(0xA11_0000 + index as u64);
    }
    for view in stage.sample() {
        second.make_current()?;
        ensure_eq!(second.load(WINDOW)?, 0x2ECD_0000, "the second VM before view {view}");
        stage.vm.make_current()?;
        stage.switch(view)?;
        stage.expect_view(view)?;
        for (index, page) in own.iter().enumerate() {
            let right = (0..512).all(|word| page.read(word) == 0xA11_0000 + index as u64);
            ensure!(right, "L1's page {index} changed at view {view}");
        }
    }
    second.make_current()?;
    ensure_eq!(second.load(WINDOW)?, 0x2ECD_0000, "the second VM at the end");
    ensure_eq!(vmcs::read(Field::EPT_POINTER), second.ept.eptp(false), "the second VM's EPTP");
    stage.vm.make_current()?;
    for view in stage.sample() {
        vmcs::write(Field::EPT_POINTER, stage.views.eptp(view));
        stage.expect_view(view)?;
    }
    Ok(())
}

/// L2's VMFUNC with these registers must exit to L1 and change nothing.
fn refused(stage: &mut Stage, rax: u64, rcx: u64, current: usize) -> Verdict {
    let index = eptp_index(stage);
    let exit = exit_of(stage.vm.vmfunc(rax, rcx))?;
    ensure_eq!(exit.reason, ExitReason::VMFUNC, "exit reason, RAX {rax:#x} RCX {rcx:#x}");
    ensure_eq!(exit.qualification, 0, "qualification, RCX {rcx:#x}");
    ensure_eq!(exit.length, 3, "instruction length, RCX {rcx:#x}");
    let start = Op::Vmfunc.address(stage.vm.paging.mode);
    ensure_eq!(exit.rip, start, "RIP, RCX {rcx:#x}");
    let pointer = vmcs::read(Field::EPT_POINTER);
    ensure_eq!(pointer, stage.views.eptp(current), "EPT pointer, RCX {rcx:#x}");
    ensure_eq!(eptp_index(stage), index, "EPTP index, RCX {rcx:#x}");
    ensure_eq!(stage.vm.registers.rax, rax, "RAX");
    ensure_eq!(stage.vm.registers.rcx, rcx, "RCX");
    stage.expect_view(current)
}

/// The EPTP-index field, where the processor has it.
fn eptp_index(stage: &Stage) -> Option<u64> {
    stage.vmx.caps.has2(ProcCtls2::EPT_VIOLATION_VE).then(|| vmcs::read(Field::EPTP_INDEX))
}

/// S7: an ECX of 512 or more and an entry that is no valid EPTP exit to L1 and change nothing.
pub(super) fn refuses(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let last = setting.views - 1;
    stage.switch(last)?;
    for ecx in [512, 513, 0x1FF + 0x200, 0x8000_0000, 0xFFFF_FFFF] {
        refused(&mut stage, 0, ecx, last)?;
    }
    let good = stage.views.eptp(0);
    let table = good & !0xFFF;
    let width = stage.vmx.caps.width;
    for (what, bad) in [
        ("zero", 0),
        ("memory type 1", table | 3 << 3 | 1),
        ("walk length 1", table | 6),
        ("walk length 8", table | 7 << 3 | 6),
        ("bit 11", good | 1 << 11),
        ("bit 63", good | 1 << 63),
        ("beyond the physical-address width", good | 1 << width),
    ] {
        stage.views.list.write(0, bad);
        if let Err(stop) = refused(&mut stage, 0, 0, last) {
            crate::println!("guest: list entry: {what}");
            return Err(stop);
        }
    }
    stage.views.list.write(0, good);
    stage.switch(0)?;
    stage.expect_view(0)
}

const ONE: Setting = Setting { vpid: false, ad: false, mode: Mode::Long, views: 2 };

/// S7: EAX of 64 or more is #UD in L2, whatever ECX is.
pub(super) fn high_leaf(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    for rax in [64, 65, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF, 0x1_0000_0040] {
        for rcx in [0, 1, 600] {
            let exit = exit_of(stage.vm.vmfunc(rax, rcx))?;
            ensure_eq!(exit.exception(), Some(6), "vector, RAX {rax:#x} RCX {rcx}");
            ensure_eq!(exit.rip, Op::Vmfunc.address(Mode::Long), "RIP");
            ensure_eq!(vmcs::read(Field::EPT_POINTER), stage.views.eptp(0), "EPT pointer");
        }
    }
    stage.expect_view(0)
}

/// S7: a leaf from 1 to 63 exits: none is enabled.
pub(super) fn low_leaf(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    for rax in 1..64 {
        refused(&mut stage, rax, 1, 0)?;
    }
    Ok(())
}

/// S7: leaf 0 exits where the VM-function controls don't enable it.
pub(super) fn leaf_0_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    vmcs::write(Field::VM_FUNCTION_CONTROLS, 0);
    refused(&mut stage, 0, 1, 0)?;
    vmcs::write(Field::VM_FUNCTION_CONTROLS, VmFuncCtls::EPTP_SWITCHING.bits());
    stage.switch(1)?;
    stage.expect_view(1)
}

/// S7: VMFUNC is #UD in L2 where "enable VM functions" is 0.
pub(super) fn vmfunc_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    vmcs::change(Field::PROC_CTLS2, 0, ProcCtls2::VM_FUNCTIONS.bits().into());
    for (rax, rcx) in [(0, 1), (1, 0), (63, 0), (64, 0), (0, 512)] {
        let exit = exit_of(stage.vm.vmfunc(rax, rcx))?;
        ensure_eq!(exit.exception(), Some(6), "vector, RAX {rax} RCX {rcx}");
    }
    stage.expect_view(0)
}

/// S7: VMFUNC needs no privilege.
pub(super) fn any_cpl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    stage.vm.registers.rax = 0;
    stage.vm.registers.rcx = 1;
    stage.vm.registers.rbx = vmcs::read(Field::GUEST_RSP) - 256;
    stage.vm.exec(Op::UserVmfunc)?;
    ensure_eq!(vmcs::read(Field::GUEST_CS_SELECTOR) & 3, 3, "CPL");
    ensure_eq!(vmcs::read(Field::EPT_POINTER), stage.views.eptp(1), "EPT pointer");
    stage.expect_view(1)
}

/// S7: the instruction length is the processor's, with a prefix too, and RIP goes on by it.
pub(super) fn prefixed(ctx: &mut Ctx<'_>) -> Verdict {
    for mode in [Mode::Long, Mode::Pae] {
        let mut stage = Stage::new(ctx, Setting { mode, ..ONE })?;
        let start = Op::VmfuncPrefixed.address(mode);
        stage.vm.registers.rax = 0;
        stage.vm.registers.rcx = 512;
        let exit = exit_of(stage.vm.exec(Op::VmfuncPrefixed))?;
        ensure_eq!(exit.reason, ExitReason::VMFUNC, "exit reason");
        ensure_eq!((exit.rip, exit.length), (start, 4), "RIP and instruction length");
        stage.vm.registers.rcx = 1;
        stage.vm.exec(Op::VmfuncPrefixed)?;
        ensure_eq!(vmcs::read(Field::GUEST_RIP), start + 4, "RIP after success");
        stage.expect_view(1)?;
        crate::vmx::leave();
    }
    Ok(())
}

/// S7: bits 63:32 of RAX and RCX are ignored, and kept.
pub(super) fn upper_halves(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    let high = 0xFFFF_FFFF_0000_0000;
    stage.vm.vmfunc(high, high | 1)?;
    ensure_eq!(stage.vm.registers.rax, high, "RAX");
    ensure_eq!(stage.vm.registers.rcx, high | 1, "RCX");
    stage.expect_view(1)
}

/// S7: each bit of a list entry, flipped, is accepted or refused as for VM entry.
pub(super) fn each_entry_bit(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, ONE)?;
    let good = stage.views.eptp(1);
    let (caps, width) = (stage.vmx.caps.ept, stage.vmx.caps.width);
    for bit in 0..64 {
        // Flipped address bits that keep the EPTP valid would switch to whatever lies there.
        if (12..u32::from(width)).contains(&bit) {
            continue;
        }
        let flipped = good ^ 1 << bit;
        stage.views.list.write(1, flipped);
        if Eptp::from(flipped).is_valid(caps, width) {
            stage.switch(1)?;
            ensure_eq!(vmcs::read(Field::EPT_POINTER), flipped, "EPT pointer, bit {bit}");
            stage.expect_view(1)?;
            stage.switch(0)?;
        } else {
            refused(&mut stage, 0, 1, 0)?;
        }
    }
    Ok(())
}

/// S8: the EPT pointer that L1 reads is the list entry, bit for bit; the EPTP index is ECX.
pub(super) fn reports(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    for view in stage.sample() {
        stage.switch(view)?;
        ensure_eq!(vmcs::read(Field::EPT_POINTER), stage.views.eptp(view), "EPT pointer");
        if let Some(index) = eptp_index(&stage) {
            ensure_eq!(index, view as u64, "EPTP index");
        }
    }
    // The same EPTP at another index.
    let last = setting.views - 1;
    let eptp = stage.views.eptp(0);
    stage.switch(0)?;
    stage.views.list.write(511, eptp);
    stage.switch(511)?;
    ensure_eq!(vmcs::read(Field::EPT_POINTER), eptp, "EPT pointer at index 511");
    if let Some(index) = eptp_index(&stage) {
        ensure_eq!(index, 511, "EPTP index of the same EPTP at another index");
    }
    stage.expect_view(0)?;
    // The exit that follows need not be a VMCALL.
    if last != 511 {
        stage.switch(last)?;
    }
    let exit = exit_of(stage.vm.load(WINDOW + 0x5000).map(|_| ()))?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "read of an unmapped page");
    let access = EptPermissions::from_bits_truncate(exit.qualification as u8);
    ensure_eq!(access, EptPermissions::READ, "access");
    let current = if last == 511 { 0 } else { last };
    ensure_eq!(vmcs::read(Field::EPT_POINTER), stage.views.eptp(current), "EPT pointer");
    Ok(())
}

/// S9: a list entry that L1, or L2 itself, changed is seen by the next VMFUNC.
pub(super) fn reads_list(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let last = setting.views - 1;
    let list = stage.views.list;
    let eptps = [stage.views.eptp(0), stage.views.eptp(last)];
    for round in 0..4 {
        let (first, second) = if round % 2 == 0 { (last, 0) } else { (0, last) };
        list.write(0, eptps[usize::from(first == last)]);
        list.write(last, eptps[usize::from(second == last)]);
        stage.switch(0)?;
        stage.expect_view(first)?;
        stage.switch(last)?;
        stage.expect_view(second)?;
    }
    // L2 changes the entry and switches, with no exit between.
    for round in 0..4 {
        let target = if round % 2 == 0 { last } else { 0 };
        let registers = &mut stage.vm.registers;
        registers.rax = 0;
        registers.rcx = 1;
        registers.rbx = WINDOW;
        registers.rsi = list.address() + 8;
        registers.rdi = eptps[usize::from(target == last)];
        stage.vm.exec(Op::EditVmfuncLoad)?;
        let registers = &stage.vm.registers;
        let read = match setting.mode {
            Mode::Long => registers.r8[0],
            Mode::Pae => registers.rbp & 0xFFFF_FFFF,
        };
        ensure_eq!(read, Views::value(target), "what L2 reads after changing the list");
        let pointer = vmcs::read(Field::EPT_POINTER);
        ensure_eq!(pointer, eptps[usize::from(target == last)], "EPT pointer");
    }
    // An entry made invalid is refused at once.
    list.write(1, 0);
    let exit = exit_of(stage.vm.vmfunc(0, 1))?;
    ensure_eq!(exit.reason, ExitReason::VMFUNC, "exit reason of an entry made invalid");
    // A whole other list.
    let fresh = ctx.arena.page();
    fresh.write(3, eptps[1]);
    vmcs::write(Field::EPTP_LIST_ADDRESS, fresh.address());
    stage.switch(3)?;
    stage.expect_view(last)
}
