//! Answers: does an L2 go on as it was when its VMCS moves from one processor to another?
//!
//! SDM Vol. 3C, "Software Use of Virtual-Machine Control Structures": VMCLEAR on the one, VMPTRLD and
//! VMLAUNCH on the other. What is cached stays behind on each, and has to be invalidated there.

use super::{runner::Operation, *};
use crate::{
    smp,
    vmx::{self, Mode, Outcome, Vm},
};

pub(super) const CASES: &[Case] = &[
    Case { name: "smp.moves.ept_edited", run: |ctx| edited(ctx, false) },
    Case { name: "smp.moves.ept_edited.with_vpid", run: |ctx| edited(ctx, true) },
    Case { name: "smp.moves.first_use", run: first_use },
    Case { name: "smp.moves.after_vmfunc", run: after_vmfunc },
    Case { name: "smp.moves.pae", run: pae },
];

/// What the other processor is to do next.
#[derive(Clone, Copy)]
enum Step {
    Enter,
    Leave,
    Invalidate(Invalidate),
    Load(u64),
    Vmfunc(u64),
}

/// An L2 that moves.
struct Mover {
    vm: Vm,
    operation: Operation,
    step: Step,
    result: Result<u64, Option<Outcome>>,
}

impl Mover {
    /// `vm`, which is current here, belongs to no processor from now on.
    fn new(ctx: &mut Ctx<'_>, vmx: &Vmx, vm: Vm) -> Result<Self, Stop> {
        let operation = Operation::new(ctx, vmx);
        ensure_eq!(vmx::vmclear(vm.vmcs), Ok(()), "VMCLEAR");
        Ok(Self { vm, operation, step: Step::Enter, result: Ok(0) })
    }

    /// The job.
    fn run(&mut self) {
        let done = |done: bool| if done { Ok(0) } else { Err(None) };
        self.result = match self.step {
            Step::Enter => done(self.operation.enter()),
            Step::Leave => {
                self.operation.leave();
                Ok(0)
            }
            Step::Invalidate(what) => done(what.execute()),
            Step::Load(address) => self.with_vmcs(|vm| vm.load(address)),
            Step::Vmfunc(view) => self.with_vmcs(|vm| vm.vmfunc(0, view).map(|()| 0)),
        };
    }

    fn with_vmcs(
        &mut self,
        what: impl FnOnce(&mut Vm) -> Result<u64, Outcome>,
    ) -> Result<u64, Option<Outcome>> {
        if vmx::vmptrld(self.vm.vmcs).is_err() {
            return Err(None);
        }
        smp::take_over(&mut self.vm);
        let result = what(&mut self.vm).map_err(Some);
        self.vm.launched = false;
        if vmx::vmclear(self.vm.vmcs).is_err() {
            return Err(None);
        }
        result
    }

    /// Has the other processor do it.
    fn there(&mut self, other: Other, step: Step) -> Result<u64, Stop> {
        self.step = step;
        other.run(Self::run, self, || ());
        self.verdict()
    }

    /// Does it on this one.
    fn here(&mut self, step: Step) -> Result<u64, Stop> {
        self.step = step;
        self.run();
        self.verdict()
    }

    fn verdict(&self) -> Result<u64, Stop> {
        match self.result {
            Ok(value) => Ok(value),
            Err(Some(outcome)) => Err(outcome.into()),
            Err(None) => crate::fail!("a VMX instruction failed"),
        }
    }
}

/// L2 reads on one processor after the other while its EPT changes, invalidated on both.
fn edited(ctx: &mut Ctx<'_>, vpid: bool) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let vm = Vm::new(ctx, &vmx, Mode::Long)?;
    if vpid {
        vm.enable_vpid(&vmx, 4)?;
    }
    let pages = [ctx.arena.page(), ctx.arena.page()];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    let invalidate = Invalidate::Ept(1, vm.ept.eptp(false));
    let mut mover = Mover::new(ctx, &vmx, vm)?;
    mover.there(other, Step::Enter)?;
    for round in 1..=ROUNDS / 4 {
        let next = (round % 2) as usize;
        pages[next].write(0, round);
        slot.set(pages[next].address() | LEAF);
        mover.here(Step::Invalidate(invalidate))?;
        mover.there(other, Step::Invalidate(invalidate))?;
        pages[1 - next].write(0, POISON);
        for _ in 0..2 {
            ensure_eq!(mover.here(Step::Load(WINDOW))?, round, "what L2 reads here");
            ensure_eq!(mover.there(other, Step::Load(WINDOW))?, round, "what L2 reads there");
        }
    }
    mover.there(other, Step::Leave)?;
    Ok(())
}

/// A processor has cached nothing of an EPT that it never ran L2 on: no invalidation is needed there,
/// although the tables were used by another one before they changed.
fn first_use(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    let low = vm.ept.root.read(0);
    let mut mover = Mover::new(ctx, &vmx, vm)?;
    mover.there(other, Step::Enter)?;
    for round in 1..=ROUNDS / 4 {
        let next = (round % 2) as usize;
        // A new EPT over the same tables.
        mover.vm.ept.root = ctx.arena.page();
        mover.vm.ept.root.write(0, low);
        let eptp = mover.vm.ept.eptp(false);
        mover.vm.make_current()?;
        vmcs::write(Field::EPT_POINTER, eptp);
        ensure_eq!(mover.vm.load(WINDOW)?, round - 1, "what L2 reads here before the change");
        ensure_eq!(vmx::vmclear(mover.vm.vmcs), Ok(()), "VMCLEAR");
        pages[next].write(0, round);
        slot.set(pages[next].address() | LEAF);
        pages[1 - next].write(0, POISON);
        ensure_eq!(mover.there(other, Step::Load(WINDOW))?, round, "what L2 reads there");
        mover.here(Step::Invalidate(Invalidate::Ept(1, eptp)))?;
        ensure_eq!(mover.here(Step::Load(WINDOW))?, round, "what L2 reads here at last");
    }
    mover.there(other, Step::Leave)?;
    Ok(())
}

/// The EPT pointer that VMFUNC changed goes along.
fn after_vmfunc(ctx: &mut Ctx<'_>) -> Verdict {
    const VIEWS: usize = 5;
    let (vmx, other) = machine(ctx)?;
    let vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let views = Views::new(ctx, &vm.ept, VIEWS, |_| false);
    vmcs::write(Field::EPT_POINTER, views.eptp(0));
    vm.enable_eptp_switching(&vmx, views.list)?;
    let mut mover = Mover::new(ctx, &vmx, vm)?;
    mover.there(other, Step::Enter)?;
    for round in 0..ROUNDS as usize / 4 {
        let (first, second) = (round % VIEWS, (round * 3 + 1) % VIEWS);
        mover.here(Step::Vmfunc(first as u64))?;
        let read = mover.there(other, Step::Load(WINDOW))?;
        ensure_eq!(read, Views::value(first), "what L2 reads there");
        mover.there(other, Step::Vmfunc(second as u64))?;
        let read = mover.here(Step::Load(WINDOW))?;
        ensure_eq!(read, Views::value(second), "what L2 reads here");
        mover.vm.make_current()?;
        let pointer = vmcs::read(Field::EPT_POINTER);
        ensure_eq!(pointer, views.eptp(second), "EPT pointer");
    }
    mover.there(other, Step::Leave)?;
    Ok(())
}

/// The PDPTEs go along, whatever the memory at CR3 says.
fn pae(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let vm = Vm::new(ctx, &vmx, Mode::Pae)?;
    let page = ctx.arena.page();
    page.write(0, 0x5EED);
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    vm.paging.root.write(1, 0);
    let mut mover = Mover::new(ctx, &vmx, vm)?;
    mover.there(other, Step::Enter)?;
    for _ in 0..8 {
        ensure_eq!(mover.there(other, Step::Load(WINDOW))?, 0x5EED, "what L2 reads there");
        ensure_eq!(mover.here(Step::Load(WINDOW))?, 0x5EED, "what L2 reads here");
    }
    mover.there(other, Step::Leave)?;
    Ok(())
}
