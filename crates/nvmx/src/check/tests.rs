//! One flip for each requirement: from guests that pass, one change gives exactly one failure.

mod guest;

use super::*;
use crate::caps::tests::rich_caps;
use crate::caps::{Caps, REVISION, default1};
use crate::vmcs12::Vmcs12;
use alloc::vec::Vec;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2};
use vmx_defs::event::{IntrInfo, kind};
use vmx_defs::{Field, L1Gpa};

/// A 64-bit guest of a 64-bit host, with every control that needs another field switched on.
pub(crate) fn valid() -> Vmcs12 {
    let mut vmcs = Vmcs12::default();
    let pin = PinCtls::EXTERNAL_INTERRUPT_EXITING | PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS;
    let proc = ProcCtls::IO_BITMAPS
        | ProcCtls::MSR_BITMAPS
        | ProcCtls::TPR_SHADOW
        | ProcCtls::NMI_WINDOW_EXITING
        | ProcCtls::SECONDARY_CONTROLS;
    let proc2 = ProcCtls2::EPT
        | ProcCtls2::VPID
        | ProcCtls2::VM_FUNCTIONS
        | ProcCtls2::TSC_SCALING
        | ProcCtls2::XSAVES;
    let exit = ExitCtls::HOST_ADDRESS_SPACE_SIZE | ExitCtls::LOAD_PAT | ExitCtls::LOAD_EFER;
    let entry = EntryCtls::IA32E_MODE_GUEST
        | EntryCtls::LOAD_DEBUG_CONTROLS
        | EntryCtls::LOAD_PAT
        | EntryCtls::LOAD_EFER;
    for (field, value) in [
        (Field::PIN_CTLS, u64::from(pin.bits() | default1::PIN)),
        (Field::PROC_CTLS, u64::from(proc.bits() | default1::PROC)),
        (Field::PROC_CTLS2, u64::from(proc2.bits())),
        (Field::EXIT_CTLS, u64::from(exit.bits() | default1::EXIT)),
        (Field::ENTRY_CTLS, u64::from(entry.bits() | default1::ENTRY)),
        (Field::VPID, 1),
        (Field::IO_BITMAP_A, 0x1000),
        (Field::IO_BITMAP_B, 0x2000),
        (Field::MSR_BITMAP, 0x3000),
        (Field::VIRTUAL_APIC_ADDR, 0x4000),
        (Field::APIC_ACCESS_ADDR, 0x5000),
        (Field::EPT_POINTER, 0x6000 | 3 << 3 | 6),
        (Field::VM_FUNCTION_CONTROLS, 1),
        (Field::EPTP_LIST_ADDRESS, 0x7000),
        (Field::TSC_MULTIPLIER, 1 << 48),
        (Field::CR3_TARGET_COUNT, 4),
        (Field::EXIT_MSR_STORE_COUNT, 1),
        (Field::EXIT_MSR_STORE_ADDR, 0x8000),
        (Field::EXIT_MSR_LOAD_COUNT, 512),
        (Field::EXIT_MSR_LOAD_ADDR, 0x9010),
        (Field::ENTRY_MSR_LOAD_COUNT, 1),
        (Field::ENTRY_MSR_LOAD_ADDR, (1 << 40) - 16),
        // Not looked at unless there is an event.
        (Field::ENTRY_EXCEPTION_ERROR, 0xffff_ffff),
        (Field::HOST_CR0, 0x8000_0033),
        (Field::HOST_CR3, 0x1_0000),
        (Field::HOST_CR4, 0x2020),
        (Field::HOST_CS_SELECTOR, 0x08),
        (Field::HOST_TR_SELECTOR, 0x18),
        (Field::HOST_FS_BASE, 0xffff_8000_0000_0000),
        (Field::HOST_EFER, 0xd01),
        (Field::HOST_PAT, 0x0007_0406_0007_0406),
        (Field::HOST_RIP, 0xffff_ffff_8000_0000),
        (Field::GUEST_CR0, 0x8000_0033),
        (Field::GUEST_CR3, 0x2_0000),
        (Field::GUEST_CR4, 0x2020),
        (Field::GUEST_DR7, 0x400),
        (Field::GUEST_EFER, 0xd01),
        (Field::GUEST_PAT, 0x0007_0406_0007_0406),
        (Field::GUEST_RIP, 0xffff_ffff_8000_0000),
        (Field::GUEST_RFLAGS, 0x202),
        (Field::GUEST_CS_SELECTOR, 0x08),
        (Field::GUEST_CS_AR, 0xa09b),
        (Field::GUEST_CS_LIMIT, 0xffff_ffff),
        (Field::GUEST_LDTR_AR, 0x1_0000),
        (Field::GUEST_TR_SELECTOR, 0x18),
        (Field::GUEST_TR_AR, 0x8b),
        (Field::GUEST_TR_LIMIT, 0x67),
        (Field::GUEST_GDTR_LIMIT, 0xffff),
        (Field::GUEST_IDTR_LIMIT, 0xffff),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ] {
        vmcs.set(field, value);
    }
    for segment in [Segment::Ss, Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs] {
        vmcs.set(segment.selector(), 0x10);
        vmcs.set(segment.access_rights(), 0xc093);
        vmcs.set(segment.limit(), 0xffff_ffff);
    }
    vmcs
}

/// Leaves IA-32e mode: a 32-bit guest with PAE paging and EPT.
fn pae() -> Vmcs12 {
    let mut vmcs = valid();
    clear(&mut vmcs, Field::ENTRY_CTLS, EntryCtls::IA32E_MODE_GUEST.bits().into());
    vmcs.set(Field::GUEST_EFER, 0x801);
    vmcs.set(Field::GUEST_RIP, 0x10_0000);
    vmcs.set(Field::GUEST_CS_AR, 0xc09b);
    for (field, value) in [
        (Field::GUEST_PDPTE0, 0x3001),
        (Field::GUEST_PDPTE1, 0xe000_0000_0000_01e6),
        (Field::GUEST_PDPTE2, 0xff_ffff_f019),
    ] {
        vmcs.set(field, value);
    }
    vmcs
}

/// A real-mode guest, as only an unrestricted guest may be.
fn real() -> Vmcs12 {
    let mut vmcs = pae();
    set(&mut vmcs, Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into());
    vmcs.set(Field::GUEST_CR0, 0x20);
    vmcs.set(Field::GUEST_CR4, 0x2000);
    vmcs.set(Field::GUEST_EFER, 0);
    vmcs.set(Field::GUEST_RIP, 0x7c00);
    for segment in Segment::CODE_AND_DATA {
        vmcs.set(segment.selector(), 0x1003);
        vmcs.set(segment.base(), 0x1_0030);
        vmcs.set(segment.limit(), 0xffff);
        vmcs.set(segment.access_rights(), 0x93);
    }
    vmcs
}

/// A virtual-8086 task.
fn virtual_8086() -> Vmcs12 {
    let mut vmcs = pae();
    set(&mut vmcs, Field::GUEST_RFLAGS, 1 << 17);
    for segment in Segment::CODE_AND_DATA {
        vmcs.set(segment.selector(), 0x1003);
        vmcs.set(segment.base(), 0x1_0030);
        vmcs.set(segment.limit(), 0xffff);
        vmcs.set(segment.access_rights(), 0xf3);
    }
    vmcs
}

/// A 32-bit guest of a 32-bit host.
fn narrow_host() -> Vmcs12 {
    let mut vmcs = pae();
    clear(&mut vmcs, Field::EXIT_CTLS, ExitCtls::HOST_ADDRESS_SPACE_SIZE.bits().into());
    vmcs.set(Field::HOST_EFER, 0x801);
    vmcs.set(Field::HOST_RIP, 0xffff_ffff);
    vmcs.set(Field::HOST_SS_SELECTOR, 0x10);
    vmcs
}

fn set(vmcs: &mut Vmcs12, field: Field, bits: u64) {
    vmcs.set(field, vmcs.get(field) | bits);
}

fn clear(vmcs: &mut Vmcs12, field: Field, bits: u64) {
    vmcs.set(field, vmcs.get(field) & !bits);
}

const CURRENT: L1Gpa = L1Gpa::new(0xa_0000);

fn inputs() -> GuestInputs {
    GuestInputs { current_vmcs: CURRENT, link_revision: 0, pdptes: [0; 4] }
}

/// Changes made to a VMCS that passes: each field gets the value.
type Change<'a> = &'a [(Field, u64)];

fn changed(base: &Vmcs12, change: Change<'_>) -> Vmcs12 {
    let mut vmcs = base.clone();
    for (field, value) in change {
        vmcs.set(*field, *value);
    }
    vmcs
}

/// Bits of the base's field flipped.
fn flip(base: &Vmcs12, field: Field, bits: u64) -> (Field, u64) {
    (field, base.get(field) ^ bits)
}

fn event(kind: u8, vector: u8, error_code: bool) -> (Field, u64) {
    let info = IntrInfo::new()
        .with_kind(kind)
        .with_vector(vector)
        .with_has_error_code(error_code)
        .with_valid(true);
    (Field::ENTRY_INTR_INFO, u64::from(u32::from(info)))
}

mod baselines {
    use super::*;

    #[test]
    fn all_pass() {
        let caps = rich_caps();
        let mut bases = Vec::from([(valid(), true), (pae(), true), (real(), true)]);
        bases.extend([(virtual_8086(), true), (narrow_host(), false)]);
        for (vmcs, lma) in bases {
            assert_eq!(controls(&vmcs, &caps, 0), Ok(()));
            assert_eq!(host_state(&vmcs, &caps, lma), Ok(()));
            assert_eq!(guest_state(&vmcs, &caps, &inputs()), Ok(()));
        }
    }

    /// Whatever stands in the fields, a check ends with a verdict.
    #[test]
    fn no_value_panics() {
        let caps = rich_caps();
        for base in [valid(), pae(), real(), virtual_8086(), narrow_host()] {
            for (field, _) in vmx_defs::field::FIELDS {
                for bit in 0..64 {
                    for value in [base.get(*field) ^ 1 << bit, u64::MAX, 0, u64::MAX << bit] {
                        let vmcs = changed(&base, &[(*field, value)]);
                        for lma in [false, true] {
                            let _ = controls(&vmcs, &caps, 0xff);
                            let _ = host_state(&vmcs, &caps, lma);
                            let _ = guest_state(&vmcs, &caps, &inputs());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn canonical_and_pat() {
        for (address, width, expected) in [
            (0, 48, true),
            (0x7fff_ffff_ffff, 48, true),
            (0x8000_0000_0000, 48, false),
            (0xffff_8000_0000_0000, 48, true),
            (0xffff_7fff_ffff_ffff, 48, false),
            (0x8000_0000_0000, 57, true),
            (0x100_0000_0000_0000, 57, false),
            (0xff00_0000_0000_0000, 57, true),
        ] {
            assert_eq!(is_canonical(address, width), expected, "{address:#x}, {width}");
        }
        for kind in 0..=255u64 {
            let expected = matches!(kind, 0 | 1 | 4 | 5 | 6 | 7);
            for entry in 0..8 {
                assert_eq!(is_valid_pat(kind << (8 * entry)), expected);
            }
        }
    }
}

mod of_controls {
    use super::super::ControlFailure as F;
    use super::*;

    fn check(base: &Vmcs12, caps: &Caps, change: Change<'_>, expected: Result<(), F>) {
        let vmcs = changed(base, change);
        assert_eq!(controls(&vmcs, caps, 0), expected, "{change:x?}");
    }

    /// Each bit of each set, against the capability.
    #[test]
    fn every_control_bit_follows_its_capability() {
        let (caps, base) = (rich_caps(), valid());
        for (field, allowed, failure) in [
            (Field::PIN_CTLS, caps.pin, F::PinControls),
            (Field::PROC_CTLS, caps.proc, F::ProcControls),
            (Field::PROC_CTLS2, caps.proc2, F::SecondaryControls),
            (Field::EXIT_CTLS, caps.exit, F::ExitControls),
            (Field::ENTRY_CTLS, caps.entry, F::EntryControls),
        ] {
            for bit in 0..32 {
                let vmcs = changed(&base, &[flip(&base, field, 1 << bit)]);
                let refused = controls(&vmcs, &caps, 0) == Err(failure);
                assert_eq!(refused, !allowed.permits(vmcs.get32(field)), "{field:?} bit {bit}");
            }
        }
        // Secondary controls do not count while they are not activated.
        let mut plain = base.clone();
        clear(&mut plain, Field::PROC_CTLS, ProcCtls::SECONDARY_CONTROLS.bits().into());
        check(&plain, &caps, &[(Field::PROC_CTLS2, u64::MAX), (Field::EPT_POINTER, 0)], Ok(()));
    }

    #[test]
    fn one_flip_one_failure() {
        let (caps, base) = (rich_caps(), valid());
        let pin = |bits: PinCtls| flip(&base, Field::PIN_CTLS, bits.bits().into());
        let proc2 = |bits: ProcCtls2| flip(&base, Field::PROC_CTLS2, bits.bits().into());
        let exit = |bits: ExitCtls| flip(&base, Field::EXIT_CTLS, bits.bits().into());
        let no_window = flip(&base, Field::PROC_CTLS, ProcCtls::NMI_WINDOW_EXITING.bits().into());
        let apic = ProcCtls2::VIRTUALIZE_APIC_ACCESSES;
        let wide = 1 << 40;
        let rows: &[(Change<'_>, F)] = &[
            (&[(Field::CR3_TARGET_COUNT, 5)], F::Cr3TargetCount),
            (&[(Field::IO_BITMAP_A, 0x1001)], F::IoBitmapA),
            (&[(Field::IO_BITMAP_A, wide)], F::IoBitmapA),
            (&[(Field::IO_BITMAP_B, 0x2800)], F::IoBitmapB),
            (&[(Field::IO_BITMAP_B, wide)], F::IoBitmapB),
            (&[(Field::MSR_BITMAP, 0x3008)], F::MsrBitmap),
            (&[(Field::MSR_BITMAP, 1 << 63)], F::MsrBitmap),
            (&[(Field::VIRTUAL_APIC_ADDR, 0x4010)], F::VirtualApicPage),
            (&[(Field::VIRTUAL_APIC_ADDR, wide)], F::VirtualApicPage),
            (&[(Field::TPR_THRESHOLD, 0x10)], F::TprThresholdReserved),
            (&[(Field::TPR_THRESHOLD, 1)], F::TprThresholdAboveVtpr),
            (&[no_window, pin(PinCtls::NMI_EXITING)], F::VirtualNmisWithoutNmiExiting),
            (&[pin(PinCtls::VIRTUAL_NMIS)], F::NmiWindowWithoutVirtualNmis),
            (&[proc2(apic), (Field::APIC_ACCESS_ADDR, 0x5001)], F::ApicAccessPage),
            (&[proc2(apic), (Field::APIC_ACCESS_ADDR, wide)], F::ApicAccessPage),
            (&[(Field::VPID, 0)], F::VpidZero),
            (&[flip(&base, Field::EPT_POINTER, 1 << 3)], F::EptPointer),
            (&[flip(&base, Field::EPT_POINTER, 1)], F::EptPointer),
            (&[flip(&base, Field::EPT_POINTER, 1 << 7)], F::EptPointer),
            (&[flip(&base, Field::EPT_POINTER, wide)], F::EptPointer),
            (
                &[proc2(ProcCtls2::EPT | ProcCtls2::UNRESTRICTED_GUEST)],
                F::UnrestrictedGuestWithoutEpt,
            ),
            (&[(Field::VM_FUNCTION_CONTROLS, 3)], F::VmFunctionReserved),
            (&[(Field::VM_FUNCTION_CONTROLS, 1 << 63)], F::VmFunctionReserved),
            (&[proc2(ProcCtls2::EPT)], F::EptpSwitchingWithoutEpt),
            (&[(Field::EPTP_LIST_ADDRESS, 0x7008)], F::EptpList),
            (&[(Field::EPTP_LIST_ADDRESS, wide)], F::EptpList),
            (&[(Field::TSC_MULTIPLIER, 0)], F::TscMultiplierZero),
            (&[exit(ExitCtls::SAVE_PREEMPTION_TIMER)], F::SaveTimerWithoutTimer),
        ];
        for (change, failure) in rows {
            check(&base, &caps, change, Err(*failure));
        }
        let fine: &[Change<'_>] = &[
            &[(Field::CR3_TARGET_COUNT, 0)],
            &[exit(ExitCtls::SAVE_PREEMPTION_TIMER), pin(PinCtls::PREEMPTION_TIMER)],
            // With virtualized APIC accesses the threshold is not compared.
            &[proc2(apic), (Field::TPR_THRESHOLD, 15)],
            &[flip(&base, Field::EPT_POINTER, 1 << 6)],
            // Fields of controls that are 0 do not count.
            &[proc2(ProcCtls2::VPID), (Field::VPID, 0)],
            &[proc2(ProcCtls2::VM_FUNCTIONS), (Field::VM_FUNCTION_CONTROLS, u64::MAX)],
            &[(Field::VM_FUNCTION_CONTROLS, 0), (Field::EPTP_LIST_ADDRESS, 1)],
            &[proc2(ProcCtls2::TSC_SCALING), (Field::TSC_MULTIPLIER, 0)],
            &[(Field::APIC_ACCESS_ADDR, 1)],
        ];
        for change in fine {
            check(&base, &caps, change, Ok(()));
        }
    }

    #[test]
    fn the_threshold_is_compared_with_vtpr() {
        let (caps, mut vmcs) = (rich_caps(), valid());
        assert_eq!(vtpr_to_read(&vmcs, &caps), Some(L1Gpa::new(0x4080)));
        for (threshold, vtpr, passes) in [(0, 0, true), (1, 0xf, false), (1, 0x10, true)] {
            vmcs.set(Field::TPR_THRESHOLD, threshold);
            assert_eq!(controls(&vmcs, &caps, vtpr).is_ok(), passes);
        }
        let bad = changed(&vmcs, &[(Field::VIRTUAL_APIC_ADDR, 1 << 40)]);
        assert_eq!(vtpr_to_read(&bad, &caps), None);
        set(&mut vmcs, Field::PROC_CTLS2, ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits().into());
        assert_eq!(vtpr_to_read(&vmcs, &caps), None);
    }

    #[test]
    fn msr_areas() {
        let (caps, base) = (rich_caps(), valid());
        for area in MsrArea::ALL {
            let (count, address) = area.fields();
            let top = 1u64 << 40;
            let rows: &[(u64, u64, Result<(), F>)] = &[
                (0, u64::MAX, Ok(())),
                (1, top - 16, Ok(())),
                (2, top - 16, Err(F::MsrAreaBeyondWidth(area))),
                (1, top, Err(F::MsrAreaBeyondWidth(area))),
                (1, !15, Err(F::MsrAreaBeyondWidth(area))),
                (u64::from(u32::MAX), !15, Err(F::MsrAreaBeyondWidth(area))),
                (1, 0x8, Err(F::MsrAreaUnaligned(area))),
                (512, 0, Ok(())),
                (513, 0, Err(F::MsrAreaTooLong(area))),
                (u64::from(u32::MAX), 0, Err(F::MsrAreaTooLong(area))),
            ];
            for (entries, at, expected) in rows {
                check(&base, &caps, &[(count, *entries), (address, *at)], *expected);
            }
        }
    }

    #[test]
    fn injection() {
        let (mut caps, base) = (rich_caps(), valid());
        let length = |bytes| (Field::ENTRY_INSTRUCTION_LEN, bytes);
        let code = |value| (Field::ENTRY_EXCEPTION_ERROR, value);
        let exception = kind::HARDWARE_EXCEPTION;
        let rows: &[(Change<'_>, Result<(), F>)] = &[
            (&[event(kind::EXTERNAL, 255, false)], Ok(())),
            (&[event(1, 32, false)], Err(F::InjectionType)),
            (&[event(kind::OTHER, 0, false)], Err(F::InjectionType)),
            (&[event(kind::NMI, 2, false)], Ok(())),
            (&[event(kind::NMI, 3, false)], Err(F::InjectionVector)),
            (&[event(exception, 31, false)], Ok(())),
            (&[event(exception, 32, false)], Err(F::InjectionVector)),
            (&[event(exception, 14, true), code(0x7fff)], Ok(())),
            (&[event(exception, 14, true), code(0x8000)], Err(F::InjectionErrorCodeReserved)),
            (&[event(exception, 13, true), code(1 << 16)], Err(F::InjectionErrorCodeReserved)),
            (&[event(exception, 6, true), code(0)], Err(F::InjectionErrorCodeUnexpected)),
            (&[event(kind::EXTERNAL, 14, true), code(0)], Err(F::InjectionErrorCodeUnexpected)),
            (&[event(exception, 13, false)], Err(F::InjectionErrorCodeMissing)),
            (&[event(kind::SOFTWARE_INTERRUPT, 0x80, false), length(2)], Ok(())),
            (&[event(kind::SOFTWARE_INTERRUPT, 0x80, false), length(0)], Ok(())),
            (&[event(kind::SOFTWARE_EXCEPTION, 3, false), length(15)], Ok(())),
            (&[event(kind::SOFTWARE_EXCEPTION, 3, false), length(16)], Err(F::InjectionLength)),
            (
                &[event(kind::PRIVILEGED_SOFTWARE_EXCEPTION, 1, false), length(16)],
                Err(F::InjectionLength),
            ),
            (&[event(kind::SOFTWARE_INTERRUPT, 1, false), length(16)], Err(F::InjectionLength)),
            (&[event(exception, 1, false), length(16)], Ok(())),
            (&[(Field::ENTRY_INTR_INFO, 0x7fff_ffff)], Ok(())),
        ];
        for (change, expected) in rows {
            check(&base, &caps, change, *expected);
        }
        for bit in 12..31 {
            let (field, value) = event(kind::EXTERNAL, 32, false);
            check(&base, &caps, &[(field, value | 1 << bit)], Err(F::InjectionReserved));
        }
        // Which vectors have an error code, in protected and in real-address mode.
        for vector in 0..32 {
            let pushes = matches!(vector, 8 | 10..=14 | 17);
            let with = [event(exception, vector, true), code(0)];
            let without = [event(exception, vector, false)];
            let unexpected = Err(F::InjectionErrorCodeUnexpected);
            let missing = Err(F::InjectionErrorCodeMissing);
            check(&base, &caps, &with, if pushes { Ok(()) } else { unexpected });
            check(&base, &caps, &without, if pushes { missing } else { Ok(()) });
            check(&real(), &caps, &with, unexpected);
            check(&real(), &caps, &without, Ok(()));
            let mut any = caps.clone();
            any.basic.set_any_error_code(true);
            check(&base, &any, &with, Ok(()));
            check(&base, &any, &without, Ok(()));
            check(&real(), &any, &with, unexpected);
        }
        caps.misc.set_zero_length_injection(false);
        let empty = [event(kind::SOFTWARE_INTERRUPT, 0x80, false), length(0)];
        check(&base, &caps, &empty, Err(F::InjectionLength));
        caps.sgx = true;
        check(&base, &caps, &[event(exception, 14, true), code(0x8000)], Ok(()));
    }
}

mod of_host_state {
    use super::super::HostFailure as F;
    use super::*;

    const NOT_CANONICAL: u64 = 0x8000_0000_0000;

    #[test]
    fn one_flip_one_failure() {
        let (caps, base) = (rich_caps(), valid());
        let rows: &[(Change<'_>, F)] = &[
            (&[flip(&base, Field::HOST_CR0, 1)], F::Cr0),
            (&[flip(&base, Field::HOST_CR0, 1 << 5)], F::Cr0),
            (&[flip(&base, Field::HOST_CR0, 1 << 31)], F::Cr0),
            (&[flip(&base, Field::HOST_CR0, 1 << 32)], F::Cr0),
            (&[flip(&base, Field::HOST_CR4, 1 << 13)], F::Cr4),
            (&[flip(&base, Field::HOST_CR4, 1 << 14)], F::Cr4),
            (&[flip(&base, Field::HOST_CR4, 1 << 63)], F::Cr4),
            (&[flip(&base, Field::HOST_CR3, 1 << 40)], F::Cr3),
            (&[flip(&base, Field::HOST_CR3, 1 << 63)], F::Cr3),
            (&[(Field::HOST_SYSENTER_ESP, NOT_CANONICAL)], F::SysenterEsp),
            (&[(Field::HOST_SYSENTER_EIP, NOT_CANONICAL)], F::SysenterEip),
            (&[flip(&base, Field::HOST_PAT, 2 << 56)], F::Pat),
            (&[flip(&base, Field::HOST_EFER, 1 << 12)], F::EferReserved),
            (&[flip(&base, Field::HOST_EFER, 1 << 10)], F::EferLma),
            (&[flip(&base, Field::HOST_EFER, 1 << 8)], F::EferLme),
            (&[(Field::HOST_ES_SELECTOR, 4)], F::EsSelector),
            (&[(Field::HOST_CS_SELECTOR, 9)], F::CsSelector),
            (&[(Field::HOST_SS_SELECTOR, 2)], F::SsSelector),
            (&[(Field::HOST_DS_SELECTOR, 3)], F::DsSelector),
            (&[(Field::HOST_FS_SELECTOR, 4)], F::FsSelector),
            (&[(Field::HOST_GS_SELECTOR, 1)], F::GsSelector),
            (&[(Field::HOST_TR_SELECTOR, 0x1c)], F::TrSelector),
            (&[(Field::HOST_CS_SELECTOR, 0)], F::CsNull),
            (&[(Field::HOST_TR_SELECTOR, 0)], F::TrNull),
            (&[(Field::HOST_FS_BASE, NOT_CANONICAL)], F::FsBase),
            (&[(Field::HOST_GS_BASE, NOT_CANONICAL)], F::GsBase),
            (&[(Field::HOST_TR_BASE, NOT_CANONICAL)], F::TrBase),
            (&[(Field::HOST_GDTR_BASE, NOT_CANONICAL)], F::GdtrBase),
            (&[(Field::HOST_IDTR_BASE, NOT_CANONICAL)], F::IdtrBase),
            (&[flip(&base, Field::EXIT_CTLS, 1 << 9)], F::AddressSpaceSize),
            (&[flip(&base, Field::HOST_CR4, 1 << 5)], F::Pae),
            (&[(Field::HOST_RIP, NOT_CANONICAL)], F::RipCanonical),
        ];
        for (change, failure) in rows {
            let vmcs = changed(&base, change);
            assert_eq!(host_state(&vmcs, &caps, true), Err(*failure), "{change:x?}");
        }
        // MSRs that no control loads do not count.
        let mut vmcs = changed(&base, &[(Field::HOST_PAT, 2), (Field::HOST_EFER, 0)]);
        let load = ExitCtls::LOAD_PAT | ExitCtls::LOAD_EFER;
        clear(&mut vmcs, Field::EXIT_CTLS, load.bits().into());
        assert_eq!(host_state(&vmcs, &caps, true), Ok(()));
    }

    #[test]
    fn a_32_bit_host() {
        let (caps, base) = (rich_caps(), narrow_host());
        let ia32e = u64::from(EntryCtls::IA32E_MODE_GUEST.bits());
        let rows: &[(Change<'_>, F)] = &[
            (&[flip(&base, Field::EXIT_CTLS, 1 << 9)], F::AddressSpaceSize),
            (&[flip(&base, Field::ENTRY_CTLS, ia32e)], F::Ia32eGuest),
            (&[flip(&base, Field::HOST_CR4, 1 << 17)], F::Pcide),
            (&[(Field::HOST_RIP, 1 << 32)], F::RipHigh),
            (&[(Field::HOST_SS_SELECTOR, 0)], F::SsNull),
            (&[flip(&base, Field::HOST_EFER, 1 << 10)], F::EferLma),
            (&[flip(&base, Field::HOST_EFER, 1 << 8)], F::EferLme),
        ];
        for (change, failure) in rows {
            let vmcs = changed(&base, change);
            assert_eq!(host_state(&vmcs, &caps, false), Err(*failure), "{change:x?}");
        }
        assert_eq!(host_state(&base, &caps, true), Err(F::AddressSpaceSize));
    }

    #[test]
    fn widths_of_linear_addresses() {
        let (mut caps, base) = (rich_caps(), valid());
        caps.linear_width = 57;
        caps.cr4_fixed1 |= 1 << 12;
        let wide = changed(&base, &[(Field::HOST_FS_BASE, NOT_CANONICAL)]);
        assert_eq!(host_state(&wide, &caps, true), Ok(()));
        let rip = changed(&base, &[(Field::HOST_RIP, NOT_CANONICAL)]);
        assert_eq!(host_state(&rip, &caps, true), Err(F::RipCanonical));
        let la57 = changed(&rip, &[flip(&base, Field::HOST_CR4, 1 << 12)]);
        assert_eq!(host_state(&la57, &caps, true), Ok(()));
    }
}
