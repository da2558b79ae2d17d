//! Answers: is VM entry refused where the event to inject is malformed?
//!
//! SDM Vol. 3C, "VM-Entry Control Fields" in "Checks on VMX Controls", the part on event injection.
//! Events that are well-formed but not deliverable in the guest's state are in
//! [`state`](super::state).

use vmx_defs::{
    EntryCtls, Field, ProcCtls, ProcCtls2,
    event::{kind, vector},
};

use super::{Clear, Edit, Expect, Set, To, Trial};
use crate::{
    ensure, machine, skip,
    suite::{Case, Ctx, Verdict},
    vmx::Mode,
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.inject.type", run: types },
    Case { name: "entry.inject.other_event", run: other_event },
    Case { name: "entry.inject.vector", run: vectors },
    Case { name: "entry.inject.error_code", run: error_code },
    Case { name: "entry.inject.error_code.real_mode", run: error_code_real },
    Case { name: "entry.inject.error_code.reserved", run: error_code_reserved },
    Case { name: "entry.inject.reserved", run: reserved },
    Case { name: "entry.inject.length", run: length },
    Case { name: "entry.inject.not_valid", run: not_valid },
];

const VALID: u64 = 1 << 31;
const ERROR_CODE: u64 = 1 << 11;

fn info(kind: u8, vector: u8) -> u64 {
    VALID | u64::from(kind) << 8 | u64::from(vector)
}

fn event(kind: u8, vector: u8) -> Edit {
    To(Field::ENTRY_INTR_INFO, info(kind, vector))
}

fn exception_with_code(vector: u8) -> Edit {
    To(Field::ENTRY_INTR_INFO, info(kind::HARDWARE_EXCEPTION, vector) | ERROR_CODE)
}

/// An L2 that takes interrupts; its exceptions all exit, since L2 has no IDT.
fn trial(ctx: &mut Ctx<'_>) -> Result<Trial, crate::suite::Stop> {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.base(&[
        To(Field::GUEST_RFLAGS, 0x202),
        To(Field::ENTRY_EXCEPTION_ERROR, 0),
        To(Field::ENTRY_INSTRUCTION_LEN, 1),
    ]);
    Ok(trial)
}

fn types(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    for vector in [0, 2, 32, 255] {
        trial.row("reserved type 1", &[event(1, vector)], Expect::Controls)?;
    }
    for (kind, vector) in [
        (kind::EXTERNAL, 32),
        (kind::NMI, vector::NMI),
        (kind::HARDWARE_EXCEPTION, vector::UD),
        (kind::SOFTWARE_INTERRUPT, 0x80),
        (kind::PRIVILEGED_SOFTWARE_EXCEPTION, vector::DB),
        (kind::SOFTWARE_EXCEPTION, vector::BP),
    ] {
        trial.row("an event that exists", &[event(kind, vector)], Expect::Enters)?;
    }
    Ok(())
}

/// "Other event" is the pending MTF exit: its vector is 0, and there is none without the monitor trap
/// flag.
fn other_event(ctx: &mut Ctx<'_>) -> Verdict {
    ensure!(!machine::is_bare_bochs(), "not executed: injecting type 7 ends Bochs");
    let mut trial = trial(ctx)?;
    let monitor = trial.vmx.caps.proc.may_be_1 & ProcCtls::MONITOR_TRAP_FLAG.bits() != 0;
    let expected = if monitor { Expect::Enters } else { Expect::Controls };
    trial.row("other event", &[event(kind::OTHER, 0)], expected)?;
    for vector in [1, 0x80, 0xFF] {
        trial.row("of another vector", &[event(kind::OTHER, vector)], Expect::Controls)?;
    }
    Ok(())
}

fn vectors(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    for vector in [0, 1, 3, 18, 34, 255] {
        trial.row("NMI of another vector", &[event(kind::NMI, vector)], Expect::Controls)?;
    }
    for vector in [32, 33, 64, 128, 255] {
        let edits = [event(kind::HARDWARE_EXCEPTION, vector)];
        trial.row("exception beyond 31", &edits, Expect::Controls)?;
    }
    for vector in [0, 31, 32, 255] {
        trial.row("interrupt", &[event(kind::EXTERNAL, vector)], Expect::Enters)?;
        trial.row("INT n", &[event(kind::SOFTWARE_INTERRUPT, vector)], Expect::Enters)?;
    }
    Ok(())
}

/// Whether an exception of this vector has an error code on a processor that is picky about it.
fn has_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

fn error_code(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    let any = trial.vmx.caps.basic.any_error_code();
    for vector in 0..32 {
        // Control protection depends on a feature of its own.
        if vector == vector::CP {
            continue;
        }
        let (with, without) = match (any, has_code(vector)) {
            (true, _) => (Expect::Enters, Expect::Enters),
            (false, true) => (Expect::Enters, Expect::Controls),
            (false, false) => (Expect::Controls, Expect::Enters),
        };
        trial.row("exception with error code", &[exception_with_code(vector)], with)?;
        let edits = [event(kind::HARDWARE_EXCEPTION, vector)];
        trial.row("exception without error code", &edits, without)?;
    }
    for (kind, vector) in [
        (kind::EXTERNAL, 14),
        (kind::EXTERNAL, 32),
        (kind::NMI, 2),
        (kind::SOFTWARE_INTERRUPT, 13),
        (kind::PRIVILEGED_SOFTWARE_EXCEPTION, 1),
        (kind::SOFTWARE_EXCEPTION, 3),
    ] {
        let edits = [To(Field::ENTRY_INTR_INFO, info(kind, vector) | ERROR_CODE)];
        trial.row("error code of no exception", &edits, Expect::Controls)?;
    }
    Ok(())
}

/// In real-address mode no exception has an error code.
fn error_code_real(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    if !trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        skip!("unrestricted guest not offered");
    }
    trial.base(&[
        Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into()),
        Clear(Field::GUEST_CR0, 1 << 31 | 1),
        Clear(Field::ENTRY_CTLS, EntryCtls::LOAD_DEBUG_CONTROLS.bits().into()),
        To(Field::GUEST_IDTR_LIMIT, 0),
        To(Field::ENTRY_EXCEPTION_ERROR, 0),
    ]);
    for vector in [8, 10, 11, 12, 13, 14, 17] {
        trial.row("with error code", &[exception_with_code(vector)], Expect::Controls)?;
    }
    trial.row("without", &[event(kind::HARDWARE_EXCEPTION, vector::GP)], Expect::Enters)
}

/// Bits 31:16 of the error code are 0, and bit 15 where there are no enclaves.
fn error_code_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    let event = exception_with_code(vector::GP);
    for bit in 16..32 {
        let edits = [event, To(Field::ENTRY_EXCEPTION_ERROR, 1 << bit)];
        trial.row("a bit above 15", &edits, Expect::Controls)?;
    }
    let edits = [event, To(Field::ENTRY_EXCEPTION_ERROR, 0x7FFF)];
    trial.row("a code of bits 14:0", &edits, Expect::Enters)?;
    let edits = [self::event(kind::EXTERNAL, 32), To(Field::ENTRY_EXCEPTION_ERROR, 0xFFFF_FFFF)];
    trial.row("no error code to deliver", &edits, Expect::Enters)
}

/// Bits 30:12 are reserved.
fn reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    for (kind, vector) in [(kind::EXTERNAL, 32), (kind::HARDWARE_EXCEPTION, vector::UD)] {
        for bit in 12..31 {
            let edits = [To(Field::ENTRY_INTR_INFO, info(kind, vector) | 1 << bit)];
            trial.row("a reserved bit", &edits, Expect::Controls)?;
        }
    }
    Ok(())
}

/// Software events have an instruction length of 1 to 15, or 0 where IA32_VMX_MISC bit 30 is set.
fn length(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    let zero =
        if trial.vmx.caps.misc.zero_length_injection() { Expect::Enters } else { Expect::Controls };
    for (kind, vector) in [
        (kind::SOFTWARE_INTERRUPT, 0x80),
        (kind::PRIVILEGED_SOFTWARE_EXCEPTION, vector::DB),
        (kind::SOFTWARE_EXCEPTION, vector::BP),
        (kind::SOFTWARE_EXCEPTION, vector::OF),
    ] {
        for (length, expected) in [
            (0, zero),
            (1, Expect::Enters),
            (15, Expect::Enters),
            (16, Expect::Controls),
            (0x101, Expect::Controls),
            (0xFFFF_FFFF, Expect::Controls),
        ] {
            let edits = [event(kind, vector), To(Field::ENTRY_INSTRUCTION_LEN, length)];
            trial.row("length of a software event", &edits, expected)?;
        }
    }
    for (kind, vector) in [(kind::EXTERNAL, 32), (kind::HARDWARE_EXCEPTION, vector::DB)] {
        let edits = [event(kind, vector), To(Field::ENTRY_INSTRUCTION_LEN, 16)];
        trial.row("length of another event", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn not_valid(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = trial(ctx)?;
    for bits in [0x7FFF_FFFF, 0x100, 0x203, 0x7FFF_F000] {
        let edits = [
            To(Field::ENTRY_INTR_INFO, bits),
            To(Field::ENTRY_EXCEPTION_ERROR, 0xFFFF_FFFF),
            To(Field::ENTRY_INSTRUCTION_LEN, 0xFFFF_FFFF),
        ];
        trial.row("nothing to inject", &edits, Expect::Enters)?;
    }
    Ok(())
}
