//! Answers: how does a case break one requirement of VM entry and see exactly that failure?
//!
//! A [`Trial`] is an L2 that enters well. Each row edits its VMCS, enters, expects one outcome, takes
//! the edits back and enters again; so a wrong row is not hidden behind another fault, and a failure
//! that leaves something behind shows at once. Rows alternate between a cleared VMCS (VMLAUNCH) and a
//! launched one (VMRESUME).
//!
//! SDM Vol. 3C, chapter "VM Entries".

pub mod controls;
pub mod failure;
pub mod guest;
pub mod host;
pub mod inject;
pub mod msr_areas;
pub mod segments;
pub mod state;

use core::arch::x86_64::__cpuid;

use arrayvec::ArrayVec;
use vmx_defs::{
    ExitReason, Field, ProcCtls, VmInstructionError, exit::ENTRY_FAILURE, field::Kind, msr,
};
use vmx_hw::VmFail;
use x86_64::{instructions::tables::sgdt, registers::control::Cr3};

use crate::{
    ensure, ensure_eq, fail,
    suite::{Ctx, Stop, Verdict},
    vmx::{Mode, Op, Outcome, Vm, Vmx, rdmsr, vmclear, vmcs, vmptrld},
};

/// A change of one field.
#[derive(Clone, Copy)]
pub enum Edit {
    /// The field becomes this value.
    To(Field, u64),
    /// These bits become 1.
    Set(Field, u64),
    /// These bits become 0.
    Clear(Field, u64),
}

pub use Edit::{Clear, Set, To};

impl Edit {
    fn field(self) -> Field {
        match self {
            To(field, _) | Set(field, _) | Clear(field, _) => field,
        }
    }

    fn apply(self) {
        match self {
            To(field, value) => vmcs::write(field, value),
            Set(field, bits) => vmcs::change(field, bits, 0),
            Clear(field, bits) => vmcs::change(field, 0, bits),
        }
    }
}

/// What a VM entry must lead to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expect {
    /// L2 runs, up to any exit.
    Enters,
    /// VMfailValid with error 7: invalid control fields.
    Controls,
    /// VMfailValid with error 8: invalid host state.
    Host,
    /// Either of these two; the SDM lists the rule with both areas.
    ControlsOrHost,
    /// An exit with reason 80000021H, invalid guest state, and this qualification.
    Guest(u64),
    /// The same, or L2 runs: processors may have the requirement or not.
    GuestOrEnters(u64),
    /// An exit with reason 80000022H, MSR loading, and this qualification.
    Msr(u64),
}

/// An L2 to break and mend.
pub struct Trial {
    /// The capabilities.
    pub vmx: Vmx,
    /// The L2, whose VMCS is current.
    pub vm: Vm,
    guest: ArrayVec<(Field, u64), 96>,
    rows: u64,
}

impl Trial {
    /// One that enters, with every address field pointing to a page of its own and every other field
    /// that some control makes meaningful set to something valid.
    pub fn new(ctx: &mut Ctx<'_>, mode: Mode) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        let vm = Vm::new(ctx, &vmx, mode)?;
        for field in ADDRESSES {
            if vmx.caps.has_field(field) {
                vmcs::write(field, ctx.arena.page().address());
            }
        }
        for (field, value) in [
            (Field::VPID, 1),
            (Field::TSC_MULTIPLIER, 1 << 48),
            (Field::PREEMPTION_TIMER, u64::MAX),
            (Field::GUEST_PAT, rdmsr(msr::PAT)),
            (Field::HOST_PAT, rdmsr(msr::PAT)),
            (Field::PML_INDEX, 511),
            (Field::EPTP_INDEX, 0),
            (Field::VM_FUNCTION_CONTROLS, 0),
            (Field::TPR_THRESHOLD, 0),
            (Field::XSS_EXITING_BITMAP, 0),
            (Field::ENCLS_EXITING_BITMAP, 0),
            (Field::GUEST_INTERRUPT_STATUS, 0),
            (Field::POSTED_INTERRUPT_VECTOR, 0),
            (Field::GUEST_PERF_GLOBAL_CTRL, 0),
            (Field::HOST_PERF_GLOBAL_CTRL, 0),
            (Field::GUEST_BNDCFGS, 0),
            (Field::GUEST_RTIT_CTL, 0),
            (Field::TSC_OFFSET, 0),
            (Field::PLE_GAP, 0),
            (Field::PLE_WINDOW, 0),
        ] {
            if vmx.caps.has_field(field) {
                vmcs::write(field, value);
            }
        }
        let mut trial = Self { vmx, vm, guest: ArrayVec::new(), rows: 0 };
        trial.note_guest();
        Ok(trial)
    }

    /// Edits that hold for all later rows.
    pub fn base(&mut self, edits: &[Edit]) {
        for edit in edits {
            edit.apply();
        }
        self.note_guest();
    }

    /// Enables primary controls for all later rows, or skips the case.
    pub fn enable_proc(&mut self, controls: ProcCtls) -> Verdict {
        if self.vmx.caps.proc.may_be_1 & controls.bits() != controls.bits() {
            crate::skip!("primary controls {controls:?} not offered");
        }
        self.base(&[Set(Field::PROC_CTLS, controls.bits().into())]);
        Ok(())
    }

    /// Remembers the guest-state area as it is.
    fn note_guest(&mut self) {
        let fields = self.vmx.caps.fields_of(Kind::Guest);
        self.guest = fields.into_iter().map(|field| (field, vmcs::read(field))).collect();
    }

    /// Enters with these edits, expects the outcome, and mends the VMCS.
    pub fn row(&mut self, name: &str, edits: &[Edit], expected: Expect) -> Verdict {
        if self.rows.is_multiple_of(2) {
            ensure_eq!(vmclear(self.vm.vmcs), Ok(()), "VMCLEAR");
            ensure_eq!(vmptrld(self.vm.vmcs), Ok(()), "VMPTRLD");
            self.vm.launched = false;
        }
        self.rows += 1;
        let marker = 0x1000_0000 + self.rows * 0x1000;
        vmcs::write(Field::HOST_FS_BASE, marker);

        let mut before: ArrayVec<(Field, u64), 16> = ArrayVec::new();
        for edit in edits {
            before.push((edit.field(), vmcs::read(edit.field())));
            edit.apply();
        }
        let guest: ArrayVec<u64, 96> =
            self.guest.iter().map(|&(field, _)| vmcs::read(field)).collect();
        let fs_base = rdmsr(msr::FS_BASE);
        let outcome = self.vm.run();
        judge(name, outcome, expected)?;
        match outcome {
            Outcome::VmFail(..) => {
                ensure_eq!(rdmsr(msr::FS_BASE), fs_base, "{name}: FS base after VMfail");
            }
            Outcome::Exit(exit) => {
                ensure_eq!(rdmsr(msr::FS_BASE), marker, "{name}: host FS base");
                ensure_eq!(sgdt().limit, 0xFFFF, "{name}: host GDTR limit");
                let cr3 = Cr3::read_raw().0.start_address().as_u64();
                ensure_eq!(cr3, vmcs::read(Field::HOST_CR3), "{name}: host CR3");
                if exit.reason.is_entry_failure() {
                    for (&(field, _), value) in self.guest.iter().zip(guest) {
                        ensure_eq!(vmcs::read(field), value, "{name}: {field:?} after the failure");
                    }
                }
            }
        }
        for (field, value) in before.into_iter().rev() {
            vmcs::write(field, value);
        }
        self.restore_guest();
        vmcs::write(Field::GUEST_RIP, Op::Nothing.address(self.vm.paging.mode));
        let mended = self.vm.run();
        ensure!(entered(mended), "after {name} was mended: {}", Told(mended));
        self.restore_guest();
        Ok(())
    }

    /// The guest-state area as it was noted: an exit saves L2's state there.
    fn restore_guest(&self) {
        for &(field, value) in &self.guest {
            vmcs::write(field, value);
        }
    }

    /// A row for each bit of `bits`, which that bit set must break.
    pub fn each_set(&mut self, field: Field, bits: u64, expected: Expect) -> Verdict {
        self.each(field, bits, expected, Set)
    }

    /// A row for each bit of `bits`, which that bit clear must break.
    pub fn each_clear(&mut self, field: Field, bits: u64, expected: Expect) -> Verdict {
        self.each(field, bits, expected, Clear)
    }

    fn each(
        &mut self,
        field: Field,
        bits: u64,
        expected: Expect,
        edit: fn(Field, u64) -> Edit,
    ) -> Verdict {
        for bit in (0..64).filter(|bit| bits & 1 << bit != 0) {
            let mut name = arrayvec::ArrayString::<80>::new();
            // A name that does not fit is cut short.
            let _ = core::fmt::Write::write_fmt(
                &mut name,
                format_args!("bit {bit} of {}", field.name()),
            );
            self.row(&name, &[edit(field, 1 << bit)], expected)?;
        }
        Ok(())
    }

    /// Rows that a field which holds the address of a page must have.
    pub fn page_address(&mut self, field: Field) -> Verdict {
        let page = vmcs::read(field);
        let aligned = (0..12).map(|bit| 1 << bit);
        let wide = (self.vmx.caps.width..64).map(|bit| 1 << bit);
        for bit in aligned.chain(wide) {
            self.row(field.name(), &[To(field, page | bit)], Expect::Controls)?;
        }
        self.row(field.name(), &[To(field, u64::MAX)], Expect::Controls)
    }
}

/// Fields that hold the address of a page, whose contents may be zeros.
const ADDRESSES: [Field; 10] = [
    Field::IO_BITMAP_A,
    Field::IO_BITMAP_B,
    Field::MSR_BITMAP,
    Field::PML_ADDRESS,
    Field::VIRTUAL_APIC_ADDR,
    Field::APIC_ACCESS_ADDR,
    Field::POSTED_INTERRUPT_DESC_ADDR,
    Field::VMREAD_BITMAP,
    Field::VMWRITE_BITMAP,
    Field::VE_INFORMATION_ADDR,
];

fn entered(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Exit(exit) if !exit.reason.is_entry_failure())
}

/// An outcome in few words.
struct Told(Outcome);

impl core::fmt::Display for Told {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Outcome::Exit(exit) => write!(
                out,
                "exit {:?}, qualification {:#x}, event {:#x}, RIP {:#x}",
                exit.reason,
                exit.qualification,
                u32::from(exit.interruption),
                exit.rip
            ),
            Outcome::VmFail(fail, error) => write!(out, "VMfail{fail:?}, error {error}"),
        }
    }
}

fn judge(name: &str, outcome: Outcome, expected: Expect) -> Verdict {
    let fails = |error: VmInstructionError| {
        outcome == Outcome::VmFail(VmFail::Valid, error.number().into())
    };
    let exits = |basic: ExitReason, qualification: u64| match outcome {
        Outcome::Exit(exit) => {
            exit.reason.bits() == ENTRY_FAILURE | basic.bits()
                && exit.qualification == qualification
        }
        Outcome::VmFail(..) => false,
    };
    let controls = fails(VmInstructionError::EntryControls);
    let host = fails(VmInstructionError::EntryHostState);
    let right = match expected {
        Expect::Enters => entered(outcome),
        Expect::Controls => controls,
        Expect::Host => host,
        Expect::ControlsOrHost => controls || host,
        Expect::Guest(qualification) => exits(ExitReason::ENTRY_GUEST_STATE, qualification),
        Expect::GuestOrEnters(qualification) => {
            entered(outcome) || exits(ExitReason::ENTRY_GUEST_STATE, qualification)
        }
        Expect::Msr(qualification) => exits(ExitReason::ENTRY_MSR_LOADING, qualification),
    };
    if !right {
        fail!("{name}: {}; expected {expected:?}", Told(outcome));
    }
    Ok(())
}

/// Width of linear addresses in bits.
pub fn linear_width() -> u32 {
    __cpuid(0x8000_0008).eax >> 8 & 0xFF
}

/// The lowest address that is not canonical.
pub fn not_canonical() -> u64 {
    1 << (linear_width() - 1)
}

/// Bits 63 down to the physical-address width.
pub fn beyond_width(vmx: &Vmx) -> u64 {
    !0 << vmx.caps.width
}

/// Bits of IA32_EFER that no processor with VMX has, but SCE, LME, LMA and NXE.
pub const EFER_RESERVED: u64 = !0xD01;

/// Values of IA32_PAT that have a reserved memory type (2, 3 or above 7) in one of the eight
/// entries.
pub fn bad_pats() -> impl Iterator<Item = u64> {
    const GOOD: u64 = 0x0007_0406_0007_0406;
    (0..8).flat_map(|entry| {
        [2, 3, 8, 0x10, 0x86].into_iter().map(move |kind: u64| {
            let shift = entry * 8;
            GOOD & !(0xFF << shift) | kind << shift
        })
    })
}
