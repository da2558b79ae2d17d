//! Does EPT allow, deny, mark and refuse as the SDM says, and does the exit qualification say why?

mod stage;

use stage::*;
use vmx_defs::ept::EptViolation;
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{ExitReason, Field};
use vmx_model::program::GuestMode;
use vmx_model::{Action, Machine, ModelCaps, Operation, Outcome, Retention, Session, layout};

const LOAD: Operation = Operation::Load { at: DATA, size: 8 };
const STORE: Operation = Operation::Store { at: DATA, size: 8, value: 1 };
const FETCH: Operation = Operation::Fetch { at: DATA };

fn stage(caps: &ModelCaps, case: impl FnOnce(&mut Session<'_, Machine>)) {
    let mut machine = machine_with(Retention::Everything, caps, 1);
    case(&mut Session::new(&mut machine, caps, &setup(GuestMode::Long, 1)));
}

fn qualification(session: &mut Session<'_, Machine>) -> EptViolation {
    EptViolation::from(session.field(Field::EXIT_QUALIFICATION))
}

#[test]
fn permissions_of_each_level() {
    let caps = ModelCaps::default();
    // A level above the last also holds the guest's own tables: read access has to stay there.
    for (level, gpa) in [(1, DATA), (2, layout::LARGE), (3, layout::HUGE)] {
        for rights in [0, 1, 3, 4, 5, 7] {
            stage(&caps, |session| {
                let at =
                    layout::ept_table(0, level) + 8 * (gpa >> (3 + 9 * u32::from(level)) & 511);
                let entry = session.word(at) & !7 | rights;
                session.write(at, entry);
                for (bit, access) in [
                    (1, Operation::Load { at: gpa, size: 4 }),
                    (2, Operation::Store { at: gpa, size: 4, value: 1 }),
                    (4, Operation::Fetch { at: gpa }),
                ] {
                    let outcome = session.guest(0, access);
                    if rights & bit != 0 {
                        assert!(matches!(outcome, Outcome::Completed { .. }), "{access:?}");
                        continue;
                    }
                    assert_eq!(outcome, Outcome::Exit(ExitReason::EPT_VIOLATION));
                    let told = qualification(session).into_bits();
                    assert_eq!(told, bit | rights << 3 | 3 << 7, "level {level} {access:?}");
                    assert_eq!(session.field(Field::GUEST_PHYSICAL_ADDRESS), gpa);
                    assert_eq!(session.field(Field::GUEST_LINEAR_ADDRESS), gpa);
                }
            });
        }
    }
}

#[test]
fn rights_are_those_of_the_whole_walk() {
    let caps = ModelCaps::default();
    stage(&caps, |session| {
        // The guest's accessed flags have to be set before its tables are read-only.
        session.load(DATA);
        session.write(layout::ept_table(0, 2), layout::ept_table(0, 1) | 5);
        session.act(Action::Invept { kind: 2, eptp: 0 });
        session.load(DATA);
        assert_eq!(session.exit_of(STORE), ExitReason::EPT_VIOLATION);
        assert_eq!(qualification(session).into_bits() >> 3 & 7, 5);
    });
}

#[test]
fn accesses_to_paging_structures() {
    let caps = ModelCaps::default();
    let pt = layout::guest::LONG + 3;
    for (rights, flags, expected) in [
        // Not readable; not writable, which matters for setting the accessed flag, and always with
        // accessed and dirty flags for EPT.
        (0, false, Some(1)),
        (4, false, Some(1 | 4 << 3)),
        (1, false, Some(3 | 1 << 3)),
        (1, true, Some(3 | 1 << 3)),
        (3, true, None),
    ] {
        stage(&caps, |session| {
            session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(0, flags)));
            let entry = session.word(leaf(0, pt)) & !7 | rights;
            session.write(leaf(0, pt), entry);
            let outcome = session.guest(0, LOAD);
            let Some(expected) = expected else {
                assert!(matches!(outcome, Outcome::Completed { .. }));
                return;
            };
            assert_eq!(outcome, Outcome::Exit(ExitReason::EPT_VIOLATION));
            assert_eq!(qualification(session).into_bits(), expected | 1 << 7, "{rights}");
            let at = (pt << 12) | (8 * layout::DATA);
            assert_eq!(session.field(Field::GUEST_PHYSICAL_ADDRESS), at);
            assert_eq!(session.field(Field::GUEST_LINEAR_ADDRESS), DATA);
        });
    }
    // With the accessed flags set already, a read-only table will do, without flags for EPT.
    stage(&caps, |session| {
        session.load(DATA);
        let entry = session.word(leaf(0, pt)) & !2;
        session.write(leaf(0, pt), entry);
        session.act(Action::Invept { kind: 2, eptp: 0 });
        session.load(DATA);
    });
}

#[test]
fn loading_pdptes_has_no_linear_address() {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Pae, 1));
    session.load(DATA);
    session.write(leaf(0, layout::guest::PAE), 0);
    session.act(Action::Invept { kind: 2, eptp: 0 });
    let value = layout::guest_cr3(GuestMode::Pae)[0];
    let load = Operation::MovToCr { register: 3, value };
    assert_eq!(session.exit_of(load), ExitReason::EPT_VIOLATION);
    assert_eq!(qualification(&mut session).into_bits(), 1);
    assert_eq!(session.field(Field::GUEST_PHYSICAL_ADDRESS), value);
}

#[test]
fn misconfigurations() {
    let mut caps = ModelCaps::default();
    let changes: [fn(u64) -> u64; 7] = [
        |entry| entry & !7 | 2,
        |entry| entry & !7 | 6,
        |entry| entry & !0x38 | 2 << 3,
        |entry| entry & !0x38 | 3 << 3,
        |entry| entry & !0x38 | 7 << 3,
        |entry| entry | 1 << 40,
        |entry| entry | 1 << 51,
    ];
    for change in changes {
        stage(&caps, |session| {
            let entry = session.word(leaf(0, layout::DATA));
            session.write(leaf(0, layout::DATA), change(entry));
            for access in [LOAD, STORE, FETCH] {
                assert_eq!(session.exit_of(access), ExitReason::EPT_MISCONFIGURATION);
                assert_eq!(session.field(Field::GUEST_PHYSICAL_ADDRESS), DATA);
            }
        });
    }
    caps.ept_vpid -= EptVpidCap::EXECUTE_ONLY;
    stage(&caps, |session| {
        let entry = session.word(leaf(0, layout::DATA));
        session.write(leaf(0, layout::DATA), entry & !3);
        assert_eq!(session.exit_of(FETCH), ExitReason::EPT_MISCONFIGURATION);
    });
}

#[test]
fn accessed_and_dirty_flags_stick() {
    const FLAGS: u64 = 3 << 8;
    let caps = ModelCaps::default();
    stage(&caps, |session| {
        session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(0, true)));
        session.load(DATA);
        let flags = |session: &mut Session<'_, Machine>, level| {
            let index = if level == 1 { layout::DATA } else { 0 };
            session.word(layout::ept_table(0, level) + 8 * index) & FLAGS
        };
        assert_eq!([1, 2, 3, 4].map(|level| flags(session, level)), [1 << 8; 4]);
        session.done(STORE);
        assert_eq!(flags(session, 1), FLAGS);
        // A flag that L1 clears is not set again while the mapping is cached.
        let cleared = session.word(leaf(0, layout::DATA)) & !FLAGS;
        session.write(leaf(0, layout::DATA), cleared);
        session.done(STORE);
        assert_eq!(flags(session, 1), 0);
        session.act(Action::Invept { kind: 1, eptp: layout::eptp(0, true) });
        session.load(DATA);
        assert_eq!(flags(session, 1), 1 << 8);
    });
    // An access that is denied sets none.
    stage(&caps, |session| {
        session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(0, true)));
        let entry = session.word(leaf(0, layout::DATA)) & !2;
        session.write(leaf(0, layout::DATA), entry);
        assert_eq!(session.exit_of(STORE), ExitReason::EPT_VIOLATION);
        assert_eq!(session.word(leaf(0, layout::DATA)), entry);
    });
}

#[test]
fn advanced_information() {
    let mut caps = ModelCaps::default();
    caps.ept_vpid |= EptVpidCap::ADVANCED_EXIT_INFO;
    stage(&caps, |session| {
        session.write(leaf(0, layout::DATA), 0);
        let entry = layout::guest_structure(layout::guest::LONG + 3) + 8 * layout::DATA;
        session.write(entry, layout::DATA << 12 | 5 | 1 << 63);
        assert_eq!(session.exit_of(LOAD), ExitReason::EPT_VIOLATION);
        let told = qualification(session);
        assert!(told.user_linear() && !told.linear_writable() && told.linear_execute_disabled());
    });
}
