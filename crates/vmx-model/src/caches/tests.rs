//! Does each operation invalidate what the SDM says, and nothing else?
//!
//! The caches are filled with a mapping of each kind for every combination of tags and addresses;
//! after each operation, a rule written down here in the manual's words says of each mapping whether
//! it must have gone. All others must be there.

use super::*;

const VPIDS: [u16; 3] = [0, 1, 2];
const PCIDS: [u16; 3] = [0, 1, GLOBAL];
const EPTS: [Option<u64>; 3] = [None, Some(0xa000), Some(0xb000)];
/// Two in one 2-MByte region, one elsewhere.
const ADDRESSES: [u64; 3] = [0x20_1000, 0x20_2000, 0x8000_0000];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mapping {
    Page { vpid: u16, pcid: u16, ept: Option<u64>, address: u64 },
    Table { vpid: u16, pcid: u16, ept: Option<u64>, address: u64 },
    GuestPage { ept: u64, address: u64 },
    GuestTable { ept: u64, address: u64 },
}

use Mapping::{GuestPage, GuestTable, Page, Table};

fn page() -> Translation {
    Translation {
        page: Hpa::new(0x1000),
        gpa: Gpa::new(0x1000),
        shift: 12,
        writable: true,
        user: true,
        no_execute: false,
        global: false,
        dirty: true,
        ept: EptPage::NONE,
    }
}

fn all() -> Vec<Mapping> {
    let mut all = Vec::new();
    for address in ADDRESSES {
        for ept in EPTS {
            for vpid in VPIDS {
                for pcid in PCIDS {
                    all.push(Page { vpid, pcid, ept, address });
                    if pcid != GLOBAL {
                        all.push(Table { vpid, pcid, ept, address });
                    }
                }
            }
            if let Some(ept) = ept {
                all.push(GuestPage { ept, address });
                all.push(GuestTable { ept, address });
            }
        }
    }
    all
}

fn full() -> Caches {
    let mut caches = Caches::new(Retention::Everything);
    for mapping in all() {
        match mapping {
            Page { vpid, pcid, ept, address } => {
                let global = pcid == GLOBAL;
                let pcid = if global { 1 } else { pcid };
                let entry = Translation { global, ..page() };
                caches.keep_translation(Space { vpid, pcid, ept }, Gva::new(address), entry);
            }
            Table { vpid, pcid, ept, address } => {
                let entry = Structure {
                    table: Hpa::new(0x2000),
                    gpa: Gpa::new(0x2000),
                    writable: true,
                    user: true,
                    no_execute: false,
                };
                caches.keep_structure(Space { vpid, pcid, ept }, Gva::new(address), 21, entry);
            }
            GuestPage { ept, address } => {
                let entry = GuestTranslation { page: Hpa::new(0), shift: 12, ept: EptPage::NONE };
                caches.keep_guest_translation(ept, Gpa::new(address), entry);
            }
            GuestTable { ept, address } => {
                let entry = GuestStructure { table: Hpa::new(0), rights: EptPermissions::all() };
                caches.keep_guest_structure(ept, Gpa::new(address), 21, entry);
            }
        }
    }
    caches
}

fn has(caches: &Caches, mapping: Mapping) -> bool {
    match mapping {
        Page { vpid, pcid, ept, address } => {
            let key = page_key(Space { vpid, pcid, ept }, 12, Gva::new(address));
            caches.translations.contains_key(&key)
        }
        Table { vpid, pcid, ept, address } => {
            let key = page_key(Space { vpid, pcid, ept }, 21, Gva::new(address));
            caches.structures.contains_key(&key)
        }
        GuestPage { ept, address } => {
            caches.guest_translations.contains_key(&guest_key(ept, 12, Gpa::new(address)))
        }
        GuestTable { ept, address } => {
            caches.guest_structures.contains_key(&guest_key(ept, 21, Gpa::new(address)))
        }
    }
}

/// `gone` says which mappings an operation must have dropped.
fn check(what: &str, operation: impl FnOnce(&mut Caches), gone: impl Fn(Mapping) -> bool) {
    let mut caches = full();
    operation(&mut caches);
    for mapping in all() {
        assert_eq!(has(&caches, mapping), !gone(mapping), "{what}: {mapping:x?}");
    }
}

fn region(address: u64) -> u64 {
    address >> 21
}

const AT: u64 = ADDRESSES[0];

#[test]
fn invlpg() {
    let operation = |caches: &mut Caches| caches.invlpg(1, 1, Gva::new(AT));
    check("INVLPG", operation, |mapping| {
        matches!(
            mapping,
            Page { vpid: 1, pcid: 1 | GLOBAL, address: AT, .. } | Table { vpid: 1, pcid: 1, .. }
        )
    });
}

#[test]
fn mov_to_cr3() {
    check(
        "MOV to CR3",
        |caches| caches.mov_to_cr3(1, 1),
        |mapping| matches!(mapping, Page { vpid: 1, pcid: 1, .. } | Table { vpid: 1, pcid: 1, .. }),
    );
}

#[test]
fn mov_to_cr4_that_changes_pae() {
    check(
        "MOV to CR4",
        |caches| caches.mov_to_cr4(1, 1),
        |mapping| {
            matches!(
                mapping,
                Page { vpid: 1, pcid: 1 | GLOBAL, .. } | Table { vpid: 1, pcid: 1, .. }
            )
        },
    );
}

#[test]
fn paging_off_or_globals_changed() {
    check(
        "MOV to CR0 or CR4",
        |caches| caches.all_contexts(1),
        |mapping| matches!(mapping, Page { vpid: 1, .. } | Table { vpid: 1, .. }),
    );
}

#[test]
fn invpcid_address() {
    let operation = |caches: &mut Caches| caches.invpcid_address(1, 1, Gva::new(AT));
    check("INVPCID 0", operation, |mapping| match mapping {
        Page { vpid: 1, pcid: 1, address: AT, .. } => true,
        Table { vpid: 1, pcid: 1, address, .. } => region(address) == region(AT),
        _ => false,
    });
}

#[test]
fn invpcid_context() {
    check(
        "INVPCID 1",
        |caches| caches.invpcid_context(1, 1),
        |mapping| matches!(mapping, Page { vpid: 1, pcid: 1, .. } | Table { vpid: 1, pcid: 1, .. }),
    );
}

#[test]
fn invpcid_all_but_globals() {
    check(
        "INVPCID 3",
        |caches| caches.invpcid_all_but_globals(1),
        |mapping| match mapping {
            Page { vpid: 1, pcid, .. } => pcid != GLOBAL,
            Table { vpid: 1, .. } => true,
            _ => false,
        },
    );
}

#[test]
fn page_fault() {
    let operation = |caches: &mut Caches| caches.page_fault(1, 1, Gva::new(AT));
    check("#PF", operation, |mapping| match mapping {
        Page { vpid: 1, pcid: 1 | GLOBAL, address: AT, .. } => true,
        Table { vpid: 1, pcid: 1, address, .. } => region(address) == region(AT),
        _ => false,
    });
}

#[test]
fn transition_with_vpid_disabled() {
    check(
        "VM entry or exit",
        |caches| caches.transition_without_vpid(),
        |mapping| matches!(mapping, Page { vpid: 0, .. } | Table { vpid: 0, .. }),
    );
}

#[test]
fn eptp_switch_with_vpid_disabled() {
    let operation = |caches: &mut Caches| caches.eptp_switch_without_vpid();
    check("VMFUNC", operation, |mapping| {
        matches!(mapping, Page { vpid: 0, ept: Some(_), .. } | Table { vpid: 0, ept: Some(_), .. })
    });
}

#[test]
fn ept_violation() {
    let space = Space { vpid: 1, pcid: 1, ept: Some(0xa000) };
    let guest = |mapping| match mapping {
        GuestPage { ept: 0xa000, address: AT } => true,
        GuestTable { ept: 0xa000, address } => region(address) == region(AT),
        _ => false,
    };
    let gpa = Gpa::new(AT);
    check("violation on a table", |caches| caches.ept_violation(0xa000, gpa, None), guest);
    let other = ADDRESSES[2];
    let translated = Some((space, Gva::new(other)));
    let operation = |caches: &mut Caches| caches.ept_violation(0xa000, gpa, translated);
    check("violation on a page", operation, |mapping| match mapping {
        Page { vpid: 1, pcid: 1 | GLOBAL, ept: Some(0xa000), address } => address == other,
        Table { vpid: 1, pcid: 1, ept: Some(0xa000), address } => address == other,
        mapping => guest(mapping),
    });
}

#[test]
fn invept() {
    check(
        "INVEPT 1",
        |caches| caches.invept_single(0xa000),
        |mapping| match mapping {
            Page { ept, .. } | Table { ept, .. } => ept == Some(0xa000),
            GuestPage { ept, .. } | GuestTable { ept, .. } => ept == 0xa000,
        },
    );
    check(
        "INVEPT 2",
        |caches| caches.invept_all(),
        |mapping| match mapping {
            Page { ept, .. } | Table { ept, .. } => ept.is_some(),
            GuestPage { .. } | GuestTable { .. } => true,
        },
    );
}

#[test]
fn invvpid() {
    let operation = |caches: &mut Caches| caches.invvpid_address(1, Gva::new(AT));
    check("INVVPID 0", operation, |mapping| match mapping {
        Page { vpid: 1, address: AT, .. } => true,
        Table { vpid: 1, address, .. } => region(address) == region(AT),
        _ => false,
    });
    check(
        "INVVPID 1",
        |caches| caches.invvpid_single(1),
        |mapping| matches!(mapping, Page { vpid: 1, .. } | Table { vpid: 1, .. }),
    );
    check(
        "INVVPID 2",
        |caches| caches.invvpid_all(),
        |mapping| match mapping {
            Page { vpid, .. } | Table { vpid, .. } => vpid != 0,
            _ => false,
        },
    );
    check(
        "INVVPID 3",
        |caches| caches.invvpid_retaining_globals(1),
        |mapping| match mapping {
            Page { vpid: 1, pcid, .. } => pcid != GLOBAL,
            Table { vpid: 1, .. } => true,
            _ => false,
        },
    );
}

#[test]
fn the_policies_keep_all_some_or_nothing() {
    let fill = |retention| {
        let mut caches = Caches::new(retention);
        for number in 0..1000u64 {
            let space = Space { vpid: 1, pcid: 0, ept: None };
            caches.keep_translation(space, Gva::new(number << 12), page());
        }
        caches.len().0
    };
    assert_eq!(fill(Retention::Everything), 1000);
    assert_eq!(fill(Retention::Nothing), 0);
    let random = fill(Retention::Random(7));
    assert!((600..900).contains(&random), "{random}");
    assert_eq!(fill(Retention::Random(7)), random);
    assert_ne!(fill(Retention::Random(8)), random);
}

#[test]
fn a_large_page_is_dropped_by_any_of_its_addresses() {
    let space = Space { vpid: 1, pcid: 0, ept: None };
    let mut caches = Caches::new(Retention::Everything);
    caches.keep_translation(space, Gva::new(0x20_0000), Translation { shift: 21, ..page() });
    assert!(caches.translation(space, Gva::new(0x3f_f000)).is_some());
    caches.invlpg(1, 0, Gva::new(0x31_2345));
    assert!(caches.is_empty());
}
