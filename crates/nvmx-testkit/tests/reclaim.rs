//! Does a processor that runs L2 ever walk a table that another one has made of a frame since?
//!
//! One processor stays in its guest, with what it has cached of its tables, while another one uses
//! up the frames of a host that has few, so that the tables of all have to go.

mod stage;

use nvmx_testkit::{Leaves, NestConfig};
use stage::*;
use vmx_defs::Field;
use vmx_model::program::GuestMode;
use vmx_model::{Action, Operation, Outcome, Retention, Step, layout};

fn load_on(l1: &mut L1<'_>, processor: usize, at: u64) -> u64 {
    match l1.guest(processor, Operation::Load { at, size: 8 }) {
        Outcome::Completed { value, .. } => value,
        other => panic!("{other:x?}"),
    }
}

#[test]
fn a_processor_that_stays_in_its_guest_keeps_its_own_pages() {
    for retention in [Retention::Everything, Retention::Random(1), Retention::Random(2)] {
        for frames in 16..28 {
            // How many pages the first processor reads in between.
            for reads in 1..=layout::DATA_PAGES {
                let leaves = Leaves::Small;
                let host = NestConfig { frames, leaves, ..NestConfig::default() };
                let mut setup = setup(GuestMode::Long, 1);
                setup.processors = 3;
                on_host(&host, retention, &setup, |l1| {
                    // The others have views of their own, and have used one page of them.
                    for (processor, view) in [(1, 2), (2, 1)] {
                        let value = layout::eptp(view, false);
                        let action = Action::SetField(Field::EPT_POINTER, value);
                        l1.carry_out(&Step { processor, action });
                        load_on(l1, processor, DATA);
                    }
                    for round in 0..3 {
                        // Large pages, which are split.
                        load_on(l1, 0, layout::LARGE);
                        for region in 0..2 {
                            load_on(l1, 0, layout::HUGE + (region << 21));
                        }
                        for page in 0..reads {
                            assert_eq!(load_on(l1, 0, DATA + (page << 12)), mark(0, page));
                        }
                        // By the cached way to a page that is not cached itself.
                        let page = 1 + 2 * round;
                        let seen = load_on(l1, 1, DATA + (page << 12));
                        assert_eq!(seen, mark(2, page), "{frames} frames, {retention:?}");
                    }
                });
            }
        }
    }
}
