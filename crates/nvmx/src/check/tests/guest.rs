//! The guest-state area, one flip for each requirement.

use super::*;
use GuestFailure as F;
use Segment::{Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};

const NOT_CANONICAL: u64 = 0x8000_0000_0000;

fn check(base: &Vmcs12, caps: &Caps, change: Change<'_>, expected: Result<(), F>) {
    let vmcs = changed(base, change);
    assert_eq!(guest_state(&vmcs, caps, &inputs()), expected, "{change:x?}");
}

fn fail(base: &Vmcs12, rows: &[(Change<'_>, F)]) {
    for (change, failure) in rows {
        check(base, &rich_caps(), change, Err(*failure));
    }
}

fn pass(base: &Vmcs12, rows: &[Change<'_>]) {
    for change in rows {
        check(base, &rich_caps(), change, Ok(()));
    }
}

fn unrestricted(mut vmcs: Vmcs12) -> Vmcs12 {
    set(&mut vmcs, Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into());
    vmcs
}

#[test]
fn control_registers() {
    let (long, pae, real) = (valid(), pae(), real());
    fail(
        &long,
        &[
            (&[flip(&long, Field::GUEST_CR0, 1)], F::Cr0),
            (&[flip(&long, Field::GUEST_CR0, 1 << 5)], F::Cr0),
            (&[flip(&long, Field::GUEST_CR0, 1 << 31)], F::Cr0),
            (&[flip(&long, Field::GUEST_CR0, 1 << 40)], F::Cr0),
            (&[flip(&long, Field::GUEST_CR4, 1 << 13)], F::Cr4),
            (&[flip(&long, Field::GUEST_CR4, 1 << 23)], F::Cr4),
            (&[flip(&long, Field::GUEST_CR4, 1 << 5)], F::Ia32eWithoutPae),
            (&[flip(&long, Field::GUEST_CR3, 1 << 40)], F::Cr3),
            (&[flip(&long, Field::GUEST_CR3, 1 << 63)], F::Cr3),
        ],
    );
    pass(&long, &[&[flip(&long, Field::GUEST_CR4, 1 << 17)]]);
    fail(&pae, &[(&[flip(&pae, Field::GUEST_CR4, 1 << 17)], F::Pcide)]);
    // An unrestricted guest may be without PE and PG, but not with PG alone, nor without NE.
    let free = unrestricted(long.clone());
    fail(
        &free,
        &[
            (&[flip(&free, Field::GUEST_CR0, 1)], F::PagingWithoutProtection),
            (&[flip(&free, Field::GUEST_CR0, 1 << 31)], F::Ia32eWithoutPaging),
            (&[flip(&free, Field::GUEST_CR0, 1 << 5)], F::Cr0),
        ],
    );
    fail(&real, &[(&[flip(&real, Field::GUEST_CR0, 1 << 31)], F::PagingWithoutProtection)]);
    let proc2 = u64::from(ProcCtls2::UNRESTRICTED_GUEST.bits());
    fail(&real, &[(&[flip(&real, Field::PROC_CTLS2, proc2)], F::Cr0)]);
}

#[test]
fn msrs_and_debug_registers() {
    let (base, pae, real) = (valid(), pae(), real());
    fail(
        &base,
        &[
            (&[(Field::GUEST_DEBUGCTL, 1 << 3)], F::DebugCtl),
            (&[(Field::GUEST_DEBUGCTL, 1 << 63)], F::DebugCtl),
            (&[(Field::GUEST_DR7, 1 << 32)], F::Dr7),
            (&[(Field::GUEST_SYSENTER_ESP, NOT_CANONICAL)], F::SysenterEsp),
            (&[(Field::GUEST_SYSENTER_EIP, NOT_CANONICAL)], F::SysenterEip),
            (&[(Field::GUEST_PAT, 3)], F::Pat),
            (&[flip(&base, Field::GUEST_EFER, 1 << 1)], F::EferReserved),
            (&[flip(&base, Field::GUEST_EFER, 1 << 10)], F::EferLma),
            (&[flip(&base, Field::GUEST_EFER, 1 << 8)], F::EferLme),
        ],
    );
    fail(&pae, &[(&[flip(&pae, Field::GUEST_EFER, 1 << 8)], F::EferLme)]);
    // Without paging LME may wait for it.
    pass(&real, &[&[(Field::GUEST_EFER, 1 << 8)]]);
    let load = EntryCtls::LOAD_DEBUG_CONTROLS | EntryCtls::LOAD_PAT | EntryCtls::LOAD_EFER;
    let unloaded = flip(&base, Field::ENTRY_CTLS, load.bits().into());
    pass(
        &base,
        &[
            &[unloaded, (Field::GUEST_DEBUGCTL, 1 << 3), (Field::GUEST_DR7, 1 << 32)],
            &[unloaded, (Field::GUEST_PAT, 2), (Field::GUEST_EFER, 0)],
        ],
    );
}

#[test]
fn selectors_and_bases() {
    let base = valid();
    fail(
        &base,
        &[
            (&[(Tr.selector(), 0x1c)], F::TrTableIndicator),
            (&[(Ldtr.access_rights(), 0x82), (Ldtr.selector(), 4)], F::LdtrTableIndicator),
            (&[(Ss.selector(), 0x13)], F::SsRpl),
            (&[(Tr.base(), NOT_CANONICAL)], F::SegmentBase(Tr)),
            (&[(Fs.base(), NOT_CANONICAL)], F::SegmentBase(Fs)),
            (&[(Gs.base(), NOT_CANONICAL)], F::SegmentBase(Gs)),
            (&[(Gs.base(), NOT_CANONICAL), (Gs.access_rights(), 1 << 16)], F::SegmentBase(Gs)),
            (&[(Ldtr.access_rights(), 0x82), (Ldtr.base(), NOT_CANONICAL)], F::SegmentBase(Ldtr)),
            (&[(Cs.base(), 1 << 32)], F::SegmentBase(Cs)),
            (&[(Ss.base(), 1 << 32)], F::SegmentBase(Ss)),
            (&[(Ds.base(), 1 << 63)], F::SegmentBase(Ds)),
            (&[(Es.base(), 1 << 32)], F::SegmentBase(Es)),
        ],
    );
    pass(
        &base,
        &[
            &[(Ldtr.selector(), 4), (Ldtr.base(), NOT_CANONICAL)],
            &[(Ds.base(), 1 << 32), (Ds.access_rights(), 1 << 16)],
            &[(Ss.base(), 1 << 32), (Ss.access_rights(), 1 << 16)],
            &[(Fs.base(), 0xffff_8000_0000_0000)],
        ],
    );
    pass(&unrestricted(base), &[&[(Ss.selector(), 0x13)]]);
}

#[test]
fn virtual_8086_registers() {
    let base = virtual_8086();
    for segment in Segment::CODE_AND_DATA {
        fail(
            &base,
            &[
                (&[(segment.selector(), 0x1004)], F::Virtual8086Base(segment)),
                (&[(segment.base(), 0x1_0031)], F::Virtual8086Base(segment)),
                (&[(segment.limit(), 0xfffe)], F::Virtual8086Limit(segment)),
                (&[(segment.limit(), 0x1_ffff)], F::Virtual8086Limit(segment)),
            ],
        );
        for bit in 0..32 {
            let rights = flip(&base, segment.access_rights(), 1 << bit);
            fail(&base, &[(&[rights], F::Virtual8086AccessRights(segment))]);
        }
    }
}

#[test]
fn types() {
    let (base, free) = (valid(), unrestricted(valid()));
    let with_type = |segment: Segment, kind: u64| {
        (segment.access_rights(), base.get(segment.access_rights()) & !0xf | kind)
    };
    for kind in 0..16 {
        let fits = |fits: bool, segment| if fits { Ok(()) } else { Err(F::SegmentType(segment)) };
        let caps = rich_caps();
        check(&base, &caps, &[with_type(Cs, kind)], fits(matches!(kind, 9 | 11 | 13 | 15), Cs));
        let cs = matches!(kind, 3 | 9 | 11 | 13 | 15);
        check(&free, &caps, &[with_type(Cs, kind)], fits(cs, Cs));
        check(&base, &caps, &[with_type(Ss, kind)], fits(matches!(kind, 3 | 7), Ss));
        let data = matches!(kind, 1 | 3 | 5 | 7 | 11 | 15);
        for segment in [Ds, Es, Fs, Gs] {
            check(&base, &caps, &[with_type(segment, kind)], fits(data, segment));
        }
        check(&base, &caps, &[(Tr.access_rights(), 0x80 | kind)], fits(kind == 11, Tr));
        let tr = matches!(kind, 3 | 11);
        check(&pae(), &caps, &[(Tr.access_rights(), 0x80 | kind)], fits(tr, Tr));
        check(&base, &caps, &[(Ldtr.access_rights(), 0x80 | kind)], fits(kind == 2, Ldtr));
    }
}

#[test]
fn access_rights_and_limits() {
    let mut base = valid();
    base.set(Ldtr.access_rights(), 0x82);
    base.set(Ldtr.limit(), 0xffff);
    pass(&base, &[&[]]);
    let unusable = 1 << 16;
    for segment in [Cs, Ss, Ds, Es, Fs, Gs, Ldtr, Tr] {
        let field = segment.access_rights();
        let code_or_data = !matches!(segment, Ldtr | Tr);
        let kind = if code_or_data {
            F::SegmentNotCodeOrData(segment)
        } else {
            F::SegmentNotSystem(segment)
        };
        fail(
            &base,
            &[
                (&[flip(&base, field, 1 << 4)], kind),
                (&[flip(&base, field, 1 << 7)], F::SegmentNotPresent(segment)),
            ],
        );
        for bit in (8..12).chain(17..32) {
            fail(&base, &[(&[flip(&base, field, 1 << bit)], F::SegmentReserved(segment))]);
        }
        let (coarse, fine) = (base.get(field) | 1 << 15, base.get(field) & !(1 << 15));
        for bit in 0..12 {
            let limit = (segment.limit(), 0xffff_ffff ^ 1 << bit);
            fail(&base, &[(&[(field, coarse), limit], F::SegmentGranularity(segment))]);
        }
        for bit in 20..32 {
            let limit = (segment.limit(), 1 << bit);
            fail(&base, &[(&[(field, fine), limit], F::SegmentGranularity(segment))]);
        }
        pass(
            &base,
            &[
                &[(field, fine), (segment.limit(), 0xf_ffff)],
                &[(field, coarse), (segment.limit(), 0xfff)],
            ],
        );
        // Unusable: nothing more counts, except for CS (where the bit is not looked at) and TR.
        match segment {
            Cs => pass(&base, &[&[flip(&base, field, unusable)]]),
            Tr => fail(&base, &[(&[flip(&base, field, unusable)], F::TrUnusable)]),
            _ => pass(&base, &[&[(field, unusable | 0xfffe_0f00), (segment.limit(), 1 << 31)]]),
        }
    }
    fail(&base, &[(&[flip(&base, Cs.access_rights(), 1 << 14)], F::CsDefaultAndLong)]);
    pass(&pae(), &[&[(Cs.access_rights(), 0xe09b)]]);
}

#[test]
fn privilege_levels() {
    let (base, free) = (valid(), unrestricted(valid()));
    let dpl = |segment: Segment, dpl: u64| {
        (segment.access_rights(), base.get(segment.access_rights()) & !0x60 | dpl << 5)
    };
    let kind = |segment: Segment, kind: u64, dpl: u64| {
        (segment.access_rights(), base.get(segment.access_rights()) & !0x6f | dpl << 5 | kind)
    };
    let user = [(Cs.selector(), 0xb), (Ss.selector(), 0x13)];
    let [cs, ss] = user;
    fail(
        &base,
        &[
            (&[dpl(Ss, 3)], F::SegmentPrivilege(Ss)),
            (&[(Ss.access_rights(), 1 << 16 | 3 << 5)], F::SegmentPrivilege(Ss)),
            (&[dpl(Cs, 3)], F::SegmentPrivilege(Cs)),
            (&[cs, ss, dpl(Ss, 3)], F::SegmentPrivilege(Cs)),
            (&[kind(Cs, 13, 1)], F::SegmentPrivilege(Cs)),
            (&[(Ds.selector(), 0x13)], F::SegmentPrivilege(Ds)),
            (&[(Es.selector(), 0x13), dpl(Es, 2)], F::SegmentPrivilege(Es)),
            (&[(Fs.selector(), 0x13), kind(Fs, 11, 0)], F::SegmentPrivilege(Fs)),
            (&[(Gs.selector(), 0x11)], F::SegmentPrivilege(Gs)),
        ],
    );
    pass(
        &base,
        &[
            &[cs, ss, dpl(Cs, 3), dpl(Ss, 3)],
            &[cs, ss, kind(Cs, 15, 0), dpl(Ss, 3)],
            &[(Ds.selector(), 0x13), dpl(Ds, 3)],
            &[(Ds.selector(), 0x13), kind(Ds, 15, 0)],
            &[(Ds.selector(), 0x13), (Ds.access_rights(), 1 << 16)],
        ],
    );
    // Unrestricted: RPLs do not count; a writable CS, or real-address mode, means CPL 0.
    pass(&free, &[&[(Ds.selector(), 0x13)], &[dpl(Ss, 3), dpl(Cs, 3)], &[kind(Cs, 3, 0)]]);
    fail(
        &free,
        &[
            (&[kind(Cs, 3, 1)], F::SegmentPrivilege(Cs)),
            (&[kind(Cs, 3, 0), dpl(Ss, 1)], F::SegmentPrivilege(Ss)),
        ],
    );
    let real = real();
    let (ss, cs) = ((Ss.access_rights(), 0xf3), (Cs.access_rights(), 0xfb));
    fail(&real, &[(&[ss, cs], F::SegmentPrivilege(Ss)), (&[cs], F::SegmentPrivilege(Cs))]);
}

#[test]
fn tables_instruction_pointer_and_flags() {
    let (base, pae, real) = (valid(), pae(), real());
    fail(
        &base,
        &[
            (&[(Field::GUEST_GDTR_BASE, NOT_CANONICAL)], F::GdtrBase),
            (&[(Field::GUEST_IDTR_BASE, NOT_CANONICAL)], F::IdtrBase),
            (&[(Field::GUEST_GDTR_LIMIT, 0x1_0000)], F::GdtrLimit),
            (&[(Field::GUEST_IDTR_LIMIT, 0x1_0000)], F::IdtrLimit),
            (&[(Field::GUEST_RIP, NOT_CANONICAL)], F::RipCanonical),
            // Compatibility mode.
            (&[(Cs.access_rights(), 0xc09b)], F::RipHigh),
            (&[flip(&base, Field::GUEST_RFLAGS, 1 << 17)], F::RflagsVirtual8086),
            (&[(Field::GUEST_RFLAGS, 2), event(kind::EXTERNAL, 32, false)], F::RflagsInterruptFlag),
        ],
    );
    fail(&pae, &[(&[(Field::GUEST_RIP, 1 << 32)], F::RipHigh)]);
    fail(&real, &[(&[flip(&real, Field::GUEST_RFLAGS, 1 << 17)], F::RflagsVirtual8086)]);
    pass(&base, &[&[(Field::GUEST_RFLAGS, 2), event(kind::NMI, 2, false)]]);
    for bit in (22..64).chain([1, 3, 5, 15]) {
        fail(&base, &[(&[flip(&base, Field::GUEST_RFLAGS, 1 << bit)], F::RflagsReserved)]);
    }
    let mut wide = rich_caps();
    wide.linear_width = 57;
    check(&base, &wide, &[(Field::GUEST_RIP, NOT_CANONICAL)], Ok(()));
    check(&base, &wide, &[(Field::GUEST_RIP, 1 << 56)], Err(F::RipCanonical));
}

#[test]
fn activity_states() {
    let (base, mut caps) = (valid(), rich_caps());
    let state = |state: u64| (Field::GUEST_ACTIVITY, state);
    fail(
        &base,
        &[
            (&[state(3)], F::ActivityState),
            (&[state(4)], F::ActivityState),
            (&[state(1), (Field::GUEST_INTERRUPTIBILITY, 1)], F::ActivityBlocked),
            (&[state(2), (Field::GUEST_INTERRUPTIBILITY, 2)], F::ActivityBlocked),
            (
                &[
                    state(1),
                    (Cs.selector(), 0xb),
                    (Ss.selector(), 0x13),
                    flip(&base, Cs.access_rights(), 0x60),
                    flip(&base, Ss.access_rights(), 0x60),
                ],
                F::HltPrivilege,
            ),
        ],
    );
    // What may be injected into which state.
    for (kind, vector, halted, shutdown) in [
        (kind::EXTERNAL, 32, true, false),
        (kind::NMI, 2, true, true),
        (kind::HARDWARE_EXCEPTION, 1, true, false),
        (kind::HARDWARE_EXCEPTION, 18, true, true),
        (kind::HARDWARE_EXCEPTION, 6, false, false),
        (kind::SOFTWARE_INTERRUPT, 18, false, false),
        (kind::EXTERNAL, 18, true, false),
        (kind::PRIVILEGED_SOFTWARE_EXCEPTION, 1, false, false),
    ] {
        let injected = event(kind, vector, false);
        for (activity, fine) in [(0, true), (1, halted), (2, shutdown)] {
            let expected = if fine { Ok(()) } else { Err(F::ActivityInjection) };
            check(&base, &caps, &[state(activity), injected], expected);
        }
    }
    caps.misc.set_activity_hlt(false);
    caps.misc.set_activity_shutdown(false);
    check(&base, &caps, &[state(1)], Err(F::ActivityState));
    check(&base, &caps, &[state(2)], Err(F::ActivityState));
}

#[test]
fn interruptibility_states() {
    let base = valid();
    let state = |bits: u64| (Field::GUEST_INTERRUPTIBILITY, bits);
    let interrupt = event(kind::EXTERNAL, 32, false);
    let nmi = event(kind::NMI, 2, false);
    for bit in 5..32 {
        fail(&base, &[(&[state(1 << bit)], F::InterruptibilityReserved)]);
    }
    fail(
        &base,
        &[
            (&[state(3)], F::StiAndMovSs),
            (&[state(1), (Field::GUEST_RFLAGS, 2)], F::StiWithoutInterruptFlag),
            (&[state(4)], F::SmiOutsideSmm),
            (&[state(1 << 4)], F::EnclaveInterruption),
            (&[state(1), interrupt], F::InterruptBlocked),
            (&[state(2), interrupt], F::InterruptBlocked),
            (&[state(2), nmi], F::NmiBlockedByMovSs),
            (&[state(1), nmi], F::NmiBlockedBySti),
            (&[state(8), nmi], F::VirtualNmiBlocked),
        ],
    );
    let plain = flip(&base, Field::PIN_CTLS, PinCtls::VIRTUAL_NMIS.bits().into());
    let exception = event(kind::HARDWARE_EXCEPTION, 6, false);
    pass(
        &base,
        &[&[state(1)], &[state(2)], &[state(8)], &[plain, state(8), nmi], &[state(1), exception]],
    );
    let mut sgx = rich_caps();
    sgx.sgx = true;
    check(&base, &sgx, &[state(1 << 4)], Ok(()));
    check(&base, &sgx, &[state(1 << 4 | 2)], Err(F::EnclaveInterruption));
}

#[test]
fn pending_debug_exceptions() {
    let (base, mut caps) = (valid(), rich_caps());
    let pending = |bits: u64| (Field::GUEST_PENDING_DEBUG, bits);
    let rtm = 1 << 16 | 1 << 12;
    for bit in (4..11).chain([13, 15]).chain(17..64) {
        fail(&base, &[(&[pending(1 << bit)], F::PendingDebugReserved)]);
    }
    let sti = (Field::GUEST_INTERRUPTIBILITY, 1);
    let mov_ss = (Field::GUEST_INTERRUPTIBILITY, 2);
    let halted = (Field::GUEST_ACTIVITY, 1);
    let trap = flip(&base, Field::GUEST_RFLAGS, 1 << 8);
    let branches = (Field::GUEST_DEBUGCTL, 2);
    for blocked in [sti, mov_ss, halted] {
        fail(
            &base,
            &[
                (&[blocked, trap], F::PendingDebugSingleStep),
                (&[blocked, pending(1 << 14)], F::PendingDebugSingleStep),
                (&[blocked, trap, branches, pending(1 << 14)], F::PendingDebugSingleStep),
            ],
        );
        pass(&base, &[&[blocked, trap, pending(1 << 14)], &[blocked, trap, branches]]);
    }
    pass(&base, &[&[trap], &[pending(1 << 14)], &[pending(0x180f)], &[pending(rtm)]]);
    fail(
        &base,
        &[
            (&[pending(1 << 16)], F::PendingDebugRtm),
            (&[pending(rtm | 1)], F::PendingDebugRtm),
            (&[pending(rtm | 1 << 14)], F::PendingDebugRtm),
            (&[pending(rtm), mov_ss], F::PendingDebugRtm),
        ],
    );
    caps.debugctl = 3;
    check(&base, &caps, &[pending(rtm)], Err(F::PendingDebugRtm));
    check(&base, &caps, &[pending(1 << 11)], Err(F::PendingDebugReserved));
}

#[test]
fn the_link_pointer() {
    let (base, caps) = (valid(), rich_caps());
    let linked = |address: u64, revision: u32| {
        let vmcs = changed(&base, &[(Field::VMCS_LINK_POINTER, address)]);
        let inputs = GuestInputs { link_revision: revision, ..inputs() };
        (link_to_read(&vmcs, &caps), guest_state(&vmcs, &caps, &inputs))
    };
    let page = L1Gpa::new(0xb_0000);
    assert_eq!(link_to_read(&base, &caps), None);
    assert_eq!(linked(0xb_0000, REVISION), (Some(page), Ok(())));
    assert_eq!(linked(0xb_0000, REVISION ^ 1), (Some(page), Err(F::LinkRevision)));
    assert_eq!(linked(0xb_0000, REVISION | 1 << 31), (Some(page), Err(F::LinkRevision)));
    assert_eq!(linked(0xb_0001, REVISION), (None, Err(F::LinkAddress)));
    assert_eq!(linked(1 << 40, REVISION), (None, Err(F::LinkAddress)));
    assert_eq!(linked(u64::MAX - 1, REVISION), (None, Err(F::LinkAddress)));
    assert_eq!(linked(CURRENT.as_u64(), REVISION), (Some(CURRENT), Err(F::LinkIsCurrent)));
}

#[test]
fn pdptes_with_and_without_ept() {
    let (base, caps) = (pae(), rich_caps());
    let fields =
        [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];
    let mut shadowed = base.clone();
    let ept = ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS;
    clear(&mut shadowed, Field::PROC_CTLS2, ept.bits().into());
    shadowed.set(Field::GUEST_CR3, 0x1_2345_6fff);
    assert_eq!(pdptes_to_read(&base), None);
    assert_eq!(pdptes_to_read(&valid()), None);
    assert_eq!(pdptes_to_read(&shadowed), Some(L1Gpa::new(0x2345_6fe0)));
    for bit in 0..64 {
        let reserved = matches!(bit, 1 | 2 | 5..=8 | 40..=63);
        let expected = if reserved { Err(F::Pdpte) } else { Ok(()) };
        for (index, field) in fields.iter().enumerate() {
            check(&base, &caps, &[(*field, 1 | 1 << bit)], expected);
            check(&base, &caps, &[(*field, 1 << bit & !1)], Ok(()));
            // Only PAE paging has them.
            check(&valid(), &caps, &[(*field, 1 | 1 << bit)], Ok(()));
            check(&real(), &caps, &[(*field, 1 | 1 << bit)], Ok(()));
            let mut inputs = inputs();
            inputs.pdptes[index] = 1 | 1 << bit;
            assert_eq!(guest_state(&shadowed, &caps, &inputs), expected);
            assert_eq!(guest_state(&base, &caps, &inputs), Ok(()));
        }
    }
}

#[test]
fn qualifications() {
    for (failure, qualification) in [
        (F::Cr0, 0),
        (F::NmiBlockedByMovSs, 0),
        (F::Pdpte, 2),
        (F::NmiBlockedBySti, 3),
        (F::LinkAddress, 4),
        (F::LinkRevision, 4),
        (F::LinkIsCurrent, 4),
    ] {
        assert_eq!(failure.qualification(), qualification);
    }
}
