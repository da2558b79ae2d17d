//! Does a guest run in each paging mode, with EPT and without?

mod stage;

use stage::*;
use vmx_model::program::GuestMode;
use vmx_model::{Operation, Retention, Session, layout};

#[test]
fn each_mode_reads_its_data() {
    for retention in [Retention::Everything, Retention::Random(3), Retention::Nothing] {
        for mode in [GuestMode::Long, GuestMode::Pae, GuestMode::Bits32, GuestMode::Unpaged] {
            let caps = vmx_model::ModelCaps::default();
            let mut machine = machine(retention);
            let mut session = Session::new(&mut machine, &caps, &setup(mode, 1));
            for view in 0..layout::VIEWS {
                session.switch(view as u64);
                if view == 1 && mode == GuestMode::Long {
                    // Another page table there: not this test's business.
                    continue;
                }
                for number in 0..layout::DATA_PAGES {
                    let at = DATA + (number << 12);
                    assert_eq!(session.load(at), mark(view, number), "{mode:?} view {view}");
                }
                let large = layout::LARGE + 0x5000;
                if !(mode == GuestMode::Bits32) {
                    assert_eq!(session.load(large), layout::mark(large), "{mode:?} view {view}");
                }
            }
            assert_eq!(
                session.done(Operation::MovFromCr { register: 3 }),
                layout::guest_cr3(mode)[0]
            );
        }
    }
}

#[test]
fn without_ept_guest_physical_is_physical() {
    let caps = vmx_model::ModelCaps::default();
    for mode in [GuestMode::Long, GuestMode::Pae, GuestMode::Bits32] {
        for vpid in [0, 1] {
            let mut config = setup(mode, vpid);
            config.vms[0].view = None;
            let mut machine = machine(Retention::Everything);
            let mut session = Session::new(&mut machine, &caps, &config);
            // The guest's tables are found at other addresses: L1 copies them.
            for page in layout::guest::LONG..layout::DATA {
                for word in 0..512 {
                    let value = session.word(layout::guest_structure(page) + 8 * word);
                    session.write((page << 12) + 8 * word, value);
                }
            }
            session.write(DATA, 0x1234);
            assert_eq!(session.load(DATA), 0x1234, "{mode:?}");
        }
    }
}
