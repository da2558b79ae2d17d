//! Answers: does a processor of several get each NMI that is sent to it, and none while it is blocked?
//!
//! SDM Vol. 3A, "Handling Multiple NMIs": an NMI blocks NMIs until the next IRET, and one that comes
//! meanwhile is held. With several processors a hypervisor below may use NMIs of its own.

use super::*;
use crate::{
    cases::behaviour::{Control, Stage},
    l2_code,
    local_apic::{LocalApic, NMI_COMMAND, unblock_nmis},
    traps::{Fault, catch},
    vmx::snippet::Idt,
};
use core::hint::spin_loop;
use vmx_defs::{ExitReason, PinCtls};

pub(super) const CASES: &[Case] = &[
    Case { name: "smp.nmi.each", run: each },
    Case { name: "smp.nmi.held_until_iret", run: held },
    Case { name: "smp.nmi.after_exit", run: |ctx| after_l2(ctx, true) },
    Case { name: "smp.nmi.after_handler_of_l2", run: |ctx| after_l2(ctx, false) },
];

l2_code! {
    turn: "2: dec rcx", "jnz 2b";
}

/// Turns in a loop, within which an NMI that was sent must come.
const SOON: u32 = 100_000;
const NMI: u64 = 2;
/// Turns of L2, so that a wrong processor ends the case, too.
const LONG: u64 = 20_000_000;

fn wait() {
    for _ in 0..SOON {
        spin_loop();
    }
}

/// NMIs that this processor sends itself.
#[derive(Clone, Copy)]
struct Nmis(LocalApic);

impl Nmis {
    fn send(self) {
        self.0.command(self.0.identifier(), NMI_COMMAND as u32);
    }

    /// Sends one, which comes; NMIs are blocked then.
    fn comes(self) -> Verdict {
        let came = catch(|| {
            self.send();
            wait();
        });
        is_nmi(came)
    }
}

fn is_nmi(came: Result<(), Fault>) -> Verdict {
    ensure_eq!(came.err().map(|fault| fault.vector), Some(NMI), "exception");
    Ok(())
}

/// Where there are several processors.
fn nmis(ctx: &Ctx<'_>) -> Result<Nmis, Stop> {
    Other::first(ctx)?;
    Ok(Nmis(LocalApic::new()?))
}

fn each(ctx: &mut Ctx<'_>) -> Verdict {
    let nmis = nmis(ctx)?;
    for _ in 0..3 {
        nmis.comes()?;
        unblock_nmis();
    }
    Ok(())
}

fn held(ctx: &mut Ctx<'_>) -> Verdict {
    let nmis = nmis(ctx)?;
    for _ in 0..2 {
        nmis.comes()?;
        // As in its handler.
        let early = catch(|| {
            nmis.send();
            wait();
        });
        ensure_eq!(early, Ok(()), "an NMI while NMIs are blocked");
        is_nmi(catch(|| {
            unblock_nmis();
            wait();
        }))?;
        unblock_nmis();
    }
    Ok(())
}

/// Another processor's job: an NMI to the first, once that runs L2.
struct Sender {
    apic: LocalApic,
    target: u32,
}

impl Sender {
    fn run(&mut self) {
        wait();
        self.apic.command(self.target, NMI_COMMAND as u32);
    }
}

/// L2 gets an NMI, which exits or is delivered to it, and stops in its handler: NMIs are blocked in
/// L1 until its IRET, and come after it.
fn after_l2(ctx: &mut Ctx<'_>, exits: bool) -> Verdict {
    let other = Other::first(ctx)?;
    let nmis = nmis(ctx)?;
    let mut sender = Sender { apic: nmis.0, target: nmis.0.identifier() };
    let mut stage = Stage::new(ctx)?;
    let idt = Idt::new(ctx.arena);
    idt.install();
    for _ in 0..3 {
        if exits {
            stage.set(Control::Pin(PinCtls::NMI_EXITING))?;
        } else {
            stage.clear(Control::Pin(PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS))?;
        }
        stage.vm.registers.rcx = LONG;
        vmcs::write(Field::GUEST_INTERRUPTIBILITY, 0);
        let exit = other.run(Sender::run, &mut sender, || stage.exit_from(turn()))?;
        if exits {
            ensure_eq!(exit.reason, ExitReason::EXCEPTION_OR_NMI, "exit reason");
        } else {
            ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
            ensure_eq!(exit.rip, idt.handler(2), "RIP: the handler");
        }
        let early = catch(|| {
            nmis.send();
            wait();
        });
        ensure_eq!(early, Ok(()), "an NMI while NMIs are blocked");
        is_nmi(catch(|| {
            unblock_nmis();
            wait();
        }))?;
        unblock_nmis();
        nmis.comes()?;
        unblock_nmis();
    }
    Ok(())
}
